"""Losses and mixers of one's own: files and their neighbours, cells that are run again, what defines a run."""

from __future__ import annotations

import importlib
import json
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from otmix.cli import main
from otmix.errors import UserError
from otmix.experiments.jobs import write_config
from otmix.extensions import UNKNOWN, hash_of, hash_of_definition, import_files
from otmix.losses import LOSSES, CrossEntropy, register_loss
from otmix.mixing import PIXEL_RULES, Mixup, register_mixer
from otmix.training import open_run
from otmix.training.records import read_config

LOSS = """
from helper_of_mine import SCALE
from otmix.losses import CrossEntropy, register_loss

@register_loss("mine")
class Mine(CrossEntropy):
    scale = SCALE

    def per_label(self, output, labels, progress):
        return SCALE * super().per_label(output, labels, progress)
"""


@pytest.fixture(autouse=True)
def no_module_stays() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if "of_mine" in name:
            del sys.modules[name]


def forget(*names: str) -> None:
    """As in a new process."""
    for name in names:
        sys.modules.pop(name, None)
    LOSSES.pop("mine", None)
    importlib.invalidate_caches()


def test_a_file_finds_what_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "helper_of_mine.py").write_text("import statistics\nSCALE = statistics.mean([3.0])\n", "utf-8")
    (tmp_path / "statistics.py").write_text("raise SystemExit\n", "utf-8")
    (tmp_path / "loss_of_mine.py").write_text(LOSS, "utf-8")
    first = sys.path[0]
    import_files([tmp_path / "loss_of_mine.py"])
    assert getattr(LOSSES["mine"], "scale", None) == 3.0
    assert sys.path[0] == first
    assert sys.path[-1] == str(tmp_path)


def cell(text: str, number: int) -> None:
    """Run a cell as IPython does: in one module without a file, its lines kept under a name of its own."""
    name = f"/tmp/ipykernel_of_mine/{number}.py"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = sys.modules.setdefault("notebook_of_mine", ModuleType("notebook_of_mine"))
    exec(compile(text, name, "exec"), vars(module))


CELL = """
from otmix.losses import CrossEntropy, register_loss
from otmix.mixing import Mixup, register_mixer

@register_loss("mine")
class Mine(CrossEntropy):
    def per_label(self, output, labels, progress):
        return super().per_label(output, labels, progress)

@register_mixer("my_mixer")
class MyMixer(Mixup): ...
"""


def test_a_cell_may_be_run_again() -> None:
    cell(CELL, 1)
    loss, mixer = LOSSES["mine"], PIXEL_RULES["my_mixer"]
    cell(CELL, 2)
    assert LOSSES["mine"] is not loss
    assert PIXEL_RULES["my_mixer"] is not mixer
    with pytest.raises(UserError, match="already a loss named 'mine'"):
        cell(CELL.replace("class Mine", "class Another"), 3)
    with pytest.raises(UserError, match="already a mixer named 'my_mixer'"):
        register_mixer("my_mixer")(Mixup)
    with pytest.raises(UserError, match="already a loss named 'ce'"):
        register_loss("ce")(CrossEntropy)
    with pytest.raises(UserError, match="already a mixer named 'mixup'"):
        register_mixer("mixup")(Mixup)


CHOOSY = """
from typing import Literal
from otmix.losses import CrossEntropy, register_loss

@register_loss("mine")
class Mine(CrossEntropy):
    def __init__(self, counts, clip: float | None = 1.0, mode: Literal["on", "off"] = "on"):
        super().__init__(counts)
        self.clip, self.mode = clip, mode

    def per_label(self, output, labels, progress):
        loss = super().per_label(output, labels, progress)
        return loss if self.clip is None else loss.clamp(max=self.clip)
"""


