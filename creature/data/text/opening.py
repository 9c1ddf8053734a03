"""A text source as token streams: token files and Arrow folders as they are, everything else tokenized once."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from pyarrow.compute import list_flatten, list_value_length

from creature.data.text.bin_layout import bin_layout
from creature.data.text.corpus import manifest_path, tokenize_corpus
from creature.data.text.readers import load_arrow_folder, open_rows, read_rows
from creature.data.text.sources import VALIDATION_ENDINGS, Source, find_sources, is_hub_name, is_validation
from creature.data.text.token_stream import (
    HASHED_WHOLE,
    TokenStream,
    arrow_column,
    check_ids,
    flat_ids,
    sampled_hash,
)
from creature.data.text.tokenizer import gpt2_hash, load_tokenizer, tokenizer_hash
from creature.errors import UserError
from creature.files import replace_file
from creature.settings import DataArguments

logger = logging.getLogger(__name__)

MASKS = ("attention_mask", "labels")  # columns beside input_ids that tell padding from text
NO_LABEL = -100
TOKEN_TYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")  # that a manifest may name


@dataclass(frozen=True)
class Corpus:
    """The token streams of one source."""

    source: str  # for a model card: the Hub name, or the file's or folder's own name without its path
    train: TokenStream
    validation: TokenStream | None = None  # None: the source has none of its own
    manifest: dict | None = None  # what tokenize_corpus wrote beside the stream: dtype, tokenizer, splits


def open_corpus(data: DataArguments, *, block_size: int = 1, progress: bool = True) -> Corpus:
    """
    The streams of `data.data`, one name. Text is tokenized into `data.cache_dir`, unless an earlier run did that.

    Rows of an Arrow folder are copied there, too, where blocks of `block_size` cannot be cut from them. Raises
    UserError for a source that is missing, empty, damaged or of another tokenizer than `data.tokenizer_name`. The ids
    are not checked here, but by `TokenStream.check`.
    """
    sources, _ = find_sources([data.data], tokens=True)
    source = sources[0]
    corpus = None
    if source.kind == "tokens":
        corpus = _token_files(source.path)
        if not corpus.manifest and data.tokenizer_name == "gpt2" and source.path.with_name("meta.pkl").is_file():
            raise UserError(
                f"{source.path} has a vocabulary of its own, as a rule of characters, by nanoGPT's meta.pkl beside it: "
                "tokenize the text that it was made from, or name the folder of its tokenizer with --tokenizer_name"
            )
    elif source.kind == "arrow":
        corpus = _arrow_folder(source, block_size, Path(data.cache_dir))
    elif source.kind == "hub":
        corpus = _hub_tokens(source, Path(data.cache_dir), data.train_tokens)
    if corpus is None:
        corpus = _token_files(_tokenized(sources, data, progress))
    _check_tokenizer(corpus, data.tokenizer_name)
    name = data.data if is_hub_name(data.data) else Path(data.data).name
    return Corpus(name, corpus.train, corpus.validation, corpus.manifest)


def _token_files(path: Path) -> Corpus:
    """A token file with its validation stream and manifest, if there are any beside it."""
    manifest = _read_manifest(manifest_path(path)) if path.suffix.lower() == ".bin" else None
    stems = [path.stem + ending for ending in VALIDATION_ENDINGS]
    if path.stem == "train":
        stems += [ending[1:] for ending in VALIDATION_ENDINGS]
    beside = None
    if not is_validation(path):
        candidates = (path.with_name(stem + path.suffix) for stem in stems)
        beside = next((file for file in candidates if file.is_file()), None)
    train, validation = (_token_stream(file, manifest) if file else None for file in (path, beside))
    return Corpus(path.name, train, validation, manifest)


def _token_stream(path: Path, manifest: dict | None) -> TokenStream:
    kind = path.suffix.lower()[1:]
    if kind != "bin":
        return TokenStream(kind, (str(path),))
    dtype, offset = (manifest["dtype"], 0) if manifest else bin_layout(path)
    return TokenStream(kind, (str(path),), dtype, offset)


def _read_manifest(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["dtype"] not in TOKEN_TYPES:
            raise TypeError(f"{manifest['dtype']} is no integer type")
        for entry in manifest["splits"].values():
            # These names are only compared with those of opened files; no file is opened by them.
            if not isinstance(entry["file"], str) or not all(type(entry[k]) is int for k in ("tokens", "largest_id")):
                raise TypeError("a split needs a file, its tokens and its largest id")
        return {key: manifest[key] for key in ("dtype", "tokenizer", "tokenizer_hash", "splits")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a manifest of a token corpus: delete it, or tokenize again") from error


def _check_tokenizer(corpus: Corpus, tokenizer_name: str) -> None:
    if corpus.manifest is None:
        return
    expected = gpt2_hash() if tokenizer_name == "gpt2" else tokenizer_hash(load_tokenizer(tokenizer_name))
    if corpus.manifest["tokenizer_hash"] != expected:
        raise UserError(
            f"{corpus.train.name} was made with another tokenizer ({corpus.manifest['tokenizer']!r}) than "
            f"{tokenizer_name!r}: tokenize the text again, or pass the tokenizer it was made with as --tokenizer_name"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Arrow folders and Hub datasets that hold tokens
# ---------------------------------------------------------------------------------------------------------------------


def _arrow_folder(source: Source, block_size: int, cache: Path) -> Corpus | None:
    """The streams of an Arrow folder; None if it holds text."""
    splits = load_arrow_folder(source.path)
    if "input_ids" not in splits["train"].column_names:
        return None
    held_out = next((splits[name] for name in ("validation", "valid", "val", "test") if name in splits), None)
    train = _arrow_stream(splits["train"], block_size, cache)
    validation = None if held_out is None else _arrow_stream(held_out, block_size, cache)
    return Corpus(source.path.name, train, validation, _read_manifest(source.path / "manifest.json"))


def _arrow_stream(dataset: datasets.Dataset, block_size: int, cache: Path) -> TokenStream:
    """The dataset's own files where blocks can be cut from them, otherwise one flat copy in the cache."""
    files = tuple(entry["filename"] for entry in dataset.cache_files)
    if not len(dataset):
        raise UserError(f"the split {dataset.split} of an Arrow dataset is empty: add rows, or remove it")
    stream = TokenStream("arrow", files)
    whole = files and dataset._indices is None and sum(len(arrow_column(file)) for file in files) == len(dataset)
    columns = ((name, getattr(dataset.features.get(name), "feature", None)) for name in MASKS)
    masks = [name for name, values in columns if isinstance(values, datasets.Value)]
    masked = bool(masks) and any(left_out for _, left_out in _arrow_text(dataset, masks))
    if whole and stream.fits(block_size) and not masked:
        return stream
    facts = f"{dataset._fingerprint} {''.join(map(sampled_hash, files))}{' unmasked' if masked else ''}"
    key = hashlib.sha256(facts.encode("ascii")).hexdigest()
    two_bytes = dataset.features["input_ids"].feature == datasets.Value("uint16")
    batches = _reported(_arrow_text(dataset, masks), stream.name if files else "a data set")
    return _flat_copy(batches, cache / f"rows-{key[:16]}.bin", "uint16" if two_bytes else "int32")


