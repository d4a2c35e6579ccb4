"""Where images come from: a labelled sequence of pictures of any size, in memory or in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from otmix.data.decoding import decode, size_of, unreadable
from otmix.errors import UserError
from otmix.types import Items


class ImageSource(Protocol):
    """N labelled images. `labels [N]` int64 on the CPU."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def channels(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, index: int, at_least: int | None = None) -> Tensor:
        """Image `index` as uint8 `[C,H,W]` at its own size, or smaller where it has a shorter side >= `at_least`."""
        ...

    def nbytes(self, index: int, at_least: int | None = None) -> int:
        """Bytes of what `read` gives, known without decoding; 0 for a broken image."""
        ...

    def name_of(self, index: int) -> str:
        """What the image is called, the same on every machine."""
        ...

    def stamp(self, index: int) -> bytes:
        """Something cheap that changes when the image does, for the fingerprint. Raises UserError that names a file
        that is not there."""
        ...

    def select(self, indices: Tensor) -> Self:
        """The images at `indices [n]`, in that order."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory: uint8 `[N,C,H,W]`, `labels [N]`. They are called `prefix/number`; `numbers` default to 0 … N−1.

    Raises UserError when the shapes do not fit each other or a label is negative.
    """

    images: Tensor
    labels: Tensor
    prefix: str = "image"
    numbers: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            shape = tuple(self.images.shape)
            raise UserError(f"images must be uint8 [N,C,H,W], not {self.images.dtype} of shape {shape}")
        object.__setattr__(self, "labels", _checked_labels(self.labels, len(self.images)))
        if self.numbers is None:
            object.__setattr__(self, "numbers", torch.arange(len(self.images)))

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, at_least: int | None = None) -> Tensor:
        return self.images[index]

    def nbytes(self, index: int, at_least: int | None = None) -> int:
        return self.images[index].nbytes

    def name_of(self, index: int) -> str:
        assert self.numbers is not None  # set in __post_init__
        return f"{self.prefix}/{int(self.numbers[index])}"

    def stamp(self, index: int) -> bytes:
        return self.images[index].contiguous().numpy().tobytes()

    def select(self, indices: Tensor) -> ArraySource:
        assert self.numbers is not None
        return ArraySource(self.images[indices], self.labels[indices], self.prefix, self.numbers[indices])


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files: `paths` relative to `root`, with forward slashes; `labels [N]`; decoded to 3 (RGB) or 1 channel."""

    root: Path
    paths: tuple[str, ...]
    labels: Tensor
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "paths", tuple(self.paths))
        object.__setattr__(self, "labels", _checked_labels(self.labels, len(self.paths)))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, at_least: int | None = None) -> Tensor:
        return decode(self.root / self.paths[index], self.channels, at_least)

    def nbytes(self, index: int, at_least: int | None = None) -> int:
        size = size_of(self.root / self.paths[index], at_least)
        return 0 if size is None else self.channels * size[0] * size[1]

    def name_of(self, index: int) -> str:
        return self.paths[index]

    def stamp(self, index: int) -> bytes:
        path = self.root / self.paths[index]
        try:
            return str(path.stat().st_size).encode()
        except OSError as error:  # a link to nowhere, or deleted since the folder was listed
            raise unreadable(path, error) from error

    def select(self, indices: Tensor) -> FileSource:
        paths = tuple(self.paths[i] for i in indices.tolist())
        return FileSource(self.root, paths, self.labels[indices], self.channels)


@dataclass(frozen=True, eq=False)
class RawData:
    """What a loader found under a name or in a folder, before anything is split off, thinned or resized.

    `test` is None where nothing was held out yet; `image_size` is None where the images say it themselves.
    """

    name: str
    class_names: tuple[str, ...]
    train: ImageSource
    validation: ImageSource | None
    test: ImageSource | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    flip: bool = True
    image_size: int | None = None
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def items_of(source: ImageSource) -> Items:
    """All of a source as Items, in order."""
    return Items(source.labels, torch.arange(len(source)))


def _checked_labels(labels: Tensor | Sequence[int], n: int) -> Tensor:
    labels = torch.as_tensor(labels).to("cpu", torch.int64)
    if labels.shape != (n,):
        raise UserError(f"{n} images need labels of shape ({n},), not {tuple(labels.shape)}")
    if n and int(labels.min()) < 0:
        raise UserError(f"label {int(labels.min())} is out of range; labels must be 0 or more")
    return labels


def to_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 `[N,1 or 3,H,W]` with 1 or 3 channels: grey is repeated; RGB becomes ITU-R 601 luma, as in Pillow."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[:, None]


def average_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Per-channel constants for another number of channels: their average, repeated."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels
