"""The three ways to run OTmix: as the paper says, as its released code does, and ours.

The released code departs from the paper in many places. Each departure is one field of `Protocol`; a protocol sets them
together. `official` exists to show what its leak is worth: it looks at the test set, and says so wherever its numbers
appear.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, get_type_hints

from otmix.errors import UserError
from otmix.settings import Setting, Value

ProtocolName = Literal["clean", "paper", "official"]
ForegroundLaw = Literal["inverse-frequency", "effective-number"]
ConfusionFrom = Literal["streamed", "held-out", "validation", "balanced-train", "train", "test"]


def _setting(default: Any, meaning: str, why: str) -> Any:
    return field(default=default, metadata={"meaning": meaning, "why": why})


@dataclass(frozen=True)
class Protocol:
    """Every setting on which the paper, its released code and this library differ. The defaults are `clean`'s."""

    mix_probability: float = _setting(
        0.5,
        "probability that a batch inside the window is mixed",
        "paper, Algorithm 1: 1. Released code: 0.5, as in CMO's; mixing all hurt in our prototypes",
    )
    mix_from: float = _setting(
        4 / 240,
        "share of the run before mixing begins",
        "released code: not in epochs 0 to 3 of 240. The paper has no margin",
    )
    mix_until: float = _setting(
        237 / 240,
        "share of the run after which mixing stops; where it is below 1, the last of 10 epochs or more is plain "
        "however short the rest",
        "released code: not in the last 3 of 240 epochs, which leaves BatchNorm the statistics of plain images; "
        "measured (results/README.md). The paper has no margin",
    )
    mix_fraction: float = _setting(1.0, "share of the images within a mixed batch that are mixed", "paper, Table 7")
    bn_statistics: Literal["auto", "running", "mixed"] = _setting(
        "auto",
        "BatchNorm's statistics in the finished model: running, those of the last steps; mixed, the means over the "
        "batches of the last epochs with mixing, with the final weights; auto, mixed where an epoch has 64 batches or "
        "more, else running",
        "paper and released code: running; mixed was better on validation images of CIFAR-10 at imbalance 100, and "
        "worse on a few hundred training images (results/README.md)",
    )
    curriculum_power: float = _setting(
        1.0, "mu in Bernoulli((t/T)^mu), the probability of transport instead of random pairing", "paper, Fig. 8d"
    )
    curriculum_per: Literal["batch", "epoch"] = _setting(
        "batch", "how often the Bernoulli is drawn", "paper, Algorithm 1: per batch. Released code: per epoch"
    )
    curriculum_one_based: bool = _setting(
        True, "whether t counts from 1", "paper, Algorithm 1: yes. Released code: from 0"
    )
    foreground_law: ForegroundLaw = _setting(
        "inverse-frequency",
        "law of the foreground classes",
        "paper, eq. 3: either may be used; its experiments use the inverse frequency",
    )
    foreground_r: float = _setting(
        0.0,
        "r in q_k ~ n_k^-r, the probability of a foreground class",
        "paper, eq. 3 and section 5.1: 1. Released code: its weighted_alpha=1 is a weight 1/n per image, that is r = "
        "0; clean's was measured (results/README.md)",
    )
    alpha: float = _setting(4.0, "Beta(alpha, alpha) of the background's share", "paper, section 5.1")
    box: Literal["exact", "clipped"] = _setting(
        "exact",
        "how the box is placed: exact has area 1 - lambda and lies inside the image; clipped has a uniform centre and "
        "loses what sticks out",
        "paper, eq. 11 (area exactly 1 - lambda). Released code: clipped and floored, the background keeps .69 of the "
        "image on average",
    )
    box_per: Literal["batch", "image"] = _setting(
        "batch", "one box and share for a batch, or for each image", "released code; the paper is silent"
    )
    features: Literal["pooled", "official"] = _setting(
        "pooled",
        "features of the cost: pooled g1(x) in eval mode; or the released code's flattened last map in train mode (its "
        "gradient, which reaches nothing, is not kept)",
        "paper, section 4 (silent on mode and gradient). The released code's passes move BatchNorm's running "
        "statistics",
    )
    omega: float = _setting(0.05, "share of the feature cost in eq. 7", "paper, section 5.1")
    metric: Literal["cosine", "euclidean"] = _setting(
        "cosine", "distance of the feature cost", "paper, eq. 5 and Table 4"
    )
    keep_diagonal: bool = _setting(
        False, "keep the diagonal of F", "paper, section 4: zeroed. Table 4: 'keeping same category'"
    )
    epsilon: float = _setting(
        0.01,
        "weight of the entropy in eq. 4",
        "paper, section 5.1. The released iNaturalist script has 0.1. Solved until the marginals are right to 1e-4 or "
        "200 iterations are done; POT in the released code: 1e-9 or 1000",
    )
    select: Literal["argmax", "sample", "softmax"] = _setting(
        "argmax", "how a background is chosen from a row of the plan", "paper, eq. 8 and Table 4"
    )
    confusion_from: ConfusionFrom = _setting(
        "streamed",
        "the data F is estimated from; streamed: the training backgrounds that the cost embeds anyway; held-out: a "
        "validation split if the data has one, "
        "else a balanced subset of training",
        "paper, section 4: held-out, each epoch. Released code: the test set, each epoch. Streamed costs no forward "
        "pass",
    )
    confusion_soft: bool = _setting(
        True, "sum class probabilities in F instead of hard predictions", "paper and released code: hard predictions"
    )
    confusion_per_class: int = _setting(
        50, "images per class of a balanced training subset", "ours; the paper says 'small'"
    )
    confusion_run: str | None = _setting(
        None,
        "a finished run whose model F is estimated with, once, instead of with the present model after each epoch",
        "paper, Table 8: 'Fix', and Table 4's pairing by the confusion matrix of a model trained with ERM",
    )
    confusion_shuffle: float = _setting(
        0.0,
        "share of the classes whose rows of F change places with each other",
        "ours: what a wrong F does, which the paper names as its limitation",
    )
    confusion_noise: float = _setting(
        0.0, "share of each row of F that is replaced by random numbers", "ours, as confusion_shuffle"
    )
    weighted_mean: Literal["mean", "weighted-mean"] = _setting(
        "weighted-mean",
        "how a loss with deferred class weights is averaged over a batch",
        "released code: each of the two terms is divided by the sum of its own batch's weights, as F.cross_entropy "
        "does; paper, eq. 10: a plain mean; measured, see results/README.md",
    )
    headline: Literal["last", "best-on-test"] = _setting(
        "last", "which epoch's model is the result", "released code: the best epoch on the test set"
    )

    def __post_init__(self) -> None:
        if not 1e-6 <= self.epsilon < math.inf:
            raise UserError(f"epsilon must be a number of at least 1e-6, it is {self.epsilon}; the paper has 0.01")
        if not 0 <= self.omega <= 1:
            raise UserError(f"omega must lie in [0, 1], it is {self.omega}; the paper has 0.05")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"alpha must be a positive number, it is {self.alpha}; the paper has 4")
        if self.confusion_per_class < 1:
            raise UserError(f"confusion_per_class must be at least 1, it is {self.confusion_per_class}")
        if not self.curriculum_power >= 0:  # nor NaN
            raise UserError(f"curriculum_power must be 0 or more, it is {self.curriculum_power}; the paper has 1")
        if not math.isfinite(self.foreground_r):
            raise UserError(f"foreground_r must be a finite number, it is {self.foreground_r}; the paper has 1")
        shares = ("mix_probability", "mix_from", "mix_until", "mix_fraction", "confusion_shuffle", "confusion_noise")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is a share, in [0, 1]; it is {getattr(self, name)}")
        if self.mix_from > self.mix_until:
            raise UserError(
                f"mix_from {self.mix_from:.4g} lies above mix_until {self.mix_until:.4g}: mixing would end before it "
                "begins"
            )

        named = f"bn_statistics {self.bn_statistics}"
        if self.bn_statistics != "running" and self.features == "official":
            raise UserError(
                f"{named} does not go with features official, whose passes move BatchNorm's statistics; set features "
                "to pooled, or bn_statistics to running"
            )
        if self.bn_statistics != "running" and self.headline == "best-on-test":
            raise UserError(
                f"{named} changes the model that headline best-on-test has chosen; set headline to last, or "
                "bn_statistics to running"
            )

    @property
    def looks_at_test(self) -> bool:
        """Whether the test set has any influence on training or selection."""
        return self.confusion_from == "test" or self.headline == "best-on-test"


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "clean": Protocol(),
    "paper": Protocol(
        mix_probability=1.0,
        mix_from=0.0,
        mix_until=1.0,
        bn_statistics="running",
        foreground_r=1.0,
        confusion_from="held-out",
        confusion_soft=False,
        weighted_mean="mean",
    ),
    "official": Protocol(
        bn_statistics="running",
        curriculum_per="epoch",
        curriculum_one_based=False,
        box="clipped",
        features="official",
        confusion_from="test",
        confusion_soft=False,
        headline="best-on-test",
    ),
}

