"""What a command takes, read off its typed function: one list for the parser, the help and the error messages.

Positional-only parameters are positional arguments, the others are flags. A `RunConfig` parameter is one flat flag for
each of its fields (`--batch-size`), with the settings of the protocol below `--set.`. Help texts come from docstrings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from otmix.config import RunConfig
from otmix.protocols import Protocol

GROUPS: dict[str, tuple[str, ...]] = {
    "data": (
        "data",
        "root",
        "imbalance",
        "max_per_class",
        "validation_per_class",
        "test_fraction",
        "image_size",
        "on_bad_image",
        "download",
    ),
    "method": ("method", "protocol", "set"),
    "model": ("backbone", "pretrained", "weights"),
    "training": (
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "weight_decay",
        "nesterov",
        "schedule",
        "warmup",
        "evaluate_every",
        "final_split",
        "many_above",
        "few_below",
        "seed",
    ),
    "machine": ("accelerator", "devices", "num_nodes", "precision", "compile", "workers"),
    "run": ("out", "resume", "checkpoint_minutes"),
}
"""The fields of RunConfig as help shows them."""

OWN = "arguments"
"""The group of what is no field of RunConfig."""

REQUIRED: Any = inspect.Parameter.empty
_METAVARS = {
    "root": "DIR",
    "out": "DIR",
    "run": "RUN",
    "weights": "FILE",
    "methods": "METHOD",
    "backbone": "NAME",
    "imports": "FILE",
}
_OF_TYPE = {int: "N", float: "X", str: "NAME", Path: "PATH"}


@dataclass(frozen=True)
class Only:
    """Annotates a `RunConfig` parameter: the fields that are flags of this command. A file may hold the others too."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Argument:
    """One argument. `key` is its name in Python and in files, "batch_size" or "set.alpha"."""

    key: str
    hint: Any
    default: Any
    help: str
    group: str = OWN
    positional: bool = False

    @property
    def option(self) -> str:
        """As it is typed: `--batch-size`."""
        if self.key == "imports":  # `import` is no name in Python
            return "--import"
        return "--" + (self.key if self.key.startswith("set.") else self.key.replace("_", "-"))

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.metavar if self.positional else self.option

    @property
    def several(self) -> bool:
        return get_origin(self.hint) is list

    @property
    def repeated(self) -> bool:
        """A flag that may be given several times."""
        return self.several and not self.positional

    @property
    def bare(self) -> Any:
        """The type of one value: without "or None", and of a list that of its members."""
        if self.several:
            return get_args(self.hint)[0]
        members = [member for member in get_args(self.hint) if member is not type(None)]
        return members[0] if type(None) in get_args(self.hint) else self.hint

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.bare) if get_origin(self.bare) is Literal else ()

    @property
    def switch(self) -> bool:
        """A flag without a value: `--resume`, `--no-resume`."""
        return self.bare is bool and not self.key.startswith("set.")

    @property
    def metavar(self) -> str:
        if self.key == "out" and self.bare is Path:  # of train a folder
            return "FILE"
        return _METAVARS.get(self.key) or "|".join(map(str, self.choices)) or _OF_TYPE.get(self.bare, self.key).upper()


def arguments_of(function: Callable[..., object]) -> list[Argument]:
    """All arguments of a command, its own first."""
    hints = get_type_hints(function, include_extras=True)
    texts = describe(function)[1]
    own: list[Argument] = []
    configured: list[Argument] = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint, shown = hints[name], None
        if get_origin(hint) is Annotated:
            hint, shown = get_args(hint)
        if hint is RunConfig:
            configured = list(_run_config(shown.names if shown else tuple(f.name for f in fields(RunConfig))))
        else:
            own.append(
                Argument(
                    name,
                    hint,
                    parameter.default,
                    texts.get(name, ""),
                    positional=parameter.kind is parameter.POSITIONAL_ONLY,
                )
            )
    return [*own, *configured]


def config_parameter(function: Callable[..., object]) -> str | None:
    """The name of the `RunConfig` parameter, where there is one."""
    for name, hint in get_type_hints(function).items():
        if hint is RunConfig:
            return name
    return None


def _run_config(shown: tuple[str, ...]) -> Iterator[Argument]:
    hints, texts = get_type_hints(RunConfig), describe(RunConfig)[1]
    defaults = {f.name: f.default for f in fields(RunConfig)}
    for group, names in GROUPS.items():
        for name in names:
            if name == "set" and name in shown:
                settings, meanings = get_type_hints(Protocol), {f.name: f.metadata["meaning"] for f in fields(Protocol)}
                for f in fields(Protocol):
                    yield Argument(f"set.{f.name}", settings[f.name] | None, None, meanings[f.name], group)
            elif name in shown:
                yield Argument(name, hints[name], defaults[name], texts[name], group)


def describe(documented: object) -> tuple[str, dict[str, str], str]:
    """A docstring in three: the text before its Args, what each argument means, and its Examples."""
    import docstring_parser

    found = docstring_parser.parse(inspect.getdoc(documented) or "", docstring_parser.DocstringStyle.GOOGLE)
    text = "\n\n".join(part for part in (found.short_description, found.long_description) if part)
    examples = "\n".join(example.description or "" for example in found.examples)
    return text, {parameter.arg_name: parameter.description or "" for parameter in found.params}, examples
