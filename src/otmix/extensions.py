"""Losses and mixers of one's own: Python files that are run for what they register (`--import my_loss.py`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from traceback import extract_tb

from otmix.errors import UserError

IMPORTED: list[Path] = []
"""The files run so far, so that further processes of the same run can do the same."""


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
            continue
        spec = spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None  # the suffix is .py
        module = module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[path.stem]
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            raise _failure(file, path, error) from error
        IMPORTED.append(path)


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
