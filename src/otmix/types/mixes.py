"""A batch after mixing, with its labels and their shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from otmix.types.batches import Batch
from otmix.types.pairs import Pairs


@dataclass(frozen=True, eq=False)
class Target:
    """`labels [B,S]` with `shares [B,S]`, each row of shares summing to 1. Column 0 is the background's, column 1 the
    foreground's.
    """

    labels: Tensor
    shares: Tensor

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.shape != self.shares.shape:
            raise ValueError(
                f"labels and shares must both be [B,S], not {tuple(self.labels.shape)} and {tuple(self.shares.shape)}"
            )

    @classmethod
    def hard(cls, labels: Tensor) -> Target:
        """One label per image, share 1: `[B,1]`."""
        return cls(labels[:, None], torch.ones(labels.shape[0], 1, device=labels.device))

    def soft_labels(self, num_classes: int) -> Tensor:
        """The same as class probabilities `[B,K]`, as torchvision's CutMix and MixUp give them."""
        soft = torch.zeros(self.labels.shape[0], num_classes, dtype=self.shares.dtype, device=self.shares.device)
        return soft.scatter_add_(1, self.labels, self.shares)

    def combine(self, per_label: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ_s share_s · per_label(labels_s), per image `[B]` (eq. 9 and 10). Refuses a `per_label` that has already
        averaged over the batch.
        """
        total: Tensor | None = None
        for labels, shares in zip(self.labels.unbind(1), self.shares.unbind(1)):
            loss = per_label(labels)
            if loss.shape != labels.shape:
                raise ValueError(
                    f"the loss returned shape {tuple(loss.shape)} for {labels.shape[0]} images; a mix needs one loss "
                    "per image: use reduction='none'"
                )
            total = shares * loss if total is None else total + shares * loss
        assert total is not None  # S >= 1
        return total


@dataclass(frozen=True, eq=False)
class Mixed:
    """A batch after mixing. `image_share [B]`: the part of each image that is background, as really pasted (1 where
    nothing was); the label share in `target` may differ (Remix). `mixed [B]`: which images are mixes. `pairs` is None
    when nothing was paired.
    """

    images: Tensor
    target: Target
    image_share: Tensor
    mixed: Tensor
    pairs: Pairs | None = None

    @classmethod
    def unmixed(cls, batch: Batch) -> Mixed:
        """A batch as it is."""
        labels = batch.items.labels
        ones = torch.ones(labels.shape[0], device=labels.device)
        return cls(batch.images, Target.hard(labels), ones, torch.zeros_like(labels, dtype=torch.bool))

    def loss(self, criterion: Callable[[Tensor, Tensor], Tensor], output: Tensor) -> Tensor:
        """Mean loss (eq. 10) of any `criterion(output, labels)` that gives one loss per image.

        Raises ValueError for one that returns a scalar: the shares of its images can no longer be told apart.
        """
        return self.target.combine(lambda labels: criterion(output, labels)).mean()

    def soft_labels(self, num_classes: int) -> Tensor:
        """Class probabilities `[B,K]` of the mixes, for losses that take soft labels."""
        return self.target.soft_labels(num_classes)
