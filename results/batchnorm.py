"""What BatchNorm's running statistics are worth: the weights of finished runs stay as they are, the statistics are made
anew as the mean over an epoch of other batches, and the error is measured again, on the split that the run measured.

    python results/batchnorm.py RUN_DIR ... [--root DIR] [--csv FILE]
    python results/batchnorm.py --csv results/batchnorm.csv          # the table of results/README.md

The batches: `plain`; `random`, half of them mixed with random pairs (CMO); `transport`, half of them mixed with pairs
by transport, looked at in eval mode; `train-mode`, the same looked at in train mode, as the released code does, whose
passes over plain images move the statistics, too.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from otmix.config import RunConfig
from otmix.data import items_of
from otmix.experiments.unit_tables import changed_settings
from otmix.experiments.units import unit_of
from otmix.protocols import Overrides
from otmix.training.build import build_run
from otmix.training.launch import make_fabric
from otmix.training.loop import finish_epoch, train_epoch
from otmix.training.records import read_config, read_result
from otmix.training.reporter import Silent
from otmix.training.setup import load_data, prepare, split_of
from otmix.training.watching import evaluate

ALWAYS = {"mix_from": 0.0, "mix_until": 1.0}
TRANSPORT = {**ALWAYS, "curriculum_power": 0.0}  # F is of the epoch before, so there are two
KINDS: dict[str, tuple[str, int, dict[str, object]]] = {
    "plain": ("", 1, {}),
    "random": ("+cmo", 1, ALWAYS),
    "transport": ("+otmix", 2, TRANSPORT),
    "train-mode": ("+otmix", 2, {**TRANSPORT, "features": "official"}),
}


def error(config: RunConfig, run_dir: Path, kind: str, dataset: object) -> float:
    """Error in % with the statistics of `kind`."""
    mixer, epochs, settings = KINDS[kind]
    loss = config.method.split("+")[0]
    config = replace(
        config, method=loss + mixer, protocol="clean", set=Overrides(**settings), epochs=epochs, lr=1e-30,
        evaluate_every=1000, accelerator="cpu", compile=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        plan = prepare(config, dataset)
        run = build_run(make_fabric(config), Path(folder), plan, Silent())
        run.state.model.load_state_dict(load_file(run_dir / "model.safetensors"))
        before = [weight.detach().clone() for weight in run.state.model.parameters()]
        for _ in range(epochs):
            for module in run.state.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()
                    module.momentum = None  # the mean over all batches, not a moving one
            train_epoch(run)
            finish_epoch(run)
        assert all(torch.equal(a, b) for a, b in zip(before, run.state.model.parameters()))
        items = items_of(split_of(plan.dataset, config.final_split))
        found, _ = evaluate(run, plan, plan.store(config.final_split, run.fabric), items)
    return 100 * found.top1_error


def table(rows: list[dict[str, str]]) -> None:
    """Means over seeds with their sample standard deviation."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        size = f"{row['backbone']}, {row['image_size']} px, {row['epochs']} epochs, {row['split']} images"
        method = f"{row['method']}; {row['set']}" if row["set"] else row["method"]
        found.setdefault(f"| {size} | {method} | ", []).append(row)
    print(f"| runs | method | seeds | as trained | {' | '.join(KINDS)} |")
    print("| --- | --- | ---: |" + " ---: |" * (1 + len(KINDS)))
    for name, seeds in found.items():
        cells = []
        for kind in ("as trained", *KINDS):
            values = np.array([float(row[kind]) for row in seeds if row[kind]])
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}" if len(values) else "–")
        print(f"{name}{len(seeds)} | {' | '.join(cells)} |")


def main() -> None:
    logging.getLogger("lightning").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--root", help="where the images are now")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    datasets: dict[object, object] = {}
    rows: list[dict[str, object]] = []
    if args.csv and args.csv.exists():
        with args.csv.open() as stream:
            rows = list(csv.DictReader(stream))
    if not args.runs:
        table(rows)
    for run_dir in args.runs:
        config, result = read_config(run_dir), read_result(run_dir)
        if args.root:
            config = replace(config, root=args.root)
        images = config.root, config.image_size, config.max_per_class, config.imbalance, config.seed, config.final_split
        if images not in datasets:
            datasets[images] = load_data(config)
        first = {
            "backbone": config.backbone, "image_size": config.image_size, "epochs": config.epochs,
            "protocol": config.protocol, "split": config.final_split, "method": result["method"],
            "set": changed_settings(unit_of(run_dir)), "seed": config.seed,
            "as trained": f"{100 * result['evaluation']['top1_error']:.2f}",
        }  # fmt: skip
        row = dict(first) | {kind: f"{error(config, run_dir, kind, datasets[images]):.2f}" for kind in args.kinds}
        print(row, flush=True)
        same = ("backbone", "image_size", "epochs", "protocol", "split", "method", "set", "seed")
        rows = [old for old in rows if any(str(old[key]) != str(row[key]) for key in same)] + [row]
        if args.csv:
            rows.sort(key=lambda old: [str(old[key]) for key in same])  # as text: those that were read are
            with args.csv.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(first) + list(KINDS), lineterminator="\n", restval="")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
