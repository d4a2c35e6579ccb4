"""Any folder of images: the layouts, the splits, the notes, and what is said when something is missing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from otmix.config import RunConfig
from otmix.data import ArraySource, FileSource, ImageDataset, load_dataset, require_readable
from otmix.data.folder import IMAGENET_MEAN, IMAGENET_STD, LARGE_SIZE, choose_image_size
from otmix.errors import UserError
from otmix.models import default_backbone, timm_data_config
from otmix.training import train


def put(root: Path, *names: str, size: tuple[int, int] = (12, 10)) -> None:
    """Writes small pictures, each of its own colour."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, 3).tolist())
        Image.new("RGB", size, colour).save(path)


def numbered(folder: str, n: int, ending: str = "png") -> list[str]:
    return [f"{folder}/{i:03d}.{ending}" for i in range(n)]


def names(source: Any) -> list[str]:
    return [source.name_of(i) for i in range(len(source))]


def load(root: Path, **options: Any) -> ImageDataset:
    return load_dataset("folder", root=root, **options)


def test_train_and_test(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/b", 3), *numbered("train/a", 2), *numbered("test/a", 1), *numbered("test/b", 2))
    data = load(tmp_path)
    assert data.class_names == ("a", "b")
    assert data.counts.counts.tolist() == [2, 3]
    assert data.validation is None
    assert data.test is not None
    assert names(data.train) == ["train/a/000.png", "train/a/001.png", *numbered("train/b", 3)]
    assert names(data.test) == ["test/a/000.png", "test/b/000.png", "test/b/001.png"]
    assert data.test.labels.tolist() == [0, 1, 1]
    assert (data.name, data.notes) == (tmp_path.name, ())
    assert (data.image_size, data.channels, data.small, data.flip) == (10, 3, True, True)


def test_training_and_testing_are_the_same_by_other_names(tmp_path: Path) -> None:
    put(tmp_path, *numbered("Training/b", 3), *numbered("Training/a", 2), "Testing/a/0.png", "Testing/b/0.png")
    data = load(tmp_path)
    assert (data.class_names, data.counts.counts.tolist(), data.notes) == (("a", "b"), [2, 3], ())
    assert data.test is not None
    assert names(data.test) == ["Testing/a/0.png", "Testing/b/0.png"]


@pytest.mark.parametrize("validation", ["val", "validation", "valid", "Val"])
def test_validation_beside_test(tmp_path: Path, validation: str) -> None:
    put(tmp_path, *(f"{split}/{k}/0.png" for split in ("train", "test", validation) for k in "ab"))
    data = load(tmp_path)
    assert data.validation is not None
    assert data.test is not None
    assert names(data.validation) == [f"{validation}/a/0.png", f"{validation}/b/0.png"]
    assert names(data.test) == ["test/a/0.png", "test/b/0.png"]
    with pytest.raises(UserError, match="--validation-per-class"):
        load(tmp_path, validation_per_class=1)


def test_validation_alone_is_the_test_split_and_says_so(tmp_path: Path) -> None:
    put(tmp_path, *(f"{split}/{k}/0.png" for split in ("train", "val") for k in "ab"))
    data = load(tmp_path)
    assert data.validation is None
    assert data.test is not None
    assert names(data.test) == ["val/a/0.png", "val/b/0.png"]
    assert any("Only val/" in note and "held-out test" in note for note in data.notes)


@pytest.mark.parametrize("small", ["a", "z"])
def test_the_size_does_not_hang_on_what_a_class_is_called(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,023 images, of which every second is looked at, 300 are small."""
    paths = sorted([*numbered(small, 300), *numbered("b", 212), *numbered("c", 511)])
    source = FileSource(tmp_path, tuple(paths), torch.zeros(1023, dtype=torch.int64), 3)
    looked: list[Path] = []

    def size(path: Path) -> tuple[int, int]:
        looked.append(path)
        return (32, 32) if path.parent.name == small else (300, 300)

    monkeypatch.setattr("otmix.data.folder.size_of", size)
    assert choose_image_size(source) == LARGE_SIZE
    assert 500 < len(looked) <= 512
    assert {path.parent.name for path in looked} == {small, "b", "c"}


def test_a_share_for_a_test_split_that_is_there_is_said_to_change_nothing(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 3), *numbered("train/b", 3), *numbered("test/a", 1), *numbered("test/b", 1))
    for data in (load(tmp_path, test_fraction=0.3), load_dataset("digits", test_fraction=0.3)):
        assert "There is a test split already, so --test-fraction changes nothing." in data.notes
    assert not any("--test-fraction" in note for note in load(tmp_path).notes)


def test_one_tree_is_split_by_class(tmp_path: Path) -> None:
    put(tmp_path, *numbered("common", 20), *numbered("rare", 2))
    data = load(tmp_path, test_fraction=0.25)
    assert data.test is not None
    assert torch.bincount(data.train.labels).tolist() == [15, 1]
    assert torch.bincount(data.test.labels).tolist() == [5, 1]
    assert sorted(names(data.train) + names(data.test)) == numbered("common", 20) + numbered("rare", 2)
    assert any("0.25 of each class (6 of 22 images)" in note for note in data.notes)
    assert names(load(tmp_path, test_fraction=0.25).test) == names(data.test)
    assert names(load(tmp_path, test_fraction=0.25, seed=1).test) != names(data.test)


def test_train_without_test_is_split_too(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 5), *numbered("train/b", 5))
    data = load(tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (8, 2)


def test_nested_hidden_and_foreign_files(tmp_path: Path) -> None:
    put(tmp_path, "a/x/deep/1.JPG", "a/2.Jpeg", "a/.hidden.png", "a/.cache/3.png", ".git/4.png", "b/5.bmp", "b/6.tif")
    (tmp_path / "a/readme.txt").write_text("words")
    (tmp_path / "__MACOSX").mkdir()
    data = load(tmp_path, test_fraction=0.5)
    assert data.test is not None
    assert sorted(names(data.train) + names(data.test)) == ["a/2.Jpeg", "a/x/deep/1.JPG", "b/5.bmp", "b/6.tif"]


def test_files_in_other_formats_are_counted(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 2), *numbered("train/b", 2), "test/a/0.png", "test/b/0.png")
    for name in ("train/a/1.HEIC", "train/a/deep/2.heic", "test/b/3.mov", "test/b/.hidden", "train/b/README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (note,) = load(tmp_path).notes
    assert note == "Files that are not read as images are passed over: 2 .heic, 1 without an ending, 1 .mov."


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path, *numbered("data/a", 2), *numbered("data/b", 2), *numbered("elsewhere", 3))
    (tmp_path / "data/a/here").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data/a/there").symlink_to(tmp_path / "elsewhere")
    data = load(tmp_path / "data", test_fraction=0.5)
    assert data.test is not None
    assert len(data.train) + len(data.test) == 2 + 3 + 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, *numbered("car", 3), *numbered("train", 3))
    assert load(tmp_path).class_names == ("car", "train")


def test_images_outside_a_class_are_mentioned(tmp_path: Path) -> None:
    put(tmp_path, "stray.png", *numbered("a", 2), *numbered("b", 2))
    assert any("belong to no class" in note and note.endswith("1.") for note in load(tmp_path).notes)


def test_a_class_without_test_images_is_mentioned(tmp_path: Path) -> None:
    put(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png")
    assert any("test/ has no image of the class 'b'" in note for note in load(tmp_path).notes)


def test_folders_beside_train_that_are_not_read_are_named(tmp_path: Path) -> None:
    put(tmp_path, *(f"{folder}/{name}/{i}.png" for folder in ("train", "tests", "car") for name in "ab" for i in "12"))
    assert any("the folder 'car', 'tests' is passed over" in note for note in load(tmp_path).notes)


def test_runs_beside_the_classes_are_no_class(tmp_path: Path) -> None:
    """Whoever trains in the folder of the photos has `runs/` there, with pictures in it."""
    put(tmp_path, *numbered("a", 3), *numbered("b", 3), "runs/first/figures/mixed.png", "b/old/figures/plan.png")
    for run in ("runs/first", "b/old"):
        for name in ("config.yaml", "settings.json"):
            (tmp_path / run / name).touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".lock").touch()
    data = load(tmp_path)
    assert data.class_names == ("a", "b")
    assert not any("mixed" in name or "plan" in name for name in names(data.train))
    assert any("'begun', 'runs' holds runs of otmix and is no class" in note for note in data.notes)


def as_run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "settings.json"):
        (folder / name).touch()


@pytest.mark.parametrize("inside", ["", "train/"])
def test_a_class_with_a_run_in_it_stays_a_class(tmp_path: Path, inside: str) -> None:
    """Its images may lie deeper than the run."""
    put(
        tmp_path, *numbered(f"{inside}cat/2023", 3), *numbered(f"{inside}dog", 3), f"{inside}cat/mine/figures/mixed.png"
    )
    as_run(tmp_path / f"{inside}cat" / "mine")
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert not any("mixed" in name for name in names(data.train))
    assert not any("holds runs" in note for note in data.notes)


def test_runs_in_the_place_of_a_class_are_named_in_every_split(tmp_path: Path) -> None:
    put(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "test", "val") for name in "ab"))
    for folder in ("train/runs/first", "test/old", "val/runs/b/c"):
        as_run(tmp_path / folder)
    as_run(tmp_path / "val" / "runs")
    data = load(tmp_path)
    assert data.class_names == ("a", "b")
    assert data.notes[0] == "The folder 'train/runs', 'test/old', 'val/runs' holds runs of otmix and is no class."


@pytest.mark.parametrize("closed", ["a", "a/deep", "runs/first"])
@pytest.mark.parametrize("asked", ["config.yaml", ".lock", "0.png"])
def test_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str, asked: str
) -> None:
    """Whatever is asked of it first: whether it is a run's, or what a file in it is."""
    put(tmp_path, *(f"{name}/0.png" for name in ("a", "b", "a/deep", "runs/first")))
    for name in ("stat", "lstat"):
        plainly = getattr(os, name)

        def refuse(path: Any, *rest: Any, plainly: Any = plainly, **named: Any) -> Any:
            if path is not None and Path(path) == tmp_path / closed / asked:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return plainly(path, *rest, **named)

        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(UserError, match=rf"the folder {tmp_path / closed} cannot be read \(Permission denied\)"):
        load(tmp_path)


@pytest.mark.parametrize("unreadable", ["", "a", "a/deep", "train/a/deep"])
def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    inside = "train/" if unreadable.startswith("train") else ""
    put(tmp_path, *(f"{inside}{name}/{i}.png" for name in ("a", "b", "a/deep") for i in range(2)))
    for name in ("listdir", "scandir"):  # root may read everything, so permissions prove nothing
        plainly = getattr(os, name)

        def refuse(path: Any, plainly: Any = plainly) -> Any:
            if Path(path) == tmp_path / unreadable:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return plainly(path)

        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(UserError, match=rf"the folder {tmp_path / unreadable} cannot be read \(Permission denied\)"):
        load(tmp_path)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    put(tmp_path, *numbered("a", 3), *numbered("b", 3))
    os.mkfifo(tmp_path / "a" / "pipe.png")
    data = load(tmp_path)
    assert "a/pipe.png" not in names(data.train)
    assert "Files that are not read as images are passed over: 1 .png." in data.notes


def test_links_to_the_same_images_are_mentioned(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 3), *numbered("train/b", 2), "test/b/0.png", "elsewhere/1.png")
    (tmp_path / "train" / "b" / "more.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert not any("Links" in note for note in load(tmp_path).notes)
    (tmp_path / "test" / "a").symlink_to(tmp_path / "train" / "a")
    assert any(note.startswith("Links lead to 3 images more than once") for note in load(tmp_path).notes)


def copies(data: ImageDataset) -> list[str]:
    return [note for note in data.notes if "says nothing of new images" in note]


def test_copies_of_training_images_in_the_held_out_splits(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 3), *numbered("train/b", 3), *numbered("test/a", 2), *numbered("test/b", 2))
    put(tmp_path, *numbered("val/a", 2), *numbered("val/b", 2))
    assert copies(load(tmp_path)) == []
    shutil.copy(tmp_path / "train/a/001.png", tmp_path / "test/b/seen.png")  # under another name, and as another class
    shutil.copy(tmp_path / "train/a/001.png", tmp_path / "train/b/again.png")
    end = "What is measured on them says nothing of new images; remove one of each two."
    assert copies(load(tmp_path)) == [
        "1 of 5 test images is a copy of a training image, 1 of them as another class: test/b/seen.png of "
        f"train/a/001.png. {end}"
    ]
    shutil.copy(tmp_path / "train/b/002.png", tmp_path / "test/b/0.png")
    shutil.copy(tmp_path / "train/b/002.png", tmp_path / "val/b/0.png")
    assert copies(load(tmp_path)) == [
        f"1 of 5 validation images is a copy of a training image: val/b/0.png of train/b/002.png. {end}",
        "2 of 6 test images are copies of training images, 1 of them as another class: test/b/0.png of "
        f"train/b/002.png; test/b/seen.png of train/a/001.png. {end}",
    ]
    for i in range(5):
        shutil.copy(tmp_path / "train/b/002.png", tmp_path / f"test/b/1{i}.png")
    assert "train/b/002.png and 2 more. What is" in copies(load(tmp_path))[1]


def test_what_is_no_copy(tmp_path: Path) -> None:
    """Files of one size with other bytes, copies within a split, and of an image that is not trained on."""
    put(tmp_path, *numbered("train/a", 3), *numbered("train/b", 4), *numbered("test/a", 2), *numbered("test/b", 2))
    shutil.copy(tmp_path / "test/a/000.png", tmp_path / "test/b/again.png")
    whole = (tmp_path / "train/a/000.png").read_bytes()
    (tmp_path / "test/a/other.png").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for empty in ("train/a/no.png", "test/a/no.png"):
        (tmp_path / empty).touch()
    (tmp_path / "test/b/link.png").symlink_to(tmp_path / "train/b/001.png")  # of which another note tells
    (tmp_path / "test/b/nowhere.png").symlink_to(tmp_path / "nowhere.png")
    assert copies(load(tmp_path)) == []
    left = next(path for path in numbered("train/b", 4) if path not in names(load(tmp_path, max_per_class=3).train))
    shutil.copy(tmp_path / left, tmp_path / "test/b/unused.png")
    assert copies(load(tmp_path, max_per_class=3)) == []
    assert len(copies(load(tmp_path))) == 1


def test_copies_that_a_random_split_parts(tmp_path: Path) -> None:
    put(tmp_path, *numbered("a", 10), *numbered("b", 10))
    for path in numbered("a", 10):
        shutil.copy(tmp_path / path, (tmp_path / path).with_suffix(".copy.png"))
    [note] = copies(load(tmp_path))
    assert "test images are copies of training images: a/" in note


def test_copies_are_looked_for_where_that_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *numbered("train/a", 3), *numbered("train/b", 3), *numbered("test/a", 2))
    shutil.copy(tmp_path / "train/b/002.png", tmp_path / "test/a/0.png")
    size = (tmp_path / "test/a/0.png").stat().st_size
    (tmp_path / "train/a/long.png").write_bytes((tmp_path / "train/a/000.png").read_bytes() + bytes(10_000))
    same = sum(path.stat().st_size == size for path in tmp_path.rglob("*.png"))
    for limit, found in ((size * same - 1, 0), (size * same, 1)):  # the long file has no part in it
        monkeypatch.setattr("otmix.data.copies.READ_AT_MOST", limit)
        data = load(tmp_path)
        assert len(copies(data)) == found
        skipped = f"Copies of training images in other splits were not looked for: {same} files would have"
        assert any(note.startswith(skipped) for note in data.notes) == (not found)


