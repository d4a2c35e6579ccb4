"""Settings that would change nothing are refused: a typo must not look like a result."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

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
        check_ranges(changed, protocol, method)
        resolved = method.protocol(protocol, changed)
        idle = _without_effect(resolved, method) + _idle_parts(method, method.effective(protocol, changed))
        for setting, because in idle:
            if setting in given and (setting in method.setting_names or setting in method.part_settings):
                raise UserError(f"--set.{setting} changes nothing for {method.name}, because {because}; leave it out")


def check_ranges(changed: Overrides, protocol: ProtocolName, method: Method) -> None:
    """Raises UserError for a setting of this method out of range, as far as that can be known without its data."""
    resolved = method.protocol(protocol, changed)
    filled = Overrides.from_dict(method.effective(protocol, changed))
    if method.only_own(changed).to_dict():
        from otmix.methods.building import check_pieces  # it needs torch

        check_pieces(method, resolved, filled)


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


_IDLE_PARTS: tuple[tuple[str, str, object, tuple[str, ...]], ...] = (
    ("ride", "model.diversity", 0.0, ("model.rho", "model.temperature_start")),
    ("ride", "model.experts", 1, ("model.diversity", "model.rho", "model.temperature_start")),
    ("ib", "loss.start", 1.0, ("loss.scale", "loss.epsilon", "loss.weights", "loss.detach", "loss.focal_gamma")),
    ("lade", "loss.strength", 0.0, ("loss.regulariser",)),
    ("ride", "model.rho", 0.0, ("model.temperature_start",)),
    ("ride", "model.temperature_start", 1.0, ("model.rho",)),
    ("logit-adjustment", "loss.tau", 0.0, ("loss.post_hoc",)),
    ("remix", "mixer.kappa", math.inf, ("mixer.tau",)),
    ("remix", "mixer.tau", 0.0, ("mixer.kappa",)),
    ("drw", "rebalancing.start", 1.0, ("rebalancing.beta", "weighted_mean")),
    ("drw", "rebalancing.beta", 0.0, ("rebalancing.start", "weighted_mean")),
    *((law, "rebalancing.start", 1.0, ("rebalancing.power",)) for law in ("drs", "cbs", "srs")),
    *((law, "rebalancing.power", 1.0, ("rebalancing.start",)) for law in ("drs", "cbs", "srs")),
)
"""Of a part, a setting with the value that leaves others without effect."""


def _idle_parts(method: Method, values: Mapping[str, object]) -> list[tuple[str, str]]:
    parts = {method.architecture, method.loss, method.pixels, method.rebalancing}
    return [
        (name, f"{key} is {values[key]}")
        for part, key, value, names in _IDLE_PARTS
        if part in parts and values.get(key) == value
        for name in names
    ]


def _without_effect(protocol: Protocol, method: Method) -> list[tuple[str, str]]:
    """Settings that others make idle, and why."""
    idle = _where_nothing_is_mixed(protocol, method)
    transport = method.pairing == "transport"
    if transport and protocol.omega == 0.0:
        # `features` stays: the passes of "official" move BatchNorm's statistics whatever the cost is
        idle.append(("metric", "omega is 0: features have no part in the cost"))
    if transport and protocol.omega == 1.0:
        names = ("keep_diagonal", *(name for name in vars(protocol) if name.startswith("confusion_")))
        idle += [(name, "omega is 1: the confusion has no part in the cost") for name in names]
    if protocol.foreground_law == "effective-number":
        idle.append(("foreground_r", "foreground_law is effective-number: only inverse-frequency has an r"))
    if protocol.curriculum_power == 0.0:
        names = ("curriculum_per", "curriculum_one_based")
        idle += [(name, "curriculum_power is 0: transport pairs every batch") for name in names]
    if protocol.confusion_from not in ("balanced-train", "held-out"):
        idle.append(("confusion_per_class", f"F comes from {protocol.confusion_from}, not from a balanced subset"))
    return idle


def _where_nothing_is_mixed(protocol: Protocol, method: Method) -> list[tuple[str, str]]:
    """Then only what says so has an effect, besides what is not about mixing."""
    effective = {"headline", "weighted_mean"}
    if protocol.mix_probability == 0.0:
        because = "mix_probability is 0"
        effective |= {"mix_probability"}
    elif protocol.mix_from == protocol.mix_until:
        because = "mix_from is mix_until"
        effective |= {"mix_from", "mix_until"}
    elif protocol.mix_fraction == 0.0:
        because = "mix_fraction is 0"
        effective |= {"mix_fraction", "features"}
        if method.pairing == "transport" and protocol.features == "official":
            # batches are still looked at, which moves BatchNorm's statistics: when, and at which foregrounds, matters
            looked = ("mix_probability", "mix_from", "mix_until", "curriculum_", "foreground_")
            effective |= {name for name in method.setting_names if name.startswith(looked)}
    else:
        return []
    settings = (*method.setting_names, *(name for name in method.part_settings if name.startswith("mixer.")))
    return [(name, f"nothing is mixed: {because}") for name in settings if name not in effective]
