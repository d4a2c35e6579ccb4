"""Figures, tables and pages: their numbers, their files, and that a page is safe to open and to pass on."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from otmix.errors import UserError
from otmix.protocols import PROTOCOL_TITLES
from otmix.reports import figures
from otmix.reports.classes import thirds
from otmix.reports.figures.style import shorten
from otmix.reports.page import write_comparison_page, write_page
from otmix.reports.pictures import mixing_pictures
from otmix.reports.record import read_run
from otmix.reports.statistics import mean_std, percent, points, seed_values
from otmix.reports.tables import ONE_SEED, SELECTED_ON_TEST, Table, compare_table, result_table
from otmix.reports.words import cautions, commands, lead, method_parts
from otmix.wording import command_line

EVIL = "<script>alert('x')</script> & $5$ | [red]ship[/red]"


def fake_run(
    path: Path,
    classes: int = 10,
    *,
    protocol: str = "clean",
    split: str = "test",
    method: str = "ce+otmix",
    title: str = "ERM + OTmix",
    names: list[str] | None = None,
    boost: float = 0.0,
    looks_at_test: bool = False,
    only_required: bool = False,
    **config: Any,
) -> Path:
    """The files that training writes, with 50 images a class measured; `boost` raises the accuracy of rare classes."""
    random = np.random.default_rng(classes)
    names = names or [f"class {k:03d}" for k in range(classes)]
    counts = [max(3, int(1000 * 0.01 ** (k / max(1, classes - 1)))) for k in range(classes)]
    right = [round(50 * (0.9 - (0.5 - boost) * k / max(1, classes - 1))) for k in range(classes)]
    confusion = np.zeros((classes, classes), dtype=int)
    for k in range(classes):
        confusion[k, k] = right[k]
        confusion[k, 0 if k else 1] += 50 - right[k]
    accuracy = [value / 50 for value in right]
    result = {
        "method": method,
        "title": title,
        "protocol": protocol,
        "seed": 3,
        "split": split,
        "evaluation": {
            "n": 50 * classes,
            "top1_error": 1 - sum(accuracy) / classes,
            "balanced_accuracy": sum(accuracy) / classes,
            "per_class_accuracy": accuracy,
            "group_error": {"many": 0.1234, "medium": 0.3456, "few": None},
            "calibration_error": 0.0567,
            "negative_log_likelihood": 1.5,
            "confusion": [[int(i), int(j), int(confusion[i, j])] for i, j in np.argwhere(confusion)],
        },
        "seconds_per_epoch": 2.5,
        "looks_at_test": looks_at_test,
    }
    path.mkdir(parents=True)
    settings = {"data": "folder", "root": "birds", "method": method, "protocol": protocol, "epochs": 160, "seed": 3}
    (path / "result.json").write_text(json.dumps(result), "utf-8")
    (path / "config.yaml").write_text(yaml.safe_dump({**settings, "lr": None, **config}), "utf-8")
    if only_required:
        return path
    splits = {"train": {"images": sum(counts), "sha256": "0"}, "test": {"images": 50 * classes, "sha256": "1"}}
    data = {"name": "birds", "class_names": names, "counts": counts, "splits": splits, "notes": ["2 were skipped"]}
    (path / "data.json").write_text(json.dumps(data), "utf-8")
    environment = {"torch": "2.15", "command": "otmix train --root 'my birds'", "devices": ["cpu"]}
    (path / "environment.json").write_text(json.dumps(environment), "utf-8")
    lines = [
        {
            "stage": "train",
            "epoch": epoch,
            "lr": 0.1 if epoch < 4 else 0.01,
            "loss": 2 / (1 + epoch),
            "train_error": None,
            "validation_error": 0.5 if epoch % 2 else None,
            "mixed_share": 0.5,
            "transport_share": 0.1 * epoch,
        }
        for epoch in range(6)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    pairs = random.integers(0, 50, (2, classes, classes))
    np.savez(path / "pairs.npz", index=pairs[0], transport=pairs[1])
    (path / "figures").mkdir()
    for name in ("mixed", "plan"):
        Image.new("RGB", (320, 200)).save(path / "figures" / f"{name}.png")
    return path


def size_of(png: bytes) -> tuple[int, int]:
    """Decodes all of it; raises where it is not a whole PNG."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def pictures_in(page: str) -> list[bytes]:
    return [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def text_of(page: str) -> str:
    """What a reader sees, as one line."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


# --- numbers -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_mean_and_sample_std(values: list[float]) -> None:
    mean, std = mean_std(values)
    assert mean == pytest.approx(statistics.mean(values), abs=1e-12)
    assert std == pytest.approx(statistics.stdev(values), abs=1e-7)


def test_one_seed_has_no_spread() -> None:
    assert mean_std([0.25]) == (0.25, None)


def test_absent_is_never_zero() -> None:
    assert percent(None) == percent(float("nan")) == points(None) == "–"
    assert seed_values(None) is seed_values([]) is seed_values([0.1, None]) is None
    assert seed_values(0.5) == [0.5]


def test_differences_carry_their_sign() -> None:
    assert [points(value) for value in (0.0213, -0.0213, 0.0, -1e-9)] == ["+2.1", "−2.1", "0.0", "0.0"]


def test_thirds() -> None:
    parts = thirds([5, 900, 7, 300, 20, 1000, 6])
    assert parts is not None
    assert (sorted(parts.rare), sorted(parts.common)) == ([0, 6], [1, 5])
    two = thirds([900, 12])
    assert two is not None
    assert (two.rare, two.common) == ([1], [0])
    assert thirds([4, 4, 4]) is thirds([4]) is thirds(None) is None


@pytest.mark.parametrize(
    ("counts", "rare", "common"),
    [
        ([500] * 8 + [5], [8], list(range(8))),
        ([10] * 5 + [500], list(range(5)), [5]),
        ([10, 20, 10, 20, 30, 30], [0, 2], [4, 5]),
        ([5, 10, 10, 10, 500, 600, 700], [0, 1, 2, 3], [5, 6]),
        ([1, 2, 2, 2, 2, 3], [0], [5]),  # both thirds would have the middle ones
    ],
)
def test_classes_of_one_size_are_not_parted(counts: list[int], rare: list[int], common: list[int]) -> None:
    parts = thirds(counts)
    assert parts is not None
    assert (sorted(parts.rare), sorted(parts.common)) == (rare, common)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30).filter(lambda drawn: len({*drawn}) > 1))
def test_no_class_is_both_rare_and_common(counts: list[int]) -> None:
    parts = thirds(counts)
    assert parts is not None
    rare, common = ({counts[k] for k in part} for part in (parts.rare, parts.common))
    assert max(rare) < min(common)
    assert min(rare) == min(counts)
    assert max(common) == max(counts)
    assert {k for k, count in enumerate(counts) if count in rare} == {*parts.rare}
    assert {k for k, count in enumerate(counts) if count in common} == {*parts.common}


# --- tables --------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {
        "method": "ce",
        "title": "ERM",
        "n_seeds": 3,
        "top1_error": [0.30, 0.31, 0.29],
        "many": [0.2, 0.2, 0.23],
        "medium": [0.4, 0.5, 0.6],
        "few": None,
        "balanced_accuracy": [0.7, 0.69, 0.71],
        "calibration_error": [0.1, 0.1, 0.1],
        "seconds_per_epoch": [3.0, 3.5, 4.0],
        "reused": 2,
        "trained": 1,
    },
    {
        "method": "ce+otmix",
        "title": "ERM + OTmix",
        "n_seeds": 1,
        "top1_error": [0.2701],
        "many": [0.21],
        "medium": [0.3],
        "few": [None],
        "balanced_accuracy": [0.73],
        "calibration_error": [0.08],
        "seconds_per_epoch": 12.34,
        "reused": 0,
        "trained": 1,
    },
]


def test_compare_table_against_hand_computed_numbers() -> None:
    table = compare_table(ROWS)
    erm = dict(zip(table.columns, table.rows[0]))
    assert erm["error"] == "30.00 ± 1.00"  # deviations 0, 1, -1: sqrt(2 / 2)
    assert erm["many"] == "21.00 ± 1.73"  # deviations -1, -1, 2: sqrt(6 / 2)
    assert erm["medium"] == "50.00 ± 10.00"
    assert erm["few"] == "–"
    assert erm["s/epoch"] == "3.50"
    assert erm["reused"] == "2 of 3"
    otmix = dict(zip(table.columns, table.rows[1]))
    assert (otmix["method"], otmix["error"], otmix["few"]) == ("ERM + OTmix †", "27.01", "–")
    assert any(ONE_SEED in note for note in table.notes)
    assert not any(SELECTED_ON_TEST in note for note in table.notes)


def test_a_leaking_row_is_marked_and_explained() -> None:
    table = compare_table([ROWS[0], {**ROWS[0], "protocol": "official"}])
    assert [row[0] for row in table.rows] == ["ERM", "ERM ‡"]
    assert any("selected on the test set" in note for note in table.notes)
    assert not any(ONE_SEED in note for note in table.notes)


def test_terminal_and_markdown_show_the_same_cells() -> None:
    from rich.console import Console

    table = Table("title", ("name", "number"), ((EVIL, "1.5"), ("[bold]b[/bold]", "–")), ("a note",))
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(table.rich())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for cell in ("title", "name", EVIL, "[bold]b[/bold]", "1.5", "a note"):
        assert cell in shown
    lines = table.markdown().splitlines()
    header = lines.index("| name | number |")
    assert lines[header + 1] == "| --- | ---: |"
    assert "<script>" not in table.markdown()
    assert lines[header + 2].count("|") - lines[header + 2].count("\\|") == 3  # a | in a name opens no column
    assert lines[-1] == "a note"


def test_result_table(tmp_path: Path) -> None:
    result = json.loads((fake_run(tmp_path / "run") / "result.json").read_text())
    rows = dict(result_table(result).rows)
    error = result["evaluation"]["top1_error"]
    assert rows["top-1 error"] == f"{100 * error:.1f}"
    assert rows["top-1 accuracy"] == f"{100 - 100 * error:.1f}"
    assert (rows["many-shot error"], rows["few-shot error"]) == ("12.3", "–")
    assert rows["calibration error (ECE)"] == "5.7"
    assert result_table(result).notes == ()
    assert result_table({**result, "looks_at_test": True}).notes == (SELECTED_ON_TEST,)


# --- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (3, 120, 80)])
def test_mixed_grid(channels: int, height: int, width: int) -> None:
    images = torch.rand(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [0, 0, height, width], [0, 0, 1, 1]])
    shares = torch.tensor([1.0, 0.63, 0.37, 0.5])
    labels = torch.tensor([0, 1, 2, 0])
    figure = figures.mixed_grid(
        images, images, images, labels, labels.flip(0), shares, ["ship", "truck", "$c$"], EVIL, boxes=box
    )
    found = texts(figure)
    assert {"foreground", "background", "mix", "not mixed"} <= set(found)
    assert "63 % truck\n+ 37 % $c$" in found  # the background's share comes first
    assert min(size_of(figures.png_bytes(figure))) > 200


def test_grid_stops_at_twelve_columns() -> None:
    images = torch.zeros(20, 3, 8, 8)
    labels, shares = torch.zeros(20, dtype=torch.int64), torch.full((20,), 0.5)
    figure = figures.mixed_grid(images, images, images, labels, labels, shares, ["a"])
    assert texts(figure).count("50 % a\n+ 50 % a") == 12


def test_grid_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"\[n,C,H,W\]"):
        figures.mixed_grid(torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), [0], [0], [1.0], ["a"])


def test_grid_shows_small_pixels_unsmoothed() -> None:
    image = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None]
    png = figures.png_bytes(figures.mixed_grid(image, image, image, [0], [0], [0.5], ["a"]))
    with Image.open(io.BytesIO(png)) as drawn:
        grey = np.asarray(drawn.convert("L"))
    tile = grey[:, grey.shape[1] // 2 :]  # without the words at the left
    column = tile[:, tile.shape[1] // 4]
    assert ((column > 40) & (column < 215)).mean() < 0.1  # black and white, few greys between (letters)


def test_preview_grid() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    figure = figures.preview_grid(
        foreground=images,
        foreground_labels=[0, 1, 2],
        random_background=images,
        random_labels=[1, 1, 1],
        random_mixed=images,
        transport_background=images,
        transport_labels=[2, 2, 2],
        transport_mixed=images,
        shares=[0.75, 0.75, 0.75],
        class_names=["a", "b", "c"],
    )
    found = texts(figure)
    assert "75 % b\n+ 25 % a" in found
    assert "75 % c\n+ 25 % a" in found
    assert size_of(figures.png_bytes(figure))


def test_plan_figure_normalises_rows_and_names_both_axes() -> None:
    coupling = torch.tensor([[0.3, 0.1], [0.0, 0.2], [0.0, 0.0]])
    figure = figures.plan_figure(coupling, ["ship", "truck", "empty"], ["plane", "car"], "plan")
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 1], [0, 0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ship", "truck", "empty"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["plane", "car"]
    written = {text.get_position(): text for text in axes.texts}
    assert written[(0, 0)].get_text() == ".75"
    assert written[(0, 0)].get_fontweight() == "bold"
    assert written[(1, 0)].get_fontweight() == "normal"
    assert written[(0, 2)].get_fontweight() == "normal"  # an empty row chooses nothing


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 150])
def test_confusion_figure(classes: int) -> None:
    matrix = np.eye(classes) * 3 + np.eye(classes, k=1)
    figure = figures.confusion_figure(matrix, [f"class {k}" for k in range(classes)])
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(np.asarray(drawn).sum(axis=1), 1)
    assert bool(figure.axes[0].texts) == (classes <= 16)  # numbers only where they can be read
    assert size_of(figures.png_bytes(figure))


def test_pair_counts_figure() -> None:
    index, transport = np.array([[3, 1], [1, 1]]), np.array([[0, 5], [5, 0]])
    figure = figures.pair_counts_figure({"at random": index, "by transport": transport}, ["a", "b"])
    assert len(figure.axes) == 2
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[0.75, 0.25], [0.5, 0.5]])
    assert any("6 pairs" in text for text in texts(figure))
    alone = figures.pair_counts_figure({"at random": index, "by transport": 0 * transport}, ["a", "b"])
    assert len(alone.axes) == 1
    with pytest.raises(ValueError, match="no pair"):
        figures.pair_counts_figure({"at random": 0 * index}, ["a", "b"])


@pytest.mark.parametrize(
    ("method", "title"),
    [
        ("ce+cmo", "random background"),
        ("ce+cutmix", "partner within the batch"),
        ("ce+confusion", "background by the confusion"),
    ],
)
def test_pairs_are_told_by_what_found_them(
    method: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older runs have under "index" whatever transport did not choose, and a table of transport in any case."""
    monkeypatch.setattr(figures, "png_bytes", lambda figure: "|".join(texts(figure)).encode())
    *_, pairs = mixing_pictures(read_run(fake_run(tmp_path / "run", 2, method=method)))
    assert f"|{title}\n" in pairs.png.decode()


def test_pairs_are_told_by_the_rule_that_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before F is known, a run that pairs by it pairs at random."""
    monkeypatch.setattr(figures, "png_bytes", lambda figure: "|".join(texts(figure)).encode())
    run, counts = fake_run(tmp_path / "run", 2, method="ce+confusion"), np.ones((2, 2), dtype=np.int64)
    np.savez(run / "pairs.npz", mine=counts, confusion=2 * counts, index=3 * counts)
    *_, pairs = mixing_pictures(read_run(run))
    titles = [text for text in pairs.png.decode().split("|") if " pairs, " in text]
    assert [title.partition(" pairs")[0] for title in titles] == [
        "random background\n12",
        "background by the confusion\n8",
        "mine\n4",
    ]
    np.savez(run / "pairs.npz")  # nothing was mixed
    assert len(list(mixing_pictures(read_run(run)))) == 2


@pytest.mark.parametrize(("classes", "pictures"), [(400, 3), (401, 2)])
def test_pairs_of_very_many_classes_are_not_drawn(
    classes: int, pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "pair_counts_figure", lambda *arguments: None)
    monkeypatch.setattr(figures, "png_bytes", lambda figure: b"")
    assert len(list(mixing_pictures(read_run(fake_run(tmp_path / "run", classes))))) == pictures


def test_curves_have_a_panel_for_what_is_known() -> None:
    history = [
        {"stage": stage, "epoch": epoch, "lr": 0.1, "loss": 1.0, "train_error": None, "validation_error": error}
        for stage in ("one", "two")
        for epoch, error in enumerate([None, 0.4, 0.3])
    ]
    figure = figures.curves(history)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["training loss", "error in %", "learning rate"]
    assert "images in %" not in titles  # nothing was mixed
    mixed = figures.curves([{**line, "mixed_share": 0.5} for line in history])  # of the images, see Tally.read
    assert mixed.axes[3].get_title(loc="left") == "images in %"
    line = figure.axes[1].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [2, 3, 5, 6])
    np.testing.assert_allclose(line.get_ydata(), [40, 30, 40, 30])
    assert size_of(figures.png_bytes(figure))
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.curves([])


def test_bars_run_from_the_largest_class_to_the_smallest() -> None:
    figure = figures.per_class_bars(["few", "many", "none"], [5, 500, 50], [0.25, 0.75, None], [0.5, 0.5, 0.5])
    above, below = figure.axes
    assert [label.get_text() for label in below.get_xticklabels()] == ["many", "none", "few"]
    assert [bar.get_height() for bar in above.patches] == [500, 50, 5]
    assert above.get_yscale() == "log"
    assert [bar.get_height() for bar in below.containers[0]] == [75, 0, 25]
    assert "–" in [text.get_text() for text in below.texts]
    assert size_of(figures.png_bytes(figure))


def test_many_classes_become_a_moving_average() -> None:
    accuracy: list[float | None] = [0.5] * 120
    accuracy[7] = None
    figure = figures.per_class_bars([str(k) for k in range(120)], list(range(120, 0, -1)), accuracy)
    line = figure.axes[1].lines[0]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), 50)  # the unmeasured class pulls nothing down
    assert size_of(figures.png_bytes(figure))


def test_comparison_bars_draw_the_means_of_groups_that_exist() -> None:
    figure = figures.comparison_bars(ROWS)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all classes", "many-shot", "medium-shot"]
    heights = sorted(bar.get_height() for bar in axes.patches)
    np.testing.assert_allclose(heights, sorted([30, 21, 50, 27.01, 21, 30]))
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.comparison_bars([{"method": "ce", "top1_error": None}])


def test_pictures_are_reproducible_and_leave_no_other_file(tmp_path: Path) -> None:
    paths = [tmp_path / "made" / f"{name}.png" for name in "ab"]
    for path in paths:
        assert figures.save(figures.plan_figure(np.eye(3), "abc", "abc"), path) == path
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["a.png", "b.png"]


@given(st.text(min_size=0, max_size=60), st.integers(5, 30))
def test_shortened_names_fit(name: str, length: int) -> None:
    short = shorten(name, length)
    assert len(short) <= length
    assert "\n" not in short
    if len(" ".join(name.split())) <= length:
        assert short == " ".join(name.split())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of words only: drawing is most of their time."""
    monkeypatch.setattr(figures, "png_bytes", lambda figure: b"")


# --- pages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 150])
def test_page_is_whole(tmp_path: Path, classes: int) -> None:
    run = fake_run(tmp_path / "run", classes)
    path = write_page(run)
    assert path == run / "report.html"
    page = path.read_text("utf-8")
    written = re.sub(r"base64,[^\"]+", "", page)
    assert not re.search(r"https?:|//[a-z]|<script|@import|<link[^>]+href=\"(?!data:)|url\(", written)
    sources = re.findall(r'<img src="([^"]{0,22})', page)
    assert len(sources) == 6  # classes, confusion, mixed, plan, pairs, curves
    assert set(sources) == {"data:image/png;base64,"}
    assert all(min(size_of(png)) > 100 for png in pictures_in(page))
    text = text_of(page)
    assert "ERM + OTmix on birds" in text
    evaluation = json.loads((run / "result.json").read_text())["evaluation"]
    assert f"{100 * (1 - evaluation['top1_error']):.1f} % of all images" in text
    assert "Measured on the test split, which had no part in training and decided nothing" in text
    assert "selected on the test set" not in text.lower()
    assert "otmix train --root 'my birds'" in text
    assert f"--config {run / 'config.yaml'}" in text
    assert "2 were skipped" in text
    for k, accuracy in enumerate(evaluation["per_class_accuracy"]):
        assert re.search(rf"class {k:03d} [\d,]+ 50 {100 * accuracy:.1f} ", text)
    assert [entry for entry in run.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.usefixtures("undrawn")
def test_rare_classes_are_told(tmp_path: Path) -> None:
    text = text_of(write_page(fake_run(tmp_path / "run", 2, names=["fine", "broken"])).read_text("utf-8"))
    assert "The rarest classes, 1 of 2 (broken), had 10 training images each." in text
    assert (
        "On average 40.0 % of the images of such a class are recognised; of one of the commonest classes, 90.0 %"
        in text
    )
    assert "100 % are taken for one of the commonest classes" in text
    assert re.search(r"broken 10 50 40\.0 fine \(60 %\)", text)


@pytest.mark.usefixtures("undrawn")
def test_names_are_escaped_and_still_readable(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", names=[EVIL, *(f"<img src=x onerror=boo({k})>" for k in range(9))])
    page = write_page(
        run, fake_run(tmp_path / "base", names=[EVIL, *(f"<img src=x onerror=boo({k})>" for k in range(9))])
    ).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert EVIL in text_of(page)


@pytest.mark.usefixtures("undrawn")
def test_only_the_required_files(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", only_required=True)
    text = text_of(write_page(run).read_text("utf-8"))
    assert "class 9" in text
    assert "its rare classes are not known" in text


def test_a_confusion_of_other_classes_is_damage(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", 4)
    result = json.loads((run / "result.json").read_text())
    for confusion in ([[0, 4, 1]], [[0, 1]]):
        result["evaluation"]["confusion"] = confusion
        (run / "result.json").write_text(json.dumps(result))
        with pytest.raises(UserError, match="does not fit 4 classes"):
            write_page(run)


@pytest.mark.usefixtures("undrawn")
def test_nothing_measured_for_a_class(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", 4)
    result = json.loads((run / "result.json").read_text())
    result["evaluation"]["per_class_accuracy"][3] = None
    result["evaluation"]["confusion"] = [cell for cell in result["evaluation"]["confusion"] if cell[0] != 3]
    result["evaluation"]["calibration_error"] = float("nan")
    (run / "result.json").write_text(json.dumps(result))
    text = text_of(write_page(run).read_text("utf-8"))
    assert re.search(r"class 003 10 0 – –", text)
    assert "nan" not in text.lower().split()
    assert "On average – of the images" in text


@pytest.mark.parametrize("protocol", ["official", "clean"])  # `clean` with one setting changed may leak too
@pytest.mark.usefixtures("undrawn")
def test_a_page_of_a_run_that_saw_the_test_set_says_so(tmp_path: Path, protocol: str) -> None:
    run = fake_run(tmp_path / "run", protocol=protocol, looks_at_test=True)
    page = write_page(run).read_text("utf-8")
    text = text_of(page)
    assert "This run looked at the test set, so its result is selected on the test set" in text
    assert "and selected on the test set." in text
    assert "decided nothing" not in text
    assert SELECTED_ON_TEST in text


@pytest.mark.usefixtures("undrawn")
def test_validation_result_is_named(tmp_path: Path) -> None:
    text = text_of(write_page(fake_run(tmp_path / "run", split="validation")).read_text("utf-8"))
    assert "Measured on the validation split" in text
    assert "test split" not in text.replace("the test split is used once, at the end", "")


@pytest.mark.usefixtures("undrawn")
def test_test_images_that_guided_a_run_are_not_denied_on_validation_images(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", protocol="official", split="validation", looks_at_test=True)
    text = text_of(write_page(run).read_text("utf-8"))
    assert "Measured on the validation split (500 images): not trained on" in text
    assert "no test image was used" not in text
    assert "test images did" in text


@pytest.mark.parametrize(
    ("protocol", "changed", "split", "looks", "holds"),
    [
        ("clean", {}, "test", False, True),
        ("clean", {"loss.tau": 2.0, "mix_probability": 0.5}, "test", False, True),
        ("clean", {"confusion_from": "test"}, "test", True, False),
        ("clean", {}, "test", True, False),  # the run of its --weights looked
        ("clean", {}, "validation", False, False),
        ("clean", {"alpha": 1.0}, "test", False, False),
        ("paper", {}, "test", False, True),
        ("paper", {"foreground_r": 0.0}, "test", False, False),
        ("official", {}, "test", True, True),
        ("official", {"headline": "last"}, "test", True, False),
        ("mine", {}, "test", False, False),
    ],
)
def test_title_of_a_protocol_is_given_where_it_is_true(
    protocol: str, changed: dict[str, Any], split: str, looks: bool, holds: bool, tmp_path: Path
) -> None:
    run = fake_run(tmp_path / "run", protocol=protocol, split=split, looks_at_test=looks, set=changed)
    name, title = method_parts(read_run(run))[-1]
    assert name == "Protocol"
    assert title == (next(text for key, text in PROTOCOL_TITLES.items() if key == protocol) if holds else protocol)


@pytest.mark.parametrize(
    ("counts", "ratio"), [([1280, 1], "1,280"), ([9996, 10], "1,000"), ([12_345, 5], "2,469"), ([25, 10], "2.5")]
)
def test_imbalance_is_a_plain_number(counts: list[int], ratio: str, tmp_path: Path) -> None:
    record = replace(read_run(fake_run(tmp_path / "run", 2)), counts=counts)
    assert lead(record).endswith(f": {ratio} to 1.")


@pytest.mark.parametrize(
    ("typed", "imports"),
    [
        ("--import=mine.py", ["--import=mine.py"]),
        ("--import mine.py --epochs 3", ["--import", "mine.py"]),
        ("--import 'a b.py' --seed=1 '--import=c d.py'", ["--import", "a b.py", "--import=c d.py"]),
        ("--epochs 3", []),
    ],
)
def test_the_second_command_imports_what_the_first_one_did(typed: str, imports: list[str], tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", 2)
    (run / "environment.json").write_text(json.dumps({"command": f"otmix train {typed}"}), "utf-8")
    record = read_run(run)
    again = ["otmix", "train", "--config", str(run / "config.yaml"), "--out", f"{run}-again"]
    assert commands(record) == [
        command_line(["otmix", "train", *shlex.split(typed)]),
        command_line([*again, *imports]),
    ]


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("schedule", "steps", "cosine"),
        ("warmup", 0.0, 0.025),
        ("weights", None, "w.pt"),
        ("precision", "32-true", "bf16-mixed"),
        ("weight_decay", 2e-4, 5e-4),
        ("nesterov", False, True),
    ],
)
def test_a_baseline_with_another_recipe_draws_a_caution(name: str, here: Any, there: Any, tmp_path: Path) -> None:
    run, base = (read_run(fake_run(tmp_path / str(value), 2, **{name: value})) for value in (here, there))
    caution = f"The baseline differs in more than its method: {name} {here} here, {there} there."
    assert caution in cautions(run, base)
    assert cautions(run, run) == cautions(run)


@pytest.mark.parametrize(
    ("split", "there", "said"),
    [
        ("test", {"splits": {"test": {"sha256": "2"}}}, "measured on other test images"),
        ("validation", {"splits": {"validation": {"sha256": "2"}}}, "measured on other validation images"),
        ("test", {"splits": {"validation": {"sha256": "2"}}}, None),  # which the result has nothing to do with
        ("test", {"splits": {"train": {"sha256": "2"}}}, "trained on other images"),
        ("test", {"splits": {"test": {"sha256": "2"}}, "channels": 3}, None),  # the same in colour
        ("test", {}, None),  # older runs
    ],
)
def test_a_baseline_of_other_images_draws_a_caution(
    split: str, there: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    known = read_run(fake_run(tmp_path / "run", 2, split=split))
    hashes = {name: {"sha256": "1"} for name in ("train", "validation", "test")}
    run, base = replace(known, data={"splits": hashes, "channels": 1}), replace(known, data={"channels": 1} | there)
    more = cautions(run, base)[1:]
    assert more == ([f"The baseline was {said}."] if said else [])
    assert cautions(run, run) == cautions(run)


@pytest.mark.usefixtures("undrawn")
def test_baseline_shows_what_changed(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", boost=0.2)
    base = fake_run(tmp_path / "base", method="ce", title="ERM", backbone="resnet8", seed=3)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "backbone": "resnet20"}))
    text = text_of(write_page(run, baseline=base).read_text("utf-8"))
    here, there = (json.loads((place / "result.json").read_text())["evaluation"] for place in (run, base))
    rare = [np.mean(found["per_class_accuracy"][-3:]) for found in (here, there)]
    gain = f"+{100 * (rare[0] - rare[1]):.1f}"
    assert f"recognises {100 * rare[1]:.1f} % of them: this run changes that by {gain} points" in text
    assert f"accuracy, the rarest 3 of 10 classes {100 * rare[1]:.1f} {100 * rare[0]:.1f} {gain}" in text
    assert "Of the 3 rare classes, 3 got better, 0 got worse and 0 stayed the same." in text
    assert f"{gain} points against ERM" in text
    assert "The baseline differs in more than its method: backbone resnet20 here, resnet8 there." in text


def test_baseline_of_other_classes_is_refused(tmp_path: Path) -> None:
    run, other = fake_run(tmp_path / "run", 4), fake_run(tmp_path / "base", 5)
    with pytest.raises(UserError, match="other classes"):
        write_page(run, other)
    with pytest.raises(UserError, match="validation split"):
        write_page(run, fake_run(tmp_path / "third", 4, split="validation"))
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", None, "no finished run"),
        ("config.yaml", None, "not a run of otmix"),
        ("result.json", "{", r"result\.json is not readable as JSON"),
        ("result.json", '{"method": "ce"}', "no evaluation"),
        ("config.yaml", "a: [", "not YAML"),
        ("environment.json", "[1]", "must hold one JSON object"),
        ("metrics.jsonl", '{"loss": 1}\n{"lo', r"metrics\.jsonl, line 2,"),
        ("data.json", '{"class_names": ["a"]}', "10 classes but there are 1 class names"),
        ("pairs.npz", "no archive", r"pairs\.npz cannot be read"),
    ],
)
def test_damaged_run_directory(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    run = fake_run(tmp_path / "run")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_page(run)
    assert not (run / "report.html").exists()


def test_comparison_page(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "title": "<b>mine</b>", "protocol": "official"}]
    path = write_comparison_page(tmp_path / "made" / "compare.html", rows, ["2 of 4 runs were reused <i>"])
    page = path.read_text("utf-8")
    text = text_of(page)
    assert "30.00 ± 1.00" in text
    assert "<b>mine" not in page
    assert "2 of 4 runs were reused <i>" in text
    assert "A run marked ‡ looked at the test set" in text
    assert not re.search(r"https?:|<script", page)
    (png,) = pictures_in(page)
    assert min(size_of(png)) > 100


def test_reports_are_imported_without_the_libraries_that_draw() -> None:
    code = (
        "import sys, otmix.reports.figures, otmix.reports.tables, otmix.reports.page\n"
        "heavy = ('matplotlib', 'jinja2', 'rich', 'torch', 'lightning', 'yaml')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert out.stdout.strip() == "[]"
