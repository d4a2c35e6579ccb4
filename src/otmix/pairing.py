"""Which background each foreground gets, and when (eq. 8 and Algorithm 1 of Gao et al. 2023).

A pairing maps two lots of candidates to `Pairs`. It sees items and an `embed` callable, never pixels; its candidates
are the two batches of a step. Its random choices come from the moment in its context; its choices that depend on the
model are made when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from otmix.costs import CombinedCost, Cost
from otmix.devices import move
from otmix.errors import UserError
from otmix.randomness import Moment
from otmix.transport import sinkhorn
from otmix.types import Confusion, Embed, Items, Pairs

Selection = Literal["argmax", "sample", "softmax"]
CurriculumPer = Literal["batch", "epoch"]


@dataclass(frozen=True)
class PairingContext:
    """What a pairing may depend on besides its candidates: where in the run it is, and the present confusion matrix."""

    moment: Moment = field(default_factory=Moment)
    confusion: Confusion | None = None


class Pairing(Protocol):
    """Chooses one background for each foreground.

    `from_foregrounds` is False where a batch is mixed with itself and needs no foreground stream. `searches`: whether
    it looks among all backgrounds for those that suit, so that its choice depends on how large the batch is; then
    several processes put their parts together first, and it must give each foreground, in order, a background.
    """

    @property
    def from_foregrounds(self) -> bool: ...

    @property
    def searches(self) -> bool: ...

    def __call__(self, foreground: Items, background: Items, embed: Embed, context: PairingContext) -> Pairs: ...


@dataclass(frozen=True)
class IndexPairing:
    """The i-th foreground goes into the i-th background: both were drawn independently, so this is a random pairing
    (CMO, Park et al. 2022).
    """

    from_foregrounds = True
    searches = False

    def __call__(self, foreground: Items, background: Items, embed: Embed, context: PairingContext) -> Pairs:
        both = torch.arange(min(len(foreground), len(background)), device=background.labels.device)
        return Pairs(both, both, by="index")


@dataclass(frozen=True, eq=False)
class WithinBatchPairing:
    """Each image is the background of another one of its own batch, by a uniformly random permutation (CutMix, Mixup,
    Remix).

    With `class_weight [K]`, the foreground of each is drawn from the whole batch instead, itself included, with
    replacement and a probability proportional to the weight of its class (UniMix, Xu et al. 2021: n_k^τ). Raises
    ValueError for weights that are no vector of finite numbers above 0.
    """

    from_foregrounds = False
    searches = False

    class_weight: Tensor | None = None

    def __post_init__(self) -> None:
        weight = self.class_weight
        if weight is not None and not (weight.ndim == 1 and bool((torch.isfinite(weight) & (weight > 0.0)).all())):
            raise ValueError("class weights of a pairing must be a vector [K] of finite numbers above 0")

    def __call__(self, foreground: Items, background: Items, embed: Embed, context: PairingContext) -> Pairs:
        device, n = background.labels.device, len(background)
        generator = context.moment.generator("pairing")
        if self.class_weight is None:
            partner = move(torch.randperm(n, generator=generator), device)
        else:
            weight = move(self.class_weight, device, torch.float32)[background.labels]
            # cumsum, but the same on every run: on CUDA it is not
            edges = weight.expand(n, n).tril().sum(1)
            point = move(torch.rand(n, generator=generator, dtype=torch.float64), device, torch.float32)
            # the minimum is for a point that float32 rounded up to 1
            partner = torch.searchsorted(edges, point * edges[-1], right=True).clamp_max_(n - 1)
        return Pairs(partner, torch.arange(n, device=device), by="within-batch")


def _otmix_cost(confusion: Confusion | None) -> Cost:
    return CombinedCost(confusion)


TIE = 1e-4
"""Entries of a plan that differ by less, of themselves, are equal but for rounding and what `tolerance` leaves open."""


@dataclass(frozen=True)
class TransportPairing:
    """Eq. 4 and 8: solve entropic transport between the two batches, then give foreground i the background with the
    largest T[i, j].

    `cost` builds the cost from the present confusion matrix (None before the first estimate). `select`: "argmax" (eq.
    8); "sample", a draw from row i of the plan; "softmax", Table 4's "probability selection": a draw from softmax(T[i,
    :]), which is nearly uniform because the entries of the plan are at most 1/f. Both masses are uniform: the sampling
    already carries w_j.

    Where the cost goes by classes alone (Table 4's omega 0), row i has one value for all backgrounds of a class, and
    argmax is one of the largest at random. The paper is silent on it; the released code takes what rounding makes the
    largest, and so a handful of backgrounds for a whole batch.
    """

    from_foregrounds = True
    searches = True

    cost: Callable[[Confusion | None], Cost] = _otmix_cost
    epsilon: float = 0.01
    max_iterations: int = 200
    tolerance: float = 1e-4
    select: Selection = "argmax"

    def __post_init__(self) -> None:
        if self.select not in get_args(Selection):
            raise UserError(f"transport selects by 'argmax', 'sample' or 'softmax', not {self.select!r}")

    @torch.no_grad()
    def __call__(self, foreground: Items, background: Items, embed: Embed, context: PairingContext) -> Pairs:
        embedded_foreground, embedded_background = embed(foreground), embed(background)
        device = embedded_foreground.features.device
        with torch.autocast(
            device.type, enabled=False
        ):  # a bfloat16 cost would round away differences of the size of epsilon
            cost = self.cost(context.confusion)
            plan = sinkhorn(
                cost(embedded_foreground, embedded_background),
                epsilon=self.epsilon,
                max_iterations=self.max_iterations,
                tolerance=self.tolerance,
            )
            generator = context.moment.generator("pairing")
            if self.select == "argmax" and getattr(cost, "by_class_alone", False):
                largest = plan.coupling.amax(1, keepdim=True)
                drawn = move(torch.rand(plan.coupling.shape, generator=generator), device)
                chosen = (drawn + (plan.coupling >= (1.0 - TIE) * largest)).argmax(1)
            elif self.select == "argmax":
                chosen = plan.favourites
            else:
                weights = plan.coupling if self.select == "sample" else plan.coupling.softmax(1)
                # a race of exponential clocks with these rates: the noise can come from a CPU generator, and no host is
                # needed
                uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
                finish = move(-torch.log1p(-uniform), device, torch.float32)
                chosen = (finish / weights.clamp_min(torch.finfo(torch.float32).tiny)).argmin(1)
        return Pairs(torch.arange(len(foreground), device=chosen.device), chosen, by="transport", plan=plan)


@dataclass(frozen=True)
class ConfusionPairing:
    """Table 4's last row: foreground class k goes into a random background of the class that a model confuses k with
    most.

    `context.confusion` says it; the paper's is that of a finished run. Where that class is not in the
    batch, for a class that is confused with none, and before F is known, the background is drawn from the whole batch
    (the paper is silent on this).
    """

    from_foregrounds = True
    searches = True

    def __call__(self, foreground: Items, background: Items, embed: Embed, context: PairingContext) -> Pairs:
        device = background.labels.device
        confusion = context.confusion
        if confusion is None:
            return IndexPairing()(foreground, background, embed, context)
        every = torch.arange(confusion.num_classes, device=device)
        most, partner = confusion.lookup(foreground.labels, every).max(1)
        drawn = torch.rand(len(foreground), len(background), generator=context.moment.generator("pairing"))
        wanted = (partner[:, None] == background.labels[None, :]) & (most > 0)[:, None]
        score = move(drawn, device) + wanted
        return Pairs(torch.arange(len(foreground), device=device), score.argmax(1), by="confusion")


@dataclass(frozen=True)
class Curriculum:
    """`then` with probability (t/T)^power, else `first` (Algorithm 1, line 4; `power` is the mu of Fig. 8d).

    The paper draws once a batch, with t from 1; the released code once an epoch, with t from 0.
    """

    first: Pairing
    then: Pairing
    power: float = 1.0
    per: CurriculumPer = "batch"
    one_based: bool = True

    @property
    def from_foregrounds(self) -> bool:
        return self.first.from_foregrounds or self.then.from_foregrounds

    @property
    def searches(self) -> bool:
        return self.first.searches or self.then.searches

    def __post_init__(self) -> None:
        if not self.power >= 0:  # nor NaN
            raise UserError(f"the power of the curriculum must be 0 or more, it is {self.power}; the paper has 1")
        if self.per not in get_args(CurriculumPer):
            raise UserError(f"the curriculum draws per 'batch' or per 'epoch', not per {self.per!r}")

    def probability(self, moment: Moment) -> float:
        """(t/T)^power at this epoch."""
        return float(((moment.epoch + self.one_based) / moment.epochs) ** self.power)

    def choose(self, moment: Moment) -> Pairing:
        """The pairing of this step: a function of the moment alone. All processes choose alike."""
        place = (
            moment.at_epoch()
            if self.per == "epoch"
            else Moment(moment.seed, moment.stage, moment.epoch, moment.epochs, moment.step)
        )
        draw = float(torch.rand((), generator=place.generator("curriculum"), dtype=torch.float64))
        return self.then if draw < self.probability(moment) else self.first

    def __call__(self, foreground: Items, background: Items, embed: Embed, context: PairingContext) -> Pairs:
        return self.choose(context.moment)(foreground, background, embed, context)
