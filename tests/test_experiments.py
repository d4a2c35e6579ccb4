"""Comparisons and unit files, on run directories that the tests write themselves: only one slow test trains."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from otmix import training
from otmix.cli import COMMANDS
from otmix.cli.parsing import parse
from otmix.config import RECIPES, RunConfig
from otmix.errors import UserError
from otmix.experiments import Comparison, ComparisonInterrupted, compare, jobs, paired_difference
from otmix.experiments.compare import _config
from otmix.experiments.jobs import train_in_processes, write_config
from otmix.experiments.progress import share_done
from otmix.experiments.unit_picture import results_picture
from otmix.experiments.unit_tables import results_table
from otmix.experiments.units import (
    BEGIN,
    BEGIN_DEFAULTS,
    END,
    fill_region,
    fill_tables,
    main,
    read_units,
    write_unit,
)
from otmix.extensions import import_files
from otmix.files import write_json
from otmix.losses import LOSSES, CrossEntropy, register_loss
from otmix.methods import parse_method
from otmix.protocols import PROTOCOLS, Overrides
from otmix.training.records import data_record, inputs, read_config
from otmix.training.setup import effective_settings, filled_in, load_data

ERRORS = {
    ("ce", 0): 0.30,
    ("ce", 1): 0.32,
    ("ce", 2): 0.31,
    ("ce+cmo", 0): 0.28,
    ("ce+cmo", 1): 0.33,
    ("ce+cmo", 2): 0.27,
}
SPLITS = {"train": {"images": 120, "sha256": "aa"}, "test": {"images": 50, "sha256": "bb"}}
BASE = RunConfig(data="digits", epochs=3)


def finish_run(config: RunConfig, error: float, splits: dict[str, Any] = SPLITS, **changed: Any) -> Path:
    """A finished run directory, as training leaves it behind (what a comparison and a unit read of it)."""
    run_dir = training.run_dir_of(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    method = parse_method(config.method)
    data = {"name": "digits", "class_names": ["ant", "bee"], "counts": [100, 20], "splits": splits}
    data |= changed.pop("data", {})
    config = filled_in(replace(config, method=method.name), 8, True, sum(data["counts"]))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    write_json(run_dir / "settings.json", effective_settings(config))
    write_json(run_dir / "data.json", data)
    where = {
        "python": "3.11",
        "system": "Linux",
        "device": "a processor",
        "threads": 1,
        "packages": {"torch": "2"},
        "commit": "abc123",
    }
    where |= changed.pop("environment", {})
    write_json(run_dir / "environment.json", where)
    evaluation = {
        "n": 50,
        "top1_error": error,
        "balanced_accuracy": 1 - error,
        "per_class_accuracy": [1 - error, 1 - error],
        "group_error": {"many": error / 2, "medium": error, "few": None},
        "calibration_error": error / 10,
        "negative_log_likelihood": 1.0,
        "confusion": [[0, 0, 50]],
    }
    result = {
        "method": method.name,
        "title": method.title,
        "protocol": config.protocol,
        "looks_at_test": False,
        "split": config.final_split,
        "seed": config.seed,
        "hash": config.hash,
        "commit": "abc123",
        "device": where["device"],
        "seconds_per_epoch": 2.0,
        "evaluation": evaluation | changed.pop("evaluation", {}),
    }
    write_json(run_dir / "result.json", result | changed)
    return run_dir


class Trainer:
    """Stands for `otmix.training.train`: writes a finished run, or raises what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, errors: dict[tuple[str, int], float] | None = None) -> None:
        self.errors = ERRORS if errors is None else errors
        self.trained: list[tuple[str, int]] = []
        self.raises: dict[tuple[str, int], BaseException] = {}
        monkeypatch.setattr(training, "train", self)

    def __call__(self, config: RunConfig, reporter: object = None) -> Path:
        key = (config.method, config.seed)
        assert config.resume, "an unfinished run is continued"
        if key in self.raises:
            raise self.raises[key]
        self.trained.append(key)
        data = data_record(load_data(config)) if config.data == "folder" else {}
        return finish_run(config, self.errors[key], data=data, environment={"inputs": inputs(config)})