def test_classes_that_look_alike(tmp_path: Path) -> None:
    put(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "cat ", "Cat", "dog") for i in range(2)))
    assert any("'Cat', 'cat', 'cat ' differ in capitals or spaces only" in note for note in load(tmp_path).notes)
    put(tmp_path, "\\xff/0.png", "\\xff/1.png")
    (tmp_path / "dog").rename(tmp_path / os.fsdecode(b"\xff"))
    with pytest.raises(UserError, match=r"two classes that are written '\\xff'"):
        load(tmp_path)


@pytest.mark.parametrize("inside", ["dataset/train/a", "dataset/a"])
def test_a_folder_around_the_classes_gets_a_hint(tmp_path: Path, inside: str) -> None:
    put(tmp_path, *(f"{inside}{more}/{i}.png" for more in ("", "b") for i in range(2)))
    with pytest.raises(UserError, match=rf"only the class 'dataset'.* did you mean --root {tmp_path / 'dataset'}\?"):
        load(tmp_path)


def test_a_folder_is_never_thinned_unless_asked(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 4), *numbered("train/b", 12), "test/a/0.png", "test/b/0.png")
    assert load(tmp_path).counts.counts.tolist() == [4, 12]
    assert load(tmp_path, max_per_class=6).counts.counts.tolist() == [4, 6]
    assert load(tmp_path, imbalance=1).counts.counts.tolist() == [4, 4]
    thinned = load(tmp_path, imbalance=4)
    assert thinned.counts.counts.tolist() == [3, 12]  # the largest class first, whatever the alphabet says
    assert any("imbalance 4, the largest" in note and "12 … 3 images a class, 15" in note for note in thinned.notes)
    impossible = load(tmp_path, imbalance=500)
    assert impossible.counts.counts.tolist() == [1, 12]
    assert any("imbalance 12 (500 is not to be had with so few images)" in note for note in impossible.notes)
    assert thinned.test is not None
    assert len(thinned.test) == 2


