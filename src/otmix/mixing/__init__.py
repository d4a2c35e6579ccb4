"""How the pixels and labels of paired images are mixed: drawing the randomness and applying it are two functions.

`PIXEL_RULES` names the rules for configurations; `register_mixer` adds anyone's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from otmix.errors import UserError
from otmix.extensions import hash_of_definition, is_again
from otmix.mixing.cutmix import CutMix
from otmix.mixing.mixup import Mixup
from otmix.mixing.remix import Remix
from otmix.mixing.saliency import fine_grained_saliency, salient_peaks
from otmix.mixing.saliencymix import SaliencyMix
from otmix.mixing.share import leave_unmixed, mix_of_two
from otmix.mixing.unimix import UniMix, unimix_law
from otmix.types import Batch, Mixed

__all__ = [
    "PIXEL_RULES",
    "CutMix",
    "Mixer",
    "Mixup",
    "Remix",
    "SaliencyMix",
    "UniMix",
    "fine_grained_saliency",
    "leave_unmixed",
    "mix_of_two",
    "register_mixer",
    "salient_peaks",
    "unimix_law",
]


class Mixer(Protocol):
    """A rule that mixes paired batches.

    `draw` makes every random choice for `n` images and returns a value on the CPU that can be logged, replayed and
    drawn; `apply` does the rest, the same each time, changes none of its inputs and never waits for a device. What
    `draw` returns is the mixer's own affair.
    """

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Any: ...

    def apply(self, background: Batch, foreground: Batch, drawn: Any) -> Mixed: ...


PIXEL_RULES: dict[str, type[Mixer]] = {
    "cutmix": CutMix,
    "mixup": Mixup,
    "saliencymix": SaliencyMix,
    "remix": Remix,
    "unimix": UniMix,
}
BUILT_IN = frozenset(PIXEL_RULES)
"""The names of the library's own."""

# What means something in a method's name without being a pixel rule or a loss; tests hold it equal to otmix.methods.
PAIRING_NAMES = ("cmo", "otmix", "confusion")
RESERVED = frozenset({"balms", "bbn", "cbs", "drs", "drw", "erm", "ride", "srs", *PAIRING_NAMES})
LOSS_NAMES = {"bayias", "ce", "focal", "ib", "lade", "ldam"}
"""Names of losses that a mixer's could be taken for; `register_loss` adds to them."""

_M = TypeVar("_M", bound=type[Mixer])


def register_mixer(name: str) -> Callable[[_M], _M]:
    """Class decorator: make a `Mixer` known under `name` in methods' names (`ce+name`, …). Its attributes `title`,
    `paper`, `changes` and `disagrees`, where it has them, are what listings say of it. A class that is defined once
    more, as by a cell of a notebook that is run again, takes the place of the one before.

    Raises UserError for a name that is taken, means something else in a method's name or is not made of lower-case
    letters, digits and `_`, and for what is no class or lacks `draw` or `apply`.
    """
    if not isinstance(name, str):
        raise UserError('register_mixer needs a name: write @register_mixer("my_mixer") above the class')
    # "+" and "-" would make a method's name mean something else
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) is None:
        raise UserError(f"a mixer's name is lower-case letters, digits and '_', from a letter on, not {name!r}")
    if name in RESERVED or name in LOSS_NAMES:
        raise UserError(f"{name!r} means something else in a method's name; choose another name for the mixer")

    def add(mixer: _M) -> _M:
        if name in BUILT_IN or (name in PIXEL_RULES and not is_again(mixer, PIXEL_RULES[name])):
            raise UserError(f"there is already a mixer named {name!r}; choose another name")
        if not isinstance(mixer, type):
            raise UserError(f"the mixer {name!r} must be a class with the methods draw and apply")
        missing = [method for method in ("draw", "apply") if not callable(getattr(mixer, method, None))]
        if missing:
            raise UserError(f"the mixer {name!r} needs the methods draw and apply; it lacks {' and '.join(missing)}")
        hash_of_definition(mixer)  # now: its file may change before a run records what defined it
        PIXEL_RULES[name] = mixer
        return mixer

    return add
