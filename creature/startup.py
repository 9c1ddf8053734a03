"""Ctrl+C or SIGTERM while a run starts: there is nothing to save yet, so it leaves with 0 and says so.

Nothing is imported here but the standard library, so that this is in force before anything that takes long to import.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading

from creature.terminal import give_terminal_back

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 3.0  # seconds for the main thread to leave by itself, which libraries in C may keep it from

_asked = ""  # the name of the signal that came
_wake: tuple[socket.socket, socket.socket] | None = None
_previous: dict[int, object] = {}


def leave_on_signals() -> None:
    """Leave at the first signal, until `hand_over`. Only a main thread can ask for that; elsewhere nothing is done."""
    global _wake
    if _wake is None:
        with contextlib.suppress(ValueError, OSError):
            _previous.update({number: signal.signal(number, _on_signal) for number in SIGNALS})
            ours, pythons = socket.socketpair()
            pythons.setblocking(False)
            signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
            _wake = (ours, pythons)
            threading.Thread(target=_watch, args=(ours,), daemon=True).start()
    unblock_signals()


def hand_over() -> None:
    """
    Give the signals back to whoever had them, for others to take; leaves where one has come already, whose exception a
    library has swallowed. To be called with `signals_blocked`, so that none falls between the two.
    """
    if _asked:
        sys.exit(0)
    release()


def release() -> None:
    """Give the signals back, unless the process is leaving because of one."""
    global _wake
    if _wake is not None and not _asked:
        signal.set_wakeup_fd(-1)
        _wake[1].close()
        _wake = None
        for number, handler in _previous.items():
            signal.signal(number, handler)


def leaving() -> bool:
    """Whether a signal has come that ends this process: what is raised from now on is of no interest."""
    return bool(_asked)


def ignore() -> None:
    """From now on this process only ends: what a signal would do is spoil its exit code."""
    with contextlib.suppress(ValueError):  # not the main thread
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def signals_blocked():
    """Keep signals waiting; a process that is started in here keeps its own until it calls `leave_on_signals`."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        unblock_signals()


def unblock_signals() -> None:
    """Take what `signals_blocked` has kept waiting."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _on_signal(number: int, frame: object) -> None:
    if not _asked:  # not because of a second one, perhaps the same passed on
        atexit.register(ignore)
        sys.unraisablehook = lambda unraisable: None  # from a destructor, nothing can be raised: `_watch` leaves then
        _say(number)
        sys.exit(0)


def _watch(wake: socket.socket) -> None:
    """Python writes the number of a signal here at once, also while the main thread waits in a library."""
    left = threading.Event()
    while numbers := wake.recv(64):
        asked = [number for number in numbers if number in SIGNALS]
        if asked:
            left.wait(PATIENCE)
            _say(asked[0])
            give_terminal_back()
            os._exit(0)
    wake.close()


def _say(number: int) -> None:
    global _asked
    if not _asked and os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        text = f"\n{name} before the first step: leaving; nothing was trained yet, so nothing is lost\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())
    _asked = signal.Signals(number).name
