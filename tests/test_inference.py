"""Predicting and evaluating with a finished run: the same pixels and the same numbers as the run's own evaluation."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from otmix import inference
from otmix.cli import main
from otmix.config import RunConfig
from otmix.data import FileSource, ImageDataset, ImageStore, load_dataset, open_store
from otmix.errors import UserError
from otmix.inference import (
    Prediction,
    Skipped,
    evaluate_run,
    find_images,
    predict_paths,
    read_images,
    write_csv,
    write_jsonl,
)
from otmix.protocols import Overrides
from otmix.training import open_run, train
from otmix.training.confusion_source import Looked, batches_of
from otmix.training.setup import load_data
from otmix.types import Batch, Items

CLASSES = ("ant", "bee", "cat")


def write_images(folder: Path, per_class: int, seed: int, sides: tuple[int, ...] = (12, 16, 21)) -> None:
    """Noise whose brightness tells the class, in several sizes and kinds of file."""
    random = np.random.default_rng(seed)
    for k, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            side = sides[i % len(sides)]
            pixels = (random.random((side, side + i % 3, 3)) * 90 + 70 * k).astype(np.uint8)
            image = Image.fromarray(pixels) if i % 4 else Image.fromarray(pixels[:, :, 0])
            image.save(folder / name / f"{i:02d}.{('png', 'jpg')[i % 2]}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs on a folder of tiny images, which is beside it."""
    folder = tmp_path_factory.mktemp("inference")
    write_images(folder / "images" / "train", 9, seed=0)
    write_images(folder / "images" / "test", 5, seed=1)
    (folder / "images" / "val").mkdir()
    write_images(folder / "images" / "val", 2, seed=2)
    config = RunConfig(
        data="folder",
        root=str(folder / "images"),
        backbone="resnet8",
        image_size=8,
        epochs=2,
        batch_size=9,
        method="erm",
    )
    return train(replace(config, accelerator="cpu", out=str(folder / "run")))


@pytest.fixture
def images(run: Path) -> Path:
    return run.parent / "images"


# --- predict and evaluate agree --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sides"), [(8, (8, 12, 30)), (40, (30, 40, 90)), (96, (90, 480, 120))])
@pytest.mark.parametrize("resident", [True, False])
def test_pixels_are_those_of_the_evaluation(tmp_path: Path, size: int, sides: tuple[int, ...], resident: bool) -> None:
    write_images(tmp_path / "train", 2, 0)
    write_images(tmp_path / "test", 3, 1, sides)
    dataset = load_dataset("folder", root=tmp_path, image_size=size)
    assert isinstance(dataset.test, FileSource)
    store = open_store(dataset.test, dataset, "cpu", train=False, workers=0, resident_bytes=1 << 30 if resident else 0)
    expected = store.fetch(Items(dataset.test.labels, torch.arange(9)), None).images
    files = [tmp_path / path for path in dataset.test.paths]
    pixels, errors = read_images(files, size, 3)
    assert not errors
    assert torch.equal(pixels.to(torch.float32).div_(255), expected)


def test_probabilities_are_those_of_the_evaluation(run: Path, images: Path) -> None:
    found = list(predict_paths(run, [images / "test"], top=3, batch_size=512, device="cpu"))
    names = open_run(run).class_names
    ours = torch.tensor([[dict(one.top)[name] for name in names] for one in found])
    with np.load(run / "predictions.npz") as saved:
        theirs = torch.from_numpy(saved["probabilities"])
        assert saved["labels"].tolist() == [names.index(Path(one.file).parent.name) for one in found]
    assert torch.equal(ours.half(), theirs)


