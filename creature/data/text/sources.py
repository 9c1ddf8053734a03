"""What the user typed, resolved once: a name becomes an ordered list of files, Arrow folders and Hub datasets."""

import glob
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from creature.errors import UserError

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
TOKEN_FILES = (".bin", ".npy", ".pt")  # flat streams of token ids, which training maps as they are
NO_TEXT = (*TOKEN_FILES, ".arrow", ".safetensors")
OTHER_FILES = {  # what they are, and the remedy
    ".npz": "is an archive of arrays: save the one of token ids with numpy.save, as .npy",
    ".ds": "holds tokens of datatrove: collect them with scripts/collect_shards.py",
    ".idx": "is the index of a token file: name the .bin beside it",
}
VALIDATION_ENDINGS = (".valid", "_valid", ".validation", "_validation", ".val", "_val")


@dataclass(frozen=True)
class Source:
    """One file, one folder of `save_to_disk`, or one dataset for `datasets.load_dataset`."""

    name: str  # as shown to the user and written to the manifest
    kind: str  # text, jsonl, json, csv or parquet; tokens (.bin, .npy, .pt); arrow; hub
    path: Path | None = None  # None for a dataset on the Hub
    compression: str = ""  # of a text file: one of COMPRESSIONS
    configuration: str = ""  # of a Hub dataset
    split: str = "train"  # of a Hub dataset
    size: int = 0  # bytes of a text file on disk


def find_sources(inputs: list[str], tokens: bool = False) -> tuple[list[Source], int]:
    """
    (the sources that `inputs` name, how many files in folders and globs were left out).

    An input is a file, a folder, a glob, owner/name[:configuration[:split]] on the Hub, or a local folder laid out as
    such a dataset (its README.md has a dataset card, or a :configuration or :split follows it). With `tokens`, it may
    also be a token file, or a folder with one training stream.

    The order is fixed: inputs as given, the files of a folder or glob by name. A file reached twice counts once. In
    folders, hidden files, manifests and files of unknown kind are left out. Raises UserError for what does not exist.
    """
    sources, seen, left_out = [], set(), 0
    for name in inputs:
        found, skipped = _resolve(str(name), tokens)
        left_out += skipped
        for source in found:
            key = source.name if source.path is None else os.path.normcase(os.path.realpath(source.path))
            key = (key, source.configuration, source.split)
            if key not in seen:
                seen.add(key)
                sources.append(source)
    return sources, left_out


def is_hub_name(name: str) -> bool:
    """Whether `name` reads like owner/dataset[:configuration[:split]] and names nothing on this disk."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]*){0,2}", name) is not None
    kind, compression = _kind(Path(name.split(":")[0]))
    is_file_name = kind or compression or Path(name).suffix.lower() in NO_TEXT
    # Where the owner's name is a folder here, a path with a typing error is meant: no reason to ask the network.
    return looks and not is_file_name and not os.path.exists(name) and not os.path.isdir(name.split("/")[0])


def is_arrow_folder(path: Path) -> bool:
    """Whether `path` is a folder that `datasets.load_from_disk` opens."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _resolve(name: str, tokens: bool) -> tuple[list[Source], int]:
    """(what one input stands for, the number of files left out)."""
    path = Path(name)
    dataset, configuration, split = _split_name(str(path))
    if path.is_file():
        if tokens and path.suffix.lower() in TOKEN_FILES:
            _refuse_streaming(path.parent, path.name)
            return [_token_source(path)], 0
        if path.suffix.lower() in NO_TEXT:
            raise UserError(f"{name} holds tokens or weights, not text: train on it as it is, or name a text file")
        if path.suffix.lower() in OTHER_FILES:
            raise UserError(f"{name} {OTHER_FILES[path.suffix.lower()]}")
        return [_text_source(path)], 0
    if is_arrow_folder(path):
        return [Source(name, "arrow", path)], 0
    if path.is_dir():
        _refuse_streaming(path)
        streams = [file for file in path.iterdir() if file.suffix.lower() in TOKEN_FILES and file.is_file()]
        if tokens and streams:
            return [_token_source(_training_stream(path, sorted(streams)))], 0
        if _has_dataset_card(path):
            return [Source(name, "hub", path)], 0
        return _folder_files(path)
    if dataset != str(path) and os.path.isdir(dataset):
        return [Source(name, "hub", Path(dataset), "", configuration, split)], 0
    if any(character in name for character in "*?["):
        return _glob_files(name, path)
    if tokens and path.suffix.lower() in TOKEN_FILES:
        raise UserError(f"{name} does not exist: check the path, or make it with scripts/tokenize_corpus.py")
    if is_hub_name(name):
        return [Source(name, "hub", None, "", configuration, split)], 0
    raise UserError(f"{name} does not exist: check the path (a Hub dataset is named owner/name)")


