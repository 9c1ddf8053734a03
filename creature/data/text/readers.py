"""Documents out of text files of any kind and size, in constant memory.

`read_documents` streams one source as pieces of text. What counts as a document:

- .txt, .md and files of unknown kind named one by one: the whole file, or, where it has lines that read exactly
  `<|endoftext|>`, each part between them. The marker takes its own line break and the one before it along: the
  documents joined by "\\n<|endoftext|>\\n" are the file again. Nothing else is changed: line ends stay as they are, a
  byte order mark is a character like any other, and the marker inside a line is ordinary text.
- .jsonl, .json, .csv, .tsv, .parquet, Hub datasets, folders of `save_to_disk`: the text column of each record. A .json
  file is an array of records, one record, or records one after another; a record is an object or a bare string. One
  record may have up to 32 Mi characters.

Each kind may be compressed: .gz, .bz2, .xz, .zst.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from creature.data.text.sources import Source, is_arrow_folder, split_name
from creature.errors import UserError, first_line

MARKER = "<|endoftext|>"
CHUNK_BYTES = 1 << 18
MAX_RECORD = 32 << 20  # characters: a record has to be in memory whole, a text file does not
MAX_DICTIONARY = 4 << 20  # bytes of a parquet column's dictionary up to which many rows are decoded together
MAX_UNPACKED = 256 << 20  # bytes from which on a parquet column is not to be packed a hundredfold


def read_documents(source: Source, text_column: str = "text") -> Iterator[tuple[str, bool]]:
    """
    Stream one source as pairs (text, ends): a document is the texts up to and including the first with `ends` True.

    Texts may be empty, documents too. Advances `source.bytes_read` and fills in `source.sha256`. Raises UserError for
    damaged files, text that is not UTF-8, and records without the text column.
    """
    if source.kind == "hub":
        yield from _read_hub(source, text_column)
    elif source.kind == "parquet":
        yield from _read_parquet(source, text_column)
    else:
        with _opened(source) as stream:
            chunks = _decoded(stream, source, skip_mark=source.kind != "text")
            if source.kind == "text":
                yield from _split_at_markers(chunks)
            elif source.kind == "jsonl":
                yield from _read_jsonl(chunks, source, text_column)
            elif source.kind == "json":
                yield from _read_json(chunks, source, text_column)
            else:
                yield from _read_csv(chunks, source, text_column)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


class _Metered(io.RawIOBase):
    """A file that counts and hashes the bytes read from it."""

    def __init__(self, path: Path, source: Source):
        self.file = open(path, "rb", buffering=0)
        self.source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(buffer)
        self.source._digest.update(memoryview(buffer)[:count])
        self.source.bytes_read += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def _opened(source: Source) -> Iterator[io.BufferedIOBase]:
    """The source's bytes, decompressed. Errors of the decompressor become UserErrors."""
    try:
        metered = _Metered(source.path, source)
    except OSError as error:
        raise UserError(f"cannot read {source.name} ({error.strerror}): check its permissions") from error
    raw = io.BufferedReader(metered, CHUNK_BYTES)
    with raw:
        try:
            if source.compression == ".gz":
                yield gzip.GzipFile(fileobj=raw)
            elif source.compression == ".bz2":
                yield bz2.BZ2File(raw)
            elif source.compression == ".xz":
                yield lzma.LZMAFile(raw)
            elif source.compression == ".zst":
                import pyarrow

                yield pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
            else:
                yield raw
            while raw.read(CHUNK_BYTES):  # padding after the compressed data still belongs to the file's hash
                pass
            source.sha256 = source._digest.hexdigest()
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if not source.compression:
                raise
            raise UserError(
                f"{source.name} is damaged or cut off ({first_line(error)}): get the file again, or unpack it first"
            ) from error


def _decoded(stream: io.BufferedIOBase, source: Source, skip_mark: bool) -> Iterator[str]:
    """The stream as text, strictly UTF-8, with every byte kept (except a byte order mark where `skip_mark`)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0  # of the next byte to be read
    while True:
        data = stream.read(CHUNK_BYTES)
        waiting = len(decoder.getstate()[0])  # bytes of a character whose end is in `data`
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            where = position - waiting + error.start
            after = " after decompression" if source.compression else ""
            raise UserError(
                f"{source.name} is not UTF-8 text: byte {where:,}{after} is 0x{error.object[error.start]:02x}; "
                "convert it first, for example with `iconv -f WINDOWS-1252 -t UTF-8 in.txt > out.txt`, or leave it out"
            ) from error
        if skip_mark and position == 0 and text.startswith("\ufeff"):
            text = text[1:]
        position += len(data)
        if text:
            yield text
        if not data:
            return


# ---------------------------------------------------------------------------------------------------------------------
# Plain text
# ---------------------------------------------------------------------------------------------------------------------


def _split_at_markers(chunks: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Cut text at its marker lines, wherever the chunks happen to end."""
    text, line_start = "", True  # text not yet given out, and whether it begins at the start of a line
    for chunk in chunks:
        text, line_start = yield from _cut_markers(text + chunk, line_start, at_end=False)
    text, _ = yield from _cut_markers(text, line_start, at_end=True)
    yield text, True


