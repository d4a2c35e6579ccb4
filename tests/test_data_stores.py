"""Both stores give the same batches, in order, whatever the number of workers; errors come through whole."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from otmix.config import RunConfig
from otmix.data import (
    ArraySource,
    HeldStore,
    ImageDataset,
    ImageStore,
    ResidentStore,
    ShiftFlip,
    WindowFlip,
    WorkerStore,
    items_of,
    open_store,
    to_square,
)
from otmix.data.resizing import side_needed
from otmix.data.sources import FileSource, ImageSource
from otmix.data.stores import Request
from otmix.errors import UserError
from otmix.types import Items

REQUESTS = [([3, 1, 4, 1], 7), ([5], None), ([0, 2], 8), ([6, 5, 4, 3, 2], 7), ([1, 1], None)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """Seven pictures of different sizes and modes."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for i, mode in enumerate(["RGB", "L", "RGBA", "P", "CMYK", "RGB", "1"]):
        pixels = random.integers(0, 256, (6 + i, 8 + 2 * (i % 3), 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((90 + 11 * i, 80 + 17 * (i % 4)), Image.Resampling.BICUBIC).convert(mode)
        paths.append(f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
        image.save(root / paths[-1])
    return FileSource(root, tuple(paths), torch.tensor([0, 1, 0, 1, 1, 0, 0]))


PHOTOS = ["RGB jpg", "L jpg", "turned jpg", "RGBA png", "I;16 png", "P png", "RGB png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """Seven pictures so large that they are read reduced, and less so for windows of 72 pixels than for evaluation."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(1)
    assert (side_needed(72), WindowFlip(72).side_needed) == (164, 186)
    paths = []
    for i, kind in enumerate(PHOTOS):
        mode, ending = kind.split()
        image = Image.fromarray(random.integers(0, 256, (9, 12 + i, 3), dtype=np.uint8))
        image = image.resize((400 + 90 * i, 340 + 60 * (i % 4)), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if mode == "turned":
            exif[0x0112] = 8
        elif mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        paths.append(f"{i}.{ending}")
        image.save(root / paths[-1], exif=exif)
    return FileSource(root, tuple(paths), torch.tensor([0, 1, 0, 1, 1, 0, 0]))


@pytest.fixture(scope="module")
def arrays() -> ArraySource:
    images = torch.randint(256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArraySource(images, torch.tensor([0, 1, 0, 1, 1, 0, 0]))


def requests_of(source: ImageSource) -> Iterator[Request]:
    everything = items_of(source)
    return ((everything[torch.tensor(places)], seed) for places, seed in REQUESTS)


def gather(store: ImageStore, source: ImageSource) -> list[torch.Tensor]:
    batches = list(store.stream(requests_of(source)))
    for batch, (places, _) in zip(batches, REQUESTS, strict=True):
        assert batch.items.index is not None
        assert batch.items.index.tolist() == places
        assert torch.equal(batch.items.labels, source.labels[places])
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        assert 0 <= float(batch.images.min()) <= float(batch.images.max()) <= 1
    return [batch.images for batch in batches]


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("augmentation", [None, ShiftFlip(2)])
def test_all_stores_agree_on_small_images(
    kind: str, size: int, augmentation: ShiftFlip | None, request: pytest.FixtureRequest
) -> None:
    source: ImageSource = request.getfixturevalue(kind)
    resident = ResidentStore(source, size, "cpu", augmentation)
    expected = gather(resident, source)
    for workers in (0, 2):
        store = WorkerStore(source, size, "cpu", augmentation, workers)
        got = gather(store, source)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        items, seed = next(requests_of(source))
        assert torch.equal(store.fetch(items, seed).images, expected[0])


def test_large_images_do_not_depend_on_the_workers(files: FileSource) -> None:
    augmentation = WindowFlip(72)
    expected, *others = (gather(WorkerStore(files, 72, "cpu", augmentation, workers), files) for workers in (0, 1, 2))
    for got in others:
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert expected[0].shape == (4, 3, 72, 72)
    assert not torch.equal(expected[0][1], expected[0][3])  # one image twice in a batch is seen in two ways
    evaluation = ResidentStore(files, 72, "cpu")
    assert torch.equal(gather(evaluation, files)[1], expected[1])  # without a seed: the view of evaluation


@pytest.mark.parametrize("augmentation", [None, WindowFlip(72), WindowFlip(72, flip=False, scale=(1.0, 1.0))])
@pytest.mark.parametrize("channels", [1, 3])
def test_held_photos_are_those_that_workers_read(
    photos: FileSource, augmentation: WindowFlip | None, channels: int
) -> None:
    source = FileSource(photos.root, photos.paths, photos.labels, channels)
    held = HeldStore(source, 72, "cpu", augmentation)
    before = [image.clone() for image in held.images]
    expected = gather(held, source)
    for workers in (0, 2):
        got = gather(WorkerStore(source, 72, "cpu", augmentation, workers), source)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    items, seed = next(requests_of(source))
    batch = held.fetch(items, seed)
    assert torch.equal(batch.images, expected[0])
    batch.images.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, held.images, strict=True))


def test_held_photos_are_reduced_to_what_is_needed(photos: FileSource) -> None:
    held = HeldStore(photos, 72, "cpu", WindowFlip(72))
    sides = [min(image.shape[1:]) for image in held.images]
    assert all(186 <= side < 2 * 186 for side in sides)
    assert [photos.nbytes(i, 186) for i in range(7)] == [image.nbytes for image in held.images]


def test_values_are_the_images_over_255(arrays: ArraySource) -> None:
    items = items_of(arrays)
    for store in (ResidentStore(arrays, 16, "cpu"), WorkerStore(arrays, 16, "cpu", workers=0)):
        assert torch.equal(store.fetch(items, None).images, arrays.images.float() / 255)
        assert torch.equal(store.fetch(items, 1).images, arrays.images.float() / 255)  # nothing to draw
    smaller = ResidentStore(arrays, 8, "cpu").fetch(items, None).images
    assert torch.equal(smaller, to_square(arrays.images, 8).float() / 255)


def test_augmentation_is_a_function_of_the_seed(arrays: ArraySource) -> None:
    store = ResidentStore(arrays, 16, "cpu", ShiftFlip(2))
    items = items_of(arrays)
    first, again, other, plain = (store.fetch(items, seed).images for seed in (1, 1, 2, None))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(plain, arrays.images.float() / 255)


def test_fetching_does_not_change_what_is_held(arrays: ArraySource) -> None:
    source = arrays.select(torch.arange(7))
    before = source.images.clone()
    store = ResidentStore(source, 16, "cpu", ShiftFlip(2))
    store.fetch(items_of(source), 3).images.zero_()
    assert torch.equal(store.images, before)
    assert torch.equal(source.images, before)


def test_two_streams_at_once(arrays: ArraySource) -> None:
    """Each has workers of its own, as --workers says."""
    store = WorkerStore(arrays, 16, "cpu", workers=1)
    before, most, pairs = set(multiprocessing.active_children()), 0, []
    for pair in zip(store.stream(requests_of(arrays)), store.stream(requests_of(arrays)), strict=True):
        pairs.append(pair)
        most = max(most, len(set(multiprocessing.active_children()) - before))
    assert most == 2
    assert "so many for each stream and device" in str(RunConfig.__doc__)
    assert len(pairs) == len(REQUESTS)
    assert all(torch.equal(a.images, b.images) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_leave_the_global_generator_alone(arrays: ArraySource, workers: int) -> None:
    before = torch.random.get_rng_state()
    list(WorkerStore(arrays, 16, "cpu", ShiftFlip(1), workers).stream(requests_of(arrays)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_without_a_traceback(files: FileSource, tmp_path: Path, workers: int) -> None:
    (tmp_path / "fine.png").write_bytes((files.root / "0.png").read_bytes())
    (tmp_path / "torn.png").write_bytes(b"torn")
    source = FileSource(tmp_path, ("fine.png", "torn.png"), torch.tensor([0, 1]))
    everything = items_of(source)
    stream = WorkerStore(source, 72, "cpu", WindowFlip(72), workers).stream(
        [(everything[:1], 1), (everything, 2), (everything[:1], 3)]
    )
    assert next(stream).images.shape == (1, 3, 72, 72)
    with pytest.raises(UserError, match=r"torn\.png .*--on-bad-image skip") as caught:
        next(stream)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"torn\.png"):
        ResidentStore(source, 72, "cpu")
    with pytest.raises(UserError, match=r"torn\.png .*--on-bad-image skip"):
        open_store(source, dataset_of(source, 72), "cpu", train=True)  # at once, not when its turn comes


class Endless(ArraySource):
    """Whoever reads an image of it waits, and can be killed meanwhile."""

    def read(self, index: int, at_least: int | None = None) -> torch.Tensor:
        time.sleep(100)
        return super().read(index, at_least)


def test_a_worker_that_is_killed_while_it_is_waited_for_is_one_sentence(arrays: ArraySource) -> None:
    before = set(multiprocessing.active_children())

    def kill() -> None:
        while not (children := set(multiprocessing.active_children()) - before):
            time.sleep(0.1)
        time.sleep(0.5)
        for child in children:
            child.kill()

    source = Endless(arrays.images, arrays.labels)
    threading.Thread(target=kill).start()
    with pytest.raises(UserError, match=r"has died .*for each stream.*--workers 0") as caught:
        next(WorkerStore(source, 16, "cpu", workers=1).stream([(items_of(source), None)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [ResidentStore, HeldStore])
def test_progress_is_told(files: FileSource, kind: Callable[..., ImageStore]) -> None:
    steps: list[tuple[int, int]] = []
    kind(files, 72, "cpu", progress=lambda done, n: steps.append((done, n)))
    assert steps[-1] == (7, 7)


def test_wrong_requests(arrays: ArraySource) -> None:
    with pytest.raises(UserError, match="--workers -1"):
        WorkerStore(arrays, 16, "cpu", workers=-1)
    for store in (ResidentStore(arrays, 16, "cpu"), WorkerStore(arrays, 16, "cpu", workers=0)):
        with pytest.raises(ValueError, match="no index"):
            store.fetch(Items(torch.tensor([0])), None)
        with pytest.raises(IndexError):
            store.fetch(Items(torch.tensor([0]), torch.tensor([7])), None)


def dataset_of(source: ImageSource, size: int, flip: bool = True) -> ImageDataset:
    return ImageDataset("own", ("a", "b"), source, None, None, size, 3, (0.5,) * 3, (0.5,) * 3, flip)


def test_what_fits_is_held_and_the_rest_is_read(arrays: ArraySource, photos: FileSource) -> None:
    small, large = dataset_of(arrays, 16), dataset_of(photos, 72)
    exactly = 7 * 3 * 16 * 16
    assert isinstance(open_store(arrays, small, "cpu", train=True, resident_bytes=exactly), ResidentStore)
    assert isinstance(open_store(arrays, small, "cpu", train=True, resident_bytes=exactly - 1), WorkerStore)
    assert isinstance(open_store(photos, large, "cpu", train=False), ResidentStore)
    held = open_store(photos, large, "cpu", train=True)
    assert isinstance(held, HeldStore)
    exactly = sum(image.nbytes for image in held.images)
    assert isinstance(open_store(photos, large, "cpu", train=True, resident_bytes=exactly), HeldStore)
    assert isinstance(open_store(photos, large, "cpu", train=True, resident_bytes=exactly - 1), WorkerStore)


def test_a_folder_that_is_too_large_is_given_up_early(photos: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded, and no header is opened once it is clear."""
    opened: list[int] = []
    sizes = [photos.nbytes(i, 186) for i in range(7)]

    def nbytes(source: FileSource, index: int, at_least: int | None) -> int:
        opened.append(index)
        return sizes[index]

    monkeypatch.setattr(FileSource, "nbytes", nbytes)
    monkeypatch.setattr(FileSource, "read", None)
    budget = sizes[0] + sizes[1] + 1
    store = open_store(photos, dataset_of(photos, 72), "cpu", train=True, resident_bytes=budget)
    assert isinstance(store, WorkerStore)
    assert opened == [0, 1, 2]


def test_open_store_augments_training_only(arrays: ArraySource, files: FileSource) -> None:
    held = open_store(arrays, dataset_of(arrays, 16, flip=False), "cpu", train=True)
    assert isinstance(held, ResidentStore)
    assert held.augmentation == ShiftFlip(padding=2, flip=False)
    for source, size in ((arrays, 16), (files, 72)):
        dataset, items = dataset_of(source, size), items_of(source)
        train, test = (open_store(source, dataset, "cpu", train=train, workers=0) for train in (True, False))
        assert torch.equal(train.fetch(items, None).images, test.fetch(items, 5).images)
        assert not torch.equal(train.fetch(items, 5).images, test.fetch(items, 5).images)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("resident_bytes", [1 << 30, 0])
def test_large_images_are_mirrored_only_where_that_means_the_same(
    files: FileSource, flip: bool, resident_bytes: int
) -> None:
    dataset = dataset_of(files, 72, flip=flip)
    opened = open_store(files, dataset, "cpu", train=True, workers=0, resident_bytes=resident_bytes)
    want = WorkerStore(files, 72, "cpu", WindowFlip(72, flip), workers=0)
    items, seed = items_of(files), 5
    assert torch.equal(opened.fetch(items, seed).images, want.fetch(items, seed).images)


def test_smallest_crop_reaches_the_windows(files: FileSource) -> None:
    items, dataset = items_of(files), dataset_of(files, 72)
    wide, narrow = (
        open_store(files, dataset, "cpu", train=True, workers=0, smallest_crop=smallest).fetch(items, 1).images
        for smallest in (1.0, 0.2)
    )
    assert not torch.equal(wide, narrow)


def test_what_workers_are_given_can_be_pickled(files: FileSource) -> None:
    """Where processes are spawned rather than forked, the reader travels."""
    store = WorkerStore(files, 72, "cpu", WindowFlip(72), workers=0)
    reader = pickle.loads(pickle.dumps(store._reader))
    assert torch.equal(reader.read([1, 2], 3), store._reader.read([1, 2], 3))


@pytest.mark.gpu
def test_a_held_store_never_waits_for_the_gpu(photos: FileSource) -> None:
    store = HeldStore(photos, 72, "cuda", WindowFlip(72))
    items = items_of(photos)
    expected = HeldStore(photos, 72, "cpu", WindowFlip(72)).fetch(items, 5).images
    torch.cuda.set_sync_debug_mode("error")
    try:
        images = store.fetch(items, 5).images
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(image.device.type == "cuda" for image in store.images)
    assert torch.allclose(images.cpu(), expected, atol=1.01 / 255)  # both are rounded to bytes, each in its own way


@pytest.mark.gpu
def test_a_resident_store_never_waits_for_the_gpu(arrays: ArraySource) -> None:
    store = ResidentStore(arrays, 16, "cuda", ShiftFlip(2))
    items = items_of(arrays)
    expected = ResidentStore(arrays, 16, "cpu", ShiftFlip(2)).fetch(items, 5).images
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = store.fetch(items, 5)
        again = store.fetch(batch.items, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batch.images, again.images)
    assert torch.allclose(batch.images.cpu(), expected, atol=1e-6)
