"""Whole files or none, and the checks before writing."""

import errno
import hashlib
import os

import pytest

from creature.errors import UserError
from creature.files import free_bytes, is_disk_full, replace_file, require_writable, sha256_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_in_a_folder_that_need_not_exist(tmp_path):
    path = tmp_path / "new" / "text.json"
    with replace_file(path, "w") as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == b"\xc3\xa9\n" and names(path.parent) == ["text.json"]
    with replace_file(path) as file:
        file.write(b"\0\1")
    assert path.read_bytes() == b"\0\1"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_after_any_exception_the_old_file_stands_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replace_file(path) as file:
        file.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("code", [errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)])
def test_a_full_disk_and_a_used_up_quota_are_told(tmp_path, code):
    with pytest.raises(UserError, match="the disk is full while writing .*a.bin: free some space"):
        with replace_file(tmp_path / "a.bin"):
            raise OSError(code, os.strerror(code))
    assert names(tmp_path) == []
    assert not is_disk_full(OSError(errno.EACCES, "denied"))


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write in .*file.*choose a folder that you may write to"):
        require_writable(tmp_path / "file" / "inside")
    assert require_writable(tmp_path / "a" / "b").is_dir() and names(tmp_path / "a" / "b") == []


def test_hash_and_free_space(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 8192)  # 2 MiB: more than is read at a time
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert free_bytes(tmp_path / "not" / "there" / "yet") > 0
