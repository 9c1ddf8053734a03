"""
For all tests: one thread, because more only slow micro models down, and nothing is written into the user's home.
"""

import os
import sys
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, and inherited by what the tests start
_trackio = tempfile.TemporaryDirectory()
os.environ["TRACKIO_DIR"] = _trackio.name  # read by trackio when it is imported, perhaps by a test that is not about it

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_runtest_setup(item):
    torch.set_num_threads(1)  # again: a training job takes all the cores there are


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """Run scripts/NAME.py in this process, in an empty folder: (name, *arguments) -> (exit code, stdout, stderr)."""
    from creatures import load_script

    from creature.errors import run_main

    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_main(load_script(name).main)
        return end.value.code, *capsys.readouterr()

    return call
