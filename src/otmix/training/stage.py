"""One stage of training as a value, and its step.

OTmix has one stage. A method that needs more than a loss and a mixer (two streams through two branches, gradients on
pixels) brings its own `step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from otmix.confusion import ConfusionCounter
from otmix.losses import Criterion, DeferredReweighting, Reduction
from otmix.mixer import BatchMixer
from otmix.models import Classifier
from otmix.pairing import PairingContext
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
    """The images of one step; `foreground` is there only when this step's mixing takes from the second stream."""

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
    one.
    """

    model: Classifier
    forward: Callable[[Tensor], Output]
    make_embed: Callable[[StepItems], Embed]
    criterion: Criterion
    class_weight: Tensor | None
    reduction: Reduction
    mixer: BatchMixer | None
    counter: ConfusionCounter | None


class Step(Protocol):
    """A training step up to the loss; the loop does the rest."""

    def __call__(self, state: StepState, items: StepItems, context: PairingContext, /) -> LossParts: ...


def mix_and_classify(state: StepState, items: StepItems, context: PairingContext) -> LossParts:
    """Algorithm 1: pair, mix, classify, and weigh the loss by shares (eq. 8 to 10). Without a mixer: plain training."""
    if state.mixer is None:
        mixed = Mixed.unmixed(items.background)
    else:
        mixed = state.mixer(items.background, items.foreground, state.make_embed(items), context, state.counter)
    output = state.forward(mixed.images)
    loss = state.criterion(output, mixed.target, state.class_weight, context.moment.progress, state.reduction)
    return LossParts(loss, mixed, output)


@dataclass(frozen=True, eq=False)
class Stage:
    """A list of these is a training run.

    Args:
        start: "fresh" weights, or those the "previous" stage (or a checkpoint) ended with.
        reset: prefixes of modules whose parameters are initialised anew at the start.
        trains: prefixes of parameters that are trained; the rest are frozen.
        batchnorm: "train", or "eval" to keep running statistics as they are.
        background: draws the items of an epoch (eq. 2), `foreground` those of a step (eq. 3); None without a second
            stream.
    """

    name: str
    epochs: int
    criterion: Criterion
    optimizer: OptimizerSettings
    schedule: Schedule
    background_batch: int
    foreground_probability: Tensor | None = None
    mixer: BatchMixer | None = None
    reweighting: DeferredReweighting | None = None
    reduction: Reduction = "mean"
    start: Literal["fresh", "previous"] = "fresh"
    reset: tuple[str, ...] = ()
    trains: tuple[str, ...] = ("",)
    batchnorm: Literal["train", "eval"] = "train"
    step: Step = mix_and_classify

    def prepare(self, model: nn.Module) -> None:
        """Freeze what is not trained, and set the modes of the modules for a training step."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(self.trains))
        self.set_modes(model)

    def set_modes(self, model: nn.Module) -> None:
        model.train()
        if self.batchnorm == "eval":
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
