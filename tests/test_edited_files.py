"""Files that somebody has edited, or another version has written: configurations, and the records of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from otmix.cli import COMMANDS, main
from otmix.cli.parsing import parse
from otmix.config import RANGES, RunConfig
from otmix.files import read_object, write_json
from otmix.training.records import read_config
from test_cli import config_file, config_of
from test_resume import contents


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edited") / "run"
    argv = ["--method", "logit-adjustment+otmix", "--max-per-class", "20", "--epochs", "1", "--accelerator", "cpu"]
    assert main(["train", *argv, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("L", (8, 8), 80).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def commands_on(run: Path, picture: Path) -> dict[str, list[str]]:
    return {
        "evaluate": ["evaluate", str(run), "--accelerator", "cpu"],
        "predict": ["predict", str(run), str(picture), "--accelerator", "cpu"],
        "resume": ["train", "--resume", "--out", str(run)],
        "preview": ["preview", "--run", str(run), "--out", str(run.parent / "preview.png")],
    }


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends in exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2, argv
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.splitlines()
    # what was begun before may have said something
    assert [line for line in said if line.startswith("otmix: ")] == said[-1:], captured.err
    assert len(said[-1]) < 600, said[-1]
    return said[-1]


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")


# --- config.yaml of a run


def test_numbers_may_be_written_as_on_the_command_line(
    run: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run / "config.yaml", "lr: 0.1\n", "lr: 1e-1\n")  # to YAML a text
    for argv in commands_on(run, picture).values():
        assert main(argv) == 0
    assert read_config(run).lr == 0.1


EDITS = {
    "text for a whole number": ("epochs: 1\n", 'epochs: "two"\n', "must be a whole number, it is two"),
    "number for the method": ("method: logit-adjustment+otmix", "method: 5", "must be a text, it is 5"),
    "number for a folder": ("root: null", "root: 3", "must be a text, it is 3"),
    "list for the settings": ("set: {}", "set: [1]", "must hold settings of the protocol"),
    "nothing for the backbone": ("backbone: resnet8", "backbone: null", "is damaged: it lacks backbone"),
    "fraction for the seed": ("seed: 0", "seed: 1.5", "must be a whole number, it is 1.5"),
    "truth for the seed": ("seed: 0", "seed: true", "must be a whole number, it is True"),
    "key twice": ("epochs: 1\n", "epochs: 1\nepochs: 3\n", "sets epochs twice, in line"),
    "key of another version": ("seed: 0", "seed: 0\nzzz: 4", "was made by another version of otmix (its config.yaml"),
    "setting of another version": ("set: {}", "set: {zzz: 4}", "has the setting set.zzz, which is unknown here)"),
}


@pytest.mark.parametrize(("old", "new", "said"), EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("command", ["evaluate", "predict", "resume", "preview"])
def test_an_edited_configuration_of_a_run(
    command: str, old: str, new: str, said: str, run: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run / "config.yaml", old, new)
    before = contents(run)
    sentence = refused(commands_on(run, picture)[command], capsys)
    assert said in sentence
    assert str(run) in sentence
    assert "config.yaml" in sentence
    assert contents(run) == before


def test_a_configuration_that_is_out_of_range_names_its_file(
    run: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run / "config.yaml", "epochs: 1\n", "epochs: 0\n")
    said = refused(commands_on(run, picture)["evaluate"], capsys)
    assert said == f"otmix: {run / 'config.yaml'} is damaged: --epochs must be at least 1, it is 0"


@pytest.mark.parametrize("command", ["evaluate", "predict", "resume", "preview"])
def test_an_empty_configuration_of_a_run(
    command: str, run: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_text("{}", "utf-8")
    assert "config.yaml is damaged: it lacks data, method, " in refused(commands_on(run, picture)[command], capsys)


# --- the JSON files of a run


@pytest.mark.parametrize("key", ["zzz", "loss.zzz"])
def test_settings_of_another_version(key: str, run: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads((run / "settings.json").read_text("utf-8"))
    write_json(run / "settings.json", values | {key: 3})
    for command, argv in commands_on(run, picture).items():
        said = refused(argv, capsys)
        if (command, key) != ("resume", "loss.zzz"):  # it names the difference, as of any setting
            assert f"{run} was made by another version of otmix (its settings.json has the setting {key}," in said


@pytest.mark.parametrize(("key", "value"), [("alpha", "four"), ("loss.tau", "much"), ("select", 3)])
def test_a_setting_that_is_none_names_its_file(
    key: str, value: Any, run: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads((run / "settings.json").read_text("utf-8"))
    write_json(run / "settings.json", values | {key: value})
    said = refused(commands_on(run, picture)["evaluate"], capsys)
    assert f"settings.json is damaged: its {key} must be " in said


SHAPES = {
    "data": ["evaluate", "predict", "resume", "preview", "teacher"],
    "environment": ["resume"],
    "result": ["evaluate", "predict", "resume", "preview"],
    "settings": ["evaluate", "predict", "resume", "preview"],
}


@pytest.mark.parametrize("content", ["{}", "[1]", "null", '"x"', "3", "[" * 100_000, '{"a'])
@pytest.mark.parametrize("name", SHAPES)
def test_json_of_another_shape(
    name: str, content: str, run: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / f"{name}.json").write_text(content, "utf-8")
    before = contents(run)
    out = run.parent / "new"
    teacher = ["--set.confusion_run", str(run), "--epochs", "1", "--out", str(out)]
    argvs = commands_on(run, picture) | {"teacher": ["train", *teacher]}
    if (name, content) == ("environment", "{}"):  # older runs have noted less
        assert main(argvs["resume"]) == 0
        return
    for command in SHAPES[name]:
        said = refused(argvs[command], capsys)
        assert f"{run / name}.json is " in said
        assert "restore it, or repeat the run" in said
    assert contents(run) == before
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("data", {"counts": None}, "its counts is not what otmix writes there"),
        ("data", {"counts": ["many"]}, "its counts is not"),
        ("data", {"counts": [10**30] * 10}, "its counts is not"),
        ("data", {"counts": [3]}, "it has 1 count of images for 10 names of classes"),
        ("data", {"small": 1}, "its small is not"),
        ("data", {"channels": True}, "its channels is not"),
        ("data", {"mean": "x"}, "its mean is not"),
        ("data", {"splits": [3]}, "its splits is not"),
        ("result", {"evaluation": {}}, "it lacks evaluation.n, evaluation.top1_error"),
        ("result", {"evaluation": 3}, "its evaluation is not"),
        ("result", {"title": None}, "its title is not"),
    ],
)
def test_a_record_in_which_something_is_wrong(
    name: str, changed: dict[str, Any], said: str, run: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / f"{name}.json"
    write_json(file, json.loads(file.read_text("utf-8")) | changed)
    sentence = refused(commands_on(run, picture)["evaluate"], capsys)
    assert f"{file} is damaged: {said}" in sentence


def test_inputs_of_another_shape(run: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "environment.json"
    write_json(file, json.loads(file.read_text("utf-8")) | {"inputs": 3})
    assert f"{file} is damaged: its inputs is not" in refused(commands_on(run, picture)["resume"], capsys)


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1, "b": [1, 2.5], "more": None})
    assert read_object(tmp_path / "a.json", {"a": float, "b": list[float]})["b"] == [1, 2.5]


# --- configuration files


def test_paths_in_a_file_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = "root: ~/photos\nout: ~/run\nweights: ~nobody-of-this-name/w.pt\nset: {confusion_run: ~/teacher}\n"
    config = config_of("--config", str(config_file(tmp_path, text)))
    assert (config.root, config.out, config.weights) == ("/home/me/photos", "/home/me/run", "~nobody-of-this-name/w.pt")
    assert config.set.confusion_run == "/home/me/teacher"
    assert config_of("--set.confusion_run=~/teacher").set.confusion_run == "/home/me/teacher"
    argv = ["erm", "--config", str(config_file(tmp_path, "runs: ~/runs\n"))]
    assert parse("compare", COMMANDS["compare"], argv).named["runs"] == Path("/home/me/runs")


SLIPS = {
    "key twice": ("epochs: 2\nlr: 1\nepochs: 3\n", "sets epochs twice, in line 1 and in line 3; keep one of them"),
    "setting twice": ("set:\n  alpha: 2\n  alpha: 3\n", "sets alpha twice, in line 2 and in line 3"),
    "to the base of 60": ("epochs: 2\nlr: 1:30\n", "has 1:30 in line 2, which is 90 in YAML; write the number that"),
    "a text to the base of 60": ("root: 1:30\n", "put a text in quotes"),
    "to the base of 8": ("epochs: 010\n", "has 010 in line 1, which is 8 in YAML"),
    "no date": ("epochs: 2020-99-99\n", "is not YAML: month must be in"),
    "brackets without end": ("epochs: " + "[" * 5000, "is not YAML"),
    "two spellings": ("set.alpha: 2\nset: {alpha: 3}\n", "sets set.alpha twice, in two spellings"),
    "setting at the top": ("alpha: 2\n", "sets alpha, which does not exist; did you mean set.alpha?"),
    "part at the top": ("loss.tau: 2\n", "sets loss.tau, which does not exist; did you mean set.loss.tau?"),
    "a part": ("set: {loss: 2}\n", "sets set.loss, which does not exist; the settings of a part"),
    "misspelt at the top": ("set.alhpa: 2\n", "sets set.alhpa, which does not exist; did you mean set.alpha?"),
    "huge": ("epochs: 99999999999999999999\n", "must be a whole number below 2^63, it is 9999999999"),
}


@pytest.mark.parametrize(("text", "said"), SLIPS.values(), ids=SLIPS.keys())
def test_slips_of_yaml(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config_file(tmp_path, text)
    sentence = refused(["train", "--config", str(file), "--print_config"], capsys)
    assert str(file) in sentence
    assert said in sentence


def test_settings_in_every_spelling(tmp_path: Path) -> None:
    flags = ["--method", "logit-adjustment+otmix", "--set.alpha", "2", "--set.loss.tau", "3"]
    for text in (
        "set: {alpha: 2, loss.tau: 3}",
        "set: {alpha: 2, loss: {tau: 3}}",
        "set.alpha: 2\nset.loss.tau: 3",
        "set.alpha: 2\nset: {loss: {tau: 3}}",
    ):
        file = config_file(tmp_path, f"method: logit-adjustment+otmix\n{text}\n")
        assert config_of("--config", str(file)) == config_of(*flags)


def test_a_merged_mapping_is_no_key_twice(tmp_path: Path) -> None:
    text = "set: &a {alpha: 2, <<: {alpha: 3, omega: 0.5}}\n"
    assert config_of("--config", str(config_file(tmp_path, text))).set.to_dict() == {"alpha": 2.0, "omega": 0.5}


@pytest.mark.parametrize("argv", [["--lr", "1:30"], ["--set.loss.tau", "1:30"], ["--set.alpha", "1:30"]])
def test_a_flag_is_no_number_to_the_base_of_60(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["train", "--method", "logit-adjustment+otmix", *argv, "--print_config"], capsys)
    assert said.startswith(f"otmix: {argv[0]} must be a ")
    assert said.partition(";")[0].endswith("it is 1:30")


# --- numbers that no machine has


@pytest.mark.parametrize("name", RANGES)
def test_huge_numbers_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = f"--{name.replace('_', '-')}"
    for value in (10**20, RANGES[name][1] + 1):
        said = refused(["train", flag, str(value), "--out", str(tmp_path / "run")], capsys)
        assert said == f"otmix: {flag} must be at most {RANGES[name][1]}, it is {value}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--set.confusion_per_class", str(10**20)], "--set.confusion_per_class must be a whole number below"),
        (["train", "--method", "ride", "--set.model.experts", str(10**20)], "--set.model.experts must be a whole"),
        (["train", "--seed", str(10**20)], "--seed must be a whole number from 0 to"),
        (["compare", "erm", "--seeds", str(10**20)], "--seeds 100000000000000000000 are more than anybody can train"),
        (["compare", "erm", "--jobs", str(10**20)], "--jobs 100000000000000000000 is too many"),
        (["predict", "nowhere", "x.png", "--top", "0"], "--top and --batch-size must be at least 1"),
    ],
)
def test_other_huge_numbers(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(argv, capsys)


def test_a_ratio_that_no_data_has_leaves_one_image_of_each_rare_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--imbalance", "1e308"]) == 0
    assert "1 in the smallest" in capsys.readouterr().out


def test_huge_numbers_of_predict(finished: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--top", str(10**20), "--batch-size", str(10**20), "--accelerator", "cpu"]
    assert main(["predict", str(finished), str(picture), *argv]) == 0
    assert "probability_10" in capsys.readouterr().out


# --- what evaluate prints


def test_evaluate_names_the_classes(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished), "--json", "--accelerator", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["class_names"] == json.loads((finished / "data.json").read_text("utf-8"))["class_names"]
    assert len(printed["class_names"]) == len(printed["per_class_accuracy"])


def test_what_a_run_records_is_what_is_read(finished: Path) -> None:
    values = yaml.safe_load((finished / "config.yaml").read_text("utf-8"))
    assert read_config(finished) == RunConfig.from_dict(values)
