"""Documents out of text files of any kind and size, in constant memory.

`Documents` streams one source as pieces of text. What counts as a document:

- .txt, .md and files of unknown kind named one by one: the whole file, or, where it has lines that read exactly
  `<|endoftext|>`, each part between them. With the marker go its own line break and the one before it, so that the
  documents joined by "\n<|endoftext|>\n" are the file again. Nothing else changes: line ends stay as they are, a byte
  order mark is a character like any other, and the marker inside a line is ordinary text.
- .jsonl, .json, .csv, .tsv, .parquet, Hub datasets, folders of `save_to_disk`: the text column of each record. A .json
  file is an array of records, one record, or records one after another; a record is an object or a bare string. One
  record may have up to 32 Mi characters.

Each kind may be compressed: .gz, .bz2, .xz, .zst.

`datasets` reads Hub datasets and Arrow folders, but not single files: it loads a .json array whole, turns the words NA
and null of a .csv into nothing, and takes 350 MiB for a .parquet file of 0.26 MB in which 80 rows share one text.
"""

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from creature.data.text.recognition import other_than_text
from creature.data.text.sources import Source
from creature.errors import UserError, first_line, require_unicode

MARKER = "<|endoftext|>"
CHUNK_BYTES = 1 << 18
TEXT_TYPES = ("string", "large_string", "string_view", "null")  # of a parquet column
MAX_RECORD = 32 << 20  # characters: a record has to be in memory whole, a text file does not
MAX_DICTIONARY = 4 << 20  # bytes of a parquet column's dictionary up to which many rows are decoded together
MAX_UNPACKED = 256 << 20  # bytes from which on a parquet column compressed a hundredfold is refused


