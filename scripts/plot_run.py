"""Plot the curves of one run, or of several over each other.

examples:
  python scripts/plot_run.py checkpoints/text_only
  python scripts/plot_run.py checkpoints/text_only checkpoints/small
  python scripts/plot_run.py checkpoints/text_only checkpoints/small --x time --output curves.png

Training loss raw and smoothed, validation loss as dots, a panel for each stream where a run trains several, and tokens
per second. Several runs lie over each other, by default over tokens. Works while a run is still training.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=user_path, metavar="RUN", help="folder of a run, with metrics.jsonl in it"
    )
    parser.add_argument(
        "--x", choices=("step", "tokens", "time"), help="x axis (default step, for several runs tokens)"
    )
    parser.add_argument(
        "--output", type=user_path, help="a .png, .svg or .pdf file (default: RUN/curves.png, or runs.png for several)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from creature.plots import plot_runs

    output = arguments.output or (Path(arguments.runs[0]) / "curves.png" if len(arguments.runs) == 1 else "runs.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        x = arguments.x or ("step" if len(arguments.runs) == 1 else "tokens")
        path = plot_runs(arguments.runs, output, x=x)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(path)


if __name__ == "__main__":
    run_main(main)
