"""Endurance: over thousands of steps of one run, memory, open files, logs and checkpoints do not grow.

examples:
  python benchmarks/endurance.py                                   # 5,000 steps of a micro creature on the CPU
  python benchmarks/endurance.py --steps 400 --every 40            # a short one
  python benchmarks/endurance.py --dataloader_num_workers 2 --report_to tensorboard

The run logs, evaluates, prints samples and saves far more often than a real one and repeats its data many times. Every
so many steps psutil measures the process with its workers, and its folder. Flags that this script does not know go to
the run. The exit code is 1 if the last two fifths of the run hold more than the second fifth: memory by more than 2 %,
files, open files or threads by any number, trainer_state.json beyond the 1,000 logs that it keeps. By design, only
metrics.jsonl grows, by one line per log, and what a tracker stores.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[0] = str(PROJECT)  # in place of this folder, whose tokenize.py would hide the standard library's

COLUMNS = ("step", "memory MiB", "handles", "threads", "files", "checkpoints", "checkpoint kB", "state kB", "logs kB")
# An early decay, because the checkpoint before it is kept beside the newest three.
OFTEN = {"logging_steps": 2, "eval_steps": 25, "save_steps": 25, "sample_steps": 100, "save_total_limit": 3}
OFTEN |= {"decay_steps": 0.95}


def look_at(process, folder: Path, step: int) -> dict[str, float]:
    """Memory, handles and threads of the run with its workers, and the sizes in its folder."""
    import psutil

    from creature.checkpoints import list_checkpoints

    memory = handles = threads = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            with one.oneshot():
                memory += one.memory_info().rss
                handles += one.num_handles() if os.name == "nt" else one.num_fds()
                threads += one.num_threads()
        except psutil.NoSuchProcess:  # a worker, at the end of its epoch
            continue
    # Checkpoints that are being written do not count, and files may be deleted meanwhile.
    kept = [path for path in list_checkpoints(folder) if (path / "complete.json").is_file()]
    sizes = {path: _size(path) for path in folder.rglob("*") if path.is_file() and ".writing" not in path.parts}
    newest = kept[-1] if kept else None
    own = {path: size for path, size in sizes.items() if newest and newest in path.parents}
    state = sum(size for path, size in own.items() if path.name == "trainer_state.json")
    logs = sum(size for path, size in sizes.items() if path.name == "metrics.jsonl" or "events." in path.name)
    values = (step, memory / 2**20, handles, threads, len(sizes), len(kept), (sum(own.values()) - state) / 1e3)
    return dict(zip(COLUMNS, (*values, state / 1e3, logs / 1e3), strict=True))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def endure(place: Path, steps: int, every: int, flags: list[str]) -> tuple[list[dict], int]:
    """(the measurements of every so many steps, the exit code of the run)."""
    import psutil

    often = [word for name, value in OFTEN.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(PROJECT / "run_clm_creature.py"), "--config", "micro.yaml", "--output_dir", "run"]
    command += ["--max_steps", str(steps), *often, "--prompt", "w1 w2 w3", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    seen, text = [], ""
    with subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        process = psutil.Process(run.pid)
        for line in run.stdout:
            text = (text + line)[-3000:]
            step = re.match(r"step +([\d,]+)/.*loss_internal_text", line)
            if step and (number := int(step[1].replace(",", ""))) % every == 0 and number < steps:
                seen.append(look_at(process, place / "run", number))
                print("  ".join(f"{value:{len(name)},.0f}" for name, value in seen[-1].items()), flush=True)
    if run.returncode:
        print(text)
    return seen, run.returncode


def grown(seen: list[dict], steps: int) -> list[str]:
    """The columns whose median grew from the second fifth of the run to its last two fifths."""
    early = [row for row in seen if steps / 5 <= row["step"] <= 2 * steps / 5]
    late = [row for row in seen if row["step"] > 3 * steps / 5]
    found = []
    for name in COLUMNS[1:-1]:
        before, after = (statistics.median(row[name] for row in rows) for rows in (early, late))
        allowed = {"memory MiB": 1.02 * before, "state kB": max(before, 400), "checkpoint kB": before + 1}
        if after > allowed.get(name, before):
            found.append(f"{name} from {before:,.1f} to {after:,.1f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="steps of the run (default 5000)")
    parser.add_argument("--every", type=int, default=250, help="measure every so many steps (default 250)")
    options, flags = parser.parse_known_args()
    from benchmarks.torture import prepare

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        print("  ".join(COLUMNS), flush=True)
        seen, code = endure(Path(place), options.steps, options.every, flags)
    if code:
        return 1
    problems = grown(seen, options.steps)
    print(f"{options.steps:,} steps in {time.perf_counter() - began:.0f} s; grew: {'; '.join(problems) or 'nothing'}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
