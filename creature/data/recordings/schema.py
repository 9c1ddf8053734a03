"""The schema of recordings, and the folder that holds them.

A recording is one stretch of life on one clock that starts at 0 s. A folder of recordings is what
`datasets.load_from_disk` opens (splits "train" and, where there is any, "validation"), with one recording a row, and
beside the splits a file recordings.json: the names of joints and numbers, statistics, ranges, report of the import.

| column | holds |
|---|---|
| recording_id, split_group, source, license | strings; a group (speaker, subject, episode ...) lies in one split only |
| duration | s |
| audio, voice | a sound file as bytes (16 kHz mono FLAC from our importers): what is heard, what is said |
| images | cameras, each a name, picture files as bytes (JPEG) and the time of each |
| external_voice, internal_text, external_text | entries of a word or several, `start` and `end` in s |
| joint_positions, joint_rotations | [N, J, 3] m in the frame of the root; [N, J, 4] quaternions (w, x, y, z) |
| body_state, action | [N, S] measured, [N, A] commanded numbers, in the units they came in |
| command_rotations | [N, J, 4] quaternions that the joints were commanded to take |
| blend_shapes, eyes | the commanded face: [N, 51] in [0, 1]; [N, 2, 4] gaze (left, up, ahead) and openness of an eye |
| touch | contacts: time, point and surface (ids), force N, place x, y, z m, temperature C |

What a recording does not have is None; an empty list is "nothing was felt or said". Every value has its own time and
nothing is resampled to ticks here: what happened at `time` may be known from `time` on, not before. An entry of text
begins at its `start`; one without a start has no known time (see `untimed`) and belongs to the end of the recording.
"""

import functools
import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from creature.errors import UserError, first_line
from creature.files import LOCK_FILE, lock_folder, replace_file, require_writable, sha256_file

if TYPE_CHECKING:
    from datasets import DatasetDict, Features

RECORDINGS_FILE = "recordings.json"
FORMAT = "creature recordings 1"
TEXTS = ("external_voice", "internal_text", "external_text")
FACE = {"command_rotations": 3, "blend_shapes": 2, "eyes": 3}  # commands of a jointed body; older folders lack them
# Column: dimensions of its values.
TRACKS = {"joint_positions": 3, "joint_rotations": 3, "body_state": 2, "action": 2} | FACE
NAMED = {name: "joints" if "joint_" in name or name == "command_rotations" else name for name in TRACKS}
SPLITS = ("train", "validation")
PART_SECONDS = 600.0  # importers cut longer recordings into several
BATCH_ROWS, BATCH_SECONDS = 500, 300.0  # of one record batch: what is held in memory while writing


class RecordingError(UserError):
    """A recording that cannot be used: one sentence that says why. An import counts it and goes on."""


@functools.cache
def recording_features() -> "Features":
    """The columns of a folder of recordings, as `datasets.Features`."""
    from datasets import Audio, Features, Image, List, Value

    def track(dimensions: int) -> dict:
        values = Value("float32")
        for _ in range(dimensions):
            values = List(values)
        return {"values": values, "times": List(Value("float64"))}

    entry = {"word": Value("string"), "start": Value("float64"), "end": Value("float64")}
    camera = {"name": Value("string"), "images": List(Image(decode=False)), "times": List(Value("float64"))}
    touch = {"time": Value("float64"), "point": Value("int32"), "surface": Value("int32")}
    touch |= dict.fromkeys(("force", "x", "y", "z", "temperature"), Value("float32"))
    return Features(
        dict.fromkeys(("recording_id", "split_group", "source", "license"), Value("string"))
        | {"duration": Value("float64"), "audio": Audio(decode=False), "voice": Audio(decode=False)}
        | {"images": List(camera)}
        | {name: List(entry) for name in TEXTS}
        | {name: track(dimensions) for name, dimensions in TRACKS.items()}
        | {"touch": List(touch)}
    )


def untimed(text: str) -> list[dict]:
    """A text of which nobody knows when it was said: one entry without times."""
    return [{"word": text, "start": None, "end": None}]


