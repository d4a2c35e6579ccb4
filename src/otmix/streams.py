"""stdout and stderr where nobody listens: closed from the beginning, as of a daemon, or left by who read them."""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import suppress
from typing import IO, Any, TextIO, cast


def open_closed() -> None:
    """Open the null device for those of stdin, stdout and stderr that are closed.

    Else Python has None in their place, and a file that is opened later gets their number, and what libraries print.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # else it is closed in the processes that we start
        setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115


def nobody_listens(error: OSError, stream: IO[str]) -> bool:
    """Whether a write failed because the reader of a pipe has gone, or the terminal has been closed."""
    if error.errno == errno.EPIPE:
        return True
    if sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None:
        return True  # so it is called there; of a name that no file may have, it comes with the name
    with suppress(OSError, ValueError):
        return error.errno == errno.EIO and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    return False


def silence(stream: IO[str]) -> None:
    """Let all that is written to it vanish, also what is left in its buffer when Python ends."""
    with suppress(OSError, ValueError):  # not every stream is a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class _Lasting:
    """A stream that goes on without a word when nobody listens any more."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.alone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if not self.alone:
            try:
                return self.stream.write(text)
            except OSError as error:
                self._leave(error)
        return len(text)

    def flush(self) -> None:
        if not self.alone:
            try:
                self.stream.flush()
            except OSError as error:
                self._leave(error)

    def _leave(self, error: OSError) -> None:
        if not nobody_listens(error, self.stream):
            raise error
        silence(self.stream)
        self.alone = True


def takes_all_letters(stream: TextIO) -> bool:
    """Not where its encoding has 256 of them, as files and pipes have on Windows."""
    return (stream.encoding or "utf-8").lower().startswith("utf")


def lasting(stream: TextIO) -> TextIO:
    """`stream` for whoever must go on when nobody reads it any more: what trains outlives what shows it."""
    # under rich's live displays, sys.stdout is one of its own around the real one
    return cast("TextIO", _Lasting(getattr(stream, "rich_proxied_file", stream)))


def tell(text: str) -> None:
    """Write to stderr, if anybody listens."""
    stream = lasting(sys.stderr)
    stream.write(text)
    stream.flush()
