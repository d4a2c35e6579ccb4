"""The command line: flags, files, messages and exit codes; then each command once on a real run of a few steps."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import otmix
from otmix.cli import COMMANDS, commands, main
from otmix.cli.arguments import GROUPS, Argument, arguments_of
from otmix.cli.help import overview, page
from otmix.cli.parsing import Call, parse
from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.protocols import Overrides, Protocol

FLAGS = [argument for argument in arguments_of(commands.train) if argument.key != "imports"]


def config_of(*argv: str, command: str = "train") -> RunConfig:
    config = parse(command, COMMANDS[command], argv).named["config"]
    assert isinstance(config, RunConfig)
    return config


def config_file(folder: Path, values: object, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values), "utf-8")
    return file


def changed_value(argument: Argument) -> Any:
    """A legal value that is not the default."""
    if argument.choices:
        return next(choice for choice in argument.choices if choice != argument.default)
    if argument.bare is bool:
        return argument.default is not True
    return {int: 30, float: 0.5 if argument.key != "imbalance" else 2.5, str: "somewhere"}[argument.bare]


def get(config: RunConfig, key: str) -> Any:
    return getattr(config.set, key[4:]) if key.startswith("set.") else getattr(config, key)


# --- flags and files


def test_help_groups_hold_every_field_once() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(f.name for f in fields(RunConfig))


def test_every_setting_of_the_protocol_is_a_flag() -> None:
    assert {a.key for a in FLAGS if a.key.startswith("set.")} == {f"set.{f.name}" for f in fields(Protocol)}


@pytest.mark.parametrize("argument", FLAGS, ids=lambda argument: argument.key)
def test_flag_in_both_spellings_and_in_a_file(argument: Argument, tmp_path: Path) -> None:
    value = changed_value(argument)
    if argument.switch:
        words = [argument.option if value else "--no-" + argument.option[2:]]
    else:
        words = [argument.option, str(value).lower() if isinstance(value, bool) else str(value)]
    typed = config_of(*words)
    assert get(typed, argument.key) == value
    assert get(RunConfig(), argument.key) != value
    assert config_of(words[0].replace("_", "-"), *words[1:]) == typed
    assert config_of("--" + words[0][2:].replace("-", "_"), *words[1:]) == typed
    if not argument.switch:
        assert config_of("=".join(words)) == typed
    nested = {"set": {argument.key[4:]: value}} if argument.key.startswith("set.") else {argument.key: value}
    assert config_of("--config", str(config_file(tmp_path, nested))) == typed


def values_for(hint: Any) -> st.SearchStrategy[Any]:
    if members := [member for member in get_args(hint) if isinstance(member, str)]:
        return st.sampled_from(members)
    if type(None) in get_args(hint):
        return st.none() | st.one_of(*(values_for(member) for member in get_args(hint) if member is not type(None)))
    # YAML reads a lone # or ~, and null, as nothing, and so does jsonargparse where nothing is allowed
    letters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="#~")
    text = st.text(letters, min_size=1, max_size=8).filter(lambda drawn: drawn.lower() != "null")
    numbers = st.floats(1e-6, 1e6, allow_nan=False)
    return {bool: st.booleans(), int: st.integers(4, 10**6), float: numbers, str: text}[hint]


CONFIGS = st.fixed_dictionaries(
    {
        f.name: values_for(get_type_hints(RunConfig)[f.name])
        for f in fields(RunConfig)
        if f.name not in ("set", "warmup")
    }
    | {
        "set": st.fixed_dictionaries(
            {}, optional={"alpha": st.floats(0.1, 9), "box": st.sampled_from(["exact", "clipped"])}
        )
    }
    | {"imbalance": st.none() | st.floats(1, 1e4), "warmup": st.floats(0, 0.99), "test_fraction": st.floats(0.01, 0.99)}
    | {"many_above": st.integers(100, 200), "few_below": st.integers(4, 100)}
    | {"image_size": st.none() | st.integers(4, 2**14), "workers": st.integers(0, 512), "devices": st.integers(1, 1024)}
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=CONFIGS)
def test_record_of_a_run_is_a_configuration_file(values: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.from_dict(values)
    assert config_of("--config", str(config_file(tmp_path, config.to_dict()))) == config


def test_printed_configuration_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "cmo", "--lr", "1e-3", "--no-pretrained", "--set.alpha", "1", "--root", "a b", "--resume"]
    assert main(["train", *flags, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert config_of("--config", str(config_file(tmp_path, printed))) == config_of(*flags)
    assert config_of(*flags) == RunConfig(
        method="cmo", lr=1e-3, pretrained=False, set=Overrides(alpha=1.0), root="a b", resume=True
    )


def test_a_comparison_reads_its_own_flags_from_a_file_and_prints_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(config_file(tmp_path, "seeds: 2\njobs: 3\nepochs: 1\nruns: some/where\n"))
    named = parse("compare", COMMANDS["compare"], ["erm", "--config", file, "--jobs", "4"]).named
    assert (named["seeds"], named["jobs"], named["runs"]) == (2, 4, Path("some/where"))
    assert main(["compare", "erm", "cmo", "--config", file, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seeds"] == 2
    assert printed["runs"] == "some/where"
    assert not {"method", "out", "resume"} & printed.keys()
    again = str(config_file(tmp_path, printed, "again.yaml"))
    assert parse("compare", COMMANDS["compare"], ["erm", "--config", again]).named["jobs"] == 3


def test_set_without_a_name_says_how_it_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--set", "alpha=1"]) == 2
    assert "--set.alpha 1" in capsys.readouterr().err


def test_flags_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    first = config_file(tmp_path, "epochs: 3\nlr: 1e-4\nset: {alpha: 2}\n", "first.yaml")
    second = config_file(tmp_path, "lr: 2\nset: {box: clipped}\n", "second.yaml")
    found = config_of("--epochs", "5", "--config", str(first), f"--config={second}")
    assert (found.epochs, found.lr, found.set.alpha, found.set.box) == (5, 2.0, 2.0, "clipped")
    assert config_of("--config", str(first)).lr == 1e-4  # which YAML itself takes for a text


def test_resuming_means_the_settings_of_that_run(tmp_path: Path) -> None:
    recorded = RunConfig(method="ce+cmo", epochs=3, set=Overrides(alpha=2.0), out="elsewhere")
    config_file(tmp_path, recorded.to_dict(), "config.yaml")
    resumed = config_of("--resume", "--out", str(tmp_path))
    assert (resumed.method, resumed.epochs, resumed.set.alpha) == ("ce+cmo", 3, 2.0)
    assert (resumed.out, resumed.resume) == (str(tmp_path), True)
    assert config_of("--resume", f"--out={tmp_path}", "--epochs", "4").epochs == 4
    assert config_of("--out", str(tmp_path)).epochs is None
    other = config_file(tmp_path, {"epochs": 9}, "other.yaml")
    assert config_of("--resume", "--out", str(tmp_path), "--config", str(other)) == RunConfig(
        epochs=9, out=str(tmp_path), resume=True
    )
    assert config_of("--run", str(tmp_path), command="preview").set.alpha == 2.0


def test_files_may_hold_what_other_commands_need(tmp_path: Path) -> None:
    file = config_file(tmp_path, RunConfig(data="cifar10", imbalance=50, epochs=3, method="cmo", out="x").to_dict())
    assert config_of("--config", str(file), command="data") == RunConfig(data="cifar10", imbalance=50)
    call = parse("compare", COMMANDS["compare"], ["erm", "otmix", "--config", str(file), "--seeds", "5"])
    assert call.positional == (["erm", "otmix"],)
    assert call.named["seeds"] == 5
    assert call.named["config"] == RunConfig(data="cifar10", imbalance=50, epochs=3)
    out = parse("preview", COMMANDS["preview"], ["--config", str(file)]).named["out"]
    assert out == Path("preview.png")


def test_preview_reads_the_name_of_its_picture_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def picture(values: object, *argv: str) -> Path:
        call = parse("preview", COMMANDS["preview"], ["--config", str(config_file(tmp_path, values)), *argv])
        return Path(call.named["out"])

    assert picture("seed: 1\nout: mixes.png\n") == Path("mixes.png")
    assert picture("out: mixes.png\n", "--out", "other.png") == Path("other.png")
    assert picture("epochs: 3\nout: runs/a\n") == Path("preview.png"), "the folder of a run to come"
    record = RunConfig(data="cifar10", out="runs/a.png").to_dict()
    assert picture(record) == Path("preview.png"), "the folder of a run"
    assert picture({key: value for key, value in record.items() if key != "few_below"}) == Path("preview.png")
    for argv in (["--out", "b/mixes.png"], []):
        assert main(["preview", *argv, "--seed", "3", "--print_config"]) == 0
        printed = capsys.readouterr().out
        again = parse("preview", COMMANDS["preview"], ["--config", str(config_file(tmp_path, printed))])
        assert again == parse("preview", COMMANDS["preview"], [*argv, "--seed", "3"])
    with pytest.raises(UserError, match=r"`out` in .* must be a text, it is 3"):
        picture("out: 3\n")


def test_repeatable_flag() -> None:
    call = parse("train", COMMANDS["train"], ["--import", "a.py", "--import=b.py"])
    assert call.named["imports"] == [Path("a.py"), Path("b.py")]
    assert parse("train", COMMANDS["train"], []).named["imports"] == []


def test_a_file_may_name_methods_and_files_to_import(tmp_path: Path) -> None:
    def compared(*argv: str) -> Call:
        return parse("compare", COMMANDS["compare"], argv)

    file = str(config_file(tmp_path, "methods: [erm, cmo]\nimport: [a.py, ~/b.py]\nepochs: 3\n"))
    call = compared("--config", file)
    assert call.positional == (["erm", "cmo"],)
    assert call.named["imports"] == [Path("a.py"), Path("~/b.py").expanduser()]
    call = compared("otmix", "--config", file, "--import", "c.py", "--import", "a.py")
    assert call.positional == (["otmix"],), "those that are typed are meant"
    assert call.named["imports"] == [Path("a.py"), Path("~/b.py").expanduser(), Path("c.py")]
    shown = compared("--config", file, "--print_config").print_config
    assert shown is not None
    assert shown["methods"] == ["erm", "cmo"]
    again = compared("--config", str(config_file(tmp_path, shown, "again.yaml")))
    assert again == compared("--config", file)
    assert "methods" not in (compared("--print_config").print_config or {})
    one = str(config_file(tmp_path, "import: a.py\nimbalance: 3\n", "one.yaml"))
    for command in ("train", "preview"):
        assert parse(command, COMMANDS[command], ["--config", one]).named["imports"] == [Path("a.py")]
    assert config_of("--config", one, command="data").imbalance == 3, "which takes none, but reads the file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: cmo", "`otmix compare` takes several: write `methods: [erm, otmix]` in the file"),
        ("methods: {erm: 1}", "must be a list of texts"),
        ("methods: [1]", "must be a list of texts"),
        ("zzzz: 3", "`otmix compare --print_config` shows all there are"),
        ("methods: []", "`otmix compare` needs METHOD"),
    ],
)
def test_bad_file_of_a_comparison(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--config", str(config_file(tmp_path, text))]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_positionals_and_what_looks_like_a_flag() -> None:
    call = parse("predict", COMMANDS["predict"], ["run", "a.jpg", "--top", "2", "b.jpg", "--", "--c.jpg"])
    assert call.positional == (Path("run"), [Path("a.jpg"), Path("b.jpg"), Path("--c.jpg")])
    assert call.named["top"] == 2


# --- messages


BAD = {
    "no such command": (["trian"], "did you mean `otmix train`?"),
    "no such command at all": (["xyz"], "the commands are train, compare"),
    "flag misspelt": (["train", "--batch-sise", "3"], "has no flag --batch-sise; did you mean --batch-size?"),
    "setting misspelt": (["train", "--set.alpa", "3"], "did you mean --set.alpha?"),
    "abbreviated": (["train", "--epoch", "3"], "did you mean --epochs?"),
    "flag like nothing": (["train", "--zzzz"], "`otmix train --help` lists them"),
    "flag of another command": (["data", "--epochs", "3"], "`otmix data` has no use for --epochs"),
    "compare decides the method": (["compare", "erm", "--method", "cmo"], "has no use for --method"),
    "no whole number": (["train", "--epochs", "x"], "--epochs must be a whole number, it is x"),
    "a fraction": (["train", "--batch-size", "1.5"], "--batch-size must be a whole number, it is 1.5"),
    "no number": (["train", "--lr", "fast"], "--lr must be a number, it is fast"),
    "not a number": (["train", "--lr", "nan"], "--lr must be a number, it is nan"),
    "none of the choices": (["train", "--data", "cifar1"], "must be one of digits, cifar10, cifar100, folder"),
    "choice of a setting": (["train", "--set.box", "round"], "--set.box must be one of exact, clipped"),
    "truth of a setting": (["train", "--set.keep_diagonal", "perhaps"], "must be true or false, it is perhaps"),
    "value missing": (["train", "--lr"], "--lr needs a value"),
    "value missing before a flag": (["train", "--lr", "--resume"], "--lr needs a value"),
    "value missing of config": (["train", "--config"], "--config needs a value"),
    "value of a switch": (["train", "--resume=yes"], "--resume takes no value"),
    "too small": (["train", "--epochs", "0"], "--epochs must be at least 1"),
    "out of range": (["train", "--warmup", "2"], "--warmup is the share"),
    "negative": (["train", "--weight-decay", "-1"], "--weight-decay must be a finite number of at least 0, it is -1.0"),
    "setting out of range": (["train", "--set.epsilon", "0"], "epsilon must be a number of at least"),
    "setting of a part out of range": (
        ["train", "--method", "focal", "--set.loss.gamma", "-1", "--data", "folder", "--root", "nowhere"],
        "needs gamma of at least 0",
    ),
    "stray word": (["train", "photos"], "does not know what to do with photos"),
    "positional missing": (["evaluate"], "`otmix evaluate` needs RUN"),
    "second positional missing": (["predict", "run"], "`otmix predict` needs PATH"),
    "no such method": (["train", "--method", "otmx"], "did you mean otmix"),
    "no such method to compare": (["compare", "erm", "cmoo"], "there is no method named 'cmoo'; did you mean cmo"),
    "setting without effect": (["train", "--method", "cmo", "--set.epsilon", "0.1"], "changes nothing for ce+cmo"),
    "setting without effect on any": (
        ["compare", "erm", "cmo", "--set.omega", "0.1"],
        "changes nothing for ce, ce+cmo",
    ),
    "setting of a part that is no YAML": (
        ["train", "--method", "focal", "--set.loss.gamma", "[1"],
        "--set.loss.gamma must be a plain value, it is [1",
    ),
    "setting of a part that is no date": (
        ["train", "--method", "focal", "--set.loss.gamma", "2020-99-99"],
        "--set.loss.gamma must be a plain value, it is 2020-99-99",
    ),
    "no file to import": (
        ["train", "--import", "nowhere.py"],
        "--import needs a Python file, there is none at nowhere",
    ),
    "no run": (["evaluate", "nowhere"], "nowhere"),
    "no root": (["train", "--data", "folder"], "--root"),
    "no configuration": (["train", "--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("otmix: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


BAD_IMPORTS = {
    "no Python": ("import torch\n\ndef (:\n", "line 3: SyntaxError: invalid syntax"),
    "no text": ("\0", "SyntaxError: source code"),
    "an import that fails": ("import torch\nimport nothing_of_the_kind\n", "line 2: ModuleNotFoundError: No module"),
    "a name that is not there": (
        "from otmix.losses import Nothing\n",
        "line 1: ImportError: cannot import name 'Nothing'",
    ),
    "a file that is not there": ("x = 1\nopen('nowhere.txt')\n", "line 2: FileNotFoundError: "),
    "an error further down": ("def f():\n    return 1 / 0\n\nf()\n", "line 2: ZeroDivisionError: division by zero"),
    "an error elsewhere": ("import json\njson.loads('')\n", "line 2: JSONDecodeError: Expecting value"),
}


@pytest.mark.parametrize(("text", "said"), BAD_IMPORTS.values(), ids=BAD_IMPORTS.keys())
@pytest.mark.parametrize("command", ["train", "methods"])
def test_bad_import(
    command: str,
    text: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "of_my_own.py"
    file.write_text(text)
    for _ in range(2):  # what failed is not taken for what is loaded
        assert main([command, "--import", str(file)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"otmix: --import {file} fails")
        assert said in captured.err
        assert captured.err.count("\n") == 1
    monkeypatch.setenv("OTMIX_DEBUG", "1")
    with pytest.raises(UserError) as caught:
        main([command, "--import", str(file)])
    assert type(caught.value.__cause__).__name__ in said


BAD_FILES = {
    "key misspelt": ("epohcs: 3", "sets epohcs, which does not exist; did you mean epochs?"),
    "key like nothing": ("zzzz: 3", "`otmix train --print_config` shows all there are"),
    "setting misspelt": ("set: {alhpa: 3}", "sets set.alhpa, which does not exist; did you mean set.alpha?"),
    "no settings": ("set: 3", "`set` in"),
    "no whole number": ("epochs: many", "must be a whole number, it is many"),
    "number for a text": ("root: 3", "must be a text, it is 3; put it in quotes"),
    "text for a truth": ("resume: 'yes'", "`resume` in"),
    "a list": ("- epochs", "must hold settings"),
    "no YAML": ("epochs: [", "is not YAML"),
    "a date": ("epochs: 2020-01-01", "must be a whole number, it is 2020-01-01"),
    "a number as key": ("3: 4", "sets 3, which does not exist"),
}


@pytest.mark.parametrize(("text", "said"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", str(config_file(tmp_path, text))]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def fails_with(error: BaseException) -> Callable[[], int]:
    def function() -> int:
        raise error

    return function


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OTMIX_DEBUG", raising=False)
    monkeypatch.setitem(COMMANDS, "data", fails_with(KeyboardInterrupt()))
    assert main(["data"]) == 130
    monkeypatch.setitem(COMMANDS, "data", fails_with(UserError("mend this")))
    assert main(["data"]) == 2
    assert capsys.readouterr().err.endswith("otmix: mend this\n")
    monkeypatch.setenv("OTMIX_DEBUG", "1")
    with pytest.raises(UserError):
        main(["data"])
    monkeypatch.setitem(COMMANDS, "data", fails_with(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        main(["data"])


def test_a_reader_that_has_seen_enough() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "otmix", "train", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_argument(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = page(command, COMMANDS[command])
    assert max(map(len, text.splitlines())) <= 100
    assert "examples:" in text
    for argument in arguments_of(COMMANDS[command]):
        assert argument.help, f"{argument.key} has no help"
        shown = argument.metavar if argument.positional else argument.option[2:]
        assert shown in text or argument.key.startswith("set.")
    for line in text[text.index("examples:") :].splitlines()[1:]:
        words = shlex.split(line.partition("    ")[0] if line.startswith("  ") and "    " in line.strip() else line)
        if words:  # the examples parse
            assert words[0] == "otmix"
            parse(words[1], COMMANDS[words[1]], words[2:])


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert text == overview(COMMANDS, otmix.__version__)
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"otmix {otmix.__version__}\n"


def test_an_imported_file_hides_no_module_of_the_same_name(tmp_path: Path) -> None:
    import statistics
    import zlib

    for name in ("statistics", "zlib", "first_of_test_cli"):
        (tmp_path / f"{name}.py").write_text("import math\n", "utf-8")
    (tmp_path / "second_of_test_cli.py").write_text("import first_of_test_cli\n", "utf-8")
    files = [str(tmp_path / f"{name}.py") for name in ("statistics", "zlib", "first_of_test_cli", "second_of_test_cli")]
    before = set(sys.modules)
    try:
        for _ in range(2):
            assert main(["methods", "erm", *(word for file in files for word in ("--import", file))]) == 0
        assert sys.modules["statistics"] is statistics
        assert sys.modules["zlib"] is zlib
        loaded = [getattr(module, "__file__", None) for module in sys.modules.values()]
        assert [loaded.count(file) for file in files] == [1, 1, 1, 1]
    finally:
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) in files:
                del sys.modules[name]


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["erm", "--root=~/photos", "--runs=~/runs", "--weights=~nobody-of-this-name/w.pt", "--import=~/a.py"]
    call = parse("compare", COMMANDS["compare"], argv)
    assert call.named["config"].root == "/home/me/photos"
    assert call.named["config"].weights == "~nobody-of-this-name/w.pt"
    assert call.named["runs"] == Path("/home/me/runs")
    assert call.named["imports"] == [Path("/home/me/a.py")]
    assert parse("train", COMMANDS["train"], ["--out=~/run"]).named["config"].out == "/home/me/run"


@pytest.mark.parametrize("command", ["train", "data", "preview"])
def test_a_folder_without_its_flags_is_met_with_them(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert main([command, "photos"]) == 2
    assert capsys.readouterr().err == (
        f"otmix: `otmix {command}` does not know what to do with photos; did you mean --data folder --root photos?\n"
    )
    assert main(["methods", "otmix", "photos"]) == 2
    assert "did you mean" not in capsys.readouterr().err
