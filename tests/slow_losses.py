"""What the slow references of the losses are made of, for one image in Python's float64, and random outputs to try them
on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otmix.types import ClassCounts, Output


def log_softmax(logits: list[float], label: int) -> float:
    top = max(logits)
    return logits[label] - top - math.log(math.fsum(math.exp(z - top) for z in logits))


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def effective_weight(n: list[int], label: int) -> float:
    weights = [(1 - 0.9999) / (1 - 0.9999**count) for count in n]
    return weights[label] / math.fsum(weights) * len(n)


def draw(b: int, k: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor, ClassCounts]:
    """Logits uniform in ± scale, two labels per image, and counts from 1 to 5000 in no order."""
    g = torch.Generator().manual_seed(seed)
    counts = (5000 ** torch.rand(k, generator=g)).long().clamp_min(1)
    logits = (torch.rand(b, k, generator=g) * 2 - 1) * scale
    return logits, torch.randint(k, (b, 2), generator=g), ClassCounts(counts)


def with_features(logits: Tensor, d: int = 7, seed: int = 0) -> Output:
    """The logits with features `[B,d]` uniform in [0, 2), and themselves as those of three experts."""
    features = 2 * torch.rand(logits.shape[0], d, generator=torch.Generator().manual_seed(seed)).to(logits.dtype)
    return Output(logits, features.to(logits.device), logits.unsqueeze(1).expand(-1, 3, -1))
