"""The rounds on real recordings, from one text checkpoint, over several seeds: a table a task.

examples:
  python benchmarks/rounds.py --recordings recordings --init_from checkpoints/books --text_data data/books.bin
  python benchmarks/rounds.py --recordings recordings --init_from checkpoints/books --text_data data/books.bin \\
      --tasks touch motion --seeds 0 1 2 --at_once 16 --flags "--backbone_rate 0.1 --torch_compile false"

task      folder in --recordings          trains
touch     touch_grasp                     72 electrodes -> does the grip slip
motion    mocap_cmu                       body -> animation
robot     robot_g1                        state -> action
seeing    robot_g1                        state and camera -> action
reading   speech_read                     sound -> words
orders    orders_0 to orders_4            sound -> intent and slots; five folds, whose mean is a seed's figure
whole     room                            all senses -> all streams, with --flags "--codec codecs/room"

Every run is run_clm_creature.py in a process of its own, --at_once of them at a time, spread over the GPUs. A figure is
that of the last evaluation, the median over the seeds, with the lowest and highest in parentheses. "text" is how much
the loss of the text rose from the first evaluation to the last; "size of" a sense is the root mean square of its
vectors divided by that of the token table. A task whose folder is not there is left out.
docs/results.md says how the folders were imported, and benchmarks/dedicated.py measures other models on them.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from itertools import count
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
PROJECT = Path(__file__).resolve().parent.parent
sys.path[0] = str(PROJECT)

from concurrent.futures import ThreadPoolExecutor  # noqa: E402

from creature.errors import UserError, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

ROBOT = "--max_steps 50 --backbone_rate 0.03"  # its recordings are two minutes
# Task: folders, configuration, flags.
TASKS = {
    "touch": (
        ["touch_grasp"],
        "touch",
        "--train_senses internal_voice proprioception --sense_dropout '{proprioception: 0.1}' --max_steps 100",
    ),
    "motion": (["mocap_cmu"], "move", ""),
    "robot": (["robot_g1"], "move", ROBOT),
    "seeing": (["robot_g1"], "move", f"{ROBOT} --train_senses proprioception vision"),
    "reading": (["speech_read"], "hear", "--max_steps 150"),
    "orders": ([f"orders_{fold}" for fold in range(5)], "hear", ""),
    "whole": (["room"], "whole", ""),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=user_path, required=True, help="the folder of the folders of recordings")
    parser.add_argument("--init_from", type=user_path, required=True, help="a creature that has learned text")
    parser.add_argument("--text_data", type=user_path, help="text that is trained beside the recordings")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default 0 1 2)")
    parser.add_argument("--at_once", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    parser.add_argument("--flags", default="", help="further flags of every run, in one string")
    parser.add_argument("--output", type=user_path, default="checkpoints/rounds", help="where the runs go")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    runs, folds = {}, {task: [Path(options.recordings, name) for name in TASKS[task][0]] for task in options.tasks}
    for task in [task for task in options.tasks if not all(map(Path.is_dir, folds[task]))]:
        print(f"{task}: left out, because {options.recordings} has no {', '.join(TASKS[task][0])}")
        del folds[task]
    for task, folders in folds.items():
        for seed in options.seeds:
            runs |= {(task, seed, folder): Path(options.output, f"{task}_{folder.name}_{seed}") for folder in folders}
    if not runs:
        raise UserError(f"there is nothing to train in {options.recordings}: see --help for its folders")
    numbers = count()
    with ThreadPoolExecutor(options.at_once) as pool:
        found = list(pool.map(lambda run: train(*run, runs[run], options, next(numbers)), runs))
    figures = dict(zip(runs, found, strict=True))
    from benchmarks.baselines.common import print_table

    for task in folds:
        rows: dict[str, list[dict]] = {}
        for seed in options.seeds:
            of_seed = [values for run, values in figures.items() if run[:2] == (task, seed)]
            for name in of_seed[0]:
                rows.setdefault(name, []).append({task: sum(of_fold[name] for of_fold in of_seed) / len(of_seed)})
        print()
        print_table([task], rows)


def train(task: str, seed: int, folder: Path, output: Path, options: argparse.Namespace, number: int) -> dict:
    """Train and evaluate one run, on the GPU that its number falls on; its figures. UserError names a log."""
    _, config, flags = TASKS[task]
    job = [sys.executable, PROJECT / "run_clm_creature.py", "--config", PROJECT / f"configs/rounds/{config}.yaml"]
    job += ["--init_from", options.init_from, "--data", folder, "--seed", seed, "--output_dir", output]
    job += ["--text_data", options.text_data] if options.text_data else []
    evaluation = [sys.executable, PROJECT / "scripts/evaluate_recordings.py", "--checkpoint", output, "--data", folder]
    evaluation += ["--output", f"{output}.json"]
    output.parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{output}.log")
    for command in ([*job, *shlex.split(flags), *shlex.split(options.flags)], evaluation):
        done = subprocess.run(
            [*map(str, command)], env=environment(number), capture_output=True, text=True, encoding="utf-8"
        )
        with open(log, "a", encoding="utf-8") as file:
            file.write(done.stdout + done.stderr)
        if done.returncode:
            raise UserError(f"{output} failed: see {log}")
    return read_run(output) | read_evaluation(Path(f"{output}.json"))


def environment(number: int) -> dict[str, str]:
    """Ours, with one of the GPUs that are to be seen."""
    import torch

    cards = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    cards = cards.split(",")
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)], "PYTHONPATH": path}


def read_run(output: Path) -> dict[str, float]:
    """What the metrics.jsonl of a run says of its last evaluation, of the text, and of its first gradient."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    first, last = evaluations[0], evaluations[-1]
    beside = ("_runtime", "_per_second")
    figures = {name: x for name, x in last.items() if name.startswith("eval_") and not name.endswith(beside)}
    if "eval_text_loss" in last:
        figures["text"] = last["eval_text_loss"] - first["eval_text_loss"]
    return figures | {"gradient norm of step 1": next(line["grad_norm"] for line in lines if "grad_norm" in line)}


def read_evaluation(path: Path) -> dict[str, float]:
    """What scripts/evaluate_recordings.py found: commands in open loop, beside repeating, and the sizes of senses."""
    found = json.loads(path.read_text(encoding="utf-8"))
    commands = {
        f"{part} {name}{'' if who == 'creature' else ', repeating'}": value
        for part, of_part in found["commands"].items()
        for who in ("creature", "repeating")
        for name, value in of_part[who].items()
    }
    return commands | {f"size of {sense}": size for sense, size in found["sizes"].items()}


if __name__ == "__main__":
    run_main(main)
