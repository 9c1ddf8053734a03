"""Text in, tokens out: a corpus of any size as one stream of token ids, in constant memory and on all cores.

The main thread reads, decodes and cuts; threads tokenize (tiktoken and tokenizers release the GIL, so they scale over
cores on every platform); the main thread writes in order. The result does not depend on the number of threads.

- The stream is lossless: every document's ids in order, then one end-of-text id. Decoding gives the text back byte
  for byte. `creature.data.text.pieces` says where documents are cut.
- A hash of each document's first 65,536 characters chooses its split: the same whatever the order of the files, and
  copies of a document land in one split. If every document falls into validation, or none does, everything is in the
  training stream, and `load_data` holds out the end of it.
"""

import functools
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from creature.data.text.pieces import Batch, Cutter, stream_documents
from creature.data.text.readers import Documents
from creature.data.text.sources import Source, find_sources
from creature.data.text.tokenizer import END_OF_TEXT, gpt2_hash, load_encoding, load_tokenizer, tokenizer_hash
from creature.errors import UserError
from creature.files import is_disk_full, one_at_a_time, replace_file, require_writable
from creature.hardware import cpu_cores

ARROW_ROW = 1024  # tokens in a row of an Arrow corpus
ARROW_BATCH = 1 << 24  # tokens in a record batch: every block size that divides it opens without a copy
SPLITS = ("train", "validation")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Tokens:
    """A tokenized batch."""

    ids: list[np.ndarray]  # per split: 0 train, 1 validation
    documents: list[int]  # per split
    characters: int
    text_bytes: int


@dataclass
class _Encoder:
    """Tokenizes a batch of pieces."""

    encode: Callable[[list[str]], list[np.ndarray]]
    end_of_text: int
    dtype: np.dtype
    vocab_size: int
    hash: str
    threads: bool  # whether several threads may encode at once

    def __call__(self, batch: Batch) -> _Tokens:
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


