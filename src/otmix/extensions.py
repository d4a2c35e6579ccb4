"""Losses and mixers of one's own: Python files that are run for what they register (`--import my_loss.py`)."""

from __future__ import annotations

import ast
import hashlib
import linecache
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from traceback import extract_tb

from otmix.errors import UserError

IMPORTED: dict[Path, None] = {}
"""The files run so far, in order, so that further processes of the same run can do the same."""

UNKNOWN = "unknown"
"""Stands for the hash of a class whose source cannot be read."""

_DEFINED: dict[type, str | None] = {}
_NOT_OWN = frozenset({"otmix", "torch", *sys.stdlib_module_names})


def import_files(files: Sequence[Path]) -> None:
    """Run Python files, once each, so that what they register is known. What lies beside them can be imported, as it
    could if Python ran them; modules of the same name elsewhere come first. Raises UserError for what is no Python
    file, and for a file that fails.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    for file in files:
        path = file.resolve()
        if not path.is_file() or path.suffix != ".py":
            raise UserError(f"--import needs a Python file, there is none at {file}")
        if any(getattr(module, "__file__", None) == str(path) for module in [*sys.modules.values()]):
            IMPORTED[path] = None  # another file may have imported it
            continue
        name = _module_name(path)
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        spec = spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None  # the suffix is .py
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            raise _failure(file, path, error) from error
        IMPORTED[path] = None


def hash_of(path: Path) -> str:
    """Sixteen hexadecimal digits that name what a file holds."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def hash_of_definition(kind: type) -> str | None:
    """What defines a class and those it is derived from, as it was when this was first asked (on registering): hashes
    of their files and of the modules beside these that they import; of the class alone where it is in no file but was
    typed into a notebook; `UNKNOWN` where its source cannot be read. None for what is part of otmix.
    """
    if kind not in _DEFINED:
        _DEFINED[kind] = _hash_now(kind)
    return _DEFINED[kind]


def _hash_now(kind: type) -> str | None:
    held: dict[str, None] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _NOT_OWN:
            continue
        name = getattr(sys.modules.get(base.__module__), "__file__", None)
        if name is not None and Path(name).is_file():
            held |= dict.fromkeys(map(hash_of, _with_neighbours(Path(name).resolve())))
        else:
            text = _typed_in(base)
            held[UNKNOWN if text is None else hashlib.blake2b(text.encode(), digest_size=8).hexdigest()] = None
    return UNKNOWN if UNKNOWN in held else "-".join(held) or None


def is_again(new: object, known: type) -> bool:
    """Whether a class is `known` defined once more: a cell of a notebook that was run again, a module reloaded."""
    return isinstance(new, type) and (new.__module__, new.__qualname__) == (known.__module__, known.__qualname__)


def _with_neighbours(path: Path) -> list[Path]:
    """A file, and the modules in its folder or below that it imports, or that these import."""
    found = [path]
    for file in found:  # which grows meanwhile
        found += [beside for beside in dict.fromkeys(_imported_beside(file, path.parent)) if beside not in found]
    return found


def _imported_beside(file: Path, folder: Path) -> Iterator[Path]:
    """The files in `folder` or below that the import statements of a file mean, wherever in it they stand."""
    try:
        tree = ast.parse(file.read_bytes()) if file.suffix == ".py" else None
    except (SyntaxError, ValueError):
        tree = None
    for node in [] if tree is None else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files_of(alias.name.split("."), folder, None)
        elif isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1] if node.level else None
            if start is None or start == folder or folder in start.parents:
                for alias in node.names:
                    yield from _files_of([*(node.module or "").split("."), alias.name], folder, start)


def _files_of(parts: list[str], folder: Path, start: Path | None) -> Iterator[Path]:
    """The files of a module and of the packages around it. `start`: where a relative name begins."""
    parts = [part for part in parts if part]
    if start is None and parts[0] == folder.name and (folder / "__init__.py").is_file():
        parts = parts[1:]  # the folder is itself a package, here by its own name
    elif start is None and not _is_found_in(folder, parts[0]):
        return
    place = start or folder
    for part in parts:
        place /= part
        for file in (place.with_name(f"{part}.py"), place / "__init__.py"):
            if file.is_file():
                yield file


def _is_found_in(folder: Path, name: str) -> bool:
    """Whether `import name` in a file of this folder means what is in it, not another module of that name."""
    if name in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is None or folder in Path(file).resolve().parents


def _typed_in(kind: type) -> str | None:
    """The source of a class of a notebook, which keeps what was typed by the names of files that its functions have;
    None where it is not kept.
    """
    for member in vars(kind).values():
        code = getattr(getattr(member, "__func__", member), "__code__", None)
        if code is None:
            continue
        lines = linecache.getlines(code.co_filename)
        try:
            nodes = [*ast.walk(ast.parse("".join(lines)))]
        except SyntaxError:
            continue
        for node in nodes:
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if first <= code.co_firstlineno <= (node.end_lineno or first):
                    return "".join(lines[first - 1 : node.end_lineno])
    return None


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
