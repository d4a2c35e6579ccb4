"""What must start quickly imports nothing heavy, and the public names are what they say."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import otmix

HEAVY = {"torch", "torchvision", "lightning", "timm", "matplotlib", "sklearn", "scipy", "numpy", "PIL", "rich"}
LIST_MODULES = "; import json, sys; sys.stderr.write(json.dumps(sorted(sys.modules)))"


def run(code: str) -> tuple[str, set[str]]:
    """stdout of a fresh Python, and the packages it had imported at its end."""
    done = subprocess.run([sys.executable, "-c", code + LIST_MODULES], capture_output=True, text=True, check=True)
    return done.stdout, {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


def command(*argv: str) -> str:
    return f"from otmix.cli import main; assert main({list(argv)!r}) == 0"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import otmix", ""),
        (command("--version"), f"otmix {otmix.__version__}\n"),
        (command("--help"), "preview"),
        (command("train", "--help"), "--batch-size"),
        (command("train", "--print_config"), "batch_size: null"),
    ],
    ids=["import", "version", "help", "train help", "print_config"],
)
def test_light(code: str, said: str) -> None:
    output, packages = run(code)
    assert said in output
    assert "otmix" in packages
    assert packages & HEAVY == set()


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "otmix", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"otmix {otmix.__version__}\n"


def test_public_names_exist_and_are_loaded_on_use() -> None:
    for name in otmix.__all__:
        value = getattr(otmix, name)
        module = otmix._MODULES.get(name)
        assert module is None or value is getattr(importlib.import_module(f"otmix.{module}"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = otmix.nothing


def test_the_three_lists_of_public_names_agree() -> None:
    """One for type checkers, one for loading, one for `import *`."""
    tree = ast.parse(Path(otmix.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module.removeprefix("otmix.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert typed == otmix._MODULES
    assert set(otmix.__all__) == {*typed, "__version__"}
    assert len(otmix.__all__) == len(set(otmix.__all__))
    assert set(otmix.__all__) <= set(dir(otmix))
