"""A recorded life, played to a live creature: what it thinks and says, beside what was thought and said there."""

import time
from collections.abc import Iterator

import numpy as np

from creature.errors import UserError, one_line
from creature.live.creature import LiveCreature
from creature.live.emission import Emission
from generation_creature import OUTER_SENSES
from ticks_creature import TICK_SECONDS

# The columns of a time line, and where the words of a recording stand in it.
COLUMNS, WIDTH = ("hears", "thinks", "recorded", "says", "recorded"), 16
RECORDED = {"external_voice": 0, "internal_text": 2, "external_text": 4}
THINKS, SAYS = 1, 3


def find_recording(folder: str, wanted: str | None = None) -> dict:
    """A recording of a folder, by default the first of its validation split; UserError where there is none."""
    from creature.data.recordings.schema import load_recordings

    splits, _ = load_recordings(folder)
    if wanted is None:
        return splits["validation" if "validation" in splits else "train"][0]
    for split in splits.values():
        ids = split.data.column("recording_id").to_pylist()
        if wanted in ids:
            return split[ids.index(wanted)]
    raise UserError(f"{folder} has no recording {wanted}: give one of its names, such as {', '.join(ids[:3])}")


def outer_senses(life: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arguments of `forward` that come from outside, out of those of a recording."""
    return {name: value for name, value in life.items() if name in OUTER_SENSES}


def play(creature: LiveCreature, recording: dict) -> Iterator[Emission]:
    """
    Live through a recording, tick by tick: it perceives what was recorded, and its own outputs are its own.

    ValueError, before the first tick, for a recording that does not fit the model, or is damaged.
    """
    life = creature.processor.encode(recording)
    senses = outer_senses(life)
    for tick in range(len(next(iter(life.values()), ()))):
        yield creature.step({name: value[tick] for name, value in senses.items()})


def time_line(
    creature: LiveCreature, recording: dict, seconds: float | None = None, real_time: bool = False
) -> Iterator[str]:
    """
    Play a recording; a line for each word that is heard, thought or said, or was in the recording.

    seconds: of life after which it ends. real_time: one tick every 80 ms at most.
    """
    waiting = sorted(
        (recording["duration"] if entry["start"] is None else entry["start"], column, entry["word"] or "")
        for name, column in RECORDED.items()
        for entry in recording.get(name) or ()
    )
    started, end = time.perf_counter(), 0.0
    for emission in play(creature, recording):
        end = (emission.tick + 1) * TICK_SECONDS
        come = [event for event in waiting if event[0] < end]
        waiting = waiting[len(come) :]
        come += [(word["start"], THINKS, word["word"]) for word in emission.thought]
        come += [(word["start"], SAYS, word["word"]) for word in emission.said]
        yield from event_lines(come)
        if seconds is not None and end >= seconds:
            return
        if real_time:
            time.sleep(max(0.0, started + end - time.perf_counter()))
    for column, stream in ((THINKS, creature.thinking), (SAYS, creature.saying)):
        yield from event_lines([(word["start"], column, word["word"]) for word in stream.finish()])
    yield from event_lines(waiting)


def heading(columns: tuple[str, ...] = COLUMNS) -> str:
    """The line above a time line."""
    return f"{'time':>9}  " + "".join(f"{column:{WIDTH}}" for column in columns).rstrip()


def event_lines(events: list[tuple[float, int, str]]) -> Iterator[str]:
    """(seconds, column, words) of one tick, a line each."""
    for moment, column, words in sorted(events):
        yield f"{moment:7.2f} s  {' ' * (WIDTH * column)}{one_line(words)}"


def clock_line(creature: LiveCreature, seconds: float) -> str:
    """What a life took, in words."""
    clock, lived = creature.clock, creature.clock.ticks * TICK_SECONDS
    return (
        f"{clock.ticks:,} ticks, {lived:.1f} s of life in {seconds:.1f} s, {lived / seconds:.1f} times real time; a "
        f"tick takes {1000 * clock.p50:.1f} ms (p50), {1000 * clock.p95:.1f} ms (p95); late: {clock.late}"
    )