def _split_name(name: str) -> tuple[str, str, str]:
    """(dataset, configuration, split) of dataset[:configuration[:split]]; no configuration and "train" by default."""
    drive, rest = os.path.splitdrive(name)
    dataset, configuration, split = (*rest.split(":", 2), "", "")[:3]
    return drive + dataset, configuration, split or "train"


def _has_dataset_card(folder: Path) -> bool:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    card = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    return bool(card and re.search(r"^(configs|dataset_info):", card[1], re.MULTILINE))


def is_validation(file: Path) -> bool:
    """Whether a token file is a validation stream by its name: corpus.valid.bin, val.bin and the like."""
    return f".{file.stem}".endswith(VALIDATION_ENDINGS)


def _training_stream(folder: Path, files: list[Path]) -> Path:
    training = [file for file in files if file.stem == "train"] or [file for file in files if not is_validation(file)]
    if len(training) != 1:
        names = ", ".join(file.name for file in training or files)
        raise UserError(f"the folder {folder} has no one training stream ({names}): name the files themselves")
    return training[0]


def _refuse_streaming(folder: Path, file: str = "*") -> None:
    """Raise UserError where `file` of a folder is of a data set of litdata or MosaicML's streaming."""
    if (folder / "index.json").is_file():
        for names, library in (("chunk-*-*.bin", "litdata"), ("shard.*.mds*", "MosaicML's streaming")):
            if any(fnmatch(path.name, file) for path in folder.glob(names)):
                raise UserError(
                    f"{folder} is a data set of {library}: read it with that library's StreamingDataset, and save its "
                    "token ids as one array with numpy.save (.npy), or its text as .jsonl"
                )


def _token_source(path: Path) -> Source:
    return Source(str(path), "tokens", path)


def _text_source(path: Path) -> Source:
    kind, compression = _kind(path)
    name = os.fsencode(path.as_posix()).decode("utf-8", "replace")  # a file name need not be Unicode
    return Source(name, kind or "text", path, compression, size=path.stat().st_size)


def _glob_files(name: str, pattern: Path) -> tuple[list[Source], int]:
    found = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    if not found:
        raise UserError(f"no file matches {name}: check the pattern")
    sources, left_out = [], 0
    for match in found:
        if match.is_dir():
            # With **, the files below are matches themselves; with *, a matched folder means its files.
            more, skipped = ([], 0) if "**" in name else _folder_files(match, may_be_empty=True)
            sources += more
            left_out += skipped
        elif _is_text(match):
            sources.append(_text_source(match))
        else:
            left_out += 1
    if not sources:
        raise UserError(f"{name} matches no text file: {_known_kinds()}")
    return sources, left_out


def _folder_files(folder: Path, may_be_empty: bool = False) -> tuple[list[Source], int]:
    files, left_out = [], 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        _refuse_streaming(Path(root))
        for name in names:
            if not name.startswith(".") and _is_text(Path(root, name)):
                files.append(Path(root, name))
            else:
                left_out += 1
    if not files and not may_be_empty:
        raise UserError(f"the folder {folder} holds no text: {_known_kinds()}")
    return [_text_source(path) for path in sorted(files, key=lambda p: p.relative_to(folder).as_posix())], left_out


def _is_text(path: Path) -> bool:
    # A corpus written beside its own input must not become input the next time: its manifest is no text. A pipe could
    # block forever, and a device has no end.
    is_manifest = path.name == "manifest.json" or path.name.endswith(".manifest.json")
    return _kind(path)[0] is not None and not is_manifest and path.is_file()


def _known_kinds() -> str:
    return f"put {', '.join(KINDS)} files there, plain or compressed ({', '.join(COMPRESSIONS)})"


def _kind(path: Path) -> tuple[str | None, str]:
    """Kind and compression by the file name's endings; (None, ...) for a kind that folders leave out."""
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    if compression:
        suffix = Path(path.stem).suffix.lower()
    return KINDS.get(suffix), compression