class Lines(training.Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    return Trainer(monkeypatch)


def run(tmp_path: Path, methods: list[str], **options: Any) -> Comparison:
    return compare(options.pop("base", BASE), methods, runs=tmp_path / "runs", **options)


# --- what is trained -------------------------------------------------------------------------------------------------


def test_baselines_are_trained_first_and_rows_stand_as_asked(tmp_path: Path, trainer: Trainer) -> None:
    found = run(tmp_path, ["cmo", "erm"], seeds=2)
    assert trainer.trained == [("ce", 0), ("ce", 1), ("ce+cmo", 0), ("ce+cmo", 1)]
    assert [row["method"] for row in found.rows] == ["ce+cmo", "ce"]
    assert [(row["trained"], row["reused"]) for row in found.rows] == [(2, 0), (2, 0)]


def test_finished_runs_are_reused_and_only_missing_ones_trained(tmp_path: Path, trainer: Trainer) -> None:
    run(tmp_path, ["erm"], seeds=2)
    trainer.trained.clear()
    reporter = Lines()
    found = run(tmp_path, ["erm", "cmo"], seeds=3, reporter=reporter)
    assert trainer.trained == [("ce", 2), ("ce+cmo", 0), ("ce+cmo", 1), ("ce+cmo", 2)]
    assert [(row["trained"], row["reused"]) for row in found.rows] == [(1, 2), (3, 0)]
    assert "2 finished already, reused; 4 to train" in reporter.lines[0]
    assert len(reporter.lines) == 1 + 4
    assert "seed 2: top-1 error 31.0 %" in reporter.lines[1]
    trainer.trained.clear()
    again = run(tmp_path, ["erm", "cmo"], seeds=3)
    assert trainer.trained == []
    assert [row["top1_error"] for row in again.rows] == [row["top1_error"] for row in found.rows]


def test_an_alias_and_its_name_are_one_method(tmp_path: Path, trainer: Trainer) -> None:
    found = run(tmp_path, ["erm", "ce"], seeds=1)
    assert len(found.rows) == 1
    assert trainer.trained == [("ce", 0)]


def test_seeds_begin_at_the_base_seed(tmp_path: Path, trainer: Trainer) -> None:
    run(tmp_path, ["erm"], seeds=2, base=replace(BASE, seed=1))
    assert trainer.trained == [("ce", 1), ("ce", 2)]


def test_other_settings_are_other_runs(tmp_path: Path, trainer: Trainer) -> None:
    run(tmp_path, ["erm"], seeds=1)
    run(tmp_path, ["erm"], seeds=1, base=replace(BASE, epochs=4))
    run(tmp_path, ["erm"], seeds=1, base=replace(BASE, workers=0))
    assert trainer.trained == [("ce", 0), ("ce", 0)]  # the number of workers changes no result


def photos(folder: Path) -> str:
    """A folder of images of two classes."""
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(5):
            Image.new("L", (16, 16), 50 * i).save(folder / name / f"{i}.png")
    return str(folder)


def test_other_folders_of_images_are_other_runs(tmp_path: Path, trainer: Trainer) -> None:
    for name in ("photos", "drawings", "photos"):
        root = photos(tmp_path / name)
        run(tmp_path, ["erm"], seeds=1, base=replace(BASE, data="folder", root=root))
    assert trainer.trained == [("ce", 0), ("ce", 0)]


def test_a_folder_may_be_spelt_otherwise(tmp_path: Path) -> None:
    found = {}
    for root in ("photos", "photos/", "./photos"):
        found[root] = _config(replace(BASE, data="folder", root=root, out=None), parse_method("erm"), 0, tmp_path)
    assert len({config.out for config in found.values()}) == 1
    plain = replace(BASE, data="folder", root="photos", method="ce")
    assert found["photos"].hash == plain.hash


def test_runs_on_other_images_of_the_same_name_are_not_reused(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = replace(BASE, data="folder", root="photos")
    for name in ("here", "there"):
        photos(tmp_path / name / "photos")
    (tmp_path / "there" / "photos" / "ant" / "0.png").unlink()
    monkeypatch.chdir(tmp_path / "here")
    first = run(tmp_path, ["erm"], seeds=1, base=base).outcomes[0].run_dir
    assert run(tmp_path, ["erm"], seeds=1, base=base).outcomes[0].status == "reused"
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(
        UserError, match=r"not those that .* was trained on \(counts, splits changed\); .* --runs"
    ) as told:
        run(tmp_path, ["erm", "cmo"], seeds=2, base=base)
    assert str(first) in str(told.value)
    assert trainer.trained == [("ce", 0)]


OWN = """
from otmix.losses import CrossEntropy, register_loss
@register_loss("mine")
class Mine(CrossEntropy): ...
"""


def import_again(file: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process does that is given this file."""
    file.write_text(text)
    for table, key in ((sys.modules, file.stem), (LOSSES, "mine")):  # as they were, afterwards
        monkeypatch.setitem(table, key, None)  # type: ignore[arg-type]
        monkeypatch.delitem(table, key)  # type: ignore[arg-type]
    import_files([file])


def test_a_run_with_another_loss_of_the_same_name_is_not_reused(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "my_loss_of_compare.py", tmp_path / "unrelated_of_compare.py"
    trainer.errors = {("mine", 0): 0.3}
    for text in (OWN, OWN):
        import_again(file, text, monkeypatch)
        run(tmp_path, ["mine"], seeds=1)
    for text in ("", "x = 1"):
        import_again(other, text, monkeypatch)
        import_again(file, OWN, monkeypatch)
        run(tmp_path, ["mine"], seeds=1)
    assert trainer.trained == [("mine", 0)]
    import_again(file, OWN + "# other\n", monkeypatch)
    with pytest.raises(UserError, match=r"the code that defines the loss no longer holds what .* --runs"):
        run(tmp_path, ["mine"], seeds=1)


def test_files_to_import_are_loaded_here_too(tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.errors = {("mine", 0): 0.3}
    file = tmp_path / "given_to_compare.py"
    file.write_text(OWN)
    try:
        run(tmp_path, ["mine"], seeds=1, imports=[str(file)])
    finally:
        sys.modules.pop(file.stem, None)
    assert trainer.trained == [("mine", 0)]


def test_what_other_processes_cannot_know_is_refused_before_they_start(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["otmix.experiments.compare"], "train_in_processes", None)
    register_loss("mine")(type("Mine", (CrossEntropy,), {"__module__": "__main__"}))
    file = tmp_path / "nothing_of_compare.py"
    file.touch()
    for imports in ([], [str(file)]):
        with pytest.raises(
            UserError, match=r"the loss 'mine' is known to this process alone.*imports=\[FILE\], or jobs=1"
        ):
            run(tmp_path, ["erm", "mine"], seeds=1, jobs=2, imports=imports)
    sys.modules.pop(file.stem, None)


def test_a_loss_whose_source_is_not_known_is_reused_with_a_word(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.errors = {("mine", 0): 0.3}
    said = []
    for _ in range(2):  # the second is another class of the same name
        register_loss("mine")(type("Mine", (CrossEntropy,), {"__module__": "typed_into_nothing"}))
        reporter = Lines()
        run(tmp_path, ["mine"], seeds=1, reporter=reporter)
        said.append("\n".join(reporter.lines))
    assert trainer.trained == [("mine", 0)]
    assert "cannot be read" not in said[0]
    assert "the source of the loss 'mine' cannot be read here, so finished runs are reused" in said[1]


def test_the_rows_are_written_as_csv_too(tmp_path: Path, trainer: Trainer) -> None:
    found = run(tmp_path, ["erm", "cmo"])
    with found.table.open(encoding="utf-8", newline="") as stream:
        lines = [*csv.DictReader(stream)]
    assert found.table == found.path.with_suffix(".csv")
    assert [line["method"] for line in lines] == ["ce", "ce+cmo"]
    for line, row in zip(lines, found.rows, strict=True):
        assert line["seeds"] == "0 1 2"
        assert [float(value) for value in line["top1_error_seeds"].split()] == row["top1_error"]
        assert float(line["top1_error"]) == pytest.approx(np.mean(row["top1_error"]))
        assert float(line["top1_error_std"]) == pytest.approx(np.std(row["top1_error"], ddof=1))
        assert line["few"] == line["few_std"] == line["few_seeds"] == "", "no such class"


def test_a_run_with_other_weights_of_the_same_name_is_not_reused(tmp_path: Path, trainer: Trainer) -> None:
    file = tmp_path / "begins.pt"
    base = replace(BASE, weights=str(file))
    file.write_bytes(b"one")
    run_dir = run(tmp_path, ["erm"], seeds=1, base=base).outcomes[0].run_dir
    assert run(tmp_path, ["erm"], seeds=1, base=base).outcomes[0].status == "reused"
    file.write_bytes(b"two")
    with pytest.raises(UserError, match=r"the file of --weights no longer holds what .* was trained with"):
        run(tmp_path, ["erm"], seeds=1, base=base)
    where = json.loads((run_dir / "environment.json").read_text())
    del where["inputs"]  # as older runs were recorded
    write_json(run_dir / "environment.json", where)
    assert run(tmp_path, ["erm"], seeds=1, base=base).outcomes[0].status == "reused"


def test_a_folder_that_holds_another_run_is_refused(tmp_path: Path, trainer: Trainer) -> None:
    run_dir = run(tmp_path, ["erm"], seeds=1).outcomes[0].run_dir
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values | {"epochs": 9}))
    with pytest.raises(UserError, match=r"other settings \(epochs: 9 there, 3 asked for"):
        run(tmp_path, ["erm"], seeds=1)


def test_a_run_with_what_was_the_default_once_is_not_taken_for_one_with_todays(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, ["cmo"], seeds=1)
    monkeypatch.setitem(PROTOCOLS, "clean", replace(PROTOCOLS["clean"], foreground_r=0.25))
    with pytest.raises(UserError, match=r"other settings \(set.foreground_r: 0.0 there, 0.25 asked for"):
        run(tmp_path, ["cmo"], seeds=1)
    run(tmp_path, ["cmo"], seeds=1, base=replace(BASE, set=Overrides(foreground_r=0.0)))
    assert trainer.trained == [("ce+cmo", 0), ("ce+cmo", 0)]


def test_a_recipe_that_was_the_default_once_is_not_taken_for_todays(
    tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, ["erm"], seeds=1)
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], lr=0.003, batch_size=32))
    with pytest.raises(UserError, match=r"other settings \(batch_size: 64 there, 32 asked for; lr: 0.1 there, 0.003"):
        run(tmp_path, ["erm"], seeds=2)
    assert trainer.trained == [("ce", 0)]
    run(tmp_path, ["erm"], seeds=2, base=replace(BASE, lr=0.1, batch_size=64))


@pytest.mark.parametrize(
    "stop",
    [UserError("the disk is full"), RuntimeError("out of memory\nmore"), OSError("no"), TypeError("an own loss")],
)
def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path: Path, trainer: Trainer, stop: Exception) -> None:
    trainer.raises[("ce", 1)] = stop
    found = run(tmp_path, ["erm", "cmo"])
    assert len(trainer.trained) == 5
    assert [row["n_seeds"] for row in found.rows] == [2, 3]
    assert [(outcome.method, outcome.seed) for outcome in found.failed] == [("ce", 1)]
    sentence = str(stop).splitlines()[0]
    assert found.failed[0].error is not None
    assert sentence in found.failed[0].error
    assert "\n" not in found.failed[0].error
    assert any(note.startswith("ERM with seed 1 failed: ") and sentence in note for note in found.notes)
    assert found.differences[0].seeds == (0, 2), "only seeds that both methods have are paired"


def test_all_failing_leaves_no_row_and_says_so(tmp_path: Path, trainer: Trainer) -> None:
    trainer.raises[("ce", 0)] = UserError("no images")
    found = run(tmp_path, ["erm"], seeds=1)
    assert found.rows == ()
    assert found.notes == ("ERM with seed 0 failed: no images",)


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt(), training.Interrupted(Path("x"))])
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    tmp_path: Path, trainer: Trainer, stopped_by: BaseException
) -> None:
    trainer.raises[("ce+cmo", 1)] = stopped_by
    with pytest.raises(ComparisonInterrupted, match="4 of 6 runs finished; the same command goes on") as caught:
        run(tmp_path, ["erm", "cmo"])
    assert isinstance(caught.value, training.Interrupted)
    assert caught.value.run_dir == tmp_path / "runs"
    trainer.raises.clear()
    trainer.trained.clear()
    run(tmp_path, ["erm", "cmo"])
    assert trainer.trained == [("ce+cmo", 1), ("ce+cmo", 2)]


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["erm"], {"seeds": 0}, "--seeds must be at least 1"),
        (["erm"], {"jobs": 0}, "--jobs must be at least 1"),
        (["erm"], {"jobs": 100_000}, r"--jobs 100000 is too many for \d+ cores?; give at most \d+"),
        ([], {}, "at least one method"),
        (["ermm"], {}, "no method named 'ermm'"),
        (["erm"], {"base": replace(BASE, out="x")}, "--runs"),
        (["erm"], {"base": replace(BASE, set=Overrides(alpha=-1.0))}, "alpha"),
        (["erm", "otmix"], {"base": replace(BASE, set=Overrides(mix_from=1.5))}, "mix_from is a share"),
        (["erm", "focal"], {"base": replace(BASE, set=Overrides(parts={"loss.gamma": -1}))}, "gamma of at least 0"),
        (["erm", "ride"], {"base": replace(BASE, set=Overrides(parts={"model.experts": 99}))}, "1 to 8 experts"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_trained(
    tmp_path: Path, trainer: Trainer, methods: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path, methods, **options)
    assert trainer.trained == []


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_below_a_file_are_refused(jobs: int, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory; choose another folder with --runs"):
        compare(BASE, ["erm", "cmo"], seeds=1, jobs=jobs, runs=tmp_path / "notes" / "runs")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_rows_hold_one_value_per_seed(tmp_path: Path, trainer: Trainer) -> None:
    (row,) = run(tmp_path, ["erm"]).rows
    assert row["title"] == "ERM"
    assert row["n_seeds"] == 3
    assert row["top1_error"] == [0.30, 0.32, 0.31]
    assert row["many"] == [0.15, 0.16, 0.155]
    assert row["medium"] == [0.30, 0.32, 0.31]
    assert row["few"] is None
    assert row["balanced_accuracy"] == pytest.approx([0.70, 0.68, 0.69])
    assert row["calibration_error"] == pytest.approx([0.030, 0.032, 0.031])
    assert row["seconds_per_epoch"] == [2.0, 2.0, 2.0]


def test_three_seeds_give_a_paired_difference_and_no_p_value(tmp_path: Path, trainer: Trainer) -> None:
    found = run(tmp_path, ["erm", "cmo"])
    (difference,) = found.differences
    # by hand: −2, +1, −4 points; mean −5/3; squared distances from it 1/9, 64/9, 49/9, their sum over 2 is 19/3
    assert difference.values == pytest.approx((-0.02, 0.01, -0.04))
    assert difference.mean == pytest.approx(-0.05 / 3)
    assert difference.std == pytest.approx(0.01 * (19 / 3) ** 0.5)
    assert difference.better == 2
    assert difference.p_value is None
    assert found.notes[0] == (
        "ERM + CMO against ERM, top-1 error: −1.67 points on average over 3 paired seeds "
        "(sample std of the differences 2.52); 2 of 3 seeds better."
    )
    assert "No p-value is given from fewer than 5 seeds." in found.notes


def test_one_seed_states_no_ranking(tmp_path: Path, trainer: Trainer) -> None:
    found = run(tmp_path, ["erm", "cmo"], seeds=1)
    assert found.differences == ()
    assert found.notes == ("No ranking is stated from one seed: another one can turn the order around.",)


def test_five_seeds_give_a_paired_t_test_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ce, cmo = [0.30, 0.32, 0.31, 0.33, 0.29], [0.29, 0.30, 0.31, 0.30, 0.28]
    errors = {("ce", k): value for k, value in enumerate(ce)} | {("ce+cmo", k): value for k, value in enumerate(cmo)}
    Trainer(monkeypatch, errors)
    found = run(tmp_path, ["erm", "cmo"], seeds=5)
    expected = stats.ttest_rel(cmo, ce).pvalue
    assert found.differences[0].p_value == pytest.approx(expected)
    assert found.notes == (
        "ERM + CMO against ERM, top-1 error: −1.40 points on average over 5 paired seeds (sample std of the "
        f"differences 1.14); 4 of 5 seeds better; paired t-test, two-sided: p = {expected:.2g}.",
    )


def test_several_comparisons_say_that_p_is_not_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ("ce", "ce+cmo", "ce+otmix")
    Trainer(
        monkeypatch, {(name, k): 0.3 + 0.01 * ((k * (1 + m)) % 4) for m, name in enumerate(methods) for k in range(5)}
    )
    found = run(tmp_path, ["erm", "cmo", "otmix"], seeds=5)
    assert [difference.method for difference in found.differences] == ["ce+cmo", "ce+otmix"]
    assert all("not corrected for 2 comparisons" in note for note in found.notes)


def test_equal_differences_have_no_test() -> None:
    found = paired_difference("b", dict.fromkeys(range(5), 0.3), "a", dict.fromkeys(range(5), 0.3), "top1_error")
    assert found is not None
    assert found.p_value is None
    assert found.better == 0
    assert "0.00 points" in found.in_words("B", "A", "top-1 error")
    assert "p =" not in found.in_words("B", "A", "top-1 error")


@pytest.mark.parametrize("more", [0, 1])
def test_differences_that_are_equal_but_for_rounding_have_no_test(more: int) -> None:
    right = [14, 15, 16, 17, 13]
    one, other = ({seed: 1 - (r + n) / 20 for seed, r in enumerate(right)} for n in (0, more))
    shaken = {seed: value + (1e-17 if seed % 2 else -1e-16) for seed, value in other.items()}
    found = paired_difference("b", shaken, "a", one, "top1_error")
    assert found is not None
    assert found.p_value is None
    assert found.better == 5 * more


def test_more_accuracy_is_better() -> None:
    found = paired_difference("b", {0: 0.9, 1: 0.5}, "a", {0: 0.8, 1: 0.6}, "balanced_accuracy", lower_is_better=False)
    assert found is not None
    assert found.better == 1
    assert paired_difference("b", {0: 0.9}, "a", {0: 0.8, 1: 0.6}, "balanced_accuracy") is None


def test_balanced_accuracy_is_compared_where_it_says_something_else(tmp_path: Path, trainer: Trainer) -> None:
    for outcome in run(tmp_path, ["erm", "cmo"], seeds=2).outcomes:
        result = json.loads((outcome.run_dir / "result.json").read_text())
        result["evaluation"]["balanced_accuracy"] = 0.5 + (0.1 if outcome.method == "ce+cmo" else 0.0)
        write_json(outcome.run_dir / "result.json", result)
    found = run(tmp_path, ["erm", "cmo"], seeds=2)
    assert [difference.measure for difference in found.differences] == ["top1_error", "balanced_accuracy"]
    assert "balanced accuracy: +10.00 points on average" in found.notes[1]
    assert "2 of 2 seeds better" in found.notes[1]


def test_runs_that_saw_other_images_are_not_called_comparable(tmp_path: Path, trainer: Trainer) -> None:
    outcome = run(tmp_path, ["erm", "cmo"], seeds=2).outcomes[-1]
    data = json.loads((outcome.run_dir / "data.json").read_text())
    write_json(outcome.run_dir / "data.json", data | {"splits": SPLITS | {"train": {"images": 119, "sha256": "cc"}}})
    (note,) = [note for note in run(tmp_path, ["erm", "cmo"], seeds=2).notes if note.startswith("NOT COMPARABLE")]
    assert "NOT COMPARABLE: ERM + CMO with seed 1 did not see" in note


def test_all_seeds_of_one_method_must_have_seen_the_same_images(tmp_path: Path, trainer: Trainer) -> None:
    outcome = run(tmp_path, ["erm"], seeds=2).outcomes[-1]
    data = json.loads((outcome.run_dir / "data.json").read_text())
    write_json(outcome.run_dir / "data.json", data | {"splits": SPLITS | {"test": {"images": 50, "sha256": "cc"}}})
    assert any(note.startswith("NOT COMPARABLE: ERM with seed 1 ") for note in run(tmp_path, ["erm"], seeds=2).notes)


def test_the_split_is_named_where_it_is_not_the_test_split(tmp_path: Path, trainer: Trainer) -> None:
    found = run(tmp_path, ["erm"], seeds=1, base=replace(BASE, final_split="validation", validation_per_class=5))
    assert "Measured on the validation split." in found.notes


def test_the_json_holds_all_of_it(tmp_path: Path, trainer: Trainer) -> None:
    trainer.raises[("ce", 2)] = UserError("broken")
    found = run(tmp_path, ["erm", "cmo"])
    saved = json.loads(found.path.read_text())
    assert found.path.parent == tmp_path / "runs"
    other = run(tmp_path, ["erm"])
    assert other.path != found.path
    assert json.loads(found.path.read_text()) == saved
    assert run(tmp_path, ["erm"]).path == other.path
    assert saved["rows"] == list(found.rows)
    assert saved["notes"] == list(found.notes)
    assert saved["differences"][0]["mean"] == found.differences[0].mean
    assert saved["settings"]["epochs"] == 3
    assert [one["status"] for one in saved["runs"]] == ["trained", "trained", "failed", *["trained"] * 3]
    assert str(tmp_path) not in json.dumps(saved["runs"])
    assert not list((tmp_path / "runs").glob(".*"))


def test_the_rows_are_what_tables_take(tmp_path: Path, trainer: Trainer) -> None:
    from otmix.reports.tables import compare_table

    text = compare_table(run(tmp_path, ["erm", "cmo"]).rows).markdown()
    (line,) = [line for line in text.splitlines() if line.startswith("| ERM |")]
    assert line.split(" | ")[1:4] == ["3", "31.00 ± 1.00", "15.50 ± 0.50"]
    assert line.split(" | ")[5] == "–"


# --- several processes -----------------------------------------------------------------------------------------------

CHILD = """
import json, os, pathlib, select, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
out = pathlib.Path(config["out"])
seed = config.get("seed", 0)
assert config["resume"] is True
out.mkdir(parents=True, exist_ok=True)
if seed == 7:
    def save(number, frame):
        (out / "saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, save)
    (out / "started").touch()
    time.sleep(60)
if seed == 2:
    sys.stderr.write("a warning\\notmix: the images are gone\\n")
    sys.exit(2)
if seed == 3:
    raise ZeroDivisionError("oops")
if seed == 8:
    out.with_name(out.name + ".log").unlink()
    sys.exit(1)
if seed == 4:
    os.kill(os.getpid(), signal.SIGKILL)
assert os.environ["OTMIX_PARENT_ON_STDIN"]
(out / "ends with its parent").write_text(str(sys.stdin.fileno() == 0 and not select.select([0], [], [], 0)[0]))
(out / "threads").write_text(os.environ["OMP_NUM_THREADS"])
(out / "loaded").write_text(" ".join(sys.argv[2:]))
"""


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Processes that stand for `otmix train`: what they do depends on their seed."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def command(config_file: Path, imports: list[str]) -> list[str]:
        return [sys.executable, str(script), str(config_file), *imports]

    monkeypatch.setattr(jobs, "command", command)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    return tmp_path / "runs"


def configs(folder: Path, *seeds: int) -> list[RunConfig]:
    return [replace(BASE, seed=seed, out=str(folder / f"run{seed}")) for seed in seeds]


def test_processes_share_the_cores_and_end_well_or_with_a_sentence(
    children: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ended: dict[int, str | None] = {}
    asked = configs(children, 1, 2, 3, 4, 5)
    train_in_processes(asked, 2, lambda config, error: ended.update({config.seed: error}), imports=["my_loss.py"])
    assert ended[1] is None
    assert ended[5] is None
    assert ended[2] == "the images are gone"
    crash, killed = ended[3], ended[4]
    assert crash is not None
    assert killed is not None
    assert crash.startswith("ZeroDivisionError: oops (exit code 1; see ")
    assert "killed by signal 9" in killed
    assert (children / "run1" / "threads").read_text() == "3"
    assert (children / "run1" / "ends with its parent").read_text() == "True"
    assert (children / "run5" / "loaded").read_text() == "my_loss.py"
    assert sorted(path.name for path in children.glob("*.log")) == ["run3.log", "run4.log"]
    assert "Traceback" in (children / "run3.log").read_text()


def test_a_process_has_no_more_threads_than_the_user_wants(children: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "cores", lambda: 8)
    for seed, (wanted, threads) in enumerate([("3", "3"), ("9", "4"), ("many", "4")], start=10):
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        train_in_processes(configs(children, seed), 2, lambda config, error: None)
        assert (children / f"run{seed}" / "threads").read_text() == threads


def test_a_log_may_be_gone(children: Path) -> None:
    ended: dict[int, str | None] = {}
    train_in_processes(configs(children, 8), 1, lambda config, error: ended.update({config.seed: error}))
    assert str(ended[8]).startswith("its log is gone (exit code 1; see ")


def test_no_more_than_asked_run_at_once(children: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = 0, 0
    start = jobs._start

    def counted(*arguments: Any) -> Any:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return start(*arguments)

    def ended(config: RunConfig, error: str | None) -> None:
        nonlocal alive
        alive -= 1

    monkeypatch.setattr(jobs, "_start", counted)
    train_in_processes(configs(children, 1, 5, 6), 2, ended)
    assert (alive, most) == (0, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_lets_the_processes_save_and_starts_no_more(children: Path, number: signal.Signals) -> None:
    ended: list[int] = []
    asked = [*configs(children, 7), *configs(children, 5)]
    sent = False

    def tick() -> None:
        nonlocal sent
        if not sent and (children / "run7" / "started").exists():
            sent = True
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train_in_processes(asked, 1, lambda config, error: ended.append(config.seed), tick=tick)
    assert (children / "run7" / "saved").exists()
    assert not (children / "run5").exists()
    assert ended == []
    assert signal.getsignal(number) is before


def test_a_comparison_in_processes(tmp_path: Path, children: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These children end without a result: no run is invented."""
    reporter = Lines()
    found = compare(BASE, ["erm"], seeds=3, jobs=2, runs=children, reporter=reporter)
    by_seed = {outcome.seed: outcome for outcome in found.outcomes}
    assert [by_seed[seed].status for seed in range(3)] == ["failed", "failed", "failed"]
    assert by_seed[2].error == "the images are gone"
    assert "has no result.json" in str(by_seed[0].error)
    assert sum(line.startswith("[") for line in reporter.lines) == 3


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(out="runs/a", resume=True),
        RunConfig(data="folder", root="photos", imbalance=3.5, nesterov=True, pretrained=False, out="ä", resume=True),
        RunConfig(set=Overrides(alpha=1.0, keep_diagonal=True, select="sample"), download=False, lr=1e-5),
        RunConfig(method="ib-drs+remix", set=Overrides(parts={"loss.detach": True, "mixer.kappa": 2.5})),
    ],
)
def test_the_file_given_to_a_process_says_the_same(tmp_path: Path, config: RunConfig) -> None:
    write_config(config, tmp_path / "config.yaml")
    assert RunConfig.from_dict(yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))) == config


