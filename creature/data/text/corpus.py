"""Text in, tokens out: a corpus of any size as one stream of token ids, in constant memory and on all cores.

The main thread reads, decodes and cuts; threads tokenize (tiktoken releases the GIL, so they scale over cores on every
platform); the main thread writes in order. The result does not depend on the number of threads.

- The stream is lossless: every document's ids in order, then one end-of-text id. Decoding gives the text back byte
  for byte.
- A document is tokenized in pieces, but cut only where the GPT-2 pre-tokenizer always splits, so that the ids are
  those of the whole document. A run of a million characters without any such place is cut anyway: the text is still
  kept, only the ids at the cut differ. (Other tokenizers are cut at the same places, in larger pieces.)
- The validation split goes by a hash of each document's first 65,536 characters: stable whatever the order of the
  files, and copies of a document land on the same side. When no document falls on that side (or all of them do),
  everything is in the training stream, and training holds out the end of it instead.
"""

import functools
import hashlib
import json
import os
import secrets
import shutil
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from creature.data.text.readers import Documents
from creature.data.text.sources import Source, find_sources
from creature.data.text.tokenizer import END_OF_TEXT, gpt2_hash, load_encoding, load_tokenizer, tokenizer_hash
from creature.errors import UserError
from creature.files import is_disk_full, one_at_a_time, replace_file, require_writable
from creature.hardware import cpu_cores

PIECE = 1 << 18  # characters tokenized at a time: large enough for speed, small enough for any number of threads
LONGEST_RUN = 1 << 20  # characters without a safe place to cut, after which the cut is made anyway
HASHED = 1 << 16  # characters of a document's beginning that choose its split
ARROW_ROW = 1024  # tokens in a row of an Arrow corpus
ARROW_BATCH = 1 << 24  # tokens in a record batch: every block size that divides it opens without a copy
SPLITS = ("train", "validation")


# ---------------------------------------------------------------------------------------------------------------------
# Cutting
# ---------------------------------------------------------------------------------------------------------------------


def last_safe_cut(text: str, start: int = 1) -> int:
    """
    The last position >= `start` where `text` can be cut without changing any GPT-2 id; 0 when there is none.

    No GPT-2 pre-token holds a non-space followed by white space, a letter followed by a non-letter, or a digit
    followed by a non-digit, and none of its patterns looks back: on both sides of such a place the ids are those of
    the whole.
    """
    # Judged by categories that every Unicode version since 3.0 agrees on; unassigned characters are no place to cut.
    for i in range(len(text) - 1, max(start, 1) - 1, -1):
        left, right = text[i - 1], text[i]
        if right in " \n":
            if not left.isspace():
                return i
        elif left.isalnum():
            a, b = unicodedata.category(left), unicodedata.category(right)
            if a[0] in "LN" and b[0] != a[0] and b != "Cn":
                return i
    return 0


@dataclass
class _Batch:
    """Pieces of about PIECE characters together: (text, whether it ends its document, index of its split)."""

    pieces: list[tuple[str, bool, int]] = field(default_factory=list)
    characters: int = 0


@dataclass
class _Tokens:
    """A tokenized batch: ids per split, and what the report counts."""

    ids: list[np.ndarray]
    documents: list[int]
    characters: int
    text_bytes: int


