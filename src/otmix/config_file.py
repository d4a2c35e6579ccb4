"""Settings in YAML: a file that a user wrote, or the config.yaml of a run. Both are read here, by the same rules.

YAML has surprises that are mended or refused: `1e-3` is a text to it, `1:30` is 90, and of two equal keys the last one
wins. Raises UserError everywhere, with a sentence that names the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.files import from_home
from otmix.protocols import Overrides, Protocol
from otmix.settings import Setting

PLACES = ("root", "out", "weights", "set.confusion_run")
"""Settings that name a file or folder though their type is a text."""

FILLED_IN = ("backbone", "image_size", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "schedule")
"""Settings that every run records at a value, though None is allowed before it begins."""


class Slip(yaml.YAMLError):
    """What YAML allows and nobody means."""


class _Loader(yaml.SafeLoader):
    """Plain values only, no key twice, and no number that is another one than it looks."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        assert isinstance(node, yaml.MappingNode)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, line) != line:
                raise Slip(f"sets {key.value} twice, in line {seen[key.value]} and in line {line}; keep one of them")
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        assert isinstance(node, yaml.ScalarNode)
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and not node.style and (":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value)):
            raise Slip(
                f"has {node.value} in line {node.start_mark.line + 1}, which is {yaml.safe_load(node.value)} in YAML; "
                "write the number that you mean, or put a text in quotes"
            )
        return node


def parse_yaml(text: str | bytes) -> Any:
    """The value of a text; bytes are UTF-8, or UTF-16 as PowerShell's `>` writes it. Raises YAMLError, of which `Slip`
    says what is wrong by itself, or ValueError.
    """
    return yaml.load(text, _Loader)


def read_values(
    file: Path, own: Collection[str] = (), *, command: str = "train", of_a_run: bool = False
) -> dict[str, Any]:
    """What a file sets, as YAML has it, by the keys of the settings: `epochs`, `set.alpha`, `set.loss.tau`. None
    is what a file calls null.

    `set: {loss.tau: 2}`, `set: {loss: {tau: 2}}` and `set.loss.tau: 2` are one. `own`: names beside those of
    `RunConfig`; `command`: the one that reads it. Raises UserError for a file that holds something else; for one
    `of_a_run`, in which no user misspells anything, a name that does not exist is taken for that of another version.
    """
    try:
        values = parse_yaml(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the configuration {file}: {error.strerror}") from None
    except Slip as error:
        raise UserError(f"{file} {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold settings as `name: value`, one a line")
    if not isinstance(values.get("set") or {}, dict):
        raise UserError(f"`set` in {file} must hold settings of the protocol, e.g. `set: {{alpha: 1}}`")
    found: dict[str, Any] = {}
    for key, value in _flat(values):
        _check_name(file, key, own, command, of_a_run)
        if key in found:
            raise UserError(f"{file} sets {key} twice, in two spellings; keep one of them")
        found[key] = value
    return found


def _flat(values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    of_protocol = {f.name for f in fields(Protocol)}
    for key, value in values.items():
        if key != "set":
            yield str(key), value
            continue
        for name, changed in (value or {}).items():
            if isinstance(changed, dict) and name not in of_protocol:  # of a part: loss: {tau: 2}
                yield from ((f"set.{name}.{of_part}", one) for of_part, one in changed.items())
            else:
                yield f"set.{name}", changed


def _check_name(file: Path, key: str, own: Collection[str], command: str, of_a_run: bool) -> None:
    of_protocol = {f"set.{f.name}" for f in fields(Protocol)}
    known = {f.name for f in fields(RunConfig)} - {"set"} | of_protocol | {*own}
    if key in known or re.fullmatch(r"set\.\w+\.\w+", key):
        return
    if of_a_run:
        raise of_another_version(file, key)
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
    if f"set.{key}" in known or re.fullmatch(r"(loss|mixer|model|rebalancing)\.\w+", key):
        hint = f"did you mean set.{key}?"
    elif key in ("set.loss", "set.mixer", "set.model", "set.rebalancing"):
        hint = f"the settings of a part have names of their own, e.g. `{key}.NAME: 2`"
    else:
        hint = f"did you mean {close[0]}?" if close else f"`otmix {command} --print_config` shows all there are"
    raise UserError(f"{file} sets {key}, which does not exist; {hint}")


def of_another_version(file: Path, key: str) -> UserError:
    """What to say of a name in a file of a run that does not exist here."""
    return UserError(
        f"{file.parent} was made by another version of otmix (its {file.name} has the setting {key}, which is unknown "
        "here); use that version, or restore the file if it was edited"
    )


def in_type(file: Path, key: str, hint: Any, value: Any) -> Any:
    """A value of a file, not None, in the type of its setting. Raises UserError where it has none in it."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if type(None) in get_args(hint) else [hint]
    kind, shown = kinds[0], f"`{key}` in {file}"
    if kind is bool and not isinstance(value, bool):
        raise UserError(f"{shown} must be true or false, it is {value!r}")
    if kind in (str, Path) and not isinstance(value, str):
        raise UserError(f"{shown} must be a text, it is {value}; put it in quotes")
    if kind is Path or key in PLACES:
        return kind(from_home(value))
    return value if kind is str else Setting(key, kind, None, "").convert(value, shown)


def of_a_part(key: str) -> bool:
    """Whether it is one like set.loss.tau, which may be None for another reason than that nothing was said."""
    return key.count(".") == 2


def read_record(file: Path) -> RunConfig:
    """The configuration in the config.yaml of a run. Raises UserError where it is not as a run writes it."""
    read = read_values(file, of_a_run=True)
    values = {key: value for key, value in read.items() if value is not None or of_a_part(key)}
    if missing := [name for name in ("data", "method", *FILLED_IN) if name not in values]:
        raise UserError(f"{file} is damaged: it lacks {', '.join(missing)}; restore it, or repeat the run")
    hints, of_protocol = get_type_hints(RunConfig), get_type_hints(Protocol)
    own: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    for key, value in values.items():
        name = key.removeprefix("set.")
        if name == key:
            own[name] = in_type(file, key, hints[name], value)
        else:  # what the setting of a part can be is known with the method
            changed[name] = value if "." in name else in_type(file, key, of_protocol[name], value)
    try:
        return RunConfig(**own, set=Overrides.from_dict(changed))
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}") from error
