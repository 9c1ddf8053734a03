"""Texts that lie beside sounds and motions: tables of transcripts, files of words with times, nested labels."""

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from creature.data.recordings.schema import RecordingError, untimed

KEY_COLUMNS = (
    "file_name path file filename audio_filepath audio_file audio wav_filename wav clip bvh motion id name".split()
)
TEXT_COLUMNS = (
    "normalized_text normalized_transcription transcription transcript sentence text words caption description "
    "instruction task label intent".split()
)
GROUP_COLUMNS = (
    "speaker_id speaker client_id subject_id subject participant_id participant person user_id user actor object "
    "object_id session_id session episode_id episode".split()
)
INDEX_FILES = (".csv", ".tsv", ".psv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet")
WORD_FILES = (".align", ".lab", ".wrd", ".json", ".txt")  # beside a sound, the first that is there
# Units of word times, in parts of a second: seconds, ms, samples at usual rates (TIMIT), GRID's 1/25,000, HTK's 100 ns.
TIME_UNITS = (1, 1000, 16_000, 22_050, 25_000, 44_100, 48_000, 10_000_000)
SILENCE = {"", "sil", "sp", "spn", "h#", "<eps>", "<sil>", "<s>", "</s>"}


def pick(row: dict, names: tuple | list) -> str | None:
    """The value of the first column of `names` that a row has and that is not empty."""
    lower = {str(name).strip().lower(): value for name, value in row.items()}
    for name in names:
        if lower.get(name) not in (None, ""):
            return str(lower[name])
    return None


def flatten_values(value) -> str:
    """The values of nested JSON in their order as words: {"a": "x", "b": {"c": "y z", "d": null}} -> "x y z"."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(filter(None, map(flatten_values, value)))
    return "" if value is None else " ".join(str(value).split())


def read_index(path: Path) -> Iterator[tuple[str, dict]]:
    """
    (name of a recording, its row) of a table of descriptions.

    A row has column names where the file has: those of a .jsonl or .parquet, or a first line in which a column of
    KEY_COLUMNS occurs. Otherwise the first field is the name and the last one the text, as in LJSpeech's `metadata.csv`
    (fields between |), LibriSpeech's `.trans.txt` (between blanks) and .tsv. A .json holds name -> nested values.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet

        columns = [
            field.name for field in pyarrow.parquet.read_schema(path) if not str(field.type).startswith("struct")
        ]
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=columns):
            yield from _with_keys(batch.to_pylist())
    elif kind == ".json":
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict):
            for name, value in content.items():
                yield name, {"text": (pick(value, TEXT_COLUMNS[:-1]) if isinstance(value, dict) else None)
                             or flatten_values(value)}  # fmt: skip
        elif isinstance(content, list):
            yield from _with_keys(content)
    else:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as lines:
            if kind in (".jsonl", ".ndjson"):
                yield from _with_keys(json.loads(line) for line in lines if line.strip())
            else:
                yield from _read_fields(lines)


def _with_keys(rows) -> Iterator[tuple[str, dict]]:
    for row in rows:
        if isinstance(row, dict) and (name := pick(row, KEY_COLUMNS)):
            yield name, row


def _read_fields(lines) -> Iterator[tuple[str, dict]]:
    first = lines.readline()
    lines.seek(0)
    delimiter = next((mark for mark in "|\t;," if mark in first), None)
    if delimiter is None:
        rows = (line.strip().split(maxsplit=1) for line in lines)
    else:  # quotes mean something in .csv only
        quoting = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
        rows = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    header = None
    for number, row in enumerate(rows):
        if number == 0 and len(row) > 1 and {field.strip().lower() for field in row} & set(KEY_COLUMNS):
            header = row
        elif header:
            yield from _with_keys([dict(zip(header, row, strict=False))])
        elif row and row[0].strip():
            yield row[0].strip(), {"text": row[-1].strip() if len(row) > 1 else ""}


def read_words(path: Path, duration: float) -> list[dict]:
    """
    The entries of a file beside a sound: words with times, or a text without.

    Lines of "start end word" (.align, .lab, .wrd, a label track), in the unit that fits `duration`; JSON of any depth
    with "word"/"text", "start" and "end" (Whisper, Gentle), or with other values, which are joined; plain text. Raises
    RecordingError for JSON that is none.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise RecordingError(f"{path.name} is no JSON ({error})") from error
        timed = list(_find_timed(content))
        if not timed:
            whole = pick(content, TEXT_COLUMNS) if isinstance(content, dict) else None
            return untimed(whole or flatten_values(content))
    else:
        timed = [
            re.fullmatch(r"([\d.]+)\s+([\d.]+)\s*(.*)", line.strip()) for line in text.splitlines() if line.strip()
        ]
        if not timed or not all(timed):
            return untimed(" ".join(text.split()))
        timed = [(match[3], float(match[1]), float(match[2])) for match in timed]
    last = max(end for _, _, end in timed)
    unit = min(TIME_UNITS, key=lambda unit: abs(math.log(max(last, 1e-9) / unit / max(duration, 1e-9))))
    words = [(word.strip(), start, end) for word, start, end in timed if word.strip().lower() not in SILENCE]
    if not 0.02 * duration <= last / unit <= 1.5 * duration:
        return untimed(" ".join(word for word, _, _ in words))
    # Whoever listens knows a word when it ends: that is when it may be thought.
    words.sort(key=lambda entry: entry[2])
    return [{"word": word, "start": min(end / unit, duration), "end": None} for word, _, end in words]


def _find_timed(content) -> Iterator[tuple[str, float, float]]:
    """(word, start, end) of the innermost objects that have all three."""
    if isinstance(content, list):
        for value in content:
            yield from _find_timed(value)
    elif isinstance(content, dict):
        inner = [found for value in content.values() if isinstance(value, (list, dict)) for found in _find_timed(value)]
        yield from inner
        word, times = content.get("word", content.get("text")), (content.get("start"), content.get("end"))
        if not inner and isinstance(word, str) and all(isinstance(time, (int, float)) for time in times):
            yield word, *times
