"""How this process was started, and starting the processes that `accelerate launch` promises but does not start.

`accelerate launch --cpu --num_processes N` runs the script once, with N forgotten, unless MPI is configured
(huggingface/accelerate issue 2741). Here the script starts its N ranks itself. And when a script fails, accelerate adds
a traceback of its own below the script's message; one more line says what it is.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from creature import startup
from creature.errors import UserError, run_main
from creature.terminal import give_terminal_back, take_terminal

# Set for the processes that this module starts: the command that started them all.
COMMAND = "CREATURE_COMMAND"
LAUNCH_WORDS = ("launch", "accelerate-launch", "accelerate.commands.launch")


@dataclass(frozen=True)
class Launcher:
    """The `accelerate launch` process above this one: its id, its options, the processes it was asked for."""

    pid: int
    options: tuple[str, ...]
    processes: int

    @property
    def quiet(self) -> bool:
        return bool({"-q", "--quiet"} & set(self.options))


def find_launcher() -> Launcher | None:
    """The parent process, if it is `accelerate launch`."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    names = [os.path.basename(word).removesuffix(".exe").removesuffix(".py") for word in words]
    # `accelerate launch`, `accelerate-launch`, `python -m accelerate.commands.launch` and the like
    begin = next((i for i, name in enumerate(names[:5]) if name in LAUNCH_WORDS), None)
    if begin is None or not any("accelerate" in word for word in words[:4]):
        return None
    own = [os.path.basename(word).removesuffix(".py") for word in sys.argv[:1]]
    end = names.index(own[0]) if own and own[0] in names else len(words)  # what follows is for the script
    options = [word for word in words[begin + 1 : end] if word not in ("-m", "--module")]
    return Launcher(os.getppid(), tuple(options), _count_processes(options))


def parent_to_watch() -> int | None:
    """The id of the launcher whose end means to stop; None where the parent is somebody's shell."""
    if COMMAND in os.environ:
        return os.getppid()
    launcher = find_launcher()
    return launcher.pid if launcher else None


def seconds_since_launch() -> float:
    """Seconds since the launcher of this process was started, or the process itself where it has none."""
    import psutil

    return max(0.0, time.time() - psutil.Process(parent_to_watch() or os.getpid()).create_time())


def say_waiting(what: str) -> None:
    """Say what comes next, on the main process and with the time since the launch, before what may take seconds."""
    if os.environ.get("RANK", "0") == "0":
        print(f"start {seconds_since_launch():6.1f} s  {what}", flush=True)


def keep_compiled_code() -> None:
    """
    Keep what torch.compile makes in the user's cache (~/.cache/torch/inductor), so that the next run starts faster.

    torch's own choice is the folder for temporary files, which a reboot empties. TORCHINDUCTOR_CACHE_DIR, where it is
    set, stays in force. Triton's kernels go below either: where torch compiles in the run it puts them there, where it
    finds all compiled it does not, and our own kernels would be made once more. To be called before torch is imported.
    """
    home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    folder = Path(home).expanduser() / "inductor"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):  # a home that cannot be written to: the temporary folder, then
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "triton"))
    # Without it the loss, an autograd function of our own, would keep the whole model out of AOTAutograd's cache.
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")


def own_command() -> str:
    """The command line that started this run, ready for a shell."""
    if COMMAND in os.environ:
        return os.environ[COMMAND]
    launcher = find_launcher()
    start = ["accelerate", "launch", *launcher.options] if launcher else ["python"]
    return shlex.join([*start, *sys.argv])


def _count_processes(options: list[str]) -> int:
    values = {}
    for position, word in enumerate(options):
        following = options[position + 1] if position + 1 < len(options) else ""
        name, _, value = word.partition("=")
        values[name.replace("-", "_").strip("_")] = value or following
    count = values.get("num_processes")
    if count is None and "config_file" in values:
        try:
            with open(values["config_file"], encoding="utf-8") as file:
                count = (yaml.safe_load(file) or {}).get("num_processes")
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            pass
    return int(count) if str(count).isdigit() else 1


def start_cpu_processes() -> int | None:
    """
    Start the ranks that `accelerate launch --cpu --num_processes N` was asked for, and wait for them.

    Returns their exit code, or None when this process is to do the work itself. The first rank that fails ends the
    others; Ctrl+C and SIGTERM are passed on.
    """
    if "WORLD_SIZE" in os.environ or os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return None
    launcher = find_launcher()
    if launcher is None or launcher.processes < 2:
        return None
    if os.environ.get("MASTER_ADDR", "127.0.0.1") not in ("127.0.0.1", "localhost"):
        raise UserError("CPU processes on several machines need torchrun: see configs/accelerate/ddp.yaml")
    count = launcher.processes
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {
        COMMAND: own_command(),
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    print(f"starting {count} processes on the CPU", flush=True)
    ranks: list[subprocess.Popen] = []
    passed: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        passed.append(number)
        if os.name == "nt":
            return  # the console sends Ctrl+C to the ranks itself
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    with startup.signals_blocked():
        startup.hand_over()
        for number in startup.SIGNALS:
            signal.signal(number, pass_on)
    for rank in range(count):
        settings = {key: str(value) for key, value in world.items()} | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with startup.signals_blocked():  # until the rank can take them
            ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | settings))
            for number in passed:
                ranks[-1].send_signal(number)
    return _wait_for(ranks, launcher, pass_on)


def _wait_for(ranks: list[subprocess.Popen], launcher: Launcher, pass_on: Callable) -> int:
    alone = False
    while any(process.poll() is None for process in ranks):
        failed = [process.returncode for process in ranks if process.poll()]
        if failed:
            time.sleep(2)  # the others may be about to say the same
            for process in ranks:
                if process.poll() is None:
                    process.kill()
        if not alone and os.getppid() != launcher.pid:
            alone = True
            pass_on(signal.SIGTERM, None)
        time.sleep(0.1)
    code = next((process.returncode for process in ranks if process.returncode), 0)
    return code if code >= 0 else 128 - code


def run(main: Callable[[], int | None]) -> NoReturn:
    """`run_main`, with Ctrl+C for this process alone, and a word on the traceback accelerate prints below an error."""
    startup.leave_on_signals()
    launcher = find_launcher()
    if launcher is not None:
        take_terminal(launcher.pid)
    try:
        run_main(lambda: _alone(main))
    except SystemExit as end:
        if not end.code:
            startup.ignore()
        launcher = find_launcher() if end.code else None
        if launcher is not None and "TORCHELASTIC_RUN_ID" in os.environ:
            print("(What follows is torchrun's report of the exit code.)", file=sys.stderr, flush=True)
        elif launcher is not None and not launcher.quiet:
            print(
                "(What follows is accelerate's report of the exit code; `accelerate launch --quiet` leaves it out.)",
                file=sys.stderr,
                flush=True,
            )
        raise
    finally:
        give_terminal_back()
        startup.release()


def _alone(main: Callable[[], int | None]) -> int | None:
    """`main`; where it fails because another process of the run has ended, that is all it says."""
    try:
        return main()
    except Exception as error:
        if startup.leaving():  # on its way out the exit met a library that made another error of it
            return 0
        # gloo, NCCL and torch's store, in their words
        words = ("by peer", "Broken pipe", "remote process exited", "remote server shutdown")
        told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
        if "WORLD_SIZE" in os.environ and told:
            raise UserError("another process of this run has ended: see what it says, then --resume") from error
        raise