def _hub_tokens(source: Source, cache: Path, limit: int | None) -> Corpus | None:
    """The tokens, or the first `limit` of them, of a Hub dataset that has a column input_ids; None if it has text."""
    facts = [source.name, *_folder_facts(source), *([limit] if limit else [])]
    path = cache / f"hub-{hashlib.sha256(' '.join(map(str, facts)).encode()).hexdigest()[:16]}.bin"
    if not path.is_file():
        rows = open_rows(source)
        if "input_ids" not in (rows.column_names or next(read_rows(source, rows), {})):
            return None
        text = _row_text(read_rows(source, rows), limit)
        return Corpus(source.name, _flat_copy(_reported(text, source.name), path))
    return Corpus(source.name, _flat_copy((), path))


def _arrow_text(dataset: datasets.Dataset, masks: list[str]) -> Iterator[tuple[np.ndarray, int]]:
    """(the ids that are text by the columns `masks`, how many others are left out), of some rows at a time."""
    for table in dataset.select_columns(["input_ids", *masks]).with_format("arrow").iter(batch_size=256):
        ids = np.concatenate([flat_ids(chunk).to_numpy() for chunk in table.column("input_ids").chunks])
        lengths = [list_value_length(table.column(name)).to_numpy() for name in ("input_ids", *masks)]
        values = [list_flatten(table.column(name)).to_numpy() for name in masks]
        text = _text_ids(ids, lengths[0], dict(zip(masks, zip(values, lengths[1:], strict=True), strict=True)))
        yield text, len(ids) - len(text)


