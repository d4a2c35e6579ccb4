"""Each command once on a real run of a few steps, and the commands that only show."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from otmix.cli import main
from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.protocols import Protocol
from otmix.training.setup import load_data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of OTmix on the digits."""
    run_dir = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "--epochs", "2", "--accelerator", "cpu", "--out", str(run_dir)]) == 0
    return run_dir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for shade in range(3):
        Image.new("L", (12, 9), 80 * shade).save(folder / f"{shade}.png")
    return folder


def test_train_prints_what_the_run_is_worth(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--out", str(run)]) == 0  # it is finished: its result is shown again
    printed = capsys.readouterr().out
    result = json.loads((run / "result.json").read_text("utf-8"))["evaluation"]
    assert f"{100 * (1 - result['top1_error']):.1f}" in printed
    for measure in ("top-1 accuracy", "balanced accuracy", "many", "medium", "few", "calibration error"):
        assert measure in printed
    assert f"{run}\n" in printed
    assert f"{run / 'report.html'}\n" in printed
    assert main(["train", "--epochs", "3", "--resume", "--out", str(run)]) == 2
    assert "epochs: 3 here, 2 there" in capsys.readouterr().err


def test_stopped_run_goes_on_with_the_command_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from otmix import display

    class Impatient(display.LineReporter):
        """Somebody who presses Ctrl-C after the first epoch."""

        def epoch(self, row: dict[str, Any]) -> None:
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(display, "make_reporter", Impatient)
        assert main(["train", "--epochs", "2", "--method", "erm", "--seed", "3", "--out", str(folder)]) == 130
    said = capsys.readouterr().err
    command = shlex.split(said.splitlines()[-1])
    assert command == ["otmix", "train", "--resume", "--out", str(folder)]
    assert not (folder / "result.json").exists()
    assert main(command[1:]) == 0
    result = json.loads((folder / "result.json").read_text("utf-8"))
    assert (result["method"], result["seed"], result["epochs"]) == ("ce", 3, 2)


def test_evaluate_finds_what_the_run_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = json.loads((run / "result.json").read_text("utf-8"))["evaluation"]
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "test"
    assert {key: found[key] for key in recorded} == recorded
    assert main(["evaluate", str(run)]) == 0
    assert f"{100 * recorded['balanced_accuracy']:.1f}" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--split", "validation"]) == 2


def test_predict_to_the_terminal_and_to_a_file(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run), str(pictures), "--top", "2"]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2"]
    out = tmp_path / "new" / "found.csv"
    assert main(["predict", str(run), str(pictures), "--top", "2", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"3 images classified in {out}\n"
    assert out.read_text("utf-8") == printed
    assert main(["predict", str(run), str(pictures), "--format", "jsonl", "--out", str(out)]) == 0
    assert [json.loads(line)["class"] for line in out.read_text("utf-8").splitlines()] == [row["class"] for row in rows]


def test_out_never_replaces_a_picture(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = pictures / "0.png"
    before = picture.read_bytes()
    assert main(["predict", str(run), str(picture), "--out", str(picture)]) == 2
    assert "name a .csv or .jsonl file" in capsys.readouterr().err
    root = tmp_path / "photos"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.png").write_bytes(before)
    assert main(["preview", "--data", "folder", "--root", str(root), "--out", str(root / "a" / "0.png")]) == 2
    assert "is one of the pictures in" in capsys.readouterr().err
    assert main(["preview", "--out", str(tmp_path / "p.jpg")]) == 2
    assert "name a file that ends in .png" in capsys.readouterr().err
    assert main(["predict", str(run), str(picture), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"{tmp_path} is a folder; name a file with --out\n")
    assert (picture.read_bytes(), (root / "a" / "0.png").read_bytes()) == (before, before)


@pytest.mark.parametrize("name", ["result.json", "best-3.safetensors", "figures/mixed.png", "../run/config.yaml"])
def test_out_never_replaces_a_file_of_a_run(
    name: str, run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = run / name, sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    command = ["preview", "--run", str(run)] if out.suffix == ".png" else ["predict", str(run), str(pictures)]
    assert main([*command, "--out", str(out)]) == 2
    assert f"--out {out} is a file of the run in {run}" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_predictions_may_lie_in_a_run(run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), str(pictures), "--out", str(run / "predictions-new.csv")]) == 0
    assert len((run / "predictions-new.csv").read_text("utf-8").splitlines()) == 1 + 3
    (run / "predictions-new.csv").unlink()


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself signals")
def test_predict_that_is_told_to_end_leaves_nothing(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(predictions: object, stream: io.TextIOBase, top: int) -> int:
        stream.write("half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        return 1

    monkeypatch.setattr("otmix.inference.write_csv", write)
    assert main(["predict", str(run), str(pictures), "--out", str(tmp_path / "found.csv")]) == 130
    assert capsys.readouterr().err == "\notmix: stopped\n"
    assert list(tmp_path.iterdir()) == []


def test_the_ending_of_out_is_its_format(run: Path, pictures: Path, tmp_path: Path) -> None:
    assert main(["predict", str(run), str(pictures), "--out", str(tmp_path / "found.jsonl")]) == 0
    assert len([json.loads(line) for line in (tmp_path / "found.jsonl").read_text("utf-8").splitlines()]) == 3


def test_resuming_nothing_trains_no_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", "--out", str(tmp_path / "typo")]) == 2
    assert "there is no run in" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "otmix", "methods", "otmix"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the disk is full" in done.stderr


def test_predict_writes_all_or_nothing(run: Path, pictures: Path, tmp_path: Path) -> None:
    bad, out = tmp_path / "bad.png", tmp_path / "found.csv"
    bad.write_bytes(b"no picture")
    argv = ["predict", str(run), str(pictures), str(bad), "--batch-size", "1", "--out", str(out)]
    assert main(argv) == 2
    assert sorted(tmp_path.iterdir()) == [bad]
    assert main([*argv, "--on-bad-image", "skip"]) == 0
    assert len(out.read_text("utf-8").splitlines()) == 1 + 3


def test_out_below_a_file_is_refused(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image.png").write_text("mine")
    for out in (tmp_path / "image.png" / "x", tmp_path / "image.png" / "x" / "y"):
        for argv in (["predict", str(run), str(pictures)], ["preview", "--run", str(run)]):
            assert main([*argv, "--out", str(out)]) == 2
            said = f"otmix: cannot write {out}: Not a directory; choose another folder with --out\n"
            assert capsys.readouterr().err.endswith(said)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_preview_of_a_run_and_without_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for argv, source in ((["--run", str(run)], "the run run"), (["--batch-size", "5"], "resnet8, untrained")):
        out = tmp_path / "picture" / "mixes.png"
        assert main(["preview", *argv, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert source in printed
        assert str(out) in printed
        with Image.open(out) as picture:
            assert picture.size[0] > 300
        out.unlink()
    assert main(["preview", "--run", str(run), "--image-size", "16"]) == 2
    assert "was trained on other classes or another image size" in capsys.readouterr().err


def test_preview_pairs_by_transport(run: Path) -> None:
    """The same foregrounds and boxes in both halves, and other backgrounds in one of them."""
    from otmix.cli import preview

    given: dict[str, Any] = {}
    figures = pytest.importorskip("otmix.reports.figures")
    original = figures.preview_grid
    figures.preview_grid = lambda **values: given.update(values)
    try:
        config = RunConfig.from_dict(yaml.safe_load((run / "config.yaml").read_text("utf-8")))
        preview.draw(preview.from_run(config, run, load_data(config)))
    finally:
        figures.preview_grid = original
    for name in ("random", "transport"):
        for i, (top, left, height, width) in enumerate(given["boxes"].tolist()):
            here = (i, slice(None), slice(top, top + height), slice(left, left + width))
            assert given[f"{name}_mixed"][here].equal(given["foreground"][here])
        assert len(given[f"{name}_labels"]) == len(given["foreground_labels"]) == preview.COLUMNS
    assert not given["random_background"].equal(given["transport_background"])
    assert not given["random_mixed"].equal(given["transport_mixed"])


def test_preview_without_weights_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from otmix.cli import preview
    from otmix.training import setup

    prepare, asked = setup.prepare, []

    def offline(config: RunConfig, dataset: Any) -> Any:
        asked.append(config.pretrained)
        if config.pretrained is not False:
            raise UserError("no network")
        return prepare(config, dataset)

    monkeypatch.setattr(setup, "prepare", offline)
    config = RunConfig(backbone="resnet8")
    found = preview.untrained_or_pretrained(config, setup.load_data(config))
    assert asked == [None, False]
    assert "untrained because its pretrained weights cannot be had" in found.features
    with pytest.raises(UserError, match="no network"):
        preview.untrained_or_pretrained(RunConfig(backbone="resnet8", pretrained=True), setup.load_data(config))


def test_compare_trains_then_reuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", "erm", "cmo", "--seeds", "1", "--epochs", "1", "--runs", str(tmp_path), "--accelerator", "cpu"]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert main(argv) == 0
    second = capsys.readouterr().out
    for printed in (first, second):
        assert "ERM + CMO" in printed
        assert "one seed" in printed
    pages = {line.removeprefix("page    ") for said in (first, second) for line in said.splitlines() if ".html" in line}
    assert len(pages) == 1
    page = Path(pages.pop())
    assert page.parent == tmp_path
    assert page.stat().st_size > 1000
    assert f"table   {page.with_suffix('.csv')}\n" in first
    assert main([*argv[:2], *argv[3:]]) == 0  # another comparison has a page of its own
    assert len(list(tmp_path.glob("*.html"))) == 2
    capsys.readouterr()
    assert "epoch 1/1" in first
    assert "epoch 1/1" not in second
    assert "all finished already, reused" in second


def test_own_loss_by_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from otmix.losses import LOSSES

    file = tmp_path / "my_own_loss_of_test_cli.py"
    text = (
        "from otmix.losses import CrossEntropy, register_loss\n@register_loss('mine')\nclass Mine(CrossEntropy): ...\n"
    )
    file.write_text(text, "utf-8")
    try:
        assert main(["methods", "mine+otmix", "--import", str(file)]) == 0
        assert "mine + OTmix" in capsys.readouterr().out
        assert main(["methods", "--import", str(file)]) == 0  # loaded once only: a second time would be refused
        assert "mine" in capsys.readouterr().out
    finally:
        LOSSES.pop("mine", None)
        sys.modules.pop(file.stem, None)


def test_a_run_is_looked_for_where_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTMIX_RUNS", str(tmp_path / "runs"))
    argv = ["train", "--resume", "--method", "focal", "--set.loss.gamma", "2", "--epochs", "1", "--max-per-class", "20"]
    assert main(argv) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert f"{run_dir} holds no run to go on with" in capsys.readouterr().err
    assert main(argv) == 0
    assert "holds no run" not in capsys.readouterr().err


def test_preview_of_a_mixer_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of CONTRIBUTING.md, one of which draws one number for all images."""
    from otmix.losses import LOSSES
    from otmix.mixing import PIXEL_RULES

    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8")
    argv = ["preview", "--method", "prior-shift+beside", "--out", str(tmp_path / "mixes.png")]
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.S)[:2]):
        (tmp_path / f"own_{i}_of_test_cli.py").write_text(code, "utf-8")
        argv += ["--import", str(tmp_path / f"own_{i}_of_test_cli.py")]
    try:
        assert main(argv) == 0
    finally:
        LOSSES.pop("prior-shift", None)
        PIXEL_RULES.pop("beside", None)
    assert (tmp_path / "mixes.png").stat().st_size > 1000


# --- listings


def test_data_counts(capsys: pytest.CaptureFixture[str]) -> None:
    from otmix.data import load_dataset

    assert main(["data", "--imbalance", "10"]) == 0
    printed = capsys.readouterr().out
    dataset = load_dataset("digits", imbalance=10)
    rows = [line.split() for line in printed.splitlines() if "█" in line or "▏" in line]
    assert [int(row[1]) for row in rows] == sorted(dataset.counts.counts.tolist(), reverse=True)
    bars = [len(row[-1]) for row in rows]
    assert bars == sorted(bars, reverse=True)
    assert bars[0] == 40
    assert "imbalance: " in printed
    assert all(note in printed for note in dataset.notes)


def test_data_shows_on_stderr_how_far_reading_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from otmix import display

    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for shade in range(5):
            Image.new("L", (12, 12), 40 * shade).save(tmp_path / "photos" / name / f"{shade}.png")
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    assert main(["data", "--data", "folder", "--root", str(tmp_path / "photos"), "--on-bad-image", "skip"]) == 0
    captured = capsys.readouterr()
    assert "reading images: 10 of 10\n" in captured.err
    assert "reading" not in captured.out


def test_data_of_many_classes_is_cut_in_the_middle() -> None:
    import torch
    from rich.console import Console

    from otmix.cli.listings import show_dataset
    from otmix.data import ArraySource, ImageDataset

    labels = torch.arange(500).repeat_interleave(torch.arange(500, 0, -1))
    source = ArraySource(torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), labels)
    names = tuple(f"[red]{k}" for k in range(500))
    dataset = ImageDataset("many", names, source, None, None, 4, 1, (0.5,), (0.5,))
    stream = io.StringIO()
    show_dataset(dataset, Console(file=stream, width=120))
    printed = stream.getvalue()
    assert "[red]0 " in printed
    assert "[red]499 " in printed
    assert "[red]250 " not in printed
    assert "300 more" in printed
    assert "imbalance: 500 (500 in the largest class, 1 in the smallest)" in printed


def test_methods_lists_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    from otmix.losses import LOSSES
    from otmix.methods import ALIASES, PAIRING_PARTS, PIXEL_PARTS, REBALANCING_PARTS

    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {loss} " in printed for loss in LOSSES)
    assert all(f"  +{mixer} " in printed for mixer in (*PIXEL_PARTS, *PAIRING_PARTS))
    assert all(f"  -{name} " in printed for name in REBALANCING_PARTS)
    assert "  ride- " in printed
    assert "  bbn- " in printed
    assert all(f"{alias} = {name}" in printed for alias, name in ALIASES.items())
    assert "ride-drw = ride-ce-drw" in printed


def test_methods_says_what_each_part_is() -> None:
    """Its title and paper, what it changes and what it combines with, in one row."""
    from rich.console import Console

    from otmix.cli.listings import list_methods
    from otmix.methods import ARCHITECTURE_PARTS, PAIRING_PARTS, REBALANCING_PARTS, Part, loss_part, mixer_part
    from otmix.methods.parts import LOSS_PARTS, PIXEL_PARTS

    stream = io.StringIO()
    list_methods(Console(file=stream, width=2000))  # so wide that no cell is broken
    rows = {line.split()[0]: " ".join(line.split()) for line in stream.getvalue().splitlines() if line.strip()}
    pixels = ", ".join(f"-{name}" for name in PIXEL_PARTS if name != "cutmix")
    parts: dict[str, tuple[Part, str]] = {name: (loss_part(name), "everything") for name in LOSS_PARTS}
    parts |= {f"-{name}": (part, "every loss, mixer and architecture") for name, part in REBALANCING_PARTS.items()}
    parts |= {f"+{name}": (mixer_part(name), "all but bbn-") for name in PIXEL_PARTS}
    parts |= {f"+{name}": (part, f"all but bbn-; with {pixels}") for name, part in PAIRING_PARTS.items()}
    parts["ride-"] = ARCHITECTURE_PARTS["ride"], "every loss, rebalancing and mixer"
    parts["bbn-"] = ARCHITECTURE_PARTS["bbn"], "every loss, rebalancing; no mixer"
    assert len(parts) == len(LOSS_PARTS) + len(REBALANCING_PARTS) + len(PIXEL_PARTS) + len(PAIRING_PARTS) + 2
    for name, (part, partners) in parts.items():
        assert part.title and part.paper and part.changes, name
        assert rows[name] == f"{name} {part.title} {part.paper} {part.changes} {partners}"


@pytest.mark.parametrize("name", ["erm", "cmo", "otmix", "ce-drw+otmix"])
def test_methods_explains_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from otmix.methods import parse_method
    from otmix.protocols import PROTOCOLS

    assert main(["methods", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    method = parse_method(name)
    for setting, _, meaning, source in method.settings(Protocol()):
        row = next(line for line in lines if line.split()[:1] == [setting])
        values = [getattr(method.adjusted(protocol), setting) for protocol in PROTOCOLS.values()]
        cells = row.split()[1:]
        if isinstance(values[0], float):
            assert [float(cell) for cell in cells] == pytest.approx(values, rel=1e-3)
        else:
            assert cells == [("no", "yes")[value] if isinstance(value, bool) else str(value) for value in values]
        assert meaning in text
        assert source in text
    for key, part in method.part_settings.items():
        assert any(line.split()[:1] == [key] for line in lines)
        assert f"{part.meaning} {part.source}" in text
    unread = {f.name for f in fields(Protocol)} - set(method.setting_names)
    assert not any(line.split()[:1] == [setting] for line in lines for setting in unread)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lade", ("each image's own label", "one call pools both labels")),
        ("ib", ("10000 for the scale", "p^w")),
        ("ride", ("diversity of 0", "RandomRotation(15)", "100 epochs where its settings file has 200", "the width")),
        ("bbn", ("E is 100 in its code's run of 90 epochs", "Nesterov", ".999999", "x .01 at epochs 120 and 160")),
        ("saliencymix", ("normalised float images", "the batch's first pasted image")),
        ("cmo", ("classes are equally frequent",)),
        ("otmix-saliencymix", ("OTmix's ImageNet script", "normalised float images")),
        ("remix", ("collapse to their average",)),
        ("bayias+unimix", ("batches of 64", "alpha of .8")),
        ("focal-drs", ("which makes it p^w", "by 10", "the sampler never takes effect")),
        ("drw+otmix", ("at epoch 160 of 240", "OTmix's ImageNet script")),
        ("ce", ()),
    ],
)
def test_methods_says_where_papers_and_codes_disagree(
    name: str, said: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    from otmix.methods import parse_method

    assert main(["methods", name]) == 0
    _, _, after = " ".join(capsys.readouterr().out.split()).partition(" where papers and codes disagree ")
    sentences = [sentence for part in parse_method(name).parts for sentence in part.disagrees]
    assert all(sentence in after for sentence in sentences)
    assert all(any(words in sentence for sentence in sentences) for words in said)
    assert bool(after) == bool(said)


def test_methods_of_one_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "otmix", "--protocol", "official"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "confusion_from        test" in lines
    assert any("TEST set" in line for line in lines)
