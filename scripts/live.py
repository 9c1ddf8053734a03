"""Let a trained creature live, tick by tick: through a recording, in the room, or in a world that connects to it.

examples:
  python scripts/live.py --checkpoint checkpoints/hear --recording recordings/speech
  python scripts/live.py --checkpoint checkpoints/move --recording recordings/motion --id walk_03 --real_time
  python scripts/live.py --checkpoint checkpoints/whole --world --film life.mp4
  python scripts/live.py --checkpoint checkpoints/whole --world 100 --teacher --without vision
  python scripts/live.py --checkpoint checkpoints/whole --serve
  python scripts/live.py --checkpoint checkpoints/whole --serve 9000 --sampling_rate 44100

With --recording it perceives what was recorded, as fast as the machine can, and lives on what it thinks, says and does
itself; a time line shows it beside what was thought and said in the recording. With --world it lives in rooms that no
training has seen; a table shows how often it did what it was asked, beside one who picks at random, and --film writes
the first life, beside that of the teacher in the same room. With --serve it is at 127.0.0.1:7880 until Ctrl+C, for a
world in another process of this machine; docs/live.md has the format and a client of 40 lines.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, first_line, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

# Flags that say nothing about the other lives.
GOES_WITH = {
    "id": ("recording",), "seconds": ("recording", "world"), "real_time": ("recording", "world"),
    "teacher": ("world",), "film": ("world",), "without": ("world",), "host": ("serve",), "sampling_rate": ("serve",),
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="folder of a run, of a checkpoint or of a saved model"
    )
    parser.add_argument("--recording", type=user_path, metavar="FOLDER", help="folder of recordings, to play one of")
    parser.add_argument("--id", help="recording_id of the one to play (default: the first of the validation split)")
    parser.add_argument("--seconds", type=float, help="of each life (default: all; in the room 82, and it may be more)")
    parser.add_argument("--real_time", action="store_true", help="play one tick every 80 ms, no faster")
    parser.add_argument(
        "--world", type=int, nargs="?", const=1, metavar="LIVES", help="live in so many held-out rooms (default 1)"
    )
    parser.add_argument("--teacher", action="store_true", help="with --world: the recorded teacher in the same rooms")
    parser.add_argument("--film", type=user_path, help="with --world: .mp4 file of the first life and the teacher's")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="SENSE",
        choices=("audio", "vision", "proprioception", "touch", "external_voice"),
        help="with --world: senses that it has to live without (audio, vision, proprioception, touch, external_voice)",
    )  # fmt: skip
    parser.add_argument(
        "--serve", type=int, nargs="?", const=7880, metavar="PORT", help="let a world connect (default port 7880)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument(
        "--sampling_rate", type=int, default=16000, help="with --serve: of its sound, in Hz (default 16000)"
    )
    parser.add_argument("--temperature", type=float, help="of words: below 1 is more predictable (default 0.8)")
    parser.add_argument("--null_bias", type=float, help="more is more silent (default: as silent as in training)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and senses give the same life (default 0)")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: a GPU if there is one")
    arguments = parser.parse_args()
    if sum(getattr(arguments, name) is not None for name in ("recording", "world", "serve")) != 1:
        parser.error("say in what it lives: --recording FOLDER, --world or --serve")
    for name, lives in GOES_WITH.items():
        given = getattr(arguments, name) != parser.get_default(name)
        if given and all(getattr(arguments, life) is None for life in lives):
            parser.error(f"--{name} goes with --{' or --'.join(lives)}: leave it out")
    if arguments.world is not None and arguments.world < 1:
        parser.error("--world must be at least 1")
    film = arguments.film
    if film is not None and (not film.endswith(".mp4") or Path(film).is_dir()):
        parser.error("--film must be a file whose name ends in .mp4")
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
    if arguments.world:
        live_in_world(creature, arguments)
    elif recording is None:
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
    from creature.live.playback import clock_line, heading, time_line

    print(
        f"{recording['recording_id']}, {recording['duration']:.1f} s; a window of {creature.window} ticks; emits "
        f"{', '.join(creature.streams) or 'nothing'}\n{heading()}"
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


def live_in_world(creature, arguments: argparse.Namespace) -> None:
    """Live in one held-out room after another, and print what it was asked and did: of one life also its time line."""
    from creature.live.in_room import count, live_as_teacher, live_in_room, make_room, success_table
    from creature.live.playback import clock_line, event_lines, heading
    from creature.world.room import LIFE_TICKS
    from ticks_creature import TICK_SECONDS

    if arguments.film:
        from creature.files import require_writable
        from creature.world.film import write_film
        from creature.world.recording import LifeNotes, record_teacher

        require_writable(Path(arguments.film).parent)
    room, done, by_teacher = make_room(creature), {}, {}
    ticks = LIFE_TICKS if arguments.seconds is None else max(1, round(arguments.seconds / TICK_SECONDS))
    if arguments.world == 1:
        print(heading(("hears", "thinks", "says")))
    for seed in range(arguments.world):
        started, notes = time.perf_counter(), LifeNotes() if arguments.film and not seed else None
        for emission, heard in live_in_room(creature, room, seed, arguments.without, ticks):
            if notes:
                notes.sense(room, emission.thought, emission.said)
            if arguments.world == 1:
                words = enumerate((heard, emission.thought, emission.said))
                events = [(word["start"], column, word["word"]) for column, said in words for word in said]
                for line in event_lines(events):
                    print(line, flush=True)
            if arguments.real_time:
                time.sleep(max(0.0, started + (emission.tick + 1) * TICK_SECONDS - time.perf_counter()))
        print(
            f"life {seed + 1} of {arguments.world}: {clock_line(creature, time.perf_counter() - started)}", flush=True
        )
        count(room, done)
        if notes:
            lives = {"the creature": notes.columns(), "the teacher": record_teacher(room, seed, ticks)}
            write_film(arguments.film, lives)
            print(arguments.film)
        elif arguments.teacher:
            live_as_teacher(room, seed, ticks)
        if arguments.teacher:
            count(room, by_teacher)
    print("\n".join(success_table(done, by_teacher if arguments.teacher else None)))


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