def _cut_markers(text: str, line_start: bool, at_end: bool) -> Generator[tuple[str, bool], None, tuple[str, bool]]:
    """Give out all of `text` that is decided; return what has to wait for more, and whether that begins a line."""
    done = 0
    hit = text.find(MARKER)
    while hit >= 0:
        after = hit + len(MARKER)
        rest = text[after : after + 2]
        starts_line = text[hit - 1] == "\n" if hit else line_start
        if starts_line and not at_end and rest in ("", "\r"):
            break  # whether the line ends here is in the next chunk
        if starts_line and (rest in ("", "\r", "\r\n") or rest[0] == "\n"):
            yield _without_line_break(text[done:hit]), True
            done = min(len(text), after + (2 if rest[:1] == "\r" else 1))
            line_start = True
            hit = text.find(MARKER, done)
        else:
            hit = text.find(MARKER, after)
    wait = len(text) if at_end else _decided(text, done, line_start)
    if wait > done:
        yield text[done:wait], False
        line_start = text[wait - 1] == "\n"
    return text[wait:], line_start


def _without_line_break(text: str) -> str:
    if text.endswith("\r\n"):
        return text[:-2]
    return text[:-1] if text.endswith("\n") else text


def _decided(text: str, done: int, line_start: bool) -> int:
    """Up to where `text` can be given out: before a line break that a marker may follow, if that is not yet known."""
    line = MARKER + "\r"
    last = text.rfind("\n", max(done, len(text) - len(line) - 1))
    if last >= 0 and line.startswith(text[last + 1 :]):
        return last - 1 if last > done and text[last - 1] == "\r" else last
    if line_start and line.startswith(text[done:]):
        return done
    return len(text) - 1 if text.endswith("\r") else len(text)


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


def _record_text(record, source: Source, where: str, column: str) -> str:
    """The text of one JSON-like record; None counts as an empty document."""
    if isinstance(record, dict):
        if column not in record:
            raise UserError(
                f"{source.name}, {where}: no field {column!r} (there is: {', '.join(map(str, record)) or 'nothing'}); "
                "name the field with --text_column"
            )
        record = record[column]
    if record is None:
        return ""
    if not isinstance(record, str):
        raise UserError(
            f"{source.name}, {where}: {column!r} is of type {type(record).__name__}, not text; "
            "name the field that holds the text with --text_column"
        )
    return _encodable(record, source)


def _encodable(text: str, source: Source) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            source.repaired += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _lines(chunks: Iterator[str], source: Source) -> Iterator[str]:
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
                raise _too_long(source)
    if waiting:
        yield "".join(waiting)


def _too_long(source: Source) -> UserError:
    return UserError(
        f"{source.name} has a record of more than {MAX_RECORD >> 20} million characters: "
        "cut it into smaller records, or store the text as .txt, where length does not matter"
    )


def _read_jsonl(chunks: Iterator[str], source: Source, column: str) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(_lines(chunks, source), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source.name}, line {number:,} is not JSON ({error}): repair or remove it") from error
        yield _record_text(record, source, f"line {number:,}", column), True


def _read_json(chunks: Iterator[str], source: Source, column: str) -> Iterator[tuple[str, bool]]:
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
            raise UserError(f"{source.name} is nested too deep at record {number + 1:,}: repair it") from error
        except ValueError as error:
            if ended:
                reason = "the file ends inside the array" if start == len(text) else error
                raise UserError(
                    f"{source.name} is not JSON at record {number + 1:,} ({reason}): repair it, or use .jsonl"
                ) from error
            # Perhaps the record is only cut off. Doubling what is there keeps the attempts at a long one few.
            text, start = text[start:], 0
            wanted = 2 * max(len(text), CHUNK_BYTES)
            parts = [text]
            while sum(map(len, parts)) < wanted and not ended:
                parts.append(next(chunks, ""))
                ended = not parts[-1]
            text = "".join(parts)
            if len(text) > 4 * MAX_RECORD:
                raise _too_long(source) from error
            continue
        number += 1
        yield _record_text(record, source, f"record {number:,}", column), True


def _read_csv(chunks: Iterator[str], source: Source, column: str) -> Iterator[tuple[str, bool]]:
    name = source.name.lower().removesuffix(source.compression)
    before = csv.field_size_limit(MAX_RECORD)
    try:
        rows = csv.reader(_lines(chunks, source), delimiter="\t" if name.endswith(".tsv") else ",")
        header = next(rows, None)
        if header is None:
            return
        if column not in header:
            raise UserError(
                f"{source.name} has no column {column!r} (there is: {', '.join(header)}): name one with --text_column"
            )
        index = header.index(column)
        for row in rows:
            if row and len(row) <= index:
                raise UserError(
                    f"{source.name}, line {rows.line_num:,} has {len(row)} columns where the header has {len(header)}: "
                    "repair or remove the line"
                )
            if row:
                yield row[index], True
    except csv.Error as error:
        raise UserError(f"{source.name}, line {rows.line_num:,} is not CSV ({error}): repair or remove it") from error
    finally:
        csv.field_size_limit(before)


