"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from the archive or, marked as such, from a JPEG copy of CIFAR-10."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from otmix.data.folder import load_folder, visible_folders
from otmix.data.sources import ArraySource, RawData, average_channels, to_channels
from otmix.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DEFAULT_ROOT = Path("data")
_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def load_cifar(
    which: Literal["cifar10", "cifar100"], root: str | Path | None = None, download: bool = True, channels: int = 3
) -> RawData:
    """The whole of CIFAR, in the archive's order, from under `root` (default: `data/`), downloaded where it is missing.

    For CIFAR-10, `root` may also be a tree `train/<class>/…` and `test/<class>/…` of image files with the ten class
    names, in the archive's order within each class; its name then says "(JPEG copy)". Raises UserError when the data is
    neither there nor to be had.
    """
    root = DEFAULT_ROOT if root is None else Path(root)
    constants: dict[str, Any] = {
        "mean": average_channels(MEAN, channels),
        "std": average_channels(STD, channels),
        "image_size": 32,
    }
    if which == "cifar10" and _is_copy(root):
        return replace(load_folder(root, channels), name="CIFAR-10 (JPEG copy)", **constants)
    train, test, names = _open_archive(which, root, download)

    def source(part: Any, split: str) -> ArraySource:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return ArraySource(to_channels(images, channels), torch.tensor(part.targets), prefix=f"{which}/{split}")

    return RawData(
        name=_TITLES[which],
        class_names=names,
        train=source(train, "train"),
        validation=None,
        test=source(test, "test"),
        channels=channels,
        **constants,
    )


def _is_copy(root: Path) -> bool:
    train = root / "train"
    return train.is_dir() and tuple(folder.name for folder in visible_folders(train)) == CIFAR10_CLASSES


def _open_archive(which: str, root: Path, download: bool) -> tuple[Any, Any, tuple[str, ...]]:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[which]
    if root.name == kind.base_folder:
        root = root.parent
    try:
        train = kind(root, train=True, download=download)
        test = kind(root, train=False, download=False)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{_TITLES[which]} could be neither read from {root} nor downloaded to it ({error}); "
            f"put {kind.filename} into a folder and pass that with --root"
        ) from error
    return train, test, tuple(train.classes)
