"""From recordings to clips: what training reads, tick by tick, with the arguments of `forward` as columns.

Every recording is put on ticks once, by the processor of the model, and cut; the clips lie as Arrow files in a cache
folder. They are cut from the end of a recording backwards, so that a text that follows a long sound stays with the
sound before it. The first tick of a clip is nobody's target.
"""

import collections
import hashlib
import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from creature.data.text.tokenizer import tokenizer_hash
from creature.errors import UserError, first_line
from creature.files import explain_write_errors, require_writable
from creature.hardware import cpu_cores
from creature.loading import codec_hash

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from processing_creature import CreatureProcessor

BATCH_SECONDS, MOST_ROWS = 60.0, 64  # of the recordings that are held in memory at a time
ROWS_OF_PROCESS = 8  # recordings that are worth the start of a process
WHOLE = 1 << 20  # ticks of a clip that no recording is as long as
FEWEST_TICKS = 2  # of a clip: from the first tick, the second is predicted
ABOUT = ("recording_id", "split_group", "source", "license", "duration")  # columns that hold no life
ABOUT_CLIP = {"recording_id": "string", "first_tick": "int32", "ticks": "int32", "left_out": "string"}
# What each column feeds, and the organ that this needs: its field of the configuration.
ORGANS = {
    "audio": ({"input_features"}, "num_mel_bins"),
    "images": ({"pixel_values"}, "num_cameras"),
    "joint_positions": ({"joint_positions"}, "num_joints"),
    "joint_rotations": ({"joint_rotations", "rotation_targets"}, "num_joints"),
    "body_state": ({"body_state"}, "body_state_size"),
    "action": ({"action", "action_targets"}, "action_size"),
    "voice": ({"audio_codes", "audio_targets"}, "num_audio_codebooks"),
    "command_rotations": ({"animation", "rotation_targets"}, "num_joints"),
    "blend_shapes": ({"blend_shape_targets"}, "num_blend_shapes"),
    "eyes": ({"eye_targets"}, "num_blend_shapes"),
    "touch": ({"touch_points", "touch_surfaces", "touch_values"}, "num_touch_points"),
}
NO_CODEC = "there is no codec that turns it into codes; scripts/train_codec.py trains one, --codec names it"


