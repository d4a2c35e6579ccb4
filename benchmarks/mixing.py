"""Draw and apply each mixer on 128 × 3 × 32 × 32 images, against torchvision's CutMix (target: at most 1 ×, SaliencyMix
5 ×); Mixup also against its MixUp.

    python benchmarks/mixing.py [--device cuda] [--rounds 15] [--json FILE]

Ours and theirs take turns in each round; a round is the mean time of `--calls` calls. Printed are the medians, and the
ratio ours / theirs with its smallest and largest round. "same work": from the same batch of images and labels to mixed
images and soft labels. "in training": what a step of ours pays, since its batches are paired already (they come from
two streams) and its loss takes both labels instead of soft ones; torchvision's call stays the same.

The script starts itself again with glibc told to keep freed memory. By default it gives some of these buffers back to
the system and asks for them anew at each call; which ones is chance, it costs more than the mixing, and it would
decide the ratio.
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
from torchvision.transforms import v2

from otmix.mixing import CutMix, Mixer, Mixup, Remix, SaliencyMix, UniMix
from otmix.types import Batch, ClassCounts, Items

BATCH, CLASSES, HEIGHT, WIDTH = 128, 10, 32, 32
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def seconds(call: Callable[[], object], calls: int, device: str) -> float:
    """Wall time of `calls` calls, until the device has done them."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def compare(ours: Callable[[], object], theirs: Callable[[], object], args: argparse.Namespace) -> dict[str, float]:
    """Medians in microseconds, and the ratio ours / theirs: median, smallest and largest of the rounds."""
    for call in (ours, theirs):
        seconds(call, args.calls, args.device)
    rounds = [[seconds(call, args.calls, args.device) for call in (ours, theirs)] for _ in range(args.rounds)]
    ratios = [ours / theirs for ours, theirs in rounds]
    return {
        "ours_us": statistics.median(pair[0] for pair in rounds) * 1e6,
        "theirs_us": statistics.median(pair[1] for pair in rounds) * 1e6,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (BATCH,), generator=draw).to(args.device)
    images = torch.rand(BATCH, 3, HEIGHT, WIDTH, generator=draw).to(args.device)
    batch = Batch(Items(labels), images)
    paired = Batch(Items(labels.roll(1)), images.roll(1, 0))
    cutmix, mixup = v2.CutMix(num_classes=CLASSES, alpha=4.0), v2.MixUp(num_classes=CLASSES, alpha=1.0)
    counts = ClassCounts(torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]))
    rows: list[tuple[str, Mixer, Callable[..., object]]] = [
        ("CutMix exact", CutMix(), cutmix),
        ("CutMix clipped", CutMix(box="clipped"), cutmix),
        ("CutMix per image", CutMix(per="image"), cutmix),
        ("Mixup", Mixup(), cutmix),
        ("Mixup, against MixUp", Mixup(), mixup),
        ("Mixup per image", Mixup(per="image"), cutmix),
        ("SaliencyMix", SaliencyMix(per="batch"), cutmix),
        ("SaliencyMix per image", SaliencyMix(), cutmix),
        ("Remix", Remix(counts), cutmix),
        ("UniMix", UniMix(counts), cutmix),
    ]
    results = []
    where = f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{where}, {args.rounds} rounds of {args.calls} calls")
    print(f"{'mixer':<23}{'work':<14}{'ours µs':>9}{'theirs µs':>11}{'ratio':>8}   lowest … highest")
    for name, mixer, theirs in rows:

        def same_work(mixer: Mixer = mixer) -> object:
            other = Batch(Items(labels.roll(1)), images.roll(1, 0))
            return mixer.apply(batch, other, mixer.draw(BATCH, HEIGHT, WIDTH, draw)).soft_labels(CLASSES)

        def in_training(mixer: Mixer = mixer) -> object:
            return mixer.apply(batch, paired, mixer.draw(BATCH, HEIGHT, WIDTH, draw))

        for work, ours in (("same work", same_work), ("in training", in_training)):
            row = compare(ours, partial(theirs, images, labels), args)
            results.append({"mixer": name, "work": work, **row})
            spread = f"{row['lowest']:.2f} … {row['highest']:.2f}"
            times = f"{row['ours_us']:>9.0f}{row['theirs_us']:>11.0f}"
            print(f"{name:<23}{work:<14}{times}{row['ratio']:>8.2f}   {spread}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    main()
