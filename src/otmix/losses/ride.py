"""RIDE: routing diverse distribution-aware experts (Wang et al., ICLR 2021), its first stage: any loss, of each expert,
and a term that drives the experts apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from otmix.errors import UserError
from otmix.losses.base import Criterion, Reduction
from otmix.types import ClassCounts, Output, Target


def expert_divergence(expert_logits: Tensor, mean_logits: Tensor, temperature: Tensor | None = None) -> Tensor:
    """Σ_e mean_b T̄² · KL(softmax(mean / T) ‖ softmax(z_e / T)), a scalar: `[B,E,K]`, `[B,K]`, T `[K]` or None for 1.

    T̄ is the mean of T over the classes. No gradient reaches `mean_logits`.
    """
    mean_logits = mean_logits.detach()
    if temperature is not None:
        expert_logits, mean_logits = expert_logits / temperature, mean_logits / temperature
    experts, mean = expert_logits.log_softmax(2), mean_logits.log_softmax(1)
    divergence = F.kl_div(experts, mean.unsqueeze(1).expand_as(experts), reduction="batchmean", log_target=True)
    return divergence if temperature is None else temperature.mean() ** 2 * divergence


def class_temperature(counts: ClassCounts, rho: float = 0.05) -> Tensor:
    """T_c ∝ ρ K π_c + 1 − ρ, the largest being 1: float64 `[K]`. Rare classes' logits count for more."""
    temperature = rho * counts.num_classes * counts.prior + 1 - rho
    return temperature / temperature.max()


class RIDE(Criterion):
    """Σ_e base(expert e) + diversity · Σ_e mean_b T̄² · KL(softmax(z̄ / T) ‖ softmax(z_e / T)), for models with experts.

    `base` is any loss; its head, and what it makes of logits at test time, are RIDE's, the latter on z̄, the mean of the
    experts' logits (`Output.logits`). The second term depends on no label: it is counted once, whatever the mix, and no
    class weight reaches it; z̄ has no gradient there. T is 1 until `temperature_start`, then `class_temperature`. In
    RIDE's code the base is LDAM, weights and temperature begin together (as with `-drw`, whose weights are the
    caller's), and a diversity of 0 trains the mean of the experts, which it does not here.
    Raises UserError for settings out of range, and for an output without experts.

    Args:
        diversity: factor on the divergence of the experts from their mean; negative drives them apart (RIDE's code for
            CIFAR: -0.45; for ImageNet-LT and iNaturalist: -0.2).
        rho: how far the temperature follows the class frequencies (RIDE's code for CIFAR: 0.05; for ImageNet-LT: 0.02,
            for iNaturalist: 0.015).
        temperature_start: share of the run from which the temperature differs between classes: where -drw begins, by
            --schedule 160 of 240 epochs, 160 of 200 with ldam and bbn, 80 of 200 with imagenet-lt, 160 of 210 with
            inaturalist (RIDE's code for CIFAR: 160 of 200).
    """

    temperature: Tensor

    def __init__(
        self,
        counts: ClassCounts,
        base: Criterion,
        diversity: float = -0.45,
        rho: float = 0.05,
        temperature_start: float = 160 / 240,
    ) -> None:
        super().__init__(counts)
        if not (math.isfinite(diversity) and 0 <= rho <= 1 and 0 <= temperature_start <= 1):
            raise UserError(
                "ride needs a finite diversity, and a rho and a temperature_start from 0 to 1, "
                f"not {diversity}, {rho} and {temperature_start}"
            )
        self.base = base
        self.head = base.head  # type: ignore[misc]  # of each loss's class, but here of what is wrapped
        self.own_steps = base.own_steps
        self.diversity, self.temperature_start = diversity, temperature_start
        # a function of the counts, so no checkpoint needs it
        self.register_buffer("temperature", class_temperature(counts, rho).float(), persistent=False)

    def per_label(self, output: Output, labels: Tensor, progress: float) -> Tensor:
        """Sum of the base loss over the experts, `[B]`."""
        return torch.stack([self.base.per_label(one, labels, progress) for one in _experts(output)]).sum(0)

    def label_free(self, output: Output, progress: float) -> Tensor | None:
        """What drives the experts apart, and what is label-free in the base loss."""
        parts = [self.base.label_free(one, progress) for one in _experts(output)]
        found = [part for part in (*parts, self._apart(output, progress)) if part is not None]
        return torch.stack(found).sum() if found else None

    def forward(
        self,
        output: Output,
        target: Target,
        class_weight: Tensor | None = None,
        progress: float = 0.0,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """As `Criterion.forward`, but by the base loss's own, which may see the batch as a whole (LADE)."""
        parts = [self.base(one, target, class_weight, progress, reduction) for one in _experts(output)]
        loss = torch.stack(parts).sum()
        apart = self._apart(output, progress)
        return loss if apart is None else loss + apart

    def probabilities(self, output: Output) -> Tensor:
        """The base loss's, of the mean of the experts' logits."""
        return self.base.probabilities(output)

    def _apart(self, output: Output, progress: float) -> Tensor | None:
        if self.diversity == 0:
            return None
        logits = _expert_logits(output).float()
        temperature = None if progress < self.temperature_start else self.temperature
        return self.diversity * expert_divergence(logits, logits.mean(1), temperature)


def _experts(output: Output) -> list[Output]:
    """What each expert says by itself."""
    logits, features = _expert_logits(output).unbind(1), output.features
    if features is None:
        return [Output(one) for one in logits]
    if features.ndim != 3 or features.shape[1] != len(logits):
        raise UserError(
            f"the features of {len(logits)} experts must be [B,{len(logits)},D], not {list(features.shape)}; "
            "stack them in dimension 1"
        )
    return [Output(one, seen) for one, seen in zip(logits, features.unbind(1), strict=True)]


def _expert_logits(output: Output) -> Tensor:
    if output.expert_logits is None:
        raise UserError(
            "the loss ride needs a model with experts; build it with architecture='ride', or fill Output.expert_logits"
        )
    return output.expert_logits
