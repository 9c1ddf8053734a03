"""How this process was started, starting the CPU processes that accelerate does not start, and how a run ends.

`accelerate launch --cpu --num_processes N` runs the script once and forgets N, unless MPI is configured
(huggingface/accelerate issue 2741); here the script starts its N ranks itself.

Ctrl+C and SIGTERM: before training nothing can be lost, so the run ends at once, in one line and with exit code 0.
From then on `callbacks.StopSignals` finishes the step and saves.
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

from creature.errors import UserError, run_main
from creature.terminal import give_terminal_back, take_terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Set for the processes that this module starts: the command that started them all.
COMMAND = "CREATURE_COMMAND"
LAUNCH_WORDS = ("launch", "accelerate-launch", "accelerate.commands.launch")
# What gloo, NCCL and torch's store say when another process is gone.
LOST_PROCESS = ("by peer", "Broken pipe", "remote process exited", "remote server shutdown")
LOST_PROCESS_MESSAGE = "another process of this run has ended: see what it says, then --resume"

_interrupted = False


@dataclass(frozen=True)
class Launcher:
    """The `accelerate launch` process above this one: its id, its options, the processes it was asked for."""

    pid: int
    options: tuple[str, ...]
    processes: int


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
    own = os.path.basename(sys.argv[0]).removesuffix(".py")
    end = names.index(own) if own in names else len(words)  # what follows is for the script
    options = [word for word in words[begin + 1 : end] if word not in ("-m", "--module")]
    return Launcher(os.getppid(), tuple(options), _count_processes(options))


def _count_processes(options: list[str]) -> int:
    values = {}
    for position, word in enumerate(options):
        following = options[position + 1] if position + 1 < len(options) else ""
        name, _, value = word.partition("=")
        values[name.replace("-", "_").strip("_")] = value or following
    count = values.get("num_processes")
    if count is None and "config_file" in values:
        with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
            with open(values["config_file"], encoding="utf-8") as file:
                count = (yaml.safe_load(file) or {}).get("num_processes")
    return int(count) if str(count).isdigit() else 1


def parent_to_watch() -> int | None:
    """The id of the launcher whose end stops the run; None where the parent is somebody's shell."""
    if COMMAND in os.environ:
        return os.getppid()
    launcher = find_launcher()
    return launcher.pid if launcher else None


def own_command() -> str:
    """The command line that started this run, quoted for a shell."""
    if COMMAND in os.environ:
        return os.environ[COMMAND]
    launcher = find_launcher()
    start = ["accelerate", "launch", *launcher.options] if launcher else ["python"]
    return shlex.join([*start, *sys.argv])


def seconds_since_launch() -> float:
    """Seconds since the launcher of this process was started, or the process itself where it has none."""
    import psutil

    return max(0.0, time.time() - psutil.Process(parent_to_watch() or os.getpid()).create_time())


def say_waiting(what: str) -> None:
    """Print what comes next with the time since the launch, on the main process, before what may take seconds."""
    if os.environ.get("RANK", "0") == "0":
        print(f"start {seconds_since_launch():6.1f} s  {what}", flush=True)


def keep_compiled_code() -> None:
    """
    Let torch.compile cache its code in the user's cache (~/.cache/torch/inductor), so that the next run starts faster.

    torch's default is the folder for temporary files, which a reboot empties. TORCHINDUCTOR_CACHE_DIR overrides it.
    Triton's kernels go below it too: torch moves its Triton cache there only in a process that compiles, so a run that
    finds everything compiled would build our own kernels again. Call it before torch is imported.
    """
    home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    folder = Path(home).expanduser() / "inductor"
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):  # a home that cannot be written to: torch's default remains
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "triton"))
    # AOTAutograd caches a model with an autograd function of its own, as our loss is, only when this allows it.
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")


def start_cpu_processes() -> int | None:
    """
    Start the ranks that `accelerate launch --cpu --num_processes N` was asked for, and wait for them.

    Returns the exit code of the first that failed or 0, or None when this process is to do the work itself. The first
    rank that fails ends the others; Ctrl+C, SIGTERM and the end of the launcher are passed on.
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
    world = {COMMAND: own_command(), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    print(f"starting {count} processes on the CPU", flush=True)
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame: object = None) -> None:
        for process in ranks if os.name != "nt" else []:  # a Windows console sends Ctrl+C to the ranks itself
            if process.poll() is None:
                process.send_signal(number)

    _block_signals(True)  # the ranks inherit this: a signal waits until they, and this process, can handle it
    for rank in range(count):
        settings = {key: str(value) for key, value in world.items()} | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=os.environ | settings))
    set_handlers(pass_on)
    _block_signals(False)
    launcher_runs = True
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            time.sleep(2)  # the others may be about to end with the same message
            for process in ranks:
                process.kill()
        if launcher_runs and os.getppid() != launcher.pid:
            launcher_runs = False
            pass_on(signal.SIGTERM)
        time.sleep(0.1)
    code = next((process.returncode for process in ranks if process.returncode), 0)
    return code if code >= 0 else 128 - code


def set_handlers(handler: Callable | int) -> dict[int, object]:
    """Handle Ctrl+C and SIGTERM by `handler` and return the handlers before, {} where this is not the main thread."""
    with contextlib.suppress(ValueError):
        return {number: signal.signal(number, handler) for number in SIGNALS}
    return {}


def interrupt_on_signals() -> None:
    """Let the first Ctrl+C or SIGTERM raise KeyboardInterrupt and ignore further ones, until StopSignals takes over."""
    set_handlers(_interrupt)


def _block_signals(block: bool) -> None:
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(signal.SIG_BLOCK if block else signal.SIG_UNBLOCK, SIGNALS)


def was_interrupted() -> bool:
    """Whether a signal has come; a library may have swallowed its KeyboardInterrupt or raised another error for it."""
    return _interrupted


def _interrupt(number: int, frame: object) -> None:
    global _interrupted
    if not _interrupted:  # further ones, perhaps the same passed on by a launcher, must not disturb the cleaning up
        _interrupted = True
        raise KeyboardInterrupt


def run(main: Callable[[], int | None]) -> NoReturn:
    """`run_main` with the signals of the start, the terminal, and a word on accelerate's traceback below an error."""
    interrupt_on_signals()
    launcher = find_launcher()
    if launcher is not None:
        take_terminal(launcher.pid)
    try:
        run_main(lambda: _run_until_interrupted(main))
    except SystemExit as end:
        if not end.code:
            set_handlers(signal.SIG_IGN)  # the run is over: a late signal would only change its exit code
        elif launcher is not None and not {"-q", "--quiet"} & set(launcher.options):
            hint = "" if "TORCHELASTIC_RUN_ID" in os.environ else "; `accelerate launch --quiet` leaves it out"
            print(f"(Below is accelerate's report of the exit code{hint}.)", file=sys.stderr, flush=True)
        raise
    finally:
        give_terminal_back()


def _run_until_interrupted(main: Callable[[], int | None]) -> int | None:
    try:
        _block_signals(False)  # start_cpu_processes starts its ranks with them blocked; one that waits is raised here
        return main()
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or _interrupted:
            if os.environ.get("RANK", "0") == "0":
                print("stopped before the first step: nothing is lost", file=sys.stderr, flush=True)
            return 0
        lost = isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PROCESS)
        if "WORLD_SIZE" in os.environ and lost:
            raise UserError(LOST_PROCESS_MESSAGE) from error
        raise
