"""Ctrl+C under `accelerate launch` reaches the training process alone, as a shell's job gets it.

A terminal sends Ctrl+C to its foreground process group. Accelerate is in it and dies of it with a traceback while the
run still saves. So a run makes itself the foreground group for as long as it lasts: it saves and ends with 0, and
accelerate ends with it. Without a terminal, in the background, and on Windows, nothing is changed.
"""

import contextlib
import os
import signal

_terminal: int | None = None
_launcher_group = 0


def take_terminal(launcher_pid: int) -> bool:
    """Become the foreground process group of the terminal that the launcher is in; returns whether that was done."""
    global _terminal, _launcher_group
    if not hasattr(os, "tcsetpgrp") or _terminal is not None:
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        return False
    _launcher_group = os.getpgrp()
    try:
        if os.tcgetpgrp(terminal) != _launcher_group or os.getpgid(launcher_pid) != _launcher_group:
            raise OSError("not in the foreground together with the launcher")
        # Ctrl+Z would stop this group alone, and the shell, which watches the launcher's, would wait for ever.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        os.setpgid(0, 0)
        _set_foreground(terminal, os.getpid())
    except (OSError, ValueError):
        os.close(terminal)
        return False
    _terminal = terminal
    return True


def give_terminal_back() -> None:
    """Undo `take_terminal` before the process ends, where this process still is the foreground group."""
    global _terminal
    if _terminal is not None:
        with contextlib.suppress(OSError):
            if os.tcgetpgrp(_terminal) == os.getpid():
                _set_foreground(_terminal, _launcher_group)
            os.close(_terminal)
        _terminal = None


def _set_foreground(terminal: int, group: int) -> None:
    """tcsetpgrp; SIGTTOU, which would stop a background process that calls it, is blocked meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        os.tcsetpgrp(terminal, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
