"""Long runs: nothing grows, and workers die with the run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import yaml
from creatures import MICRO

import run_clm_creature
from benchmarks import endurance, torture
from creature import checkpoints

PROJECT = Path(run_clm_creature.__file__).parent


def test_memory_open_files_logs_and_checkpoints_do_not_grow(tmp_path):
    torture.prepare(tmp_path)
    often = ["--logging_steps", "1", "--eval_steps", "2", "--save_steps", "2", "--sample_steps", "20"]
    seen, code = endurance.endure(tmp_path, 80, 3, often)
    assert code == 0 and len(seen) == 26
    assert endurance.grown(seen, 80) == []
    # The newest three and the one where the decay begins; while one is written aside, the oldest is still there.
    assert {row["checkpoints"] for row in seen if row["step"] > 12} == {4}


def test_growth_is_reported():
    rows = [(step, 400 + step, 6, 5, 60, 4, 250, 5, step) for step in range(100)]
    seen = [dict(zip(endurance.COLUMNS, row, strict=True)) for row in rows]
    assert endurance.grown(seen, 100) == ["memory MiB from 430.0 to 480.0"]
    for row in seen:
        row["memory MiB"], row["handles"] = 400, 6 + row["step"] // 50
    assert endurance.grown(seen, 100) == ["handles from 6.0 to 7.0"]


def test_workers_change_nothing_and_die_with_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(MICRO))
    words = np.random.default_rng(0).choice(["the", "creature", "sees", "a", "red", "ball", "and", "hears"], 40_000)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")  # tokenized by the run
    flags = ["--config", "micro.yaml", "--data", "text.txt", "--logging_steps", "1", "--eval_strategy", "no"]
    flags += ["--batch_warmup_steps", "2"]  # not a share: the two runs are of unlike lengths
    script = str(PROJECT / "run_clm_creature.py")
    command = [sys.executable, script, *flags, "--max_steps", "5000", "--save_steps", "4"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(
        [*command, "--dataloader_num_workers", "2", "--output_dir", "workers"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    text = ""
    for line in run.stdout:
        text += line
        if line.startswith("step     10/"):
            break
    workers = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
    run.kill()
    run.wait()
    run.stdout.close()
    assert len(workers) >= 2, text
    checkpoints.lock_output("workers")  # though a forked worker may still be there
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert not alive

    monkeypatch.setattr(sys, "argv", [script, *flags, "--max_steps", "10", "--output_dir", "alone"])
    assert run_clm_creature.main() == 0
    curves = [
        {entry["step"]: entry["loss"] for entry in checkpoints.read_metrics(folder) if entry["step"] <= 7}
        for folder in ("workers", "alone")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 7
