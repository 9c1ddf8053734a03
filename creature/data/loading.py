"""Any token file, or text, as datasets of fixed blocks to train and to evaluate on."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from creature.data.blocks import (
    HASHED_WHOLE,
    TokenStream,
    arrow_column,
    check_ids,
    dataset_of_blocks,
    flat_ids,
    sampled_hash,
)
from creature.data.text.corpus import manifest_path, tokenize_corpus
from creature.data.text.readers import load_arrow_folder, load_hub
from creature.data.text.sources import TOKEN_FILES, Source, find_sources, is_arrow_folder, is_dataset_name, split_name
from creature.data.text.tokenizer import gpt2_hash, load_tokenizer, tokenizer_hash
from creature.errors import UserError
from creature.files import one_at_a_time, replace_file

TOKEN_TYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")  # that a manifest may name
FEWEST_BOUNDARIES = 256  # of documents in a batch, ends included; more of them that are empty cost attention little
TRIES = 10  # to open a corpus that is being replaced
VALIDATION_ENDINGS = (".valid", "_valid", ".validation", "_validation", ".val", "_val")


@dataclass
class Splits:
    """What `load_splits` returns: blocks to train on, blocks to evaluate on (None: there are too few), and facts."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    info: dict
    ordered: bool = False  # whether the rows of `train` stand in the order to train on, or are to be shuffled


def load_splits(
    source: str,
    *,
    block_size: int,
    vocab_size: int,
    tokenizer_name: str = "gpt2",
    validation_fraction: float = 0.005,
    cache_dir: str = "data",
    text_column: str = "text",
    train_tokens: int | None = None,
    progress: bool = True,
) -> Splits:
    """
    Open `source` as datasets with the one column `input_ids`, each row a block of `block_size` consecutive tokens.

    `source` is a .bin stream (uint16, or what its manifest says), a 1-D integer .npy or .pt, a folder with train.bin
    and val.bin (or valid.bin, validation.bin), an Arrow folder (`save_to_disk`, or made by tokenize_corpus), or text:
    files, a folder, a glob or a Hub dataset (or a folder laid out as one), tokenized once into `cache_dir` and reused
    as long as the input stays the same (a Hub dataset: as long as the cached file is there). With `train_tokens`, only
    the first so many tokens are trained on, and no more text is read than that takes.

    Validation is the corpus's own validation stream (corpus.valid.bin, val.bin, ...). Where there is none of at least
    one block, the last `validation_fraction` of the training blocks are held out, at least one; with 0, validation is
    None. Only the last, short block of each split is left out. `info` has path, tokens, validation_tokens (before
    cutting into blocks), dtype, data_hash and tokenizer_hash (None when no manifest tells).

    A corpus that another process replaces meanwhile is opened as it was or as it is then, never some of both.

    Raises UserError, naming the file and the remedy, for a source that is missing, empty, damaged, of another
    tokenizer, shorter than one block, or has ids that are negative or >= `vocab_size`.
    """
    if block_size < 2:
        raise UserError(f"block_size {block_size} is too small: a block needs at least 2 tokens, 2048 is usual")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction {validation_fraction} is not in [0, 1): a usual value is 0.005")
    path = Path(os.path.expanduser(source))
    for _ in range(TRIES):
        mark = _mark(path)
        try:
            splits = _open_splits(
                source,
                block_size,
                vocab_size,
                tokenizer_name,
                validation_fraction,
                cache_dir,
                text_column,
                train_tokens,
                progress,
            )
        except (UserError, OSError):
            if _mark(path) == mark:
                raise
        else:
            if _mark(path) == mark:
                return splits
    raise UserError(f"{source} is replaced again and again while it is opened: wait until whoever does that is done")


def _mark(path: Path) -> list[tuple]:
    """
    What tells whether the corpus at `path` has been replaced: its folder or files, as the system knows them.

    Whoever replaces one holds a lock meanwhile (`creature.data.text.corpus`), so none of them is missing here.
    """
    within = path if path.is_dir() and not is_arrow_folder(path) else path.parent
    if not within.is_dir():
        return []
    with one_at_a_time(within):
        if within == path:
            found = [file for file in path.iterdir() if file.suffix.lower() in (*TOKEN_FILES, ".json")]
        elif path.is_dir():
            found = [path]
        else:
            found = [file for file in within.iterdir() if file.name.startswith(path.stem) and file.is_file()]
        states = [(file.name, file.stat()) for file in sorted(found)]
    return [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states]


