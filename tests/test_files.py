"""Atomic writes, locks, and the checks before writing."""

import errno
import hashlib
import os
import threading

import pytest

from creature import files
from creature.errors import UserError
from creature.files import (
    explain_write_errors,
    free_bytes,
    is_disk_full,
    lock_folder,
    one_at_a_time,
    replace_file,
    require_writable,
    sha256_file,
)

fcntl = files.fcntl  # None on Windows


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_complete_and_its_folder_is_created(tmp_path):
    path = tmp_path / "new" / "text.json"
    with replace_file(path, "w") as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == b"\xc3\xa9\n" and names(path.parent) == ["text.json"]
    with replace_file(path) as file:
        file.write(b"\0\1")
    assert path.read_bytes() == b"\0\1"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_after_any_exception_only_the_old_file_is_there(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replace_file(path) as file:
        file.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)])
def test_a_full_disk_and_a_used_up_quota_are_reported(tmp_path, code):
    with pytest.raises(UserError, match="the disk is full while writing .*a.bin: free some space"):
        with replace_file(tmp_path / "a.bin"):
            raise OSError(code, os.strerror(code))
    assert names(tmp_path) == []
    assert not is_disk_full(OSError(errno.EACCES, "denied"))


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write in .*file.*choose a folder that you may write to"):
        require_writable(tmp_path / "file" / "inside")
    assert require_writable(tmp_path / "a" / "b").is_dir() and names(tmp_path / "a" / "b") == []


def test_hash_and_free_space(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 8192)  # 2 MiB: more than is read at a time
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert free_bytes(tmp_path / "not" / "there" / "yet") > 0


def test_a_reader_during_a_write_sees_the_old_or_the_new_file(tmp_path):
    path, seen, stop = tmp_path / "state.json", set(), threading.Event()
    path.write_text("a" * 100_000)

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        with replace_file(path, "w") as file:
            for _ in range(10):
                file.write("ab"[i % 2] * 10_000)
                file.flush()
    stop.set()
    reader.join()
    assert seen <= {"a" * 100_000, "b" * 100_000} and names(tmp_path) == ["state.json"]


class Msvcrt:
    """Stands in for Windows' module: a lock of a handle, which no other handle gets, not even of this process."""

    LK_NBLCK = 2

    @staticmethod
    def locking(descriptor, mode, count):
        assert mode == Msvcrt.LK_NBLCK and count == 1
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error


@pytest.fixture(params=["own", "Windows"])
def locks(request, monkeypatch):
    """Locks as this system has them, and as on Windows."""
    if request.param == "Windows" and fcntl is not None:
        monkeypatch.setattr(files, "fcntl", None)
        monkeypatch.setattr(files, "msvcrt", Msvcrt, raising=False)


def test_a_folder_is_locked_until_it_is_released(tmp_path, locks):
    held = lock_folder(tmp_path)
    with pytest.raises(BlockingIOError):
        lock_folder(tmp_path)
    (tmp_path / "other").mkdir()
    os.close(lock_folder(tmp_path / "other"))
    os.close(held)
    os.close(lock_folder(tmp_path))


def test_one_at_a_time(tmp_path, locks):
    inside = threading.Event()

    def enter():
        with one_at_a_time(tmp_path):
            inside.set()

    other = threading.Thread(target=enter)
    with one_at_a_time(tmp_path):
        other.start()
        assert not inside.wait(0.2)
    other.join()
    assert inside.is_set()


@pytest.mark.parametrize(
    ("error", "free", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**9, "the disk is full while writing .*a: free some"),
        (Exception("No space left on device (os error 28)"), 10**9, "the disk is full"),  # tokenizers
        (Exception("Disk quota exceeded (os error 122)"), 10**9, "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), 0, "the disk is full"),
        (RuntimeError("basic_ios::clear: iostream error"), 0, "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), 10**9, "cannot write .*enforce"),
        (RuntimeError("Parent directory run/.writing does not exist."), 10**9, "cannot write .*Parent directory"),
        (Exception("I/O error: Read-only file system (os error 30)"), 10**9, "cannot write .*Read-only.*then go on"),
        (OSError(errno.EACCES, "Permission denied"), 10**9, "cannot write .*Permission denied"),
    ],
)
def test_a_failed_write_of_any_library_is_reported_with_the_remedy(tmp_path, monkeypatch, error, free, words):
    monkeypatch.setattr(files, "free_bytes", lambda path: free)
    with pytest.raises(UserError, match=words), explain_write_errors(tmp_path / "a", lambda: "go on"):
        raise error


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("shapes differ"), UserError("said already")])
def test_other_errors_are_raised_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as caught, explain_write_errors(tmp_path, lambda: "go on"):
        raise error
    assert caught.value is error
