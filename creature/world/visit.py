"""
A visit: two visitors come, put things on the table and speak until they leave; a life is one visit after another.

Each is drawn from the seed of the life and its own number, and nothing is asked in it that only an earlier one tells:
attention sees as many ticks as a visit and the dark before it take.
"""

from dataclasses import dataclass

import numpy as np

from creature.world.scene import Setting, draw_next, draw_setting
from creature.world.script import LED_SECONDS, write_script
from creature.world.speech import SAMPLING_RATE
from ticks_creature import TICK_SECONDS

VISIT_SECONDS = (36.0, 40.0)
DARK_TICKS = 6  # with which a visit begins, but for the first of a life
SAMPLES = int(TICK_SECONDS * SAMPLING_RATE)
NOISE = 0.001
TAIL = 2 * SAMPLES  # how long what knocks in a visit sounds on behind it


class Visit:
    """
    What happens from the tick `begin` to the one before `end`, whoever lives it; the light goes on in the tick `light`.

    Args:
        seed, split: of the life.
        before: the visit that it follows in the same room, or None for the first one.

    `setting` is the room as it is at `light`, `script` what is said, `draw` draws whatever else chance decides.
    """

    def __init__(self, seed: int, split: str, before: "Visit | None" = None):
        self.number, self.begin = (before.number + 1, before.end) if before else (0, 0)
        self.draw = np.random.default_rng([seed, len(split), self.number])
        self.setting: Setting = draw_next(self.draw, before.setting) if before else draw_setting(self.draw, split)
        self.light = self.begin + (DARK_TICKS if before else 0)
        self.end = self.begin + int(self.draw.uniform(*VISIT_SECONDS) / TICK_SECONDS)
        self.script = write_script(self.draw, self.setting, self.light * TICK_SECONDS, self.end * TICK_SECONDS)

    def sounds(self, before: np.ndarray) -> np.ndarray:
        """
        float32: all that is said, and a faint noise, to the end and so far behind it as a knock may sound.

        before: that of the visit before, whose last knock is still heard. The sounds of the script are not kept.
        """
        sound = np.zeros((self.end - self.begin) * SAMPLES + TAIL, np.float32)
        sound[:-TAIL] = NOISE * self.draw.standard_normal(len(sound) - TAIL)
        sound[:TAIL] += before[-TAIL:]
        for request in self.script:
            begin = int(request.begins * SAMPLING_RATE) - self.begin * SAMPLES
            part = sound[begin : begin + len(request.samples)]
            part += request.samples[: len(part)].astype(np.float32)
            request.samples = None
        return sound


@dataclass(frozen=True)
class Lead:
    """A visitor who leads an arm from where it is commanded to be, over the table, to a place: angles at `rows`."""

    side: str
    begin: float
    rows: list[int]
    poses: list[np.ndarray]

    def pose(self, time: float) -> np.ndarray:
        first, over, goal = self.poses
        share = (time - self.begin) / LED_SECONDS
        return first + smooth(share / 0.4) * (over - first) + smooth((share - 0.4) / 0.55) * (goal - over)


def smooth(share: float) -> float:
    """Minimum jerk from 0 to 1 (Flash and Hogan 1985)."""
    share = min(1.0, max(0.0, share))
    return share**3 * (10 - 15 * share + 6 * share**2)
