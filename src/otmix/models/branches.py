"""The network of BBN (Zhou et al., CVPR 2020): two branches on a shared trunk, one for each of two streams."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from otmix.models.classifier import Classifier
from otmix.models.split import Branched


class BranchClassifier(Classifier):
    """Normalise → trunk → conventional and re-balancing branch → one head on both branches' features, `[B,2D]`.

    In train mode images are `[2B,C,H,W]`, B of the conventional stream and then B of the re-balancing one. Each half
    passes the trunk by itself, so that BatchNorm normalises each stream by its own statistics (as in BBN's code), and
    then its own branch; features `[B,2D]` are (2a·f_c, 2(1−a)·f_r), with the balance a that `set_balance` was told.
    In eval mode images are `[B,C,H,W]`, both branches see each of them, and features are (f_c, f_r), which is a = 1/2.

    Which part is the branches' own: see `split_backbone`. With ResNet-32 this is BBN's network, whose 128 features are
    2 · 64, except that its classifier begins with torch's weights for a linear layer, ours with those of `LinearHead`.
    Raises ValueError in train mode for an odd number of images.
    """

    streams: ClassVar[int] = 2
    balance: Tensor

    def __init__(
        self, normalise: nn.Module, backbone: Branched, head: nn.Module, *, feature_dim: int, num_classes: int
    ) -> None:
        super().__init__(normalise, backbone, head, feature_dim=feature_dim, num_classes=num_classes)
        # a tensor, so that a new value needs no new compilation; set at every step, so that no file needs it
        self.register_buffer("balance", torch.tensor(0.5), persistent=False)

    def set_balance(self, conventional: float) -> None:
        """Set a, the weight of the conventional branch in training, in [0, 1], for the forwards to come."""
        self.balance.fill_(conventional)

    def features(self, images: Tensor) -> Tensor:
        """Both branches' pooled features, `[B,2D]`; scaled by the balance in train mode."""
        network = cast(Branched, self.backbone)
        x = self.normalise(images)
        if not self.training:
            return cast(Tensor, network(x)).flatten(1)
        if x.shape[0] % 2:
            raise ValueError(
                f"training two branches takes as many images of one stream as of the other, not {x.shape[0]} in all"
            )
        streams, branches = x.chunk(2), network.branches
        conventional, rebalancing = branches[0](network.trunk(streams[0])), branches[1](network.trunk(streams[1]))
        return torch.cat([2 * self.balance * conventional, 2 * (1 - self.balance) * rebalancing], dim=1)
