"""What several processes must do together: add up, gather, and agree to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otmix.interrupts import ECHO_SECONDS, stop_signals

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def summed(fabric: Fabric) -> Callable[[Tensor], Tensor] | None:
    """A function that sums a tensor over all processes, or None where there is only one."""
    if fabric.world_size == 1:
        return None

    def add_up(tensor: Tensor) -> Tensor:
        total = fabric.all_reduce(tensor, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    return add_up


def largest(fabric: Fabric, tensor: Tensor) -> Tensor:
    """The largest value among all processes, element by element."""
    if fabric.world_size == 1:
        return tensor
    result = fabric.all_reduce(tensor.clone(), reduce_op="max")
    assert isinstance(result, Tensor)
    return result


def any_of(fabric: Fabric, *flags: bool) -> list[bool]:
    """Whether each flag is set in any process. All must call this at the same place; it waits for them."""
    if fabric.world_size == 1:
        return list(flags)
    found: list[bool] = (largest(fabric, torch.tensor(flags, dtype=torch.float32, device=fabric.device)) > 0).tolist()
    return found


def of_each(fabric: Fabric, value: dict[str, Any]) -> list[dict[str, Any]]:
    """The `value` of each process, by rank; tensors on the CPU."""
    values: list[Any] = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def share_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Give all processes rank 0's buffers, as DistributedDataParallel does before each training step: since then each
    has seen other images, so their running statistics differ.
    """
    if fabric.world_size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def gatherer(fabric: Fabric) -> Callable[[Tensor], Tensor] | None:
    """A function that puts the rows that rank r has for places r, r + world, r + 2·world, … together in order, on every
    process and its device; each must have equally many. None where there is only one process.
    """
    if fabric.world_size == 1:
        return None

    def gather(rows: Tensor) -> Tensor:
        mine = rows.to(fabric.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(fabric.world_size)]
        torch.distributed.all_gather(parts, mine)  # Fabric's own gathers by a deprecated function
        return torch.stack(parts, dim=1).flatten(0, 1)

    return gather


class StopRequest:
    """Set by Ctrl-C, SIGTERM or SIGHUP; the loop looks at it between steps, saves and stops. A second Ctrl-C stops at
    once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number = 0
        """The signal that came."""
        self._since = 0.0

    def agreed(self, fabric: Fabric) -> bool:
        """Whether any process was asked to stop: then all do, here. All must call this at the same place."""
        return self.agreed_with(fabric, False)[0]

    def agreed_with(self, fabric: Fabric, other: bool) -> list[bool]:
        """The same, and whether `other` is true of any process: one wait for both."""
        return any_of(fabric, self.requested, other)

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals can only be caught in the main thread; whoever runs us elsewhere handles them
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.requested and number == signal.SIGINT and time.monotonic() - self._since > ECHO_SECONDS:
                raise KeyboardInterrupt
            if not self.requested:
                self.requested, self.number, self._since = True, number, time.monotonic()

        before = {number: signal.signal(number, ask) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