def test_share_done_counts_epochs(tmp_path: Path) -> None:
    assert share_done(tmp_path / "nothing") == 0
    run_dir = finish_run(replace(BASE, epochs=4, out=str(tmp_path / "a")), 0.3)
    assert share_done(run_dir) == 1
    (run_dir / "result.json").unlink()
    assert share_done(run_dir) == 0
    (run_dir / "metrics.jsonl").write_text("{}\n{}\n{}\n")
    assert share_done(run_dir) == 0.75


@pytest.mark.slow
def test_a_real_comparison_in_two_processes(tmp_path: Path) -> None:
    found = compare(
        replace(BASE, epochs=1, backbone="resnet8", accelerator="cpu"), ["erm", "cmo"], seeds=1, jobs=2, runs=tmp_path
    )
    assert found.failed == ()
    assert [row["trained"] for row in found.rows] == [1, 1]
    again = compare(
        replace(BASE, epochs=1, backbone="resnet8", accelerator="cpu"), ["erm", "cmo"], seeds=1, runs=str(tmp_path)
    )
    assert [row["reused"] for row in again.rows] == [1, 1]
    assert write_unit(found.outcomes[0].run_dir, tmp_path / "results").is_file()


# --- unit files ------------------------------------------------------------------------------------------------------


def unit_runs(tmp_path: Path) -> list[Path]:
    paths = []
    for (method, seed), error in ERRORS.items():
        config = replace(BASE, method=method, seed=seed, out=str(tmp_path / "runs" / f"{method}-{seed}"))
        paths.append(finish_run(config, error))
    return paths


