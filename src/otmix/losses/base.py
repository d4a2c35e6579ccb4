"""What a loss is: built from the class counts, one value per image and label, combined by shares."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from otmix.errors import UserError
from otmix.types import ClassCounts, Output, Target

Head = Literal["linear", "normed", "sigmoid"]
Reduction = Literal["mean", "weighted-mean"]
_REDUCTIONS = get_args(Reduction)


class Criterion(nn.Module):
    """A classification loss for hard labels and for mixes of them. Subclasses write `per_label`; `label_free` and
    `probabilities` where they differ.

    `progress` is the share of the run's epochs that are finished; whatever changes during a run depends on it and on
    nothing hidden. `head` names the classifier head the loss is defined on; it is checked when a run is built.
    """

    head: ClassVar[Head] = "linear"
    own_steps: tuple[tuple[float, float], ...] | None = None
    """Steps of the learning rate that belong to the loss, (share of the run, factor from there on) in rising order;
    where set they replace those of the recipe.
    """

    def __init__(self, counts: ClassCounts) -> None:
        super().__init__()
        if not isinstance(counts, ClassCounts):
            raise UserError(
                f"a loss is made from ClassCounts, not from a {type(counts).__name__}; give it "
                "ClassCounts.from_labels(labels), or ClassCounts of how many images each class has"
            )
        self.num_classes = counts.num_classes

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        """The loss of each image for one label each: `labels [B]` int64 -> `[B]` float32."""
        raise TypeError(f"{type(self).__name__} must define per_label(output, labels, progress)")

    def label_free(self, output: Output, progress: float) -> Tensor | None:
        """A part of the loss that does not depend on labels, a scalar, counted once and unweighted; None where there is
        none.
        """
        return None

    def probabilities(self, output: Output) -> Tensor:
        """Class probabilities `[B,K]` at test time."""
        return output.logits.float().softmax(1)

    def forward(
        self,
        output: Output,
        target: Target,
        class_weight: Tensor | None = None,
        progress: float = 0.0,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The loss of a batch, a scalar: Σ_s share_s · w[label_s] · per_label(label_s) (eq. 10), plus `label_free`.

        `class_weight [K]` weighs each term by its own label. `reduction` "mean" divides by B. "weighted-mean" is what
        two calls of `F.cross_entropy(weight=w)` give, as in the released code: each of the two terms is divided by the
        sum of its own batch's weights, so that a weight no longer trades one term off against the other. Of more than
        two labels (soft ones, of which that code says nothing) the sum is of share · weight, as of hard labels.
        Two soft ones cannot be told from a mix.

        Raises UserError for another reduction, and for logits or labels in place of an `Output` and a `Target`.
        """
        if not isinstance(target, Target) or isinstance(output, Tensor):
            raise UserError(
                "the losses of otmix take a mix as a whole; instead of mixed.loss(criterion, logits) write "
                "criterion(Output(logits), mixed.target), and of hard labels make Target.hard(labels)"
            )
        if reduction not in _REDUCTIONS:
            raise UserError(f"a loss is reduced by 'mean' or 'weighted-mean', not by {reduction!r}")

        def weighted(labels: Tensor) -> Tensor:
            loss = self.per_label(output, labels, progress)
            return loss if class_weight is None else loss * class_weight[labels]

        if reduction == "weighted-mean" and class_weight is not None:
            weights = class_weight[target.labels]  # [B,S]
            losses = torch.stack([weighted(labels) for labels in target.labels.unbind(1)], dim=1)
            of_two = weights.shape[1] <= 2
            divisor = weights.sum(0) if of_two else (target.shares * weights).sum()
            loss = ((target.shares * losses).sum(0) / divisor).sum()
        else:
            loss = target.combine(weighted).mean()
        free = self.label_free(output, progress)
        return loss if free is None else loss + free
