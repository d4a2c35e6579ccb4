"""The model that is trained: pixels in, logits and features out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from otmix.errors import UserError
from otmix.models.resnet_cifar import CifarResNet
from otmix.types import Output


class Normalise(nn.Module):
    """(x − mean) / std per channel, for `[B,C,H,W]` in [0, 1]; mean and std are part of the weights file."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or any(s <= 0 for s in std):
            raise ValueError(f"mean and std must have one number per channel and std be positive, not {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """Normalise → backbone (with its pooling) → head. Images are `[B,C,H,W]`, float in [0, 1].

    `backbone` maps normalised images to pooled features `[B,feature_dim]`, `head` maps these to logits
    `[B,num_classes]`. `streams` is how many batches of equal size, one after another, a forward in train mode takes.
    """

    streams: ClassVar[int] = 1

    def __init__(
        self, normalise: nn.Module, backbone: nn.Module, head: nn.Module, *, feature_dim: int, num_classes: int
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.backbone = backbone
        self.head = head
        self.feature_dim = feature_dim
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Output:
        features = self.features(images)
        return Output(logits=self.head(features), features=features)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features g1(x), `[B,D]`."""
        return cast(Tensor, self.backbone(self.normalise(images)))

    @property
    def supports_official(self) -> bool:
        return isinstance(self.backbone, CifarResNet)

    def official_features(self, images: Tensor) -> Tensor:
        """What the released code of OTmix compares instead of g1(x): `[B,D·h·w]`, see `CifarResNet.official_features`.

        Raises UserError for any other backbone.
        """
        if not isinstance(self.backbone, CifarResNet):
            raise UserError(
                "protocol official works with CIFAR ResNets only; choose --backbone resnet32 or --protocol clean"
            )
        return self.backbone.official_features(self.normalise(images))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not be decayed, as the head and (in timm's way) the backbone list them."""
        parts = (("backbone", self.backbone), ("head", self.head))
        # timm's lists name tokens that the model at hand may be without.
        return set(spared_from_decay(parts)) & dict(self.named_parameters()).keys()


def spared_from_decay(parts: Iterable[tuple[str, nn.Module]]) -> Iterator[str]:
    """What the `no_weight_decay` of each named part lists: a set in our heads, a method in timm's models and ours."""
    for prefix, part in parts:
        names = getattr(part, "no_weight_decay", ())
        for name in names() if callable(names) else names:
            yield f"{prefix}.{name}"