class Documents:
    """
    One source as an iterator of pairs (text, ends): a document is the texts up to the first with `ends` True.

    Texts may be empty, documents too. Meanwhile `bytes_read` grows; `sha256` is that of the file as stored, once it is
    read to the end; `repaired` counts records with half a surrogate pair, which becomes U+FFFD. Raises UserError for
    damaged files, archives, text that is not UTF-8, and records without the text column.
    """

    def __init__(self, source: Source, text_column: str = "text"):
        require_unicode("--text_column", text_column)
        self.source, self.column, self.name = source, text_column, source.name
        self.bytes_read = self.repaired = 0
        self.sha256 = ""

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        kind = self.source.kind
        if kind in ("hub", "arrow"):
            yield from self._read_rows()
        elif kind == "parquet":
            yield from self._read_parquet()
        else:
            readers = {"text": _split_at_markers, "jsonl": self._read_jsonl, "json": self._read_json}
            with self._open() as stream:
                yield from readers.get(kind, self._read_csv)(self._decode(stream))

    def whole(self) -> Iterator[str]:
        """Every document as one string, which has to fit into memory."""
        parts = []
        for text, ends in self:
            parts.append(text)
            if ends:
                yield "".join(parts)
                parts = []

    @contextmanager
    def _open(self) -> Iterator[io.BufferedIOBase]:
        """The bytes of the file, decompressed. Errors of the decompressor become UserErrors."""
        compression = self.source.compression
        try:
            metered = _MeteredFile(self)
        except OSError as error:
            raise UserError(f"cannot read {self.name} ({error.strerror}): check its permissions") from error
        raw = io.BufferedReader(metered, CHUNK_BYTES)
        with raw:
            try:
                if compression == ".gz":
                    yield gzip.GzipFile(fileobj=raw)
                elif compression == ".bz2":
                    yield bz2.BZ2File(raw)
                elif compression == ".xz":
                    yield lzma.LZMAFile(raw)
                elif compression == ".zst":
                    import pyarrow

                    yield pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
                else:
                    yield raw
                while raw.read(CHUNK_BYTES):  # padding after the compressed data counts in the file's hash, too
                    pass
                self.sha256 = metered.digest.hexdigest()
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
                if not compression:
                    raise
                raise UserError(
                    f"{self.name} is damaged or cut off ({first_line(error)}): get the file again, or unpack it first"
                ) from error

    def _decode(self, stream: io.BufferedIOBase) -> Iterator[str]:
        """The stream as text, strictly UTF-8, with every byte kept (but a byte order mark before records)."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        position = 0  # of the next byte to be read
        while True:
            data = stream.read(CHUNK_BYTES)
            waiting = len(decoder.getstate()[0])  # bytes of a character whose end is in `data`
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                if position == 0:
                    self._refuse_other(data, is_utf8=False)
                where = position - waiting + error.start
                after = " after decompression" if self.source.compression else ""
                raise UserError(
                    f"{self.name} is not UTF-8 text: byte {where:,}{after} is 0x{error.object[error.start]:02x}; "
                    "convert it first, for example with `iconv -f WINDOWS-1252 -t UTF-8 in.txt > out.txt`, or leave it "
                    "out"
                ) from error
            if position == 0:
                self._refuse_other(data)
            if self.source.kind != "text" and position == 0 and text.startswith("\ufeff"):
                text = text[1:]
            position += len(data)
            if text:
                yield text
            if not data:
                return

    def _refuse_other(self, beginning: bytes, is_utf8: bool = True) -> None:
        problem = other_than_text(beginning, is_utf8)
        if problem:
            raise UserError(f"{self.name}{', unpacked,' if self.source.compression else ''} {problem}")

    def _text(self, record, where: str) -> str:
        """The text of one JSON-like record; None counts as an empty document."""
        if isinstance(record, dict):
            if self.column not in record:
                fields = ", ".join(map(str, record)) or "nothing"
                raise UserError(
                    f"{self.name}, {where}: no field {self.column!r} (there is: {fields}); "
                    "name the field with --text_column"
                )
            record = record[self.column]
        if record is None:
            return ""
        if not isinstance(record, str):
            raise UserError(
                f"{self.name}, {where}: {self.column!r} is of type {type(record).__name__}, not text; "
                "name the field that holds the text with --text_column"
            )
        return self._encodable(record)

    def _encodable(self, text: str) -> str:
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                self.repaired += 1
                return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _lines(self, chunks: Iterator[str]) -> Iterator[str]:
        """Lines with their ends, split at "\\n" only."""
        waiting: list[str] = []
        length = 0
        for chunk in chunks:
            lines = chunk.split("\n")
            for line in lines[:-1]:
                yield "".join((*waiting, line, "\n"))
                waiting, length = [], 0
            if lines[-1]:
                waiting.append(lines[-1])
                length += len(lines[-1])
                if length > MAX_RECORD:
                    raise self._too_long()
        if waiting:
            yield "".join(waiting)

    def _too_long(self) -> UserError:
        return UserError(
            f"{self.name} has a record of more than {MAX_RECORD >> 20} million characters: "
            "cut it into smaller records, or store the text as .txt, where length does not matter"
        )

    def _read_jsonl(self, chunks: Iterator[str]) -> Iterator[tuple[str, bool]]:
        for number, line in enumerate(self._lines(chunks), 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.name}, line {number:,} is not JSON ({error}): repair or remove it") from error
            yield self._text(record, f"line {number:,}"), True

    def _read_json(self, chunks: Iterator[str]) -> Iterator[tuple[str, bool]]:
        """Records of an array, or one after another, each parsed as soon as it is complete."""
        decoder = json.JSONDecoder()
        space = re.compile(r"[\s,]*")
        text, start, number, in_array, ended = "", 0, 0, False, False
        while True:
            start = space.match(text, start).end()
            if text.startswith("[", start) and number == 0 and not in_array:
                in_array, start = True, space.match(text, start + 1).end()
            if text.startswith("]", start) and in_array:
                in_array, start = False, space.match(text, start + 1).end()
            if start == len(text) and ended and not in_array:
                return
            try:
                record, start = decoder.raw_decode(text, start)
            except RecursionError as error:
                raise UserError(f"{self.name} is nested too deep at record {number + 1:,}: repair it") from error
            except ValueError as error:
                if ended:
                    reason = "the file ends inside the array" if start == len(text) else error
                    raise UserError(
                        f"{self.name} is not JSON at record {number + 1:,} ({reason}): repair it, or use .jsonl"
                    ) from error
                # The record may continue in the next chunks. Doubling the text keeps the attempts at a long record few.
                text, start = text[start:], 0
                wanted = 2 * max(len(text), CHUNK_BYTES)
                parts = [text]
                while sum(map(len, parts)) < wanted and not ended:
                    parts.append(next(chunks, ""))
                    ended = not parts[-1]
                text = "".join(parts)
                if len(text) > 4 * MAX_RECORD:
                    raise self._too_long() from error
                continue
            number += 1
            yield self._text(record, f"record {number:,}"), True

    def _read_csv(self, chunks: Iterator[str]) -> Iterator[tuple[str, bool]]:
        name = self.name.lower().removesuffix(self.source.compression)
        before = csv.field_size_limit(MAX_RECORD)
        begin = 1  # the line where the record begins
        try:
            # Without `strict`, a stray quote swallows the delimiters and lines behind it in silence.
            rows = csv.reader(self._lines(chunks), delimiter="\t" if name.endswith(".tsv") else ",", strict=True)
            header = next(rows, None)
            if header is None:
                return
            if self.column not in header:
                raise self._no_column(header)
            index, begin = header.index(self.column), rows.line_num + 1
            for row in rows:
                # Some writers leave out empty columns at the end, or add some; never in a record of several lines,
                # where a missing one means that a stray quote has joined them.
                merged = rows.line_num > begin and len(row) != len(header)
                if row and (merged or len(row) <= index or any(row[len(header) :])):
                    raise UserError(
                        f"{self.name}, line {begin:,} has {len(row)} columns where the header has {len(header)}: "
                        "put quotes around a text with delimiters or line breaks, or remove the line"
                    )
                if row:
                    yield row[index], True
                begin = rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{self.name}, the record in line {begin:,} is not CSV ({error}): close its quotes and double those "
                "inside, remove it, or store the text as .jsonl"
            ) from error
        finally:
            csv.field_size_limit(before)

    def _no_column(self, columns: list[str]) -> UserError:
        return UserError(
            f"{self.name} has no column {self.column!r} (there is: {', '.join(columns)}): "
            "name the column with --text_column"
        )

    def _read_parquet(self) -> Iterator[tuple[str, bool]]:
        import pyarrow

        with tempfile.TemporaryDirectory() as folder:
            # Parquet is read from its end: a compressed file is unpacked first. Either way, this pass takes the hash.
            compressed = bool(self.source.compression)
            path = Path(folder, "data.parquet") if compressed else self.source.path
            with self._open() as stream, open(path if compressed else os.devnull, "wb") as file:
                while data := stream.read(CHUNK_BYTES):
                    file.write(data)
            try:
                for number, value in enumerate(self._parquet_values(path), 1):
                    text = self._text(value, f"row {number:,}")
                    if len(text) > MAX_RECORD:
                        raise self._too_long()
                    yield text, True
            except (pyarrow.ArrowInvalid, OSError) as error:
                reason = first_line(error)
                raise UserError(f"{self.name} is not a whole parquet file ({reason}): get it again") from error

    def _parquet_values(self, path: Path) -> Iterator:
        import pyarrow.parquet

        # Without pre-buffering and with a small buffer, pages are read as they are needed, not whole row groups.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
            if self.column not in file.schema_arrow.names:
                raise self._no_column(file.schema_arrow.names)
            kind = file.schema_arrow.field(self.column).type
            if str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind) not in TEXT_TYPES:
                raise UserError(
                    f"{self.name}: the column {self.column!r} is of type {kind}, not text; "
                    "name the column that holds the text with --text_column"
                )
            for group in range(file.num_row_groups):
                rows = self._rows_at_a_time(path, file.metadata.row_group(group))
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[self.column]):
                    for value in batch.column(0):  # one text at a time
                        yield value.as_py()

    def _rows_at_a_time(self, path: Path, group) -> int:
        """
        How many rows of a row group to decode together, so that they take little more memory than the file has bytes.

        64; but 1 where the file stores a text once for many rows: in a dictionary larger than writers make by default
        (1 MiB), or where each text is stored as its difference from the one before.
        """
        chunks = (group.column(i) for i in range(group.num_columns))
        chunk = next((chunk for chunk in chunks if chunk.path_in_schema == self.column), None)
        if chunk is None:
            return 64
        size = chunk.total_uncompressed_size
        if size > MAX_UNPACKED and size > 100 * chunk.total_compressed_size:  # pages may be that large, too
            raise UserError(
                f"{self.name} unpacks {chunk.total_compressed_size:,} bytes to {size:,}, which no text does: "
                "leave it out, or unpack it to .txt or .jsonl"
            )
        if "DELTA_BYTE_ARRAY" in chunk.encodings:
            return 1
        packed = any("DICTIONARY" in encoding for encoding in chunk.encodings)
        return 1 if packed and _dictionary_bytes(path, chunk) > MAX_DICTIONARY else 64

    def _read_rows(self) -> Iterator[tuple[str, bool]]:
        for number, row in enumerate(read_rows(self.source, open_rows(self.source)), 1):
            yield self._text(row, f"record {number:,}"), True


class _MeteredFile(io.RawIOBase):
    """A file that counts and hashes the bytes read from it."""

    def __init__(self, documents: Documents):
        self.file = open(documents.source.path, "rb", buffering=0)
        self.documents, self.digest = documents, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        self.documents.bytes_read += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


# ---------------------------------------------------------------------------------------------------------------------
# Plain text
# ---------------------------------------------------------------------------------------------------------------------


def _split_at_markers(chunks: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Cut text at its marker lines, which may lie across the ends of chunks."""
    text, line_start = "", True  # text not yet yielded, and whether it begins at the start of a line
    for chunk in chunks:
        text, line_start = yield from _cut_markers(text + chunk, line_start, at_end=False)
    text, _ = yield from _cut_markers(text, line_start, at_end=True)
    yield text, True


