"""Pasting rectangles: what all rules that cut boxes have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from otmix.devices import move
from otmix.mixing.share import check_drawn, mix_of_two
from otmix.types import Batch, Mixed


def paste(background: Batch, foreground: Batch, boxes: Tensor) -> Mixed:
    """Paste `foreground` onto the `background` it is paired with, inside `boxes`.

    `boxes` int64 `[1,4]` for all images or `[B,4]`, on any device: top, left, height, width. The shares of image and
    labels are those of the pixels really pasted: what of a box leaves the image counts for nothing. The inputs stay as
    they are. Raises ValueError where the batches are not paired, or the boxes are not as many.
    """
    check_drawn(background, foreground, len(boxes))
    images = background.images
    height, width = images.shape[-2:]
    if len(boxes) == 1 and boxes.device.type == "cpu":
        top, left, box_height, box_width = boxes[0].tolist()
        bottom, right = max(top + box_height, 0), max(left + box_width, 0)
        place = (..., slice(max(top, 0), bottom), slice(max(left, 0), right))
        patch = foreground.images[place]
        pasted = images.clone()
        pasted[place] = patch
        kept = height * width - patch.shape[-2] * patch.shape[-1]
        share = torch.full((1,), kept / (height * width), dtype=torch.float32, device=images.device)
    else:
        tops, lefts, heights, widths = move(boxes, images.device)[:, :, None].unbind(1)
        y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        rows, columns = (y >= tops) & (y < tops + heights), (x >= lefts) & (x < lefts + widths)
        # numbers, not truth values: lerp with weights 0 and 1 copies exactly, and many times faster than where
        inside = rows.to(images.dtype)[:, None, :, None] * columns.to(images.dtype)[:, None, None, :]
        pasted = torch.lerp(images, foreground.images, inside)
        share = (height * width - rows.sum(1) * columns.sum(1)).float() / (height * width)
    return mix_of_two(pasted, background, foreground, share)
