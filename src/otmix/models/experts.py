"""The network of RIDE (Wang et al., ICLR 2021): several experts on a shared trunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from otmix.errors import UserError
from otmix.models.classifier import Classifier, spared_from_decay
from otmix.models.split import Branched
from otmix.types import Output

MOST_EXPERTS = 8
REDUCED_WIDTHS = (16, 24, 48)
"""Of a CIFAR ResNet whose experts own the last two stages: three quarters of the usual 32 and 64 (RIDE's code)."""


class ExpertHeads(nn.ModuleList):
    """One head for each expert, `[B,E,D] → [B,E,K]`."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(one) for head, one in zip(self, features.unbind(1), strict=True)], dim=1)

    def no_weight_decay(self) -> set[str]:
        return set(spared_from_decay((str(e), head) for e, head in enumerate(self)))


class ExpertClassifier(Classifier):
    """Normalise → trunk → E branches → E heads; the logits are the mean of the experts'.

    `backbone` gives `[B,E,feature_dim]`, `head` turns them into `[B,E,num_classes]`. Which stages are the experts' own:
    see `split_backbone`. In CIFAR ResNets these have three quarters of their width, as in RIDE's code; in timm's they
    keep all of it, unlike there, so that pretrained weights fit every expert. The router, RIDE's second stage, which
    saves computation and no errors, is left out.
    """

    def forward(self, images: Tensor) -> Output:
        features = self.features(images)
        expert_logits: Tensor = self.head(features)
        return Output(expert_logits.mean(dim=1), features, expert_logits)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features of each expert, `[B,E,D]`."""
        return super().features(images)

    @property
    def supports_official(self) -> bool:
        return isinstance(self.backbone, Branched) and self.backbone.of_cifar_resnet

    def official_features(self, images: Tensor) -> Tensor:
        """`CifarResNet.official_features` of each expert, one after another; the released code of OTmix has no experts.

        Raises UserError for any other backbone.
        """
        if not isinstance(self.backbone, Branched) or not self.backbone.of_cifar_resnet:
            return super().official_features(images)
        return self.backbone.official_features(self.normalise(images))


def check_experts(experts: int) -> None:
    """Raises UserError for a number of experts that is none."""
    if not 1 <= experts <= MOST_EXPERTS:
        raise UserError(f"there can be 1 to {MOST_EXPERTS} experts, not {experts}; RIDE has 2, 3 or 4")
