"""Where pixels are fetched from: held on the device, or read by workers. All give the same Batch for a request."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from otmix.data.augmentation import Augmentation, ShiftFlip, View, WindowFlip
from otmix.data.decoding import Progress, in_threads
from otmix.data.resizing import side_needed, to_square
from otmix.data.sources import ArraySource, ImageSource
from otmix.devices import move
from otmix.errors import UserError
from otmix.randomness import generator
from otmix.types import Batch, Items

if TYPE_CHECKING:
    from otmix.data.dataset import ImageDataset

Request = tuple[Items, int | None]
"""Which images, and the seed of their augmentation (None: as evaluation sees them)."""

_CHUNK = 4096


class ImageStore(Protocol):
    """Gives the images of any items of one source, float32 in [0, 1] on `device`; their labels and indices come along.

    The augmentation is a pure function of the seed and the place in the batch, whatever the number of workers.
    """

    device: torch.device

    def fetch(self, items: Items, seed: int | None) -> Batch: ...

    def stream(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """One batch for each request, in order."""
        ...


class ResidentStore:
    """All images as one uint8 tensor `[N,C,S,S]` on the device; `fetch` is an index and, with a seed, one batched crop
    and flip there. It never waits for the device. Raises UserError that names a file that cannot be decoded."""

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        device: torch.device | str,
        augmentation: ShiftFlip | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.augmentation = augmentation
        self.images = load_images(source, image_size, progress).to(self.device)

    def fetch(self, items: Items, seed: int | None) -> Batch:
        index = _index(items)
        here = Items(move(items.labels, self.device), move(index, self.device))
        assert here.index is not None
        return Batch(here, _finish(self.images.index_select(0, here.index), self.augmentation, seed))

    def stream(self, requests: Iterable[Request]) -> Iterator[Batch]:
        return (self.fetch(items, seed) for items, seed in requests)


class HeldStore:
    """Images decoded once and kept, each at the size that workers would read it in, as uint8 `[C,h,w]`: on a GPU, else
    in memory. Windows are cut and resized there, one image after the other. Items must be on the CPU.

    On the CPU a request gives the Batch of WorkerStore, bit for bit; a GPU resizes with other rounding, and is never
    waited for. Raises UserError that names a file that cannot be decoded.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        device: torch.device | str,
        augmentation: WindowFlip | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.view = View(source.channels, image_size, augmentation)
        self.images: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * len(source)
        self._place = self.device if self.device.type == "cuda" else torch.device("cpu")

        def decode_one(i: int) -> None:
            self.images[i] = source.read(i, self.view.at_least).to(self._place)

        in_threads(decode_one, len(source), progress)

    def fetch(self, items: Items, seed: int | None) -> Batch:
        threads = self._place.type == "cpu"  # twice as fast on two cores
        pixels = self.view.batch(self.images.__getitem__, _index(items).tolist(), seed, self._place, threads)
        here = Items(move(items.labels, self.device), move(_index(items), self.device))
        return Batch(here, _finish(move(pixels, self.device), None, seed))

    def stream(self, requests: Iterable[Request]) -> Iterator[Batch]:
        return (self.fetch(items, seed) for items, seed in requests)


