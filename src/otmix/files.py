"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin

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
        _replace(temporary, path)
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


BUSY_SECONDS = 2.0 if sys.platform == "win32" else 0.0
"""For so long a file is tried again that may not be replaced. Windows does not allow it while another process looks at
the file, as a virus scanner or a backup does for a moment.
"""


def _replace(temporary: Path, path: Path) -> None:
    ends = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return os.replace(temporary, path)  # noqa: PTH105 (the tests stop the process on either side of this call)
        except PermissionError:
            if time.monotonic() >= ends or path.is_dir():
                raise
            time.sleep(0.05)


def make_folder_of(path: Path, flag: str = "--out") -> None:
    """Make the folder of `path`, which `flag` names. Raises UserError where there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(path, error, flag) from error


def _unwritten(path: Path, error: OSError | RuntimeError, flag: str = "--out") -> UserError:
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if error.errno == errno.EISDIR or (isinstance(error, PermissionError) and path.is_dir()):  # Windows: the latter
            return UserError(f"{path} is a folder; name a file with {flag}")
        # "File exists" is what mkdir says of a file in the place of a folder
        reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        return UserError(f"cannot write {path}: {reason}; choose another folder with {flag}")
    return UserError(
        f"the disk is full, so {path} was not written; what was there before is kept: free some space, then give the "
        "same command again, to train with --resume"
    )


def from_home(path: str) -> str:
    """A path as it was written, `~` in it being the user's home; `~nobody` stays what it is."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path's own raises for ~nobody)


def printable(name: str) -> str:
    """The name of a file as text: bytes of it that are no UTF-8 as `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def remove(path: Path) -> None:
    """Delete a file that is of no more use. On Windows it may stay where another process looks at it."""
    with suppress(PermissionError):
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what `write_atomic` was filling under `folder` when its process was killed."""
    for path in folder.rglob(".*.tmp"):
        remove(path)


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
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; restore it, or repeat the run") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not readable as JSON; was it edited? restore it, or repeat the run") from None


def read_object(path: Path, needed: Mapping[str, Any] = {}, optional: Mapping[str, Any] = {}) -> dict[str, Any]:
    """A JSON object that has what is `needed`, by key, and what is `optional` in its type where it is there.

    A type is a class, several in a tuple, `list[class]`, or a mapping as `needed` for an object in it. Raises UserError
    where the file is missing, not JSON, or not such an object.
    """
    value = read_json(path)
    wrong = "it must hold one JSON object" if not isinstance(value, dict) else _what_is_wrong(value, needed, optional)
    if wrong:
        raise UserError(f"{path} is damaged: {wrong}; restore it, or repeat the run")
    found: dict[str, Any] = value
    return found


def _what_is_wrong(value: dict[str, Any], needed: Mapping[str, Any], optional: Mapping[str, Any], at: str = "") -> str:
    """The first thing in words; "" where nothing is."""
    if missing := [f"{at}{key}" for key in needed if key not in value]:
        return f"it lacks {', '.join(missing)}"
    for key, kind in {**optional, **needed}.items():
        if key not in value:
            continue
        if isinstance(kind, Mapping) and isinstance(value[key], dict):
            if wrong := _what_is_wrong(value[key], kind, {}, f"{at}{key}."):
                return wrong
        elif isinstance(kind, Mapping) or not _is_a(value[key], kind):
            return f"its {at}{key} is not what otmix writes there"
    return ""


def _is_a(value: object, kind: Any) -> bool:
    """JSON knows no difference between 1 and 1.0, but one between true and 1; whole numbers must fit into 64 bits."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(one, get_args(kind)[0]) for one in value)
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return whole or (kind is float and isinstance(value, float))
    return isinstance(value, kind)
