"""Which pictures a run's page shows, with their captions."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from otmix.errors import UserError
from otmix.methods import PairingName, parse_method
from otmix.reports.record import RunRecord

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MAX_CONFUSION = 400  # classes up to which a picture of a K × K table shows more than its diagonal
_RULES = {
    "index": "random background",
    "within-batch": "partner within the batch",
    "confusion": "background by the confusion",
    "transport": "background by transport",
}


@dataclass(frozen=True)
class Picture:
    """A PNG and its caption; a wide one is scrolled on a narrow screen instead of shrunk."""

    png: bytes
    caption: str
    wide: bool = False

    @property
    def source(self) -> str:
        """The picture itself as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @classmethod
    def of(cls, figure: Figure, caption: str, wide: bool = False) -> Picture:
        from otmix.reports.figures import png_bytes

        return cls(png_bytes(figure), caption, wide)


def class_pictures(record: RunRecord, other: RunRecord | None = None) -> Iterator[Picture]:
    """Accuracy per class, and what is taken for what."""
    from otmix.reports.figures import confusion_figure, per_class_bars

    names, counts = record.class_names, record.counts
    if counts is not None and any(value is not None for value in record.accuracy):
        labels = (record.title, "baseline" if other is None else f"baseline: {other.title}")
        figure = per_class_bars(
            names, counts, record.accuracy, None if other is None else other.accuracy, labels=labels
        )
        caption = "Training images (above) and accuracy (below) of each class, from the largest class to the smallest."
        yield Picture.of(figure, caption, wide=True)
    if record.confusion is not None and record.confusion.sum() > 0 and len(names) <= MAX_CONFUSION:
        order = sorted(range(len(names)), key=lambda k: -(counts[k] if counts else 0))
        figure = confusion_figure(record.confusion[order][:, order], [names[k] for k in order])
        caption = "What the images of each class (row) are taken for (column), in %."
        if counts is not None:
            caption += " Classes run from common to rare: what lies below the diagonal is rare taken for common."
        yield Picture.of(figure, caption)


def mixing_pictures(record: RunRecord) -> Iterator[Picture]:
    """What the run drew of its mixing, and who was paired with whom."""
    from otmix.reports.figures import pair_counts_figure

    mixed, plan = record.figure("mixed"), record.figure("plan")
    if mixed is not None:
        caption = "What the model saw: a part of the foreground is pasted into the background, and the label is shared."
        yield Picture(mixed, caption, wide=True)
    if plan is not None:
        caption = (
            "A transport plan: the larger a number, the better that background (column) suits that foreground (row)."
        )
        yield Picture(plan, caption)
    if any(counts.any() for counts in record.pairs.values()) and len(record.class_names) <= MAX_CONFUSION:
        caption = "Classes of foregrounds (rows) and of the backgrounds that they were pasted into (columns)."
        yield Picture.of(pair_counts_figure(_pair_counts(record), record.class_names), caption, wide=True)


def _pair_counts(record: RunRecord) -> dict[str, NDArray[np.int64]]:
    """The counts of pairs under a title for each rule.

    Older runs have a table of transport in any case, and one of "index" for whatever transport did not choose.
    """
    pairs = dict(record.pairs)
    rule = _pairing(record)
    if {"index", "transport"} <= pairs.keys() and rule in ("within-batch", "confusion"):
        pairs[rule] = pairs.pop("index") + pairs.get(rule, 0)
    return {_RULES.get(by, by): pairs[by] for by in dict.fromkeys([*_RULES, *pairs]) if by in pairs}


def _pairing(record: RunRecord) -> PairingName | None:
    try:
        return parse_method(str(record.result.get("method"))).pairing
    except UserError:  # a method registered by an import that is not made here
        return None


def curve_pictures(record: RunRecord) -> Iterator[Picture]:
    """The run over its epochs."""
    from otmix.reports.figures import curves

    if any(line.get("loss") is not None for line in record.history):
        caption = "Training, epoch by epoch."
        if record.result.get("bn_statistics") == "mixed":
            caption += " BatchNorm's statistics were made anew after the last epoch, so the result is not that epoch's."
        yield Picture.of(curves(record.history), caption, wide=True)