PROTOCOL_TITLES: dict[ProtocolName, str] = {
    "clean": "clean: our defaults; the test split is used once, at the end",
    "paper": "paper: Algorithm 1 and the paper's equations",
    "official": "official: as the released code does; F and the reported epoch are chosen on the TEST set",
}


@dataclass(frozen=True)
class Overrides:
    """Single settings changed: each field of `Protocol`, None where the protocol's own value stands; and in `parts`
    those of a method's parts, such as `loss.tau`.
    """

    mix_probability: float | None = None
    mix_from: float | None = None
    mix_until: float | None = None
    mix_fraction: float | None = None
    bn_statistics: Literal["auto", "running", "mixed"] | None = None
    curriculum_power: float | None = None
    curriculum_per: Literal["batch", "epoch"] | None = None
    curriculum_one_based: bool | None = None
    foreground_law: ForegroundLaw | None = None
    foreground_r: float | None = None
    alpha: float | None = None
    box: Literal["exact", "clipped"] | None = None
    box_per: Literal["batch", "image"] | None = None
    features: Literal["pooled", "official"] | None = None
    omega: float | None = None
    metric: Literal["cosine", "euclidean"] | None = None
    keep_diagonal: bool | None = None
    epsilon: float | None = None
    select: Literal["argmax", "sample", "softmax"] | None = None
    confusion_from: ConfusionFrom | None = None
    confusion_soft: bool | None = None
    confusion_per_class: int | None = None
    confusion_run: str | None = None
    confusion_shuffle: float | None = None
    confusion_noise: float | None = None
    weighted_mean: Literal["mean", "weighted-mean"] | None = None
    headline: Literal["last", "best-on-test"] | None = None
    parts: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Each value in its setting's type. Raises UserError for one that the setting cannot have."""
        for name, kind in _kinds().items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Setting(name, kind, None, "").convert(value, f"--set.{name}"))

    def to_dict(self) -> dict[str, Any]:
        """What is changed, by the names that stand after `--set.`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parts"}
        return {name: value for name, value in own.items() if value is not None} | dict(self.parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Overrides:
        """The inverse of `to_dict`; `{"loss": {"tau": 2}}` is `{"loss.tau": 2}`. Raises UserError for a wrong name."""
        flat: dict[str, Any] = {}
        for name, value in values.items():
            nested = isinstance(value, Mapping) and name not in _kinds()
            flat |= {f"{name}.{key}": one for key, one in value.items()} if nested else {name: value}
        own = {name: value for name, value in flat.items() if "." not in name}
        if unknown := [name for name in own if name not in _kinds()]:
            close = difflib.get_close_matches(unknown[0], _kinds(), n=1)
            hint = f"did you mean {close[0]}?" if close else "`otmix methods otmix` shows what can be set"
            raise UserError(f"there is no setting {unknown[0]}; {hint}")
        return cls(**own, parts={name: value for name, value in flat.items() if "." in name})


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(Protocol)


def resolve(
    name: ProtocolName,
    overrides: Overrides | None = None,
    adjust: Callable[[Protocol], Protocol] = lambda protocol: protocol,
) -> Protocol:
    """A protocol, with what `adjust` makes of it, and some of its settings changed.

    Raises UserError for an unknown name or a bad value.
    """
    if name not in PROTOCOLS:
        raise UserError(f"there is no protocol named {name!r}; choose one of {', '.join(PROTOCOLS)}")
    changed = {} if overrides is None else {f.name: getattr(overrides, f.name) for f in fields(Protocol)}
    given = {key: value for key, value in changed.items() if value is not None}
    if given.get("headline") == "best-on-test" or given.get("features") == "official":
        given.setdefault("bn_statistics", "running")
    return replace(adjust(PROTOCOLS[name]), **given)
