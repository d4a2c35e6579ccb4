"""What OTmix costs in training, on CIFAR-sized random images with ResNet-32 and batch 128.

    python benchmarks/training.py [--rounds 7] [--compile] [--json FILE] [--only NAME …]

- `erm-step`: the whole program's training step (streams, augmentation, loop, log) against the barest PyTorch loop with
  the same network, layout, precision and data residency. Target: at least 0.92 × its images/s.
- `otmix-epoch-clean`, `otmix-epoch-paper`: steps of which every batch is mixed by transport, against `erm`'s steps of
  the same program. Two more forward passes alone are 1.67 ×. Target: at most 1.75 ×. For `paper`, F comes from a
  balanced subset after each epoch; its time is included, and so is the validation that both do.
- `released-step`: the same step written as in OTmix's released code (features of the flattened last map in train mode
  with gradient, a Python double loop for the class cost, POT's Sinkhorn, one paste per image). Target: ours at most 0.4
  × its time. Both sides have one precision and layout here. In `released-step-float32` and `released-step-shipped` the
  other side is as the released code runs, in float32 and the default layout; ours is in float32, and in --precision.

The two sides take turns; each round gives one ratio; printed are the medians, and the smallest and largest ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from otmix.config import RunConfig
from otmix.data import ArraySource, ImageDataset
from otmix.models import Classifier, build_model
from otmix.protocols import Overrides
from otmix.training.build import build_run
from otmix.training.launch import make_fabric
from otmix.training.loop import RunState, finish_epoch, train_epoch
from otmix.training.reporter import Silent
from otmix.training.setup import prepare
from otmix.types import Confusion, ConfusionOrigin

BATCH, MEAN, STD = 128, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
ALL_TRANSPORT = {"mix_probability": 1.0, "mix_from": 0.0, "mix_until": 1.0, "curriculum_power": 0.0}


def dataset(steps: int) -> ImageDataset:
    """Random images with the class counts of CIFAR-10-LT-100, `steps` batches of them."""
    share = np.array([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]) / 12406
    counts = np.maximum(1, np.floor(share * steps * BATCH)).astype(int)
    counts[0] += steps * BATCH - counts.sum()
    labels = torch.from_numpy(np.repeat(np.arange(10), counts))
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (len(labels), 3, 32, 32), generator=g, dtype=torch.uint8)
    source = ArraySource(images, labels)
    names = tuple("abcdefghij")
    return ImageDataset("random", names, source, None, source.select(torch.arange(10)), 32, 3, MEAN, STD, True)


@dataclass(frozen=True)
class How:
    """What both sides of a comparison share."""

    steps: int
    precision: str
    device: str
    compile: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16-mixed")

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        mode = "reduce-overhead" if self.device == "cuda" else None  # with CUDA graphs, as ours
        return torch.compile(function, dynamic=False, mode=mode) if self.compile else function


class Epochs:
    """Epochs of one method through the whole program, one at a time."""

    def __init__(self, method: str, how: How, protocol: str = "clean", **settings: object) -> None:
        config = RunConfig(
            method=method, protocol=protocol, backbone="resnet32", epochs=1000, batch_size=BATCH, evaluate_every=1000,
            precision=how.precision, accelerator=how.device, compile=how.compile, lr=0.01, set=Overrides(**settings),
        )  # fmt: skip
        self.folder = tempfile.TemporaryDirectory()
        plan = prepare(config, dataset(how.steps))
        self.run: RunState = build_run(make_fabric(config), Path(self.folder.name), plan, Silent())

    def __call__(self) -> float:
        """Seconds of one epoch: its steps, F for the next one, and the checkpoint."""
        began = time.perf_counter()
        train_epoch(self.run)
        finish_epoch(self.run)
        return time.perf_counter() - began


def bare(how: How, layout: torch.memory_format) -> tuple[Tensor, Tensor, Classifier, torch.optim.Optimizer]:
    """Resident uint8 images, labels, network and SGD for a loop without this package's program."""
    data, device = dataset(how.steps), how.device
    model = build_model("resnet32", 10, image_size=32, mean=MEAN, std=STD).to(device, memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4, fused=True)
    return data.train.images.to(device), data.train.labels.to(device), model, optimizer


