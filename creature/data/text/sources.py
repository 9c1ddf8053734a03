"""What the user typed, as an ordered list of sources of text: files, folders, globs and Hub names."""

import glob
import hashlib
import os
import re
from dataclasses import dataclass, field
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
TOKEN_FILES = (".bin", ".npy", ".pt")  # flat streams of token ids, which training opens as they are
NO_TEXT = (*TOKEN_FILES, ".arrow", ".safetensors")


@dataclass
class Source:
    """One file, or one Hub dataset, to read documents from."""

    name: str  # as shown to the user and written to the manifest
    kind: str  # text, jsonl, json, csv, parquet or hub
    path: Path | None = None
    compression: str = ""
    size: int = 0  # bytes on disk; 0 for a Hub dataset
    bytes_read: int = 0
    sha256: str = ""  # of the file as stored, known after it was read to the end
    repaired: int = 0  # records with half a surrogate pair, which no UTF-8 text can hold: replaced by U+FFFD
    _digest: "hashlib._Hash" = field(default_factory=hashlib.sha256, repr=False)


def find_sources(inputs: list[str]) -> tuple[list[Source], int]:
    """
    The sources that `inputs` (files, folders, globs, Hub names) name, and how many files in folders were left out.

    The order is fixed: inputs as given, the files of a folder or glob by name. A file reached twice counts once. In
    folders, hidden files, manifests and files of unknown kind are left out. Raises UserError for what does not exist.
    """
    sources, seen, left_out = [], set(), 0
    for name in inputs:
        files, skipped = _expand(name)
        left_out += skipped
        if files is None:
            sources.append(Source(name=name, kind="hub"))
            continue
        for path in files:
            key = os.path.normcase(os.path.realpath(path))
            if key not in seen:
                seen.add(key)
                kind, compression = _kind(path)
                size = path.stat().st_size
                shown = os.fsencode(path.as_posix()).decode("utf-8", "replace")  # a name need not be Unicode
                sources.append(Source(shown, kind or "text", path, compression, size))
    return sources, left_out


def split_name(name: str) -> tuple[str, str, str]:
    """(dataset, configuration, split) of dataset[:configuration[:split]]; empty where they are not said."""
    drive, rest = os.path.splitdrive(name)
    dataset, configuration, split = (*rest.split(":", 2), "", "")[:3]
    return drive + dataset, configuration, split


def is_dataset_name(name: str) -> bool:
    """Whether `datasets.load_dataset` is to open `name`: a dataset on the Hub, or a folder laid out as one."""
    return is_hub_name(name) or is_hub_folder(name)


def is_hub_folder(name: str) -> bool:
    """
    Whether `name` is a local copy of a Hub dataset: a folder whose README.md says so, or one with a :configuration or
    :split behind it.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return os.path.isdir(path) and _has_dataset_card(Path(path))
    return split_name(path)[0] != path and os.path.isdir(split_name(path)[0])


def _has_dataset_card(folder: Path) -> bool:
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    card = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    return bool(card and re.search(r"^(configs|dataset_info):", card[1], re.MULTILINE))


def is_hub_name(name: str) -> bool:
    """Whether `name` reads like owner/dataset[:configuration[:split]] and names nothing on this disk."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]*){0,2}", name) is not None
    kind, compression = _kind(Path(name.split(":")[0]))
    is_file_name = kind or compression or Path(name).suffix.lower() in NO_TEXT
    # Where the owner's name is a folder here, a path with a slip in it is meant: no reason to ask the network.
    return looks and not is_file_name and not os.path.exists(name) and not os.path.isdir(name.split("/")[0])


def is_arrow_folder(path: Path) -> bool:
    """Whether `path` is a folder that `datasets.load_from_disk` opens."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _expand(name: str) -> tuple[list[Path] | None, int]:
    """The files that one input stands for (None: a dataset) and the number of files left out."""
    path = Path(os.path.expanduser(name))  # as it is where there is no such user
    if path.is_file():
        if path.suffix.lower() in NO_TEXT:
            raise UserError(f"{name} holds tokens or weights, not text: train on it as it is, or name a text file")
        return [path], 0
    if is_arrow_folder(path) or is_hub_folder(name):
        return None, 0
    if path.is_dir():
        return _folder_files(path)
    if any(character in name for character in "*?["):
        found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            raise UserError(f"no file matches {name}: check the pattern")
        files, left_out = [], 0
        for match in found:
            if match.is_dir():
                # With **, the files below are matches themselves; with *, a matched folder means its files.
                more, skipped = ([], 0) if "**" in name else _folder_files(match, may_be_empty=True)
                files += more
                left_out += skipped
            elif _kind(match)[0] and not _is_manifest(match) and match.is_file():
                files.append(match)
            else:
                left_out += 1
        if not files:
            raise UserError(f"{name} matches no text file: {_known_kinds()}")
        return files, left_out
    if is_hub_name(name):
        return None, 0
    raise UserError(f"{name} does not exist: check the path (a Hub dataset is named owner/name)")


def _folder_files(folder: Path, may_be_empty: bool = False) -> tuple[list[Path], int]:
    files, left_out = [], 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            # A pipe could keep us waiting, and a device give bytes without an end.
            if _kind(path)[0] and not name.startswith(".") and not _is_manifest(path) and path.is_file():
                files.append(path)
            else:
                left_out += 1
    if not files and not may_be_empty:
        raise UserError(f"the folder {folder} holds no text: {_known_kinds()}")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix()), left_out


def _known_kinds() -> str:
    return f"put {', '.join(KINDS)} files there, plain or compressed ({', '.join(COMPRESSIONS)})"


def _is_manifest(path: Path) -> bool:
    # A corpus written beside its own input must not become input the next time.
    return path.name == "manifest.json" or path.name.endswith(".manifest.json")


def _kind(path: Path) -> tuple[str | None, str]:
    """Kind and compression by the file name's endings; (None, ...) for a kind that folders leave out."""
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    if compression:
        suffix = Path(path.stem).suffix.lower()
    return KINDS.get(suffix), compression
