"""Any folder of images: one folder per class, perhaps inside `train/` beside `test/` or `val/`."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from statistics import median

import torch

from otmix.data.decoding import IMAGE_ENDINGS, size_of
from otmix.data.resizing import SMALL
from otmix.data.sources import FileSource, RawData, average_channels
from otmix.errors import UserError
from otmix.files import printable

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE_SIZE = 224
_TRAIN = ("train", "training")
_TEST = ("test", "testing")
_VALIDATION = ("val", "validation", "valid")


def load_folder(root: str | Path, channels: int = 3) -> RawData:
    """`root/train/<class>/…` with `test/`, `val/` or both, or one tree `root/<class>/…` (then `test` is None).
    The folders may also be called `training/`, `testing/`, `valid/` and `validation/`, in any case of letters.

    Classes are the sorted names of the folders; inside them images are found at any depth and sorted by path. Hidden
    files are passed over, and files with other endings, which a note counts. Raises UserError for a path that is no
    folder, fewer than two classes, a class folder without images, and a class of `test/` or `val/` that `train/` lacks.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {what}; --root must name a folder of images, one folder per class")
    parts = {folder.name.lower(): folder for folder in visible_folders(root)}
    train_folder = next((parts[name] for name in _TRAIN if name in parts), None)
    beside = [name for name in (*_TEST, *_VALIDATION) if name in parts]
    if beside and (train_folder is None or not visible_folders(train_folder)):
        raise UserError(
            f"{root} has {beside[0]}/ but no train/<class>/ folders; put the training images of each class there"
        )
    others: Counter[str] = Counter()
    if train_folder is None or not visible_folders(train_folder):
        train = _scan(root, root, others)
        _require_two(root, train)
        return _raw(root, channels, train, None, None, [*_stray(root), *passed_over(others)])
    test_folder = next((parts[name] for name in _TEST if name in parts), None)
    validation_folder = next((parts[name] for name in _VALIDATION if name in parts), None)
    notes = _stray(train_folder)
    used = {train_folder, test_folder, validation_folder}
    if beside_it := [folder.name for folder in visible_folders(root) if folder not in used]:
        notes.append(
            f"Beside train/, the folder {_listed(beside_it)} is passed over: held-out images are looked for in "
            "test/ and val/."
        )
    if test_folder is None and validation_folder is not None:
        test_folder, validation_folder = validation_folder, None
        notes.append(
            f"Only {test_folder.name}/ stands beside train/: it is the held-out test split, so choose no setting by it."
        )
    train = _scan(train_folder, root, others)
    _require_two(train_folder, train)
    test = None if test_folder is None else _scan(test_folder, root, others)
    validation = None if validation_folder is None else _scan(validation_folder, root, others)
    notes += passed_over(others)
    for folder, found in ((test_folder, test), (validation_folder, validation)):
        if folder is None or found is None:
            continue
        if extra := sorted(set(found) - set(train)):
            raise UserError(
                f"{folder} has the class {_listed(extra)}, which {train_folder} lacks; the classes must agree"
            )
        if missing := sorted(set(train) - set(found)):
            notes.append(f"{folder.name}/ has no image of the class {_listed(missing)}.")
    return _raw(root, channels, train, validation, test, notes)


def choose_image_size(source: FileSource, large: int = LARGE_SIZE, sample: int = 512) -> int:
    """The median shorter side where that is small (<= 64 px), else `large`; from `sample` files' headers."""
    step = max(1, len(source) // sample)
    sizes = [size_of(source.root / path) for path in source.paths[::step][:sample]]
    sides = [min(size) for size in sizes if size is not None]
    size = round(median(sides)) if sides else large
    return size if size <= SMALL else large


def visible_folders(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name)), key=_name)


def _name(path: Path) -> str:
    return path.name


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (100,000 Paths are slow)


def _is_image(name: str) -> bool:
    return not _hidden(name) and _ending(name) in IMAGE_ENDINGS


def images_below(folder: Path, others: Counter[str] | None = None) -> list[str]:
    """Paths relative to `folder`, with forward slashes, of the images at any depth, sorted; what is hidden is left out.

    Links are followed, but no folder is visited twice. `others` counts the other files by their endings.
    """
    paths: list[str] = []
    visited = {folder.resolve()}
    for directory, below, files in os.walk(folder, followlinks=True):
        here = Path(directory)
        kept = []
        for name in sorted(below):
            if not _hidden(name) and (real := (here / name).resolve()) not in visited:
                visited.add(real)
                kept.append(name)
        below[:] = kept
        inside = "" if here == folder else f"{here.relative_to(folder).as_posix()}/"
        paths += [f"{inside}{name}" for name in files if _is_image(name)]
        if others is not None:
            others.update(_ending(name) for name in files if not _hidden(name) and not _is_image(name))
    return sorted(paths)


def _scan(folder: Path, root: Path, others: Counter[str]) -> dict[str, list[str]]:
    """Class name -> sorted paths of its images relative to `root`."""
    classes = {}
    for class_folder in visible_folders(folder):
        inside = class_folder.relative_to(root).as_posix()
        paths = [f"{inside}/{path}" for path in images_below(class_folder, others)]
        if not paths:
            endings = " ".join(sorted(IMAGE_ENDINGS))
            raise UserError(
                f"the class folder {class_folder} holds no image ({endings}); add images to it or remove the folder"
            )
        classes[class_folder.name] = paths
    if not classes:
        raise UserError(f"{folder} holds no class folder; put the images of each class into a folder of their own")
    return classes


def _require_two(folder: Path, classes: dict[str, list[str]]) -> None:
    if len(classes) < 2:
        raise UserError(
            f"{folder} holds only the class '{next(iter(classes))}'; there must be at least two to tell apart"
        )


def _stray(folder: Path) -> list[str]:
    stray = sum(entry.is_file() and _is_image(entry.name) for entry in folder.iterdir())
    return [f"Images directly in {folder.name}/ belong to no class and are passed over: {stray}."] if stray else []


def passed_over(others: Counter[str]) -> list[str]:
    """Half of the pictures may be in a format that is not read, and nobody would know."""
    if not others:
        return []
    listed = ", ".join(f"{n:,} {ending or 'without an ending'}" for ending, n in others.most_common(5))
    more = f" and {len(others) - 5} other endings" if len(others) > 5 else ""
    return [f"Files that are not read as images are passed over: {listed}{more}."]


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _raw(
    root: Path,
    channels: int,
    train: dict[str, list[str]],
    validation: dict[str, list[str]] | None,
    test: dict[str, list[str]] | None,
    notes: list[str],
) -> RawData:
    names = tuple(sorted(train))

    def source(found: dict[str, list[str]]) -> FileSource:
        paths = [path for name in names for path in found.get(name, ())]
        sizes = torch.tensor([len(found.get(name, ())) for name in names])
        return FileSource(root, tuple(paths), torch.repeat_interleave(torch.arange(len(names)), sizes), channels)

    return RawData(
        name=printable(root.resolve().name) or "folder",
        class_names=tuple(map(printable, names)),
        train=source(train),
        validation=None if validation is None else source(validation),
        test=None if test is None else source(test),
        mean=average_channels(IMAGENET_MEAN, channels),
        std=average_channels(IMAGENET_STD, channels),
        channels=channels,
        notes=tuple(notes),
    )