def test_predictions_have_the_probabilities_of_the_loss(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otmix.training.outcome.write_page", lambda run_dir: None)
    out, changed = tmp_path / "run", Overrides(parts={"loss.post_hoc": True})
    config = RunConfig(data="folder", root=str(images), imbalance=9.0, backbone="resnet8", image_size=8, epochs=1)
    train(replace(config, method="logit-adjustment", set=changed, batch_size=9, accelerator="cpu", out=str(out)))
    names = open_run(out).class_names
    found = [dict(one.top) for one in predict_paths(out, [images / "test"], batch_size=512, device="cpu")]
    with np.load(out / "predictions.npz") as saved:
        expected = torch.from_numpy(saved["probabilities"])
    assert torch.equal(torch.tensor([[one[name] for name in names] for one in found]).half(), expected)


def test_the_evaluation_can_be_repeated_exactly(run: Path) -> None:
    expected = json.loads((run / "result.json").read_text())["evaluation"]
    assert evaluate_run(run, device="cpu") == {"split": "test", **expected}


def test_as_many_images_are_looked_at_together_as_in_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes each had half a batch of larger images; here these are small ones that are called large."""
    copy = shutil.copytree(run, tmp_path / "run")
    text = (copy / "config.yaml").read_text()
    assert "devices: 1\n" in text
    (copy / "config.yaml").write_text(text.replace("devices: 1\n", "devices: 2\n"))
    monkeypatch.setattr(ImageDataset, "small", False)
    sizes: list[int] = []

    def spied(store: ImageStore, items: Items, size: int, progress: Looked | None) -> Iterator[Batch]:
        sizes.append(size)
        return batches_of(store, items, size, progress)

    monkeypatch.setattr("otmix.training.evaluate.batches_of", spied)
    evaluate_run(copy, device="cpu")
    assert sizes == [9 // 2]


def test_the_validation_split_can_be_evaluated(run: Path) -> None:
    found = evaluate_run(run, "validation", device="cpu")
    assert (found["split"], found["n"]) == ("validation", 6)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["top1_error"] == last["validation_error"]


def test_other_data_are_refused_and_moved_data_are_found(run: Path, images: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    assert evaluate_run(run, root=str(moved), device="cpu") == evaluate_run(run, device="cpu")
    next((moved / "test" / "bee").iterdir()).unlink()
    with pytest.raises(UserError, match="no longer those of the run") as caught:
        evaluate_run(run, root=str(moved), device="cpu")
    assert "\n" not in str(caught.value)


def test_all_commands_see_images_as_their_timm_backbone_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """test_vit is 160 pixels large, with a mean of a half."""
    write_images(tmp_path / "images", 5, 0, sides=(80, 100, 120))
    argv = ["--data", "folder", "--root", str(tmp_path / "images"), "--backbone", "timm/test_vit"]
    assert main(["data", *argv]) == 0
    assert "160 x 160 pixels" in capsys.readouterr().out
    out, more = tmp_path / "run", ["--no-pretrained", "--method", "erm", "--epochs", "1", "--accelerator", "cpu"]
    assert main(["train", *argv, *more, "--out", str(out)]) == 0
    run = open_run(out)
    assert (run.config.image_size, run.image_size, run.data["mean"], run.data["std"]) == (
        160,
        160,
        [0.5] * 3,
        [0.5] * 3,
    )
    assert run.model.normalise.mean.flatten().tolist() == [0.5] * 3
    (out / "result.json").unlink()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert evaluate_run(out, device="cpu") == {"split": "test", **open_run(out).result["evaluation"]}
    with np.load(out / "predictions.npz") as saved:
        expected = torch.from_numpy(saved["probabilities"]).float().max(1).values
    dataset = load_data(run.config)
    assert isinstance(dataset.test, FileSource)
    files = [dataset.test.root / path for path in dataset.test.paths]
    found = torch.tensor([one.probability for one in predict_paths(out, files, batch_size=512, device="cpu")])
    assert torch.allclose(found, expected, atol=1e-3)
    assert main(["preview", "--run", str(out), "--out", str(tmp_path / "mixes.png")]) == 0


def test_a_split_that_is_not_there_is_named(run: Path) -> None:
    with pytest.raises(UserError, match="no split 'train'"):
        evaluate_run(run, "train")  # type: ignore[arg-type]  # what a caller without a type checker may write


def test_a_run_that_is_not_finished_is_refused(run: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        predict_paths(tmp_path / "missing", [images])
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "config.yaml", unfinished)
    with pytest.raises(UserError, match="not finished"):
        predict_paths(unfinished, [images])
    with pytest.raises(UserError, match="not finished"):
        evaluate_run(unfinished)


# --- predictions -----------------------------------------------------------------------------------------------------


def test_the_ranking_is_sorted_and_complete(run: Path, images: Path) -> None:
    found = list(predict_paths(run, [images / "test"], top=5, device="cpu"))
    assert len(found) == 15
    for one in found:
        probabilities = [p for _, p in one.top]
        assert len(one.top) == 3, "there are no more classes"
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert (one.class_name, one.probability) == one.top[0]
    assert {len(one.top) for one in predict_paths(run, [images / "test"], top=2, device="cpu")} == {2}


def test_of_equally_probable_classes_the_first_comes_first(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the run's evaluation; low precision makes such ties."""
    tied = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [0.4, 0.2, 0.4], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 1.0]])
    monkeypatch.setattr(inference, "predict_probabilities", lambda *_, **__: (tied.repeat(3, 1), None, None))
    found = list(predict_paths(run, [images / "test"], top=3, batch_size=15, device="cpu"))
    names = open_run(run).class_names
    for one, row in zip(found, tied.repeat(3, 1).tolist(), strict=True):
        order = sorted(range(3), key=lambda k: -row[k])
        assert [name for name, _ in one.top] == [names[k] for k in order]
        assert one.class_name == names[row.index(max(row))]


