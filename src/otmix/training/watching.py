"""What progress shows: errors on validation images, or on a fixed probe of training images, after an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otmix.data import ImageStore, items_of
from otmix.evaluation import Evaluation, top1_error
from otmix.files import write_atomic
from otmix.randomness import generator
from otmix.training.evaluate import evaluate_items, predict_items
from otmix.training.loop import RunState, best_path
from otmix.training.reporter import Reporter
from otmix.training.setup import Plan, looking_batch, split_of
from otmix.types import Items

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PROBE_IMAGES = 1000
"""Training images that progress is watched on where there is no validation split: the same ones after each epoch."""


@dataclass(frozen=True, eq=False)
class Watched:
    """A split that is looked at after an epoch: the key of its error in the log, its store and items."""

    key: str
    store: ImageStore
    items: Items


def watched_splits(fabric: Fabric, plan: Plan, train_store: ImageStore, reporter: Reporter) -> list[Watched]:
    """What progress shows: validation images where there are any, else a fixed probe of training images; the test set
    only under `best-on-test`.
    """
    dataset = plan.dataset
    splits: list[Watched] = []

    def whole(split: str) -> Watched:
        items = items_of(split_of(dataset, split))
        return Watched(f"{split}_error", plan.store(split, fabric, reporter.loading), items)

    if dataset.validation is not None:
        splits.append(whole("validation"))
    else:
        labels = dataset.train.labels
        order = torch.randperm(len(labels), generator=generator(plan.config.seed, "probe"))
        probe = order[:PROBE_IMAGES].sort().values
        splits.append(Watched("probe_error", train_store, Items(labels[probe], probe)))
    if plan.protocol.headline == "best-on-test":
        splits.append(whole("test"))
    return splits


def watch(run: RunState, last: bool, plan: Plan, splits: list[Watched]) -> dict[str, float | None]:
    """Errors on the watched splits; under `best-on-test` also keeps the model of the best epoch so far."""
    errors: dict[str, float | None] = dict.fromkeys(("validation_error", "probe_error", "test_error"))
    choosing = plan.protocol.headline == "best-on-test"
    if not (last or choosing or (run.epoch + 1) % plan.config.evaluate_every == 0):
        return errors
    for split in splits:
        errors[split.key] = error_on(run, plan, split)
    test_error = errors["test_error"]
    if choosing and test_error is not None and (run.best is None or test_error < run.best["test_error"]):
        run.best = {"epoch": run.epoch, "test_error": test_error}
        if run.fabric.global_rank == 0:
            save_weights(run, best_path(run).name)
    return errors


def error_on(run: RunState, plan: Plan, split: Watched) -> float:
    """The top-1 error alone: progress shows nothing else."""
    probabilities = predict_items(
        run.fabric,
        run.state.model,
        run.state.criterion,
        split.store,
        split.items,
        looking_batch(plan.config, plan.dataset),
        run.reporter.looking,
    )
    return top1_error(probabilities, split.items.labels)


def evaluate(run: RunState, plan: Plan, store: ImageStore, items: Items) -> tuple[Evaluation, Tensor]:
    return evaluate_items(
        run.fabric,
        run.state.model,
        run.state.criterion,
        store,
        items,
        plan.dataset.counts,
        looking_batch(plan.config, plan.dataset),
        run.reporter.looking,
        many=plan.config.many_above,
        few=plan.config.few_below,
    )


def save_weights(run: RunState, name: str) -> None:
    from safetensors.torch import save

    weights = {key: value.detach().cpu().contiguous() for key, value in run.state.model.state_dict().items()}
    write_atomic(run.run_dir / name, lambda stream: stream.write(save(weights)))
