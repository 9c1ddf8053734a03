"""Ctrl+C under `accelerate launch`: the terminal's keys go to the training process, as a shell gives them to a job.

A terminal sends Ctrl+C to its foreground process group, which holds accelerate too, and accelerate dies of it with a
traceback and another exit code while the run still saves. So a run becomes the foreground group for as long as it
lasts: it alone gets Ctrl+C, saves, ends with 0, and accelerate ends with it. Ctrl+Z is passed on, so that the shell
sees it. Where there is no terminal, where the run is in the background, and on Windows, nothing is changed.
"""

import contextlib
import os
import signal
import time

_terminal: int | None = None
_former_group = 0
_owner = 0


def take_terminal(launcher_pid: int) -> bool:
    """Become the foreground process group of the terminal that the launcher holds; whether that was done."""
    global _terminal, _former_group, _owner
    if not hasattr(os, "tcsetpgrp") or _terminal is not None:
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        return False
    _former_group, _owner = os.getpgrp(), os.getpid()
    try:
        if os.tcgetpgrp(terminal) != _former_group or os.getpgid(launcher_pid) != _former_group:
            raise OSError("not in the foreground together with the launcher")
        os.setpgid(0, 0)
        _set_foreground(terminal, _owner)
        signal.signal(signal.SIGTSTP, lambda number, frame: _suspend(launcher_pid))
    except (OSError, ValueError):
        os.close(terminal)
        return False
    _terminal = terminal
    return True


def give_terminal_back() -> None:
    """Undo `take_terminal`, where it was done and this process still is the foreground; before the process ends."""
    global _terminal
    if _terminal is None or os.getpid() != _owner:
        return
    with contextlib.suppress(OSError):
        if os.tcgetpgrp(_terminal) == _owner:
            _set_foreground(_terminal, _former_group)
        os.close(_terminal)
    _terminal = None


def _set_foreground(terminal: int, group: int) -> None:
    """tcsetpgrp; a background process that calls it would be stopped by SIGTTOU."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        os.tcsetpgrp(terminal, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _suspend(launcher_pid: int) -> None:
    """Ctrl+Z: stop the launcher's group, which the shell watches, rest until the shell continues it, and go on."""
    import psutil

    if _terminal is None or os.getpid() != _owner:  # a forked worker
        return
    with contextlib.suppress(OSError, psutil.Error):
        _set_foreground(_terminal, _former_group)
        os.killpg(_former_group, signal.SIGTSTP)
        time.sleep(0.2)
        while psutil.Process(launcher_pid).status() == psutil.STATUS_STOPPED:
            time.sleep(0.1)
        if os.tcgetpgrp(_terminal) == _former_group:  # `fg`, not `bg`
            _set_foreground(_terminal, _owner)
    os.killpg(_owner, signal.SIGCONT)  # our own children were stopped by the terminal
