"""F's source for a run: adaptive, re-estimated after each epoch, or fixed, from a finished run (Table 8)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from otmix.confusion import STREAM_DECAY, ConfusionCounter, perturb
from otmix.data import ImageStore, items_of
from otmix.randomness import generator
from otmix.training.confusion_source import ConfusionSource, Looked, balanced_subset, confusion_origin
from otmix.training.setup import Plan, looking_batch, split_of
from otmix.types import Confusion

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def build_confusion_source(
    plan: Plan, fabric: Fabric, train_store: ImageStore, progress: Looked | None = None
) -> ConfusionSource | None:
    """Where F comes from after each epoch; None for methods that have no use for one, and for a fixed F."""
    return None if plan.protocol.confusion_run is not None else _source(plan, fabric, train_store, progress)


def fixed_confusion(
    plan: Plan, fabric: Fabric, train_store: ImageStore, progress: Looked | None = None
) -> Confusion | None:
    """F of the finished run that is named, if one is, on the data that the settings name; None for an adaptive F.

    Raises UserError where there is no such run.
    """
    from otmix.training.runs import open_run

    if plan.protocol.confusion_run is None:
        return None
    source = _source(plan, fabric, train_store, progress)
    if source is None:
        return None
    run = open_run(Path(plan.protocol.confusion_run))
    return source.estimate_with(run.model.to(fabric.device), run.criterion.to(fabric.device))


def _source(plan: Plan, fabric: Fabric, train_store: ImageStore, progress: Looked | None) -> ConfusionSource | None:
    protocol, dataset, config = plan.protocol, plan.dataset, plan.config
    if not plan.method.uses_confusion or (plan.method.pairing == "transport" and protocol.omega == 1.0):
        return None
    origin = confusion_origin(protocol, dataset.validation is not None)
    streamed = origin.items == "streamed"
    decay = STREAM_DECAY if streamed else 0.0
    counter = ConfusionCounter(len(dataset.class_names), origin, decay=decay, device=fabric.device)

    def wrong(found: Confusion) -> Confusion:  # each time in the same way
        shuffle, noise = protocol.confusion_shuffle, protocol.confusion_noise
        return perturb(found, shuffle, noise, generator(config.seed, "wrong-confusion"))

    size = looking_batch(config, dataset)
    source = partial(ConfusionSource, fabric, counter, batch_size=size, perturb=wrong, progress=progress)
    if streamed:
        return source()
    if origin.split == "train":
        if origin.per_class is None:
            return source(train_store, items_of(dataset.train))
        items = balanced_subset(dataset.train.labels, dataset.counts, origin.per_class, config.seed)
        return source(train_store, items)
    return source(plan.store(origin.split, fabric), items_of(split_of(dataset, origin.split)))
