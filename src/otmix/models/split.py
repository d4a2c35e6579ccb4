"""A backbone cut in two: a trunk that all images pass through, and a branch that there are several of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from otmix.models.classifier import spared_from_decay
from otmix.models.resnet_cifar import CifarResNet

Cut = Literal["ride", "bbn"]
Parts = list[tuple[str, nn.Module]]


class Branched(nn.Module):
    """Normalised images `[B,C,H,W]` to the pooled features of each of N branches on one trunk, `[B,N,D]`."""

    def __init__(self, trunk: nn.Module, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.trunk(x)
        return torch.stack([branch(shared) for branch in self.branches], dim=1)

    @property
    def of_cifar_resnet(self) -> bool:
        """Whether trunk and branches are parts of `CifarResNet`."""
        branch = self.branches[0]
        return isinstance(branch, nn.Sequential) and isinstance(branch[-1], GlobalMean)

    def official_features(self, x: Tensor) -> Tensor:
        """`CifarResNet.official_features` of each branch, one after another: `[B,N·D·h·w]`; of no other backbone."""
        assert self.of_cifar_resnet
        for name, part in self.trunk.named_children():
            x = x if name == "relu" else part(x)
        maps = [nn.Sequential(*list(branch.children())[:-1])(x) for branch in self.branches]
        return torch.cat([one.flatten(1) for one in maps], dim=1)

    def no_weight_decay(self) -> set[str]:
        return set(spared_from_decay((f"branches.{i}", branch) for i, branch in enumerate(self.branches)))


class GlobalMean(nn.Module):
    """Mean over all places, `[B,D,h,w] → [B,D]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def split_backbone(backbone: nn.Module, cut: Cut) -> tuple[nn.Module, nn.Module]:
    """Trunk and branch, made of the modules of `backbone`; `branch(trunk(x))` is `backbone(x)`.

    In a CIFAR ResNet and in timm's ResNets (ResNeXt, SE and the others that run as they do), "ride" leaves the last two
    stages to the branch, "bbn" the last block of the last stage. Of any other backbone *nothing is shared*: the trunk
    is the identity and the branch all of it, so that N branches are N networks on the same images.
    """
    parts = _parts(backbone)
    if parts is None:
        return nn.Identity(), backbone
    stem, stages, pool = parts
    if cut == "ride":
        shared, own = stages[:-2], stages[-2:]
    else:
        name, blocks = stages[-1]
        assert isinstance(blocks, nn.Sequential)
        shared, own = [*stages[:-1], (name, blocks[:-1])], [(name, blocks[-1:])]
    return nn.Sequential(OrderedDict([*stem, *shared])), nn.Sequential(OrderedDict([*own, *pool]))


def grow_branches(build: Callable[[], tuple[nn.Module, int]], number: int, cut: Cut) -> tuple[Branched, int]:
    """`number` branches, each from a backbone that is built for it, on the trunk of the first; and the width D of each.

    New weights thus differ between the branches, and pretrained ones are in every branch.
    """
    backbone, feature_dim = build()
    trunk, branch = split_backbone(backbone, cut)
    branches = [branch]
    for _ in range(number - 1):
        branches.append(split_backbone(build()[0], cut)[1])
    return Branched(trunk, branches), feature_dim


def _parts(backbone: nn.Module) -> tuple[Parts, Parts, Parts] | None:
    """Stem, stages and pooling of a ResNet, in the order of its forward; None for what is no ResNet."""
    if isinstance(backbone, CifarResNet):
        stem: Parts = [("conv1", backbone.conv1), ("bn1", backbone.bn1), ("relu", nn.ReLU(inplace=True))]
        return stem, _named(backbone, "layer1", "layer2", "layer3"), [("pool", GlobalMean())]
    if _is_timm_resnet(backbone):
        return (
            _named(backbone, "conv1", "bn1", "act1", "maxpool"),
            _named(backbone, "layer1", "layer2", "layer3", "layer4"),
            _named(backbone, "global_pool"),
        )
    return None


def _named(module: nn.Module, *names: str) -> Parts:
    return [(name, module.get_submodule(name)) for name in names]


def _is_timm_resnet(backbone: nn.Module) -> bool:
    """Whether it is timm's ResNet and runs its parts in the known order: a subclass may do otherwise."""
    from timm.models.resnet import ResNet

    passes = ("forward", "forward_features", "forward_head")
    return isinstance(backbone, ResNet) and all(getattr(type(backbone), p) is getattr(ResNet, p) for p in passes)
