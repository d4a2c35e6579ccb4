"""The settings of a part (a loss, a pixel rule, …), read off its constructor: name, type, default, meaning and source.

A part is added by writing it: what its constructor takes, with a default, can be set; what its docstring says of it
under `Args:` is what listings print, a source being what stands in parentheses at its end: `tau: strength (A's code:
1).`
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from otmix.errors import UserError

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Setting:
    """One setting: `kind` is its type (bool, int, float, str, a Literal of their values, or one of these or None)."""

    name: str
    kind: Any
    default: Value
    meaning: str
    source: str = ""

    @property
    def _types(self) -> tuple[Any, ...]:
        members = get_args(self.kind)
        return (self.kind,) if get_origin(self.kind) is Literal or not members else members

    @property
    def takes_none(self) -> bool:
        return NoneType in self._types

    @property
    def is_plain(self) -> bool:
        """Whether a text on the command line can say it."""
        plain = all(kind in (bool, int, float, str, NoneType) or get_origin(kind) is Literal for kind in self._types)
        return plain and self._types != (NoneType,)

    def convert(self, value: object, shown: str | None = None) -> Value:
        """A value as it was typed (a text, or what YAML made of it) in this setting's type. Raises UserError that names
        it as `shown`.
        """
        text = str(value).strip()
        for kind in self._types:
            if kind is NoneType and (value is None or text.lower() == "none"):
                return None
            if get_origin(kind) is Literal:
                members: dict[str, Value] = {_as_typed(member): member for member in get_args(kind)}
                if (said := text if isinstance(value, str) else _as_typed(value)) in members:
                    return members[said]
            if kind is bool and text.lower() in ("true", "false", "yes", "no", "on", "off"):
                return text.lower() in ("true", "yes", "on")
            if kind is str and value is not None:
                return text
            if kind in (int, float) and not isinstance(value, bool):
                try:
                    number = int(text) if kind is int else float(text)
                except ValueError:
                    continue
                if kind is int and abs(number) >= 2**63:  # which no tensor holds
                    raise UserError(f"{shown or self.name} must be a whole number below 2^63, it is {value}")
                return number
        raise UserError(f"{shown or self.name} must be {self.describe()}, it is {value}")

    def describe(self) -> str:
        """The allowed values in words."""
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "none"}
        named = [
            "one of " + ", ".join(map(_as_typed, get_args(kind))) if get_origin(kind) is Literal else words[kind]
            for kind in self._types
        ]
        return " or ".join(named)


def _as_typed(value: object) -> str:
    """A value of a Literal as a user types it: true, none, 2."""
    return value if isinstance(value, str) else str(value).lower()


def settings_of(part: Callable[..., Any], hidden: Collection[str] = ("counts",)) -> dict[str, Setting]:
    """The settings of a class or function by name: its parameters that have a default, but for the `hidden` ones and
    those of other types. One without annotation has the type of its default.
    """
    import docstring_parser  # jsonargparse brings it; only listings and settings that are given need it

    initialiser = part.__init__ if inspect.isclass(part) else part
    hints = _hints(initialiser)
    parsed = docstring_parser.parse(inspect.getdoc(part) or "", docstring_parser.DocstringStyle.GOOGLE)
    said = {found.arg_name: _meaning_and_source(found.description or "") for found in parsed.params}
    found = (
        Setting(name, hints.get(name, type(parameter.default)), parameter.default, *said.get(name, ("", "")))
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.default is not parameter.empty and name not in hidden
    )
    return {setting.name: setting for setting in found if setting.is_plain}


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by parameter, without those whose names cannot be found, as of an import for type checkers alone."""
    try:
        return get_type_hints(function)
    except NameError:
        known, found = getattr(function, "__globals__", {}), dict[str, Any]()
        for name, hint in inspect.get_annotations(function).items():
            with suppress(NameError):
                found |= get_type_hints(SimpleNamespace(__annotations__={name: hint}), known)
        return found


def _meaning_and_source(description: str) -> tuple[str, str]:
    text = " ".join(description.split())
    found = re.fullmatch(r"(.+?) \(([^()]+)\)\.?", text)
    return (found[1], found[2]) if found else (text, "")


def chosen(part: Callable[..., Any], given: Mapping[str, object], group: str) -> dict[str, Value]:
    """Those of `given`, keyed "group.name", that are settings of `part`, in their types: keyword arguments for it."""
    settings = settings_of(part) if any(key.startswith(f"{group}.") for key in given) else {}
    return {
        name: setting.convert(given[f"{group}.{name}"], f"--set.{group}.{name}")
        for name, setting in settings.items()
        if f"{group}.{name}" in given
    }
