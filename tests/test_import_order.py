"""Imports between the modules of otmix run downwards only, so that any layer can be read without the ones above it."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

import otmix

ROOT = Path(otmix.__file__).parent

# A module may import those before it, and what lies in its own package. Imports inside functions and under
# TYPE_CHECKING count too. `reports` stands before `training`, which writes the page and the pictures of a run; it
# reads only plain values and the files of a run directory. `protocols` holds plain values, of which OTMixer takes its
# defaults.
LAYERS = [
    ["errors", "wording", "files", "streams", "interrupts"],
    ["extensions", "randomness", "devices", "types", "counting", "settings", "protocols", "datanames"],
    ["transport", "sampling", "mixing", "losses", "models", "data"],
    ["costs", "confusion", "pairing", "mixer", "own_loop", "evaluation"],
    ["methods", "config", "config_file"],
    ["reports"],
    ["training"],
    ["inference", "experiments"],
    ["display", "cli"],
    ["__main__"],
]
ORDER = [module for layer in LAYERS for module in layer]
FOR_OWN_LOOPS = {module for layer in LAYERS[:4] for module in layer}
FILES = sorted(ROOT.rglob("*.py"))


def imported(source: str) -> set[str]:
    """Dotted names of all modules (or names in modules) that a source file imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a file of `module`, the first name below otmix."""
    wrong = []
    for name in sorted(imported(source)):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "lightning" and module in FOR_OWN_LOOPS:
            wrong.append(f"{module} is for anyone's own loop and imports {name}")
        if package != "otmix" or target in (module, "__version__"):
            continue
        if target not in ORDER:
            wrong.append(f"{module} imports {name}, which is no module of the order")
        elif ORDER.index(target) > ORDER.index(module):
            wrong.append(f"{module} imports {name}, which stands above it")
    return wrong


def test_contributing_has_the_same_order() -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
    rows = [row.split("|")[1] for row in guide.splitlines() if row.startswith("| `")]
    told = [[name.rstrip("/") for name in re.findall(r"`([a-z_]+/?)`", row)] for row in rows]
    assert sorted(name for row in told for name in row) == sorted(set(ORDER) - {"__main__"})
    layer = {module: number for number, modules in enumerate(LAYERS) for module in modules}
    layers = [[layer[name] for name in row] for row in told]
    assert all(max(above) <= min(below) for above, below in pairwise(layers))


def module_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    module = module_of(file)
    if file == ROOT / "__init__.py":  # the public names of all layers; test_lazy_imports shows that it loads none
        return
    assert module in ORDER, f"{module} has no place in the order yet"
    assert violations(module, file.read_text("utf-8")) == []


def test_order_names_what_is_there() -> None:
    assert sorted(ORDER) == sorted({module_of(file) for file in FILES} - {"__init__"})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pairing", "from otmix.config import RunConfig"),
        ("losses", "import otmix.training.loop"),
        ("types", "from otmix import errors, cli"),
        ("models", "from lightning.fabric import Fabric"),
        ("costs", "def late():\n    from otmix.mixer import BatchMixer"),
        ("data", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from otmix.training import Run"),
        ("config", "from otmix.nowhere import thing"),
    ],
)
def test_upward_imports_are_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_downward_imports_are_allowed() -> None:
    source = (
        "from otmix import __version__\nfrom otmix.cli.help import page\nfrom otmix.types import Items\nimport torch"
    )
    assert violations("cli", source) == []
    assert violations("training", "from lightning.fabric import Fabric\nfrom otmix.reports import figures") == []


def test_only_one_place_copies_without_waiting() -> None:
    """On MPS `non_blocking=True` can give a tensor freed memory; `devices.move` knows where it is safe."""
    assert [file.name for file in FILES if "non_blocking=True" in file.read_text("utf-8")] == ["devices.py"]
