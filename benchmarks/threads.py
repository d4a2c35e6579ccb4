"""A training step of ResNet-8 with one thread against one thread a core, on an idle machine and beside a busy process.

    python benchmarks/threads.py [--rounds 9] [--json FILE]

With one thread the step of a tiny batch takes little longer; where another program has taken a core, the threads wait
for each other's turn on the others, and one thread is several times as fast. `PIXELS_A_THREAD` comes from here. A round
is the mean time of `--steps` steps; the two take turns. Printed are the medians, and the ratio one thread / all with
its smallest and largest round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otmix.models.resnet_cifar import CifarResNet


def busy() -> None:
    while True:
        pass


def seconds(network: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        loss = F.cross_entropy(network(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    most = torch.get_num_threads()
    print(f"ResNet-8, one thread against {most}, torch {torch.__version__}")
    rows = []
    for beside in (False, True):
        other = multiprocessing.Process(target=busy, daemon=True)
        if beside:
            other.start()
        for size, images in ((8, 64), (8, 128), (16, 128), (32, 128)):
            network = CifarResNet(8)
            optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
            batch = (torch.rand(images, 3, size, size), torch.randint(10, (images,)))
            rounds = []
            for turn in range(-1, args.rounds):
                times = []
                for threads in (1, most):
                    torch.set_num_threads(threads)
                    times.append(seconds(network, optimizer, batch, args.steps))
                if turn >= 0:  # the one before warms up
                    rounds.append(times)
            ratios = [one / all_ for one, all_ in rounds]
            one, all_ = (statistics.median(column) for column in zip(*rounds))
            ratio, lowest, highest = statistics.median(ratios), min(ratios), max(ratios)
            rows.append(
                {
                    "what": f"{images} × {size} × {size}" + (", beside a busy process" if beside else ""),
                    "one_ms": 1e3 * one,
                    "all_ms": 1e3 * all_,
                    "ratio": ratio,
                    "lowest": lowest,
                    "highest": highest,
                }
            )
            print(
                f"{rows[-1]['what']}: one thread {1e3 * one:.1f} ms, {most} threads {1e3 * all_:.1f} ms; "
                f"ratio {ratio:.2f} ({lowest:.2f} … {highest:.2f})",
                flush=True,
            )
        if beside:
            other.kill()
    if args.json:
        args.json.write_text(json.dumps({"threads": most, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