def test_a_setting_may_be_none_or_a_word_that_yaml_has_for_something_else(tmp_path: Path) -> None:
    """It reaches the loss, the records, a run that goes on, and those of `compare --jobs`."""
    source = tmp_path / "choosy.py"
    source.write_text(CHOOSY)
    tiny = ["--method", "mine", "--max-per-class", "10", "--epochs", "1", "--import", str(source)]
    tiny += ["--set.loss.clip", "none", "--set.loss.mode", "off"]
    run_dir = tmp_path / "run"
    assert main(["train", *tiny, "--out", str(run_dir)]) == 0
    settings = json.loads((run_dir / "settings.json").read_text())
    assert (settings["loss.clip"], settings["loss.mode"]) == (None, "off")
    criterion: Any = open_run(run_dir).criterion
    assert (criterion.clip, criterion.mode) == (None, "off")
    assert main(["train", *tiny, "--out", str(run_dir), "--resume"]) == 0
    assert main(["train", "--resume", "--out", str(run_dir), "--import", str(source)]) == 0
    again = tmp_path / "again"
    file = ["--config", str(run_dir / "config.yaml"), "--import", str(source)]
    assert main(["train", *file, "--out", str(again)]) == 0
    assert json.loads((again / "settings.json").read_text()) == settings
    (tmp_path / "nothing_said.yaml").write_text("method: logit-adjustment\nset: {loss: {tau: , post_hoc: on}}\n")
    said = ["--config", str(tmp_path / "nothing_said.yaml"), "--max-per-class", "10", "--epochs", "1"]
    assert main(["train", *said, "--out", str(tmp_path / "said")]) == 0
    settings_of = json.loads((tmp_path / "said" / "settings.json").read_text())
    assert (settings_of["loss.tau"], settings_of["loss.post_hoc"]) == (1.0, True)
    write_config(read_config(run_dir), tmp_path / "child.yaml")  # as for a process of --jobs
    assert main(["train", "--config", str(tmp_path / "child.yaml"), *file[2:], "--out", str(tmp_path / "child")]) == 0
    assert json.loads((tmp_path / "child" / "settings.json").read_text()) == settings


def test_what_defines_a_class_of_a_notebook_is_its_own_text() -> None:
    hashes = []
    for text in (CELL, "x = 1\n" + CELL, CELL.replace("super()", "-super()")):
        cell(text, len(hashes))
        hashes.append(hash_of_definition(LOSSES["mine"]))
    assert hashes[0] == hashes[1] != hashes[2]
    assert UNKNOWN not in hashes
    assert hash_of_definition(PIXEL_RULES["my_mixer"]) == UNKNOWN, "nothing in it says where it was typed"


def test_what_defines_a_class_is_its_file_and_what_that_imports_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "sub_of_mine", tmp_path / "loss_of_mine.py"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which is old where two texts are of one length and second
    hashes = []
    for loss, text, below in [
        (LOSS, "SCALE = 1\n", ""),
        (LOSS, "SCALE = 1\n", "x = 1\n"),
        (LOSS, "SCALE = 2\n", ""),
        (LOSS, "from sub_of_mine.below import SCALE\n", "SCALE = 1\n"),
        (LOSS, "from sub_of_mine.below import SCALE\n", "SCALE = 2\n"),
        (LOSS.replace("SCALE *", "-SCALE *"), "SCALE = 1\n", ""),
    ]:
        forget("loss_of_mine", "helper_of_mine", "other_of_mine", "sub_of_mine", "sub_of_mine.below")
        (folder / "below.py").write_text(below, "utf-8")
        file.write_text(loss, "utf-8")
        (tmp_path / "helper_of_mine.py").write_text(text, "utf-8")
        (tmp_path / "other_of_mine.py").write_text(f"x = {len(hashes)}\n", "utf-8")  # beside it, but nobody's
        import_files([file])
        hashes.append(hash_of_definition(LOSSES["mine"]))
    assert hashes[0] == hashes[1]
    assert len({*hashes}) == len(hashes) - 1


def test_a_class_imported_as_python_does_has_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "loss_of_mine.py"
    file.write_text(LOSS.replace("from helper_of_mine import SCALE", "SCALE = 1"), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("loss_of_mine")
    assert hash_of_definition(LOSSES["mine"]) == (held := hash_of(file))
    file.write_text("# changed since\n", "utf-8")
    assert hash_of_definition(LOSSES["mine"]) == held
    assert hash_of_definition(CrossEntropy) is None
    assert hash_of_definition(Mixup) is None