class _Cutter:
    """Makes batches of pieces out of streamed documents."""

    def __init__(self, validation_fraction: float, seed: int, piece: int):
        self.limit = int(validation_fraction * 2**64)
        self.key = seed.to_bytes(8, "little", signed=True)
        self.piece = piece
        self.empty = self.forced = 0

    def batches(self, texts: Iterator[tuple[str, bool]]) -> Iterator[_Batch]:
        batch = _Batch()
        for piece in self._pieces(texts):
            batch.pieces.append(piece)
            batch.characters += len(piece[0])
            if batch.characters >= self.piece or len(batch.pieces) >= 4096:
                yield batch
                batch = _Batch()
        if batch.pieces:
            yield batch

    def _pieces(self, texts: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool, int]]:
        waiting, length, searched, split = [], 0, 0, -1
        # A split is chosen once HASHED characters are there: no piece may leave before.
        enough = max(self.piece, HASHED)
        for text, ends in texts:
            if text:
                waiting.append(text)
                length += len(text)
            if ends:
                if length or split >= 0:
                    whole = "".join(waiting)
                    yield whole, True, split if split >= 0 else self._split(whole)
                else:
                    self.empty += 1
                waiting, length, searched, split = [], 0, 0, -1
                continue
            while length >= enough:
                whole = "".join(waiting)
                if split < 0:
                    split = self._split(whole)
                cut = last_safe_cut(whole[:LONGEST_RUN], searched)
                if not cut and length >= LONGEST_RUN:
                    cut = LONGEST_RUN
                    self.forced += 1
                if not cut:
                    waiting, searched = [whole], len(whole)
                    break
                yield whole[:cut], False, split
                waiting, length, searched = [whole[cut:]], length - cut, 0

    def _split(self, beginning: str) -> int:
        digest = hashlib.blake2b(beginning[:HASHED].encode("utf-8"), digest_size=8, key=self.key).digest()
        return int(int.from_bytes(digest, "little") < self.limit)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Coder:
    """How a batch becomes ids."""

    encode: Callable[[list[str]], list[np.ndarray]]
    end_of_text: int
    dtype: np.dtype
    vocab_size: int
    hash: str
    threads: bool

    def __call__(self, batch: _Batch) -> _Tokens:
        texts = [text for text, _, _ in batch.pieces]
        parts, documents = [[], []], [0, 0]
        end = np.array([self.end_of_text], dtype=np.uint32)
        for ids, (_, ends, split) in zip(self.encode(texts), batch.pieces, strict=True):
            parts[split].append(ids)
            if ends:
                parts[split].append(end)
                documents[split] += 1
        ids = [np.concatenate(some).astype(self.dtype) if some else np.empty(0, self.dtype) for some in parts]
        text_bytes = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
        return _Tokens(ids, documents, batch.characters, text_bytes)


def _make_coder(tokenizer_name: str) -> _Coder:
    tokenizer = None if tokenizer_name == "gpt2" else load_tokenizer(tokenizer_name)
    if tokenizer is None or tokenizer_hash(tokenizer) == gpt2_hash():
        encoding = load_encoding()

        def encode(texts: list[str]) -> list[np.ndarray]:
            return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

        return _Coder(encode, END_OF_TEXT, np.dtype("<u2"), encoding.n_vocab, gpt2_hash(), threads=True)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {tokenizer_name!r} has no end-of-text token: set its eos_token, or use another tokenizer"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a special token's name inside a text is ordinary text

    def encode_other(texts: list[str]) -> list[np.ndarray]:
        if backend is None:
            found = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        else:
            found = [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]
        return [np.array(ids, dtype=np.uint32) for ids in found]

    dtype = np.dtype("<u2") if len(tokenizer) <= 1 << 16 else np.dtype("<u4")
    # One thread: encode_batch runs on all cores by itself.
    return _Coder(encode_other, tokenizer.eos_token_id, dtype, len(tokenizer), tokenizer_hash(tokenizer), threads=False)


def _in_order(work: Callable, items: Iterator, workers: int) -> Iterator:
    """`map(work, items)` on `workers` threads, in order, with few items under way at any time."""
    if workers <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers + 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class _Stream:
    """One split on its way to disk, and what its manifest entry will say."""

    def __init__(self, write: Callable[[np.ndarray], None]):
        self.write = write
        self.digest = hashlib.sha256()
        self.tokens = self.documents = self.largest_id = 0

    def add(self, ids: np.ndarray, documents: int) -> None:
        if len(ids):
            self.write(ids)
            self.digest.update(ids)
            self.tokens += len(ids)
            self.documents += documents
            self.largest_id = max(self.largest_id, int(ids.max()))

    def entry(self, file: str) -> dict:
        return {
            "file": file,
            "tokens": self.tokens,
            "documents": self.documents,
            "largest_id": self.largest_id,
            "sha256": self.digest.hexdigest(),  # of the ids as stored: for a .bin, of the file
        }


