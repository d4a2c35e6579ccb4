"""What a user can do wrong, and what can go wrong around a run: one clear sentence, and nothing half-written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from otmix.cli import main
from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.files import read_json, write_text
from otmix.training import open_run, train
from run_server import Outcome, Server
from test_resume import assert_same, configuration, contents, place

BASE: dict[str, Any] = {
    "data": "digits",
    "method": "otmix",
    "max_per_class": 40,
    "batch_size": 32,
    "epochs": 3,
    "accelerator": "cpu",
    "set": {"mix_from": 0.0, "mix_until": 1.0},
}


def fill_the_disk(which: str) -> None:
    """The disk is full when "NAME" is written for the "COUNT"-th time, and ever after. In a child of `run_server`."""
    name, count = which.split(" ")
    seen = 0

    def fsync(descriptor: int) -> None:
        nonlocal seen
        seen += Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(f".{name}.")
        if seen >= int(count):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fsync


def limit_files(size: str) -> None:
    """No file can grow beyond so many bytes: the write itself fails, wherever it happens."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


def poison(which: str) -> None:
    """The loss of the "STEP"-th step of this process (from 1) is NaN, on the process of rank "RANK"."""
    from otmix.losses import Criterion

    step, rank = map(int, which.split(" "))
    forward, seen = Criterion.forward, 0

    def poisoned(self: Criterion, *arguments: Any, **settings: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        loss = forward(self, *arguments, **settings)
        here = int(os.environ.get("LOCAL_RANK", "0")) == rank
        return loss * float("nan") if seen == step and here else loss

    Criterion.forward = poisoned  # type: ignore[method-assign]


def one_sentence(outcome: Outcome) -> str:
    """The message of a UserError, which must be one line and one sentence."""
    assert outcome.kind == "UserError", outcome.text
    text = re.sub(r"/\S+", "PATH", outcome.text)
    assert "\n" not in text
    assert not re.search(r"\. [A-Z]", text), text
    assert 20 < len(text) < 400, text
    return outcome.text


def refused(config: dict[str, Any]) -> str:
    """The sentence with which `train` refuses a configuration, which must leave nothing behind."""
    with pytest.raises(UserError) as caught:
        train(RunConfig.from_dict(config))
    return one_sentence(Outcome("UserError", str(caught.value)))


def temporaries(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.rglob("*.tmp")]


@pytest.fixture(scope="module")
def reference(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    assert server.run({**BASE, "out": str(run_dir)}).kind == "done"
    return run_dir


@pytest.fixture(scope="module")
def stopped(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its second epoch."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    assert server.run({**BASE, "out": str(run_dir)}, event="step", count=7, signal=15).kind == "Interrupted"
    return run_dir


# --- a loss that is not finite ---


@pytest.mark.parametrize(("step", "kept"), [(5, (0, 4)), (6, (1, 0)), (8, (1, 2))])
@pytest.mark.parametrize("method", ["erm", "otmix"])
def test_the_last_good_checkpoint_is_kept(
    step: int, kept: tuple[int, int], method: str, server: Server, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changed = BASE["set"] if method == "otmix" else {}
    config = {**BASE, "method": method, "set": changed, "out": str(run_dir), "checkpoint_minutes": 0.0}
    text = one_sentence(server.run(config, prepare=f"test_bad_input poison {step} 0"))
    epoch, within = divmod(step - 1, 5)
    assert f"at step {within} of epoch {epoch} " in text
    assert str(run_dir) in text
    assert place(run_dir) == kept
    assert not temporaries(run_dir)
    model = torch.load(run_dir / "checkpoint.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in model.values())
    assert server.run({**config, "resume": True}).kind == "done"  # the loss is sound this time


def test_without_a_checkpoint_it_says_so(server: Server, tmp_path: Path) -> None:
    outcome = server.run({**BASE, "out": str(tmp_path / "run")}, prepare="test_bad_input poison 2 0")
    assert "no checkpoint had been written yet" in one_sentence(outcome)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e38, "batch_size": 32},
        {"lr": 1e38, "batch_size": 1000},  # one step an epoch: its loss is finite, the weights after it are not
        {"lr": 1e25, "batch_size": 1000},  # these are, but not what they give
        {"lr": 1e38, "batch_size": 44, "method": "erm", "set": {}},
        {"lr": 1e30, "batch_size": 1000, "method": "ce-drw+otmix", "protocol": "paper"},
        {"lr": 1e38, "batch_size": 1000, "protocol": "official"},
        # the weights stay finite, the features do not
        {"lr": 1e8, "protocol": "paper", "set": {"curriculum_power": 0.0}},
    ],
)
def test_a_learning_rate_that_breaks_the_model(settings: dict[str, Any], server: Server, tmp_path: Path) -> None:
    config = {**BASE, **settings, "out": str(tmp_path / "run"), "checkpoint_minutes": 0.0}
    assert "--lr" in one_sentence(server.run(config))
    assert not temporaries(tmp_path / "run")
    if (tmp_path / "run" / "checkpoint.pt").exists():
        model = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
        assert all(value.isfinite().all() for value in model.values())


# --- a full disk ---


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("config.yaml", 1),
        ("data.json", 1),
        ("environment.json", 1),
        ("checkpoint.pt", 1),
        ("checkpoint.pt", 3),
        ("metrics.jsonl", 2),
        ("best-0.safetensors", 1),
        ("model.safetensors", 1),
        ("predictions.npz", 1),
        ("pairs.npz", 1),
        ("result.json", 1),
    ],
)
def test_the_disk_is_full(name: str, count: int, server: Server, references: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = configuration("official", run_dir)
    text = one_sentence(server.run(config, prepare=f"test_bad_input fill_the_disk {name} {count}"))
    assert "disk is full" in text
    assert name in text
    assert not temporaries(run_dir)
    assert not (run_dir / "result.json").exists()
    assert server.run(config).kind == "done"  # there is space again
    assert_same(run_dir, references["official"])


@pytest.fixture(scope="module")
def references(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    run_dir = tmp_path_factory.mktemp("references") / "official"
    assert server.run(configuration("official", run_dir)).kind == "done"
    return {"official": run_dir}


@pytest.mark.parametrize("name", ["plan.png", "report.html"])
def test_the_disk_is_full_for_a_picture(name: str, server: Server, stopped: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    config = {**BASE, "out": str(run_dir), "resume": True}
    how = {"pictures": True, "prepare": f"test_bad_input fill_the_disk {name} 1"}
    text = one_sentence(server.run(config, **how))
    assert "disk is full" in text
    assert not temporaries(run_dir)
    assert server.run(config, pictures=True).kind == "done"
    for made in ("figures/mixed.png", "figures/plan.png", "report.html", "result.json"):
        assert (run_dir / made).stat().st_size > 0


def test_a_write_that_fails_half_way(server: Server, stopped: Path, tmp_path: Path) -> None:
    """Not at the end, but within torch's own writing of a checkpoint."""
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    before = contents(run_dir)
    config = {**BASE, "out": str(run_dir), "resume": True}
    outcome = server.run(config, prepare="test_bad_input limit_files 100000")
    assert "disk is full" in one_sentence(outcome)
    assert contents(run_dir) == before
    assert server.run(config).kind == "done"


@pytest.mark.parametrize("kilobytes", [8, 400, 700, 1000])
def test_a_disk_that_is_really_full(kilobytes: int, server: Server, reference: Path, tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "otmix", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("only root can make a small disk")
    run_dir = tmp_path / "run"
    config = {**BASE, "out": str(run_dir), "resume": True}
    try:
        assert "disk is full" in one_sentence(server.run(config))
        assert not temporaries(run_dir)
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path)], check=True)
        assert server.run(config).kind == "done"
        assert_same(run_dir, reference)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- a checkpoint that is not ours ---


def _text(path: Path) -> None:
    path.write_text("these are my notes")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(3)}, "epoch": 3}, path)


