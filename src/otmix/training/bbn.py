"""The training step of BBN (Zhou et al., CVPR 2020): two streams through two branches, and from one to the other."""

from __future__ import annotations

import torch

from otmix.models import BranchClassifier
from otmix.pairing import PairingContext
from otmix.training.stage import LossParts, StepItems, StepState
from otmix.types import Mixed, Target


def balance_at(progress: float) -> float:
    """a = 1 − ((e − 1) / E)² in epoch e of E, counted from 1: 1 − progress². From natural to re-balanced learning.

    In BBN's code, E is 100 and 200 in runs of 90 and 180 epochs, where a thus stops near 0.2.
    """
    return 1 - progress**2


def bbn_step(state: StepState, items: StepItems, context: PairingContext) -> LossParts:
    """Background images through the conventional branch, foreground ones through the re-balancing one, and the loss
    a · L(y_background) + (1 − a) · L(y_foreground) of the logits they share.

    The foregrounds are BBN's reversed stream when a class is drawn with probability ∝ 1/n_k (eq. 3 with r = 1). Nothing
    is mixed but features, so `mixed` is no image, `images` are the backgrounds, and `image_share` is a. Of two batches
    that differ in length, the longer is cut.
    Raises ValueError when a step has no foregrounds, or the model no branches.
    """
    background, foreground = items.background, items.foreground
    if foreground is None or not isinstance(state.model, BranchClassifier):
        raise ValueError("a step of BBN takes a foreground batch, and a model built with architecture='bbn'")
    n = min(len(background), len(foreground))
    background, foreground = background[:n], foreground[:n]
    a = balance_at(context.moment.progress)
    state.model.set_balance(a)
    output = state.forward(torch.cat([background.images, foreground.images]))
    labels = torch.stack([background.items.labels, foreground.items.labels], dim=1)
    share = torch.full((n,), a, device=labels.device)
    target = Target(labels, torch.stack([share, 1 - share], dim=1))
    loss = state.criterion(output, target, state.class_weight, context.moment.progress, state.reduction)
    return LossParts(loss, Mixed(background.images, target, share, torch.zeros_like(share, dtype=torch.bool)), output)
