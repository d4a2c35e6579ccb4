"""The data sets that have names: digits, CIFAR from the archive's own layout, CIFAR-10 as a JPEG copy."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from otmix.data import LOADERS, ArraySource, Loader, load_dataset, long_tail_counts
from otmix.data.cifar import CIFAR10_CLASSES
from otmix.data.digits import MEAN, STD
from otmix.data.sources import to_channels
from otmix.datanames import DataName
from otmix.errors import UserError


def test_digits_have_a_long_tail_and_a_fixed_balanced_test_split() -> None:
    data = load_dataset("digits")
    counts = data.counts.counts.tolist()
    assert counts == long_tail_counts(counts[0], 20, 10)
    assert data.test is not None
    assert (data.image_size, data.channels, data.flip, data.small) == (8, 1, False, True)
    per_class = torch.bincount(data.test.labels)
    assert int(per_class.min()) >= 52
    assert 0.29 < len(data.test) / 1797 < 0.31
    everything = load_dataset("digits", imbalance=1, seed=5)
    assert everything.test is not None
    assert [data.test.name_of(i) for i in range(539)] == [everything.test.name_of(i) for i in range(539)]
    groups = data.counts.shot_groups()
    assert all(groups[name] is not None for name in groups)


def test_every_name_has_a_loader() -> None:
    assert tuple(LOADERS) == get_args(DataName)


def test_the_example_of_contributing_is_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "def load_mine" in block)
    (line,) = re.findall(r'`"mine": (Loader\(.*?\))`', guide)
    space: dict[str, Any] = {"Loader": Loader}
    exec(code, space)
    monkeypatch.setitem(LOADERS, "mine", eval(line, space))  # type: ignore[misc]
    data = load_dataset("mine")  # type: ignore[arg-type]
    assert data.counts.counts.tolist() == [80, 8]
    assert data.test is not None
    assert torch.bincount(data.test.labels).tolist() == [20, 20]
    assert load_dataset("mine", channels=3).train.read(0).shape == (3, 16, 16)  # type: ignore[arg-type]


def test_digits_pixels_names_and_constants() -> None:
    from sklearn.datasets import load_digits

    original = load_digits()
    data = load_dataset("digits")
    assert data.test is not None
    for source in (data.train, data.test):
        for i in (0, len(source) - 1):
            prefix, number = source.name_of(i).split("/")
            assert prefix == "digits"
            assert int(source.labels[i]) == original.target[int(number)]
            expected = np.round(original.images[int(number)] * 255 / 16)
            assert np.array_equal(source.read(i)[0].numpy(), expected.astype(np.uint8))
    assert MEAN[0] == pytest.approx((original.images / 16).mean(), abs=1e-4)
    assert STD[0] == pytest.approx((original.images / 16).std(), abs=1e-4)
    colour = load_dataset("digits", channels=3)
    assert colour.train.read(0).shape == (3, 8, 8)
    assert (len(colour.mean), colour.mean[0]) == (3, MEAN[0])


def test_digits_validation_only_when_asked() -> None:
    assert load_dataset("digits", max_per_class=50).validation is None
    data = load_dataset("digits", validation_per_class=10, imbalance=10)
    assert data.validation is not None
    assert torch.bincount(data.validation.labels).tolist() == [10] * 10


def write_archive(root: Path, kind: Any, per_class: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A tiny CIFAR in the official pickle layout, its checksums made the expected ones; returns the training rows."""
    fine = kind is datasets.CIFAR100
    num_classes = 100 if fine else 10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    rows, lists = [], {}
    for part in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, part):
            labels = random.permutation(np.arange(num_classes).repeat(per_class)).tolist()
            data = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
            entries.append(write(name, {"data": data, ("fine_labels" if fine else "labels"): labels}))
            if part == "train_list":
                rows.append(data)
        lists[part] = entries
    class_names = [f"fine {k:02d}" for k in range(100)] if fine else list(CIFAR10_CLASSES)
    md5 = write(kind.meta["filename"], {kind.meta["key"]: class_names})[1]
    monkeypatch.setattr(kind, "train_list", lists["train_list"])
    monkeypatch.setattr(kind, "test_list", lists["test_list"])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return np.concatenate(rows)


def test_cifar10_from_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_archive(tmp_path, datasets.CIFAR10, 40, monkeypatch)
    data = load_dataset("cifar10", root=tmp_path)
    assert isinstance(data.train, ArraySource)
    assert data.name == "CIFAR-10"
    assert data.class_names == CIFAR10_CLASSES
    assert data.counts.counts.tolist() == long_tail_counts(200, 100, 10)
    assert data.test is not None
    assert torch.bincount(data.test.labels).tolist() == [40] * 10
    assert (data.image_size, data.channels, data.flip) == (32, 3, True)
    assert data.mean == (0.4914, 0.4822, 0.4465)
    for i in (0, 17, len(data.train) - 1):
        number = int(data.train.name_of(i).removeprefix("cifar10/train/"))
        assert np.array_equal(data.train.read(i).numpy(), rows[number].reshape(3, 32, 32))
    # Also when --root names the archive's own folder.
    inside = load_dataset("cifar10", root=tmp_path / "cifar-10-batches-py")
    assert inside.fingerprint() == data.fingerprint()