def _open_splits(
    source: str,
    block_size: int,
    vocab_size: int,
    tokenizer_name: str,
    validation_fraction: float,
    cache_dir: str,
    text_column: str,
    train_tokens: int | None,
    progress: bool,
) -> Splits:
    train, validation, manifest = _find_streams(
        source, block_size, tokenizer_name, validation_fraction, Path(cache_dir), text_column, progress, train_tokens
    )
    if manifest:
        _check_tokenizer(manifest, tokenizer_name, train.name)
    tokens = train.check(vocab_size, manifest)
    blocks = train.count_blocks(block_size)
    if blocks < 1:
        raise UserError(
            f"{train.name} has {tokens:,} tokens, less than one block of {block_size:,}: "
            "add text, or choose a smaller block size"
        )
    held_out, validation_tokens = None, 0
    if validation is not None:
        validation_tokens = validation.check(vocab_size, manifest)
        count = validation.count_blocks(block_size)
        held_out = dataset_of_blocks(validation, block_size, 0, count, "validation") if count else None
    if held_out is None and validation_fraction > 0 and blocks > 1:
        count = max(1, round(validation_fraction * blocks))
        held_out = dataset_of_blocks(train, block_size, blocks - count, count, "validation")
        blocks -= count
        validation_tokens = count * block_size
        tokens -= validation_tokens
    if train_tokens is not None and train_tokens < tokens:
        if train_tokens < block_size:
            raise UserError(f"train_tokens {train_tokens:,} is less than one block of {block_size:,}: raise it")
        tokens, blocks = train_tokens, min(blocks, train_tokens // block_size)
    info = {
        "path": train.name,
        "tokens": tokens,
        "validation_tokens": validation_tokens,
        "dtype": str(train.arrays()[0].type),
        "data_hash": train.content_hash(),
        "tokenizer_hash": manifest["tokenizer_hash"] if manifest else None,
    }
    return Splits(dataset_of_blocks(train, block_size, 0, blocks, "train"), held_out, info)


def open_streams(
    source: str, *, tokenizer_name: str = "gpt2", validation_fraction: float = 0.005, cache_dir: str = "data"
) -> tuple[TokenStream, TokenStream | None]:
    """
    (training stream, validation stream or None) that `source` stands for, as `load_splits` opens it, but uncut.

    Raises UserError for a source that is missing, empty, damaged or of another tokenizer. Ids are not looked at: that
    does `TokenStream.check`.
    """
    train, validation, manifest = _find_streams(
        source, 1, tokenizer_name, validation_fraction, Path(cache_dir), "text", True
    )
    if manifest:
        _check_tokenizer(manifest, tokenizer_name, train.name)
    return train, validation


def collate_blocks(rows: list[dict], end_of_text: int | None = None) -> dict:
    """
    A batch of blocks: input_ids int64 [B, T], and the same tensor as labels (the model shifts).

    With `end_of_text`, the id between two documents, also position_ids int64 [B, T] that restart at each of them, by
    which the model keeps documents apart, and cu_seq_lens_q int32 [N + 1], where in the B x T ticks documents begin and
    the last one ends, for attention kernels that take it; its last number is repeated up to a power of two. End-of-text
    is predicted by the document that it ends, and read as the first token of the one that it begins: so every label
    keeps its target, as many as without, and none is predicted from another document.
    """
    import torch

    ids = np.stack([np.asarray(row["input_ids"]) for row in rows]).astype(np.int64, copy=False)
    input_ids = torch.from_numpy(ids)
    batch = {"input_ids": input_ids, "labels": input_ids}
    if end_of_text is not None:
        ticks = np.arange(ids.shape[1])
        begins = np.maximum.accumulate(np.where(ids == end_of_text, ticks, 0), axis=1)
        positions = ticks - begins
        batch["position_ids"] = torch.from_numpy(positions)
        starts = np.flatnonzero(positions == 0)
        # Few sizes, as every one is compiled by itself.
        boundaries = np.full(max(FEWEST_BOUNDARIES, 1 << len(starts).bit_length()), ids.size, np.int32)
        boundaries[: len(starts)] = starts
        batch["cu_seq_lens_q"] = torch.from_numpy(boundaries)
    return batch


def block_collator(tokenizer, separate_documents: bool) -> Callable[[list[dict]], dict]:
    """`collate_blocks` as the data section asks for it; UserError for a tokenizer that does not end documents."""
    if not separate_documents:
        return collate_blocks
    if tokenizer.eos_token_id is None:
        raise UserError("separate_documents needs a tokenizer with an end-of-text token (eos_token): leave it out")
    return functools.partial(collate_blocks, end_of_text=tokenizer.eos_token_id)


# ---------------------------------------------------------------------------------------------------------------------
# Finding the streams that a name stands for
# ---------------------------------------------------------------------------------------------------------------------


def _find_streams(
    source: str,
    block_size: int,
    tokenizer_name: str,
    validation_fraction: float,
    cache: Path,
    column: str,
    bar: bool,
    limit: int | None = None,
) -> tuple[TokenStream, TokenStream | None, dict | None]:
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        if is_arrow_folder(path):
            found = _arrow_streams(path, block_size, cache)
            if found:
                return found
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in TOKEN_FILES and file.is_file())
        if inside:
            path = _main_stream(path, inside)
    if path.suffix.lower() in TOKEN_FILES:
        if not path.is_file():
            raise UserError(f"{source} does not exist: check the path, or make it with scripts/tokenize_corpus.py")
        return _stream_files(path)
    if is_dataset_name(source):
        tokens = _hub_tokens(source, cache, limit)
        if tokens:
            return tokens, None, None
    return _stream_files(_tokenized(source, tokenizer_name, validation_fraction, cache, column, bar, limit))