def _row_text(rows: Iterable[dict], limit: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """`_arrow_text` of rows as dicts, up to `limit` ids."""
    for row in rows:
        ids = np.asarray(row["input_ids"])
        given = {name: np.asarray(row[name]) for name in MASKS if isinstance(row.get(name), list | np.ndarray)}
        given = {name: (values, [len(values)]) for name, values in given.items() if values.ndim == 1}
        text = _text_ids(ids, [len(ids)], given)
        yield text[:limit], len(ids) - len(text)
        if limit is not None:
            limit -= len(text)
            if limit <= 0:
                return


def _text_ids(ids: np.ndarray, lengths: list[int] | np.ndarray, masks: dict) -> np.ndarray:
    """
    The ids of rows that are text: padding, masked out by attention_mask or labelled -100, is none.

    `lengths` are those of the rows in `ids`, `masks` (values, lengths of their rows) of MASKS. Labels of another kind
    than a copy of a row's ids (tags, targets of their own) say nothing about it.
    """
    keep = np.ones(len(ids), dtype=bool)
    if "attention_mask" in masks:
        values, own = masks["attention_mask"]
        if not np.array_equal(own, lengths):
            raise UserError("the attention_mask of a row has another length than its input_ids: repair or remove it")
        keep &= values != 0
    if "labels" in masks and np.array_equal(masks["labels"][1], lengths):
        values = masks["labels"][0]
        row = np.repeat(np.arange(len(lengths)), lengths)
        other = np.zeros(len(lengths), dtype=bool)
        other[row[(values != ids) & (values != NO_LABEL)]] = True
        keep &= (values != NO_LABEL) | other[row]
    return ids if keep.all() else ids[keep]


def _reported(batches: Iterable[tuple[np.ndarray, int]], name: str) -> Iterator[np.ndarray]:
    """The ids alone; the log says how many were left out."""
    kept = left_out = 0
    for ids, others in batches:
        kept, left_out = kept + len(ids), left_out + others
        yield ids
    if left_out:
        share = f"{left_out:,} of {kept + left_out:,}"
        logger.warning("%s: %s ids are masked out or labelled -100; they are no text, and left out", name, share)


def _flat_copy(batches: Iterable[np.ndarray], path: Path, dtype: str = "int32") -> TokenStream:
    """Token ids of any integer type, written once as one flat stream of `dtype`."""
    if not path.is_file():
        with replace_file(path) as file:
            for ids in batches:
                check_ids(ids, 0, np.iinfo(dtype).max + 1, "the data set")  # larger ids would wrap around
                file.write(np.ascontiguousarray(ids, dtype=np.dtype(dtype).newbyteorder("<")))
    return TokenStream("bin", (str(path),), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _tokenized(sources: list[Source], data: DataArguments, progress: bool) -> Path:
    """The token stream of text, written now or by an earlier run on the same input."""
    limit = [data.train_tokens] if data.train_tokens else []
    facts = [data.tokenizer_name, data.validation_fraction, data.text_column, *_input_facts(sources), *limit]
    key = hashlib.sha256(json.dumps(facts).encode("utf-8")).hexdigest()[:16]
    path = Path(data.cache_dir) / f"corpus-{key}.bin"
    if path.is_file() and manifest_path(path).is_file():
        return path
    try:
        tokenize_corpus(
            sources,
            str(path),
            validation_fraction=data.validation_fraction,
            tokenizer_name=data.tokenizer_name,
            text_column=data.text_column,
            train_tokens=data.train_tokens,
            overwrite=True,
            progress=progress,
        )
    except PermissionError:
        # Windows does not replace a file that another process of this run has mapped meanwhile: then it is there.
        if not (path.is_file() and manifest_path(path).is_file()):
            raise
    return path


def _input_facts(sources: list[Source]) -> Iterator[list]:
    """What has to stay the same for a cached corpus to be used again: content, or samples and date of large files."""
    for source in sources:
        if source.kind in ("hub", "arrow"):
            yield [source.name, *_folder_facts(source)]
        elif source.size <= HASHED_WHOLE:
            yield [source.path.name, sampled_hash(source.path)]
        else:
            yield [source.path.name, sampled_hash(source.path), source.path.stat().st_mtime_ns]


def _folder_facts(source: Source) -> list[str]:
    """What changes when a dataset in a folder here does; nothing for one on the Hub."""
    if source.path is None:
        return []
    if source.kind == "arrow":
        return [sampled_hash(file) for file in sorted(source.path.rglob("state.json"))]
    files = sorted(file for file in source.path.rglob("*") if file.is_file())
    return [f"{file.relative_to(source.path).as_posix()} {sampled_hash(file)}" for file in files]