def test_a_unit_is_named_after_what_was_run_and_says_where_it_came_from(tmp_path: Path) -> None:
    root = str(tmp_path / "private" / "photos")
    config = RunConfig(
        data="folder", root=root, method="erm", epochs=3, set=Overrides(alpha=1.0), pretrained=False, seed=4
    )
    run_dir = finish_run(replace(config, out=str(tmp_path / "run")), 0.25)
    path = write_unit(run_dir, tmp_path / "results")
    name = path.relative_to(tmp_path / "results").as_posix()
    assert re.fullmatch(r"units/digits/resnet32-8px-if5-3ep-clean-[0-9a-f]{6}/ce-[0-9a-f]{6}-seed4\.json", name)
    unit = json.loads(path.read_text())
    assert str(tmp_path) not in path.read_text(), "a unit names no place on a machine"
    assert unit["commit"] == unit["finished_commit"] == "abc123"
    assert unit["device"] == "a processor"
    assert unit["config_hash"] == json.loads((run_dir / "result.json").read_text())["hash"]
    assert unit["data"]["splits"] == SPLITS
    assert unit["evaluation"]["per_class_accuracy"] == [0.75, 0.75]
    assert "confusion" not in unit["evaluation"]
    assert unit["command"].startswith("otmix train --data folder --root DIR --image-size 8 --method ce --set.alpha 1.0")
    assert "--no-pretrained" in unit["command"]
    assert write_unit(run_dir, tmp_path / "results") == path
    assert len(read_units(tmp_path / "results")) == 1


