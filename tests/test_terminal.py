"""Ctrl+C and Ctrl+Z of a real (pseudo) terminal, with a stand-in for accelerate between it and the script."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
LAUNCHER = "import subprocess, sys\nsys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]]).wait())\n"
SCRIPT = """
import signal, sys, time
from creature import launch
def main():
    stop = []
    signal.signal(signal.SIGINT, lambda *_: stop.append(1))
    print("working", flush=True)
    while not stop:
        time.sleep(0.05)
    time.sleep(1)  # longer than the launcher would wait
    print("saved", flush=True)
launch.run(main)
"""


class Terminal:
    """A process group in the foreground of a new pseudo-terminal, as a shell starts a job."""

    def __init__(self, folder):
        (folder / "accelerate").mkdir()
        (folder / "accelerate" / "launch.py").write_text(LAUNCHER)
        (folder / "script.py").write_text(SCRIPT)
        self.leader, follower = os.openpty()
        environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no", "PYTHONPATH": str(PROJECT)}
        attach = (
            "import fcntl, os, sys, termios as t; fcntl.ioctl(0, t.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        words = [sys.executable, str(folder / "accelerate" / "launch.py"), str(folder / "script.py")]
        self.process = subprocess.Popen(
            [sys.executable, "-c", attach, *words], stdin=follower, stdout=follower, stderr=follower, env=environment,
            start_new_session=True,
        )  # fmt: skip
        os.close(follower)
        self.text = ""

    def read_until(self, word):
        end = time.monotonic() + 30
        while word not in self.text and time.monotonic() < end:
            try:
                self.text += os.read(self.leader, 4096).decode()
            except OSError:  # the other end has closed
                break
        assert word in self.text, self.text

    def press(self, key):
        os.write(self.leader, key)

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        os.close(self.leader)
        self.process.wait()


@pytest.fixture
def terminal(tmp_path):
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


posix = pytest.mark.skipif(not hasattr(os, "tcsetpgrp"), reason="process groups of a terminal are POSIX")


@posix
def test_ctrl_c_reaches_the_script_and_the_launcher_ends_with_0(terminal):
    terminal.read_until("working")
    terminal.press(b"\x03")
    terminal.read_until("saved")
    assert terminal.process.wait(timeout=30) == 0
    assert "Traceback" not in terminal.text


@posix
def test_ctrl_z_does_not_lose_the_terminal(terminal):
    terminal.read_until("working")
    terminal.press(b"\x1a")  # is ignored
    time.sleep(1)
    terminal.press(b"\x03")
    terminal.read_until("saved")
    assert terminal.process.wait(timeout=30) == 0
