"""Let a trained creature live, tick by tick.

examples:
  python scripts/live.py --checkpoint checkpoints/whole --serve
  python scripts/live.py --checkpoint checkpoints/whole --serve 9000 --sampling_rate 44100

With --serve it is at 127.0.0.1:7880 until Ctrl+C, for a world in another process of this machine; docs/live.md has the
format and a client of 40 lines.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="folder of a run, of a checkpoint or of a saved model"
    )
    parser.add_argument(
        "--serve", type=int, nargs="?", const=7880, metavar="PORT", help="let a world connect (default port 7880)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--sampling_rate", type=int, default=16000, help="of the sound it hears, in Hz (default 16000)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and senses give the same life (default 0)")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: a GPU if there is one")
    arguments = parser.parse_args()
    if arguments.serve is None:
        parser.error("say in what it lives: --serve")
    for name, least in (("sampling_rate", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from creature.live import LiveCreature

    creature = LiveCreature.from_pretrained(
        arguments.checkpoint, arguments.device, seed=arguments.seed, sampling_rate=arguments.sampling_rate
    )
    serve(creature, arguments.host, arguments.serve)


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
