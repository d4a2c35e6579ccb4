"""Any folder of images: one folder per class, perhaps inside `train/` beside `test/` or `val/`."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median

import torch

from otmix.data.decoding import IMAGE_ENDINGS, shorter_side
from otmix.data.resizing import SMALL
from otmix.data.sources import FileSource, RawData, average_channels
from otmix.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGE_SIZE = 224
_TEST = ("test",)
_VALIDATION = ("val", "validation", "valid")


def load_folder(root: str | Path, channels: int = 3) -> RawData:
    """`root/train/<class>/…` with `test/`, `val/` or both, or one tree `root/<class>/…` (then `test` is None).

    Classes are the sorted names of the folders; inside them images are found at any depth and sorted by path. Hidden
    files and files with other endings are passed over. Raises UserError for a path that is no folder, fewer than two
    classes, a class folder without images, and a class of `test/` or `val/` that `train/` lacks.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {what}; --root must name a folder of images, one folder per class")
    parts = {folder.name.lower(): folder for folder in visible_folders(root)}
    train_folder = parts.get("train")
    beside = [name for name in (*_TEST, *_VALIDATION) if name in parts]
    if beside and (train_folder is None or not visible_folders(train_folder)):
        raise UserError(
            f"{root} has {beside[0]}/ but no train/<class>/ folders; put the training images of each class there"
        )
    if train_folder is None or not visible_folders(train_folder):
        train = _scan(root, root)
        _require_two(root, train)
        return _raw(root, channels, train, None, None, _stray(root))
    test_folder = next((parts[name] for name in _TEST if name in parts), None)
    validation_folder = next((parts[name] for name in _VALIDATION if name in parts), None)
    notes = _stray(train_folder)
    if test_folder is None and validation_folder is not None:
        test_folder, validation_folder = validation_folder, None
        notes.append(
            f"Only {test_folder.name}/ stands beside train/: it is the held-out test split, so choose no setting by it."
        )
    train = _scan(train_folder, root)
    _require_two(train_folder, train)
    test = None if test_folder is None else _scan(test_folder, root)
    validation = None if validation_folder is None else _scan(validation_folder, root)
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


def choose_image_size(source: FileSource, sample: int = 512) -> int:
    """The median shorter side where that is small (<= 64 px), else 224; from `sample` files' headers."""
    step = max(1, len(source) // sample)
    sides = [shorter_side(source.root / path) for path in source.paths[::step][:sample]]
    known = [side for side in sides if side is not None]
    size = round(median(known)) if known else LARGE_SIZE
    return size if size <= SMALL else LARGE_SIZE


def visible_folders(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry.name)), key=_name)


def _name(path: Path) -> str:
    return path.name


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _is_image(name: str) -> bool:
    return not _hidden(name) and os.path.splitext(name)[1].lower() in IMAGE_ENDINGS  # noqa: PTH122 (100,000 Paths are slow)


def _scan(folder: Path, root: Path) -> dict[str, list[str]]:
    """Class name -> sorted paths of its images relative to `root`."""
    classes = {}
    for class_folder in visible_folders(folder):
        paths = []
        for directory, below, files in os.walk(class_folder, followlinks=True):
            below[:] = [name for name in below if not _hidden(name)]
            inside = Path(directory).relative_to(root).as_posix()
            paths += [f"{inside}/{name}" for name in files if _is_image(name)]
        if not paths:
            endings = " ".join(sorted(IMAGE_ENDINGS))
            raise UserError(
                f"the class folder {class_folder} holds no image ({endings}); add images to it or remove the folder"
            )
        classes[class_folder.name] = sorted(paths)
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
        name=root.resolve().name or "folder",
        class_names=names,
        train=source(train),
        validation=None if validation is None else source(validation),
        test=None if test is None else source(test),
        mean=average_channels(IMAGENET_MEAN, channels),
        std=average_channels(IMAGENET_STD, channels),
        channels=channels,
        notes=tuple(notes),
    )
