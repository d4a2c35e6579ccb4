"""How many training images each class has, and the shot groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from otmix.errors import UserError

ShotGroup = Literal["many", "medium", "few"]
SHOT_GROUPS: tuple[ShotGroup, ...] = ("many", "medium", "few")


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """How many training images each class has: int64 `[K]`, in label order, not necessarily sorted.

    Raises UserError when there is no class, or a class has no image.
    """

    counts: Tensor

    def __post_init__(self) -> None:
        counts = torch.as_tensor(self.counts)
        if counts.is_floating_point():
            raise UserError("class counts must be whole numbers of images; convert them to integers")
        counts = counts.to("cpu", torch.int64, copy=True)
        if counts.ndim != 1 or counts.numel() == 0:
            raise UserError(f"class counts must be a vector [K] with K >= 1, not of shape {tuple(counts.shape)}")
        if bool((counts < 1).any()):
            empty = torch.nonzero(counts < 1).flatten().tolist()
            raise UserError(f"classes {empty} have no training image; remove them or give each at least one image")
        object.__setattr__(self, "counts", counts)

    @classmethod
    def from_labels(cls, labels: Tensor, num_classes: int | None = None) -> ClassCounts:
        """Count labels `[N]`. With `num_classes`, labels outside 0 … K−1 are an error."""
        labels = torch.as_tensor(labels)
        if labels.numel() == 0:
            raise UserError("there are no labels to count")
        if labels.is_floating_point() or labels.ndim != 1:
            raise UserError(f"labels must be a vector [N] of class numbers, not {labels.dtype} {tuple(labels.shape)}")
        labels = labels.to("cpu", torch.int64)
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (num_classes is not None and high >= num_classes):
            allowed = f"0 … {num_classes - 1}" if num_classes is not None else "0 or more"
            raise UserError(f"label {low if low < 0 else high} is out of range; labels must be {allowed}")
        return cls(torch.bincount(labels, minlength=num_classes or 0))

    @property
    def num_classes(self) -> int:
        return int(self.counts.numel())

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def prior(self) -> Tensor:
        """Class frequencies n_k / N, float64 `[K]`."""
        return self.counts.double() / self.counts.sum()

    @property
    def imbalance(self) -> float:
        """n_max / n_min."""
        return int(self.counts.max()) / int(self.counts.min())

    def shot_groups(self, many: int = 100, few: int = 20) -> dict[ShotGroup, Tensor | None]:
        """Classes by training size: more than `many`, fewer than `few`, the rest medium. A group without classes is
        None.

        The CIFAR convention (Gao et al. 2023, section 5.1 and its code). The official ImageNet-LT and iNaturalist
        scripts count 20 as few: `few=21`.
        """
        if few > many + 1:
            raise UserError(
                f"a class of {many + 1} images would be both many- and few-shot with many={many}, few={few}"
            )
        masks = {
            "many": self.counts > many,
            "medium": (self.counts <= many) & (self.counts >= few),
            "few": self.counts < few,
        }
        return {name: torch.nonzero(masks[name]).flatten() if bool(masks[name].any()) else None for name in SHOT_GROUPS}
