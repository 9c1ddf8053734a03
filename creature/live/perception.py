"""What arrives at one tick, in physical units, as the arguments of `forward`: the same numbers as a whole recording."""

from collections import deque

import numpy as np

from processing_creature import CONTACT, CreatureProcessor
from senses_creature import SENSE_TABLE

LARGEST = 1e9  # in physical units; larger numbers overflow in the model, and every later tick would be NaN
CONTACT_NOW = CONTACT[1:]  # of a contact, without the time
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
        if touch is not None and self.config.num_touch_points:
            arguments |= self._feel_touch(touch)
        # Sound and words last: they change what is heard later, and a sense that does not fit must change nothing.
        ids = self._read(words)
        if audio is not None and self.config.num_mel_bins:
            arguments |= self._hear(audio)
        self.words.extend(ids)
        if words is not None and self.config.null_token_id is not None:
            arguments["external_voice_ids"] = np.array(self.config.null_token_id)  # somebody could speak, and does not
        if self.words:
            arguments["external_voice_ids"] = np.array(self.words.popleft())
        return arguments

    def _read(self, words) -> list[int]:
        """The ids of the words."""
        words = [words] if isinstance(words, str | dict) else words
        try:
            texts = [word["word"] if isinstance(word, dict) else word for word in (() if words is None else words)]
            "".join(texts).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError('"words" holds half a character: give whole ones.') from None
        except (KeyError, TypeError):
            raise ValueError(
                '"words" is a text or a list of texts, empty for silence, or null (None) where nobody could speak.'
            ) from None
        return [token for text in texts for token in self.processor.encode_words(text)]

    def _hear(self, audio) -> dict:
        ticks = self.ears(_physical("audio", audio))
        # Of sound that comes late and all at once, the latest; of too little, nothing until its tick is complete.
        return {"input_features": ticks[-1]} if len(ticks) else {}

    def _see(self, images) -> dict:
        single = hasattr(images, "size") and np.ndim(images) < 4 or isinstance(images, dict)
        if not single and not hasattr(images, "__iter__"):
            raise ValueError(f"images is {type(images).__name__}: give a list with a picture for each camera.")
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
        size = sizes.get(name, (config.body_state_size,))
        value = _physical(name.replace("body_", ""), value).astype(np.float32)
        if value.shape == size:
            value = np.broadcast_to(value, (config.subframes_per_tick, *size))
        if value.shape != (config.subframes_per_tick, *size):
            raise ValueError(
                f"{name.replace('body_', '')} has the shape {list(value.shape)}: give {list(size)}, or "
                f"{[config.subframes_per_tick, *size]} with a measurement for each sub-frame."
            )
        return self.processor.normalize(name, value) if name == "body_state" else value

    def _feel_touch(self, contacts: list[dict]) -> dict:
        whole = isinstance(contacts, list | tuple) and all(isinstance(contact, dict) for contact in contacts)
        if not whole or not all(contact.keys() >= {*CONTACT_NOW} for contact in contacts):
            raise ValueError(f"touch is no list of contacts: give a dict of {', '.join(CONTACT_NOW)} for each.")
        if not contacts:
            return {}
        for name in CONTACT_NOW:
            _physical(f"{name} of touch", [contact[name] for contact in contacts])
        now = [contact | {"time": 0.0} for contact in contacts]
        return {name: value[0] for name, value in self.processor._skin({"touch": now}, 1).items()}


def _physical(name: str, value) -> np.ndarray:
    """An array of numbers; ValueError for what is none, and for numbers that no sense measures."""
    try:
        value = np.asarray(value)
        value = value.astype(np.float64) if value.dtype.kind == "O" else value
    except (TypeError, ValueError):
        raise ValueError(f"{name} is no array of numbers: give one.") from None
    if value.dtype.kind not in "fiu":
        raise ValueError(f"{name} is an array of {value.dtype}: give one of numbers.")
    if value.dtype.kind == "f" and (np.isfinite(value) & (np.abs(value) > LARGEST)).any():
        raise ValueError(f"{name} has a number beyond {LARGEST:g}: give physical units.")
    return value
