"""Dedicated models beside the creature: trained for one task, on the same recordings, ticks and splits; a table.

examples:
  python benchmarks/dedicated.py touch recordings/touch_grasp
  python benchmarks/dedicated.py robot recordings/robot_g1 --hidden 256 1184 --seeds 0 1 2
  python benchmarks/dedicated.py motion recordings/mocap_cmu --hidden 256 --steps 300        # a laptop
  python benchmarks/dedicated.py speech recordings/speech_read --device cuda
  python benchmarks/dedicated.py segments recordings/room --device cuda
  python benchmarks/dedicated.py speech recordings/orders_0 recordings/orders_1 recordings/orders_2  # folds

touch     a label from measured numbers: the most frequent label, logistic regression, random forest
robot     the next action and those of the next second: repeating the last one, ridge regression, a GRU
motion    joint angles up to a second ahead: the last pose, constant velocity, a GRU
speech    the words of a sound: the most frequent ones, logistic regression a word, an encoder-decoder
segments  all senses and streams: one position a tick, as in the creature, or seven, as in a plain concatenation

A figure is the median over the seeds, with the lowest and highest in parentheses. Settings and training steps are
chosen on the validation split itself, which favours these models. The modules in benchmarks/baselines/ say how each is
measured. Needs scikit-learn for touch and for the simple model of speech.
"""

import argparse
import sys
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from creature.errors import run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

KINDS = ("touch", "robot", "motion", "speech", "segments")
# The last: the size of tiny.
HIDDEN = {"touch": [], "robot": [256, 1184], "motion": [256, 1184], "speech": [512], "segments": [512]}
STEPS = {"touch": 0, "robot": 600, "motion": 600, "speech": 2000, "segments": 600}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folders", nargs="+", type=user_path, help="folders of recordings; several are folds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default 0 1 2)")
    parser.add_argument("--hidden", nargs="+", type=int, metavar="N", help="hidden sizes (default: one as tiny's)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default 600, of speech 2000)")
    parser.add_argument(
        "--learning_rates", nargs="+", type=float, default=[3e-4, 1e-3], metavar="X", help="(default 3e-4 1e-3)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: a GPU if there is one)")
    parser.add_argument("--cache_dir", type=user_path, default="data/clips", help="of clips (default data/clips)")
    options = parser.parse_args(arguments)
    if len(options.folders) > 1 and options.kind != "speech":
        parser.error(f"{options.kind} takes one folder; folds are for speech")
    options.hidden = options.hidden or HIDDEN[options.kind]
    options.steps = options.steps or STEPS[options.kind]
    return options


def main() -> None:
    options = parse_arguments()
    import importlib

    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    importlib.import_module(f"benchmarks.baselines.{options.kind}").report(options)


if __name__ == "__main__":
    run_main(main)
