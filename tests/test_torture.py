"""A run disturbed at random moments ends as if nothing had happened: benchmarks/torture.py, shortened."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "disk full", "truncated file", "flipped bit", "newest deleted")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and signals of Linux")
def test_a_tortured_run_ends_with_the_weights_and_losses_of_an_undisturbed_one():
    numbers = {"faults": len(KINDS), "steps": 32, "processes": 2, "seed": 1}
    flags = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "benchmarks/torture.py", *flags], cwd=PROJECT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "weights and logs are those of the undisturbed run, bit for bit" in done.stdout
    rows = {name.strip(): tuple(map(int, counts)) for name, *counts in
            re.findall(r"^(.{15}) +(\d+) +(\d+) ", done.stdout, re.M)}  # fmt: skip
    assert all(times == recovered for times, recovered in rows.values())
    assert rows["all"][0] >= len(KINDS)
    for kind in KINDS:
        assert rows[kind][0] or (kind == "disk full" and "never full" in done.stdout)
