"""Tables of sensor values: CSV, TSV and Parquet, with a time column or a row a tick."""

import re
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from creature.data.recordings.schema import PART_SECONDS, RecordingError, untimed
from creature.data.recordings.sources import HELD_OUT, TABLE_FILES, ImportOptions, Job, Notes, guess_groups, list_files
from creature.data.recordings.transcripts import GROUP_COLUMNS
from creature.errors import first_line
from ticks_creature import TICK_SECONDS

CHUNK = 50_000  # rows in memory
TIME = re.compile(
    r"(?:seconds_elapsed|time_?stamp|date_?time|time|t)[\s\[(_]*(s|sec|secs|seconds|ms|us|µs|ns)?[\])]?$", re.I
)
SCALES = {"ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
LABELS = "label labels class activity activity_label gesture target outcome slipped".split()
NO_SENSOR = "index id row frame sample seq sequence".split()
LONGEST_GAP = 5.0  # s without a row, after which another recording begins
# Apps on phones write a table a sensor. Two of these in a folder are joined to one recording.
SENSOR = re.compile(
    r"(total|linear|raw)?[ _-]*(accelerometer|acceleration|gyroscope|gyro|magnetometer|gravity|orientation|barometer|"
    r"pressure|light|proximity)[ _-]*(uncalibrated)?",
    re.I,
)


def find_tables(folder: Path, options: ImportOptions, notes: Notes) -> list[Job]:
    """
    A job for every table below a folder: columns of numbers are body_state, those that begin with "action" are action.

    A label becomes internal text at the end of a recording. A new recording begins where the group or the label
    changes, where the clock jumps back or by more than 5 s, and after 10 minutes; in a table with labels and without
    times at every row, since its rows are trials of their own.
    """
    files = {}  # name: the files that make up one table
    sensors = [path for path in list_files(folder, TABLE_FILES) if SENSOR.fullmatch(path.stem)]
    apps = {path.parent for path in sensors if sum(other.parent == path.parent for other in sensors) > 1}
    for path in list_files(folder, TABLE_FILES):
        if path.parent not in apps:
            files[path.relative_to(folder).with_suffix("").as_posix()] = [path]
        elif path in sensors:
            files.setdefault(path.parent.relative_to(folder.parent).as_posix(), []).append(path)
        else:
            notes.leave_out("a table beside those of a phone's sensors", path.relative_to(folder).as_posix())
    guessed, jobs = guess_groups(list(files)), []
    for name, paths in files.items():
        try:
            table = _Table(paths, name, options, notes, guessed[name])
        except (RecordingError, ValueError, OSError) as error:
            notes.leave_out(first_line(error), name)
            continue
        jobs.append(Job(name, table.groups, table.rows, bool(HELD_OUT.search(name))))
    return jobs


class _Table:
    """One table: what its columns are, by their names and its first rows."""

    def __init__(self, paths: list[Path], name: str, options: ImportOptions, notes: Notes, group: str):
        self.paths, self.name, self.notes = paths, name, notes
        head = next(self._chunks(2000), None)
        if head is None or not len(head):
            raise RecordingError("the table has no rows")
        columns = {str(column).strip().lower(): column for column in head.columns}

        def first(wanted: list[str]) -> str | None:
            return next((columns[name] for name in wanted if name in columns), None)

        self.label = first([options.label_column.lower()] if options.label_column else LABELS)
        if options.label_column and self.label is None:
            raise RecordingError(f"there is no column {options.label_column}")
        by_path = options.split_group is not None and "(" in options.split_group
        self.group = (options.group(name) if by_path else None) or group
        self.group_column = (
            None if by_path else first([options.split_group.lower()] if options.split_group else GROUP_COLUMNS)
        )
        times = sorted((column for column in columns if TIME.match(column)), key=lambda name: name != "seconds_elapsed")
        self.time = columns[times[0]] if times else None
        self.numbers = []
        for lower, column in columns.items():
            if (
                column in (self.label, self.group_column)
                or lower in (*times, *NO_SENSOR)
                or lower.startswith("unnamed")
            ):
                continue
            cells = head[column].dropna()
            if len(cells) and pd.to_numeric(cells, errors="coerce").notna().mean() > 0.9:
                self.numbers.append(column)
            else:
                notes.leave_out("a column that holds no numbers", f"{name}: {column}")
        if not self.numbers:
            raise RecordingError("the table has no column of numbers")
        self.is_action = np.array([str(column).lower().startswith("action") for column in self.numbers])
        self.groups = {self.group}
        if self.group_column is not None:
            self.groups = {str(value) for chunk in self._chunks(CHUNK) for value in chunk[self.group_column].unique()}

    def _chunks(self, rows: int) -> Iterator[pd.DataFrame]:
        """The table in pieces; the tables of several sensors as one, by the latest row of each that is not later."""
        if len(self.paths) == 1:
            yield from _read_table(self.paths[0], rows, self.name, self.notes)
            return
        tables = []
        for path in self.paths:
            table = pd.concat(list(_read_table(path, CHUNK, self.name, self.notes)))
            times = [column for column in table.columns if TIME.match(str(column).strip())]
            times.sort(key=lambda column: str(column).lower() != "seconds_elapsed")
            if not times:
                raise RecordingError(f"{path.name} has no times to join it with the other sensors")
            seconds = _seconds(table[times[0]], str(times[0]))
            values = table.drop(columns=times).add_prefix(f"{path.stem.lower()}.")
            tables.append(values.assign(seconds_elapsed=seconds).dropna().sort_values("seconds_elapsed"))
        joined, *others = sorted(tables, key=len, reverse=True)
        for other in others:
            joined = pd.merge_asof(joined, other, on="seconds_elapsed")
        yield joined

    def rows(self) -> Iterator[tuple[dict, dict]]:
        kept, number = None, 0  # (s, values, group and label) of rows whose recording may go on
        for chunk in chain(self._chunks(CHUNK), [None]):
            if chunk is not None:
                arrays = self._arrays(chunk)
                kept = arrays if kept is None else tuple(map(np.concatenate, zip(kept, arrays, strict=True)))
            if kept is None or not len(kept[0]):
                continue
            starts = self._starts(*kept)
            ends = [*starts[1:], len(kept[0])] if chunk is None else starts[1:]
            for start, end in zip(starts, ends, strict=False):
                found = self._recording(f"{self.name}#{number}", *(array[start:end] for array in kept))
                number += 1
                if found:
                    yield found
            kept = tuple(array[starts[-1] :] for array in kept)

    def _arrays(self, chunk: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Seconds [N], values [N, numbers], (group, label) [N, 2] of the rows whose time is known."""
        values = chunk[self.numbers].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        who = [chunk[name] if name is not None else "" for name in (self.group_column, self.label)]
        who = np.stack([np.broadcast_to(np.asarray(one, dtype=object), len(chunk)) for one in who], axis=1)
        if self.time is None:
            return np.arange(len(chunk)) * TICK_SECONDS, values, who
        seconds = _seconds(chunk[self.time], str(self.time)).to_numpy()
        known = np.isfinite(seconds)
        if not known.all():
            self.notes.remark("rows without a time were left out", self.name, int((~known).sum()))
        return seconds[known], values[known], who[known]

    def _starts(self, seconds: np.ndarray, values: np.ndarray, who: np.ndarray) -> list[int]:
        """The rows at which recordings begin."""
        new = np.ones(len(seconds), bool)
        if self.time is None:
            steps = np.full(len(seconds) - 1, TICK_SECONDS)
            seconds = np.arange(len(seconds)) * TICK_SECONDS
        else:
            steps = np.diff(seconds)
        if self.time is not None or self.label is None:
            usual = np.median(steps[steps > 0]) if (steps > 0).any() else 0.0
            new[1:] = (steps < -1) | (steps > max(LONGEST_GAP, 10 * usual))
            new[1:] |= (who[1:].astype(str) != who[:-1].astype(str)).any(axis=1)
        begins, starts = np.flatnonzero(new), []
        for start, end in zip(begins, [*begins[1:], len(seconds)], strict=True):
            parts = np.maximum.accumulate(np.floor((seconds[start:end] - seconds[start]) / PART_SECONDS))
            starts += [start, *(start + 1 + np.flatnonzero(np.diff(parts) > 0))]
        return starts

    def _recording(
        self, name: str, seconds: np.ndarray, values: np.ndarray, who: np.ndarray
    ) -> tuple[dict, dict] | None:
        """(row, names) of consecutive rows of the table; None, with a note, if none of them has all numbers."""
        if self.time is None:
            seconds = np.arange(len(seconds)) * TICK_SECONDS
        rising = np.append(True, seconds[1:] > np.maximum.accumulate(seconds)[:-1])
        if not rising.all():
            self.notes.remark("rows that are not later than those before were left out", name, int((~rising).sum()))
        seconds, values = seconds[rising], values[rising]
        missing = ~np.isfinite(values)
        if missing.any():
            self.notes.remark("values that are missing keep the one before", name, int(missing.sum()))
            latest = np.maximum.accumulate(np.where(missing, 0, np.arange(len(values))[:, None]))
            values = np.take_along_axis(values, latest, axis=0)
        whole = np.isfinite(values).all(axis=1)
        if not whole.any():
            self.notes.leave_out("in no row all columns have been measured", name)
            return None
        seconds, values = np.round(seconds[whole] - seconds[whole][0], 9), values[whole]
        step = float(np.median(np.diff(seconds))) if len(seconds) > 1 else TICK_SECONDS
        group, label = who[0]
        text = self._label_text(label)
        row = {
            "recording_id": name,
            "split_group": self.group if self.group_column is None else str(group),
            "duration": float(seconds[-1] + step),
            "internal_text": untimed(text) if text else None,
        }
        names = {}
        for kind, chosen in (("body_state", ~self.is_action), ("action", self.is_action)):
            if chosen.any():
                row[kind] = {"values": values[:, chosen], "times": seconds}
                names[kind] = [str(column) for column, one in zip(self.numbers, chosen, strict=True) if one]
        return row, names

    def _label_text(self, label) -> str:
        """A label in words: its text; of numbers the column's name for 1, "not" that for 0, the name and others."""
        if isinstance(label, str) or pd.isna(label):
            return label.strip() if isinstance(label, str) else ""
        name = str(self.label).strip()
        return {0: f"not {name}", 1: name}.get(float(label), f"{name} {label:g}")


def _read_table(path: Path, rows: int, name: str, notes: Notes) -> Iterator[pd.DataFrame]:
    """A file in pieces of so many rows; its delimiter is the one that its first line has most of."""
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(rows):
            yield batch.to_pandas()
        return
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first, second = file.readline(), file.readline()
    if not first.strip():
        raise RecordingError("the table is empty")
    delimiter = max("\t;,|", key=first.count)
    read = {"sep": delimiter, "decimal": "," if delimiter != "," and re.search(r"\d,\d", second) else "."}
    read |= {"encoding": "utf-8-sig", "encoding_errors": "replace", "on_bad_lines": "warn", "low_memory": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", pd.errors.ParserWarning)
        with pd.read_csv(path, chunksize=rows, **read) as chunks:
            for chunk in chunks:
                if all(re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?", str(name).strip(), re.I) for name in chunk.columns):
                    raise RecordingError("the first line of the table is numbers: it has to name the columns")
                yield chunk
    if caught and rows == CHUNK:
        notes.remark("lines with more fields than the first were left out", name)


def _seconds(times: pd.Series, column: str) -> pd.Series:
    """A column of times in s, NaN where unknown: the unit by its name, that of times since 1970 by their size."""
    if not pd.api.types.is_numeric_dtype(times):
        numbers = pd.to_numeric(times, errors="coerce")
        if numbers.notna().mean() < 0.5:
            stamps = pd.to_datetime(times, errors="coerce", utc=True, format="ISO8601")
            numbers = (stamps - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
        times = numbers
    scale = SCALES.get((TIME.match(column.strip())[1] or "").lower())
    if scale is None:
        size = times.abs().median()
        scale = next((by for least, by in ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3)) if size > least), 1.0)
    return times.astype(np.float64) * scale