def _cut_markers(text: str, line_start: bool, at_end: bool) -> Generator[tuple[str, bool], None, tuple[str, bool]]:
    """Yield as much of `text` as can hold no part of a marker; return the rest, and whether it begins a line."""
    done = 0
    hit = text.find(MARKER)
    while hit >= 0:
        after = hit + len(MARKER)
        rest = text[after : after + 2]
        starts_line = text[hit - 1] == "\n" if hit else line_start
        if starts_line and not at_end and rest in ("", "\r"):
            break  # the next chunk shows whether the line ends here
        if starts_line and (rest in ("", "\r", "\r\n") or rest[0] == "\n"):
            yield _without_line_break(text[done:hit]), True
            done = min(len(text), after + (2 if rest[:1] == "\r" else 1))
            line_start = True
            hit = text.find(MARKER, done)
        else:
            hit = text.find(MARKER, after)
    end = len(text) if at_end else _end_of_decided(text, done, line_start)
    if end > done:
        yield text[done:end], False
        line_start = text[end - 1] == "\n"
    return text[end:], line_start


def _without_line_break(text: str) -> str:
    if text.endswith("\r\n"):
        return text[:-2]
    return text[:-1] if text.endswith("\n") else text


def _end_of_decided(text: str, done: int, line_start: bool) -> int:
    """Where the rest of `text` begins that may be a marker once more text is there, its line break included."""
    line = MARKER + "\r"
    last = text.rfind("\n", max(done, len(text) - len(line) - 1))
    if last >= 0 and line.startswith(text[last + 1 :]):
        return last - 1 if last > done and text[last - 1] == "\r" else last
    if line_start and line.startswith(text[done:]):
        return done
    return len(text) - 1 if text.endswith("\r") else len(text)


