"""Settings that would change nothing are refused: a typo must not look like a result."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from otmix.errors import UserError
from otmix.methods.method import Method
from otmix.methods.names import parse_method
from otmix.protocols import Overrides, Protocol, ProtocolName


def check_settings(changed: Overrides, protocol: ProtocolName, names: Sequence[str]) -> None:
    """Raises UserError for an unknown method, a setting out of range, or one that changes none of the methods."""
    methods = [parse_method(name) for name in names]
    given = changed.to_dict()
    check_read(given, methods)
    for method in methods:
        resolved = method.protocol(protocol, changed)  # raises where a value is out of range
        for key, known in method.part_settings.items():
            if key in changed.parts:
                known.convert(changed.parts[key], f"--set.{key}")
        for setting, because in _without_effect(resolved, method.pairing == "transport"):
            if setting in given and setting in method.setting_names:
                raise UserError(f"--set.{setting} changes nothing for {method.name}, because {because}; leave it out")


def check_read(given: Iterable[str], methods: Sequence[Method]) -> None:
    """Raises UserError for the first of these settings that none of the methods reads."""
    read = {setting for method in methods for setting in (*method.setting_names, *method.part_settings)}
    for setting in given:
        if setting not in read:
            titles = ", ".join(method.name for method in methods)
            close = difflib.get_close_matches(setting, read, n=1)
            shown = f"`otmix methods {methods[0].name}` shows what can be set"
            hint = f"did you mean --set.{close[0]}?" if close else shown
            raise UserError(f"--set.{setting} changes nothing for {titles}; {hint}")


def _without_effect(protocol: Protocol, transport: bool) -> list[tuple[str, str]]:
    """Settings that others make idle, and why."""
    idle = []
    if transport and protocol.omega == 0.0:
        idle += [(name, "omega is 0: features have no part in the cost") for name in ("metric", "features")]
    if transport and protocol.omega == 1.0:
        names = ("keep_diagonal", *(name for name in vars(protocol) if name.startswith("confusion_")))
        idle += [(name, "omega is 1: the confusion has no part in the cost") for name in names]
    if protocol.confusion_from not in ("balanced-train", "held-out"):
        idle.append(("confusion_per_class", f"F comes from {protocol.confusion_from}, not from a balanced subset"))
    return idle