def _read_parquet(source: Source, column: str) -> Iterator[tuple[str, bool]]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryDirectory() as folder:
        # Parquet is read from its end: a compressed one has to be unpacked first. Either way, this pass takes the hash.
        path = Path(folder, "data.parquet") if source.compression else source.path
        with _opened(source) as stream, open(path if source.compression else os.devnull, "wb") as file:
            while data := stream.read(CHUNK_BYTES):
                file.write(data)
        try:
            # Without pre-buffering and with a small buffer, pages are read as they are needed, not whole row groups.
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
                names = file.schema_arrow.names
                if column not in names:
                    raise UserError(
                        f"{source.name} has no column {column!r} (there is: {', '.join(names)}): "
                        "name the column with --text_column"
                    )
                kind, types = file.schema_arrow.field(column).type, pyarrow.types
                texts = (types.is_string, types.is_large_string, types.is_dictionary, types.is_null)
                if not any(fits(kind) for fits in texts):
                    raise UserError(
                        f"{source.name}: the column {column!r} is of type {kind}, not text; "
                        "name the column that holds the text with --text_column"
                    )
                number = 0
                for group in range(file.num_row_groups):
                    rows = _rows_at_a_time(path, file.metadata.row_group(group), source, column)
                    for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[column]):
                        for value in batch.column(0):  # one text at a time
                            number += 1
                            text = _record_text(value.as_py(), source, f"row {number:,}", column)
                            if len(text) > MAX_RECORD:
                                raise _too_long(source)
                            yield text, True
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{source.name} is not a whole parquet file ({first_line(error)}): get it anew") from error


def _rows_at_a_time(path: Path, group, source: Source, column: str) -> int:
    """
    How many rows of a row group to decode together, so that they do not take much more memory than the file says.

    64, but one where a text that is stored once may be meant by many rows: in a dictionary that is larger than writers
    make them by themselves (1 MiB), or where every text is told by how it differs from the one before.
    """
    chunks = (group.column(i) for i in range(group.num_columns))
    chunk = next((chunk for chunk in chunks if chunk.path_in_schema == column), None)
    if chunk is None:
        return 64
    size = chunk.total_uncompressed_size
    if size > MAX_UNPACKED and size > 100 * chunk.total_compressed_size:  # pages may be that large, too
        raise UserError(
            f"{source.name} unpacks {chunk.total_compressed_size:,} bytes to {size:,}, which no text does: "
            "leave it out, or unpack it to .txt or .jsonl"
        )
    if "DELTA_BYTE_ARRAY" in chunk.encodings:
        return 1
    packed = any("DICTIONARY" in encoding for encoding in chunk.encodings)
    return 1 if packed and _dictionary_bytes(path, chunk) > MAX_DICTIONARY else 64


def _dictionary_bytes(path: Path, chunk) -> int:
    """The size of a column's dictionary unpacked, as its page says: the second number of Thrift's compact protocol."""
    numbers: list[int] = []
    with open(path, "rb") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        header = iter(file.read(16))
    for byte in header:  # 0x15 (the next field is an i32), then the number in groups of 7 bits, the lowest first
        if byte != 0x15:
            break
        shift, value, more = 0, 0, True
        while more:
            part = next(header, 0)
            value, shift, more = value | (part & 0x7F) << shift, shift + 7, part >= 0x80
        numbers.append(value >> 1)  # zigzag
    return numbers[1] if len(numbers) > 1 else MAX_DICTIONARY + 1


def _read_hub(source: Source, column: str) -> Iterator[tuple[str, bool]]:
    rows = load_hub(source.name)
    try:
        for number, row in enumerate(rows, 1):
            yield _record_text(row, source, f"record {number:,}", column), True
    except UserError:
        raise
    except Exception as error:  # see load_hub
        raise UserError(f"{source.name} could not be read to the end ({first_line(error)}): try again") from error


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


def load_hub(name: str):
    """
    The rows of a Hub dataset as a stream, or of a folder that `save_to_disk` made.

    `name` is owner/name[:configuration[:split]], or a folder laid out as a dataset on the Hub in the owner's place,
    with split "train" by default. Raises UserError when it cannot be had.
    """
    name = os.path.expanduser(name)
    if is_arrow_folder(Path(name)):
        return load_arrow_folder(name)["train"]
    import datasets

    try:
        hub, configuration, split = split_name(name)
        if os.path.isdir(hub):
            files = datasets.load_dataset_builder(hub, configuration or None).config.data_files or {}
            _refuse_outside(hub, [file for of_split in files.values() for file in of_split])
        return datasets.load_dataset(hub, configuration or None, split=split or "train", streaming=True)
    except UserError:
        raise
    except Exception as error:  # a dozen unrelated types, each of which means that the data cannot be had
        raise UserError(
            f"{name} is neither a file or folder here nor a Hub dataset that can be reached ({first_line(error)}): "
            "check the name, the configuration and split (owner/name:configuration:split) and the network"
        ) from error
