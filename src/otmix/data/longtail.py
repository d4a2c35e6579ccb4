"""Long-tailed subsets, as the literature makes them from balanced data (Cui et al. 2019; Cao et al. 2019)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from otmix.errors import UserError
from otmix.randomness import generator


def long_tail_counts(n_max: int, imbalance: float, num_classes: int) -> list[int]:
    """n_k = max(1, floor(n_max · imbalance^(−k/(K−1)))), k = 0 … K−1: exponential decay from n_max to n_max/imbalance.

    Raises UserError for an imbalance below 1 or n_max below 1.
    """
    if n_max < 1:
        raise UserError(f"{n_max} images in the largest class are too few; give 1 or more")
    # The tiny surplus keeps a whole number whole where the power was rounded down (300 · 3^−1).
    return [max(1, math.floor(n_max * share + 1e-9)) for share in _shares(imbalance, num_classes)]


def largest_head(available: Tensor, imbalance: float) -> int:
    """The largest n_max whose long tail of this imbalance fits into `available [K]` images per class."""
    shares = _shares(imbalance, len(available))
    # the least first: with a ratio that no data has, the others are beyond every number
    return math.floor(min(int(have) / share for have, share in zip(available, shares)) + 1e-9)


def _shares(imbalance: float, num_classes: int) -> list[float]:
    if not (math.isfinite(imbalance) and imbalance >= 1):
        raise UserError(f"imbalance {imbalance:g} is no ratio of the largest class to the smallest; give 1 or more")
    return [imbalance ** (-k / max(1, num_classes - 1)) for k in range(num_classes)]


def places_by_class(labels: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    """The places of each class in `labels [N]`, ascending. One sort, as a search for each of thousands of classes would
    read all labels each time.
    """
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    return torch.split(labels.argsort(stable=True), counts)[:num_classes]


def shuffled_classes(labels: Tensor, num_classes: int, seed: int = 0) -> list[Tensor]:
    """The places of each class, shuffled exactly as `numpy.random.seed(seed)` once, then `numpy.random.shuffle` per
    class in label order would: with seed 0 on the archive's order these are the subsets of the literature.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is out of range for NumPy's legacy generator; give 0 … {2**32 - 1}")
    random = np.random.RandomState(seed)
    classes = [places.numpy() for places in places_by_class(labels, num_classes)]
    for places in classes:
        random.shuffle(places)
    return [torch.from_numpy(places) for places in classes]


def choose_subset(
    labels: Tensor,
    num_classes: int,
    imbalance: float | None = None,
    max_per_class: int | None = None,
    validation_per_class: int = 0,
    seed: int = 0,
    *,
    by_size: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Places for training, and for validation where asked: each class's first n_k and last `validation_per_class` in
    the shuffled order, class after class. The two never overlap.

    n_k follows `long_tail_counts` from the largest n_max (at most `max_per_class`) that every class can fill, in the
    order of the labels, or with `by_size` from the largest class to the smallest; without an imbalance it is
    min(images, max_per_class). Validation takes at most half of a class, so no class is left empty.
    """
    if max_per_class is not None and max_per_class < 1:
        raise UserError(f"--max-per-class {max_per_class} is too few; give 1 or more")
    if validation_per_class < 0:
        raise UserError(f"--validation-per-class {validation_per_class} is negative; give 0 or more")
    classes = shuffled_classes(labels, num_classes, seed)
    held = [min(validation_per_class, len(places) // 2) for places in classes]
    if validation_per_class and not any(held):
        raise UserError(
            f"--validation-per-class {validation_per_class} finds no class with two training images, of which it could "
            "take one; add images, or leave it out"
        )
    available = torch.tensor([len(places) - taken for places, taken in zip(classes, held)])
    if imbalance is None:
        counts = available.tolist() if max_per_class is None else available.clamp(max=max_per_class).tolist()
    else:
        order = available.argsort(descending=True, stable=True) if by_size else torch.arange(num_classes)
        head = largest_head(available[order], imbalance)
        profile = long_tail_counts(head if max_per_class is None else min(head, max_per_class), imbalance, num_classes)
        counts = torch.empty_like(order).scatter_(0, order, torch.tensor(profile)).tolist()
    train = torch.cat([places[:n] for places, n in zip(classes, counts)])
    if not validation_per_class:
        return train, None
    return train, torch.cat([places[len(places) - n :] for places, n in zip(classes, held)])


def split_by_class(
    labels: Tensor, class_names: tuple[str, ...], fraction: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Sorted places kept and held out: of each class round(fraction · n) are held out, at least one image on each side.

    Raises UserError for a fraction outside (0, 1) or a class with a single image.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--test-fraction {fraction:g} must lie between 0 and 1")
    random = generator(seed, "test split")
    kept, held = [], []
    for name, places in zip(class_names, places_by_class(labels, len(class_names))):
        n = len(places)
        if n < 2:
            raise UserError(
                f"class '{name}' has {n} image, too few for one to train and one to test on; "
                "add images or remove the class"
            )
        shuffled = places[torch.randperm(n, generator=random)]
        out = min(max(round(fraction * n), 1), n - 1)
        held.append(shuffled[:out])
        kept.append(shuffled[out:])
    return torch.cat(kept).sort().values, torch.cat(held).sort().values
