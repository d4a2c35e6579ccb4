"""Copies to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def move(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on `device`, perhaps in another dtype, without making CUDA wait.

    There it comes from pinned memory, which torch keeps until the copy is done: pageable memory would stall. Elsewhere
    the copy is waited for: on MPS one with `non_blocking` reads memory that may have been freed
    (github.com/pytorch/pytorch/issues/189690).
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.to(dtype=dtype).pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)
