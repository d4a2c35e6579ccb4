"""From a cost matrix to pairs: our float32 solver against POT's float64 `sinkhorn` on the same problem.

    python benchmarks/transport.py [--rounds 9] [--json FILE]

POT is stopped at the marginal error that ours has reached: the number of its iterations that first gets there is found
beforehand, and then just as many are run without a look at the error in between. Both end with the choice of a
background for each row. The two take turns; printed are the medians and the ratio with its smallest and largest round.
POT's float32 log solver, and what each solver's own iterations were, stand beside. Targets: 0.4 x POT's time at
128 x 128, 0.1 x at 1024 x 1024. With a flat F (see `cost_of`) there is little to save: POT needs some 15 iterations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import ot
import torch
from torch import Tensor
from torch.nn import functional as F

from otmix.transport import sinkhorn

EPSILON = 0.01


def cost_of(n: int, classes: int, flat: bool = False, seed: int = 0) -> Tensor:
    """Eq. 7 on features around class centres and a confusion matrix as of a trained model: 40 % of each row off the
    diagonal, most of that in a few classes. `flat`: spread over so many classes that none has more than a few per cent,
    so that both solvers are done after a few iterations.
    """
    concentration = 12 if flat else 1.2 * classes
    g = torch.Generator().manual_seed(seed)
    y_f, y_b = torch.randint(classes, (n,), generator=g), torch.randint(classes, (n,), generator=g)
    confusion = (torch.rand(classes, classes, generator=g) ** concentration).fill_diagonal_(0)
    confusion *= 0.4 / confusion.sum(1, keepdim=True)
    centres = torch.randn(classes, 64, generator=g)
    z_f = F.normalize(torch.relu(centres[y_f] + 2 * torch.randn(n, 64, generator=g)))
    z_b = F.normalize(torch.relu(centres[y_b] + 2 * torch.randn(n, 64, generator=g)))
    return 0.05 * (1 - z_f @ z_b.T) + 0.95 * (1 - confusion[y_f][:, y_b])


def error_of(plan: np.ndarray) -> float:
    n = len(plan)
    return max(np.abs(plan.sum(0) - 1 / n).sum(), np.abs(plan.sum(1) - 1 / n).sum())


def iterations_to(target: float, solve: Callable[[int], np.ndarray], most: int = 4096) -> int:
    """The least number of iterations whose plan has an error of at most `target`; `most` where none has."""
    low, high = 0, 1
    while high < most and error_of(solve(high)) > target:
        low, high = high, 2 * high
    while high - low > 1 and high <= most:
        middle = (low + high) // 2
        low, high = (low, middle) if error_of(solve(middle)) <= target else (middle, high)
    return min(high, most)


def pot_plan(cost: np.ndarray, count: int) -> np.ndarray:
    """POT's `sinkhorn` after `count` iterations, none of which looks at the error (stopThr 0)."""
    mass = np.full(len(cost), 1 / len(cost))
    result: np.ndarray = ot.sinkhorn(mass, mass, cost, EPSILON, numItermax=count, stopThr=0.0, warn=False)
    return result


def pot_log32_plan(cost: Tensor, count: int) -> np.ndarray:
    mass = torch.full((len(cost),), 1 / len(cost))
    solved = ot.bregman.sinkhorn_log(mass, mass, cost, EPSILON, numItermax=count, stopThr=0.0, warn=False)
    return solved.numpy()


def seconds(calls: Sequence[Callable[[], object]], times: int) -> float:
    """The mean time of a call."""
    began = time.perf_counter()
    for _ in range(times):
        for call in calls:
            call()
    return (time.perf_counter() - began) / times / len(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # POT warns whenever it is stopped early
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, POT {ot.__version__}, epsilon {EPSILON}")
    rows = []
    sizes = [(n, classes, flat) for n in (128, 1024) for classes, flat in ((10, False), (100, False), (100, True))]
    for n, classes, flat in sizes:
        target = 0.4 if n == 128 else 0.1
        sides: dict[str, list[Callable[[], object]]] = {"ours": [], "pot": [], "pot_log32": []}
        counts: dict[str, list[int]] = {name: [] for name in sides}
        errors = []
        for seed in range(args.problems):
            cost = cost_of(n, classes, flat, seed)
            plan = sinkhorn(cost, epsilon=EPSILON, max_iterations=200)
            errors.append(float(plan.marginal_error))
            pot, pot_log32 = partial(pot_plan, cost.double().numpy()), partial(pot_log32_plan, cost)
            count = iterations_to(errors[-1], pot)
            count_log = iterations_to(max(errors[-1], 2e-5), pot_log32, 1024)
            for name, iterations in (("ours", int(plan.iterations)), ("pot", count), ("pot_log32", count_log)):
                counts[name].append(iterations)
            sides["ours"].append(lambda cost=cost: sinkhorn(cost, epsilon=EPSILON, max_iterations=200).favourites)
            sides["pot"].append(lambda count=count, pot=pot: pot(count).argmax(1))
            sides["pot_log32"].append(lambda count=count_log, pot=pot_log32: pot(count).argmax(1))
        times = 5 if n == 128 else 1
        for name in ("ours", "pot"):
            seconds(sides[name], 1)
        # PyTorch's threads spin for work a while after their last: the log solver, in PyTorch, goes alone and last
        time.sleep(0.5)
        rounds = [{name: seconds(sides[name], times) for name in ("ours", "pot")} for _ in range(args.rounds)]
        ratios = [t["ours"] / t["pot"] for t in rounds]
        ms = {name: 1e3 * statistics.median(t[name] for t in rounds) for name in ("ours", "pot")}
        ms["pot_log32"] = 1e3 * seconds(sides["pot_log32"], 1)
        iterations = {name: round(statistics.mean(counts[name])) for name in counts}
        rows.append(
            {
                "n": n,
                "classes": classes,
                "flat": flat,
                "target": target,
                "problems": args.problems,
                "reached_error": max(errors),
                "iterations": iterations,
                "ms": ms,
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
        print(
            f"{n} x {n}, {classes} classes{', flat F' if flat else ''}, error {max(errors):.1e} at most: "
            f"ours {ms['ours']:.2f} ms ({iterations['ours']} it.), POT {ms['pot']:.2f} ms ({iterations['pot']} it.), "
            f"POT float32 log {ms['pot_log32']:.2f} ms ({iterations['pot_log32']} it.); "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f}), target {target}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
