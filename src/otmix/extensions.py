"""Losses and mixers of one's own: Python files that are run for what they register (`--import my_loss.py`)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from traceback import extract_tb

from otmix.errors import UserError

IMPORTED: dict[Path, str] = {}
"""The files run so far, so that further processes of the same run can do the same, and a hash of what each held."""


def import_files(files: Sequence[Path]) -> None:
    """Run Python files, once each, so that what they register is known. Raises UserError for what is no Python file,
    and for a file that fails.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    for file in files:
        path = file.resolve()
        if not path.is_file() or path.suffix != ".py":
            raise UserError(f"--import needs a Python file, there is none at {file}")
        if any(getattr(module, "__file__", None) == str(path) for module in [*sys.modules.values()]):
            IMPORTED.setdefault(path, hash_of(path))  # another file may have imported it
            continue
        name = _module_name(path)
        spec = spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None  # the suffix is .py
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            held = hash_of(path)
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            raise _failure(file, path, error) from error
        IMPORTED[path] = held


def hash_of(path: Path) -> str:
    """Sixteen hexadecimal digits that name what a file holds."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def hash_of_definition(kind: type) -> str | None:
    """What the imported files held that define a class and those it is derived from; None where there are none."""
    files = (getattr(sys.modules.get(base.__module__), "__file__", None) for base in kind.__mro__)
    held = [IMPORTED[Path(file)] for file in dict.fromkeys(files) if file is not None and Path(file) in IMPORTED]
    return "-".join(held) or None


def _module_name(path: Path) -> str:
    """A file's own name, by which others can import it too, unless that would hide another module (`statistics.py`)."""
    found = PathFinder.find_spec(path.stem)
    elsewhere = found is not None and found.origin != str(path)
    if path.stem in sys.modules or path.stem in sys.stdlib_module_names or elsewhere:
        return f"otmix_import_{hashlib.blake2b(bytes(path), digest_size=4).hexdigest()}_{path.stem}"
    return path.stem


def _failure(file: Path, path: Path, error: Exception) -> UserError:
    """What to say of an error in the file given as `file`: the last line of it that was reached, and the error."""
    lines = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == str(path)]
    text = str(error)
    if isinstance(error, SyntaxError):
        text = error.msg
        lines += [error.lineno] if error.filename == str(path) else []
    where = f" in line {lines[-1]}" if lines and lines[-1] else ""
    said = " ".join(text.split())
    return UserError(f"--import {file} fails{where}: {type(error).__name__}: {said}; mend the file")
