"""A signal before the first step: nothing is lost, one line says so, and the exit code is 0."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from test_run import place, start  # noqa: F401  a fixture

from creature.settings import PROJECT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot send these signals to one process")
SENTENCE = "before the first step: leaving; nothing was trained yet, so nothing is lost\n"
BEGIN = "from creature import startup; startup.leave_on_signals(); import hashlib, time; print('ready', flush=True)\n"
WAITS = {
    "in Python": "time.sleep(100)",
    "in a library that gives Python no turn": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "in a library that swallows whatever is raised": (
        "try:\n    time.sleep(100)\nexcept BaseException:\n    print('swallowed', flush=True)\ntime.sleep(100)"
    ),
    "in a destructor": ("class Slow:\n    def __del__(self): time.sleep(100)\nSlow()\ntime.sleep(100)"),
    "before the signals are handed over, where the same happens": (
        "try:\n    time.sleep(100)\nexcept BaseException:\n    startup.hand_over()\ntime.sleep(100)"
    ),
}


def python(code):
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("wait", WAITS)
def test_a_signal_ends_it_wherever_it_waits(wait):
    process = python(WAITS[wait])
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGTERM, signal.SIGINT):  # the second, passed on by a launcher, changes nothing
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors.count(SENTENCE) == 1 and len(errors.splitlines()) == 2


def test_a_library_that_makes_another_error_of_the_exit_changes_nothing():
    code = (
        "from creature import launch\ndef main():\n    print('main', flush=True)\n    try:\n        time.sleep(100)\n"
        "    finally:\n        raise RuntimeError('trying to pop from empty mode stack')\nlaunch.run(main)"
    )
    process = python(code)
    assert process.stdout.readline() + process.stdout.readline() == "ready\nmain\n"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and SENTENCE in errors and "Traceback" not in errors


def test_what_is_started_with_signals_blocked_gets_them_once_it_can_take_them():
    child = f"import time; time.sleep(1)\n{BEGIN}time.sleep(100)"
    code = (
        "import subprocess, sys\nwith startup.signals_blocked():\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "child.terminate()\nsys.exit(child.wait())"
    )
    process = python(code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and SENTENCE in errors


def test_signals_go_back_to_whoever_had_them():
    process = python("startup.hand_over(); print('over', flush=True); time.sleep(100)")
    assert process.stdout.readline() + process.stdout.readline() == "ready\nover\n"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_told_to_stop_while_it_starts_leaves_with_0(place, processes):  # noqa: F811
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--quiet"]
    run = start("--max_steps", 5000, "--output_dir", "run", launcher=launcher if processes == 2 else ())
    for line in run.stdout:
        if "loading torch" in line:
            break
    script = run.pid if processes == 1 else psutil.Process(run.pid).children()[0].pid
    os.kill(script, signal.SIGTERM)
    output, errors = run.communicate(timeout=200)
    assert run.returncode == 0 and errors.count(SENTENCE) == 1 and "Traceback" not in errors, errors
    assert "step " not in output and not (place / "run").exists()
