"""From a name and a few numbers to an ImageDataset: splits, thinned where asked, and a record of what was done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from otmix.data.cifar import load_cifar
from otmix.data.copies import notes_of_copies
from otmix.data.decoding import GLANCE, Progress, find_unreadable, in_threads
from otmix.data.digits import load_digits
from otmix.data.folder import LARGE_SIZE, choose_image_size, load_folder
from otmix.data.longtail import choose_subset, split_by_class
from otmix.data.resizing import SMALL
from otmix.data.sources import ArraySource, FileSource, ImageSource, RawData, average_channels
from otmix.datanames import DataName
from otmix.errors import UserError
from otmix.models.timm_backbone import PREFIX, takes_images, timm_data_config
from otmix.types import ClassCounts
from otmix.wording import counted

CIFAR_VALIDATION = 1000
_SMALLEST = 4
TEST_FRACTION = 0.2
_LISTED = 20  # files that a note names
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Loader:
    """What a name of `--data` stands for: `load(root, channels, download)`, each as the user gave it, and the ratio of
    the largest class to the smallest that it is thinned to unless told otherwise (None: not at all).
    """

    load: Callable[[str | Path | None, int | None, bool], RawData]
    imbalance: float | None = None


def _cifar(which: Literal["cifar10", "cifar100"], root: str | Path | None, channels: int | None, down: bool) -> RawData:
    return load_cifar(which, root, down, channels or 3)


def _folder(root: str | Path | None, channels: int | None, download: bool) -> RawData:
    if root is None:
        raise UserError(
            "--data folder needs --root DIR, a folder with the images of each class in a folder of their own"
        )
    return load_folder(root, channels or 3)


LOADERS: dict[DataName, Loader] = {
    "digits": Loader(lambda root, channels, download: load_digits(channels or 1), imbalance=20.0),
    "cifar10": Loader(partial(_cifar, "cifar10"), imbalance=100.0),
    "cifar100": Loader(partial(_cifar, "cifar100"), imbalance=100.0),
    "folder": Loader(_folder),
}


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images in splits, and what a model must know to see them.

    `counts` are the training images per class; the model sees `[channels, image_size, image_size]`, normalised by
    `mean` and `std` per channel; `flip`: mirror images mean the same; `notes`: what was done to the data, in sentences;
    `left_out`: the files that cannot be read, and why.
    Raises UserError for fewer than two classes, a label without a class name, a class without a training image.
    """

    name: str
    class_names: tuple[str, ...]
    train: ImageSource
    validation: ImageSource | None
    test: ImageSource | None
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.class_names) < 2:
            raise UserError(
                f"{self.name} has only the class '{self.class_names[0]}'; there must be at least two to tell apart"
            )
        for split in _SPLITS:
            labels = source.labels if (source := self.split(split)) is not None else torch.empty(0)
            if len(labels) and int(labels.max()) >= len(self.class_names):
                allowed = f"0 … {len(self.class_names) - 1}"
                raise UserError(
                    f"label {int(labels.max())} of the {split} split of {self.name} is out of range; "
                    f"labels must be {allowed}"
                )
        _require_images(self.train, self.class_names, f"the training split of {self.name}")

    @property
    def counts(self) -> ClassCounts:
        return ClassCounts.from_labels(self.train.labels, len(self.class_names))

    @property
    def small(self) -> bool:
        """At most 64 pixels a side: augmented by shifted crops on the device, rather than one by one in workers."""
        return self.image_size <= SMALL

    def split(self, name: str) -> ImageSource | None:
        """The split called "train", "validation" or "test"."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def fingerprint(self) -> dict[str, object]:
        """What the data is, for a run's record: names, counts, and per split its size and a SHA-256 over each image's
        name (path, or place in the archive), label and content (a file's size; an array's bytes), in order."""
        splits = {name: source for name in _SPLITS if (source := self.split(name)) is not None}
        return {
            "name": self.name,
            "class_names": list(self.class_names),
            "counts": self.counts.counts.tolist(),
            "image_size": self.image_size,
            "splits": {name: {"images": len(source), "sha256": _digest(source)} for name, source in splits.items()},
        }


def load_dataset(
    data: DataName,
    *,
    root: str | Path | None = None,
    imbalance: float | None = None,
    max_per_class: int | None = None,
    image_size: int | None = None,
    validation_per_class: int | None = None,
    test_fraction: float = TEST_FRACTION,
    seed: int = 0,
    on_bad_image: Literal["error", "skip"] = "error",
    download: bool = True,
    channels: int | None = None,
    backbone: str | None = None,
    progress: Progress | None = None,
) -> ImageDataset:
    """The data called `data`, made long-tailed as in the literature (`choose_subset`); the test split is never thinned.

    `imbalance` (largest : smallest class) defaults to 100 for CIFAR, 20 for the digits, and to nothing for a folder,
    which is not thinned unless asked; 1 is balanced. `max_per_class` is the size of the largest class.
    `validation_per_class` images of each class are set apart before thinning; by default 1,000 for CIFAR where
    `max_per_class` leaves them unused, else none. `test_fraction` of each class of a folder without a test split is
    held out. `seed` chooses these subsets (0: the literature's) and is not meant to vary between runs that are
    compared. `on_bad_image="skip"` decodes every file once and leaves out the broken ones. `backbone`, where it is
    "timm/NAME", gives a folder its own normalisation and, unless the images are small and it takes them so, its own
    size; without it these are ImageNet's and 224. Raises UserError for what the user can mend.
    """
    if on_bad_image not in ("error", "skip"):
        raise UserError(f"--on-bad-image {on_bad_image} is unknown; give error or skip")
    timm = backbone if backbone is not None and backbone.startswith(PREFIX) else None
    raw = _load_raw(data, root, channels, download)
    if timm is not None and data == "folder":  # the statistics of other data are their own
        own = timm_data_config(timm)
        mean, std = average_channels(own.mean, raw.channels), average_channels(own.std, raw.channels)
        raw = replace(raw, mean=mean, std=std)
    if on_bad_image == "skip":
        raw = _without_unreadable(raw, progress)
    if raw.test is not None and test_fraction != TEST_FRACTION:
        raw = replace(raw, notes=(*raw.notes, "There is a test split already, so --test-fraction changes nothing."))
    raw = _with_test_split(raw, test_fraction, seed)
    raw, size = _with_size(raw, image_size, timm)
    raw = _with_subset(raw, data, imbalance, max_per_class, validation_per_class, seed)
    held_out = {"validation": raw.validation, "test": raw.test}
    files = {split: source for split, source in held_out.items() if isinstance(source, FileSource)}
    if data == "folder" and isinstance(raw.train, FileSource):
        raw = replace(raw, notes=(*raw.notes, *notes_of_copies(raw.train, files)))
    return ImageDataset(
        raw.name,
        raw.class_names,
        raw.train,
        raw.validation,
        raw.test,
        size,
        raw.channels,
        raw.mean,
        raw.std,
        raw.flip,
        raw.notes,
        raw.left_out,
    )


def require_readable(source: ImageSource, progress: Progress | None = None) -> None:
    """Raises UserError that names a file that cannot be read: before hours of training rather than after them."""
    if not isinstance(source, ArraySource):
        in_threads(lambda i: source.read(i, GLANCE), len(source), progress)


def _load_raw(data: DataName, root: str | Path | None, channels: int | None, download: bool) -> RawData:
    if channels not in (None, 1, 3):
        raise UserError(f"images cannot have {channels} channels; give 1 (grey) or 3 (colour)")
    if data not in LOADERS:  # typed callers never do
        raise UserError(f"--data {data} is unknown; give one of {', '.join(LOADERS)}")
    return LOADERS[data].load(root, channels, download)


def _without_unreadable(raw: RawData, progress: Progress | None) -> RawData:
    found: dict[str, str] = {}

    def readable(source: ImageSource | None) -> ImageSource | None:
        if not isinstance(source, FileSource):
            return source
        bad = find_unreadable(source.root, source.paths, source.channels, progress)
        found.update({source.paths[i]: reason for i, reason in bad.items()})
        return source.select(torch.tensor([i for i in range(len(source)) if i not in bad], dtype=torch.int64))

    train, validation, test = (readable(source) for source in (raw.train, raw.validation, raw.test))
    assert train is not None
    if not found:
        return raw
    for split, source in (("test", test), ("validation", validation)):
        if source is not None and not len(source):
            raise UserError(f"no image of the {split} split of {raw.name} can be read; replace its files")
    listed = "; ".join(f"{path} ({reason})" for path, reason in list(found.items())[:_LISTED])
    more = f" and {len(found) - _LISTED} more, which data.json of a run lists" if len(found) > _LISTED else ""
    _require_images(train, raw.class_names, f"the training images of {raw.name}, unreadable ones left out,")
    note = f"Unreadable images left out: {len(found)}: {listed}{more}."
    return replace(raw, train=train, validation=validation, test=test, notes=(*raw.notes, note), left_out=found)


def _with_test_split(raw: RawData, fraction: float, seed: int) -> RawData:
    if raw.test is not None:
        return raw
    kept, held = split_by_class(raw.train.labels, raw.class_names, fraction, seed)
    share = f"{fraction:.3g} of each class ({len(held):,} of {len(raw.train):,} images)"
    note = f"{share}, drawn with seed {seed}, is the test split."
    return replace(raw, train=raw.train.select(kept), test=raw.train.select(held), notes=(*raw.notes, note))


def _with_size(raw: RawData, asked: int | None, timm: str | None) -> tuple[RawData, int]:
    """And the side the model sees: as asked for; that of small images, if `timm` takes it; else `timm`'s own."""
    large = LARGE_SIZE if timm is None else timm_data_config(timm).image_size
    size = asked if asked is not None else raw.image_size
    if size is None:
        train = raw.train
        size = choose_image_size(train, large) if isinstance(train, FileSource) else min(train.read(0).shape[1:])
    if size < _SMALLEST:
        raise UserError(f"images of {size} x {size} pixels are too small; pass --image-size {_SMALLEST} or more")
    if timm is None or size == large or takes_images(timm, raw.channels, size):
        return raw, size
    if asked is not None:
        raise UserError(f"{timm} cannot take images of {size} x {size} pixels; pass --image-size {large}, its own size")
    note = f"The images are enlarged from {size} to {large} pixels a side, because {timm} cannot take them as they are."
    return replace(raw, notes=(*raw.notes, note)), large


def _with_subset(
    raw: RawData,
    data: DataName,
    imbalance: float | None,
    max_per_class: int | None,
    validation_per_class: int | None,
    seed: int,
) -> RawData:
    if validation_per_class and raw.validation is not None:
        raise UserError(f"{raw.name} has a validation split of its own; leave out --validation-per-class")
    available = torch.bincount(raw.train.labels, minlength=len(raw.class_names))
    if validation_per_class is None:
        spare = (
            data.startswith("cifar")
            and raw.validation is None
            and max_per_class is not None
            and int(available.min()) - max_per_class >= CIFAR_VALIDATION
        )
        validation_per_class = CIFAR_VALIDATION if spare else 0
    imbalance = LOADERS[data].imbalance if imbalance is None else imbalance
    if imbalance is None and max_per_class is None and not validation_per_class:
        return raw
    chosen, held = choose_subset(
        raw.train.labels,
        len(raw.class_names),
        imbalance,
        max_per_class,
        validation_per_class,
        seed,
        by_size=data == "folder",  # its classes stand in no order but the alphabet's
    )
    train = raw.train.select(chosen)
    counts = torch.bincount(train.labels, minlength=len(raw.class_names))
    notes = list(raw.notes)
    span = f"{int(counts.max()):,} … {int(counts.min()):,} images a class, {len(train):,} of {len(raw.train):,} in all"
    if imbalance is not None:
        reached = int(counts.max()) / int(counts.min())
        ratio = f"imbalance {imbalance:g}"
        if abs(reached - imbalance) > 0.1 * imbalance:
            ratio = f"imbalance {reached:.4g} ({imbalance:g} is not to be had with so few images)"
        first = "the largest classes first" if data == "folder" else "in the order of the classes"
        shape = "balanced" if imbalance == 1 else f"thinned to a long tail, {ratio}, {first}"
        notes.append(f"The training split is {shape}: {span}.")
    elif max_per_class is not None:
        notes.append(f"The training split keeps at most {max_per_class:,} images a class: {span}.")
    if held is None:
        return replace(raw, train=train, notes=tuple(notes))
    validation = raw.train.select(held)
    taken = torch.bincount(validation.labels, minlength=len(raw.class_names))
    each = counted(validation_per_class, "training image")
    note = f"The validation split is {each} of each class that training does not use"
    if short := int((taken < validation_per_class).sum()):
        note += (
            f", except in {counted(short, 'class')} too small for that, which give half of theirs (at least "
            f"{int(taken.min())})"
        )
    return replace(raw, train=train, validation=validation, notes=(*notes, f"{note}."))


def _require_images(source: ImageSource, class_names: tuple[str, ...], where: str) -> None:
    counts = torch.bincount(source.labels, minlength=len(class_names))
    if empty := [name for name, n in zip(class_names, counts.tolist()) if n == 0]:
        listed = ", ".join(f"'{name}'" for name in empty[:5])
        raise UserError(f"{where} has no image of the class {listed}; add images or remove the class")


def _digest(source: ImageSource) -> str:
    digest = hashlib.sha256()
    for i, label in enumerate(source.labels.tolist()):
        stamp = source.stamp(i)
        digest.update(f"{source.name_of(i)}\0{label}\0{len(stamp)}\0".encode(errors="surrogateescape"))
        digest.update(stamp)
    return digest.hexdigest()
