"""Being asked to stop: by Ctrl-C, SIGTERM, a terminal that is closed, or the end of the process that began us."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ECHO_SECONDS = 0.2
"""Within this time a second Ctrl-C is the first one again: a terminal sends it to us and to the process that started
us.
"""
ECHO_OF_OTHERS_SECONDS = 5.0
"""The same for SIGTERM and SIGHUP: what has begun to end is left in peace."""
_AGAIN_SECONDS = 0.05

PARENT_ON_STDIN = "OTMIX_PARENT_ON_STDIN"
"""Environment variable by which a process that we start learns that its stdin ends when we do (`end_with_parent`)."""


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop. SIGHUP is none where it is ignored, as under nohup."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # not on Windows
        found.append(signal.SIGHUP)
    return found


@contextmanager
def interruptible() -> Iterator[None]:
    """Raises KeyboardInterrupt within when a signal asks to stop, so that whatever is half-written goes.

    Never in the midst of an import, but when it is over: a library that catches the interruption and imports again
    would fail with anything. Handlers that somebody else has set are left alone, and so are ignored signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be caught in the main thread
        return
    outermost = sys._getframe(2)  # whoever wrote `with`: between it and us lies contextlib
    main_thread, ended, raised_at = threading.get_ident(), False, float("-inf")

    def later(number: signal.Signals) -> None:
        time.sleep(_AGAIN_SECONDS)
        if ended:
            return
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main_thread, number)
        else:  # on Windows
            _thread.interrupt_main(number)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal raised_at
        if _importing(frame, outermost):
            # not by threading, whose locks we may have interrupted
            _thread.start_new_thread(later, (signal.Signals(number),))
            return
        now = time.monotonic()
        if now - raised_at > (ECHO_SECONDS if number == signal.SIGINT else ECHO_OF_OTHERS_SECONDS):
            raised_at = now
            raise KeyboardInterrupt

    untouched = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in stop_signals() if (handler := signal.getsignal(number)) in untouched}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        ended = True
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing(frame: FrameType | None, outermost: FrameType) -> bool:
    while frame is not None and frame is not outermost:
        if frame.f_code.co_name == "_find_and_load" and frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def end_with_parent() -> None:
    """Where `PARENT_ON_STDIN` is set, send this process a SIGTERM when stdin ends: a process that is killed at once
    cannot say it to those that it has started, but the system closes its pipes.
    """
    if os.environ.pop(PARENT_ON_STDIN, None) is None:
        return
    # On Windows what is started with a pipe that somebody is reading hangs (github.com/python/cpython/issues/78961), so
    # others get an empty stdin.
    pipe, null = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def watch() -> None:
        while os.read(pipe, 1024):
            pass
        if sys.platform == "win32":  # where `kill` ends a process before it can save
            signal.raise_signal(signal.SIGTERM)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    _thread.start_new_thread(watch, ())
