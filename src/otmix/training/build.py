"""The pieces of a run put together on their device, ready for the first step."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otmix.data import open_store
from otmix.errors import UserError
from otmix.models import Classifier
from otmix.randomness import derive_seed
from otmix.sampling import BackgroundStream, ForegroundStream
from otmix.training.confusion_setup import build_confusion_source, fixed_confusion
from otmix.training.launch import lightning_quietly
from otmix.training.loop import RunState
from otmix.training.processes import gatherer
from otmix.training.reporter import Reporter
from otmix.training.setup import Forward, Plan, build_optimizer, compiled, embed_maker
from otmix.training.stage import StepState
from otmix.training.tally import Tally
from otmix.training.watching import watch, watched_splits
from otmix.types import Output

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def build_run(
    fabric: Fabric,
    run_dir: Path,
    plan: Plan,
    reporter: Reporter,
    stage_index: int = 0,
    before: RunState | None = None,
    *,
    resumed: bool = False,
) -> RunState:
    """Model, optimiser, streams and stores on their device, ready for the first step of a stage.

    The model goes on from where it is; from the stage `before` also the log, the counts of pairs and the confusion. A
    run that is `resumed` gets all of these from its checkpoint afterwards.
    """
    config, dataset, stage = plan.config, plan.dataset, plan.stages[stage_index]
    stage.prepare(plan.model, derive_seed(config.seed, "reset", stage_index))
    stage.criterion.to(fabric.device)
    store = open_store(
        dataset.train, dataset, fabric.device, train=True, workers=config.workers, progress=reporter.loading
    )
    model = plan.model.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form
    optimizer = build_optimizer(model, stage.optimizer)
    forward_module: torch.nn.Module = Forward(model)
    if config.compile:
        forward_module = compiled(forward_module, fabric)
    with lightning_quietly():
        wrapped, optimizer = fabric.setup(forward_module, optimizer)

    def forward(images: Tensor) -> Output:
        return Output(*wrapped(images.contiguous(memory_format=torch.channels_last)))

    world = fabric.world_size
    if (len(dataset.train) % stage.background_batch or stage.background_batch) <= world:
        side = dataset.image_size
        _try_one_image(model, torch.zeros(plan.model.streams, dataset.channels, side, side, device=fabric.device))
    source = build_confusion_source(plan, fabric, store, reporter.looking)
    confusion = None if before is None else before.confusion
    if before is None and not resumed:
        confusion = fixed_confusion(plan, fabric, store, reporter.looking)
    labels = dataset.train.labels
    foreground = (
        None if stage.foreground_probability is None else ForegroundStream(labels, stage.foreground_probability, world)
    )
    return RunState(
        fabric=fabric,
        run_dir=run_dir,
        seed=config.seed,
        stage_index=stage_index,
        stage=stage,
        state=StepState(
            model=model,
            forward=forward,
            make_embed=embed_maker(plan, stage.criterion, fabric, store, source),
            criterion=stage.criterion,
            class_weight=None,
            reduction=stage.reduction,
            mixer=stage.mixer,
            counter=source.counter if source is not None and source.streamed else None,
            gather=gatherer(fabric),
        ),
        module=wrapped,
        optimizer=optimizer,
        store=store,
        background=BackgroundStream(labels, stage.background_batch, world, stage.background_law),
        foreground=foreground,
        confusion_source=source,
        tally=before.tally if before is not None else Tally(dataset.counts.num_classes, fabric.device),
        reporter=reporter,
        watch=partial(watch, plan=plan, splits=watched_splits(fabric, plan, store, reporter)),
        checkpoint_minutes=config.checkpoint_minutes,
        history=before.history if before is not None else [],
        best=before.best if before is not None else None,
        bn_statistics=before.bn_statistics if before is not None and stage.batchnorm == "eval" else "running",
        confusion=confusion,
    )


def _try_one_image(model: Classifier, image: Tensor) -> None:
    """Raises UserError, before the first epoch rather than at its end, when a model cannot be trained on one image."""
    try:
        copy.deepcopy(model).train()(image)
    except ValueError as error:
        raise UserError(
            "an epoch would end with a batch of one image, in which BatchNorm finds a single value per channel; choose "
            "another --batch-size, or a larger --image-size"
        ) from error