def test_the_place_of_the_data_does_not_change_the_name(tmp_path: Path) -> None:
    paths = set()
    for place in ("a", "b"):
        config = RunConfig(data="folder", root=str(tmp_path / place), epochs=3, out=str(tmp_path / f"run-{place}"))
        paths.add(write_unit(finish_run(config, 0.25), tmp_path / "results"))
    assert len(paths) == 1


def test_every_setting_that_matters_changes_the_name(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"lr": 0.05},
        {"protocol": "paper"},
        {"set": Overrides(alpha=1.0)},
        {"seed": 1},
        {"method": "cmo"},
    ]
    paths = set()
    for i, change in enumerate(changes):
        run_dir = finish_run(replace(BASE, out=str(tmp_path / f"run{i}"), **change), 0.25)
        paths.add(write_unit(run_dir, tmp_path / "results"))
    assert len(paths) == len(changes)


def test_runs_from_other_weights_are_other_units(tmp_path: Path) -> None:
    begun = [None, {"weights": "aa"}, {"weights": "bb"}, {}]
    for i, held in enumerate(begun):
        config = replace(BASE, method="erm", weights=None if held is None else "w.pt", out=str(tmp_path / f"run{i}"))
        write_unit(finish_run(config, 0.25, environment={"inputs": held or {}}), tmp_path)
    units = read_units(tmp_path)
    assert {unit["config"].get("weights") for unit in units} == {None, "aa", "bb", "unknown"}
    table = results_table(units)
    assert table.count("| ERM † |") == len(begun)
    assert "weights bb" in table


