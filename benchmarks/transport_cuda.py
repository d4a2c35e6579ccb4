"""Transport on CUDA: the one kernel of `transport/fused.py` against the launches of `transport/batched.py`.

    python benchmarks/transport_cuda.py

Medians of 30 calls (5 of the slow one) between CUDA events, after a warm-up. `sinkhorn` is the kernel with the checks
of its arguments; then the kernel alone with other numbers of warps than the one that it would choose.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from otmix.transport import batched, fused, sinkhorn


def problem(side: int, classes: int, noise: float = 2.0) -> Tensor:
    """A cost as training makes them: features around class centres, and a confusion matrix with a few large entries."""
    g = torch.Generator().manual_seed(1)
    y_f, y_b = (torch.randint(classes, (side,), generator=g) for _ in range(2))
    confusion = torch.rand(classes, classes, generator=g) ** 4
    confusion = (confusion / confusion.sum(1, keepdim=True)).fill_diagonal_(0)
    centres = torch.randn(classes, 64, generator=g)
    z_f, z_b = (F.normalize(torch.relu(centres[y] + noise * torch.randn(side, 64, generator=g))) for y in (y_f, y_b))
    return (0.05 * (1 - z_f @ z_b.T) + 0.95 * (1 - confusion[y_f][:, y_b])).cuda()


def milliseconds(call: Callable[[], object], times: int = 30) -> float:
    for _ in range(5):
        call()
    took = []
    for _ in range(times):
        torch.cuda.synchronize()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        took.append(began.elapsed_time(ended))
    return statistics.median(took)


class WithWarps:
    """The kernel, launched with another number of warps."""

    def __init__(self, kernel: Any, warps: int) -> None:
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid: tuple[int]) -> Callable[..., object]:
        return lambda *given, **named: self.kernel[grid](*given, **{**named, "num_warps": self.warps})


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/transport_cuda.py measures a GPU, and torch finds none here")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    kernel = fused._solve
    for side, classes in ((64, 10), (128, 10), (128, 100), (256, 10)):
        cost = problem(side, classes)
        given = cost, *[torch.full((side,), 1 / side, device="cuda")] * 2, torch.tensor(True, device="cuda")
        plan = sinkhorn(cost, max_iterations=200)
        took = milliseconds(partial(sinkhorn, cost, max_iterations=200))
        print(f"{side} x {side}, {classes} classes: sinkhorn {took:.3f} ms, {int(plan.iterations)} iterations, error "
              f"{float(plan.marginal_error):.1e}", flush=True)  # fmt: skip
        for warps in (4, 8, 16, 32):
            fused._solve = WithWarps(kernel, warps)
            took = milliseconds(partial(fused.solve, *given, 0.01, 200, 1e-4))
            print(f"    one kernel, {warps} warps: {took:.3f} ms", flush=True)
        fused._solve = kernel
        print(f"    batched: {milliseconds(partial(batched.solve, *given, 0.01, 200, 1e-4), 5):.3f} ms", flush=True)


if __name__ == "__main__":
    main()