def barest(how: How) -> Callable[[], float]:
    """A loop without this package's program: crop and flip, SGD."""
    images, labels, model, optimizer = bare(how, torch.channels_last)
    device, forward = how.device, how.compiled(model)
    rows = torch.arange(32, device=device)

    def epoch() -> float:
        began = time.perf_counter()
        for index in torch.randperm(len(labels), device=device).split(BATCH):
            padded = F.pad(images[index], (4, 4, 4, 4))
            n = torch.arange(len(index), device=device)[:, None, None]
            top, left, flip = (torch.randint(high, (len(index), 1), device=device) for high in (9, 9, 2))
            columns = left + torch.where(flip == 1, rows.flip(0), rows)
            x = padded.permute(0, 2, 3, 1)[n, (top + rows)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            with how.autocast():
                logits = forward(x.float().div_(255)).logits
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return epoch


def one_crop(images: Tensor) -> Tensor:
    """One crop for the whole batch, which is cheaper than ours, to the baseline's favour."""
    top, left = np.random.default_rng().integers(0, 9, 2)
    return F.pad(images.float() / 255, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32].flip(3)


def released(how: How, layout: torch.memory_format = torch.channels_last) -> Callable[[], float]:
    """A step as the released code writes it, our words: same data and network."""
    import ot

    images, labels, model, optimizer = bare(how, layout)
    forward, features = how.compiled(model), how.compiled(model.official_features)
    confusion = random_confusion().double()
    weight = (1.0 / torch.bincount(labels).double())[labels].cpu()

    def epoch() -> float:
        began = time.perf_counter()
        for back in torch.randperm(len(labels)).split(BATCH):
            fore = torch.multinomial(weight, len(back), replacement=True)
            x_b, x_f, y_b, y_f = one_crop(images[back]), one_crop(images[fore]), labels[back], labels[fore]
            with how.autocast():
                z_b, z_f = features(x_b).float(), features(x_f).float()
            cosine = 1 - F.normalize(z_f) @ F.normalize(z_b).T
            classes = torch.zeros(len(back), len(back), dtype=torch.float64)
            for i in range(len(back)):
                for j in range(len(back)):
                    classes[i, j] = 1 - confusion[y_f[i], y_b[j]]
            mass = torch.full((len(back),), 1 / len(back), dtype=torch.float64)
            plan = ot.sinkhorn(mass, mass, 0.05 * cosine.double().cpu() + 0.95 * classes, 0.01)
            chosen = plan.argmax(1)
            share = float(np.random.default_rng().beta(4, 4))
            side = int(32 * np.sqrt(1 - share))
            top, left = np.random.default_rng().integers(0, 33 - side, 2)
            mixed = x_b[chosen].clone()
            for i in range(len(back)):
                mixed[i, :, top : top + side, left : left + side] = x_f[i, :, top : top + side, left : left + side]
            share = 1 - side * side / 1024
            with how.autocast():
                logits = forward(mixed).logits.float()
            loss = F.cross_entropy(logits, y_b[chosen]) * share + F.cross_entropy(logits, y_f) * (1 - share)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - began

    return epoch


def random_confusion() -> Tensor:
    matrix = torch.rand(10, 10, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.6 * torch.eye(10)
    return matrix / matrix.sum(1, keepdim=True)


def transporting(how: How, protocol: str = "clean") -> Epochs:
    epochs = Epochs("otmix", how, protocol, **ALL_TRANSPORT)
    epochs.run.confusion = Confusion(random_confusion().to(epochs.run.fabric.device), ConfusionOrigin())
    return epochs


def interleave(
    name: str, ours: Callable[[], float], other: Callable[[], float], rounds: int, target: str, images: int
) -> dict[str, object]:
    ours(), other()  # warm up
    pairs = []
    for turn in range(rounds):  # who begins alternates
        first, second = (ours, other) if turn % 2 == 0 else (other, ours)
        a, b = first(), second()
        pairs.append((a, b) if turn % 2 == 0 else (b, a))
    ratios = [a / b for a, b in pairs]
    mine, others = (statistics.median(side) for side in zip(*pairs))
    row = {
        "name": name,
        "target": target,
        "ours_s": mine,
        "other_s": others,
        "time_ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "rounds": rounds,
        "ours_images_per_second": images / mine,
    }
    print(
        f"{name:<22} ours {row['ours_s']:.3f} s, other {row['other_s']:.3f} s, time ratio {row['time_ratio']:.3f} "
        f"({row['lowest']:.3f} … {row['highest']:.3f}), images/s ratio {1 / statistics.median(ratios):.3f}; "
        f"target {target}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="steps of an epoch, one side of one round")
    parser.add_argument("--precision", default="bf16-mixed", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    how = How(args.steps, args.precision, args.device, args.compile)
    single = replace(how, precision="32-true")
    long = replace(how, steps=97)  # a whole epoch of CIFAR-10-LT-100: F is estimated once in it
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {how}")
    cases: dict[str, tuple[Callable[[], Callable[[], float]], Callable[[], Callable[[], float]], str, How]] = {
        "erm-step": (lambda: Epochs("erm", how), lambda: barest(how), "images/s ratio >= 0.92", how),
        "otmix-epoch-clean": (lambda: transporting(how), lambda: Epochs("erm", how), "time ratio <= 1.75", how),
        "otmix-epoch-paper": (
            lambda: transporting(long, "paper"), lambda: Epochs("erm", long), "time ratio <= 1.75", long),
        "released-step": (lambda: transporting(how), lambda: released(how), "time ratio <= 0.4", how),
        "released-step-float32": (
            lambda: transporting(single), lambda: released(single, torch.contiguous_format), "time ratio <= 0.4", how),
        "released-step-shipped": (
            lambda: transporting(how), lambda: released(single, torch.contiguous_format), "time ratio <= 0.4", how),
    }  # fmt: skip
    rows = []
    for name, (ours, other, target, of) in cases.items():
        if args.only is None or name in args.only:
            rows.append(interleave(name, ours(), other(), args.rounds, target, of.steps * BATCH))
    if args.json:
        args.json.write_text(
            json.dumps(
                {
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "precision": args.precision,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