class RecordingsWriter:
    """
    Writes a folder of recordings row by row; memory holds a few minutes of them.

        with RecordingsWriter("recordings/arm") as writer:
            writer.add({"recording_id": "a", "duration": 1.0, "body_state": {"values": values, "times": times}},
                       names={"body_state": ["elbow", "wrist"]})
            writer.facts["report"] = {...}

    The folder appears when the block is left, and only if that was without an exception and anything was added. Until
    then everything lies in a hidden folder beside it, which the next writer of that folder removes if this process was
    killed. `facts` is what recordings.json will hold, apart from the statistics and ranges.

    Raises UserError for a folder that exists and is not empty, cannot be written, or is being written by another.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists already: choose another folder, or remove it first")
        require_writable(self.folder.parent)
        self.facts = {"format": FORMAT, "names": {}}
        self._splits, self._sums, self._ranges, self._ids = {}, {}, {}, set()
        self._part = self.folder.with_name(f".{self.folder.name}.part")

    def __enter__(self) -> "RecordingsWriter":
        self._part.mkdir(exist_ok=True)
        try:
            self._lock = lock_folder(self._part)
        except BlockingIOError:
            raise UserError(f"{self.folder} is being written by another process: wait, or choose another") from None
        for path in self._part.iterdir():  # what a killed process has left
            shutil.rmtree(path) if path.is_dir() else path.name == LOCK_FILE or path.unlink()
        return self

    def add(self, row: dict, split: str = "train", names: dict[str, list[str]] | None = None) -> None:
        """
        Add one recording to a split.

        Args:
            row: columns as `recording_features` has them; what is missing is None. Tracks may be numpy arrays.
            names: of "joints", "body_state", "action", "blend_shapes", "eyes", as far as the row has them. All
                recordings of a folder have the same, in the same order.

        Raises:
            RecordingError: for a row that does not fit the schema, or not the recordings before it. Nothing is added.
        """
        row = dict.fromkeys(recording_features()) | row
        _check_row(row, names or {}, self.facts["names"])
        if row["recording_id"] in self._ids:
            raise RecordingError(f"there are two recordings {row['recording_id']}: give one another name")
        self._ids.add(row["recording_id"])
        self.facts["names"] |= names or {}
        for name in ("body_state", "action"):
            if row[name] is not None and split == "train":
                self._sums.setdefault(name, _Sums()).add(np.asarray(row[name]["values"], np.float64))
        for name in ("joint_rotations", "command_rotations"):
            if row[name] is not None and split == "train":
                self._ranges.setdefault(name, _Range()).add(np.asarray(row[name]["values"], np.float32))
        row |= {name: to_arrow(row[name]) for name in TRACKS if row[name] is not None}
        if split not in self._splits:
            self._splits[split] = _ArrowFile(self._part / split)
        self._splits[split].add(row)

    def __exit__(self, kind, error, traceback) -> None:
        whole = False
        try:
            for split, file in self._splits.items():
                file.close(split)
            if kind is None and self._splits:
                self.facts["statistics"] = {name: sums.result() for name, sums in self._sums.items()}
                self.facts["ranges"] = {name: seen.result() for name, seen in self._ranges.items()}
                content = {"splits": [split for split in SPLITS if split in self._splits]}
                (self._part / "dataset_dict.json").write_text(json.dumps(content), encoding="utf-8")
                with replace_file(self._part / RECORDINGS_FILE, "w") as out:
                    json.dump(self.facts, out, indent=2, ensure_ascii=False)
                whole = True
        finally:
            if self._lock is not None:
                os.close(self._lock)
            (self._part / LOCK_FILE).unlink(missing_ok=True)
            if not whole:  # an exception, perhaps in here, or nothing was added
                shutil.rmtree(self._part, ignore_errors=True)
        if whole:
            if self.folder.exists():  # empty, as __init__ has seen; Windows renames over nothing
                self.folder.rmdir()
            self._part.rename(self.folder)


def to_arrow(track: dict) -> dict:
    """A track as pyarrow takes it: arrays of one dimension in lists."""
    values = np.asarray(track["values"], np.float32)
    rows = list(values) if values.ndim == 2 else [list(joints) for joints in values]
    return {"values": rows, "times": np.asarray(track["times"], np.float64)}


class _ArrowFile:
    """One split on its way to disk, as `datasets.load_from_disk` will find it."""

    def __init__(self, folder: Path):
        import pyarrow

        folder.mkdir()
        self.folder, self.features = folder, recording_features()
        self.schema = self.features.arrow_schema
        self.sink = pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb")
        self.writer = pyarrow.ipc.new_stream(self.sink, self.schema)
        self.rows, self.seconds = [], 0.0

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.seconds += row["duration"]
        if len(self.rows) >= BATCH_ROWS or self.seconds >= BATCH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self.rows:
            self.writer.write_batch(pyarrow.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows, self.seconds = [], 0.0

    def close(self, split: str) -> None:
        from creature.data.blocks import describe_arrow_folder

        self._flush()
        self.writer.close()
        self.sink.close()
        digest = sha256_file(self.folder / "data-00000-of-00001.arrow")
        describe_arrow_folder(self.folder, self.features, split, digest)


class _Sums:
    """Mean and standard deviation of rows of numbers, added piece by piece."""

    def __init__(self):
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """values [N, numbers]; Chan et al. (1979) merge the sums of squares without cancellation."""
        count, mean = len(values), values.mean(axis=0)
        total, apart = self.count + count, mean - self.mean
        self.squares = self.squares + ((values - mean) ** 2).sum(axis=0) + apart**2 * self.count * count / total
        self.mean, self.count = self.mean + apart * count / total, total

    def result(self) -> dict:
        return {"mean": self.mean.tolist(), "std": np.sqrt(self.squares / self.count).tolist(), "count": self.count}


class _Range:
    """The least and the most of every component of the rotation vectors of joints, rad."""

    def __init__(self):
        self.low, self.high = np.inf, -np.inf

    def add(self, rotations: np.ndarray) -> None:
        """rotations [N, joints, 4] quaternions of any length."""
        import torch

        from motor_creature import rotation_vector

        vectors = rotation_vector(torch.nn.functional.normalize(torch.tensor(rotations), dim=-1)).numpy()
        self.low, self.high = np.minimum(self.low, vectors.min(axis=0)), np.maximum(self.high, vectors.max(axis=0))

    def result(self) -> dict:
        return {"low": self.low.tolist(), "high": self.high.tolist()}


def _check_row(row: dict, names: dict, known: dict) -> None:
    """RecordingError for a row that does not fit the schema, or whose numbers have other names than `known`."""
    unknown = set(row) - set(recording_features())
    if unknown:
        raise RecordingError(f"there is no column {sorted(unknown)[0]!r}: see creature.data.recordings.schema")
    if not row["recording_id"] or not row["duration"] or not 0 < row["duration"] < math.inf:
        raise RecordingError("a recording needs a recording_id and a duration above 0 s")
    for name, dimensions in TRACKS.items():
        if row[name] is None:
            continue
        values, times = np.asarray(row[name]["values"]), np.asarray(row[name]["times"])
        if values.ndim != dimensions or len(values) != len(times) or not len(times):
            raise RecordingError(f"{name} has values of shape {values.shape} for {len(times)} times")
        if not np.isfinite(values).all():
            raise RecordingError(f"{name} holds values that are not finite: leave those rows out")
        _check_times(name, times)
        given = names.get(NAMED[name], [])
        if len(given) != values.shape[1]:
            raise RecordingError(f"{name} has {values.shape[1]} numbers or joints and {len(given)} names")
        if known.get(NAMED[name], given) != given:
            those = _short(known[NAMED[name]])
            raise RecordingError(
                f"its {NAMED[name]} are {_short(given)}, those of the recordings before it {those}: import it into "
                "a folder of its own"
            )
    for camera in row["images"] or ():
        if len(camera["images"]) != len(camera["times"]):
            raise RecordingError(
                f"camera {camera['name']} has {len(camera['images'])} pictures for {len(camera['times'])} times"
            )
        _check_times(f"camera {camera['name']}", np.asarray(camera["times"]))


def _check_times(name: str, times: np.ndarray) -> None:
    if not np.isfinite(times).all() or (np.diff(times) <= 0).any() or (times[:1] < 0).any():
        raise RecordingError(
            f"the times of {name} do not rise from 0 s on: sort them, and cut where a clock jumps back"
        )


def _short(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def load_recordings(folder: str | os.PathLike) -> "tuple[DatasetDict, dict]":
    """
    (the splits of a folder of recordings, its recordings.json: format, names, statistics, ranges, report).

    Raises UserError for a folder that is none, or is damaged.
    """
    from datasets import load_from_disk

    path = Path(folder)
    if not (path / RECORDINGS_FILE).is_file():
        raise UserError(f"{folder} is no folder of recordings: make one with scripts/import_recordings.py")
    try:
        facts = json.loads((path / RECORDINGS_FILE).read_text(encoding="utf-8"))
        splits = load_from_disk(str(path))
        missing = set(recording_features()) - set(splits["train"].features) - set(FACE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({first_line(error)}): import it again") from error
    if facts.get("format") != FORMAT or missing:
        raise UserError(f"{folder} was made by another version of this library: import it again")
    return splits, facts
