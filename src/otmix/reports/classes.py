"""What became of each class, and of the rare ones, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from otmix.reports.record import RunRecord
from otmix.reports.statistics import difference, mean_known, percent, points
from otmix.reports.tables import Table
from otmix.wording import counted

FEW_MEASURED = 20  # below, one image more or less moves the accuracy of a class by more than 5 points


@dataclass(frozen=True)
class Thirds:
    """Label numbers of the classes with the fewest training images, and of those with the most: a third of them each,
    or as `thirds` says.
    """

    rare: list[int]
    common: list[int]


def thirds(counts: Sequence[int] | None) -> Thirds | None:
    """The rarest and the commonest third, at least one class each, with all classes that are as rare or as common; None
    where no class is rarer than another.

    Where these would share classes, only those with the very smallest and the very largest count.
    """
    if counts is None or len(counts) < 2 or min(counts) == max(counts):
        return None
    order = sorted(range(len(counts)), key=lambda k: counts[k])
    size = max(1, len(counts) // 3)
    most, least = counts[order[size - 1]], counts[order[-size]]
    if most == least:
        most, least = min(counts), max(counts)
    return Thirds([k for k in order if counts[k] <= most], [k for k in order if counts[k] >= least])


def group_accuracy(accuracy: Sequence[float | None], classes: Sequence[int]) -> float | None:
    """Mean of the accuracies of some classes, each class counting once."""
    return mean_known([accuracy[k] for k in classes])


def mistaken_for(record: RunRecord, k: int) -> tuple[str, float] | None:
    """The wrong class that most images of class k are taken for, and their share; None where nothing is mistaken."""
    if record.confusion is None or record.confusion[k].sum() == 0:
        return None
    wrong = record.confusion[k].copy()
    wrong[k] = 0
    most = int(wrong.argmax())
    return None if wrong[most] == 0 else (record.class_names[most], float(wrong[most] / record.confusion[k].sum()))


def rare_story(record: RunRecord, baseline: RunRecord | None = None) -> list[str]:
    """What happened to the rarest classes, in sentences."""
    if record.counts is None:
        return ["The run did not record how many training images each class has, so its rare classes are not known."]
    parts = thirds(record.counts)
    if parts is None:
        return ["All classes have the same number of training images: none is rare."]
    names, sizes = record.class_names, [record.counts[k] for k in parts.rare]
    few = counted(max(sizes), "training image")
    few = few if min(sizes) == max(sizes) else f"{min(sizes):,} to {few}"
    rare, common = (percent(group_accuracy(record.accuracy, part), unit=" %") for part in (parts.rare, parts.common))
    story = [
        f"The rarest classes, {_listed(parts, names)}, had {few} each.",
        f"On average {rare} of the images of such a class are recognised; of one of the commonest classes, {common}.",
    ]
    if baseline is not None:
        story += _against(record, baseline, parts)
    if record.confusion is not None:
        wrong = int(record.confusion[parts.rare].sum() - record.confusion[parts.rare, parts.rare].sum())
        if wrong:
            into = percent(int(record.confusion[np.ix_(parts.rare, parts.common)].sum()) / wrong, 0, " %")
            story.append(f"Of their images that are not recognised, {into} are taken for one of the commonest classes.")
    never = [names[k] for k in range(len(names)) if record.accuracy[k] == 0]
    if never:
        more = f" and {len(never) - 8} more" if len(never) > 8 else ""
        story.append(f"Never recognised, among all classes: {', '.join(never[:8])}{more}.")
    measured = record.measured
    thin = 0 if measured is None else sum(0 < measured[k] < FEW_MEASURED for k in parts.rare)
    if thin:
        story.append(
            f"{thin} of these rare classes {'was' if thin == 1 else 'were'} measured on fewer than {FEW_MEASURED} "
            "images: one image more or less moves such an accuracy by more than 5 points."
        )
    return story


def _listed(parts: Thirds, names: Sequence[str]) -> str:
    which = f" ({', '.join(names[k] for k in parts.rare)})" if len(parts.rare) <= 8 else ""
    return f"{len(parts.rare)} of {len(names)}{which}"


def _against(record: RunRecord, baseline: RunRecord, parts: Thirds) -> list[str]:
    both = [(record.accuracy[k], baseline.accuracy[k]) for k in parts.rare]
    moved = [here - there for here, there in both if here is not None and there is not None]
    better, worse = sum(step > 0 for step in moved), sum(step < 0 for step in moved)
    before = group_accuracy(baseline.accuracy, parts.rare)
    rare, common = (
        difference(group_accuracy(record.accuracy, part), group_accuracy(baseline.accuracy, part))
        for part in (parts.rare, parts.common)
    )
    return [
        f"The baseline, {baseline.title}, recognises {percent(before, unit=' %')} of them: this run changes that by "
        f"{points(rare)} points, and the commonest classes by {points(common)} points.",
        f"Of the {len(parts.rare)} rare classes, {better} got better, {worse} got worse and "
        f"{len(moved) - better - worse} stayed the same.",
    ]


def changes_table(record: RunRecord, baseline: RunRecord) -> Table:
    """The headline numbers of a run beside those of its baseline."""
    rows: list[tuple[str, str, str, str]] = []
    here, there = record.evaluation, baseline.evaluation

    def add(name: str, new: float | None, old: float | None) -> None:
        rows.append((name, percent(old), percent(new), points(difference(new, old))))

    add("accuracy", _complement(here.get("top1_error")), _complement(there.get("top1_error")))
    add("balanced accuracy", here.get("balanced_accuracy"), there.get("balanced_accuracy"))
    for group in ("many", "medium", "few"):
        new, old = ((found.get("group_error") or {}).get(group) for found in (here, there))
        if new is not None or old is not None:
            add(f"accuracy, {group}-shot classes", _complement(new), _complement(old))
    parts = thirds(record.counts)
    if parts is not None:
        for name, classes in (("rarest", parts.rare), ("commonest", parts.common)):
            name = f"accuracy, the {name} {len(classes)} of {len(record.class_names)} classes"
            add(name, group_accuracy(record.accuracy, classes), group_accuracy(baseline.accuracy, classes))
    add("calibration error (lower is better)", here.get("calibration_error"), there.get("calibration_error"))
    return Table("", ("in %", f"baseline: {baseline.title}", f"this run: {record.title}", "difference"), tuple(rows))


def class_table(record: RunRecord, baseline: RunRecord | None = None) -> Table:
    """One line per class, from the most to the fewest training images."""
    counts, measured = record.counts, record.measured
    order = (
        range(len(record.class_names)) if counts is None else np.argsort(-np.asarray(counts), kind="stable").tolist()
    )
    rows = []
    for k in order:
        wrong = mistaken_for(record, k)
        accuracy = record.accuracy[k]
        row = [
            record.class_names[k],
            "–" if counts is None else f"{counts[k]:,}",
            "–" if measured is None else f"{measured[k]:,}",
            percent(accuracy),
        ]
        if baseline is not None:
            row += [percent(baseline.accuracy[k]), points(difference(accuracy, baseline.accuracy[k]))]
        rows.append((*row, "–" if wrong is None else f"{wrong[0]} ({percent(wrong[1], 0, ' %')})"))
    columns = [
        "class",
        "training images",
        f"{record.split} images",
        "accuracy %",
        *(["baseline %", "difference"] if baseline else []),
        "most often mistaken for",
    ]
    return Table("", tuple(columns), tuple(rows), left=frozenset({0, len(columns) - 1}))


def _complement(error: float | None) -> float | None:
    return None if error is None else 1 - error