def test_validation_out_of_training_when_asked(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 9), *numbered("train/b", 3), "test/a/0.png", "test/b/0.png")
    data = load(tmp_path, validation_per_class=2)
    assert data.validation is not None
    assert torch.bincount(data.validation.labels).tolist() == [2, 1]
    assert data.counts.counts.tolist() == [7, 2]
    assert not set(names(data.train)) & set(names(data.validation))
    assert any("2 training images of each class" in note and "1 class too small" in note for note in data.notes)


def test_image_size_follows_the_images(tmp_path: Path) -> None:
    put(tmp_path / "small", *numbered("a", 3), *numbered("b", 3), size=(90, 64))
    put(tmp_path / "large", *numbered("a", 3), *numbered("b", 3), size=(90, 65))
    assert (load(tmp_path / "small").image_size, load(tmp_path / "small").small) == (64, True)
    assert (load(tmp_path / "large").image_size, load(tmp_path / "large").small) == (224, False)
    assert load(tmp_path / "large", image_size=32).small
    with pytest.raises(UserError, match="--image-size"):
        load(tmp_path / "small", image_size=3)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    put(tmp_path / "large", *numbered("a", 3), *numbered("b", 3), size=(90, 70))
    return tmp_path / "large"


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        ("vit_tiny_patch16_384", 384, (0.5, 0.5, 0.5)),
        ("inception_v3", 299, (0.5, 0.5, 0.5)),
        ("efficientnet_b3", 288, IMAGENET_MEAN),
        ("resnet18.a1_in1k", 224, IMAGENET_MEAN),
    ],
)
def test_large_images_get_the_size_and_normalisation_of_their_timm_backbone(
    name: str, size: int, mean: tuple[float, ...], large: Path
) -> None:
    data = load(large, backbone=f"timm/{name}")
    assert (data.image_size, data.mean) == (size, mean)
    assert data.std == timm_data_config(f"timm/{name}").std
    given = load(large, backbone=f"timm/{name}", image_size=128)
    assert (given.image_size, given.mean, given.std) == (128, data.mean, data.std)