def test_the_batch_size_changes_neither_order_nor_classes(run: Path, images: Path) -> None:
    whole = list(predict_paths(run, [images], batch_size=512, device="cpu"))
    parts = list(predict_paths(run, [images], batch_size=4, device="cpu"))
    assert [one.file for one in whole] == [one.file for one in parts]
    assert [one.probability for one in whole] == pytest.approx([one.probability for one in parts], abs=1e-5)


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "new"
    shutil.copytree(images / "test" / "ant", folder)
    whole = (folder / "03.jpg").read_bytes()
    (folder / "03.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "99.png").write_text("not an image")
    return folder


def test_a_broken_image_stops_and_is_named(run: Path, broken: Path) -> None:
    predictions = predict_paths(run, [broken], batch_size=2, device="cpu")
    assert [Path(next(predictions).file).name for _ in range(2)] == ["00.png", "01.jpg"]
    with pytest.raises(UserError, match=r"03\.jpg cannot be read as an image"):
        list(predictions)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_broken_images_are_skipped_and_listed_at_the_end(
    run: Path, broken: Path, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    found = predict_paths(run, [broken], on_bad_image="skip", batch_size=batch_size, device="cpu")
    with caplog.at_level(logging.WARNING, "otmix"):
        assert [Path(one.file).name for one in found] == ["00.png", "01.jpg", "02.png", "04.png"]
    (record,) = caplog.records
    assert record.getMessage().startswith("2 images could not be read and were skipped:")
    assert "03.jpg: " in record.getMessage()
    assert "99.png: " in record.getMessage()


def test_a_callback_is_told_instead(run: Path, broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Skipped] = []
    list(predict_paths(run, [broken], on_bad_image="skip", device="cpu", on_skipped=told.extend))
    assert [Path(one.file).name for one in told] == ["03.jpg", "99.png"]
    assert all(one.reason for one in told)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top": 0}, "--top"), ({"batch_size": 0}, "at least 1"), ({"on_bad_image": "x"}, "error or skip")],
)
def test_bad_options_are_refused(run: Path, images: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        predict_paths(run, [images], **options)  # type: ignore[arg-type]  # wrong on purpose


# --- which files -----------------------------------------------------------------------------------------------------


def test_folders_are_walked_sorted_and_only_images_taken(tmp_path: Path) -> None:
    for name in (
        "b/2.png",
        "b/10.JPG",
        "a/x/1.webp",
        "a/notes.txt",
        ".hidden/1.png",
        "a/.2.png",
        "c.png",
        "__MACOSX/1.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ["a/x/1.webp", "b/10.JPG", "b/2.png", "c.png"]


def test_named_files_keep_their_order_whatever_their_ending(tmp_path: Path) -> None:
    for name in ("z.dat", "a.png"):
        (tmp_path / name).touch()
    assert find_images([tmp_path / "z.dat", tmp_path / "a.png"]) == [tmp_path / "z.dat", tmp_path / "a.png"]


def test_files_that_are_no_images_are_counted(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, 1, 0)
    with caplog.at_level(logging.WARNING, "otmix"):
        list(predict_paths(run, [tmp_path], device="cpu"))
        assert not caplog.messages
        for name in ("a.heic", "b.HEIC", "notes.txt", ".hidden"):
            (tmp_path / name).touch()
        list(predict_paths(run, [tmp_path], device="cpu"))
    assert caplog.messages == ["Files that are not read as images are passed over: 2 .heic, 1 .txt."]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.png").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "folder" / "circle").symlink_to(tmp_path / "folder")
    assert find_images([tmp_path / "folder"]) == [tmp_path / "folder" / "link" / "1.png"]


def test_nothing_to_predict_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no image"):
        find_images([tmp_path])
    with pytest.raises(UserError, match=r"no file or folder .*missing\.png"):
        find_images([tmp_path / "missing.png"])


# --- writing ---------------------------------------------------------------------------------------------------------

WRITTEN = [
    Prediction('a, "b".png', "bee", 0.75, (("bee", 0.75), ("ant", 0.2), ("cat", 0.05))),
    Prediction("ü\udcff.png", "ant, black", 1 / 3, (("ant, black", 1 / 3), ("bee", 0.3), ("cat", 0.1))),
]


def test_csv_has_one_line_per_image() -> None:
    stream = io.StringIO()
    assert write_csv(iter(WRITTEN), stream, top=2) == 2
    rows = list(csv.reader(io.StringIO(stream.getvalue())))
    assert rows[0] == ["file", "class", "probability", "class_2", "probability_2"]
    assert rows[1] == ['a, "b".png', "bee", "0.750000", "ant", "0.200000"]
    assert rows[2] == ["ü\\xff.png", "ant, black", "0.333333", "bee", "0.300000"]


def test_csv_has_no_more_columns_than_classes() -> None:
    stream = io.StringIO()
    write_csv(WRITTEN, stream, top=5)
    header, *rows = csv.reader(io.StringIO(stream.getvalue()))
    assert header[3:] == ["class_2", "probability_2", "class_3", "probability_3"]
    assert [len(row) for row in rows] == [7, 7]
    assert rows[0][-2:] == ["cat", "0.050000"]


def test_csv_without_predictions_is_a_header() -> None:
    stream = io.StringIO()
    assert write_csv([], stream, top=2) == 0
    assert stream.getvalue() == "file,class,probability,class_2,probability_2\n"


def test_csv_of_skipped_images_has_no_more_columns_than_classes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    argv = ["predict", str(run), str(tmp_path), "--on-bad-image", "skip", "--accelerator", "cpu"]
    for top, columns in ((20, 3), (2, 2)):
        assert main([*argv, "--top", str(top), "--out", str(tmp_path / "found.csv")]) == 0
        header = (tmp_path / "found.csv").read_text("utf-8").strip().split(",")
        assert header[-1] == f"probability_{columns}"
        assert len(header) == 1 + 2 * columns


def test_csv_is_written_as_predictions_come() -> None:
    stream = io.StringIO()

    def one_by_one() -> Iterator[Prediction]:
        yield WRITTEN[0]
        assert stream.getvalue().count("\n") == 2
        yield WRITTEN[1]

    assert write_csv(one_by_one(), stream, top=1) == 2


def test_jsonl_has_one_object_per_image() -> None:
    stream = io.StringIO()
    assert write_jsonl(WRITTEN, stream) == 2
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first == {
        "file": 'a, "b".png',
        "class": "bee",
        "probability": 0.75,
        "top": [
            {"class": "bee", "probability": 0.75},
            {"class": "ant", "probability": 0.2},
            {"class": "cat", "probability": 0.05},
        ],
    }
    assert second["probability"] == 0.333333
    assert stream.getvalue().encode("utf-8")
