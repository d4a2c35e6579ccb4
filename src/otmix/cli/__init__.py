"""The command line: a command is a name and a typed function."""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from otmix import __version__
from otmix.cli import checking, commands, listings, preview
from otmix.cli.help import overview, page
from otmix.errors import UserError
from otmix.files import printable
from otmix.interrupts import end_with_parent, interruptible
from otmix.streams import nobody_listens, open_closed, silence, takes_all_letters, tell

COMMANDS: dict[str, Callable[..., int]] = {
    "train": commands.train,
    "compare": commands.compare,
    "evaluate": commands.evaluate,
    "predict": commands.predict,
    "data": listings.data,
    "preview": preview.preview,
    "methods": listings.methods,
    "check-method": checking.check_method,
}

STOPPED = 130
BAD_INPUT = 2
SHOWN = 120  # letters of a name that is too long


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code. 2 for what the user can mend (one sentence on stderr), 130 after Ctrl-C, SIGTERM
    or SIGHUP.
    """
    open_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows ? instead of a traceback
    end_with_parent()
    with interruptible():
        return _exit_code(sys.argv[1:] if argv is None else argv)


def _exit_code(argv: list[str]) -> int:
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, so that a closed pipe is noticed here
        return code
    except UserError as error:
        if _debugged():
            raise
        tell(f"otmix: {error}\n")
        return BAD_INPUT
    except KeyboardInterrupt:
        tell("\notmix: stopped\n")
        return STOPPED
    except OSError as error:
        if nobody_listens(error, sys.stdout):  # whoever read our output has seen enough
            silence(sys.stdout)
            return 0
        told = _of_a_path(error)
        if told is not None and not _debugged():
            tell(f"otmix: {told}\n")
            return BAD_INPUT
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        silence(sys.stdout)
        tell("otmix: the disk is full, so what was to be printed is lost; free some space\n")
        return BAD_INPUT


def _debugged() -> bool:
    return os.environ.get("OTMIX_DEBUG", "0") not in ("", "0")


def _of_a_path(error: OSError) -> str | None:
    """What to say of a path that the system refuses: even a question whether there is such a file fails below a folder
    that one may not enter, and with a name that is too long. None where the error is another one.
    """
    if not isinstance(error.filename, str | bytes):
        return None
    path = os.fsdecode(error.filename)
    name = printable(path)
    if error.errno in (errno.EACCES, errno.EPERM):
        closed = _not_to_be_entered(Path(path))
        if closed is None:
            said, right = f"{name} may not be read or written", "read and write it"
        else:
            said, right = f"{name} lies below {printable(str(closed))}, a folder that may not be entered", "enter it"
        return f"{said} ({error.strerror}); give yourself the right to {right}, or name another place"
    if error.errno == errno.ENAMETOOLONG:
        short = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
        return f"the name {short} is too long for the file system; give a shorter one"
    return None


def _not_to_be_entered(path: Path) -> Path | None:
    """The uppermost folder above `path` that keeps us out, if any."""
    for folder in reversed(path.parents):
        try:
            (folder / "any").lstat()  # whether it is there or not: asking is what takes the right to enter
        except PermissionError:
            return folder
        except OSError:
            pass
    return None


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview(COMMANDS, __version__))
        return 0
    if argv[0] in ("-V", "--version"):
        sys.stdout.write(f"otmix {__version__}\n")
        return 0
    name, *rest = argv
    function = COMMANDS.get(name)
    if function is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `otmix {close[0]}`?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {name}; {hint}")
    if any(word in ("-h", "--help") for word in rest):
        sys.stdout.write(page(name, function))
        return 0
    from otmix.cli.parsing import parse

    call = parse(name, function, rest)
    if call.print_config is not None:
        import yaml

        unicode = takes_all_letters(sys.stdout)
        sys.stdout.write(yaml.safe_dump(call.print_config, sort_keys=False, allow_unicode=unicode))
        return 0
    return function(*call.positional, **call.named)
