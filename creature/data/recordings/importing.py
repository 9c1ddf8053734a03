"""From folders of any kind to one folder of recordings: format, split, reading, report."""

import csv
import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from creature.data.recordings.bvh import find_motions
from creature.data.recordings.hub import find_dataset, find_recordings
from creature.data.recordings.lerobot import find_episodes
from creature.data.recordings.schema import (
    RECORDINGS_FILE,
    TEXTS,
    TRACKS,
    RecordingError,
    RecordingsWriter,
)
from creature.data.recordings.sound import find_sounds
from creature.data.recordings.sources import SOUND_FILES, TABLE_FILES, ImportOptions, Job, Notes, list_files
from creature.data.recordings.tables import find_tables
from creature.data.text.sources import is_arrow_folder, is_hub_name
from creature.errors import UserError, first_line
from ticks_creature import TICK_SECONDS

FINDERS = {
    "lerobot": find_episodes,
    "audio": find_sounds,
    "bvh": find_motions,
    "table": find_tables,
    "recordings": find_recordings,
    "datasets": find_dataset,
}
VALIDATION_FRACTION = 0.1
FEEDS = {  # column: what it is to the creature
    "audio": "ears",
    "voice": "own voice",
    "images": "eyes",
    "external_voice": "words of others",
    "internal_text": "own thoughts",
    "external_text": "own words",
    "joint_positions": "body (joints)",
    "joint_rotations": "body (joints), animation",
    "body_state": "body (measured numbers)",
    "action": "animation (commanded numbers)",
    "command_rotations": "animation (commanded joints)",
    "blend_shapes": "animation (face)",
    "eyes": "animation (eyes)",
    "touch": "skin",
}
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, csv.Error)


def import_recordings(
    inputs: list[str],
    output: str,
    format: str = "auto",
    options: ImportOptions | None = None,
    license: str | None = None,
    progress: bool = True,
) -> dict:
    """
    Import folders (or names of data sets) as one folder of recordings and return its recordings.json.

    What cannot be used is left out and counted in the report, the rest goes on. Memory holds minutes, not hours. The
    output appears when it is whole. Raises UserError for an input that is missing or of no known kind, for an output
    that exists, and if nothing could be used.
    """
    options, notes = options or ImportOptions(), Notes()
    for regex in (options.split_group, options.validation_groups):
        try:
            re.compile(regex or "")
        except re.error as error:
            raise UserError(f"{regex} is no regular expression ({error}): correct it") from error
    if options.validation_fraction is not None and not 0 <= options.validation_fraction < 1:
        raise UserError(f"validation_fraction {options.validation_fraction} is not in [0, 1): a usual value is 0.1")
    with RecordingsWriter(output) as writer:
        jobs, formats = [], {}
        for name in inputs:
            chosen = detect_format(name) if format == "auto" else format
            if chosen != "datasets" and not Path(name).is_dir():
                raise UserError(f"there is no folder {name}: check the path")
            found = FINDERS[chosen](Path(name), options, notes)
            if not found:
                raise UserError(f"{name} holds nothing to import as {chosen}{_reasons(notes)}: see docs/recordings.md")
            formats[name] = chosen
            about = {"source": Path(name).name or name, "license": license or _license(name)}
            prefix = f"{about['source']}/" if len(inputs) > 1 else ""
            jobs += [(job, prefix, about) for job in found]
        split_of = assign_splits([job for job, *_ in jobs], options, notes)
        totals, began = _Totals(), time.perf_counter()
        with tqdm(total=sum(job.count for job, *_ in jobs), desc="importing", disable=not progress) as bar:
            for job, prefix, about in jobs:
                done = 0
                for row, names in _read(job, notes):
                    row = about | {name: value for name, value in row.items() if value is not None}
                    row["recording_id"] = prefix + row["recording_id"]
                    split = split_of(job, row["split_group"])
                    try:
                        writer.add(row, split, names)
                    except RecordingError as error:
                        notes.leave_out(str(error), row["recording_id"])
                    else:
                        totals.add(row, split)
                    done += 1
                    bar.update()
                bar.update(max(0, job.count - done))
        if not totals.splits:
            raise UserError(f"no recording could be used{_reasons(notes)}: see docs/recordings.md")
        writer.facts["report"] = totals.report() | {
            "inputs": [{"source": Path(name).name or name, "format": kind} for name, kind in formats.items()],
            "left_out": _listed(notes.left_out),
            "remarks": _listed(notes.remarks),
            "seconds": round(time.perf_counter() - began, 1),
        }
    return writer.facts


def _read(job: Job, notes: Notes) -> Iterator[tuple[dict, dict]]:
    """The rows of a job, up to the first that cannot be read."""
    try:
        yield from job.rows()
    except READ_ERRORS as error:
        reason = first_line(error)
        known = isinstance(error, RecordingError)
        notes.leave_out(reason if known else f"it cannot be read ({type(error).__name__}: {reason})", job.name)


