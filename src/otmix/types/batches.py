"""Places in a dataset, their images, and what a model says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from otmix.devices import move


@dataclass(frozen=True, eq=False)
class Items:
    """Labelled places in a dataset; no pixel has been read yet. `labels [n]` int64; `index [n]` int64, or None where
    the dataset has no indices.
    """

    labels: Tensor
    index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels.ndim != 1:
            raise ValueError(f"labels must be a vector [n], not of shape {tuple(self.labels.shape)}")
        if self.index is not None and self.index.shape != self.labels.shape:
            raise ValueError(
                f"index has shape {tuple(self.index.shape)}, labels {tuple(self.labels.shape)}; they must be equal"
            )

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def __getitem__(self, which: Tensor | slice) -> Items:
        return Items(self.labels[which], None if self.index is None else self.index[which])

    def to(self, device: torch.device | str) -> Items:
        """On a device, without making CUDA wait; on the CPU, once they are there."""
        return Items(move(self.labels, device), None if self.index is None else move(self.index, device))

    @classmethod
    def concatenate(cls, parts: Iterable[Items]) -> Items:
        parts = list(parts)
        indices = [part.index for part in parts if part.index is not None]
        return cls(
            torch.cat([part.labels for part in parts]), torch.cat(indices) if len(indices) == len(parts) else None
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Items and their images `[B,C,H,W]`, float in [0, 1]. Normalising is the model's first layer, so everything before
    it sees plain pixels.
    """

    items: Items
    images: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[0] != len(self.items):
            raise ValueError(
                f"images must be [B,C,H,W] with B = {len(self.items)} items, not of shape {tuple(self.images.shape)}"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: Tensor | slice) -> Batch:
        return Batch(self.items[which], self.images[which])


@dataclass(frozen=True, eq=False)
class Output:
    """What a model says of a batch: `logits [B,K]`, pooled `features [B,D]`, `expert_logits [B,E,K]`; the last two may
    be absent.
    """

    logits: Tensor
    features: Tensor | None = None
    expert_logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Embedded:
    """Items with `features [n,D]` float32 and, where the class cost or the confusion needs them, `log_probabilities
    [n,K]` float32.
    """

    items: Items
    features: Tensor
    log_probabilities: Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: Tensor | slice) -> Embedded:
        logp = self.log_probabilities
        return Embedded(self.items[which], self.features[which], None if logp is None else logp[which])


class Embed(Protocol):
    """Looks at items with the present model, in eval mode and without gradient."""

    def __call__(self, items: Items, /) -> Embedded: ...
