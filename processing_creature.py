# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""CreatureProcessor: from a recording to the arguments of `forward`, tick by tick, and from what is emitted back.

A recording is one stretch of life as a row of columns, each with its own clock: sound, pictures, words, what the body
measures and what it was commanded. Everything is put on ticks by its time stamp (`ticks_creature.py`), and nothing
looks ahead. What a recording does not have is absent from the arguments.
"""

import io
import os

import numpy as np
from transformers import AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

try:
    from .codec_creature import CODEC_FOLDER, check_codec, decode_voice, encode_voice, load_codec
    from .configuration_creature import CreatureConfig
    from .feature_extraction_creature import CreatureFeatureExtractor, read_sound
    from .losses_creature import IGNORE_INDEX
    from .senses_creature import SENSE_TABLE
    from .ticks_creature import (
        TICK_SECONDS,
        at_subframes,
        check_times,
        contacts_at_ticks,
        count_ticks,
        latest,
        linear,
        queue_tokens,
        slerp,
        tick_of,
    )
except ImportError:
    from codec_creature import CODEC_FOLDER, check_codec, decode_voice, encode_voice, load_codec
    from configuration_creature import CreatureConfig
    from feature_extraction_creature import CreatureFeatureExtractor, read_sound
    from losses_creature import IGNORE_INDEX
    from senses_creature import SENSE_TABLE
    from ticks_creature import (
        TICK_SECONDS,
        at_subframes,
        check_times,
        contacts_at_ticks,
        count_ticks,
        latest,
        linear,
        queue_tokens,
        slerp,
        tick_of,
    )

# The fields of the configuration that say which numbers a creature takes and gives. They are saved with the processor.
ORGAN_FIELDS = (
    "vocab_size", "bos_token_id", "eos_token_id", "null_token_id", "pad_token_id", "num_mel_bins",
    "audio_frames_per_tick", "num_cameras", "vision_image_size", "vision_channels", "num_joints",
    "subframes_per_tick", "body_state_size", "body_state_mean", "body_state_std", "body_state_names", "action_size",
    "action_mean", "action_std", "action_names", "num_touch_points", "num_touch_surfaces", "num_blend_shapes",
    "num_audio_codebooks", "audio_codebook_size",
)  # fmt: skip
# Columns of text: the argument that carries them, and that of their targets.
TEXTS = {
    "internal_text": ("input_ids", "labels"),
    "external_voice": ("external_voice_ids", None),
    "external_text": ("external_text_ids", "external_text_targets"),
}
BLENDS = {"joint_positions": linear, "joint_rotations": slerp, "body_state": linear, "action": None}
BLENDS |= dict.fromkeys(("command_rotations", "blend_shapes", "eyes"), None)  # a command holds until the next
# The targets of the streams, and all that a recording can become; what each holds where it is absent.
TARGETS = dict.fromkeys(("labels", "external_text_targets", "audio_targets"), IGNORE_INDEX)
TARGETS |= dict.fromkeys(("rotation_targets", "blend_shape_targets", "eye_targets", "action_targets"), 0.0)
TARGETS |= {"animation_target_mask": False}
ABSENT = {"input_ids": IGNORE_INDEX} | {n: value for sense in SENSE_TABLE for n, value in sense.arguments.items()}
ABSENT |= {sense.mask: False for sense in SENSE_TABLE if sense.mask} | TARGETS
CONTACT = ("time", "point", "surface", "force", "x", "y", "z", "temperature")
# What `generate` and `step` return, with the dimensions of one tick of it, rows included.
EMITTED = {"sequences": 1, "internal_text": 1, "external_text": 1, "audio": 2, "animation": 2, "action": 3}
SPACES = ("Ġ", "▁", "Ċ", " ")  # how tokens begin that follow a space, in byte-level and in SentencePiece vocabularies
PLAIN = {"add_special_tokens": False, "split_special_tokens": True}  # "<|endoftext|>" in a text is ordinary characters


class CreatureProcessor(ProcessorMixin):
    r"""
    Tokenizer, feature extractor, pictures, the statistics of the body and the codec of the voice in one.

        processor = CreatureProcessor.from_config(model.config, tokenizer)
        model(**processor(recording))

    `codec` is None, or what `load_codec` gives; it may be set, and is saved and loaded with the processor. Without it,
    a voice is left out.

    Args:
        feature_extractor ([`CreatureFeatureExtractor`]): the ears.
        tokenizer: of the model.
        organs (`dict`): the fields of [`CreatureConfig`] in `ORGAN_FIELDS`; `from_config` takes them from a model's.
    """

    def __init__(self, feature_extractor=None, tokenizer=None, organs: dict | None = None, chat_template=None):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.organs = organs or {}
        self.config = CreatureConfig(**self.organs)
        self._codec = None

    @classmethod
    def from_config(
        cls, config: CreatureConfig, tokenizer, codec: PreTrainedModel | None = None
    ) -> "CreatureProcessor":
        """The processor of a model with this configuration, tokenizer and codec."""
        ears = CreatureFeatureExtractor(feature_size=config.num_mel_bins, frames_per_tick=config.audio_frames_per_tick)
        processor = cls(ears, tokenizer, organs={name: getattr(config, name) for name in ORGAN_FIELDS})
        processor.codec = codec
        return processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options) -> "CreatureProcessor":
        """As of every processor of transformers; a codec that was saved with it is loaded too."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **options)
        where = {
            name: options[name] for name in ("cache_dir", "local_files_only", "token", "revision") if name in options
        }
        where["subfolder"] = "/".join(filter(None, (options.get("subfolder"), CODEC_FOLDER)))
        found = cached_file(
            pretrained_model_name_or_path, "config.json", **where, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if found:
            processor.codec = load_codec(pretrained_model_name_or_path, **where)
        return processor

    def save_pretrained(self, save_directory, **options) -> None:
        """As of every processor of transformers; the codec goes into the folder `codec` in it."""
        super().save_pretrained(save_directory, **options)
        if self.codec is not None:
            self.codec.save_pretrained(os.path.join(save_directory, CODEC_FOLDER))

    @property
    def codec(self) -> PreTrainedModel | None:
        """What turns the voice into codes, and codes into sound."""
        return self._codec

    @codec.setter
    def codec(self, codec: PreTrainedModel | None) -> None:
        if codec is not None and self.config.num_audio_codebooks:
            check_codec(codec, self.config.num_audio_codebooks, self.config.audio_codebook_size)
        self._codec = codec

    def __call__(
        self,
        recording: dict | list[dict] | None = None,
        *,
        audio=None,
        sampling_rate: int | None = None,
        images=None,
        text: str | None = None,
        external_voice=None,
        external_text=None,
        joint_positions=None,
        joint_rotations=None,
        state=None,
        action=None,
        voice=None,
        touch=None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        The arguments of `forward` for one recording, or for a list of them padded to the longest: [B, T, ...] each.

        Args:
            recording: a row of a folder of recordings, or a dict with some of its columns. It gives inputs and targets.
            audio, voice, sampling_rate: in place of a recording, parts of what is there now; they give inputs alone.
                Samples [N] or [N, channels], heard and said, or a column of a recording.
            images: one picture (of Pillow, or uint8 [H, W, 3]), a list with one a tick, a list with such a list for
                every camera, or a column of a recording.
            text: the beginning of the internal text, behind everything else, where the text of a recording without
                times is, too; "" is an inner voice that is silent. Without it, there is none.
            external_voice, external_text: a text, which is heard (or was said) from the first tick on, or a column.
            joint_positions, joint_rotations, state, action: arrays [N, ...] with one row a tick, in physical units, or
                columns with `values` and `times`; `state` is the column body_state.
            touch: a column.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: for a recording that does not fit the model, or is damaged; one sentence with the remedy.
        """
        parts = {
            "audio": audio, "images": images, "text": text, "external_voice": external_voice,
            "external_text": external_text, "joint_positions": joint_positions, "joint_rotations": joint_rotations,
            "body_state": state, "action": action, "voice": voice, "touch": touch,
        }  # fmt: skip
        parts = {name: part for name, part in parts.items() if part is not None}
        if (recording is None) == (not parts):
            raise ValueError("Give a recording, or parts of one (audio=..., images=..., text=...).")
        if voice is not None and self.codec is None:
            raise ValueError("A voice needs a codec: set `processor.codec` to what `load_codec` gives.")
        if recording is not None:
            rows = [self.encode(row) for row in (recording if isinstance(recording, list) else [recording])]
        else:
            arguments = self.encode(self._recording_of(parts, sampling_rate))
            silent = {"input_ids"} if "text" not in parts else set()
            rows = [{name: value for name, value in arguments.items() if name not in {*TARGETS, *silent}}]
        batch = {name: widen(value) for name, value in pad_clips(rows).items()}
        return BatchFeature(batch, tensor_type=return_tensors)

    def encode(self, recording: dict) -> dict[str, np.ndarray]:
        """
        The arguments of `forward` for one recording, [T, ...] each: int32, pictures uint8, masks bool, float32.

        T is the ticks of the recording, and those of a text without times, which begins where the recording ends and
        closes with end-of-text. Without internal_text, or where that has ended, the inner voice is silent, and no
        target: a creature always has one, and its layers begin at what it says. ValueError as for a call.
        """
        duration = recording.get("duration")
        if duration is None or not 0 <= duration < float("inf"):
            raise ValueError(f"The recording lasts {duration} s: give a duration in seconds.")
        ticks = count_ticks(duration)
        arguments = {}
        for organ in (self._ears, self._eyes, self._body, self._skin, self._commands, self._voice, self._texts):
            arguments |= organ(recording, ticks)
        length = max(map(len, arguments.values()), default=0)
        if arguments and self.config.null_token_id is not None:
            ids = arguments.get("input_ids", np.zeros(0, np.int32))
            arguments["input_ids"] = np.pad(ids, (0, length - len(ids)), constant_values=self.config.null_token_id)
        return {name: pad_ticks(name, value, length) for name, value in arguments.items()}

    # ----------------------------------------------------------------------------------------------------------------
    # The senses and streams, each from its columns
    # ----------------------------------------------------------------------------------------------------------------

    def _ears(self, recording: dict, ticks: int) -> dict:
        if recording.get("audio") is None or not self.config.num_mel_bins:
            return {}
        features = self.feature_extractor.extract(*read_sound(recording["audio"]))[:ticks]
        return {"input_features": features, "input_features_mask": np.ones(len(features), dtype=bool)}

    def _eyes(self, recording: dict, ticks: int) -> dict:
        cameras, config = recording.get("images"), self.config
        if not cameras or not config.num_cameras:
            return {}
        if len(cameras) < config.num_cameras:
            names = ", ".join(str(camera["name"]) for camera in cameras)
            raise ValueError(
                f"The recording has {len(cameras)} cameras ({names}) and the model sees with {config.num_cameras}: "
                f"set num_cameras to {len(cameras)}, or leave this recording out."
            )
        cameras, ends = cameras[: config.num_cameras], (np.arange(ticks) + 1) * TICK_SECONDS
        seen = []  # of every camera, which of its pictures each tick sees
        for camera in cameras:
            times = check_times(
                f"the camera {camera['name']}", camera["times"], len(camera["images"]), recording["duration"]
            )
            seen.append(latest(times, ends))
        mask = (np.stack(seen) >= 0).all(axis=0)
        pixels = np.zeros((ticks, len(cameras), 3, *config.image_shape), np.uint8)
        for place, (camera, index) in enumerate(zip(cameras, seen, strict=True)):
            for picture in np.unique(index[mask]):
                pixels[mask & (index == picture), place] = self.encode_picture(camera["images"][picture])
        return {"pixel_values": pixels, "pixel_mask": mask}

    def _body(self, recording: dict, ticks: int) -> dict:
        sense = next(sense for sense in SENSE_TABLE if sense.name == "proprioception")
        parts = sense.arguments_of(self.config)
        if not parts or any(recording.get(name) is None for name in parts):
            return {}  # half a body cannot be felt
        tracks = {name: self._track(recording, name, ticks) for name in parts}
        mask = np.stack([present for _, present in tracks.values()]).all(axis=0)
        return {name: values for name, (values, _) in tracks.items()} | {sense.mask: mask}

    def _skin(self, recording: dict, ticks: int) -> dict:
        contacts, config = recording.get("touch"), self.config
        if contacts is None or not config.num_touch_points:
            return {}
        columns = {name: np.array([contact[name] for contact in contacts], np.float64) for name in CONTACT}
        good = np.isfinite(np.stack(list(columns.values()))).all(axis=0)
        times, points, surfaces, *values = (column[good] for column in columns.values())
        for name, ids, size in (
            ("point", points, config.num_touch_points),
            ("surface", surfaces, config.num_touch_surfaces),
        ):
            if len(ids) and not 0 <= ids.min() <= ids.max() < size:
                bad = ids.max() if ids.max() >= size else ids.min()
                raise ValueError(f"The touch names the {name} {bad:.0f}, and the model has {size}: number them from 0.")
        placed = contacts_at_ticks(times, points, surfaces, np.stack(values, axis=-1), ticks)
        return dict(zip(("touch_points", "touch_surfaces", "touch_values", "touch_mask"), placed, strict=True))

    def _commands(self, recording: dict, ticks: int) -> dict:
        """The motor commands, as efference copy and as target; without any, the pose of a tick is its command."""
        config = self.config
        if recording.get("action") is not None:
            if not config.action_size:
                return {}
            values, present = self._track(recording, "action", ticks)
            return {
                "action": values, "action_mask": present, "action_targets": values, "animation_target_mask": present,
            }  # fmt: skip
        command = "command_rotations" if recording.get("command_rotations") is not None else "joint_rotations"
        if recording.get(command) is None or not config.num_joints:
            return {}
        rotations, present = self._track(recording, command, ticks)
        # A face that was not recorded is at rest, its eyes look straight ahead, and neither is a target.
        face = {"blend_shapes": np.zeros(config.num_blend_shapes), "eyes": np.array([[0.0, 0.0, 1.0, 0.0]] * 2)}
        parts, targets = [rotations], {"rotation_targets": rotations}
        for name, rest in face.items() if config.num_blend_shapes else ():
            if recording.get(name) is not None:
                values, known = self._track(recording, name, ticks)
                targets["blend_shape_targets" if name == "blend_shapes" else "eye_targets"] = values
                present = present & known
            else:
                values = np.tile(rest.astype(np.float32), (ticks, *[1] * rest.ndim))
            parts.append(values)
        animation = np.concatenate([part.reshape(ticks, -1) for part in parts], axis=1)
        return {"animation": animation, "animation_mask": present, "animation_target_mask": present} | targets

    def _voice(self, recording: dict, ticks: int) -> dict:
        """The codes of the own voice, as efference copy and as target; none without a codec."""
        if recording.get("voice") is None or not self.config.num_audio_codebooks or self.codec is None:
            return {}
        sound = read_sound(recording["voice"])
        codes = encode_voice(self.codec, *sound, self.config.num_audio_codebooks)[:ticks]
        return {"audio_codes": codes, "audio_targets": codes}

    def _track(self, recording: dict, name: str, ticks: int) -> tuple[np.ndarray, np.ndarray]:
        """
        A column with `values` [N, ...] and `times` [N] -> float32 [ticks, sub-frames, ...] and bool [ticks]; of the
        face, float32 [ticks, ...].
        """
        config = self.config
        sizes = {name: (config.num_joints, 4) for name in ("joint_rotations", "command_rotations")}
        sizes |= {"joint_positions": (config.num_joints, 3)}
        sizes |= {"blend_shapes": (config.num_blend_shapes,), "eyes": (2, 4)}
        size = sizes.get(name) or (getattr(config, f"{name}_size"),)
        values = np.asarray(recording[name]["values"], np.float32)
        times = check_times(name, recording[name]["times"], len(values), recording["duration"])
        if values.shape[1:] != size:
            fields = "num_blend_shapes" if name == "blend_shapes" else "num_joints" if name in sizes else f"{name}_size"
            raise ValueError(
                f"{name} has the shape {list(values.shape[1:])} and the model takes {list(size)}: set {fields} to "
                f"{values.shape[1] if values.ndim > 1 else 1}, or leave this recording out."
            )
        good = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not good.any():
            raise ValueError(f"{name} has no row of finite numbers: leave the column out.")
        face = name in ("blend_shapes", "eyes")
        subframes = 1 if face else config.subframes_per_tick
        values, present = at_subframes(times[good], values[good], ticks, subframes, BLENDS[name])
        values = values[:, 0] if face else values
        return (values if name in sizes else self.normalize(name, values)), present

    def _texts(self, recording: dict, ticks: int) -> dict:
        arguments = {}
        for column, names in TEXTS.items():
            if recording.get(column) is None:
                continue
            timed, untimed = [], []
            for entry in recording[column]:
                if entry["start"] is None:
                    ids = self.tokenizer(entry["word"] or "", **PLAIN).input_ids
                    finished = [self._end_of_text()] if ids and not entry.get("goes_on") else []
                    untimed.append((ticks, ids + finished))
                elif not entry["start"] <= recording["duration"] + TICK_SECONDS:
                    raise ValueError(
                        f"A word of {column} begins at {entry['start']} s, and the recording ends at "
                        f"{recording['duration']} s: give times that count from its beginning."
                    )
                else:
                    timed.append((tick_of(entry["start"]), self.encode_words(entry["word"] or "")))
            ids = queue_tokens(timed + untimed, ticks, self._null())
            arguments |= {name: ids for name in names if name}
        return arguments

    # ----------------------------------------------------------------------------------------------------------------
    # Single values, as a live creature meets them
    # ----------------------------------------------------------------------------------------------------------------

    def encode_words(self, words: str) -> list[int]:
        """The ids of words in the middle of a text, that is, behind a space."""
        words = words.strip()
        return self.tokenizer(f" {words}", **PLAIN).input_ids if words else []

    def encode_picture(self, picture) -> np.ndarray:
        """
        A picture as uint8 [3, H, W]: scaled until it fills the model's picture, then its middle.

        picture: of Pillow, uint8 [H, W, 3] or [H, W], or {"bytes", "path"} of a picture file. ValueError for anything
        else.
        """
        from PIL import Image, ImageOps

        height, width = self.config.image_shape
        try:
            if isinstance(picture, dict):
                picture = Image.open(io.BytesIO(picture["bytes"]) if picture.get("bytes") else picture["path"])
                picture.draft("RGB", (width, height))  # a large JPEG is decoded no finer than needed
            elif not isinstance(picture, Image.Image):
                picture = Image.fromarray(np.asarray(picture))
            picture = ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (width, height))
        except (OSError, TypeError, KeyError, AttributeError, SyntaxError, ValueError, ZeroDivisionError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"A picture cannot be decoded ({reason}): take it out, or record it again.") from error
        return np.asarray(picture).transpose(2, 0, 1)

    def normalize(self, name: str, values: np.ndarray) -> np.ndarray:
        """body_state or action [..., size] in physical units as the model takes them; ValueError without statistics."""
        mean, std = self.require_statistics(name)
        return ((values - mean) / std).astype(np.float32)

    def denormalize(self, name: str, values: np.ndarray) -> np.ndarray:
        """The inverse of `normalize`."""
        mean, std = self.require_statistics(name)
        return (values * std + mean).astype(np.float32)

    def require_statistics(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of body_state or action; ValueError where the configuration has none."""
        mean, std = getattr(self.config, f"{name}_mean"), getattr(self.config, f"{name}_std")
        if mean is None or std is None:
            raise ValueError(
                f"The model has no statistics of {name}: set {name}_mean and {name}_std in its configuration, as "
                "`creature.data.recordings.clips.statistics` gives them."
            )
        return np.array(mean), np.array(std)

    def _null(self) -> int:
        if self.config.null_token_id is None:
            raise ValueError("The model has no token for silence: set null_token_id in its configuration.")
        return self.config.null_token_id

    def _end_of_text(self) -> int:
        end = self.config.eos_token_id
        return end[0] if isinstance(end, list) else end

    def _recording_of(self, parts: dict, sampling_rate: int | None) -> dict:
        """Parts as they are given to a call -> a recording."""
        recording, seconds = {}, [0.0]
        for name in ("audio", "voice"):
            if name in parts:
                part = parts[name]
                sound = read_sound(part if isinstance(part, dict) else {"array": part, "sampling_rate": sampling_rate})
                recording[name] = dict(zip(("array", "sampling_rate"), sound, strict=True))
                seconds.append(len(sound[0]) / (sound[1] or 1))
        if "images" in parts:
            recording["images"] = cameras = _cameras(parts["images"])
            seconds += [camera["times"][-1] + TICK_SECONDS for camera in cameras if len(camera["times"])]
        for name in BLENDS:
            if name in parts:
                track = parts[name]
                if not isinstance(track, dict):
                    track = {"values": np.asarray(track), "times": np.arange(len(track)) * TICK_SECONDS}
                recording[name] = track
                seconds.append(track["times"][-1] + TICK_SECONDS)
        if "touch" in parts:
            recording["touch"] = parts["touch"]
            seconds += [contact["time"] + TICK_SECONDS for contact in parts["touch"]]
        for name in ("external_voice", "external_text"):
            if name in parts:
                words = parts[name]
                words = [{"word": words, "start": 0.0}] if isinstance(words, str) else words
                recording[name] = words
                seconds += [word["start"] + TICK_SECONDS for word in words if word["start"] is not None]
        if "text" in parts:
            recording["internal_text"] = [{"word": parts["text"], "start": None, "goes_on": True}]
        recording["duration"] = max(seconds)
        return recording

    # ----------------------------------------------------------------------------------------------------------------
    # Back again
    # ----------------------------------------------------------------------------------------------------------------

    def decode_outputs(self, output) -> list[dict]:
        """
        What a creature emitted, as columns of a recording: a dict for each of the B rows.

        Args:
            output: what `generate` or `step` returned, or a dict with some of its entries. The first tick of
                `sequences` is at 0 s, and so is that of a step.

        Returns:
            `internal_text`, `external_text`: the words, {word, start, end} in s, without silence. `joint_rotations`:
            `values` [N, joints, 4] with `times` [N] in s, one a sub-frame; likewise `action` [N, action_size] in
            physical units and, of a creature with a face, `blend_shapes` [N, shapes] and `eyes` [N, 2, 4], one a tick.
            `audio_codes` [ticks, codebooks], and with a codec `voice`, the sound of them: `array` [N] from 0 s on, and
            its `sampling_rate`.
        """
        output = {"sequences": output} if hasattr(output, "shape") else output
        found = {name: to_numpy(value) for name, value in output.items() if name in EMITTED and value is not None}
        for name, value in found.items():
            if value.ndim == EMITTED[name]:  # of a step, without the ticks
                found[name] = value[:, None]
        ticks = max(value.shape[1] for value in found.values())  # the other streams begin with the first new token
        rows = [{} for _ in next(iter(found.values()))]
        for name, values in found.items():
            for row, decoded in zip(values, rows, strict=True):
                decoded |= self._decode_stream(name, row, ticks - len(row))
        return rows

    def _decode_stream(self, name: str, values: np.ndarray, first: int) -> dict:
        """One stream [T, ...] of one row, which begins at tick `first`, as columns."""
        config, subframes = self.config, self.config.subframes_per_tick
        times = (first * subframes + np.arange(len(values) * subframes)) * TICK_SECONDS / subframes
        if name in ("sequences", "internal_text", "external_text"):
            return {name.replace("sequences", "internal_text"): self.decode_words(values, first)}
        if name == "audio":
            decoded = {"audio_codes": values}
            if self.codec is not None:
                rate, samples = self.codec.config.sampling_rate, decode_voice(self.codec, values)
                before = np.zeros(round(first * TICK_SECONDS * rate), np.float32)
                decoded["voice"] = {"array": np.concatenate((before, samples)), "sampling_rate": rate}
            return decoded
        if name == "action":
            values = self.denormalize(name, values.reshape(len(times), -1))
            return {name: {"values": values, "times": times}}
        joints, shapes, decoded = subframes * config.num_joints * 4, config.num_blend_shapes, {}
        rotations, face, eyes = np.split(values, [joints, joints + shapes], axis=-1)
        if joints:
            rotations = rotations.reshape(len(times), config.num_joints, 4)
            decoded["joint_rotations"] = {"values": rotations, "times": times}
        if shapes:
            decoded["blend_shapes"] = {"values": face, "times": times[::subframes]}
            decoded["eyes"] = {"values": eyes.reshape(-1, 2, 4), "times": times[::subframes]}
        return decoded

    def decode_words(self, ids: np.ndarray, first_tick: int = 0) -> list[dict]:
        """ids [T], one a tick -> the words in them as {word, start, end}: from their first token to their last."""
        words, silent = [], {self.config.null_token_id, self.config.pad_token_id}
        for tick, token in enumerate(np.asarray(ids).tolist(), first_tick):
            piece = self.tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(self.tokenizer) else None
            if token in silent or piece is None:
                continue
            if token in self.tokenizer.all_special_ids:  # end-of-text
                words.append(None)
            elif words and words[-1] and not piece.startswith(SPACES):
                words[-1][0].append(token)
                words[-1][2] = tick
            else:
                words.append([[token], tick, tick])
        decoded = [(self.tokenizer.decode(word[0]).strip(), *word[1:]) for word in words if word]
        return [
            {"word": word, "start": start * TICK_SECONDS, "end": (end + 1) * TICK_SECONDS}
            for word, start, end in decoded
            if word
        ]


def pad_ticks(name: str, value: np.ndarray, ticks: int) -> np.ndarray:
    """One argument of `forward` [T, ...], absent from T to `ticks`."""
    padding = [(0, ticks - len(value)), *[(0, 0)] * (value.ndim - 1)]
    return np.pad(value, padding, constant_values=ABSENT[name])


def pad_clips(rows: list[dict[str, np.ndarray]], ticks: int | None = None) -> dict[str, np.ndarray]:
    """
    Arguments of `forward` for several clips, [T, ...] each, as one batch [B, T, ...], absent where a clip has none.

    ticks: T; by default that of the longest row.
    """
    ticks = ticks or max(len(value) for row in rows for value in row.values())
    return place_clips([(row, 0, clip) for row, clip in enumerate(rows)], len(rows), ticks)


def place_clips(
    clips: list[tuple[int, int, dict[str, np.ndarray]]], rows: int, ticks: int, like: dict | None = None
) -> dict[str, np.ndarray]:
    """
    A batch [rows, ticks, ...] of clips, each given as (its row, its first tick there, its arguments [T, ...]).

    like: further arguments that the batch has, as arrays [0 or more, ...]: absent where no clip has them. Contacts are
    padded to a power of two, because torch.compile compiles every size separately.
    """
    batch, like = {}, like or {}
    for name in dict.fromkeys([*like, *(name for *_, clip in clips for name in clip)]):
        values = [clip[name] for *_, clip in clips if name in clip] + ([like[name]] if name in like else [])
        shape = np.max([value.shape[1:] for value in values], axis=0).astype(int).tolist()
        if name.startswith("touch_"):
            shape[0] = 1 << max(shape[0] - 1, 0).bit_length()
        batch[name] = np.full((rows, ticks, *shape), ABSENT[name], values[0].dtype)
        for row, first, clip in clips:
            if name in clip:
                value = clip[name]
                batch[name][(row, slice(first, first + len(value)), *map(slice, value.shape[1:]))] = value
    return batch


def widen(value: np.ndarray) -> np.ndarray:
    """Ids as int64, as torch wants them; everything else as it is."""
    return value.astype(np.int64) if value.dtype == np.int32 else value


def to_numpy(value) -> np.ndarray:
    return np.asarray(value.detach().float().cpu() if value.is_floating_point() else value.cpu())


def _cameras(images) -> list[dict]:
    """Pictures as they are given to a call -> the column `images`, one picture a tick."""
    if not isinstance(images, list | tuple):
        images = [images]
    if isinstance(images[0], dict) and "images" in images[0]:
        return images
    if not isinstance(images[0], list | tuple):
        images = [images]
    return [
        {"name": str(number), "images": camera, "times": np.arange(len(camera)) * TICK_SECONDS}
        for number, camera in enumerate(images)
    ]


AutoProcessor.register(CreatureConfig, CreatureProcessor, exist_ok=True)
CreatureProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["CreatureProcessor"]
