"""Forward and backward of each loss alone, against `F.cross_entropy` (target: at most 3 ×; ib and lade, which also read
features or the whole batch, 6 ×), and the memory they need.

    python benchmarks/losses.py [--device cuda] [--rounds 9] [--only NAME …] [--json FILE]

Timed is a loss alone: the mean of `per_label`, or the whole call of one that sees the batch as a whole (lade). In
training a mix has two labels, for which `per_label` is asked twice.

In each round all losses take turns with cross-entropy just before each; a round is the mean time of several calls, as
many as take `--seconds`, from logits `[B,K]` that want a gradient to that gradient. Printed are the median times, and
the ratio ours / cross-entropy: median, smallest and largest round.

Memory is the most that was allocated at once during forward and backward beyond the logits and labels themselves, in
multiples of the logits; the gradient, 1, is part of it. `F.cross_entropy` itself takes 3. Target at 512 × 8142: at most
3 more than that. It is counted by torch's own profiler on the CPU, and by the allocator on CUDA.

The script starts itself again with glibc told to keep freed memory. By default it gives large buffers back to the
system and asks for them anew at each call, which costs more than the arithmetic, for theirs and for ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from otmix.losses import LOSSES, Criterion
from otmix.types import ClassCounts, Output, Target

SIZES = ((128, 10), (128, 100), (512, 8142))
FEATURES = 64
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "KINETO_LOG_LEVEL": "99",  # silences the profiler
}


def theirs(logits: Tensor, labels: Tensor) -> None:
    F.cross_entropy(logits, labels).backward()


def ours(criterion: Criterion, output: Output, labels: Tensor, target: Target) -> None:
    """Late in a run, where every part of a loss is at work; of the whole batch where a loss is no mean over images."""
    if output.features is not None:
        output.features.grad = None
    if type(criterion).forward is Criterion.forward:
        criterion.per_label(output, labels, 0.9).mean().backward()
    else:
        criterion(output, target, progress=0.9).backward()


def seconds(call: Callable[[], None], logits: Tensor, calls: int) -> float:
    """Wall time of one of `calls` calls, until the device has done them."""
    began = time.perf_counter()
    for _ in range(calls):
        logits.grad = None
        call()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def peak_memory(call: Callable[[], None], logits: Tensor) -> float:
    """The most bytes in use at once beyond what was there before, in multiples of the logits."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            call()
        used = peak = 0
        changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(changes, key=lambda event: event.start_ns()):
            used += event.nbytes()
            peak = max(peak, used)
    logits.grad = None
    return peak / (logits.numel() * logits.element_size())


def measure(size: tuple[int, int], names: list[str], args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per loss: seconds, ratio to cross-entropy and memory."""
    images, classes = size
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(images, classes, generator=draw)).to(args.device).requires_grad_()
    labels = torch.randint(classes, (images,), generator=draw).to(args.device)
    features = torch.rand(images, FEATURES, generator=draw).to(args.device).requires_grad_()
    output, target = Output(logits, features), Target.hard(labels)
    # a long tail from 1000 to 2 images
    counts = ClassCounts((1000 * torch.logspace(0, -2.7, classes)).long().clamp_min(1))
    calls = {name: partial(ours, LOSSES[name](counts).to(args.device), output, labels, target) for name in names}
    baseline = partial(theirs, logits, labels)
    for call in (baseline, *calls.values()):
        seconds(call, logits, 2)
    repeat = max(1, round(args.seconds / seconds(baseline, logits, 3)))
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, call in calls.items():
            base = seconds(baseline, logits, repeat)
            pairs[name].append((seconds(call, logits, repeat), base))
    cross_entropy_memory = peak_memory(baseline, logits)
    rows: list[dict[str, object]] = []
    for name, call in calls.items():
        ratios = [mine / base for mine, base in pairs[name]]
        rows.append(
            {
                "loss": name,
                "images": images,
                "classes": classes,
                "ours_us": statistics.median(mine for mine, _ in pairs[name]) * 1e6,
                "theirs_us": statistics.median(base for _, base in pairs[name]) * 1e6,
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "memory": peak_memory(call, logits),
                "cross_entropy_memory": cross_entropy_memory,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.05, help="of cross-entropy in each round")
    parser.add_argument("--only", nargs="+", choices=list(LOSSES), default=list(LOSSES), metavar="NAME")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    where = f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{where}, {args.rounds} rounds, float32")
    print(f"{'loss':<18}{'B × K':>12}{'ours µs':>10}{'theirs µs':>11}{'ratio':>8}   lowest … highest   memory (theirs)")
    results = []
    for size in SIZES:
        for row in measure(size, args.only, args):
            results.append(row)
            spread = f"{row['lowest']:.2f} … {row['highest']:.2f}"
            times = f"{row['ours_us']:>10.0f}{row['theirs_us']:>11.0f}"
            memory = f"{row['memory']:.2f} ({row['cross_entropy_memory']:.2f})"
            print(f"{row['loss']:<18}{size[0]:>5} × {size[1]:<4}{times}{row['ratio']:>8.2f}   {spread:<19}{memory}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if not ENVIRONMENT.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
    main()