def test_a_unit_of_other_images_is_not_replaced(tmp_path: Path) -> None:
    config = replace(BASE, out=str(tmp_path / "run"))
    path = write_unit(finish_run(config, 0.25), tmp_path)
    before = path.read_text()
    other = finish_run(config, 0.3, SPLITS | {"train": {"images": 120, "sha256": "cc"}})
    with pytest.raises(UserError, match=r"holds a run on other images .* --data-title, or remove the file"):
        write_unit(other, tmp_path)
    assert path.read_text() == before
    assert write_unit(other, tmp_path, data_title="Other digits") != path


def test_the_command_of_a_unit_makes_the_run_again_under_todays_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = replace(BASE, method="focal+otmix", set=Overrides(alpha=1.0, parts={"loss.gamma": 2.0}))
    run_dir = finish_run(replace(then, out=str(tmp_path / "then")), 0.25)
    clean = replace(PROTOCOLS["clean"], foreground_r=0.25, keep_diagonal=not PROTOCOLS["clean"].keep_diagonal)
    monkeypatch.setitem(PROTOCOLS, "clean", clean)
    unit = json.loads(write_unit(run_dir, tmp_path).read_text())
    words = shlex.split(unit["command"])
    assert words[:2] == ["otmix", "train"]
    config = parse("train", COMMANDS["train"], words[2:]).named["config"]
    assert effective_settings(config) == unit["settings"]
    assert unit["config"]["set"] == {"alpha": 1.0, "loss.gamma": 2.0}, "what was changed then"


def test_a_jpeg_copy_of_cifar10_is_marked(tmp_path: Path) -> None:
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    data = {"name": "data", "class_names": names, "counts": list(range(1000, 0, -100)), "splits": SPLITS}
    run_dir = finish_run(RunConfig(data="folder", root="data", epochs=1, out=str(tmp_path / "a")), 0.3, data=data)
    assert "/cifar-10-jpeg-copy/" in write_unit(run_dir, tmp_path).as_posix()
    assert "### CIFAR-10 (JPEG copy), imbalance 10," in results_table(read_units(tmp_path))
    # the same tree may also be named as the root of --data cifar10: then the loader's own mark counts
    tree = {**data, "name": "CIFAR-10 (JPEG copy)"}
    as_cifar = finish_run(RunConfig(data="cifar10", epochs=1, seed=2, out=str(tmp_path / "b")), 0.3, data=tree)
    assert "/cifar-10-jpeg-copy/" in write_unit(as_cifar, tmp_path).as_posix()
    original = {**data, "name": "CIFAR-10"}
    archive = finish_run(RunConfig(data="cifar10", epochs=1, seed=1, out=str(tmp_path / "c")), 0.3, data=original)
    assert "/cifar-10/" in write_unit(archive, tmp_path).as_posix()
    assert results_table(read_units(tmp_path)).count("### ") == 2


def test_a_unit_names_no_folder(tmp_path: Path) -> None:
    changed = Overrides(confusion_run=str(tmp_path / "deep" / "teacher"), parts={"loss.tau": 2.0})
    config = replace(BASE, method="logit-adjustment+otmix", set=changed, out=str(tmp_path / "a"))
    text = write_unit(finish_run(config, 0.3), tmp_path / "results").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["config"]["set"] == {"confusion_run": "teacher", "loss.tau": 2.0}
    assert "--set.confusion_run teacher --set.loss.tau 2.0" in json.loads(text)["command"]
    assert json.loads(text)["settings"]["confusion_run"] == "teacher"


