"""A recorded life, played to a live creature, and what there is to see of it tick by tick."""

from collections import deque

import numpy as np

from creature.live.creature import LiveCreature
from creature.live.emission import Emission, WordStream
from creature.live.picture import SECONDS, Moment
from creature.live.playback import outer_senses
from creature.live.skeleton import Skeleton, sight_from_behind
from senses_creature import SenseProjection
from ticks_creature import TICK_SECONDS

SHOWN = round(SECONDS / TICK_SECONDS)  # ticks on the time line
# The lines of words: the argument of a recording or the ids of an emission that they come from, and the stream that a
# creature emits them in.
LINES = {
    "heard": ("external_voice_ids", None),
    "thought": ("thought_id", "internal_text"),
    "recorded thought": ("input_ids", None),
    "said": ("said_id", "external_text"),
    "recorded said": ("external_text_ids", None),
}


def is_more_than_text(model) -> bool:
    """Whether a model was trained on a sense or a stream beside its internal voice."""
    weights = model.config.loss_weights
    if any(weights[name] for name in model.streams.names if name != "internal_text"):
        return True
    return any(bool(m.weight.any()) for m in model.modules() if isinstance(m, SenseProjection))  # zero until trained


class Viewer:
    """
    A life that is played to a creature tick by tick; `moment` is what there is to see.

    It perceives what was recorded, and lives on what it thinks, says and does itself. Without a recording it perceives
    what it is told, and nothing else.

    Args:
        recording: a row of a folder of recordings. names: of the joints, where the folder has them.

    Raises:
        ValueError: for a recording that does not fit the model, or is damaged.
    """

    def __init__(self, creature: LiveCreature, recording: dict | None = None, names: list[str] | None = None):
        self.creature, self.config, self.names = creature, creature.config, names or []
        self.life = creature.processor.encode(recording) if recording is not None else {}
        self.cameras = [camera["name"] for camera in (recording or {}).get("images") or ()]
        self.length = len(next(iter(self.life.values()))) if self.life else None
        self.skeleton = self.sight = None
        self.has_parts = False  # whether the points of its skin are the parts of its joints
        if "joint_positions" in self.life and self.life["body_mask"].any():
            felt = self.life["body_mask"]
            poses = self.life["joint_positions"][felt][:, -1]
            self.skeleton = Skeleton(poses, self.life["joint_rotations"][felt][:, -1])
            self.sight = sight_from_behind(poses.mean(axis=0), self.names)
            if "touch_mask" in self.life:
                points = self.life["touch_points"][self.life["touch_mask"]]
                self.has_parts = bool((points < poses.shape[1]).all())
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Begin the life again. seed: of the creature's draws, by default the one of the life before."""
        self.creature.reset(seed)
        self.emission: Emission | None = None
        self.told: deque[int] = deque(maxlen=SHOWN * 10)
        self.mels: deque = deque(maxlen=SHOWN)
        self.commands: deque = deque(maxlen=SHOWN)
        there = {*self.life, *self.creature.streams, "external_voice_ids"}
        self.lines = [name for name, (source, stream) in LINES.items() if (stream or source) in there]
        self.words = {name: deque(maxlen=SHOWN) for name in self.lines}
        self.streams = {name: WordStream(self.creature.processor) for name in self.lines}

    @property
    def ended(self) -> bool:
        """Whether the recording is over."""
        return self.length is not None and self.creature.now >= self.length

    def tell(self, text: str) -> None:
        """Let it hear words, one token a tick from the next tick on at which nobody else speaks."""
        self.told.extend(self.creature.processor.encode_words(text))

    def step(self) -> Emission:
        """Live for one tick of the recording; nothing is left to live where `ended`."""
        tick, null = self.creature.now, self.config.null_token_id
        now = {name: value[tick] for name, value in self.life.items()}
        senses = outer_senses(now)
        if self.told and int(senses.get("external_voice_ids", -1)) in (-1, null):
            senses["external_voice_ids"] = now["external_voice_ids"] = np.array(self.told.popleft())
        self.emission = self.creature.step(senses)
        self._note(now)
        return self.emission

    def _note(self, now: dict[str, np.ndarray]) -> None:
        """Keep what the time line shows of this tick."""
        tick, null = self.emission.tick, self.config.null_token_id
        heard = "input_features" in now and now["input_features_mask"]
        self.mels.append(now["input_features"] if heard else None)
        for name in self.lines:
            source, stream = LINES[name]
            token = getattr(self.emission, source) if stream else now.get(source, null)
            if token is not None:
                self.words[name].extend(self.streams[name](int(token), tick + bool(stream)))
        recorded = np.full(self.config.action_size, np.nan)
        if now.get("action_mask"):
            recorded = self.creature.processor.denormalize("action", now["action"][-1])
        commanded = recorded * np.nan if self.emission.action is None else self.emission.action[-1]
        self.commands.append((recorded, commanded))

    def moment(self) -> Moment:
        """What there is to see after the latest tick."""
        creature, clock = self.creature, self.creature.clock
        numbers = {name: round(value, 4) for name, value in (("p50", clock.p50), ("p95", clock.p95))}
        numbers |= {"ticks": clock.ticks, "late": clock.late, "dropped": creature.now - clock.ticks}
        moment = Moment(creature.now * TICK_SECONDS, words={n: list(w) for n, w in self.words.items()}, clock=numbers)
        tick = creature.now - 1
        now = {name: value[tick] for name, value in self.life.items()} if tick >= 0 else {}
        if "pixel_values" in self.life:
            pictures = now["pixel_values"] if now.get("pixel_mask") else [None] * self.config.num_cameras
            moment.eyes = {
                name: None if picture is None else picture.transpose(1, 2, 0)
                for name, picture in zip(self.cameras, pictures, strict=False)
            }
        if "input_features" in self.life:
            moment.mel = self._mel()
        if self.skeleton is not None:
            moment.bones, moment.sight = self.skeleton.bones, self.sight
            moment.felt = now["joint_positions"][-1] if now.get("body_mask") else None
            if self.emission is not None and self.emission.rotations is not None:
                moment.commanded = self.skeleton.places(self.emission.rotations[-1])
        if "touch_mask" in self.life:
            moment.contacts = self._contacts(now) if now else []
        if self.config.action_size and self.commands:
            moment.numbers = self._numbers()
        return moment

    def _mel(self) -> np.ndarray:
        frames, bands = self.config.audio_frames_per_tick, self.config.num_mel_bins
        mel = np.full((SHOWN, frames, bands), np.nan, np.float32)
        for place, tick in enumerate(self.mels, SHOWN - len(self.mels)):
            if tick is not None:
                mel[place] = tick.reshape(frames, bands)
        return mel.reshape(-1, bands)

    def _contacts(self, now: dict[str, np.ndarray]) -> list[dict]:
        contacts = []
        for point, values, there in zip(now["touch_points"], now["touch_values"], now["touch_mask"], strict=True):
            if there:
                joint, (force, *_, temperature) = int(point) if self.has_parts else None, map(float, values)
                name = self.names[point] if self.has_parts and point < len(self.names) else f"point {point}"
                contacts.append({"name": name, "joint": joint, "force": force, "temperature": temperature})
        return contacts

    def _numbers(self) -> dict[str, np.ndarray]:
        names = self.config.action_names or [f"action {number}" for number in range(self.config.action_size)]
        rows = np.full((SHOWN, 2, self.config.action_size), np.nan)
        rows[SHOWN - len(self.commands) :] = np.array(self.commands)
        return {name: rows[..., number].T for number, name in enumerate(names)}
