"""Fill benchmarks/README.md with what the scripts' `--json` files in benchmarks/measured say.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from otmix.experiments.units import fill_region

HERE = Path(__file__).parent


def read(name: str) -> Any:
    return json.loads((HERE / "measured" / f"{name}.json").read_text(encoding="utf-8"))


def spread(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({row['lowest']:.2f} … {row['highest']:.2f})"


def transport() -> list[str]:
    rows = ["| problem | ours | POT | ratio | target |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in read("transport"):
        what = f"{row['problems']} of {row['n']} × {row['n']}, {row['classes']} classes"
        what += ", flat F" if row["flat"] else ""
        ms, count = row["ms"], row["iterations"]
        ours, pot = (f"{ms[side]:.2f} ms, {count[side]} iterations" for side in ("ours", "pot"))
        rows.append(f"| {what} | {ours} | {pot} | {row['ratio']:.3f} ({row['lowest']:.3f} … {row['highest']:.3f}) | "
                    f"≤ {row['target']} |")  # fmt: skip
    return rows


def training(*files: str) -> list[str]:
    rows = ["| what | ours | other | time ratio | target |", "| --- | ---: | ---: | ---: | --- |"]
    for file in files:
        for row in read(file)["rows"]:
            ratio = f"{row['time_ratio']:.2f} ({row['lowest']:.2f} … {row['highest']:.2f})"
            target = row["target"].replace(">=", "≥").replace("<=", "≤")
            rows.append(f"| `{row['name']}` | {row['ours_s']:.2f} s | {row['other_s']:.2f} s | {ratio} | {target} |")
    return rows


def mixing() -> list[str]:
    rows = ["| pixel rule | same work | in training |", "| --- | ---: | ---: |"]
    by_mixer: dict[str, dict[str, str]] = {}
    for row in read("mixing"):
        by_mixer.setdefault(row["mixer"], {})[row["work"]] = spread(row)
    return rows + [f"| {name} | {row['same work']} | {row['in training']} |" for name, row in by_mixer.items()]


def losses() -> list[str]:
    found = read("losses")
    sizes = list(dict.fromkeys((row["images"], row["classes"]) for row in found))
    names = [f"{b} × {k}" for b, k in sizes]
    head = [*names, f"memory at {names[-1]}"]  # the size that its target is for
    rows = ["| loss | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
    for name in dict.fromkeys(row["loss"] for row in found):
        of_loss = {(row["images"], row["classes"]): row for row in found if row["loss"] == name}
        last = of_loss[sizes[-1]]
        # 0 is what the profiler says where it saw nothing
        beyond = f"{last['memory'] - last['cross_entropy_memory']:+.2f}".replace("-", "−") if last["memory"] else "–"
        rows.append(f"| `{name}` | " + " | ".join([*(spread(of_loss[size]) for size in sizes), beyond]) + " |")
    return rows


def threads() -> list[str]:
    of = read("threads")
    rows = [f"| batch | one thread | {of['threads']} threads | ratio |", "| --- | ---: | ---: | ---: |"]
    for row in of["rows"]:
        rows.append(f"| {row['what']} | {row['one_ms']:.1f} ms | {row['all_ms']:.1f} ms | {spread(row)} |")
    return rows


def main() -> None:
    of, on_cuda = read("training"), read("training-cuda")
    lines = [
        f"CPU, {of['threads']} threads, torch {of['torch']}, {of['precision']} where a network runs. "
        "Ratios are ours / other, median (smallest … largest) of the rounds. Rows are of different days on shared "
        "machines: compare their ratios, not their times.",
        "", "### transport.py", "", *transport(),
        "", "### training.py", "", *training("training"),
        "", "### training.py --device cuda --compile --steps 97, on an H200", "",
        f"{on_cuda['threads']} threads, torch {on_cuda['torch']}, {on_cuda['precision']}; the targets are the CPU's.",
        "", *training("training-cuda"),
        "", "### mixing.py: against torchvision's CutMix", "", *mixing(),
        "", "### losses.py: time in multiples of `F.cross_entropy`'s, memory beyond its in multiples of the logits", "",
        *losses(),
        "", "### threads.py: one thread against all", "", *threads(),
    ]  # fmt: skip
    path = HERE / "README.md"
    path.write_text(fill_region(path.read_text(encoding="utf-8"), "\n".join(lines), str(path)), encoding="utf-8")


if __name__ == "__main__":
    main()