def test_a_table_says_by_todays_defaults_what_a_run_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = replace(BASE, method="otmix", out=str(tmp_path / "then"))
    write_unit(finish_run(then, 0.25), tmp_path)
    monkeypatch.setitem(PROTOCOLS, "clean", replace(PROTOCOLS["clean"], foreground_r=0.25))
    write_unit(finish_run(replace(then, out=str(tmp_path / "now")), 0.20), tmp_path)
    lines = [line.split(" | ")[1:4] for line in results_table(read_units(tmp_path)).splitlines() if "OTmix" in line]
    assert lines == [["clean", "1", "20.00"], ["clean; foreground_r 0.0", "1", "25.00"]]


def test_settings_of_another_methods_part_leave_a_run_as_it_is(tmp_path: Path) -> None:
    """`compare logit-adjustment ce+remix --set.loss.tau 2` gives tau to the one that has it; the other is as ever."""
    base = replace(BASE, set=Overrides(omega=0.5, parts={"loss.tau": 2}))
    for method, has in (("logit-adjustment", True), ("ce+remix", False)):
        config = _config(base, parse_method(method), 0, tmp_path)
        assert config.set.parts == ({"loss.tau": 2.0} if has else {})
        assert (config.hash == replace(BASE, method=method).hash) == (not has)


def test_an_unfinished_run_is_no_unit(tmp_path: Path) -> None:
    run_dir = finish_run(replace(BASE, out=str(tmp_path / "a")), 0.3)
    (run_dir / "result.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        write_unit(run_dir, tmp_path)
    write_json(tmp_path / "units" / "x.json", {"a": 1})
    with pytest.raises(UserError, match=r"x\.json is not a unit file"):
        read_units(tmp_path)


def test_the_table_by_hand(tmp_path: Path) -> None:
    for run_dir in unit_runs(tmp_path):
        write_unit(run_dir, tmp_path)
    official = replace(
        BASE, method="cmo", protocol="official", set=Overrides(alpha=1.0), out=str(tmp_path / "runs" / "official")
    )
    write_unit(finish_run(official, 0.2, looks_at_test=True), tmp_path)
    units = read_units(tmp_path)
    text = results_table(units)
    lines = [line.replace(" ± ", "±") for line in text.splitlines() if line[:2] == "| " and line[:3] != "| -"]
    assert lines == [
        "| method | protocol | seeds | error % | many % | medium % | few % | balanced acc. % | ECE % | s/epoch |",
        "| ERM | clean | 3 | 31.00±1.00 | 15.50±0.50 | 31.00±1.00 | – | 69.00±1.00 | 3.10±0.10 | 2.00 |",
        "| ERM + CMO | clean | 3 | 29.33±3.21 | 14.67±1.61 | 29.33±3.21 | – | 70.67±3.21 | 2.93±0.32 | 2.00 |",
        "| ERM + CMO † ‡ | official; alpha 1.0 | 1 | 20.00 | 10.00 | 20.00 | – | 80.00 | 2.00 | 2.00 |",
    ]
    assert text.startswith("### digits, imbalance 5, resnet8, 8 px, 3 epochs\n")
    assert "† one seed: it carries no ranking." in text
    assert "‡ looks at the test set" in text
    assert "Images: train 120, test 50 (data " in text
    assert "Source: abc123." in text
    random.Random(0).shuffle(units)
    assert results_table(units) == text


def test_other_recipes_stand_in_other_tables(tmp_path: Path) -> None:
    for i, change in enumerate(({}, {"lr": 0.05}, {"final_split": "validation"})):
        write_unit(finish_run(replace(BASE, out=str(tmp_path / f"r{i}"), **change), 0.3), tmp_path)
    text = results_table(read_units(tmp_path))
    assert text.count("### ") == 3
    assert "measured on the validation split" in text
    assert "lr 0.05" in text


def test_seconds_of_different_devices_are_not_averaged(tmp_path: Path) -> None:
    for seed, device in ((0, "a processor"), (1, "a GPU")):
        run_dir = finish_run(
            replace(BASE, seed=seed, out=str(tmp_path / f"r{seed}")), 0.3, environment={"device": device}
        )
        write_unit(run_dir, tmp_path)
    assert "| – |" in results_table(read_units(tmp_path)).splitlines()[4][-6:]


def test_a_run_that_ended_on_another_device_says_so(tmp_path: Path) -> None:
    write_unit(finish_run(replace(BASE, out=str(tmp_path / "moved")), 0.3, device="a GPU"), tmp_path)
    text = results_table(read_units(tmp_path))
    assert "Device: a GPU, a processor." in text
    assert text.splitlines()[4].endswith("| – |")


def test_a_shot_group_that_one_seed_lacks_has_no_mean(tmp_path: Path) -> None:
    for seed, few in ((0, 0.5), (1, None)):
        groups = {"many": 0.2, "medium": 0.3, "few": few}
        config = replace(BASE, seed=seed, out=str(tmp_path / f"r{seed}"))
        write_unit(finish_run(config, 0.3, evaluation={"group_error": groups}), tmp_path)
    cells = results_table(read_units(tmp_path)).splitlines()[4].split(" | ")
    assert cells[4:7] == ["20.00 ± 0.00", "30.00 ± 0.00", "–"]


def test_units_that_saw_other_images_are_not_put_into_one_line(tmp_path: Path) -> None:
    for seed, digest in ((0, "x"), (1, "y")):
        splits = {"train": {"images": 9, "sha256": digest}}
        write_unit(finish_run(replace(BASE, seed=seed, out=str(tmp_path / f"r{seed}")), 0.3, splits), tmp_path)
    assert "each seed has its own split" in results_table(read_units(tmp_path))
    other = {"train": {"images": 9, "sha256": "z"}}
    write_unit(finish_run(replace(BASE, method="cmo", seed=1, out=str(tmp_path / "other")), 0.3, other), tmp_path)
    with pytest.raises(UserError, match="did not see the same images"):
        results_table(read_units(tmp_path))


def test_a_table_names_the_commit_that_a_run_was_resumed_with_too(tmp_path: Path) -> None:
    config = replace(BASE, method="erm", out=str(tmp_path / "runs" / "one"))
    write_unit(finish_run(config, 0.2, commit="def456"), tmp_path)
    assert "Source: abc123, def456." in results_table(read_units(tmp_path))


def test_a_region_is_filled_and_filling_it_again_changes_nothing() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = fill_region(text, "| a |\n")
    assert once == f"before\n{BEGIN}\n\n| a |\n\n{END}\nafter\n"
    assert fill_region(once, "| a |\n") == once


def test_a_region_for_defaults_leaves_out_what_was_changed(tmp_path: Path) -> None:
    for seed, settings in enumerate((Overrides(), Overrides(alpha=1.0))):
        config = replace(BASE, method="cmo", seed=seed, set=settings, out=str(tmp_path / "runs" / str(seed)))
        write_unit(finish_run(config, 0.2), tmp_path)
    units = read_units(tmp_path)
    both = fill_tables(f"{BEGIN}\n{END}", units)
    usual = fill_tables(f"{BEGIN_DEFAULTS}\n{END}", units)
    assert "alpha 1.0" in both
    assert "alpha 1.0" not in usual
    assert usual.count("| ERM + CMO") == 1
    assert fill_tables(usual, units) == usual


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_file_without_the_marks_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="once each"):
        fill_region(text, "x")


