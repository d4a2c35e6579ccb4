"""What an OTMixer is made of: whether it is what it should be."""

from __future__ import annotations

from torch import nn

from otmix.errors import UserError
from otmix.mixer import MixSchedule
from otmix.models.batchnorm import batch_norms
from otmix.models.embedding import unwrap
from otmix.pairing import Curriculum


def check_model(model: object) -> None:
    """Raises UserError for what cannot be called with images."""
    wanted, example = "a module or a function of images", "lambda images: (features(images), logits(images))"
    _check("model", model, callable(model), wanted, example)


def check_pairing(pairing: object) -> None:
    """Raises UserError for what is no pairing; of a curriculum, for parts that are none."""
    for part in (pairing.first, pairing.then) if isinstance(pairing, Curriculum) else ():
        check_pairing(part)
    fits = callable(pairing) and hasattr(pairing, "from_foregrounds")
    _check("pairing", pairing, fits, "callable and have from_foregrounds", "TransportPairing()")


def check_pixels(pixels: object) -> None:
    """Raises UserError for what is no pixel rule."""
    fits = all(callable(getattr(pixels, method, None)) for method in ("draw", "apply"))
    _check("pixels", pixels, fits, "a rule with the methods draw and apply", "CutMix()")


def check_schedule(schedule: object) -> None:
    """Raises UserError for what is no schedule."""
    _check("schedule", schedule, isinstance(schedule, MixSchedule), "a MixSchedule", "MixSchedule(0.5)")


def check_batch_norm(model: object) -> nn.Module:
    """The network itself, out of its wrappers. Raises UserError for one without running statistics."""
    if isinstance(model, nn.Module):
        model = unwrap(model)
        model = model._modules.get("_orig_mod") or model  # a graph would be compiled for these few batches
    if not isinstance(model, nn.Module) or not batch_norms(model):
        raise UserError(
            f"mix_statistics wants a model with BatchNorm layers that keep running statistics, and this "
            f"{type(model).__name__} has none; give it the network that you train, or leave it out"
        )
    return model


def _check(name: str, given: object, fits: bool, wanted: str, example: str) -> None:
    if isinstance(given, type):
        its = given.__name__
        raise UserError(f"OTMixer's {name} must be an object, not the class {its}; write {its}() to make one")
    if not fits:
        raise UserError(f"OTMixer's {name} must be {wanted}, not a {type(given).__name__}; for example {example}")