class WorkerStore:
    """Images read and resized by `workers` processes ahead of need (0: by this one's threads), which each stream that
    is open has for itself. Items must be on the CPU.

    Small-image augmentation (ShiftFlip) is done on the device, as in ResidentStore; WindowFlip by the workers, each
    image with its own generator from (seed, place in the batch). Raises UserError that names a file that cannot be
    decoded.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        device: torch.device | str,
        augmentation: Augmentation | None = None,
        workers: int = 2,
    ) -> None:
        if workers < 0:
            raise UserError(f"--workers {workers} is negative; give 0 or more")
        self.device = torch.device(device)
        self.workers = workers
        self.augmentation = augmentation if isinstance(augmentation, ShiftFlip) else None
        window = augmentation if isinstance(augmentation, WindowFlip) else None
        self._reader = _Reader(source, View(source.channels, image_size, window))

    def fetch(self, items: Items, seed: int | None) -> Batch:
        return self._batch(items, seed, self._reader.read(_index(items).tolist(), seed, threads=True))

    def stream(self, requests: Iterable[Request]) -> Iterator[Batch]:
        if self.workers == 0:
            yield from (self.fetch(items, seed) for items, seed in requests)
            return
        waiting: deque[Request] = deque()

        def orders() -> Iterator[tuple[list[int], int | None]]:
            for items, seed in requests:
                waiting.append((items, seed))
                yield _index(items).tolist(), seed

        loader: DataLoader[Tensor | str] = DataLoader(
            self._reader,
            batch_size=None,  # an order is a whole batch, so one worker makes it
            sampler=orders(),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_ctrl_c,
            generator=torch.Generator(),  # else the loader draws from the global one, and dropout would see it
        )
        try:
            for pixels in loader:
                items, seed = waiting.popleft()
                if isinstance(pixels, str):
                    raise UserError(pixels)
                yield self._batch(items, seed, pixels)
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            if (told := dead_reader(error)) is None:
                raise
            raise told from error

    def _batch(self, items: Items, seed: int | None, pixels: Tensor) -> Batch:
        here = Items(move(items.labels, self.device), move(_index(items), self.device))
        return Batch(here, _finish(move(pixels, self.device), self.augmentation, seed))


def dead_reader(error: Exception) -> UserError | None:
    """What to tell the user of an error that means that a worker process has died; None of another RuntimeError.

    torch raises it from a signal handler, so it may come up anywhere in a step.
    """
    if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
        return None
    reason = str(error).partition("\n")[0].rstrip(". ") or type(error).__name__
    return UserError(
        f"a process that reads images has died ({reason}), perhaps for want of memory; pass fewer --workers (there "
        "are so many for each stream and device), a smaller --batch-size, or --workers 0 to read without processes"
    )


def open_store(
    source: ImageSource,
    dataset: ImageDataset,
    device: torch.device | str,
    train: bool,
    workers: int = 2,
    resident_bytes: int = 2 << 30,
    *,
    smallest_crop: float = 0.2,
    progress: Progress | None = None,
) -> ImageStore:
    """The store for one split of `dataset`: held decoded on the device within `resident_bytes`, else read by workers.

    For training, small images (<= 64 px) are shifted by up to an eighth and mirrored; larger ones get a random window
    of at least `smallest_crop` of their area, and are held at the size which that needs. (0.2 is our choice, not a
    measured one: torchvision's 0.08 is for many images of each class, of which some windows may miss the object.)
    """
    size = dataset.image_size
    if train and not dataset.small:
        window = WindowFlip(size, dataset.flip, (smallest_crop, 1.0))
        if _fits(source, View(source.channels, size, window).at_least, resident_bytes):
            return HeldStore(source, size, device, window, progress)
        return WorkerStore(source, size, device, window, workers)
    augmentation = ShiftFlip(size // 8, dataset.flip) if train else None
    if len(source) * dataset.channels * size * size <= resident_bytes:
        return ResidentStore(source, size, device, augmentation, progress)
    return WorkerStore(source, size, device, augmentation, workers)


def _fits(source: ImageSource, at_least: int, budget: int) -> bool:
    """Whether the images, read like that, take at most `budget` bytes.

    The headers say so before anything is decoded: one costs 0.1 ms, where a decoded JPEG costs 6 ms (1 MP) to 35 ms
    (12 MP); and no more of them are opened once the budget is exceeded.
    """
    total = 0
    for i in range(len(source)):
        total += source.nbytes(i, at_least)
        if total > budget:
            return False
    return True


def load_images(source: ImageSource, image_size: int, progress: Progress | None = None) -> Tensor:
    """Every image as evaluation sees it: uint8 `[N,C,image_size,image_size]` on the CPU, files decoded on all cores."""
    images = torch.empty(len(source), source.channels, image_size, image_size, dtype=torch.uint8)
    if isinstance(source, ArraySource):
        for start in range(0, len(source), _CHUNK):
            images[start : start + _CHUNK] = to_square(source.images[start : start + _CHUNK], image_size)
        return images

    def decode_one(i: int) -> None:
        images[i] = to_square(source.read(i, side_needed(image_size)), image_size)

    in_threads(decode_one, len(source), progress)
    return images


@dataclass(frozen=True)
class _Reader(Dataset["Tensor | str"]):
    """What a worker runs: an order becomes uint8 `[n,C,S,S]`, or the message of the UserError that stopped it."""

    source: ImageSource
    view: View

    def read(self, indices: list[int], seed: int | None, threads: bool = False) -> Tensor:
        return self.view.batch(lambda i: self.source.read(i, self.view.at_least), indices, seed, threads=threads)

    def __getitem__(self, order: tuple[list[int], int | None]) -> Tensor | str:
        try:
            return self.read(*order)
        except UserError as error:  # the loader would wrap it in a traceback
            return str(error)


def _leave_ctrl_c(worker: int) -> None:
    """A terminal sends it to the workers too, and who trains still needs their images in order to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _index(items: Items) -> Tensor:
    if items.index is None:
        raise ValueError("these items have no index, so their images cannot be looked up")
    return items.index


def _finish(pixels: Tensor, augmentation: ShiftFlip | None, seed: int | None) -> Tensor:
    if augmentation is not None and seed is not None:
        drawn = augmentation.draw(len(pixels), generator(seed, "shift and flip"))
        pixels = augmentation.apply(pixels, move(drawn, pixels.device))
    return pixels.to(torch.float32).div_(255)