def _main_stream(folder: Path, inside: list[Path]) -> Path:
    """The training stream of a folder with token files."""
    named = [file for file in inside if file.stem == "train"]
    training = named or [file for file in inside if not _is_validation(file)]
    if len(training) != 1:
        names = ", ".join(file.name for file in training or inside)
        raise UserError(f"the folder {folder} has no one training stream ({names}): name the file itself")
    return training[0]


def _is_validation(file: Path) -> bool:
    return f".{file.stem}".endswith(VALIDATION_ENDINGS)


def _stream_files(path: Path) -> tuple[TokenStream, TokenStream | None, dict | None]:
    """A token file with its validation stream and manifest, if there are any beside it."""
    manifest = _read_manifest(manifest_path(path)) if path.suffix.lower() == ".bin" else None
    stems = [path.stem + ending for ending in VALIDATION_ENDINGS]
    if path.stem == "train":
        stems += [ending[1:] for ending in VALIDATION_ENDINGS]
    beside = None
    if not _is_validation(path):
        candidates = (path.with_name(stem + path.suffix) for stem in stems)
        beside = next((file for file in candidates if file.is_file()), None)
    kind = path.suffix.lower()[1:]
    dtype = manifest["dtype"] if manifest else "uint16"
    validation = TokenStream(kind, (str(beside),), dtype) if beside else None
    return TokenStream(kind, (str(path),), dtype), validation, manifest


