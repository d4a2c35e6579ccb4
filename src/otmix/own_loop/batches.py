"""Batches of anyone's loop: images and labels, whatever else they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from otmix.devices import move
from otmix.errors import UserError
from otmix.types import Batch, Items

LabelledImages = tuple[Tensor, Tensor]


def labelled(batch: object) -> LabelledImages:
    """Images and labels, int64, the first two things of a batch. Raises UserError for anything else."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[0], Tensor):
        example = "; of a dict take (batch['image'], batch['label'])" if isinstance(batch, Mapping) else ""
        raise UserError(
            f"a batch must be (images, labels), images being a tensor, not a {type(batch).__name__}{example}"
        )
    try:
        labels = torch.as_tensor(batch[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the labels of a batch must be class numbers, not a {type(batch[1]).__name__}") from error
    if labels.ndim != 1 or labels.is_floating_point():
        raise UserError(
            "the labels of a batch must be a vector [B] of class numbers, integers, not "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    return batch[0], labels.to(torch.int64)


def batch_of(pair: LabelledImages, device: torch.device) -> Batch:
    """On a device. Raises UserError for images that are no floating-point numbers: neither the network nor a mix can be
    made of them.
    """
    images, labels = pair
    if not images.is_floating_point():
        raise UserError(
            f"the images of a batch must be floating-point numbers, not {images.dtype}; convert them first, for "
            "example with torchvision's v2.ToDtype(torch.float32, scale=True)"
        )
    return Batch(Items(move(labels, device)), move(images, device))


def again_and_again(batches: Iterable[LabelledImages]) -> Iterator[LabelledImages]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise UserError("the foreground loader gave no batch; is its dataset empty?")
