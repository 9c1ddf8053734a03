"""Any token file as a `datasets.Dataset` of fixed blocks, without copying a byte.

The flat token buffer stays on disk: it is memory-mapped and cut into rows by `pyarrow.FixedSizeListArray`. Any block
size opens in milliseconds, an epoch reads 2 bytes a token, and DataLoader workers share the pages: pickling such a
dataset sends a path, not the data.
"""

import copy
import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import TableBlock, table_cast, table_flatten

from creature.corpus import manifest_path, tokenize_corpus
from creature.errors import UserError
from creature.files import replace_file
from creature.readers import load_hub
from creature.sources import TOKEN_FILES, Source, find_sources, is_arrow_folder, is_hub_name
from creature.tokenizer import gpt2_hash, load_tokenizer, tokenizer_hash

logger = logging.getLogger(__name__)

VALIDATION_ENDINGS = (".valid", "_valid", ".validation", "_validation", ".val", "_val")
SCANNED_WHOLE = 64 << 20  # bytes up to which every id is checked at each opening, whatever a manifest says
SAMPLE, SAMPLES = 1 << 16, 64  # bytes and places that stand for a large file's content


@dataclass
class Splits:
    """What `load_splits` returns: blocks to train on, blocks to evaluate on (None: there are too few), and facts."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    info: dict


def load_splits(
    source: str,
    *,
    block_size: int,
    vocab_size: int,
    tokenizer_name: str = "gpt2",
    validation_fraction: float = 0.005,
    cache_dir: str = "data",
    text_column: str = "text",
    progress: bool = True,
) -> Splits:
    """Open `source` as datasets with the one column `input_ids`, each row a block of `block_size` consecutive tokens.

    `source` is a .bin stream (uint16, or what its manifest says), a 1-D integer .npy or .pt, a folder with train.bin
    and val.bin (or valid.bin, validation.bin), an Arrow folder (`save_to_disk`, or made by tokenize_corpus), or text:
    files, a folder, a glob or a Hub dataset, tokenised once into `cache_dir` and reused as long as the input stays
    the same (a Hub dataset: as long as the cached file is there).

    Validation is the corpus's own validation stream (corpus.valid.bin, val.bin, ...). Where there is none of at least
    one block, the last `validation_fraction` of the training blocks are held out, at least one; with 0, validation is
    None. Only the last, short block of each split is left out. `info` has path, tokens, validation_tokens (before
    cutting into blocks), dtype, data_hash and tokenizer_hash (None when no manifest tells).

    Raises UserError, naming the file and the remedy, for a source that is missing, empty, damaged, of another
    tokenizer, shorter than one block, or has ids that are negative or >= `vocab_size`.
    """
    if block_size < 2:
        raise UserError(f"block_size {block_size} is too small: a block needs at least 2 tokens, 2048 is usual")
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction {validation_fraction} is not in [0, 1): a usual value is 0.005")
    train, validation, manifest = _find_streams(
        source, block_size, tokenizer_name, validation_fraction, Path(cache_dir), text_column, progress
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
        held_out = _dataset(validation, block_size, 0, count, "validation") if count else None
    if held_out is None and validation_fraction > 0 and blocks > 1:
        count = max(1, round(validation_fraction * blocks))
        held_out = _dataset(train, block_size, blocks - count, count, "validation")
        blocks -= count
        validation_tokens = count * block_size
        tokens -= validation_tokens
    info = {
        "path": train.name,
        "tokens": tokens,
        "validation_tokens": validation_tokens,
        "dtype": str(train.arrays()[0].type),
        "data_hash": train.content_hash(),
        "tokenizer_hash": manifest["tokenizer_hash"] if manifest else None,
    }
    return Splits(_dataset(train, block_size, 0, blocks, "train"), held_out, info)


def collate_blocks(rows: list[dict]) -> dict:
    """A batch of blocks: input_ids int64 [B, T], and the same tensor as labels (the model shifts)."""
    import torch

    ids = np.stack([np.asarray(row["input_ids"]) for row in rows]).astype(np.int64, copy=False)
    input_ids = torch.from_numpy(ids)
    return {"input_ids": input_ids, "labels": input_ids}


# ---------------------------------------------------------------------------------------------------------------------
# A stream of tokens on disk
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenStream:
    """Where tokens lie: one .bin, .npy or .pt, or the .arrow files of one split. Small, so that it pickles in no
    time."""

    kind: str  # bin, npy, pt or arrow
    files: tuple[str, ...]
    dtype: str = "uint16"  # of a .bin; the others know their own

    @property
    def name(self) -> str:
        return self.files[0] if self.kind != "arrow" else str(Path(self.files[0]).parent)

    def arrays(self) -> list[pa.Array]:
        """The tokens as flat Arrow arrays over the mapped files. Nothing is read but headers."""
        if self.kind == "arrow":
            return [_flat(chunk) for file in self.files for chunk in _arrow_column(file).chunks]
        opened = {"bin": self._open_bin, "npy": self._open_npy, "pt": self._open_pt}[self.kind]()
        if opened.dtype.kind not in "iu":
            raise UserError(f"{self.name} holds {opened.dtype.name} values, not token ids: store integers (uint16)")
        if opened.size == 0:
            raise UserError(f"{self.name} is empty: tokenise some text into it first")
        flat = opened.reshape(-1)
        return [pa.Array.from_buffers(pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)])]

    def _open_bin(self) -> np.ndarray:
        size, width = os.path.getsize(self.name), np.dtype(self.dtype).itemsize
        if size == 0:
            raise UserError(f"{self.name} is empty: tokenise some text into it first")
        if size % width:
            raise UserError(
                f"{self.name} has {size:,} bytes, which is no whole number of {self.dtype} tokens: "
                "the file is cut off or not a token stream; copy it again or make it anew with tokenize_corpus.py"
            )
        return np.memmap(self.name, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")

    def _open_npy(self) -> np.ndarray:
        try:
            array = np.load(self.name, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{self.name} is not a plain .npy array ({error}): save it anew with numpy.save") from error
        if not array.dtype.isnative or not array.flags.c_contiguous:
            raise UserError(f"{self.name} is stored in a foreign order: save numpy.ascontiguousarray of it as uint16")
        return array

    def _open_pt(self) -> np.ndarray:
        import torch

        try:
            try:
                tensor = torch.load(self.name, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                tensor = torch.load(self.name, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.name} is a pickle of something else than a tensor, or damaged; it was not executed: "
                "save the token ids with torch.save(tensor, path)"
            ) from error
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{self.name} holds a {type(tensor).__name__}, not a tensor: save the token ids with torch.save(tensor)"
            )
        if tensor.is_floating_point() or tensor.is_complex():
            raise UserError(f"{self.name} holds {tensor.dtype} values, not token ids: store integers (uint16)")
        return tensor.detach().contiguous().numpy()

    def check(self, vocab_size: int, manifest: dict | None) -> int:
        """The number of tokens, after making sure that every id is in the vocabulary.

        Every id is looked at (at the speed of the disk: 1 to 3 s per 10^9 tokens), unless the file is large and its
        manifest knows its size and largest id: then samples have to do.
        """
        arrays = self.arrays()
        tokens = sum(map(len, arrays))
        entry = self._manifest_entry(manifest)
        if entry and entry["tokens"] != tokens:
            raise UserError(
                f"{self.name} has {tokens:,} tokens where its manifest says {entry['tokens']:,}: "
                "the file was changed or cut off; copy or tokenise it again, or delete the manifest"
            )
        size = sum(array.nbytes for array in arrays)
        known = entry is not None and entry["largest_id"] < vocab_size
        if not (known and size > SCANNED_WHOLE) and size > 4 << 30:
            logger.warning("checking every token id of %s, %.1f GB; a manifest would spare this", self.name, size / 1e9)
        position = 0
        for array in arrays:
            ids = _numpy(array)
            starts = range(0, len(ids), 1 << 22)
            if known and size > SCANNED_WHOLE:
                starts = range(0, len(ids), max(1 << 22, len(ids) // SAMPLES))
            for start in starts:
                length = SAMPLE if known and size > SCANNED_WHOLE else 1 << 22
                _check_ids(ids[start : start + length], position + start, vocab_size, self.name)
            position += len(ids)
        return tokens

    def _manifest_entry(self, manifest: dict | None) -> dict | None:
        name = Path(self.name).name
        entries = (manifest or {}).get("splits", {}).values()
        return next((entry for entry in entries if entry["file"] == name), None)

    def count_blocks(self, block_size: int) -> int:
        return sum(len(array) // block_size for array in self.arrays())

    def fits(self, block_size: int) -> bool:
        """Whether rows of `block_size` can be cut without one that spans two buffers."""
        return all(len(array) % block_size == 0 for array in self.arrays()[:-1])

    def content_hash(self) -> str:
        """A hash of the size, the beginning, the end and 64 places between, of every file."""
        return hashlib.sha256("".join(map(sampled_hash, self.files)).encode("ascii")).hexdigest()

    def table(self, block_size: int, start: int, count: int) -> pa.Table:
        """Blocks `start` to `start + count` as rows; a view of the file."""
        blocks = [
            pa.FixedSizeListArray.from_arrays(array.slice(0, len(array) // block_size * block_size), block_size)
            for array in self.arrays()
        ]
        return pa.table({"input_ids": pa.chunked_array(blocks)}).slice(start, count)


def _check_ids(ids: np.ndarray, position: int, vocab_size: int, name: str) -> None:
    if not len(ids):
        return
    low = int(ids.min()) if ids.dtype.kind == "i" else 0
    if low < 0 or int(ids.max()) >= vocab_size:
        where = int(np.argmax((ids >= vocab_size) | (ids < 0)))
        raise UserError(
            f"{name} has id {ids[where]} at position {position + where:,}, outside a vocabulary of {vocab_size:,}: "
            "it was made with another tokenizer or dtype; tokenise the text again, or set vocab_size to fit"
        )


def sampled_hash(path: str | os.PathLike) -> str:
    """A sha256 over a file's size and samples of it: milliseconds for any size, and the whole content up to 4 MiB."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        if size <= SAMPLE * SAMPLES:
            digest.update(file.read())
        else:
            for i in range(SAMPLES):
                file.seek((size - SAMPLE) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _numpy(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=True)


def _arrow_column(file: str) -> pa.ChunkedArray:
    try:
        table = pa.ipc.open_stream(pa.memory_map(file)).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is not a whole Arrow file ({error}): copy it again, or tokenise anew") from error
    return table.column("input_ids")


def _flat(rows: pa.Array) -> pa.Array:
    """The values of a list array as one flat array, without a copy."""
    flat = rows.flatten()
    if flat.null_count or rows.null_count or not pa.types.is_integer(flat.type):
        raise UserError(f"the column input_ids holds {rows.type} with nulls or no integers: store lists of token ids")
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# The dataset
# ---------------------------------------------------------------------------------------------------------------------


class MappedBlocks(TableBlock):
    """A table whose pickle is the place of its data: `datasets.MemoryMappedTable` for files that are not Arrow's own.

    As there, every transform is remembered and done again after unpickling.
    """

    def __init__(self, stream: TokenStream, cut: tuple[int, int, int], table: pa.Table | None = None, replays=()):
        super().__init__(stream.table(*cut) if table is None else table)
        self.stream, self.cut, self.replays = stream, cut, tuple(replays)

    def __getstate__(self) -> dict:
        return {"stream": self.stream, "cut": self.cut, "replays": self.replays}

    def __setstate__(self, state: dict) -> None:
        table = state["stream"].table(*state["cut"])
        for name, arguments, named in state["replays"]:
            table = _transform(table, name, arguments, named)
        MappedBlocks.__init__(self, state["stream"], state["cut"], table, state["replays"])

    def _replayed(self, name: str, arguments: tuple, named: dict) -> "MappedBlocks":
        replay = (name, copy.deepcopy(arguments), copy.deepcopy(named))
        table = _transform(self.table, name, arguments, named)
        return MappedBlocks(self.stream, self.cut, table, (*self.replays, replay))


def _transform(table: pa.Table, name: str, arguments: tuple, named: dict) -> pa.Table:
    if name == "cast":
        return table_cast(table, *arguments, **named)
    if name == "flatten":
        return table_flatten(table, *arguments, **named)
    return getattr(table, name)(*arguments, **named)


def _remembered(name: str) -> Callable:
    def transform(self, *arguments, **named):
        return self._replayed(name, arguments, named)

    return transform


for _name in (
    *("slice", "filter", "flatten", "combine_chunks", "cast", "replace_schema_metadata", "add_column"),
    *("append_column", "remove_column", "set_column", "rename_columns", "drop", "select"),
):
    setattr(MappedBlocks, _name, _remembered(_name))


def _dataset(stream: TokenStream, block_size: int, start: int, count: int, split: str) -> datasets.Dataset:
    cut = (block_size, start, count)
    # Given here, the fingerprint costs nothing; left out, `datasets` would hash the data for it.
    fingerprint = hashlib.sha256(f"{stream.content_hash()} {cut}".encode("ascii")).hexdigest()[:16]
    table = MappedBlocks(stream, cut)
    dataset = datasets.Dataset(table, split=datasets.NamedSplit(split), fingerprint=fingerprint)
    return dataset.with_format("numpy")


# ---------------------------------------------------------------------------------------------------------------------
# Finding the streams that a name stands for
# ---------------------------------------------------------------------------------------------------------------------


def _find_streams(
    source: str, block_size: int, tokenizer_name: str, validation_fraction: float, cache: Path, column: str, bar: bool
) -> tuple[TokenStream, TokenStream | None, dict | None]:
    path = Path(source).expanduser()
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
    if is_hub_name(source):
        tokens = _hub_tokens(source, cache)
        if tokens:
            return tokens, None, None
    return _stream_files(_tokenized(source, tokenizer_name, validation_fraction, cache, column, bar))


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
        np.dtype(manifest["dtype"])
        return {key: manifest[key] for key in ("dtype", "tokenizer", "tokenizer_hash", "splits")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a manifest of a token corpus: delete it, or tokenise again") from error


def _check_tokenizer(manifest: dict, tokenizer_name: str, name: str) -> None:
    expected = gpt2_hash() if tokenizer_name == "gpt2" else tokenizer_hash(load_tokenizer(tokenizer_name))
    if manifest["tokenizer_hash"] != expected:
        raise UserError(
            f"{name} was made with another tokenizer ({manifest['tokenizer']!r}) than {tokenizer_name!r}: "
            "tokenise the text again, or pass the tokenizer it was made with as --tokenizer_name"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Arrow folders and Hub datasets that hold tokens
# ---------------------------------------------------------------------------------------------------------------------


def _arrow_streams(folder: Path, block_size: int, cache: Path):
    """The streams of an Arrow folder; None when it holds no input_ids (text, then)."""
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # any of many types: the folder is damaged
        raise UserError(f"{folder} is not a whole Arrow dataset ({error}): copy or make it again") from error
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if "train" not in splits:
        raise UserError(f"{folder} has no split called train (there is: {', '.join(splits)}): rename one")
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
    whole = files and dataset._indices is None and sum(len(_arrow_column(file)) for file in files) == len(dataset)
    if whole and stream.fits(block_size):
        return stream
    key = hashlib.sha256(f"{dataset._fingerprint} {''.join(map(sampled_hash, files))}".encode("ascii")).hexdigest()
    columns = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=256)
    batches = (_numpy(_flat(chunk)) for table in columns for chunk in table.column(0).chunks)
    two_bytes = dataset.features["input_ids"].feature == datasets.Value("uint16")
    return _flat_copy(batches, cache / f"rows-{key[:16]}.bin", "uint16" if two_bytes else "int32")


def _flat_copy(batches: Iterable[np.ndarray], path: Path, dtype: str = "int32") -> TokenStream:
    """Token ids of any integer type, written once as one flat stream of `dtype`."""
    if not path.is_file():
        with replace_file(path) as file:
            for ids in batches:
                _check_ids(ids, 0, np.iinfo(dtype).max + 1, "the data set")  # or the conversion would wrap around
                file.write(np.ascontiguousarray(ids, dtype=np.dtype(dtype).newbyteorder("<")))
    return TokenStream("bin", (str(path),), dtype)


def _hub_tokens(name: str, cache: Path) -> TokenStream | None:
    """The tokens of a Hub dataset that has a column input_ids; None when it has text."""
    path = cache / f"hub-{hashlib.sha256(name.encode()).hexdigest()[:16]}.bin"
    if path.is_file():
        return _flat_copy((), path)
    rows = load_hub(name)
    if "input_ids" not in (rows.column_names or next(iter(rows), {})):
        return None
    return _flat_copy((np.asarray(row["input_ids"]) for row in rows), path)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _tokenized(name: str, tokenizer_name: str, fraction: float, cache: Path, column: str, bar: bool) -> Path:
    """The token stream of a text source, made now or by an earlier run."""
    sources, _ = find_sources([name])
    facts = [tokenizer_name, fraction, column, *_input_facts(sources)]
    key = hashlib.sha256(json.dumps(facts).encode("utf-8")).hexdigest()[:16]
    path = cache / f"corpus-{key}.bin"
    if path.is_file() and manifest_path(path).is_file():
        return path
    arguments = {"tokenizer_name": tokenizer_name, "text_column": column, "progress": bar, "overwrite": True}
    try:
        tokenize_corpus([name], str(path), validation_fraction=fraction, **arguments)
    except PermissionError:
        # Windows does not replace a file that another process of this run has mapped meanwhile: then it is there.
        if not (path.is_file() and manifest_path(path).is_file()):
            raise
    return path


def _input_facts(sources: list[Source]) -> Iterator[list]:
    """What has to stay the same for a cached corpus to be used again: all content, or samples and date of large
    files."""
    for source in sources:
        if source.path is None:
            states = sorted(Path(source.name).rglob("state.json")) if os.path.isdir(source.name) else []
            yield [source.name, *map(sampled_hash, states)]
        elif source.size <= SAMPLE * SAMPLES:
            yield [source.path.name, sampled_hash(source.path)]
        else:
            yield [source.path.name, sampled_hash(source.path), source.path.stat().st_mtime_ns]