class _ArrowFile:
    """Rows of ARROW_ROW ids in record batches of ARROW_BATCH: what `datasets.load_from_disk` opens."""

    def __init__(self, folder: Path, dtype: np.dtype):
        import pyarrow

        self.folder, self.dtype = folder, dtype
        folder.mkdir(parents=True)
        self.schema = pyarrow.schema({"input_ids": pyarrow.list_(pyarrow.from_numpy_dtype(dtype))})
        self.writer = pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), self.schema)
        self.buffer, self.filled = np.empty(ARROW_BATCH, dtype), 0

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            count = min(len(ids), ARROW_BATCH - self.filled)
            self.buffer[self.filled : self.filled + count] = ids[:count]
            self.filled += count
            ids = ids[count:]
            if self.filled == ARROW_BATCH:
                self._flush()

    def _flush(self) -> None:
        import pyarrow

        ends = [*range(0, self.filled, ARROW_ROW), self.filled]
        rows = pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), self.buffer[: self.filled])
        self.writer.write_batch(pyarrow.record_batch([rows], schema=self.schema))
        self.filled = 0

    def close(self, split: str, fingerprint: str) -> None:
        from datasets import DatasetInfo, Features, List, Value

        if self.filled:
            self._flush()
        self.writer.close()
        DatasetInfo(features=Features({"input_ids": List(Value(str(self.dtype)))})).write_to_directory(self.folder)
        state = {
            "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
            "_fingerprint": fingerprint[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        (self.folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def manifest_path(output: Path) -> Path:
    """Where the manifest of a corpus lies: corpus.bin -> corpus.manifest.json, a folder -> manifest.json in it."""
    return output.with_name(output.stem + ".manifest.json") if output.suffix == ".bin" else output / "manifest.json"


def _check_output(output: Path, sources: list[Source], overwrite: bool) -> None:
    if "\0" in str(output) or any("\ud800" <= character <= "\udfff" for character in str(output)):
        raise UserError(f"--output {output} is not a name in Unicode, as its manifest needs: choose another")
    if output.suffix not in ("", ".bin"):
        raise UserError(f"--output {output} has to end in .bin (a token stream) or have no ending (an Arrow folder)")
    if output.suffix == ".bin":
        if output.is_dir():
            raise UserError(f"--output {output} is a folder: name a .bin file that is not one")
        existing = [path for path in (output, _validation_path(output), manifest_path(output)) if path.exists()]
    else:
        if output.is_file():
            raise UserError(f"--output {output} is a file: name a folder, or a file that ends in .bin")
        existing = [output] if output.is_dir() and any(output.iterdir()) else []
        if existing and not manifest_path(output).is_file():
            raise UserError(f"the folder {output} holds something else than a corpus: choose a new or empty folder")
        if any(source.path and output.resolve() in source.path.resolve().parents for source in sources):
            raise UserError(f"--output {output} holds the input: choose another folder")
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists already: choose another --output, or pass --overwrite to replace it")
    require_writable(output.parent)


def _validation_path(output: Path) -> Path:
    return output.with_name(output.stem + ".valid.bin")


# ---------------------------------------------------------------------------------------------------------------------
# The corpus
# ---------------------------------------------------------------------------------------------------------------------


def tokenize_corpus(
    inputs: list[str] | list[Source],
    output: str,
    *,
    validation_fraction: float = 0.005,
    seed: int = 0,
    workers: int | None = None,
    tokenizer_name: str = "gpt2",
    text_column: str = "text",
    train_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """
    Tokenize `inputs` (names as `find_sources` takes them, or its sources) into `output` and return its manifest.

    `output` ending in .bin: a stream of little-endian ids as nanoGPT reads it (uint16; uint32 for vocabularies beyond
    65,536, which the manifest says), with corpus.valid.bin and corpus.manifest.json beside it. Otherwise a folder for
    `datasets.load_from_disk`: train/, validation/ and manifest.json. `validation_fraction` of the documents, chosen
    by hash and `seed`, go to validation. `workers` threads tokenize (default: all cores). With `train_tokens`, the
    training stream ends after that many, perhaps within a document, and the input is read no further.

    Files appear only once everything is written. Raises UserError for bad input, an existing output without
    `overwrite`, a folder that cannot be written, a full disk. The returned dict has "seconds" beside what the manifest
    file has.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation_fraction {validation_fraction} is not in [0, 1): a usual value is 0.005")
    if train_tokens is not None and train_tokens < 1:
        raise UserError(f"--train_tokens {train_tokens} is less than 1: leave it out to take everything")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} is less than 1: leave it out to use all cores")
    sources, left_out = (inputs, 0) if inputs and isinstance(inputs[0], Source) else find_sources(inputs)
    path = Path(os.path.expanduser(output))
    check = functools.partial(_check_output, path, sources, overwrite)
    check()
    coder = _make_coder(tokenizer_name)
    workers = (workers or cpu_cores()) if coder.threads else 1
    began = time.perf_counter()

    def write(fraction: float) -> dict:
        """The manifest of the corpus that this wrote; _NothingToTrainOn if no document fell into the training split."""
        documents = [Documents(source, text_column) for source in sources]
        cutter = _Cutter(fraction, seed, PIECE if coder.threads else LONGEST_RUN)
        counts = {"documents": 0, "characters": 0, "text_bytes": 0}

        def tokens() -> Iterator[_Tokens]:
            with closing(_with_progress(documents, progress, "tokenizing")) as texts:
                done = _in_order(coder, cutter.batches(texts), workers)
                for some in done if train_tokens is None else _first(done, train_tokens, coder.end_of_text):
                    counts["documents"] += sum(some.documents)
                    counts["characters"] += some.characters
                    counts["text_bytes"] += some.text_bytes
                    yield some

        def manifest(streams: list[_Stream | None], files: list[str]) -> dict:
            if not counts["documents"]:
                names = ", ".join(source.name for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
                raise UserError(f"there is no text in {names}: the input is empty, name one that is not")
            if not streams[0].tokens:
                raise _NothingToTrainOn
            return {
                "format": "creature token corpus 1",
                "tokenizer": tokenizer_name,
                "tokenizer_hash": coder.hash,
                "vocab_size": coder.vocab_size,
                "end_of_text": coder.end_of_text,
                "dtype": coder.dtype.name,
                **counts,
                "tokens": sum(stream.tokens for stream in streams if stream),
                "splits": {
                    split: stream.entry(file)
                    for split, stream, file in zip(SPLITS, streams, files, strict=True)
                    if stream and stream.tokens
                },
                "validation_fraction": fraction,
                "seed": seed,
                "text_column": text_column,
                "train_tokens": train_tokens,
                "empty_documents": cutter.empty,
                "forced_cuts": cutter.forced,
                "repaired_records": sum(one.repaired for one in documents),
                "files_left_out": left_out,
                "inputs": [{"name": one.name, "bytes": one.bytes_read, "sha256": one.sha256} for one in documents],
            }

        if path.suffix == ".bin":
            return _write_bin(path, tokens(), manifest, check)
        return _write_folder(path, tokens(), manifest, coder.dtype, check)

    try:
        try:
            result = write(validation_fraction)
        except _NothingToTrainOn:
            result = write(0.0)  # a corpus of one or two documents: reading it again costs little
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"the disk is full while writing {output}: free some space, or use another disk") from error
        raise
    return {**result, "seconds": time.perf_counter() - began}


class _NothingToTrainOn(Exception):
    """Every document fell into the validation split."""


def _first(tokens: Iterator[_Tokens], limit: int, end_of_text: int) -> Iterator[_Tokens]:
    """Batches up to where the training stream has `limit` ids; of the last one, the text that they stand for."""
    with closing(tokens):
        for some in tokens:
            train = some.ids[0]
            if len(train) < limit:
                limit -= len(train)
                yield some
                continue
            kept = (limit + len(some.ids[1])) / (len(train) + len(some.ids[1]))  # about: it says nothing but sizes
            documents = [int((train[:limit] == end_of_text).sum()), some.documents[1]]
            characters, text_bytes = round(some.characters * kept), round(some.text_bytes * kept)
            yield _Tokens([train[:limit], some.ids[1]], documents, characters, text_bytes)
            return


def read_pieces(
    inputs: list[str], text_column: str = "text", progress: bool = True
) -> Iterator[list[tuple[str, bool]]]:
    """The text of `inputs` in batches of (piece, whether it ends its document), cut where no pre-token is split."""
    documents = [Documents(source, text_column) for source in find_sources(inputs)[0]]
    with closing(_with_progress(documents, progress, "reading")) as texts:
        for batch in _Cutter(0, 0, PIECE).batches(texts):
            yield [(text, ends) for text, ends, _ in batch.pieces]


def _with_progress(documents: list[Documents], progress: bool, title: str) -> Iterator[tuple[str, bool]]:
    """All documents of all sources, under a progress bar in bytes of the files, with an ETA where sizes are known."""
    from tqdm import tqdm

    sizes = [one.source.size for one in documents]
    known = all(one.source.kind not in ("hub", "arrow") for one in documents)
    with tqdm(total=sum(sizes) if known else None, unit="B", unit_scale=True, disable=not progress, desc=title) as bar:
        for one in documents:
            done = 0
            for text, ends in one:
                if one.bytes_read != done:
                    bar.update(one.bytes_read - done)
                    done = one.bytes_read
                yield text, ends
            bar.update(one.bytes_read - done)


def _distribute(tokens: Iterator[_Tokens], open_split: Callable[[int], Callable]) -> list[_Stream | None]:
    """Write all batches to their splits; `open_split(index)` gives what writes one. None for validation without ids."""
    streams: list[_Stream | None] = [_Stream(open_split(0)), None]
    for some in tokens:
        streams[0].add(some.ids[0], some.documents[0])
        if len(some.ids[1]):
            streams[1] = streams[1] or _Stream(open_split(1))
            streams[1].add(some.ids[1], some.documents[1])
    return streams


def _write_bin(output: Path, tokens: Iterator[_Tokens], manifest: Callable, check: Callable) -> dict:
    paths = (output, _validation_path(output))
    with ExitStack() as alone, ExitStack() as stack:
        # Left in the reverse order: the manifest, written last, is in place before the streams it speaks of.
        streams = _distribute(tokens, lambda split: stack.enter_context(replace_file(paths[split])).write)
        result = manifest(streams, [path.name for path in paths])
        file = stack.enter_context(replace_file(manifest_path(output), "w"))
        json.dump(result, file, indent=2, ensure_ascii=False)
        # Of two that write the same corpus, one puts its files in place, all of them, and then the other looks again.
        alone.enter_context(one_at_a_time(output.parent))
        check()
        if streams[1] is None:
            paths[1].unlink(missing_ok=True)  # of an earlier corpus that this one replaces
    return result


def _write_folder(
    output: Path, tokens: Iterator[_Tokens], manifest: Callable, dtype: np.dtype, check: Callable
) -> dict:
    mark = secrets.token_hex(4)  # two machines may share the disk, and a process id
    aside, old = (output.with_name(f".{output.name}.{mark}.{ending}") for ending in ("part", "old"))
    files: list[_ArrowFile] = []

    def open_split(split: int) -> Callable[[np.ndarray], None]:
        files.append(_ArrowFile(aside / SPLITS[split], dtype))
        return files[-1].write

    try:
        streams = _distribute(tokens, open_split)
        result = manifest(streams, list(SPLITS))
        for name, file, stream in zip(SPLITS, files, streams, strict=False):  # no file for a validation that is None
            file.close(name, stream.digest.hexdigest())
        splits = {"splits": list(SPLITS[: len(files)])}
        (aside / "dataset_dict.json").write_text(json.dumps(splits), encoding="utf-8")
        text = json.dumps(result, indent=2, ensure_ascii=False)
        (aside / "manifest.json").write_text(text, encoding="utf-8")
        with one_at_a_time(output.parent):
            check()
            if output.is_dir():
                os.replace(output, old)
            os.replace(aside, output)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        for file in files:
            file.writer.close()
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return result