def detect_format(name: str) -> str:
    """The format of an input; UserError for a name that is nothing, or a folder of nothing that is known."""
    folder = Path(name)
    if not folder.is_dir():
        if is_hub_name(name):
            return "datasets"
        raise UserError(f"there is no folder {name}: check the path, or name a data set on the Hub as owner/name")
    if (folder / RECORDINGS_FILE).is_file():
        return "recordings"
    if is_arrow_folder(folder):
        return "datasets"
    if (folder / "meta" / "info.json").is_file():
        return "lerobot"
    for kind, endings in (("bvh", (".bvh",)), ("audio", SOUND_FILES), ("table", TABLE_FILES)):
        files = list_files(folder, endings)
        if files:
            parquet = [file for file in files if file.suffix.lower() == ".parquet"]
            return "datasets" if kind == "table" and parquet and _has_media(parquet[0]) else kind
    raise UserError(f"{name} holds neither LeRobot data, sound, .bvh, tables nor recordings: see docs/recordings.md")


def _has_media(file: Path) -> bool:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    return any(f'"_type": "{kind}"'.encode() in metadata.get(b"huggingface", b"") for kind in ("Audio", "Image"))


def assign_splits(jobs: list[Job], options: ImportOptions, notes: Notes) -> Callable[[Job, str], str]:
    """
    A function from a job and a group to "train" or "validation".

    In this order: the groups that match `validation_groups`; what the source itself holds out, unless a fraction is
    asked for; of the groups in the order of their hashes, a fraction, at least one and never all. Every group is in one
    split, if the source has it so.
    """
    files = Counter(group for job in jobs for group in job.groups)
    groups = sorted(files, key=lambda group: hashlib.sha256(group.encode()).digest())
    if options.validation_groups is not None:
        chosen = {group for group in groups if re.search(options.validation_groups, group)}
        if not chosen:
            raise UserError(
                f"no group matches {options.validation_groups}; the first are {', '.join(groups[:5])}: correct it"
            )
        return lambda job, group: "validation" if group in chosen else "train"
    held_out = [job.held_out for job in jobs]
    if options.validation_fraction is None and any(held_out) and not all(held_out):
        inside = set().union(*(job.groups for job in jobs if job.held_out))
        for group in inside & set().union(*(job.groups for job in jobs if not job.held_out)):
            notes.remark("a group that the source has in both splits", group)
        return lambda job, group: "validation" if job.held_out else "train"
    fraction = VALIDATION_FRACTION if options.validation_fraction is None else options.validation_fraction
    if fraction and len(groups) == 1:
        notes.remark("one group is all there is: nothing is held out for validation", groups[0])
    chosen = set()
    for group in groups[:-1] if fraction else ():
        if not chosen or sum(files[one] for one in chosen) + files[group] / 2 < fraction * files.total():
            chosen.add(group)
    return lambda job, group: "validation" if group in chosen else "train"


class _Totals:
    """Sums over the recordings that were written."""

    def __init__(self):
        self.splits, self.columns, self.licenses = {}, {}, set()

    def add(self, row: dict, split: str) -> None:
        sums = self.splits.setdefault(split, {"recordings": 0, "seconds": 0.0, "ticks": 0, "groups": set()})
        sums["recordings"] += 1
        sums["seconds"] += row["duration"]
        sums["ticks"] += math.ceil(row["duration"] / TICK_SECONDS - 1e-6)
        sums["groups"].add(row["split_group"])
        self.licenses.add(row.get("license") or "not stated")
        for name in FEEDS:
            if row.get(name) is None:
                continue
            column = self.columns.setdefault(name, {"recordings": 0, "values": 0, "seconds": 0.0})
            column["recordings"] += 1
            for times in _clocks(name, row[name]):
                column["values"] += max(0, len(times) - 1)
                column["seconds"] += float(times[-1] - times[0]) if len(times) else 0.0
            if name in TEXTS:
                words = sum(len(entry["word"].split()) for entry in row[name])
                column["words"] = column.get("words", 0) + words

    def report(self) -> dict:
        splits = {name: sums | {"groups": len(sums["groups"])} for name, sums in self.splits.items()}
        for name, column in self.columns.items():
            column["feeds"] = FEEDS[name]
            values, seconds = column.pop("values"), column.pop("seconds")
            if seconds:
                column["rate"] = round(values / seconds, 2)
        return {"splits": splits, "columns": self.columns, "licenses": sorted(self.licenses)}


def _clocks(name: str, value) -> list:
    if name in TRACKS:
        return [np.asarray(value["times"])]
    return [camera["times"] for camera in value] if name == "images" else []


def _listed(notes: dict) -> list[dict]:
    return [{"what": text, "count": count, "examples": names} for text, (count, names) in notes.items()]


def _reasons(notes: Notes) -> str:
    reasons = "; ".join(f"{count} x {why} ({names[0]})" for why, (count, names) in notes.left_out.items())
    return f" ({reasons})" if reasons else ""


def _license(name: str) -> str | None:
    """The license of a folder: `license:` of its data card, or the first line of its LICENSE."""
    folder = Path(name)
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if path.name.upper().startswith(("LICENSE", "LICENCE", "README")) and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")[:10_000]
            card = re.search(r"^license:\s*(\S.*)$", text, re.MULTILINE)
            lines = [line.strip(" #*") for line in text.splitlines() if line.strip(" #*-=")]
            if card or (lines and path.name.upper().startswith("LICEN")):
                return card[1].strip() if card else lines[0]
    return None