def _dictionary_bytes(path: Path, chunk) -> int:
    """Bytes of a column's dictionary unpacked: the second number of its page header, in Thrift's compact protocol."""
    numbers: list[int] = []
    with open(path, "rb") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        header = iter(file.read(16))
    for byte in header:  # 0x15 (the next field is an i32), then the number in groups of 7 bits, lowest first
        if byte != 0x15:
            break
        shift, value, more = 0, 0, True
        while more:
            part = next(header, 0)
            value, shift, more = value | (part & 0x7F) << shift, shift + 7, part >= 0x80
        numbers.append(value >> 1)  # zigzag
    return numbers[1] if len(numbers) > 1 else MAX_DICTIONARY + 1


def load_arrow_folder(folder: str | os.PathLike) -> dict:
    """
    The splits of a folder that `save_to_disk` made, by name, "train" among them.

    Raises UserError for a folder that is damaged, has no such split, or names data files that lie outside it.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # any of many types: the folder is damaged
        raise UserError(
            f"{folder} is not a whole Arrow dataset ({first_line(error)}): copy or make it again"
        ) from error
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    _refuse_outside(folder, [entry["filename"] for split in splits.values() for entry in split.cache_files])
    if "train" not in splits:
        raise UserError(f"{folder} has no split called train (there is: {', '.join(splits)}): rename one")
    return splits


def _refuse_outside(folder: str | os.PathLike, files: list[str]) -> None:
    for file in files:
        if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
            raise UserError(f"{folder} points to {file}, outside itself: copy the data into it, or make it again")


def open_rows(source: Source):
    """
    The rows of an Arrow folder, or of a Hub dataset or a local copy of one as a stream (`datasets.IterableDataset`).

    Raises UserError when they cannot be had.
    """
    if source.kind == "arrow":
        return load_arrow_folder(source.path)["train"]
    import datasets

    try:
        name, configuration = str(source.path or source.name.split(":")[0]), source.configuration or None
        if source.path is not None:
            files = datasets.load_dataset_builder(name, configuration).config.data_files or {}
            _refuse_outside(name, [file for of_split in files.values() for file in of_split])
        return datasets.load_dataset(name, configuration, split=source.split, streaming=True)
    except UserError:
        raise
    except Exception as error:  # a dozen unrelated types, each of which means that the data cannot be had
        raise UserError(
            f"{source.name} is neither a file or folder here nor a Hub dataset that can be reached "
            f"({first_line(error)}): check the name, the configuration and split (owner/name:configuration:split) and "
            "the network"
        ) from error


def read_rows(source: Source, rows: Iterable[dict]) -> Iterator[dict]:
    """The rows that `open_rows` opened, one by one; UserError where they end early."""
    try:
        yield from rows
    except Exception as error:  # see open_rows
        raise UserError(
            f"{source.name} could not be read to the end ({first_line(error)}): repair the data, or try again"
        ) from error