def test_the_default_for_large_images_is_that_of_the_default_backbone(large: Path) -> None:
    data = load(large)
    assert (data.image_size, data.mean, data.std) == (LARGE_SIZE, IMAGENET_MEAN, IMAGENET_STD)
    assert (data.image_size, data.mean, data.std) == timm_data_config(default_backbone(data.image_size))


def test_grey_images_get_the_average_of_the_normalisation(large: Path) -> None:
    data = load(large, backbone="timm/efficientnet_b3", channels=1)
    assert data.mean == pytest.approx((0.449,))
    assert data.std == pytest.approx((0.226,))


def test_small_images_keep_their_size_where_the_timm_backbone_takes_it(tmp_path: Path) -> None:
    put(tmp_path, *numbered("a", 3), *numbered("b", 3), size=(40, 48))
    for name in ("resnet18", "vit_tiny_patch16_384"):
        data = load(tmp_path, backbone=f"timm/{name}")
        assert (data.image_size, data.mean) == (40, timm_data_config(f"timm/{name}").mean)
    data = load(tmp_path, backbone="timm/inception_v3")  # four halvings and a window of 3 leave nothing of them
    assert data.image_size == 299
    assert "enlarged from 40 to 299 pixels" in data.notes[-1]
    with pytest.raises(UserError, match=r"inception_v3 cannot take images of 64 x 64 pixels; pass --image-size 299"):
        load(tmp_path, backbone="timm/inception_v3", image_size=64)


