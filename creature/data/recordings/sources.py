"""What an importer is given and gives back: options, recordings yet to be read, notes for the report."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from creature.data.recordings.transcripts import GROUP_COLUMNS, pick

SOUND_FILES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".aif", ".wma")
TABLE_FILES = (".csv", ".tsv", ".parquet")
HELD_OUT = re.compile(r"(^|[._\-/ ])(test|dev|val|valid|validation|eval)([._\-/ ]|$)", re.I)
# Names of files that say who acts: subject3, speaker_12; LibriSpeech's 84-121123-0000, VCTK's p225_001, CMU's 02_01,
# Speech Commands' 0a7c2a8d_nohash_0.
WHO = re.compile(
    r"(?:^|[/_\-])((?:subject|speaker|spk|person|participant|actor|user)[_\-]?\d+)|(?:^|/)(\d+)-\d+-\d+$"
    r"|(?:^|/)(p\d{3})_|(?:^|/)(\d+)_\d+$|(?:^|/)([0-9a-f]{8})_nohash_",
    re.I,
)
FOLDERS = 5  # so many folders with recordings are taken for groups, where names say nothing


@dataclass
class ImportOptions:
    """What a user may choose; see scripts/import_recordings.py."""

    image_size: int = 64
    image_rate: float = 12.5
    split_group: str | None = None
    validation_fraction: float | None = None
    validation_groups: str | None = None
    label_column: str | None = None
    metres_per_unit: float | None = None

    def group(self, name: str, row: dict | None = None) -> str | None:
        """The group of a recording as the options or its row say it, or None. `name`: its path without the ending."""
        if self.split_group is None:
            return pick(row or {}, GROUP_COLUMNS)
        if "(" in self.split_group:
            match = re.search(self.split_group, name)
            return match and match[1]
        return pick(row or {}, [self.split_group.lower()])


@dataclass
class Job:
    """
    One recording, or several out of one file, still to be read.

    Args:
        name: for the report.
        groups: the split groups that its rows can have.
        count: how many rows are expected, for the progress bar.
        rows: gives (row, names) as `RecordingsWriter.add` takes them; may raise RecordingError.
        held_out: whether the source itself keeps it for validation.
    """

    name: str
    groups: set[str]
    rows: Callable[[], Iterator[tuple[dict, dict]]]
    held_out: bool = False
    count: int = 1


class Notes:
    """What happened during an import: for every sentence how often, and the first names it is about."""

    def __init__(self):
        self.left_out, self.remarks = {}, {}  # sentence: (count, names)

    def leave_out(self, why: str, name: str, count: int = 1) -> None:
        _count(self.left_out, why, name, count)

    def remark(self, what: str, name: str, count: int = 1) -> None:
        _count(self.remarks, what, name, count)


def _count(notes: dict, text: str, name: str, count: int) -> None:
    before, names = notes.get(text, (0, []))
    notes[text] = before + count, names if len(names) == 3 or name in names else [*names, name]


def list_files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The files below a folder with one of some endings, in the order of their paths, hidden ones left out."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file()]
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def guess_groups(names: list[str], by_folder: bool = True) -> dict[str, str]:
    """name -> split group, of recordings named by their paths without endings, where nothing else tells it."""
    folders = {name: str(Path(name).parent) for name in names}
    by_folder = by_folder and len(set(folders.values())) >= FOLDERS
    groups = {}
    for name in names:
        match = WHO.search(name)
        who = match and next(group for group in match.groups() if group)
        groups[name] = who or (folders[name] if by_folder else name)
    return groups if len(set(groups.values())) > 1 or len(names) == 1 else {name: name for name in names}