def _load_encoder(tokenizer_name: str) -> _Encoder:
    tokenizer = None if tokenizer_name == "gpt2" else load_tokenizer(tokenizer_name)
    if tokenizer is None or tokenizer_hash(tokenizer) == gpt2_hash():
        encoding = load_encoding()

        def encode(texts: list[str]) -> list[np.ndarray]:
            return [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

        return _Encoder(encode, END_OF_TEXT, np.dtype("<u2"), encoding.n_vocab, gpt2_hash(), threads=True)
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
            # One text at a time: several are spread over all cores, and one is not, whatever the number of workers.
            # The fast kind leaves out the offsets, a third of the time; `encode` alone would hold the GIL.
            found = [backend.encode_batch_fast([text], add_special_tokens=False)[0].ids for text in texts]
        return [np.array(ids, dtype=np.uint32) for ids in found]

    dtype = np.dtype("<u2") if len(tokenizer) <= 1 << 16 else np.dtype("<u4")
    return _Encoder(
        encode_other,
        tokenizer.eos_token_id,
        dtype,
        len(tokenizer),
        tokenizer_hash(tokenizer),
        threads=backend is not None,
    )


def _ordered_map(work: Callable, items: Iterator, workers: int) -> Iterator:
    """`map(work, items)` on `workers` threads, in order, with at most `workers` + 3 items in memory."""
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
    """Writes one split, and counts what its manifest entry says."""

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
        from datasets import Features, List, Value

        from creature.data.blocks import describe_arrow_folder

        if self.filled:
            self._flush()
        self.writer.close()
        features = Features({"input_ids": List(Value(str(self.dtype)))})
        describe_arrow_folder(self.folder, features, split, fingerprint)


def manifest_path(output: Path) -> Path:
    """The path of a corpus's manifest: corpus.bin -> corpus.manifest.json, a folder -> manifest.json in it."""
    return output.with_name(output.stem + ".manifest.json") if output.suffix == ".bin" else output / "manifest.json"


def _check_output(output: Path, sources: list[Source], overwrite: bool) -> None:
    if "\0" in str(output) or any("\ud800" <= character <= "\udfff" for character in str(output)):
        raise UserError(f"--output {output} is not a Unicode name: choose another")
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
    path = Path(output)
    check = functools.partial(_check_output, path, sources, overwrite)
    check()
    encoder = _load_encoder(tokenizer_name)
    workers = (workers or cpu_cores()) if encoder.threads else 1
    began = time.perf_counter()

    def write(fraction: float) -> dict:
        """The manifest of the corpus that this wrote; _NothingToTrainOn if no document fell into the training split."""
        documents = [Documents(source, text_column) for source in sources]
        cutter = Cutter(fraction, seed, large=encoder.hash != gpt2_hash())
        counts = {"documents": 0, "characters": 0, "text_bytes": 0}

        def tokens() -> Iterator[_Tokens]:
            with closing(stream_documents(documents, progress, "tokenizing")) as texts:
                done = _ordered_map(encoder, cutter.batches(texts), workers)
                for batch in done if train_tokens is None else _first(done, train_tokens, encoder.end_of_text):
                    counts["documents"] += sum(batch.documents)
                    counts["characters"] += batch.characters
                    counts["text_bytes"] += batch.text_bytes
                    yield batch

        def manifest(streams: list[_Stream | None], files: list[str]) -> dict:
            if not counts["documents"]:
                names = ", ".join(source.name for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
                raise UserError(f"there is no text in {names}: the input is empty, name one that is not")
            if not streams[0].tokens:
                raise _NothingToTrainOn
            return {
                "format": "creature token corpus 1",
                "tokenizer": tokenizer_name,
                "tokenizer_hash": encoder.hash,
                "vocab_size": encoder.vocab_size,
                "end_of_text": encoder.end_of_text,
                "dtype": encoder.dtype.name,
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
        return _write_folder(path, tokens(), manifest, encoder.dtype, check)

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
    """Batches until the training stream has `limit` ids; the text of the last batch is counted in proportion."""
    with closing(tokens):
        for batch in tokens:
            train, validation = batch.ids
            if len(train) < limit:
                limit -= len(train)
                yield batch
                continue
            kept = (limit + len(validation)) / (len(train) + len(validation))
            documents = [int((train[:limit] == end_of_text).sum()), batch.documents[1]]
            characters, text_bytes = round(batch.characters * kept), round(batch.text_bytes * kept)
            yield _Tokens([train[:limit], validation], documents, characters, text_bytes)
            return


def _distribute(tokens: Iterator[_Tokens], open_split: Callable[[int], Callable]) -> list[_Stream | None]:
    """Write all batches to their splits, each by the function that `open_split(index)` returns; None: no ids."""
    streams: list[_Stream | None] = [_Stream(open_split(0)), None]
    for batch in tokens:
        streams[0].add(batch.ids[0], batch.documents[0])
        if len(batch.ids[1]):
            streams[1] = streams[1] or _Stream(open_split(1))
            streams[1].add(batch.ids[1], batch.documents[1])
    return streams


def _write_bin(output: Path, tokens: Iterator[_Tokens], manifest: Callable, check: Callable) -> dict:
    paths = (output, _validation_path(output))
    with ExitStack() as lock, ExitStack() as stack:
        # Closed in reverse order: the manifest, opened last, is in place before the streams it describes.
        streams = _distribute(tokens, lambda split: stack.enter_context(replace_file(paths[split])).write)
        result = manifest(streams, [path.name for path in paths])
        file = stack.enter_context(replace_file(manifest_path(output), "w"))
        json.dump(result, file, indent=2, ensure_ascii=False)
        # If two processes write the same corpus, the second waits until all files of the first are in place, and then
        # finds that its output exists.
        lock.enter_context(one_at_a_time(output.parent))
        check()
        if streams[1] is None:
            paths[1].unlink(missing_ok=True)  # of an earlier corpus that this one replaces
    return result


def _write_folder(
    output: Path, tokens: Iterator[_Tokens], manifest: Callable, dtype: np.dtype, check: Callable
) -> dict:
    unique = secrets.token_hex(4)  # not the process id, which two machines that share the disk may both have
    aside, replaced = (output.with_name(f".{output.name}.{unique}.{ending}") for ending in ("part", "old"))
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
                os.replace(output, replaced)
            os.replace(aside, output)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        for file in files:
            file.writer.close()
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return result