def test_other_data_keep_their_own_normalisation() -> None:
    plain, data = load_dataset("digits"), load_dataset("digits", backbone="timm/resnet18")
    assert (data.image_size, data.mean, data.std) == (8, plain.mean, plain.std)


def test_a_backbone_that_timm_does_not_know_is_named(large: Path) -> None:
    with pytest.raises(UserError, match="no backbone called timm/resnet19"):
        load(large, backbone="timm/resnet19")


def test_grey_on_request(tmp_path: Path) -> None:
    put(tmp_path, *numbered("a", 2), *numbered("b", 2))
    data = load(tmp_path, channels=1)
    assert (data.channels, len(data.mean), len(data.std)) == (1, 1, 1)
    assert data.train.read(0).shape[0] == 1
    with pytest.raises(UserError, match="2 channels"):
        load(tmp_path, channels=2)


def make_wrong(tmp_path: Path, case: str) -> Path:
    if case == "missing":
        return tmp_path / "nowhere"
    if case == "file":
        put(tmp_path, "a.png")
        return tmp_path / "a.png"
    if case == "flat":
        put(tmp_path, "1.png", "2.png")
    elif case == "one class":
        put(tmp_path, *numbered("only", 3))
    elif case == "empty class":
        put(tmp_path, *numbered("a", 2), *numbered("b", 2))
        (tmp_path / "void").mkdir()
    elif case == "empty test class":
        put(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png")
        (tmp_path / "test/b").mkdir()
    elif case == "unknown test class":
        put(tmp_path, "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/z/0.png")
    elif case == "single image":
        put(tmp_path, *numbered("a", 2), "lonely/0.png")
    elif case == "splits without classes":
        put(tmp_path, "train/0.png", "test/1.png")
    elif case == "no train":
        put(tmp_path, "test/a/0.png", "val/a/0.png")
    return tmp_path


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "nowhere does not exist"),
        ("file", r"a\.png is not a folder"),
        ("nothing in it", "holds no class folder"),
        ("flat", "holds no class folder"),
        ("one class", "only the class 'only'"),
        ("empty class", "void holds no image"),
        ("empty test class", r"b holds no image"),
        ("unknown test class", "has the class 'z'"),
        ("single image", "class 'lonely' has 1 image"),
        ("splits without classes", "no train/<class>/"),
        ("no train", "no train/<class>/"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, case: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load(make_wrong(tmp_path, case))
    assert "\n" not in str(caught.value)


def test_root_and_names_are_required() -> None:
    with pytest.raises(UserError, match="--root"):
        load_dataset("folder")
    with pytest.raises(UserError, match="--data mnist is unknown"):
        load_dataset("mnist")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--on-bad-image"):
        load_dataset("digits", on_bad_image="ignore")  # type: ignore[arg-type]


def test_skipping_bad_images_counts_and_lists_them(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 4), *numbered("train/b", 3), *numbered("test/a", 2), *numbered("test/b", 1))
    (tmp_path / "train/a/001.png").write_bytes(b"broken")
    (tmp_path / "test/a/000.png").write_bytes(b"")
    data = load(tmp_path, on_bad_image="skip")
    assert data.counts.counts.tolist() == [3, 3]
    assert data.test is not None
    assert names(data.test) == ["test/a/001.png", "test/b/000.png"]
    (note,) = data.notes
    assert "left out: 2" in note
    assert "train/a/001.png" in note
    assert "test/a/000.png" in note


