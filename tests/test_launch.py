"""Before the first step: how OpenMP's threads wait; and a signal: one line, exit code 0, and no half-written file."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
from test_run import place, start  # noqa: F401  a fixture

from creature.settings import PROJECT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot send these signals to one process")
SENTENCE = "stopped before the first step: nothing is lost\n"
SCRIPT = """
import sys, time
from pathlib import Path
from creature import launch
from creature.callbacks import StopSignals
from creature.files import replace_file

def wait():
    print("waiting", flush=True)
    time.sleep(100)

def main():
{main}
launch.run(main)
"""
WRITES = "while it writes a file"
MAINS = {
    WRITES: "with replace_file(Path(sys.argv[1], 'file')) as file:\n    wait()",
    "in a library that swallows everything": (
        "try:\n    wait()\nexcept BaseException:\n    pass\nStopSignals().install()\nprint('trains', flush=True)"
    ),
    "in a library that raises another error": (
        "try:\n    wait()\nfinally:\n    raise RuntimeError('pop from an empty stack')"
    ),
}


@pytest.mark.parametrize(("where", "number"), [*((where, signal.SIGINT) for where in MAINS), (WRITES, signal.SIGTERM)])
def test_the_first_signal_ends_it(where, number, tmp_path):
    code = SCRIPT.format(main="\n".join(f"    {line}" for line in MAINS[where].splitlines()))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "waiting\n"
    for _ in range(2):  # a launcher may pass on what the terminal has sent already
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not output
    assert errors.endswith(SENTENCE) and "Traceback" not in errors  # libraries warn when they are imported
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_stopped_while_it_starts_leaves_nothing(place, processes):  # noqa: F811
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--quiet"]
    run = start("--max_steps", 5000, "--output_dir", "run", launcher=launcher if processes == 2 else ())
    # Of two processes, before they can handle a signal: it waits for them.
    awaited = "loading torch" if processes == 1 else "starting 2 processes"
    for line in run.stdout:
        if awaited in line:
            break
    script = run.pid if processes == 1 else psutil.Process(run.pid).children()[0].pid
    os.kill(script, signal.SIGTERM)
    output, errors = run.communicate(timeout=200)
    assert run.returncode == 0 and errors.count(SENTENCE) == 1 and "Traceback" not in errors, errors
    assert "step " not in output and not (place / "run").exists()


@pytest.mark.parametrize(("asked", "policy"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(asked, policy):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", "import run_clm_creature, torch"], cwd=PROJECT, capture_output=True, text=True,
        env=environment | {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": asked} if asked else {}),
    )  # fmt: skip
    # OpenMP prints what it goes by, as the first thing when torch loads it.
    assert re.findall(r"OMP_WAIT_POLICY ?= ?'(\w+)'", done.stderr) == [policy], done.stderr