def statistics(facts: dict) -> dict:
    """
    What a model's configuration takes from the recordings.json of the data that it is trained on: size, mean, standard
    deviation and names of body_state and action, as far as the recordings have them. A number that never changes gets
    the standard deviation 1.
    """
    fields = {}
    for name, sums in facts["statistics"].items():
        mean, std = np.array(sums["mean"]), np.array(sums["std"])
        std[std <= 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0  # what is left of a constant is rounding
        fields |= {f"{name}_size": len(mean), f"{name}_mean": mean.tolist(), f"{name}_std": std.tolist()}
        fields[f"{name}_names"] = facts["names"][name]
    return fields


def organs_of(recordings: "DatasetDict", facts: dict) -> dict:
    """
    The organs that recordings need, as fields of a configuration: as many cameras as most of them have; of those with a
    body, joints and the range of their rotations, measured and commanded numbers (0 where there are none) with their
    `statistics`, and a face if any of them commands one.
    """
    from pyarrow.compute import list_value_length

    organs, cameras = {}, collections.Counter()
    for split in recordings.values():  # the lengths alone: the pictures of a data set are more than memory holds
        cameras.update(list_value_length(split.data.column("images")).drop_null().to_pylist())
    if cameras:
        organs["num_cameras"] = cameras.most_common(1)[0][0]
    if facts["names"]:
        organs |= {"body_state_size": 0, "action_size": 0} | statistics(facts)
        sizes = {"num_joints": "joints", "num_blend_shapes": "blend_shapes"}
        organs |= {field: len(facts["names"].get(name, ())) for field, name in sizes.items()}
    if organs.get("num_joints"):
        ranges = facts.get("ranges", {})  # folders that were written before there were any have none
        seen = ranges.get("command_rotations", ranges.get("joint_rotations", {}))
        organs |= {"rotation_low": seen.get("low"), "rotation_high": seen.get("high")}
    return organs


def widen_limits(organs: dict, others: dict) -> dict:
    """The limits of joints that are no narrower than those of either, as fields; None where one does not know them."""
    limits = {}
    for name, wider in (("rotation_low", np.minimum), ("rotation_high", np.maximum)):
        pair = [np.array(fields.get(name) or []) for fields in (organs, others)]
        same = pair[0].shape == pair[1].shape and pair[0].size
        limits[name] = wider(*pair).tolist() if same else None
    return limits


def fed_by(recordings: "DatasetDict", config, codec: bool = False) -> tuple[list[str], list[str]]:
    """
    (the senses, the streams) of a creature that recordings feed, by the columns that any of them has; a voice feeds
    nothing without a codec.
    """
    from processing_creature import TEXTS

    arguments = set()
    feeds = {column: arguments for column, (arguments, _) in ORGANS.items()}
    feeds |= {column: set(names) - {None} for column, names in TEXTS.items()}
    for column, names in feeds.items():
        if has_column(recordings, column) and (codec or column != "voice"):
            arguments |= names
    return fed(arguments | ({"input_ids"} if config.null_token_id is not None else set()), config)


def has_column(recordings: "DatasetDict", column: str) -> bool:
    """Whether any recording has something in this column; folders written before a column was known lack it."""
    splits = [split for split in recordings.values() if column in split.column_names]
    return any(split.data.column(column).null_count < len(split) for split in splits)


def make_clips(
    recordings: "DatasetDict",
    facts: dict,
    processor: "CreatureProcessor",
    clip_ticks: int,
    cache_dir: str | Path = "data/clips",
    num_proc: int | None = None,
) -> "tuple[DatasetDict, dict]":
    """
    (the clips of every split, facts about them).

    Args:
        recordings, facts: as `schema.load_recordings` returns them.
        processor: of the model, whose organs decide what is used.
        clip_ticks: the most ticks of a clip, at least 2.
        cache_dir: where the clips are kept; they are made again only if recordings, processor or code have changed.
        num_proc: processes that make them; by default one a core, where each has `ROWS_OF_PROCESS` recordings to make.

    Returns:
        The columns of a clip are arguments of `MultiModalCreature.forward`, numpy arrays [T, ...], or None where its
        recording lacks them, and `recording_id` and `first_tick`, where in the recording it begins. The facts: `senses`
        and `streams` that the clips feed; for every split in `splits`: recordings, clips, ticks, `left_out`
        (recording_id and why), `cut` (recordings longer than a clip); `unused`: columns of the recordings, each with
        why nothing is made of it; `sources`, `licenses`, `data_hash`.

    Raises:
        UserError: for the numbers of another robot, a cache that cannot be written, or if no recording can be used.
    """
    from datasets import DatasetDict

    if clip_ticks < FEWEST_TICKS:
        raise UserError(f"clip_ticks is {clip_ticks}: a clip needs at least {FEWEST_TICKS} ticks, 512 is usual")
    _check_names(processor.config, facts["names"])
    require_writable(Path(cache_dir))
    made_by = _hash(processor, clip_ticks)
    clips, splits = DatasetDict(), {}
    for name, split in recordings.items():
        fingerprint = hashlib.sha256(f"{split._fingerprint} {made_by}".encode("ascii")).hexdigest()[:16]
        file = Path(cache_dir) / f"{name}-{fingerprint}.arrow"
        clips[name], splits[name] = _clips_of_split(name, split, processor, clip_ticks, file, num_proc)
        splits[name]["hash"] = fingerprint
    columns = {column for split in clips.values() for column in split.column_names}
    senses, streams = fed(columns, processor.config)
    return clips, {
        "senses": senses,
        "streams": streams,
        "splits": splits,
        "unused": _unused(recordings, columns, processor),
        "sources": _distinct(recordings, "source"),
        "licenses": _distinct(recordings, "license"),
        "data_hash": hashlib.sha256(" ".join(split.pop("hash") for split in splits.values()).encode()).hexdigest(),
    }


def fed(columns: set[str], config) -> tuple[list[str], list[str]]:
    """(the senses, the streams) of a creature that these arguments of `forward` feed."""
    from configuration_creature import STREAMS
    from processing_creature import TARGETS
    from senses_creature import SENSE_TABLE

    senses = ["internal_voice"] if "input_ids" in columns else []
    for sense in SENSE_TABLE:
        arguments = sense.arguments_of(config)
        if not sense.copy_of and arguments and columns.issuperset(arguments):
            senses.append(sense.name)
    first = {"internal_text": "labels", "external_text": "external_text_targets", "audio": "audio_targets"}
    moves = set(TARGETS) - set(first.values())
    return senses, [name for name in STREAMS if columns & ({first[name]} if name in first else moves)]


def _check_names(config, names: dict) -> None:
    """UserError where the recordings measure or command other numbers than the model knows statistics of."""
    for column in ("body_state", "action"):
        known, given = getattr(config, f"{column}_names"), names.get(column)
        if known and given and list(known) != list(given):
            place = next((i for i, pair in enumerate(zip(known, given, strict=False)) if pair[0] != pair[1]), -1)
            differ = f"number {place + 1} is {given[place]} and not {known[place]}"
            if place < 0:
                differ = f"there are {len(given)} numbers and not {len(known)}"
            raise UserError(
                f"the {column} of these recordings is not that of the model ({differ}), whose statistics do not fit: "
                "take recordings of the same body, or train another model on these"
            )


def _clips_of_split(
    name: str, split: "Dataset", processor: "CreatureProcessor", clip_ticks: int, file: Path, num_proc: int | None
) -> "tuple[Dataset, dict]":
    """One split of `make_clips` and its facts."""
    from datasets import Features, Value

    from processing_creature import ABSENT

    # The arrays are stored as .npy files: `datasets` takes 8 times as long to read its own arrays of more dimensions.
    kinds = ABOUT_CLIP | dict.fromkeys(ABSENT, "large_binary")
    seconds = float(np.mean(split.data.column("duration").to_numpy()))
    num_proc = num_proc or min(cpu_cores(), len(split) // ROWS_OF_PROCESS)
    with explain_write_errors(file, lambda: "start again"):
        made = split.map(
            partial(_clips_of_rows, processor=processor, clip_ticks=clip_ticks, alone=num_proc < 2),
            batched=True,
            batch_size=max(1, min(MOST_ROWS, int(BATCH_SECONDS / seconds))),
            remove_columns=split.column_names,
            features=Features({column: Value(kind) for column, kind in kinds.items()}),
            cache_file_name=str(file),
            new_fingerprint=file.stem.rpartition("-")[2],
            num_proc=num_proc if num_proc > 1 else None,
            desc=f"clips of {name}",
        )
    about = made.select_columns([*ABOUT_CLIP]).to_dict()
    left_out = {row: why for row, why in zip(about["recording_id"], about["left_out"], strict=True) if why}
    if len(left_out) == len(split):
        row, why = next(iter(left_out.items()))
        raise UserError(f"none of the {len(split)} recordings of {name} can be used; {row}: {why}")
    kept = [row for row, why in enumerate(about["left_out"]) if not why]
    empty = [column for column in ABSENT if made.data.column(column).null_count == len(made)]
    clips = made if len(kept) == len(made) else made.select(kept)
    clips = clips.remove_columns(["left_out", *empty]).with_transform(unpack_rows)
    return clips, {
        "recordings": len(split) - len(left_out),
        "clips": len(kept),
        "ticks": sum(about["ticks"][row] for row in kept),
        "left_out": left_out,
        "cut": len({about["recording_id"][row] for row in kept if about["first_tick"][row]}),
    }


def _clips_of_rows(rows: dict, processor: "CreatureProcessor", clip_ticks: int, alone: bool) -> dict:
    """Recordings, column by column -> their clips; a recording that cannot be used is one row that says why."""
    from processing_creature import ABSENT

    if not alone:
        import torch

        torch.set_num_threads(1)  # of the codec: a forked process waits for ever for the threads of its parent
    clips = []
    for values in zip(*rows.values(), strict=True):
        recording = dict(zip(rows, values, strict=True))
        try:
            arguments = processor.encode(recording)
            senses, _ = fed(set(arguments), processor.config)
            ticks = max(map(len, arguments.values()), default=0)
            if not set(senses) - {"internal_voice"}:
                has = ", ".join(name for name, value in recording.items() if value is not None and name not in ABOUT)
                raise ValueError(f"It has no sense that the model has, only {has or 'nothing'}: leave it out.")
            if ticks < FEWEST_TICKS:
                raise ValueError("It lasts one tick, and nothing can be predicted from it: leave it out.")
        except ValueError as error:
            clips.append({"recording_id": recording["recording_id"], "left_out": first_line(error)})
            continue
        except ImportError as error:
            raise UserError(str(error)) from error
        for stop in reversed(range(ticks, FEWEST_TICKS - 1, -clip_ticks)):
            start = max(0, stop - clip_ticks)
            about = {"recording_id": recording["recording_id"], "first_tick": start, "ticks": stop - start}
            clips.append(about | {name: _pack(value[start:stop]) for name, value in arguments.items()})
    return {name: [clip.get(name) for clip in clips] for name in (*ABOUT_CLIP, *ABSENT)}


def _pack(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(value), allow_pickle=False)  # row by row, as `_unpack` reads it
    return file.getvalue()


def unpack_rows(rows: dict) -> dict:
    return {
        name: [_unpack(value) if isinstance(value, bytes) else value for value in column]
        for name, column in rows.items()
    }


def _unpack(content: bytes) -> np.ndarray:
    """The array of a .npy file, without a copy."""
    file = io.BytesIO(content)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)


def _hash(processor: "CreatureProcessor", clip_ticks: int) -> str:
    """Hex digits that are others when the processor, its codec, its code or the length of clips are."""
    import codec_creature
    import feature_extraction_creature
    import processing_creature
    import ticks_creature

    digest = hashlib.sha256(f"{clip_ticks} {tokenizer_hash(processor.tokenizer)}".encode("ascii"))
    digest.update(processor.to_json_string().encode("utf-8"))
    if processor.codec is not None:
        digest.update(codec_hash(processor.codec).encode("ascii"))
    modules = (processing_creature, feature_extraction_creature, ticks_creature, codec_creature)
    for path in [*(Path(module.__file__) for module in modules), Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _unused(recordings: "DatasetDict", columns: set[str], processor: "CreatureProcessor") -> dict[str, str]:
    """Columns that the recordings have and no clip is made of, each with the reason."""
    unused = {}
    for column, (arguments, field) in ORGANS.items():
        if not has_column(recordings, column):
            continue
        if not getattr(processor.config, field):
            unused[column] = f"the model's {field} is 0"
        elif column == "voice" and processor.codec is None:
            unused[column] = NO_CODEC
        elif not arguments & columns:
            unused[column] = "the model feels more of the body than was recorded"
    return unused


def _distinct(recordings: "DatasetDict", column: str) -> list[str]:
    return sorted({value for split in recordings.values() for value in split.unique(column) if value})
