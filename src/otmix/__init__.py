"""otmix: image classifiers for long-tailed data. The public names are loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from otmix.config import RunConfig
    from otmix.confusion import ConfusionCounter
    from otmix.costs import CombinedCost, ConfusionCost, Cost, FeatureCost
    from otmix.data import ImageDataset, load_dataset
    from otmix.errors import UserError
    from otmix.evaluation import Evaluation, evaluate_predictions
    from otmix.experiments import compare
    from otmix.inference import evaluate_run, predict_paths
    from otmix.losses import LOSSES, Criterion, register_loss
    from otmix.methods import Method, parse_method
    from otmix.mixer import BatchMixer, MixSchedule
    from otmix.mixing import CutMix, Mixer, Mixup, register_mixer
    from otmix.models import Classifier, build_model, embed, make_embed
    from otmix.own_loop import OTMixer
    from otmix.pairing import (
        ConfusionPairing,
        Curriculum,
        IndexPairing,
        Pairing,
        PairingContext,
        TransportPairing,
        WithinBatchPairing,
    )
    from otmix.protocols import PROTOCOLS, Protocol
    from otmix.randomness import Moment
    from otmix.sampling import (
        BackgroundStream,
        ForegroundSampler,
        ForegroundStream,
        effective_number,
        inverse_frequency,
    )
    from otmix.training import Interrupted, Run, open_run, train
    from otmix.transport import sinkhorn
    from otmix.types import (
        Batch,
        ClassCounts,
        Confusion,
        ConfusionOrigin,
        Embed,
        Embedded,
        Items,
        Mixed,
        Output,
        Pairs,
        Plan,
        Target,
    )

_FROM: dict[str, tuple[str, ...]] = {
    "config": ("RunConfig",),
    "confusion": ("ConfusionCounter",),
    "costs": ("CombinedCost", "ConfusionCost", "Cost", "FeatureCost"),
    "data": ("ImageDataset", "load_dataset"),
    "errors": ("UserError",),
    "evaluation": ("Evaluation", "evaluate_predictions"),
    "experiments": ("compare",),
    "inference": ("evaluate_run", "predict_paths"),
    "losses": ("LOSSES", "Criterion", "register_loss"),
    "methods": ("Method", "parse_method"),
    "mixer": ("BatchMixer", "MixSchedule"),
    "mixing": ("CutMix", "Mixer", "Mixup", "register_mixer"),
    "models": ("Classifier", "build_model", "embed", "make_embed"),
    "own_loop": ("OTMixer",),
    "pairing": (
        *("ConfusionPairing", "Curriculum", "IndexPairing", "Pairing", "PairingContext", "TransportPairing"),
        "WithinBatchPairing",
    ),
    "protocols": ("PROTOCOLS", "Protocol"),
    "randomness": ("Moment",),
    "sampling": ("BackgroundStream", "ForegroundSampler", "ForegroundStream", "effective_number", "inverse_frequency"),
    "training": ("Interrupted", "Run", "open_run", "train"),
    "transport": ("sinkhorn",),
    "types": (
        *("Batch", "ClassCounts", "Confusion", "ConfusionOrigin", "Embed", "Embedded", "Items", "Mixed", "Output"),
        *("Pairs", "Plan", "Target"),
    ),
}
_MODULES = {name: module for module, names in _FROM.items() for name in names}

__all__ = [
    "LOSSES",
    "PROTOCOLS",
    "BackgroundStream",
    "Batch",
    "BatchMixer",
    "ClassCounts",
    "Classifier",
    "CombinedCost",
    "Confusion",
    "ConfusionCost",
    "ConfusionCounter",
    "ConfusionOrigin",
    "ConfusionPairing",
    "Cost",
    "Criterion",
    "Curriculum",
    "CutMix",
    "Embed",
    "Embedded",
    "Evaluation",
    "FeatureCost",
    "ForegroundSampler",
    "ForegroundStream",
    "ImageDataset",
    "IndexPairing",
    "Interrupted",
    "Items",
    "Method",
    "MixSchedule",
    "Mixed",
    "Mixer",
    "Mixup",
    "Moment",
    "OTMixer",
    "Output",
    "Pairing",
    "PairingContext",
    "Pairs",
    "Plan",
    "Protocol",
    "Run",
    "RunConfig",
    "Target",
    "TransportPairing",
    "UserError",
    "WithinBatchPairing",
    "__version__",
    "build_model",
    "compare",
    "effective_number",
    "embed",
    "evaluate_predictions",
    "evaluate_run",
    "inverse_frequency",
    "load_dataset",
    "make_embed",
    "open_run",
    "parse_method",
    "predict_paths",
    "register_loss",
    "register_mixer",
    "sinkhorn",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'otmix' has no attribute {name!r}")
    value = getattr(import_module(f"otmix.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *globals()]
