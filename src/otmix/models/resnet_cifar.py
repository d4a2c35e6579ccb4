"""ResNets for small images: depth 6n+2, widths 16-32-64, shortcuts without parameters (He et al. 2016, section 4.2).

ResNet-32 is the network of the CIFAR tables of Gao et al. 2023 and of the papers they compare with (`ResNet_s` in
LDAM's code).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 32, 64)


def conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """bn(conv(x)), as one convolution where the network is only looked at: in eval mode without gradient. On a CPU that
    saves 40 % of the time of the passes that transport's cost needs in every step. A compiler fuses them by itself.
    """
    looking = not (bn.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
    if not looking or bn.running_var is None or bn.running_mean is None:
        return cast(Tensor, bn(conv(x)))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    weight, bias = conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale
    # under autocast the product is rounded once, as the weight alone would be
    return functional.conv2d(x, weight, bias, conv.stride, conv.padding)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), 3×3 convolutions without bias."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.padding = (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(conv_bn(self.conv1, self.bn1, x), inplace=True)
        out = conv_bn(self.conv2, self.bn2, out)
        # In place is safe: BatchNorm's backward reads its input, not its output. `x` itself is never written to.
        return functional.relu(out.add_(self.shortcut(x)), inplace=True)

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every second pixel, the new channels zero, half of them before and half after the old ones."""
        if self.stride == 1 and self.padding == 0:
            return x
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """`images [B,C,H,W]` (normalised) to pooled features `[B,widths[2]]`; sides are quartered, rounding up (32 → 8, 8 →
    2). Each width is that of a stage, and exceeds the one before by an even number or nothing.
    """

    def __init__(self, depth: int, channels: int = 3, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a ResNet for small images has depth 6n + 2 with n >= 1 (8, 20, 32, …), not {depth}")
        blocks = (depth - 2) // 6
        self.feature_dim = widths[2]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(conv_bn(self.conv1, self.bn1, x), inplace=True)
        return self._stages(out).mean((2, 3))

    def official_features(self, x: Tensor) -> Tensor:
        """The last map, flattened `[B,64·h·w]`, with no ReLU between the stem and the first stage.

        The released code of OTmix takes its features from `nn.Sequential(*children[:-1])`, which loses what `forward`
        does by functions.
        """
        return self._stages(self.bn1(self.conv1(x))).flatten(1)

    def _stages(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return out


def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(width_in, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))