def _read_manifest(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["dtype"] not in TOKEN_TYPES:
            raise TypeError(f"{manifest['dtype']} is no integer type")
        for entry in manifest["splits"].values():
            # Files are never opened by these names, only known by them.
            if not isinstance(entry["file"], str) or not all(type(entry[k]) is int for k in ("tokens", "largest_id")):
                raise TypeError("a split needs a file, its tokens and its largest id")
        return {key: manifest[key] for key in ("dtype", "tokenizer", "tokenizer_hash", "splits")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest of a token corpus: delete it, or tokenize again") from error


def _check_tokenizer(manifest: dict, tokenizer_name: str, name: str) -> None:
    expected = gpt2_hash() if tokenizer_name == "gpt2" else tokenizer_hash(load_tokenizer(tokenizer_name))
    if manifest["tokenizer_hash"] != expected:
        raise UserError(
            f"{name} was made with another tokenizer ({manifest['tokenizer']!r}) than {tokenizer_name!r}: "
            "tokenize the text again, or pass the tokenizer it was made with as --tokenizer_name"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Arrow folders and Hub datasets that hold tokens
# ---------------------------------------------------------------------------------------------------------------------


def _arrow_streams(folder: Path, block_size: int, cache: Path):
    """The streams of an Arrow folder; None when it holds no input_ids (text, then)."""
    splits = load_arrow_folder(folder)
    if "input_ids" not in splits["train"].column_names:
        return None
    manifest = _read_manifest(folder / "manifest.json")
    validation = next((splits[name] for name in ("validation", "valid", "val", "test") if name in splits), None)
    train = _arrow_stream(splits["train"], block_size, cache)
    return train, _arrow_stream(validation, block_size, cache) if validation is not None else None, manifest


def _arrow_stream(dataset: datasets.Dataset, block_size: int, cache: Path) -> TokenStream:
    """The dataset's own files where blocks can be cut from them, otherwise one flat copy in the cache."""
    files = tuple(entry["filename"] for entry in dataset.cache_files)
    if not len(dataset):
        raise UserError(f"the split {dataset.split} of an Arrow dataset is empty: add rows, or remove it")
    stream = TokenStream("arrow", files)
    whole = files and dataset._indices is None and sum(len(arrow_column(file)) for file in files) == len(dataset)
    if whole and stream.fits(block_size):
        return stream
    key = hashlib.sha256(f"{dataset._fingerprint} {''.join(map(sampled_hash, files))}".encode("ascii")).hexdigest()
    columns = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=256)
    batches = (flat_ids(chunk).to_numpy(zero_copy_only=True) for table in columns for chunk in table.column(0).chunks)
    two_bytes = dataset.features["input_ids"].feature == datasets.Value("uint16")
    return _flat_copy(batches, cache / f"rows-{key[:16]}.bin", "uint16" if two_bytes else "int32")


def _flat_copy(batches: Iterable[np.ndarray], path: Path, dtype: str = "int32") -> TokenStream:
    """Token ids of any integer type, written once as one flat stream of `dtype`."""
    if not path.is_file():
        with replace_file(path) as file:
            for ids in batches:
                check_ids(ids, 0, np.iinfo(dtype).max + 1, "the data set")  # or the conversion would wrap around
                file.write(np.ascontiguousarray(ids, dtype=np.dtype(dtype).newbyteorder("<")))
    return TokenStream("bin", (str(path),), dtype)


def _hub_tokens(name: str, cache: Path, limit: int | None) -> TokenStream | None:
    """The tokens, or the first `limit` of them, of a Hub dataset that has a column input_ids; None when it has text."""
    facts = [name, *_folder_facts(name), *([limit] if limit else [])]
    path = cache / f"hub-{hashlib.sha256(' '.join(map(str, facts)).encode()).hexdigest()[:16]}.bin"
    if path.is_file():
        return _flat_copy((), path)
    rows = load_hub(name)
    if "input_ids" not in (rows.column_names or next(iter(rows), {})):
        return None
    return _flat_copy(_first_ids(rows, limit), path)


def _first_ids(rows: Iterable[dict], limit: int | None) -> Iterator[np.ndarray]:
    for row in rows:
        ids = np.asarray(row["input_ids"])[:limit]
        yield ids
        if limit is not None:
            limit -= len(ids)
            if not limit:
                return


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _tokenized(
    name: str, tokenizer_name: str, fraction: float, cache: Path, column: str, bar: bool, limit: int | None
) -> Path:
    """The token stream of a text source, made now or by an earlier run."""
    sources, _ = find_sources([name])
    facts = [tokenizer_name, fraction, column, *_input_facts(sources), *([limit] if limit else [])]
    key = hashlib.sha256(json.dumps(facts).encode("utf-8")).hexdigest()[:16]
    path = cache / f"corpus-{key}.bin"
    if path.is_file() and manifest_path(path).is_file():
        return path
    arguments = {"tokenizer_name": tokenizer_name, "text_column": column, "progress": bar, "overwrite": True}
    try:
        tokenize_corpus([name], str(path), validation_fraction=fraction, train_tokens=limit, **arguments)
    except PermissionError:
        # Windows does not replace a file that another process of this run has mapped meanwhile: then it is there.
        if not (path.is_file() and manifest_path(path).is_file()):
            raise
    return path


def _folder_facts(name: str) -> list[str]:
    """What tells the states of a dataset apart that is a folder here: nothing of one on the Hub."""
    folder = Path(os.path.expanduser(name))
    if is_arrow_folder(folder):
        return [sampled_hash(file) for file in sorted(folder.rglob("state.json"))]
    folder = Path(split_name(os.path.expanduser(name))[0])
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
    return [f"{file.relative_to(folder).as_posix()} {sampled_hash(file)}" for file in files]


def _input_facts(sources: list[Source]) -> Iterator[list]:
    """What has to stay the same for a cached corpus to be used again: content, or samples and date of large files."""
    for source in sources:
        if source.path is None:
            yield [source.name, *_folder_facts(source.name)]
        elif source.size <= HASHED_WHOLE:
            yield [source.path.name, sampled_hash(source.path)]
        else:
            yield [source.path.name, sampled_hash(source.path), source.path.stat().st_mtime_ns]
