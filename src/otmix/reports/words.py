"""The sentences and headline numbers of a run's page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from otmix.errors import UserError
from otmix.reports.classes import group_accuracy, thirds
from otmix.reports.record import RunRecord
from otmix.reports.statistics import difference, percent, points
from otmix.reports.tables import looks_at_test
from otmix.wording import command_line, counted

LEAK = (
    "looked at the test set, so its result is selected on the test set: test images helped to estimate which classes "
    "are confused, or the epoch with the lowest test error was picked afterwards. It shows what looking is worth; it "
    "is no estimate of how the model does on new images."
)
_SPLITS = {
    "test": "on the test split, which had no part in training and decided nothing",
    "validation": "on the validation split: not trained on, but it may have guided choices; no test image was used",
    "train": "on training images, so it says nothing about new images",
}
# settings in which a run and its baseline should agree, so that the difference is the method's
_SHARED = (
    "protocol",
    "set",
    "backbone",
    "pretrained",
    "weights",
    "epochs",
    "batch_size",
    "optimizer",
    "lr",
    "weight_decay",
    "nesterov",
    "schedule",
    "warmup",
    "precision",
    "image_size",
    "seed",
)


@dataclass(frozen=True)
class Tile:
    """One number in large type, what it is, and how it differs from the baseline's."""

    value: str
    label: str
    change: str = ""


def lead(record: RunRecord, seed: bool = True) -> str:
    """What was trained, on what, and with which seed."""
    config, counts, names = record.config, record.counts, record.class_names
    number = record.result.get("seed", config.get("seed")) if seed else None
    text = "Trained" + (f" for {counted(config['epochs'], 'epoch')}" if config.get("epochs") is not None else "")
    how = [f"backbone {config['backbone']}"] if config.get("backbone") else []
    how += [f"seed {number}"] if number is not None else []
    text += f" ({', '.join(how)})" if how else ""
    classes = counted(len(names), "class")
    if counts is None:
        return f"{text} on {classes}."
    largest, smallest = (pick(range(len(counts)), key=counts.__getitem__) for pick in (max, min))
    text += f" on {counted(sum(counts), 'image')} of {classes}."
    if counts[largest] == counts[smallest]:
        return f"{text} Each class has {counts[largest]:,} training images."
    ratio = counts[largest] / max(1, counts[smallest])
    return (
        f"{text} The largest class ({names[largest]}) has {counts[largest]:,} training images, the smallest "
        f"({names[smallest]}) has {counts[smallest]:,}: {f'{ratio:.3g}' if ratio < 100 else f'{ratio:,.0f}'} to 1."
    )


def tiles(record: RunRecord, other: RunRecord | None = None) -> list[Tile]:
    """The headline: accuracy, balanced accuracy, and that of the rarest and the commonest classes."""
    runs = [record] if other is None else [record, other]
    errors = [run.evaluation.get("top1_error") for run in runs]
    numbers: list[tuple[str, list[float | None]]] = [
        ("of all images are recognised (top-1 accuracy)", [None if error is None else 1 - error for error in errors]),
        ("balanced accuracy: each class counts the same", [run.evaluation.get("balanced_accuracy") for run in runs]),
    ]
    parts = thirds(record.counts)
    if parts is not None:
        for name, part in (("rarest", parts.rare), ("commonest", parts.common)):
            label = f"of the {name} classes ({len(part)} of {len(record.class_names)})"
            numbers.append((label, [group_accuracy(run.accuracy, part) for run in runs]))
    made = []
    for label, values in numbers:
        step = difference(values[0], values[-1])
        change = "" if other is None or step is None else f"{points(step)} points against {other.title}"
        made.append(Tile(percent(values[0], unit=" %"), label, change))
    return made


def measured(record: RunRecord) -> str:
    """On which images the result was measured."""
    number = record.evaluation.get("n")
    images = f" ({counted(number, 'image')})" if number is not None else ""
    if looks_at_test(record.result) and record.split == "test":
        return f"Measured on the test split{images} and selected on the test set."
    if looks_at_test(record.result) and record.split == "validation":
        return (
            f"Measured on the validation split{images}: not trained on, but it may have guided choices, and test "
            "images did."
        )
    return f"Measured {_SPLITS.get(record.split, f'on the {record.split} split')}{images}."


def cautions(record: RunRecord, other: RunRecord | None = None) -> list[str]:
    """What keeps these numbers from saying more."""
    words = ["One run with one seed: another seed can move these numbers by a point or more, so no ranking follows."]
    if other is None:
        return words
    here, there = record.config, other.config
    differ = [key for key in _SHARED if key in here and key in there and here[key] != there[key]]
    if differ:
        listed = "; ".join(f"{key} {here[key]} here, {there[key]} there" for key in differ)
        words.append(f"The baseline differs in more than its method: {listed}.")
    if record.counts != other.counts:
        words.append("The baseline was trained on other numbers of images per class.")
    elif _other_images(record, other, "train"):
        words.append("The baseline was trained on other images.")
    if record.split != "train" and _other_images(record, other, record.split):
        words.append(f"The baseline was measured on other {record.split} images.")
    if looks_at_test(other.result):
        words.append("The baseline's result is selected on the test set.")
    return words


def _other_images(record: RunRecord, other: RunRecord, split: str) -> bool:
    """Whether two runs are known to have had other images in a split. Grey ones and the same in colour have other
    hashes, so of those nothing is known.
    """
    here, there = (((run.data.get("splits") or {}).get(split) or {}).get("sha256") for run in (record, other))
    same_channels = record.data.get("channels") == other.data.get("channels")
    return None not in (here, there) and same_channels and here != there


def method_parts(record: RunRecord) -> list[tuple[str, str]]:
    """The parts of the method with what each of them changes, in the words of the listing, and the protocol."""
    from otmix.methods import parse_method

    name = record.result.get("method") or record.config.get("method")
    protocol = record.result.get("protocol") or record.config.get("protocol")
    try:
        parts = [(f"{part.title} ({part.paper})", part.changes) for part in parse_method(str(name)).parts]
    except UserError:  # a method registered by an import that is not made here
        parts = [("Method", str(name))]
    return [*parts, ("Protocol", _protocol_title(record, str(protocol)))] if protocol else parts


def _protocol_title(record: RunRecord, protocol: str) -> str:
    """The protocol in the words of the listing where they hold for this run, else its name alone."""
    from otmix.protocols import PROTOCOL_TITLES, PROTOCOLS

    usual = next((own for name, own in PROTOCOLS.items() if name == protocol), None)
    changed = record.result.get("set") or record.config.get("set") or {}
    if usual is None or any(value != getattr(usual, key, value) for key, value in changed.items()):
        return protocol
    if protocol == "clean" and (looks_at_test(record.result) or record.split != "test"):
        return protocol
    return next(title for name, title in PROTOCOL_TITLES.items() if name == protocol)


def commands(record: RunRecord) -> list[str]:
    """What was typed, where it was a command of ours, and how to train the same again beside the run."""
    typed = str(record.environment.get("command") or "")
    config, out = str(record.directory / "config.yaml"), f"{record.directory}-again"
    words = shlex.split(typed) if typed.startswith("otmix ") else []
    imports = [
        word
        for at, word in enumerate(words)
        if "--import" in words[max(0, at - 1) : at + 1] or word.startswith("--import=")
    ]
    again = command_line(["otmix", "train", "--config", config, "--out", out, *imports])
    return [command_line(words), again] if words else [again]


def named_lines(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as lines of name and text; what is None was not set."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += named_lines(value, f"{prefix}{key}.")
        elif value is not None:
            lines.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return lines
