"""Sound with transcripts, as people keep it: tables, files beside the sound, or both."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from creature.data.recordings.media import SAMPLING_RATE, encode_sound, read_sound, sound_seconds
from creature.data.recordings.schema import RecordingError, untimed
from creature.data.recordings.sources import HELD_OUT, SOUND_FILES, ImportOptions, Job, Notes, guess_groups, list_files
from creature.data.recordings.transcripts import INDEX_FILES, TEXT_COLUMNS, WORD_FILES, pick, read_index, read_words


@dataclass
class Description:
    """What tables say about one recording."""

    text: str | None = None
    row: dict = field(default_factory=dict)
    held_out: bool = False


def find_sounds(folder: Path, options: ImportOptions, notes: Notes) -> list[Job]:
    """
    A job for every sound file below a folder; its words are internal text, thought once they are heard.

    Words with times come from a file of the same name beside the sound, or anywhere below the folder if that name
    occurs once (VCTK); other texts from a table, or with --label_column folder from the name of the folder.
    """
    sounds = list_files(folder, SOUND_FILES)
    others = list_files(folder, tuple({*INDEX_FILES, *WORD_FILES}))
    stems = {_stem(path) for path in sounds}
    beside = {}
    for path in others:
        if path.suffix.lower() in WORD_FILES and path.stem in stems:
            beside.setdefault(path.stem, []).append(path)
    tables = [path for path in others if path.suffix.lower() in INDEX_FILES and path.stem not in stems]
    described = read_descriptions(folder, tables, sounds, options, notes)
    by_folder = options.label_column == "folder"
    names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in sounds}
    guessed, unknown = guess_groups(list(names.values()), not by_folder), 0
    jobs = []
    for path, name in names.items():
        words = [file for file in beside.get(_stem(path), ()) if file.parent == path.parent]
        words = words or (beside.get(_stem(path), []) if len(beside.get(_stem(path), ())) == 1 else [])
        words.sort(key=lambda file: WORD_FILES.index(file.suffix.lower()))
        about = described.get(path, Description())
        group = options.group(name, about.row) or guessed[name]
        unknown += group == name
        held_out = about.held_out or bool(HELD_OUT.search(name))
        text = path.parent.name if by_folder else about.text
        rows = partial(_read, path, name, group, words[0] if words and not by_folder else None, text, notes)
        jobs.append(Job(name, {group}, rows, held_out))
    if unknown:
        notes.remark(
            "the speaker is not known, so that a voice may be in both splits (see --split_group)", name, unknown
        )
    return jobs


def _stem(path: Path) -> str:
    return re.sub(r"_mic\d$", "", path.stem)  # VCTK recorded each sentence with two microphones


def read_descriptions(
    folder: Path, tables: list[Path], files: list[Path], options: ImportOptions, notes: Notes
) -> dict[Path, Description]:
    """
    {file: what the tables say about it}. A table names a file by its path from the table or from the folder, with or
    without the ending, or by its name alone. The first text is taken; a table called test, dev or valid holds out.
    """
    known = {}
    for path in files:
        for name in {path.name, path.stem, _stem(path)}:
            known[name] = None if name in known else path  # None: several have it
    for path in files:
        relative = path.relative_to(folder)
        known |= {relative.as_posix(): path, relative.with_suffix("").as_posix(): path}
    described = {}
    for table in tables:
        place = table.parent.relative_to(folder)
        found, lost = 0, []
        try:
            for key, row in read_index(table):
                path = Path(key.replace("\\", "/"))
                names = [(place / path).as_posix(), path.as_posix(), path.name, path.stem]
                file = next((known[name] for name in names if known.get(name)), None)
                if file is None:
                    lost.append(key)
                    continue
                found += 1
                about = described.setdefault(file, Description())
                about.text = about.text or pick(
                    row, [options.label_column.lower()] if options.label_column else TEXT_COLUMNS
                )
                about.row = row | about.row
                about.held_out |= bool(HELD_OUT.search(table.stem))
        except (ValueError, OSError, AttributeError, csv.Error) as error:
            notes.remark(f"a table could not be read ({type(error).__name__})", table.name)
        if found and lost:
            notes.remark("described in a table, but there is no such file", lost[0], len(lost))
    return described


def _read(path: Path, name: str, group: str, word_file: Path | None, text: str | None, notes: Notes) -> Iterator:
    entries = untimed(text) if text else []
    if word_file is not None:
        try:
            entries = read_words(word_file, sound_seconds(path)) or entries
        except RecordingError as error:
            notes.remark(str(error), name)
    return sound_rows(path, name, group, entries, notes)


def sound_rows(file: Path | bytes, name: str, group: str, entries: list[dict], notes: Notes) -> Iterator:
    """(row, no names) for each part of a sound, with the entries of text that begin in it."""
    entries = [entry for entry in entries if entry["word"].strip()]
    if not entries:
        notes.remark("sound without words: it is heard, but nothing is learnt to say about it", name)
    for number, (samples, begin, last) in enumerate(read_sound(file)):
        end = begin + len(samples) / SAMPLING_RATE
        inside = [
            entry if entry["start"] is None else entry | {"start": entry["start"] - begin}
            for entry in entries
            if (last if entry["start"] is None else begin <= entry["start"] and (last or entry["start"] < end))
        ]
        row = {
            "recording_id": name if last and number == 0 else f"{name}#{number}",
            "split_group": group,
            "duration": end - begin,
            "audio": encode_sound(samples, name),
            "internal_text": inside or None,
        }
        yield row, {}
