"""The pieces of a method from its settings: loss, rebalancing, mixer, and what the network must know of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from otmix.costs import CombinedCost
from otmix.errors import UserError
from otmix.losses import LOSSES, RIDE, Criterion, DeferredReweighting
from otmix.methods.method import Method, experts
from otmix.mixer import BatchMixer, MixSchedule
from otmix.mixing import PIXEL_RULES, Mixer
from otmix.models.experts import check_experts
from otmix.pairing import (
    ConfusionPairing,
    Curriculum,
    IndexPairing,
    Pairing,
    TransportPairing,
    WithinBatchPairing,
)
from otmix.protocols import Overrides, Protocol
from otmix.sampling import ClassSampling
from otmix.settings import chosen
from otmix.types import ClassCounts


def check_pieces(method: Method, protocol: Protocol, filled: Overrides) -> None:
    """Build once whatever is made of settings: each piece knows which values it can have, and raises UserError.

    It is built for ten small classes, and what these refuse, larger ones do too. A piece of one's own that needs the
    real classes is left to the run.
    """
    counts = ClassCounts(torch.tensor([2, *[1] * 9]))
    pieces: tuple[Callable[[], object], ...] = (
        lambda: build_criterion(method, counts, filled),
        lambda: check_experts(_experts(filled)),
        lambda: build_rebalancing(method, counts, filled),
        lambda: build_mixer(method, protocol, counts, filled),
    )
    for build in pieces:
        try:
            build()
        except UserError:
            raise
        except Exception:  # whatever someone's own code raises
            continue


def build_criterion(method: Method, counts: ClassCounts, filled: Overrides) -> Criterion:
    """The loss of a method, of each of its experts for RIDE, with its effective settings."""
    part = LOSSES[method.loss]
    criterion = part(counts, **chosen(part, filled.parts, "loss"))
    if method.architecture != "ride":
        return criterion
    return RIDE(counts, criterion, **chosen(RIDE, filled.parts, "model"))  # type: ignore[arg-type]  # settings in their types, as `chosen` reads them


def architecture_of(method: Method, criterion: Criterion, filled: Overrides) -> dict[str, Any]:
    """What `build_model` needs to know of a method: head, architecture and experts."""
    return {
        "head": criterion.head,
        "architecture": method.architecture,
        "experts": _experts(filled),
    }


def _experts(filled: Overrides) -> int:
    return experts(**chosen(experts, filled.parts, "model"))  # type: ignore[arg-type]  # checked by `chosen`


def build_rebalancing(
    method: Method, counts: ClassCounts, filled: Overrides
) -> tuple[DeferredReweighting | None, ClassSampling | None]:
    """Class weights of the loss, or classes of the background stream."""
    if method.rebalancing is None:
        return None, None
    part = DeferredReweighting if method.drw else ClassSampling
    built = part(counts, **chosen(part, filled.parts, "rebalancing"))  # type: ignore[arg-type]
    return (built, None) if isinstance(built, DeferredReweighting) else (None, built)


def build_mixer(method: Method, protocol: Protocol, counts: ClassCounts, filled: Overrides) -> BatchMixer | None:
    """Pairing, pixel rule and schedule of a method under a protocol; None for a method that mixes nothing."""
    if method.pixels is None:
        return None
    pixels = build_pixel_rule(method.pixels, protocol, counts, filled)
    pairing: Pairing = IndexPairing()
    if method.pairing == "within-batch":
        pairing = WithinBatchPairing(getattr(pixels, "partner_weight", None))
    elif method.pairing == "confusion":
        pairing = ConfusionPairing()
    elif method.pairing == "transport":
        cost = partial(CombinedCost, omega=protocol.omega, metric=protocol.metric, keep_diagonal=protocol.keep_diagonal)
        transport = TransportPairing(cost, protocol.epsilon, select=protocol.select)
        pairing = Curriculum(
            pairing, transport, protocol.curriculum_power, protocol.curriculum_per, protocol.curriculum_one_based
        )
    schedule = MixSchedule(protocol.mix_probability, (protocol.mix_from, protocol.mix_until), protocol.mix_fraction)
    return BatchMixer(pairing, pixels, schedule)


def build_pixel_rule(name: str, protocol: Protocol, counts: ClassCounts, filled: Overrides) -> Mixer:
    """A rule of `PIXEL_RULES`. It gets what its constructor takes: the protocol's alpha, box and per, the counts, and
    its own settings.
    """
    rule: Callable[..., Mixer] = PIXEL_RULES[name]
    offered = {"alpha": protocol.alpha, "box": protocol.box, "per": protocol.box_per, "counts": counts}
    takes = inspect.signature(rule).parameters
    return rule(**{key: value for key, value in offered.items() if key in takes}, **chosen(rule, filled.parts, "mixer"))
