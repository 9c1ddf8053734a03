"""Record lives in the room: a simulated humanoid at a table, whom visitors ask to touch, push, look, tell and remember.

examples:
  python scripts/record_world.py --minutes 60 --output recordings/room --workers 4
  python scripts/record_world.py --minutes 5 --output recordings/few --seed 1

Writes a folder that datasets.load_from_disk opens, one life of 82 s a row, one of ten for validation, with
recordings.json (names, settings), recordings.png (some lives on a time line) and recordings.mp4 (one of them to look
at). The same seed gives the same recordings whatever the number of workers. A killed recording goes on where it was.
docs/room.md says what happens in a life.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, required=True, metavar="N", help="of life, in lives of 82 s, two at least")
    add("--output", type=user_path, required=True, metavar="FOLDER", help="a folder that does not exist yet")
    add("--workers", type=int, default=1, metavar="W", help="processes (default 1)")
    add("--seed", type=int, default=0, metavar="S", help="another one gives other lives (default 0)")
    add("--eye", type=int, default=64, metavar="N", help="pixels of a side of the pictures (default 64)")
    arguments = parser.parse_args()
    for name, least, most in (("minutes", 0, 1_000_000), ("workers", 1, 1024), ("eye", 16, 1024)):
        if not least <= getattr(arguments, name) <= most:
            parser.error(f"--{name} must be from {least} to {most:,}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from creature.data.recordings.schema import load_recordings
    from creature.data.recordings.sheet import draw_recordings
    from creature.world.film import write_film
    from creature.world.recording import record_lives

    progress, began = sys.stderr.isatty(), time.perf_counter()
    print(f"recording {arguments.minutes:g} minutes of life with {arguments.workers} process(es)", flush=True)
    try:
        facts = record_lives(
            arguments.output, arguments.minutes, arguments.workers, arguments.seed, arguments.eye, progress
        )
    except KeyboardInterrupt:
        print("the lives so far are kept: the same command goes on", file=sys.stderr, flush=True)
        raise
    report = facts["report"]
    seconds = time.perf_counter() - began
    print(
        f"{report['lives']} lives, {report['minutes']:g} minutes, one life of ten for validation, in {seconds:,.0f} s"
    )
    film = Path(arguments.output, "recordings.mp4")
    write_film(film, {"": load_recordings(arguments.output)[0]["train"][0]})
    print(f"{arguments.output}\n{draw_recordings(arguments.output)}\n{film}")


if __name__ == "__main__":
    run_main(main)