def test_cifar10_subset_is_the_released_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path, datasets.CIFAR10, 20, monkeypatch)
    targets = np.array(datasets.CIFAR10(tmp_path).targets)
    random, expected = np.random.RandomState(0), []
    for k, n in enumerate(long_tail_counts(100, 10, 10)):
        places = np.where(targets == k)[0]
        random.shuffle(places)
        expected += [f"cifar10/train/{place}" for place in places[:n]]
    data = load_dataset("cifar10", root=tmp_path, imbalance=10)
    assert [data.train.name_of(i) for i in range(len(data.train))] == expected


def test_cifar100_from_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path, datasets.CIFAR100, 10, monkeypatch)
    data = load_dataset("cifar100", root=tmp_path, imbalance=10)
    assert (data.name, len(data.class_names), data.class_names[3]) == ("CIFAR-100", 100, "fine 03")
    assert data.counts.counts.tolist() == long_tail_counts(10, 10, 100)


def test_cifar_default_validation_is_what_max_per_class_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otmix.data.dataset.CIFAR_VALIDATION", 10)
    write_archive(tmp_path, datasets.CIFAR10, 10, monkeypatch)  # 50 training images a class
    data = load_dataset("cifar10", root=tmp_path, max_per_class=40, imbalance=4)
    assert data.counts.counts.tolist() == long_tail_counts(40, 4, 10)
    assert data.validation is not None
    assert torch.bincount(data.validation.labels).tolist() == [10] * 10
    train, validation = ({s.name_of(i) for i in range(len(s))} for s in (data.train, data.validation))
    assert not train & validation
    assert any("validation split" in note for note in data.notes)
    assert load_dataset("cifar10", root=tmp_path, max_per_class=41).validation is None
    assert load_dataset("cifar10", root=tmp_path, max_per_class=40, validation_per_class=0).validation is None
    assert load_dataset("cifar10", root=tmp_path).validation is None


def test_cifar_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(UserError, match=r"CIFAR-100 .*cifar-100-python\.tar\.gz .*--root") as caught:
        load_dataset("cifar100", root=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"CIFAR-10 .*cifar-10-python\.tar\.gz .*--root"):
        load_dataset("cifar10", root=tmp_path, download=False)


def test_a_damaged_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path, datasets.CIFAR10, 2, monkeypatch)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(b"cut")
    with pytest.raises(UserError, match="CIFAR-10"):
        load_dataset("cifar10", root=tmp_path, download=False)


def test_the_jpeg_copy_is_accepted_and_marked(tmp_path: Path) -> None:
    for split, n in (("train", 4), ("test", 1)):
        for k, name in enumerate(CIFAR10_CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (32, 32), (k, i, 0)).save(tmp_path / split / name / f"{i:04d}.jpg")
    data = load_dataset("cifar10", root=tmp_path, imbalance=4)
    assert data.name == "CIFAR-10 (JPEG copy)"
    assert data.fingerprint()["name"] == "CIFAR-10 (JPEG copy)"
    assert data.class_names == CIFAR10_CLASSES
    assert data.counts.counts.tolist() == long_tail_counts(4, 4, 10)
    assert data.mean == (0.4914, 0.4822, 0.4465)
    random = np.random.RandomState(0)
    places = np.arange(4)
    random.shuffle(places)
    assert [data.train.name_of(i) for i in range(4)] == [f"train/airplane/{place:04d}.jpg" for place in places]


def test_the_jpeg_copy_keeps_its_own_validation_images(tmp_path: Path) -> None:
    """Training leaves more than a thousand of each class unused, as CIFAR's own does, where they are set apart."""
    picture = tmp_path / "0.jpg"
    Image.new("RGB", (32, 32)).save(picture)
    for split, n in (("train", 1003), ("val", 2), ("test", 1)):
        for name in CIFAR10_CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                os.link(picture, tmp_path / split / name / f"{i:04d}.jpg")
    data = load_dataset("cifar10", root=tmp_path, imbalance=1, max_per_class=3)
    assert data.counts.counts.tolist() == [3] * 10
    assert data.validation is not None
    own = [f"val/{name}/{i:04d}.jpg" for name in CIFAR10_CLASSES for i in range(2)]
    assert [data.validation.name_of(i) for i in range(len(data.validation))] == own
    assert not any("validation split" in note for note in data.notes)
    with pytest.raises(UserError, match="has a validation split of its own; leave out --validation-per-class"):
        load_dataset("cifar10", root=tmp_path, validation_per_class=1)


def test_grey_of_arrays_is_grey_of_pillow() -> None:
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = to_channels(images, 1)
    for image, ours in zip(images, grey):
        pillow = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
        assert np.array_equal(ours[0].numpy(), pillow)
    assert torch.equal(to_channels(grey, 3), grey.repeat(1, 3, 1, 1))


def test_importing_the_data_package_is_light() -> None:
    heavy = "{'torchvision', 'sklearn', 'PIL', 'timm', 'lightning', 'matplotlib'}"
    code = f"import sys, otmix.data; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
