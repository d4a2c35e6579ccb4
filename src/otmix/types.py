"""The values that flow from a dataset to a loss. Sizes: `f` foregrounds, `m` backgrounds, `B` images in a batch, `K`
classes, `D` features, `S` labels per image (2 in a mix of two), `C H W` image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

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
        """On a device, without waiting for it; on the CPU, once they are there."""
        later = torch.device(device).type != "cpu"
        return Items(
            self.labels.to(device, non_blocking=later),
            None if self.index is None else self.index.to(device, non_blocking=later),
        )

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


@dataclass(frozen=True)
class ConfusionOrigin:
    """The data that a confusion matrix was estimated from.

    `split` × `items` (all; a balanced subset of `per_class` images a class; or streamed: the background batches that
    training embeds anyway) × `soft` (class probabilities) or hard counts (argmax) × `adaptive` (re-estimated during the
    run) or fixed (from a finished run).
    """

    split: Literal["train", "validation", "test"] = "train"
    items: Literal["all", "balanced", "streamed"] = "streamed"
    per_class: int | None = None
    soft: bool = True
    adaptive: bool = True
    perturbed: bool = False

    def __str__(self) -> str:
        which = (
            f"{self.per_class} a class of"
            if self.items == "balanced"
            else "batches streamed from"
            if self.items == "streamed"
            else "all of"
        )
        kind, state = "soft" if self.soft else "hard", "adaptive" if self.adaptive else "fixed"
        wrong = ", made wrong on purpose" if self.perturbed else ""
        return f"{kind} counts on {which} {self.split}, {state}{wrong}"


@dataclass(frozen=True, eq=False)
class Confusion:
    """How a model confuses the classes: `matrix [K,K]`, dense or sparse COO, row = true class, rows sum to 1, an unseen
    class's row is zeros.

    Gao et al. 2023, section 4 ("Cost Function"), with the diagonal kept: the cost zeroes it (F̂).
    """

    matrix: Tensor
    origin: ConfusionOrigin

    @property
    def num_classes(self) -> int:
        return int(self.matrix.shape[0])

    def lookup(self, rows: Tensor, columns: Tensor, *, keep_diagonal: bool = False) -> Tensor:
        """F̂[rows[i], columns[j]] as a dense `[f,m]`, the diagonal zeroed unless `keep_diagonal`."""
        if self.matrix.is_sparse:
            values = self._found(rows[:, None] * self.num_classes + columns[None, :])
        else:
            values = self.matrix[rows[:, None], columns[None, :]]
        return values if keep_diagonal else values.masked_fill(rows[:, None] == columns[None, :], 0.0)

    def _found(self, places: Tensor) -> Tensor:
        """The entries of a sparse matrix at row · K + column. A search, as selecting rows of it would wait for CUDA."""
        matrix = self.matrix.coalesce()
        values, (rows, columns) = matrix.values(), matrix.indices()
        if not len(values):
            return torch.zeros_like(places, dtype=values.dtype)
        known = rows * self.num_classes + columns  # ascending
        at = torch.searchsorted(known, places).clamp_max_(len(known) - 1)
        return torch.where(known[at] == places, values[at], 0.0)


@dataclass(frozen=True, eq=False)
class Plan:
    """A solution of the entropic transport problem, eq. 4, with its evidence. Leading dimensions are batches of
    problems.

    `coupling [...,f,m]` sums to 1; `foreground_potential [...,f]` and `background_potential [...,m]` are the dual
    potentials (in units of the cost, the coupling being exp((u_i + v_j − C_ij)/ε)); `iterations [...]`; `marginal_error
    [...]`, the larger of the two L1 distances between a marginal of the coupling and its mass; `converged [...]` bool:
    error ≤ tolerance.
    """

    coupling: Tensor
    foreground_potential: Tensor
    background_potential: Tensor
    iterations: Tensor
    marginal_error: Tensor
    converged: Tensor

    @property
    def favourites(self) -> Tensor:
        """Eq. 8: for each foreground the background with the largest T_ij, int64 `[...,f]`."""
        if self.coupling.device.type == "cpu":  # NumPy's takes a tenth of the time here
            return torch.from_numpy(self.coupling.numpy().argmax(-1))
        return self.coupling.argmax(-1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Who is pasted into whom: positions `foreground [B]` and `background [B]` in the two batches of candidates.

    `by` names the rule that chose them ("index", "transport", …); `plan` is there when transport did.
    """

    foreground: Tensor
    background: Tensor
    by: str
    plan: Plan | None = None

    def __len__(self) -> int:
        return int(self.foreground.shape[0])


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
