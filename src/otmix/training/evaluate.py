"""A model's answers on a split, each image once whatever the number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otmix.data import ImageStore
from otmix.errors import UserError
from otmix.evaluation import Evaluation, evaluate_predictions, predict_probabilities
from otmix.losses import Criterion
from otmix.models import Classifier
from otmix.training.confusion_source import Looked, batches_of
from otmix.training.processes import gatherer
from otmix.types import ClassCounts, Items

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def predict_items(
    fabric: Fabric,
    model: Classifier,
    criterion: Criterion,
    store: ImageStore,
    items: Items,
    batch_size: int,
    progress: Looked | None = None,
) -> Tensor:
    """Class probabilities `[n,K]` of `items`, in their order, on the CPU of every process.

    `progress` hears of each batch how many images this process has looked at, and how many it will. Raises UserError
    where they are not finite numbers.
    """
    # as many for each process, the first ones again at the end: none may be left without any
    longest = -(-len(items) // fabric.world_size) * fabric.world_size
    mine = items[torch.arange(fabric.global_rank, longest, fabric.world_size) % len(items)]
    batches = batches_of(store, mine, batch_size, progress)
    probabilities, _, _ = predict_probabilities(
        model, batches, probabilities=criterion.probabilities, autocast=fabric.autocast
    )
    gather = gatherer(fabric)
    if gather is not None:
        probabilities = gather(probabilities)[: len(items)].cpu()
    if not bool(torch.stack(probabilities.aminmax()).isfinite().all()):  # isfinite of each takes thirty times as long
        raise UserError("the model's probabilities are not finite numbers; try a lower --lr, or --precision 32-true")
    return probabilities


def evaluate_items(
    fabric: Fabric,
    model: Classifier,
    criterion: Criterion,
    store: ImageStore,
    items: Items,
    counts: ClassCounts,
    batch_size: int,
    progress: Looked | None = None,
    *,
    many: int = 100,
    few: int = 20,
) -> tuple[Evaluation, Tensor]:
    """The evaluation of `items`, and the probabilities it was made from.

    `many` and `few` bound the shot groups, as in `ClassCounts.shot_groups`.
    """
    probabilities = predict_items(fabric, model, criterion, store, items, batch_size, progress)
    return evaluate_predictions(probabilities, items.labels.cpu(), counts, many=many, few=few), probabilities