def test_the_command_adds_units_and_fills_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Results\n\n{BEGIN}\n{END}\n\nThe end.\n")
    runs = [str(path) for path in unit_runs(tmp_path)]
    results = tmp_path / "results"
    assert main([str(results), "--add", *runs, "--readme", str(readme)]) == 0
    first = readme.read_text()
    assert "31.00 ± 1.00" in first
    assert first.endswith(f"{END}\n\nThe end.\n")
    assert len(read_units(results)) == 6
    assert main([str(results), "--readme", str(readme)]) == 0
    assert readme.read_text() == first
    capsys.readouterr()
    assert main([str(results)]) == 0
    assert "31.00 ± 1.00" in capsys.readouterr().out
    assert main([str(results), "--readme", str(tmp_path / "missing.md")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_committed_tables_are_those_of_the_committed_units(name: str) -> None:
    repository = Path(__file__).parents[1]
    path = repository / name
    if not path.is_file() or END not in path.read_text(encoding="utf-8"):
        pytest.skip(f"{name} has no table of results")
    text = path.read_text(encoding="utf-8")
    assert fill_tables(text, read_units(repository / "results")) == text


def test_the_picture_has_the_losses_that_were_trained_alone_and_with_a_mixer(tmp_path: Path) -> None:
    for method, seed, error in (
        ("erm", 0, 0.4),
        ("erm", 1, 0.5),
        ("otmix", 0, 0.3),
        ("balms", 0, 0.35),
        ("balms+cmo", 0, 0.25),
        ("focal", 0, 0.2),  # alone only
        ("ldam+otmix", 0, 0.2),  # not alone
        ("focal+mixup", 0, 0.2),  # neither CMO nor OTmix
    ):
        config = replace(BASE, method=method, seed=seed, out=str(tmp_path / "runs" / f"{method}-{seed}"))
        write_unit(finish_run(config, error), tmp_path)
    changed = replace(BASE, method="otmix", seed=1, set=Overrides(alpha=1.0), out=str(tmp_path / "runs" / "alpha"))
    write_unit(finish_run(changed, 0.9), tmp_path)
    official = replace(BASE, method="otmix", seed=2, protocol="official", out=str(tmp_path / "runs" / "official"))
    write_unit(finish_run(official, 0.9), tmp_path)
    (axes,) = results_picture(read_units(tmp_path)).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["ERM", "BALMS"]
    assert sorted(text.get_text() for text in axes.texts) == ["25.0", "30.0", "35.0", "45.0"]
    drawn = sorted(float(y) for dots in axes.collections for _, y in np.asarray(dots.get_offsets()))
    np.testing.assert_allclose(drawn, [25, 30, 35, 40, 50])


def test_a_setting_with_one_loss_is_drawn_where_all_three_have_seeds(tmp_path: Path) -> None:
    for method in ("erm", "cmo", "otmix"):
        for seed in range(3):
            if (method, seed) != ("otmix", 2):
                write_unit(
                    finish_run(replace(BASE, method=method, seed=seed, out=str(tmp_path / f"{method}-{seed}")), 0.3),
                    tmp_path,
                )
    with pytest.raises(UserError, match="nothing to draw"):
        results_picture(read_units(tmp_path))
    write_unit(finish_run(replace(BASE, method="otmix", seed=2, out=str(tmp_path / "last")), 0.3), tmp_path)
    (axes,) = results_picture(read_units(tmp_path)).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["ERM"]


def test_thresholds_of_shot_groups_are_in_command_and_recipe(tmp_path: Path) -> None:
    few = write_unit(finish_run(replace(BASE, few_below=21, out=str(tmp_path / "a")), 0.3), tmp_path)
    usual = write_unit(finish_run(replace(BASE, out=str(tmp_path / "b")), 0.3), tmp_path)
    assert "--few-below 21" in json.loads(few.read_text())["command"]
    assert "--few-below" not in json.loads(usual.read_text())["command"]
    tables = results_table(read_units(tmp_path)).split("### ")[1:]
    assert sorted("few_below 21" in table for table in tables) == [False, True]


def test_units_of_ones_own_loss_need_its_file_and_disturb_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "my_loss.py"
    source.write_text(
        "from otmix import register_loss\nfrom otmix.losses import CrossEntropy\n"
        "@register_loss('unit-mine')\nclass Mine(CrossEntropy):\n    pass\n"
    )
    for method in ("erm", "otmix", "balms", "balms+cmo"):
        write_unit(finish_run(replace(BASE, method=method, out=str(tmp_path / "runs" / method)), 0.3), tmp_path)
    import_files([source])
    own = finish_run(replace(BASE, method="unit-mine", out=str(tmp_path / "own")), 0.3)
    try:
        LOSSES.pop("unit-mine")
        assert main([str(tmp_path), "--add", str(own)]) == 2
        assert "unit-mine" in capsys.readouterr().err
        other = source.rename(tmp_path / "as_in_another_process.py")  # a file is loaded once in each
        assert main([str(tmp_path), "--import", str(other), "--add", str(own)]) == 0
    finally:
        LOSSES.pop("unit-mine", None)
    assert main([str(tmp_path), "--picture", str(tmp_path / "results.png")]) == 0
    with Image.open(tmp_path / "results.png") as drawn:
        assert drawn.info["Description"].startswith("4 runs, ")


def test_the_command_draws_a_picture_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "results.png"
    assert main([str(tmp_path / "none"), "--picture", str(picture)]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    assert not picture.exists()
    for method in ("erm", "otmix", "balms", "balms+cmo"):
        write_unit(finish_run(replace(BASE, method=method, out=str(tmp_path / "runs" / method)), 0.3), tmp_path)
    assert main([str(tmp_path), "--picture", str(picture)]) == 0
    with Image.open(picture) as drawn:
        assert drawn.info["Description"].startswith("4 runs, ")


def test_the_committed_picture_is_of_the_committed_units() -> None:
    repository = Path(__file__).parents[1]
    with Image.open(repository / "docs" / "results.png") as drawn:
        assert drawn.info["Description"] == results_picture(read_units(repository / "results")).get_label()


def test_recorded_configurations_can_be_read_back(tmp_path: Path) -> None:
    run_dir = finish_run(replace(BASE, set=Overrides(alpha=1.0), out=str(tmp_path / "a")), 0.3)
    assert read_config(run_dir).set == Overrides(alpha=1.0)
