"""How the pixels and labels of paired images are mixed: drawing the randomness and applying it are two functions."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from otmix.mixing.cutmix import CutMix
from otmix.mixing.mixup import Mixup
from otmix.mixing.share import leave_unmixed
from otmix.types import Batch, Mixed

__all__ = ["CutMix", "Mixer", "Mixup", "leave_unmixed"]


class Mixer(Protocol):
    """A rule that mixes paired batches.

    `draw` makes every random choice for `n` images and returns a value on the CPU that can be logged, replayed and
    drawn; `apply` does the rest, the same each time, changes none of its inputs and never waits for a device. What
    `draw` returns is the mixer's own affair.
    """

    def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> Any: ...

    def apply(self, background: Batch, foreground: Batch, drawn: Any) -> Mixed: ...
