"""Where F comes from during training: the arrow that runs backwards, once an epoch, from named data (Table 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otmix.confusion import ConfusionCounter
from otmix.data import ImageStore
from otmix.data.longtail import places_by_class
from otmix.losses import Criterion
from otmix.models import Classifier, embed
from otmix.protocols import Protocol
from otmix.randomness import generator
from otmix.training.processes import summed
from otmix.training.stage import StepState
from otmix.types import Batch, ClassCounts, Confusion, ConfusionOrigin, Items

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Looked = Callable[[int, int], None]
"""Hears how many images of how many a model has looked at."""


@dataclass(frozen=True, eq=False)
class ConfusionSource:
    """Estimates F after each epoch: from what training counted meanwhile (`items` None), or by a pass over `items` of
    `store`.
    """

    fabric: Fabric
    counter: ConfusionCounter
    store: ImageStore | None = None
    items: Items | None = None
    batch_size: int = 512
    perturb: Callable[[Confusion], Confusion] = lambda confusion: confusion
    progress: Looked | None = None

    @property
    def streamed(self) -> bool:
        return self.items is None

    def estimate(self, state: StepState, previous: Confusion | None) -> Confusion | None:
        """The new F, the same on all processes; the previous one where nothing has been counted."""
        return self.estimate_with(state.model, state.criterion) or previous

    def estimate_with(self, model: Classifier, criterion: Criterion) -> Confusion | None:
        """F of any model and the loss it was trained with; None where nothing has been counted."""
        if self.store is not None and self.items is not None:
            mine = self.items[self.fabric.global_rank :: self.fabric.world_size]
            for batch in batches_of(self.store, mine, self.batch_size, self.progress):
                seen = embed(
                    model,
                    batch.images,
                    batch.items,
                    autocast=self.autocast,
                    probabilities=criterion.probabilities,
                )
                assert seen.log_probabilities is not None
                self.counter.add(seen.items.labels, seen.log_probabilities)
        found = self.counter.estimate(summed(self.fabric))
        return None if found is None else self.perturb(found)

    def autocast(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.fabric.autocast()
        return context


def batches_of(store: ImageStore, items: Items, size: int, progress: Looked | None = None) -> Iterator[Batch]:
    """`items` in order, not augmented; `progress` hears of each batch when the next one is asked for."""
    done = 0
    for batch in store.stream((items[start : start + size], None) for start in range(0, len(items), size)):
        yield batch
        done += len(batch)
        if progress is not None:
            progress(done, len(items))


def confusion_origin(protocol: Protocol, has_validation: bool) -> ConfusionOrigin:
    """Which data `protocol.confusion_from` means here."""
    soft, source, adaptive = protocol.confusion_soft, protocol.confusion_from, protocol.confusion_run is None
    if source == "held-out":
        source = "validation" if has_validation else "balanced-train"
    if source == "streamed":  # a finished run streams nothing: it looks at all that would have been streamed
        return ConfusionOrigin("train", "streamed" if adaptive else "all", None, soft, adaptive)
    if source == "balanced-train":
        return ConfusionOrigin("train", "balanced", protocol.confusion_per_class, soft, adaptive)
    return ConfusionOrigin(source, "all", None, soft, adaptive)


def balanced_subset(labels: Tensor, counts: ClassCounts, per_class: int, seed: int) -> Items:
    """`per_class` random training images of each class (all of a smaller one), the same ones for the whole run."""
    order = torch.randperm(labels.shape[0], generator=generator(seed, "balanced-subset"))
    index = order[torch.cat([places[:per_class] for places in places_by_class(labels[order], counts.num_classes)])]
    return Items(labels[index], index)
