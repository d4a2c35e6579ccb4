"""BatchNorm's running statistics, made anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS_STEPS = 64
"""Of a handful of batches chance decides how many are mixed. With an epoch of fewer, on a few hundred training images,
mixed statistics were worse where they were measured (results/README.md).
"""


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Its BatchNorm layers that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


class MeanStatistics:
    """The statistics that BatchNorm would have as means over batches, with the weights of `model` as they are: each
    batch counts equally, in place of the moving average over whatever came last, as in "precise" statistics (Wu &
    Johnson 2021, section 3; but the variance is the mean of the batches' variances).

    A copy of the model is shown the batches, so `model` itself may be looked at meanwhile with those that it has. A
    layer keeps them that trains nothing (its weight is frozen), or is in eval mode where the model is in train mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._measured = _copy(model).train()
        for own, new in zip(model.modules(), self._measured.modules(), strict=True):
            new.training &= own.training or not model.training
        for norm in batch_norms(self._measured):
            if norm.weight is not None and not norm.weight.requires_grad:
                norm.eval()
        pairs = zip(batch_norms(model), batch_norms(self._measured), strict=True)
        self._layers = [(own, new) for own, new in pairs if new.training]
        for _, new in self._layers:
            new.reset_running_stats()
            new.momentum = None  # the mean over all batches, not a moving one

    @torch.no_grad()
    def see(self, images: Tensor) -> None:
        """One batch `[B,C,H,W]`, on the device of the model."""
        self._measured(images)

    @torch.no_grad()
    def adopt(self, mean: Callable[[Tensor], Tensor] | None = None) -> bool:
        """Give them to the model's layers, but for those that saw no batch. False, and nothing is changed, where one is
        not a finite number. Of several processes `mean` makes of each one's tensor the mean of all.
        """
        found = []
        for own, new in self._layers:
            for name in ("running_mean", "running_var"):
                value = getattr(new, name)
                found.append((getattr(own, name), new, value if mean is None else mean(value)))
        if not all(bool(value.isfinite().all()) for _, _, value in found):
            return False
        for buffer, new, value in found:
            if new.num_batches_tracked:  # else no batch came by
                buffer.copy_(value)
        return True


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps something of its last forward, which PyTorch would not copy."""
    kept = (value for module in model.modules() for value in vars(module).values())
    return copy.deepcopy(model, {id(value): value.detach() for value in _tensors(kept) if not value.is_leaf})


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among them, and in lists, tuples and dictionaries of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict) and not isinstance(value, nn.Module):
            yield from _tensors(value.values())
