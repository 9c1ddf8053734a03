"""Let a trained creature live, tick by tick: through a recording, or in a world that connects to it.

examples:
  python scripts/live.py --checkpoint checkpoints/hear --recording recordings/speech
  python scripts/live.py --checkpoint checkpoints/move --recording recordings/motion --id walk_03 --real_time
  python scripts/live.py --checkpoint checkpoints/whole --serve
  python scripts/live.py --checkpoint checkpoints/whole --serve 9000 --sampling_rate 44100

With --recording it perceives what was recorded, as fast as the machine can, and lives on what it thinks, says and does
itself; a time line shows it beside what was thought and said in the recording. With --serve it is at 127.0.0.1:7880
until Ctrl+C, for a world in another process of this machine; docs/live.md has the format and a client of 40 lines.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, first_line, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="folder of a run, of a checkpoint or of a saved model"
    )
    parser.add_argument("--recording", type=user_path, metavar="FOLDER", help="folder of recordings, to play one of")
    parser.add_argument("--id", help="recording_id of the one to play (default: the first of the validation split)")
    parser.add_argument("--seconds", type=float, help="of the recording to play (default: all)")
    parser.add_argument("--real_time", action="store_true", help="play one tick every 80 ms, no faster")
    parser.add_argument(
        "--serve", type=int, nargs="?", const=7880, metavar="PORT", help="let a world connect (default port 7880)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="of the sound it hears, in Hz (default 16000)")
    parser.add_argument("--temperature", type=float, help="of words: below 1 is more predictable (default 0.8)")
    parser.add_argument("--null_bias", type=float, help="more is more silent (default: as silent as in training)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and senses give the same life (default 0)")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: a GPU if there is one")
    arguments = parser.parse_args()
    if (arguments.serve is None) == (arguments.recording is None):
        parser.error("say in what it lives: --recording FOLDER or --serve")
    if arguments.seconds is not None and not arguments.seconds > 0:
        parser.error("--seconds must be above 0")
    for name, least in (("sampling_rate", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from creature.live import LiveCreature
    from creature.live.playback import find_recording

    recording = find_recording(arguments.recording, arguments.id) if arguments.recording else None
    creature = LiveCreature.from_pretrained(
        arguments.checkpoint, arguments.device, seed=arguments.seed, sampling_rate=arguments.sampling_rate
    )
    draw_as_asked(creature, arguments)
    if recording is None:
        serve(creature, arguments.host, arguments.serve)
    else:
        play(creature, recording, arguments.seconds, arguments.real_time)


def draw_as_asked(creature, arguments: argparse.Namespace) -> None:
    """Change how both texts are drawn by the flags that were given; UserError for a value out of range."""
    changes = {name: getattr(arguments, name) for name in ("temperature", "null_bias")}
    changes = {name: value for name, value in changes.items() if value is not None}
    try:
        for stream in ("internal_text", "external_text"):
            creature.sampling[stream] = replace(creature.sampling[stream], **changes)
    except ValueError as error:
        raise UserError(first_line(error)) from error


def play(creature, recording: dict, seconds: float | None, real_time: bool) -> None:
    """Print the time line of a recording, and the clock."""
    from creature.live.playback import HEADING, clock_line, time_line

    print(
        f"{recording['recording_id']}, {recording['duration']:.1f} s; a window of {creature.window} ticks; emits "
        f"{', '.join(creature.streams) or 'nothing'}\n{HEADING}"
    )
    started = time.perf_counter()
    try:
        for line in time_line(creature, recording, seconds, real_time):
            print(line, flush=True)
    except ValueError as error:
        raise UserError(f"{recording['recording_id']} cannot be played: {first_line(error)}") from error
    except KeyboardInterrupt:
        print("ended")
    print(clock_line(creature, time.perf_counter() - started))


def serve(creature, host: str, port: int) -> None:
    """Serve the creature to one world after another until Ctrl+C."""
    from creature.live.service import Service

    service = Service(creature, host, port, report=lambda line: print(line, flush=True))
    print("a creature is served at {}:{} until Ctrl+C".format(*service.address), flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"warning: anybody who reaches {host} can use it, without a password, and reads what it sees and says: "
            "leave out --host to serve this machine only",
            flush=True,
        )
    try:
        service.serve()
    except KeyboardInterrupt:
        print("ended", flush=True)


if __name__ == "__main__":
    run_main(main)