def _a_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def _dangerous(path: Path) -> None:
    torch.save({"format": "otmix-checkpoint", "call": subprocess.run}, path)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _newer(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "version": 99}, path)


def _of_another_model(path: Path) -> None:
    payload = torch.load(path, weights_only=True)
    payload["model"].pop("backbone.conv1.weight")
    torch.save(payload, path)


def _zip(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [_text, _empty, _foreign, _a_tensor, _dangerous, _truncated, _newer, _of_another_model, _zip, _folder],
)
def test_a_checkpoint_that_is_not_ours(spoil: Callable[[Path], None], stopped: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    spoil(run_dir / "checkpoint.pt")
    before = contents(run_dir)
    text = refused({**BASE, "out": str(run_dir), "resume": True})
    assert str(run_dir / "checkpoint.pt") in text
    assert contents(run_dir) == before


def test_a_checkpoint_with_a_spoilt_byte(stopped: Path) -> None:
    """Whatever is wrong with it, it is either refused with a sentence or can be read."""
    from otmix.training.checkpoint import load_checkpoint

    whole = (stopped / "checkpoint.pt").read_bytes()
    drawn = np.random.default_rng(0)
    path = stopped.parent / "spoilt.pt"
    refusals = 0
    for _ in range(150):
        spoilt = bytearray(whole)
        # most of a checkpoint is numbers; its structure is at the beginning and at the end
        at = int(drawn.choice([drawn.integers(0, 40_000), len(whole) - 1 - drawn.integers(0, 40_000)]))
        spoilt[at] ^= int(drawn.integers(1, 256))
        path.write_bytes(spoilt)
        try:
            load_checkpoint(path)
        except UserError as error:
            refusals += 1
            one_sentence(Outcome("UserError", str(error)))
    assert refusals > 10


@pytest.mark.parametrize("resume", [True, False])
def test_a_damaged_checkpoint_that_was_deleted(
    resume: bool, server: Server, references: dict[str, Path], tmp_path: Path
) -> None:
    """The run begins anew in its folder, as the message about the checkpoint says."""
    run_dir = tmp_path / "run"
    config = configuration("official", run_dir)
    assert server.run(config, event="epoch", count=3, signal=15).kind == "Interrupted"
    checkpoint = run_dir / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    assert "delete it to start the run afresh" in one_sentence(server.run({**config, "resume": True}))
    checkpoint.unlink()
    (run_dir / "best-77.safetensors").touch()  # of an epoch that may not be the best one this time
    assert (run_dir / "metrics.jsonl").read_text().count("\n") >= 2
    assert server.run({**config, "resume": resume}, event="step", count=2, signal=9).kind == "killed"
    assert not (run_dir / "metrics.jsonl").exists()
    assert [*run_dir.glob("best-*")] == []
    assert server.run({**config, "resume": resume}).kind == "done"
    assert_same(run_dir, references["official"])


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("lost", ["result.json checkpoint.pt", "checkpoint.pt settings.json result.json"])
def test_no_model_is_lost_with_the_checkpoint(lost: str, resume: bool, reference: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(reference, tmp_path / "run")
    for name in lost.split():
        (run_dir / name).unlink()
    before = contents(run_dir)
    text = refused({**BASE, "out": str(run_dir), "resume": resume})
    assert ("move model.safetensors away" if "settings" not in lost else "holds no run") in text
    assert contents(run_dir) == before


def test_a_run_that_lost_its_checkpoint_after_training_may_begin_anew(
    server: Server, reference: Path, tmp_path: Path
) -> None:
    """Stopped just before its end, and the model moved away: the rest is written again."""
    run_dir = shutil.copytree(reference, tmp_path / "run")
    for name in ("result.json", "checkpoint.pt", "model.safetensors"):
        (run_dir / name).unlink()
    config = {**BASE, "out": str(run_dir)}
    assert server.run(config).kind == "done"
    assert_same(run_dir, reference)


def test_a_finished_run_without_a_checkpoint_is_finished(server: Server, reference: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(reference, tmp_path / "run")
    (run_dir / "checkpoint.pt").unlink()
    before = contents(run_dir)
    assert "already holds a finished run" in refused({**BASE, "out": str(run_dir)})
    assert server.run({**BASE, "out": str(run_dir), "resume": True}).kind == "done"
    assert contents(run_dir) == before


# --- the folder of the run ---


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    for out in (tmp_path / "notes", tmp_path / "notes" / "run"):
        assert str(out) in refused({**BASE, "out": str(out)})
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", "result.json", "checkpoint.pt"])
@pytest.mark.parametrize("resume", [False, True])
def test_out_holds_something_else(name: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    assert str(tmp_path) in refused({**BASE, "out": str(tmp_path), "resume": resume})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["learning_rate: 3\nlayers: [1, 2]\n", "just a text", "data: [", "", "\x00\xff"])
def test_out_holds_the_configuration_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    before = contents(tmp_path)
    refused({**BASE, "out": str(tmp_path), "resume": True})
    after = contents(tmp_path)
    after.pop(".lock", None)
    assert after == before


def test_a_folder_that_cannot_be_written() -> None:
    assert "cannot write" in refused({**BASE, "out": "/proc/otmix-run"})


@pytest.mark.parametrize("name", ["data.json", "config.yaml"])
def test_a_damaged_record(name: str, stopped: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "run")
    (run_dir / name).write_text("{")
    before = contents(run_dir)
    assert name in refused({**BASE, "out": str(run_dir), "resume": True})
    assert contents(run_dir) == before


def test_a_run_that_another_process_trains(server: Server, tmp_path: Path) -> None:
    config = {**BASE, "out": str(tmp_path / "run"), "epochs": 200, "resume": True}
    pid = server.start(config)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        pass
    assert "another process" in refused(config)
    os.kill(pid, 9)
    assert server.wait().kind == "killed"


def test_open_run_wants_a_finished_run(stopped: Path, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finished"):
        open_run(stopped)
    with pytest.raises(UserError, match="there is no run"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        open_run(tmp_path)
    for spoil in (_text, _empty, _truncated, Path.unlink):
        run_dir = shutil.copytree(reference, tmp_path / spoil.__name__)
        spoil(run_dir / "model.safetensors")
        with pytest.raises(UserError, match=r"model\.safetensors"):
            open_run(run_dir)


# --- settings that do not go together ---


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"final_split": "validation"}, "--validation-per-class"),
        ({"set": {"confusion_from": "validation"}}, "--validation-per-class"),
        ({"protocol": "official", "backbone": "timm/resnet10t", "pretrained": False}, "resnet32"),
        (
            {"method": "ride+otmix", "protocol": "official", "backbone": "timm/resnet10t", "pretrained": False},
            "resnet32",
        ),
        ({"method": "cmo", "protocol": "official", "backbone": "timm/resnet10t", "pretrained": False}, "resnet32"),
        ({"set": {"features": "official"}, "backbone": "timm/resnet10t", "pretrained": False}, "resnet32"),
        ({"protocol": "paper", "validation_per_class": 3, "final_split": "validation"}, "--set.confusion_from"),
        ({"accelerator": "cuda"}, "cuda"),
        ({"accelerator": "mps"}, "mps"),
        ({"precision": "16-mixed"}, "bf16-mixed"),
        ({"precision": "16-mixed", "devices": 2}, "bf16-mixed"),
        ({"accelerator": "cuda", "devices": 2}, "cuda"),
        ({"method": "otmx"}, "otmix"),
        ({"method": "erm+"}, "erm+"),
        ({"backbone": "resnet33"}, "resnet32"),
        ({"backbone": "timm/resnet19"}, "timm/resnet18"),
        ({"protocol": "paper", "set": {"epsilon": 0.0}}, "epsilon"),
        ({"weights": "nowhere.pt"}, "nowhere.pt"),
        ({"pretrained": True}, "pretrained"),
        ({"optimizer": "adamw", "nesterov": True}, "--nesterov"),
        ({"set": {"loss.tua": 2.0}}, "--set.loss.tua"),
        ({"method": "logit-adjustment", "set": {"loss.tua": 2.0}}, "did you mean --set.loss.tau?"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], word: str, tmp_path: Path) -> None:
    if settings.get("accelerator") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert word in refused({**BASE, **settings, "out": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


# --- images ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for name in ("a", "b", "c"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 255, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def _no_images(folder: Path) -> Path:
    shutil.rmtree(folder / "train" / "b")
    (folder / "train" / "b").mkdir()
    return folder / "train" / "b"


def _one_class(folder: Path) -> Path:
    for split in ("train", "test"):
        for name in ("b", "c"):
            shutil.rmtree(folder / split / name)
    return folder / "train"


def _no_folder(folder: Path) -> Path:
    shutil.rmtree(folder)
    return folder


def _empty_folder(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _broken(folder: Path) -> Path:
    path = folder / "train" / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    return path


def _broken_test(folder: Path) -> Path:
    path = folder / "test" / "c" / "3.png"
    path.write_text("<html>not found</html>")
    return path


def _dangling(folder: Path) -> Path:
    path = folder / "train" / "b" / "1.png"
    path.unlink()
    path.symlink_to(folder / "nowhere.png")
    return path


def _class_only_in_test(folder: Path) -> Path:
    shutil.copytree(folder / "test" / "a", folder / "test" / "d")
    return folder / "test"


PROBLEMS = [_no_images, _one_class, _no_folder, _empty_folder, _broken, _broken_test, _dangling, _class_only_in_test]


@pytest.mark.parametrize("spoil", PROBLEMS)
def test_images_that_cannot_be_used(spoil: Callable[[Path], Path], folder: Path, tmp_path: Path) -> None:
    culprit = spoil(folder)
    config = {**BASE, "data": "folder", "root": str(folder), "backbone": "resnet8", "max_per_class": None}
    config |= {"batch_size": 4, "out": str(tmp_path / "run")}
    assert str(culprit) in refused(config)
    if spoil is not _broken_test:  # the test images are opened once training is over
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_broken_images_can_be_left_out(server: Server, folder: Path, tmp_path: Path) -> None:
    broken = [_broken(folder), _broken_test(folder)]
    config = {**BASE, "data": "folder", "root": str(folder), "backbone": "resnet8", "max_per_class": None}
    config |= {"batch_size": 4, "out": str(tmp_path / "run"), "on_bad_image": "skip"}
    assert server.run(config).kind == "done"
    run = open_run(tmp_path / "run")
    assert run.counts.counts.tolist() == [4, 3, 4]
    assert run.result["evaluation"]["n"] == 11
    note = next(note for note in run.data["notes"] if "left out: 2" in note)
    assert all(path.name in note for path in broken)
    assert list(run.data["left_out"]) == [path.relative_to(folder).as_posix() for path in broken]


def test_all_images_that_are_left_out_are_recorded(
    server: Server, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [f"train/a/{i}.png" for i in range(10, 38)]
    for path in broken:
        (folder / path).write_text("no picture")
    argv = ["--data", "folder", "--root", str(folder), "--on-bad-image", "skip"]
    assert main(["data", *argv]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out: 28: train/a/10.png (" in printed
    assert "and 8 more" in printed
    assert broken[20] not in printed
    config = {**BASE, "data": "folder", "root": str(folder), "backbone": "resnet8", "max_per_class": None}
    config |= {"batch_size": 4, "out": str(tmp_path / "run"), "on_bad_image": "skip", "epochs": 1}
    assert server.run(config, event="step", count=2, signal=15).kind == "Interrupted"
    left_out = read_json(tmp_path / "run" / "data.json")["left_out"]
    assert list(left_out) == broken
    assert set(left_out.values()) == {"not an image"}
    (folder / broken[0]).unlink()  # it is not part of the data
    assert server.run({**config, "resume": True}).kind == "done"


def test_a_link_to_nowhere_can_be_left_out(server: Server, folder: Path, tmp_path: Path) -> None:
    config = {**BASE, "data": "folder", "root": str(folder), "backbone": "resnet8", "max_per_class": None}
    config |= {"batch_size": 4, "out": str(tmp_path / "run"), "epochs": 1}
    path = _dangling(folder)
    text = one_sentence(server.run(config))
    advice = f"mend the link, which leads to {folder / 'nowhere.png'}, or pass --on-bad-image skip"
    assert text == f"{path} cannot be read as an image (No such file or directory); {advice}"
    assert not (tmp_path / "run").exists()
    assert server.run({**config, "on_bad_image": "skip"}).kind == "done"


def test_a_run_that_ended_before_its_first_checkpoint_may_begin_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / name / f"{i}.png")
    broken = tmp_path / "photos" / "bee" / "broken.png"
    broken.write_bytes((tmp_path / "photos" / "bee" / "0.png").read_bytes()[:60])
    run = str(tmp_path / "run")
    argv = ["train", "--data", "folder", "--root", str(tmp_path / "photos"), "--epochs", "1", "--out", run]
    argv += ["--backbone", "resnet8", "--accelerator", "cpu", "--workers", "0"]
    assert main(argv) == 2
    assert "broken.png" in capsys.readouterr().err
    assert main([*argv, "--on-bad-image", "skip"]) == 0
    assert main([*argv, "--on-bad-image", "skip"]) == 2
    assert "already holds a finished run; choose another folder" in capsys.readouterr().err
    broken.unlink()
    (tmp_path / "begun").mkdir()
    for name in ("config.yaml", "data.json", "environment.json", "settings.json"):
        shutil.copy(tmp_path / "run" / name, tmp_path / "begun" / name)
    assert main([*argv[:-8], "--out", str(tmp_path / "begun"), *argv[-6:]]) == 0


def test_trained_in_the_folder_of_the_photos_and_used_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OTMIX_RUNS", raising=False)
    photos = tmp_path / "photos"
    for k, name in enumerate(("ant", "bee")):
        (photos / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (100 * k, 40 * i, 0)).save(photos / name / f"{i}.png")
    monkeypatch.chdir(photos)
    argv = [
        "train",
        "--data",
        "folder",
        "--root",
        ".",
        "--epochs",
        "1",
        "--backbone",
        "resnet8",
        "--accelerator",
        "cpu",
    ]
    assert main([*argv, "--batch-size", "0"]) == 2
    assert main([*argv, "--backbone", "resnet9"]) == 2
    assert not (photos / "runs").exists(), "what was made for nothing is gone"
    assert main(argv) == 0
    assert main(["data", "--data", "folder", "--root", "."]) == 0
    assert "2 classes" in capsys.readouterr().out
    (run,) = (photos / "runs").iterdir()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run), "--accelerator", "cpu"]) == 0
    assert (
        main(["compare", "otmix", "--seeds", "1", "--runs", str(run.parent), *argv[1:4], str(photos), *argv[5:]]) == 0
    )


def test_a_lost_model_is_written_again_from_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(RunConfig.from_dict({**BASE, "epochs": 1, "out": str(tmp_path / "run")}))
    model = run / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:100])
    with pytest.raises(UserError, match="delete it"):
        open_run(run)
    model.unlink()
    assert main(["train", "--resume", "--out", str(run)]) == 0
    assert model.read_bytes() == whole


def test_a_folder_for_the_digits_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "data", "preview"):
        assert main([command, "--root", "photos"]) == 2
        assert "add --data folder" in capsys.readouterr().err


def test_a_read_only_file_system_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    original = Path.open

    def open_(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        return refuse() if "w" in mode else original(self, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(UserError, match="Read-only file system"):
        write_text(tmp_path / "p.csv", "x")


def test_what_is_no_regular_file_is_written_into(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "elsewhere" / "file"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    file.parent.mkdir()
    link.symlink_to(file)
    for text in ("new", "newer"):
        write_text(link, text)
        assert (link.is_symlink(), file.read_text()) == (True, text)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "file", "link", "pipe"]


def test_a_run_of_an_own_loss_asks_for_its_file(tmp_path: Path) -> None:
    run = train(RunConfig.from_dict({**BASE, "method": "erm", "set": {}, "epochs": 1, "out": str(tmp_path / "run")}))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("method: ce", "method: mine"))
    with pytest.raises(UserError, match="--import FILE"):
        open_run(run)
    with pytest.raises(UserError, match=r"no method named 'mine'; .* --import FILE, the file that defines it"):
        train(RunConfig(method="mine", out=str(run), resume=True))
