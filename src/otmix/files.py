"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from otmix.errors import UserError


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it into place.

    Killed at any moment, `path` is the old file or the new one. Of a symbolic link the file is meant that it leads to;
    what is no regular file, such as /dev/null or a pipe, is written into. Raises UserError when the disk is full or the
    folder cannot be written; the old file stays.
    """
    make_folder_of(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        try:
            with path.open("wb") as stream:
                write(stream)
        except OSError as error:
            raise _unwritten(path, error) from error
        return
    if path.is_symlink():
        path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)  # noqa: PTH105 (the tests stop the process on either side of this call)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as a RuntimeError
        with suppress(OSError):  # nothing can be removed from a read-only file system, nor was anything written
            temporary.unlink(missing_ok=True)
        if (
            isinstance(error, RuntimeError)
            and "PytorchStreamWriter" not in str(error)
            and "unexpected pos" not in str(error)
        ):
            raise
        raise _unwritten(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder_of(path: Path, flag: str = "--out") -> None:
    """Make the folder of `path`, which `flag` names. Raises UserError where there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(path, error, flag) from error


def _unwritten(path: Path, error: OSError | RuntimeError, flag: str = "--out") -> UserError:
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if error.errno == errno.EISDIR:
            return UserError(f"{path} is a folder; name a file with {flag}")
        # "File exists" is what mkdir says of a file in the place of a folder
        reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        return UserError(f"cannot write {path}: {reason}; choose another folder with {flag}")
    return UserError(
        f"the disk is full, so {path} was not written; what was there before is kept: free some space, then give the "
        "same command again, to train with --resume"
    )


def printable(name: str) -> str:
    """The name of a file as text: bytes of it that are no UTF-8 as `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def remove_temporaries(folder: Path) -> None:
    """Delete what `write_atomic` was filling under `folder` when its process was killed."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    # a file name that is no UTF-8 keeps its bytes in Python's strings
    write_atomic(path, lambda stream: stream.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError when the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is {path.parent} the directory of an otmix run?") from None
    except ValueError:
        raise UserError(f"{path} is not readable as JSON; was it edited? restore it, or repeat the run") from None
