"""How the model confuses the classes, estimated from named data (Gao et al. 2023, section 4, "Cost Function", and Table
8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from otmix.counting import CountTable, normalise_rows
from otmix.errors import UserError
from otmix.types import Confusion, ConfusionOrigin


def perturb(confusion: Confusion, shuffle: float, noise: float, generator: torch.Generator) -> Confusion:
    """A confusion matrix made wrong on purpose, to see what that does: equal generators give equal errors.

    The rows of a random share `shuffle` of the classes, two at least, change places in a cycle, so that no one keeps
    its own; then a share `noise` of each row is replaced by uniform random numbers that sum to as much, which makes a
    sparse matrix dense (8142 classes: 265 MB). 0 and 0 change nothing.
    """
    if shuffle == 0 and noise == 0:
        return confusion
    matrix, classes = confusion.matrix, confusion.num_classes
    order = torch.randperm(classes, generator=generator)
    if shuffle > 0:
        moved = order[: max(2, round(shuffle * classes))].to(matrix.device)
        source = torch.arange(classes, device=matrix.device).index_copy(0, moved, moved.roll(1))
        matrix = matrix.index_select(0, source)
    if noise > 0:
        matrix = matrix.to_dense()
        random = torch.rand(classes, classes, generator=generator).to(matrix)
        random *= matrix.sum(1, keepdim=True) / random.sum(1, keepdim=True)
        matrix = torch.lerp(matrix, random, noise)
    return Confusion(matrix, replace(confusion.origin, perturbed=True))


STREAM_DECAY = 0.9
"""What a streamed count keeps from one epoch to the next: about ten epochs of memory, so that classes met once in two
batches have a row.
"""

SOFT_TOP = 16
"""How many of an image's largest class probabilities a soft count keeps where the table is sparse."""


class ConfusionCounter:
    """Adds up what the model said of images whose class is known, and turns it into a `Confusion`.

    Soft counts add the class probabilities to the true class's row, hard counts add 1 in the column of the largest.
    `add` never waits for the device. `decay` multiplies what was counted before each time an estimate is taken: 0
    forgets it (each epoch counts afresh), 0.9 remembers about ten epochs, which a stream of mini-batches needs to have
    seen the rare classes often enough.
    """

    def __init__(
        self, num_classes: int, origin: ConfusionOrigin, *, decay: float = 0.0, device: torch.device | str = "cpu"
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], not be {decay}")
        self.origin = origin
        self.decay = decay
        self.table = CountTable(num_classes, device)

    def add(self, labels: Tensor, log_probabilities: Tensor) -> None:
        """Count images of true class `labels [n]`, of which the model said `log_probabilities [n,K]`.

        An image of which it said no number (NaN) is not counted. Raises UserError for other shapes.
        """
        if log_probabilities.shape != (len(labels), self.table.num_classes):
            raise UserError(
                f"of {len(labels)} images the model said {list(log_probabilities.shape)} numbers, but there are "
                f"{self.table.num_classes} classes; let it give one logit a class, and (features, logits) in that order"
            )
        labels = labels.to(self.table.device)
        said = log_probabilities.detach().to(self.table.device, torch.float32)
        # one NaN would stay in the counts for good; a probability of 0, the logarithm −∞, is one like others
        sound = said.amax(1, keepdim=True).isfinite()
        if not self.origin.soft:
            self.table.add(labels, said.argmax(1), sound[:, 0].float())
        elif self.table.sparse:
            top, columns = said.topk(SOFT_TOP, dim=1)
            top = top.exp().where(sound, 0.0)
            self.table.add(labels[:, None].expand_as(columns).flatten(), columns.flatten(), top.flatten())
        else:
            self.table.add_rows(labels, said.exp().where(sound, 0.0))

    def estimate(self, add_up: Callable[[Tensor], Tensor] | None = None) -> Confusion | None:
        """The rows of the counts, each divided by its sum; None when nothing has been counted. Then the counts fade by
        `decay`.

        `add_up` sums a dense tensor over all processes, so that each has the same matrix.
        """
        counts = self.table.gathered(add_up)
        self.table.scale(self.decay)
        seen = bool(((counts.values() if counts.is_sparse else counts) > 0).any())  # once an epoch: waiting is fine
        return Confusion(normalise_rows(counts), self.origin) if seen else None
