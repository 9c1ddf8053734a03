"""What arrives at one tick, in physical units, as the arguments of `forward`: the same numbers as a whole recording."""

from collections import deque

import numpy as np

from processing_creature import CreatureProcessor
from senses_creature import SENSE_TABLE

MOST_WORDS_WAITING = 750  # ids of words that queue: a minute; of more, the oldest are never heard
BODY = next(sense for sense in SENSE_TABLE if sense.name == "proprioception")


class Perception:
    """
    The senses of one life, tick by tick. What the model has no organ for is not perceived.

    processor: of the model. sampling_rate: of the sound that arrives, in Hz.
    """

    def __init__(self, processor: CreatureProcessor, sampling_rate: int = 16000):
        self.processor, self.config, self.sampling_rate = processor, processor.config, sampling_rate
        self.reset()

    def reset(self) -> None:
        """Forget the sound and the words that have not become a tick yet."""
        self.ears = self.processor.feature_extractor.stream(self.sampling_rate)
        self.words: deque[int] = deque(maxlen=MOST_WORDS_WAITING)

    def __call__(
        self, audio=None, images=None, state=None, joint_positions=None, joint_rotations=None, touch=None, words=None
    ) -> dict[str, np.ndarray]:
        """The arguments of `forward` [...] for this tick, without B and T, as far as a sense is there; see `tick`."""
        arguments = {}
        if images is not None and self.config.num_cameras:
            arguments |= self._see(images)
        arguments |= self._feel_body(joint_positions, joint_rotations, state)
        if touch and self.config.num_touch_points:
            arguments |= self._feel_touch(touch)
        arguments |= self._read(words)
        # Last, because sound that has been heard cannot be heard again where another sense does not fit the model.
        if audio is not None and self.config.num_mel_bins:
            arguments |= self._hear(audio)
        if self.words:
            arguments["external_voice_ids"] = np.array(self.words.popleft())
        return arguments

    def _read(self, words) -> dict:
        """Queue the words; NULL where somebody could speak and does not."""
        if words is None:
            return {}
        words = [words] if isinstance(words, str | dict) else words
        texts = [word["word"] if isinstance(word, dict) else word for word in words]
        for ids in [self.processor.encode_words(text) for text in texts]:
            self.words.extend(ids)
        null = self.config.null_token_id
        return {} if null is None else {"external_voice_ids": np.array(null)}

    def _hear(self, audio) -> dict:
        ticks = self.ears(audio)
        # Of sound that comes late and all at once, the latest; of too little, nothing until its tick is complete.
        return {"input_features": ticks[-1]} if len(ticks) else {}

    def _see(self, images) -> dict:
        single = hasattr(images, "size") and np.ndim(images) < 4 or isinstance(images, dict)
        pictures, cameras = [images] if single else list(images), self.config.num_cameras
        if len(pictures) < cameras:
            raise ValueError(f"images has {len(pictures)} pictures, and the model sees with {cameras} cameras.")
        if any(picture is None for picture in pictures[:cameras]):
            return {}  # half a sight is none, as in recordings
        return {"pixel_values": np.stack([self.processor.encode_picture(picture) for picture in pictures[:cameras]])}

    def _feel_body(self, positions, rotations, state) -> dict:
        """Half a body is not felt; but rotations alone are the pose that animation starts from."""
        given = {"joint_positions": positions, "joint_rotations": rotations, "body_state": state}
        parts = {name: given[name] for name in BODY.arguments_of(self.config) if given[name] is not None}
        felt = {name: self._subframes(name, value) for name, value in parts.items()}
        if len(felt) < len(BODY.arguments_of(self.config)):
            felt = {name: value for name, value in felt.items() if name == "joint_rotations"}
        return felt if all(np.isfinite(value).all() for value in felt.values()) else {}

    def _subframes(self, name: str, value) -> np.ndarray:
        """[sub-frames, ...] of one measurement [...] that holds for the tick, or of one for each sub-frame."""
        config = self.config
        sizes = {"joint_positions": (config.num_joints, 3), "joint_rotations": (config.num_joints, 4)}
        size, value = sizes.get(name, (config.body_state_size,)), np.asarray(value, np.float32)
        if value.shape == size:
            value = np.broadcast_to(value, (config.subframes_per_tick, *size))
        if value.shape != (config.subframes_per_tick, *size):
            raise ValueError(
                f"{name.replace('body_', '')} has the shape {list(value.shape)}: give {list(size)}, or "
                f"{[config.subframes_per_tick, *size]} with a measurement for each sub-frame."
            )
        return self.processor.normalize(name, value) if name == "body_state" else value

    def _feel_touch(self, contacts: list[dict]) -> dict:
        now = [contact | {"time": 0.0} for contact in contacts]
        return {name: value[0] for name, value in self.processor._skin({"touch": now}, 1).items()}
