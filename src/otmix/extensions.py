"""Losses and mixers of one's own: Python files that are run for what they register (`--import my_loss.py`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from otmix.errors import UserError

IMPORTED: list[Path] = []
"""The files run so far, so that further processes of the same run can do the same."""


def import_files(files: Sequence[Path]) -> None:
    """Run Python files, once each, so that what they register is known. Raises UserError for what is no Python file."""
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
        spec.loader.exec_module(module)
        IMPORTED.append(path)
