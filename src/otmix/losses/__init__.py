"""Losses, one paper per file. `LOSSES` names them for configurations; `register_loss` adds anyone's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from otmix.errors import UserError
from otmix.extensions import hash_of_definition, is_again
from otmix.losses.balanced_softmax import BalancedSoftmax
from otmix.losses.base import Criterion, Head, Reduction
from otmix.losses.bayias import Bayias
from otmix.losses.class_balanced import ClassBalancedFocal, ClassBalancedSigmoid, ClassBalancedSoftmax
from otmix.losses.cross_entropy import CrossEntropy
from otmix.losses.focal import Focal
from otmix.losses.ib import IB
from otmix.losses.lade import LADE
from otmix.losses.ldam import LDAM
from otmix.losses.logit_adjustment import LogitAdjustment
from otmix.losses.reweighting import DeferredReweighting, effective_number_weights
from otmix.losses.ride import RIDE
from otmix.mixing import LOSS_NAMES, PAIRING_NAMES, PIXEL_RULES, RESERVED

LOSSES: dict[str, type[Criterion]] = {
    "ce": CrossEntropy,
    "ldam": LDAM,
    "focal": Focal,
    "cb-softmax": ClassBalancedSoftmax,
    "cb-sigmoid": ClassBalancedSigmoid,
    "cb-focal": ClassBalancedFocal,
    "balanced-softmax": BalancedSoftmax,
    "logit-adjustment": LogitAdjustment,
    "bayias": Bayias,
    "ib": IB,
    "lade": LADE,
}
BUILT_IN = frozenset(LOSSES)
"""The names of the library's own."""

_C = TypeVar("_C", bound=type[Criterion])


def register_loss(name: str) -> Callable[[_C], _C]:
    """Class decorator: make a `Criterion` known under `name` in methods' names (`name`, `name+otmix`, …). Its
    attributes `title`, `paper`, `changes` and `disagrees`, where it has them, are what listings say of it. A class that
    is defined once more, as by a cell of a notebook that is run again, takes the place of the one before.

    Raises UserError for a name that is taken, or that would mean something else in a method's name, and for what is no
    class derived from `Criterion`.
    """
    if not isinstance(name, str):
        raise UserError('register_loss needs a name: write @register_loss("my-loss") above the class')
    plain = re.fullmatch(r"[a-z][a-z0-9_]*(-[a-z0-9_]+)*", name)
    if plain is None or name.startswith(("ride-", "bbn-")) or name.endswith(("-drw", "-drs", "-cbs", "-srs")):
        raise UserError(
            f"a loss cannot be named {name!r}; use lower-case letters, digits, '_' and '-', but not ride- or bbn- "
            "before, nor -drw, -drs, -cbs or -srs behind"
        )
    # "otmix-mixup" is a mixer, and so will be "otmix-" with any rule
    if name in RESERVED or name in PIXEL_RULES or name.startswith(tuple(f"{pairing}-" for pairing in PAIRING_NAMES)):
        raise UserError(f"{name!r} means something else in a method's name; choose another name for the loss")

    def add(criterion: _C) -> _C:
        if name in BUILT_IN or (name in LOSSES and not is_again(criterion, LOSSES[name])):
            raise UserError(f"there is already a loss named {name!r}; choose another name")
        if not (isinstance(criterion, type) and issubclass(criterion, Criterion)):
            raise UserError(f"the loss {name!r} must be a class derived from otmix.losses.Criterion")
        hash_of_definition(criterion)  # now: its file may change before a run records what defined it
        LOSSES[name] = criterion
        LOSS_NAMES.add(name)
        return criterion

    return add


__all__ = [
    "IB",
    "LADE",
    "LDAM",
    "LOSSES",
    "RIDE",
    "BalancedSoftmax",
    "Bayias",
    "ClassBalancedFocal",
    "ClassBalancedSigmoid",
    "ClassBalancedSoftmax",
    "Criterion",
    "CrossEntropy",
    "DeferredReweighting",
    "Focal",
    "Head",
    "LogitAdjustment",
    "Reduction",
    "effective_number_weights",
    "register_loss",
]
