"""One stage of training as a value, and its step.

OTmix has one stage. A method that needs more than a loss and a mixer (two streams through two branches, gradients on
pixels) brings its own `step`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from otmix.confusion import ConfusionCounter
from otmix.losses import Criterion, DeferredReweighting, Reduction
from otmix.mixer import BatchMixer, Gather
from otmix.models import Classifier
from otmix.models.batchnorm import STATISTICS_STEPS, batch_norms
from otmix.pairing import PairingContext
from otmix.randomness import derive_seed
from otmix.training.schedules import Schedule
from otmix.types import Batch, Embed, Mixed, Output


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimiser and its numbers; `betas` and decoupled decay for adamw, momentum for sgd."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    weight_decay: float = 2e-4
    momentum: float = 0.9
    nesterov: bool = False


@dataclass(frozen=True, eq=False)
class StepItems:
    """The images of one step; `foreground` is there only when this step takes from the second stream."""

    background: Batch
    foreground: Batch | None


@dataclass(frozen=True, eq=False)
class LossParts:
    """What a step computed: the scalar to descend, and what the log wants to know (who was mixed, and what the model
    said).
    """

    loss: Tensor
    mixed: Mixed
    output: Output


@dataclass(frozen=True, eq=False)
class StepState:
    """What a step works with: `forward(images) -> Output` is the model as wrapped for training; `model` is the bare
    one. `gather` puts the parts of several processes together, and is None for one.
    """

    model: Classifier
    forward: Callable[[Tensor], Output]
    make_embed: Callable[[StepItems], Embed]
    criterion: Criterion
    class_weight: Tensor | None
    reduction: Reduction
    mixer: BatchMixer | None
    counter: ConfusionCounter | None
    gather: Gather | None = None


class Step(Protocol):
    """A training step up to the loss; the loop does the rest."""

    def __call__(self, state: StepState, items: StepItems, context: PairingContext, /) -> LossParts: ...


def mix_and_classify(state: StepState, items: StepItems, context: PairingContext) -> LossParts:
    """Algorithm 1: pair, mix, classify, and weigh the loss by shares (eq. 8 to 10). Without a mixer: plain training."""
    if state.mixer is None:
        mixed = Mixed.unmixed(items.background)
    else:
        mixed = state.mixer(
            items.background, items.foreground, state.make_embed(items), context, state.counter, state.gather
        )
    output = state.forward(mixed.images)
    loss = state.criterion(output, mixed.target, state.class_weight, context.moment.progress, state.reduction)
    return LossParts(loss, mixed, output)


@dataclass(frozen=True, eq=False)
class Stage:
    """A list of these is a training run.

    Args:
        background_batch: images per step, over all processes (eq. 2).
        foreground_probability: class probabilities `[K]` of the foreground stream (eq. 3); None without one.
        background_law: class probabilities of the background stream at a progress, where they are not the natural ones.
        both_streams: whether every step wants a foreground batch, be it mixed or not.
        reset: prefixes of modules whose parameters are initialised anew at the start. Everything else begins where the
            stage before ended.
        trains: prefixes of parameters that are trained; the rest are frozen.
        batchnorm: "train", or "eval" to keep running statistics as they are.
        bn_statistics: "running", or "mixed" to make them anew at the end of the stage (`mix_statistics`), or "auto" to
            do so where an epoch has `STATISTICS_STEPS`.
    """

    name: str
    epochs: int
    criterion: Criterion
    optimizer: OptimizerSettings
    schedule: Schedule
    background_batch: int
    foreground_probability: Tensor | None = None
    background_law: Callable[[float], Tensor | None] | None = None
    both_streams: bool = False
    mixer: BatchMixer | None = None
    reweighting: DeferredReweighting | None = None
    reduction: Reduction = "mean"
    reset: tuple[str, ...] = ()
    trains: tuple[str, ...] = ("",)
    batchnorm: Literal["train", "eval"] = "train"
    bn_statistics: Literal["auto", "running", "mixed"] = "running"
    step: Step = mix_and_classify

    def prepare(self, model: nn.Module, seed: int) -> None:
        """At the start of the stage: reset what is to be reset, freeze what is not trained, set the modes."""
        for name, module in model.named_modules():
            if name.startswith(self.reset) and hasattr(module, "reset_parameters"):
                _reset(module, derive_seed(seed, name))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(self.trains))
        self.set_modes(model)

    def statistics_epochs(self, steps: int) -> list[int]:
        """The last epochs with mixing, as many as hold `STATISTICS_STEPS` of so many steps each, over whose batches
        BatchNorm's statistics are made anew at the end; none where they stay.
        """
        if self.mixer is None or self.bn_statistics == "running" or self.batchnorm == "eval":
            return []
        if self.bn_statistics == "auto" and steps < STATISTICS_STEPS:
            return []
        return self.mixer.schedule.last_epochs(self.epochs, -(-STATISTICS_STEPS // steps))

    def set_modes(self, model: nn.Module) -> None:
        """The mode of each module during a training step."""
        model.train()
        if self.batchnorm == "eval":
            for norm in batch_norms(model):
                norm.eval()


def _reset(module: nn.Module, seed: int) -> None:
    """Initialise a module anew from `seed`: on the CPU, where torch's initialisers draw the same numbers everywhere."""
    fresh: Any = deepcopy(module).cpu()
    with torch.random.fork_rng(devices=[]):  # they draw from the global generator, which is put back
        torch.default_generator.manual_seed(seed)
        fresh.reset_parameters()
    module.load_state_dict(fresh.state_dict())
