"""Test error by epoch of the runs that choose their epoch on the test set, and what the choice is worth.

    python results/curves.py [--add RUN_DIR ...]

`--add` copies the epochs of runs under `official` to curves/official.csv. Prints the tables of results/README.md that
come from that file, and draws them (../docs/official.png).
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
FILE, PICTURE = HERE / "curves" / "official.csv", HERE.parent / "docs" / "official.png"
TITLES = {"ce": "ERM", "ce+cmo": "CMO", "ce+otmix": "OTmix"}
DECAYS = (100, 160, 200)  # the epochs after which the learning rate falls, of 240
PLAIN_FROM = 238  # the first of the last epochs, in which nothing is mixed


def add(runs: list[Path]) -> None:
    """Put the epochs of `runs` into the file, in place of those of the same method and seed."""
    rows = {(row["method"], int(row["seed"]), int(row["epoch"])): row for row in read()} if FILE.exists() else {}
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        for line in (run / "metrics.jsonl").read_text().splitlines():
            epoch = json.loads(line)
            key = result["method"], result["seed"], epoch["epoch"] + 1
            rows[key] = {
                "method": key[0], "seed": str(key[1]), "epoch": str(key[2]), "lr": f"{epoch['lr']:g}",
                "test_error": f"{epoch['test_error']:.4f}", "transport_share": f"{epoch['transport_share'] or 0:.4f}",
            }  # fmt: skip
    with FILE.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(next(iter(rows.values()))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def read() -> list[dict[str, str]]:
    with FILE.open() as stream:
        return list(csv.DictReader(stream))


def curves() -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """By method and seed: test error in % by epoch, and whether transport had a part in that epoch."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {method: {} for method in TITLES}
    for row in read():
        point = 100 * float(row["test_error"]), float(row["transport_share"])
        found[row["method"]].setdefault(row["seed"], []).append(point)
    return {
        method: {seed: (np.array(points)[:, 0], np.array(points)[:, 1] > 0) for seed, points in seeds.items()}
        for method, seeds in found.items()
    }


def best(errors: np.ndarray) -> str:
    return f"{errors.min():.2f} (epoch {errors.argmin() + 1})"


def tables() -> None:
    print("| method | seed | best on test | last epoch | mean of 101–160 | mean of 201–237 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for method, seeds in curves().items():
        for seed, (errors, _) in seeds.items():
            means = " | ".join(f"{errors[a:b].mean():.2f}" for a, b in ((100, 160), (200, 237)))
            print(f"| {TITLES[method]} | {seed} | {best(errors)} | {errors[-1]:.2f} | {means} |")
    print("\n| OTmix, seed | epochs | by transport | mean error | by chance | mean error |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for seed, (errors, transport) in curves()["ce+otmix"].items():
        for a, b in ((100, 160), (160, 200), (200, 237)):
            part, kind = errors[a:b], transport[a:b]
            cells = " | ".join(f"{k.sum()} | {part[k].mean():.2f}" for k in (kind, ~kind))
            print(f"| {seed} | {a + 1}–{b} | {cells} |")


def draw() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
    for axis, (method, seeds) in zip(axes, curves().items()):
        bests, lasts = [], []
        for seed, (errors, transport) in seeds.items():
            epochs = np.arange(1, len(errors) + 1)
            line = axis.plot(epochs, errors, lw=0.6, alpha=0.6)[0]
            marks = {"color": line.get_color(), "ls": "none", "zorder": 3}
            if method == "ce+otmix":
                axis.plot(epochs[transport], errors[transport], "s", ms=1.6, mfc="none", mew=0.4, **marks)
            i = int(errors.argmin())
            bests += axis.plot(i + 1, errors[i], "o", ms=6, **marks, label=f"seed {seed}, best {errors[i]:.2f}")
            lasts += axis.plot(len(errors), errors[-1], "x", ms=6, **marks, label=f"last {errors[-1]:.2f}")
        for epoch in DECAYS:
            axis.axvline(epoch + 0.5, color="0.8", lw=0.8, zorder=0)
        axis.axvline(PLAIN_FROM - 0.5, color="0.5", lw=0.8, ls="--", zorder=0)
        axis.set(title=TITLES[method], xlabel="epoch", ylim=(29, 48), xlim=(60, 246))
        axis.legend(handles=[*bests, *lasts], fontsize=7, ncols=2, loc="upper right")
    axes[0].set_ylabel("test error in %")
    axes[2].set_xlabel("epoch (squares: pairs by transport)")
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="*", type=Path, default=[], metavar="RUN_DIR")
    runs = parser.parse_args().add
    if runs:
        add(runs)
    tables()
    draw()