def test_what_is_required_is_read(tmp_path: Path) -> None:
    put(tmp_path, *numbered("a", 40), *numbered("b", 40))
    source = load(tmp_path, test_fraction=0.5).test
    assert source is not None
    steps: list[tuple[int, int]] = []
    require_readable(source, lambda done, n: steps.append((done, n)))
    assert steps[-1] == (40, 40)
    torn = tmp_path / source.name_of(33)
    torn.write_bytes(torn.read_bytes()[:40])
    with pytest.raises(UserError, match=f"{torn.name} cannot be read as an image .*--on-bad-image skip"):
        require_readable(source)
    require_readable(ArraySource(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])))


def test_skipping_happens_before_thinning(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 6), *numbered("train/b", 6), "test/a/0.png", "test/b/0.png")
    (tmp_path / "train/a/000.png").write_bytes(b"broken")
    data = load(tmp_path, on_bad_image="skip", imbalance=1)
    assert data.counts.counts.tolist() == [5, 5]


def test_skipping_never_empties_a_class_silently(tmp_path: Path) -> None:
    put(tmp_path, *numbered("train/a", 2), "train/b/0.png", "test/a/0.png")
    (tmp_path / "train/b/0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="no image of the class 'b'"):
        load(tmp_path, on_bad_image="skip")
    put(tmp_path, "train/b/0.png")
    (tmp_path / "test/a/0.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="test split"):
        load(tmp_path, on_bad_image="skip")


def test_fingerprint_sees_names_sizes_labels_and_order_only(tmp_path: Path) -> None:
    for root in (tmp_path / "one", tmp_path / "two"):
        put(root, *numbered("train/a", 8), *numbered("train/b", 8), "test/a/0.png", "test/b/0.png")
    (tmp_path / "two").rename(tmp_path / "elsewhere")
    first, second = (load(tmp_path / name).fingerprint()["splits"] for name in ("one", "elsewhere"))
    assert first == second
    assert isinstance(first, dict)
    assert {name: split["images"] for name, split in first.items()} == {"train": 16, "test": 2}
    assert first["train"]["sha256"] != first["test"]["sha256"]

    def digest(data: ImageDataset) -> object:
        return data.fingerprint()["splits"]["train"]["sha256"]  # type: ignore[index]

    whole = load(tmp_path / "one")
    subsets = [digest(load(tmp_path / "one", imbalance=2, seed=seed)) for seed in (0, 0, 1)]
    assert subsets[0] == subsets[1]
    assert len({digest(whole), subsets[0], subsets[2]}) == 3
    before = digest(whole)
    path = tmp_path / "one/train/a/000.png"
    path.write_bytes(path.read_bytes() + b"\0")
    assert digest(whole) != before


def test_file_names_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otmix.reports.figures.png_bytes", lambda figure: b"")
    root = tmp_path / "images"
    put(root, *numbered("train/a", 3), *numbered("train/b", 3), "test/a/0.png", "test/b/0.png")
    torn = root / "train/a" / os.fsdecode(b"\xff.png")
    try:
        (root / "train/a/001.png").rename(root / "train/a" / os.fsdecode(b"\xe9.png"))
        torn.write_bytes(b"torn")
    except OSError:
        pytest.skip("this file system refuses such names")
    config = RunConfig(data="folder", root=str(root), on_bad_image="skip", method="erm", backbone="resnet8")
    run_dir = train(replace(config, epochs=1, batch_size=4, accelerator="cpu", out=str(tmp_path / "run")))
    record = json.loads((run_dir / "data.json").read_text("utf-8"))
    assert record["counts"] == [3, 3]
    assert list(record["left_out"]) == [f"train/a/{torn.name}"]
    train(replace(config, epochs=1, batch_size=4, accelerator="cpu", out=str(run_dir), resume=True))
    for split in ("train", "test"):
        (root / split / "b").rename(root / split / os.fsdecode(b"\xe9"))
    loaded = load(root, on_bad_image="skip")
    assert loaded.class_names == ("a", "\\xe9")


def test_a_dataset_of_ones_own_is_checked() -> None:
    def dataset(labels: list[int], class_names: tuple[str, ...] = ("a", "b")) -> ImageDataset:
        source = ArraySource(torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8), torch.tensor(labels))
        return ImageDataset("own", class_names, source, None, None, 8, 3, (0.5,) * 3, (0.5,) * 3)

    assert dataset([0, 1, 1]).counts.counts.tolist() == [1, 2]
    with pytest.raises(UserError, match=r"label 2 of the train split of own is out of range.* 0 … 1"):
        dataset([0, 1, 2])
    with pytest.raises(UserError, match="label -1"):
        dataset([0, -1, 1])
    with pytest.raises(UserError, match="no image of the class 'b'"):
        dataset([0, 0])
    with pytest.raises(UserError, match="only the class 'a'"):
        dataset([0, 0], ("a",))
    with pytest.raises(UserError, match=r"uint8 \[N,C,H,W\]"):
        ArraySource(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="2 images need labels"):
        FileSource(Path(), ("a.png", "b.png"), torch.tensor([0]))
