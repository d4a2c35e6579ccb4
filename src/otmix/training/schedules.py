"""Learning-rate schedules as functions of where in the run a step is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from otmix.errors import UserError

ScheduleName = Literal["steps", "ldam", "bbn", "imagenet-lt", "inaturalist", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A factor on the initial learning rate.

    "steps": `factors[i]` from the share `milestones[i]` of the epochs on (paper, section 5.1: x .1, .01, .0001 from
    epochs 100, 160, 200 of 240). "cosine": half a cosine from 1 to 0, per step. `warmup`: the share of the run over
    which the factor rises linearly first, from `warm_from`, per epoch as in LDAM's code for "steps", per step for
    "cosine". `deferred`: the share of the run from which deferred re-weighting and re-sampling take effect, unless told
    otherwise.
    """

    kind: Literal["steps", "cosine"] = "steps"
    milestones: tuple[float, ...] = (100 / 240, 160 / 240, 200 / 240)
    factors: tuple[float, ...] = (0.1, 0.01, 0.0001)
    warmup: float = 0.0
    deferred: float = 160 / 240
    warm_from: float = 0.0

    @classmethod
    def named(
        cls, name: ScheduleName, warmup: float = 0.0, own_steps: tuple[tuple[float, float], ...] | None = None
    ) -> Schedule:
        """The schedule of a configuration, which knows the warm-up. `own_steps` of a loss replace milestones and
        factors, but for cosine.
        """
        found = replace(_SCHEDULES[name], warmup=warmup)
        if own_steps is None or name == "cosine":
            return found
        milestones, factors = (tuple(each) for each in zip(*own_steps))
        return replace(found, milestones=milestones, factors=factors)

    def __post_init__(self) -> None:
        if len(self.milestones) != len(self.factors) or list(self.milestones) != sorted(self.milestones):
            raise UserError(
                f"a step schedule needs rising milestones and as many factors, not {self.milestones} and {self.factors}"
            )

    def factor(self, epoch: int, epochs: int, step: int = 0, steps: int = 1) -> float:
        """The factor at `step` of `steps` in `epoch` of `epochs`, both counted from 0."""
        warm_epochs = self.warmup * epochs
        if self.kind == "steps":
            if epoch + 1 <= warm_epochs:
                return self.warm_from + (1.0 - self.warm_from) * (epoch + 1) / warm_epochs
            passed = [factor for milestone, factor in zip(self.milestones, self.factors) if epoch / epochs >= milestone]
            return passed[-1] if passed else 1.0
        done = epoch + step / steps
        if done < warm_epochs:
            return self.warm_from + (1.0 - self.warm_from) * (done + 1 / steps) / (warm_epochs + 1 / steps)
        return 0.5 * (1.0 + math.cos(math.pi * (done - warm_epochs) / (epochs - warm_epochs)))


_SCHEDULES: dict[ScheduleName, Schedule] = {
    "steps": Schedule(),
    "imagenet-lt": Schedule(milestones=(40 / 200, 80 / 200, 160 / 200), deferred=80 / 200),
    "inaturalist": Schedule(
        milestones=(30 / 210, 80 / 210, 130 / 210, 180 / 210), factors=(0.1, 0.01, 0.001, 0.0001), deferred=160 / 210
    ),
    "ldam": Schedule(milestones=(160 / 200, 180 / 200), factors=(0.01, 0.0001), deferred=160 / 200),
    "bbn": Schedule(milestones=(119 / 200, 159 / 200), factors=(0.01, 0.0001), deferred=160 / 200, warm_from=1 / 3),
    "cosine": Schedule("cosine"),
}
"""The steps of the first three are the paper's, section 5.1, for CIFAR, ImageNet-LT and iNaturalist; their `deferred`
is that of its released code. Where no source speaks of deferred re-weighting, in BBN's code and of a cosine, it begins
as LDAM's and as on CIFAR. How long each warms up stands in `config.WARMUPS`.
"""
