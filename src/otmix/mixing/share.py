"""How much of a mixed image comes from its background: the drawing of λ (eq. 1), and the target that says it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from otmix.devices import move
from otmix.errors import UserError
from otmix.types import Batch, Mixed, Target

Per = Literal["batch", "image"]


def check_settings(alpha: float, per: str) -> None:
    """Raises UserError unless Beta(α, α) exists and `per` is known."""
    if not (math.isfinite(alpha) and alpha > 0.0):
        raise UserError(f"alpha of Beta(alpha, alpha) must be a finite number above 0, it is {alpha}")
    if per not in get_args(Per):
        raise UserError(f"a mix is drawn per 'batch' or per 'image', not per {per!r}")


def draw_shares(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """λ ~ Beta(α, α), float64 `[n]`: the background's share of each mix (eq. 1).

    torch's own Beta takes no generator. One is drawn by inverting the distribution function at a uniform; many, in a
    sixth of the time, as (1 + T/√(2α + T²))/2, where T is Student's t with 2α degrees of freedom in its closed form
    √(2α (U^(−1/α) − 1)) cos 2πV (Bailey 1994), U and V uniform.
    """
    if n == 1:
        # here, not above: SciPy takes longer to load than all of this package
        from scipy.special import betaincinv

        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        return torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy())).clamp_(0.0, 1.0)
    u, v = torch.rand(2, n, generator=generator, dtype=torch.float64)
    cosine = torch.cos(v * (2.0 * math.pi))
    # 2α/T², which may be 0 or inf; 1 − u is above 0
    odds = 1.0 / (torch.expm1(torch.log1p(-u) / -alpha) * cosine.square())
    return 0.5 + 0.5 * torch.sign(cosine) / torch.sqrt(1.0 + odds)


def check_drawn(background: Batch, foreground: Batch, rows: int) -> None:
    """Raises ValueError unless the batches are paired, with one drawn value for all images, or one for each."""
    shapes = tuple(background.images.shape), tuple(foreground.images.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"backgrounds {shapes[0]} and foregrounds {shapes[1]} must be as many and of one size")
    if rows not in (1, len(background)):
        raise ValueError(f"drawn for {rows} images, but the batch has {len(background)}")


def mix_of_two(
    images: Tensor, background: Batch, foreground: Batch, share: Tensor, label_share: Tensor | None = None
) -> Mixed:
    """The mixed `images` with both labels: the background's with `label_share` (default `share`), `[B]` or `[1]`, the
    other's with the rest. `share` is the background's part of the image.
    """
    share = share.expand(len(background)).contiguous()
    label_share = share if label_share is None else label_share.expand(len(background))
    labels = torch.stack((background.items.labels, foreground.items.labels), dim=1)
    shares = torch.stack((label_share, 1.0 - label_share), dim=1)
    return Mixed(images, Target(labels, shares), share, torch.ones_like(share, dtype=torch.bool))


def leave_unmixed(mixed: Mixed, batch: Batch, mixed_mask: Tensor) -> Mixed:
    """Keep the mixes where `mixed_mask [B]` is true, and put the plain images of `batch` elsewhere (Table 7).

    A plain image has image share 1, label shares (1, 0, …) and its own label in every column.
    """
    if len(batch) != mixed.images.shape[0] or mixed_mask.shape != mixed.mixed.shape:
        sizes = f"{mixed.images.shape[0]} mixes, {len(batch)} plain images and a mask {tuple(mixed_mask.shape)}"
        raise ValueError(f"{sizes} must be as many")
    keep = move(mixed_mask, mixed.images.device)
    column = torch.arange(mixed.target.shares.shape[1], device=keep.device)
    labels = torch.where(keep[:, None], mixed.target.labels, batch.items.labels[:, None])
    shares = torch.where(keep[:, None], mixed.target.shares, (column == 0).to(mixed.target.shares.dtype))
    return replace(
        mixed,
        # lerp with weights 0 and 1 copies exactly, and on a CPU many times faster than where
        images=torch.lerp(batch.images, mixed.images, keep[:, None, None, None].to(mixed.images.dtype)),
        target=Target(labels, shares),
        image_share=mixed.image_share.masked_fill(~keep, 1.0),
        mixed=mixed.mixed & keep,
    )
