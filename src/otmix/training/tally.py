"""What the log wants to know of an epoch, added up on the device so that no step waits for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from otmix.counting import CountTable
from otmix.training.stage import LossParts

# sums kept in one tensor so that reading them, or adding them up over processes, is one transfer
LOSS, RIGHT, SEEN, MIXED, TRANSPORTED, TRANSPORT_STEPS = range(6)


class Tally:
    """Sums over the steps of one epoch, and over the whole run the classes that were paired with each other (Fig. 9):
    `pairs`, foreground class × background class, by the rule that made them (`Pairs.by`). All processes pair by the
    same rules.

    `bad_step` is the first step whose loss was not finite, or −1; `marginal_error` the largest of the epoch's plans.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes, self.device = num_classes, device
        self.pairs: dict[str, CountTable] = {}
        self.start_epoch()

    def start_epoch(self) -> None:
        self.sums = torch.zeros(
            6, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device
        )
        self.marginal_error = torch.zeros((), device=self.device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.seconds = 0.0

    @torch.no_grad()
    def add(self, parts: LossParts, step: int) -> None:
        mixed, target = parts.mixed, parts.mixed.target
        loss = parts.loss.detach()
        n = target.labels.shape[0]
        said = parts.output.logits.detach().argmax(1)
        right = (target.shares * (target.labels == said[:, None])).sum()
        self.bad_step = torch.where((self.bad_step < 0) & ~torch.isfinite(loss), step, self.bad_step)
        self.sums[LOSS] += loss * n
        self.sums[RIGHT] += right
        self.sums[SEEN] += n
        if mixed.pairs is None:
            return
        self.sums[MIXED] += mixed.mixed.sum()
        # a foreground that was not pasted (Table 7's fraction) has the background's label in column 1 and is no pair
        self._pairs_by(mixed.pairs.by).add(target.labels[:, -1], target.labels[:, 0], mixed.mixed.to(torch.float32))
        if mixed.pairs.plan is not None:
            self.sums[TRANSPORTED] += mixed.mixed.sum()
            self.sums[TRANSPORT_STEPS] += 1
            self.marginal_error = torch.maximum(self.marginal_error, mixed.pairs.plan.marginal_error.max())

    def _pairs_by(self, rule: str) -> CountTable:
        if rule not in self.pairs:
            self.pairs[rule] = CountTable(self.num_classes, self.device)
        return self.pairs[rule]

    def read(self, add_up: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means and shares so far; waits for the device. `add_up` sums a tensor over all processes."""
        sums = (add_up(self.sums.clone()) if add_up else self.sums).tolist()
        seen = max(sums[SEEN], 1.0)
        return {
            "loss": sums[LOSS] / seen,
            "train_error": 1.0 - sums[RIGHT] / seen,
            "images": sums[SEEN],
            "mixed_share": sums[MIXED] / seen,
            "transport_share": sums[TRANSPORTED] / seen,
            "transport_steps": sums[TRANSPORT_STEPS],
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": self.sums.cpu(),
            "marginal_error": self.marginal_error.cpu(),
            "bad_step": self.bad_step.cpu(),
            "seconds": self.seconds,
            "pairs": {by: table.value.cpu() for by, table in self.pairs.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = state["sums"].to(self.device, self.sums.dtype)
        self.marginal_error = state["marginal_error"].to(self.device)
        self.bad_step = state["bad_step"].to(self.device)
        self.seconds = state["seconds"]
        for by, table in state["pairs"].items():
            self._pairs_by(by).value = table
