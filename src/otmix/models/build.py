"""A classifier from the name of its backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn

from otmix.errors import UserError
from otmix.models.branches import BranchClassifier
from otmix.models.classifier import Classifier, Normalise
from otmix.models.experts import REDUCED_WIDTHS, ExpertClassifier, ExpertHeads, check_experts
from otmix.models.heads import HEADS, HeadName
from otmix.models.resnet_cifar import WIDTHS, CifarResNet
from otmix.models.split import grow_branches
from otmix.models.timm_backbone import PREFIX, timm_backbone, unknown_backbone
from otmix.models.weights import OURS, WeightsFile
from otmix.randomness import derive_seed

CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56)}
SMALL_IMAGE = 64
Architecture = Literal["plain", "ride", "bbn"]


def list_backbones() -> list[str]:
    """The backbones written here; besides these there is "timm/NAME" for every model of timm."""
    return list(CIFAR_RESNETS)


def default_backbone(image_size: int, small: bool | None = None) -> str:
    """The CIFAR tables' ResNet-32 for small images (up to 64 pixels, unless `small` says), else timm's ResNet-18."""
    return "resnet32" if (image_size <= SMALL_IMAGE if small is None else small) else "timm/resnet18"


def build_model(
    backbone: str,
    num_classes: int,
    *,
    channels: int = 3,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    head: HeadName = "linear",
    pretrained: bool = False,
    weights: str | None = None,
    seed: int = 0,
    architecture: Architecture = "plain",
    experts: int = 3,
) -> Classifier:
    """A `Classifier` on CPU. `backbone` is one of `list_backbones()` or "timm/NAME"; `mean` and `std` are per channel.

    `pretrained` takes timm's weights for the backbone; `weights` those of a file instead: one of ours, whose head is
    taken too where it fits, or one in timm's own format. Equal `seed`s give equal weights, whatever random numbers were
    drawn before, and the generators of torch are left as they were.
    `architecture` "ride" gives an `ExpertClassifier` with `experts` experts, "bbn" a `BranchClassifier`, of any
    backbone; weights in timm's format are then in every branch, and a file of ours must be of the same architecture.
    Raises UserError for an unknown name, a file that does not fit, weights that cannot be had, or one class only.
    """
    if num_classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, not {num_classes}; check the data's class folders")
    if head not in HEADS:
        raise UserError(f"there is no head called {head}; choose {', '.join(HEADS)}")
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"images have {channels} channels, but mean has {len(mean)} numbers and std {len(std)}; give one a channel"
        )
    if architecture not in get_args(Architecture):
        raise UserError(f"there is no architecture called {architecture}; choose {', '.join(get_args(Architecture))}")
    check_experts(experts)
    file = None if weights is None else WeightsFile.read(weights)
    # torch's layers draw their first weights from the global generator and take no other: the one place where it is
    # seeded, and it is put back afterwards. The CPU's alone, so that a seed means the same weights for every device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(derive_seed(seed, "weights"))
        widths = REDUCED_WIDTHS if architecture == "ride" else WIDTHS
        backbone_of = partial(_backbone, backbone, channels, image_size, pretrained, file, widths)
        model = _assemble(architecture, experts, backbone_of, Normalise(mean, std), HEADS[head], num_classes)
    if file is not None and file.is_ours:
        described = {"ride": f"{backbone} with {experts} experts", "bbn": f"{backbone} with two branches"}
        file.load_into(model.backbone, model.head, described.get(architecture, backbone))
    return model


def _assemble(
    architecture: Architecture,
    experts: int,
    build: Callable[[], tuple[nn.Module, int]],
    normalise: Normalise,
    head: Callable[[int, int], nn.Module],
    num_classes: int,
) -> Classifier:
    """The model around as many backbones as the architecture cuts up; `build()` gives one and its feature_dim."""
    if architecture == "ride":
        grown, width = grow_branches(build, experts, "ride")
        heads = ExpertHeads([head(width, num_classes) for _ in range(experts)])
        return ExpertClassifier(normalise, grown, heads, feature_dim=width, num_classes=num_classes)
    if architecture == "bbn":
        branches, width = grow_branches(build, 2, "bbn")
        width *= 2
        return BranchClassifier(
            normalise, branches, head(width, num_classes), feature_dim=width, num_classes=num_classes
        )
    network, width = build()
    return Classifier(normalise, network, head(width, num_classes), feature_dim=width, num_classes=num_classes)


def _backbone(
    name: str,
    channels: int,
    image_size: int,
    pretrained: bool,
    file: WeightsFile | None,
    widths: tuple[int, int, int],
) -> tuple[nn.Module, int]:
    if name.startswith(PREFIX):
        theirs = None if file is None or file.is_ours else file
        pretrained = pretrained and file is None
        return timm_backbone(name, channels=channels, image_size=image_size, pretrained=pretrained, weights=theirs)
    if name not in CIFAR_RESNETS:
        raise unknown_backbone(name, list_backbones())
    if file is not None and not file.is_ours:
        raise file.misfit(name, f"it has no weights called {OURS}…")
    if pretrained and file is None:
        raise UserError(f"there are no pretrained weights for {name}; give --weights FILE or --no-pretrained")
    network = CifarResNet(CIFAR_RESNETS[name], channels, widths)
    return network, network.feature_dim
