"""Atomic writes, locked folders, hashes, free space."""

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from creature.errors import UserError, first_line

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

LOCK_FILE = ".lock"


def user_path(given):
    """
    A path as the user wrote it, or a list of them, with `~` expanded; anything else is returned as it is.

    A shell expands `--output_dir ~/run` and leaves `--output_dir=~/run` alone, as it does what is in a YAML file.
    """
    if isinstance(given, list):
        return [user_path(path) for path in given]
    with suppress(ValueError):  # of a user's name that cannot be one
        return os.path.expanduser(given) if isinstance(given, str) else given
    return given


@contextmanager
def replace_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """
    Write a temporary file and rename it over `path`, so that nobody ever reads half a file.

    Yields a file object opened with `mode` ("wb" or "w"; text is UTF-8 with "\\n" line ends). The data is flushed to
    disk before the rename; on any exception the temporary file is removed and `path` stays as it was. Raises UserError
    when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    require_writable(path.parent)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(aside, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and is_disk_full(error):
            raise UserError(f"the disk is full while writing {path}: free some space, or use another disk") from error
        raise


@contextmanager
def explain_write_errors(path: str | os.PathLike, remedy: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of libraries and of the system for a failed write of `path` into a UserError with a remedy."""
    try:
        yield
    except Exception as error:  # safetensors has a type of its own, tokenizers raises Exception itself
        reason = first_line(error)
        # Torch's writer gives no reason. It misses the folder when another process has removed it from a full disk.
        by_torch = any(words in reason for words in ("inline_container", "iostream error", "Parent directory"))
        if isinstance(error, OSError):
            full = is_disk_full(error)
        else:
            full = "No space left" in reason or "quota" in reason or (by_torch and free_bytes(path) < 1 << 20)
        if full:
            raise UserError(f"the disk is full while writing {path}: free some space, then {remedy()}") from error
        if by_torch or "(os error " in reason or (isinstance(error, OSError) and error.errno):
            raise UserError(f"cannot write {path} ({reason}): make that possible, then {remedy()}") from error
        raise


def lock_folder(folder: str | os.PathLike) -> int | None:
    """
    Lock a folder until the returned descriptor is closed or this process ends, in whatever way.

    Raises BlockingIOError where somebody else holds the lock; returns None on a file system without locks. Windows
    cannot lock folders: there a file LOCK_FILE in it is locked.
    """
    try:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
        else:
            descriptor = os.open(Path(folder, LOCK_FILE), os.O_RDWR | os.O_CREAT)
    except PermissionError:  # a folder that can only be read
        return None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(error.errno, error.strerror, str(folder)) from None
        return None


@contextmanager
def one_at_a_time(folder: str | os.PathLike) -> Iterator[None]:
    """
    A context that one process at a time enters for a folder; for work of milliseconds.

    After ten seconds it is entered all the same: then a run holds the folder, not another process in here.
    """
    descriptor = None
    for _ in range(100):
        try:
            descriptor = lock_folder(folder)
            break
        except BlockingIOError:
            time.sleep(0.1)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_disk_full(error: OSError) -> bool:
    """Whether an OSError says "no space left" or "quota exceeded", on POSIX (ENOSPC, EDQUOT) or Windows (112)."""
    return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)) or getattr(error, "winerror", None) == 112


def flush_folder(folder: str | os.PathLike) -> None:
    """Flush a folder's entries to disk, so that renames survive a power cut; nothing where the system cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_file(path: str | os.PathLike) -> str:
    """The sha256 of a file as 64 hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def free_bytes(path: str | os.PathLike) -> int:
    """Free bytes on the disk that holds `path`, which need not exist yet: its nearest existing parent counts."""
    path = Path(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def format_bytes(number: int) -> str:
    """As in "1.4 GB"; below one GB as in "120.3 MB"."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def require_writable(folder: str | os.PathLike) -> Path:
    """Create `folder` with its parents and test by a temporary file that it can be written; UserError otherwise."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"the disk of {folder} is full: free some space, or write to another disk") from error
        reason = error.strerror or type(error).__name__
        raise UserError(f"cannot write in {folder} ({reason}): choose a folder that you may write to") from error
    return folder
