"""The command line: a command is a name and a typed function."""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Callable

from otmix import __version__
from otmix.cli import checking, commands, listings, preview
from otmix.cli.help import overview, page
from otmix.errors import UserError
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
        if os.environ.get("OTMIX_DEBUG", "0") not in ("", "0"):
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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        silence(sys.stdout)
        tell("otmix: the disk is full, so what was to be printed is lost; free some space\n")
        return BAD_INPUT


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
