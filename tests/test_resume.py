"""A run that is killed or stopped, at any moment and any number of times, ends as one that never was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from otmix.cli import main
from otmix.config import RunConfig
from otmix.training import train
from otmix.training.records import read_config
from run_server import Outcome, Server

TINY = {
    "data": "digits",
    "max_per_class": 40,  # 131 images: five steps an epoch, the last of three images
    "batch_size": 32,
    "epochs": 4,
    "accelerator": "cpu",
    "resume": True,
}
EVERY_STEP = {"mix_from": 0.0, "mix_until": 1.0}
RUNS: dict[str, dict[str, Any]] = {
    # F streamed and soft, its counts half-way; transport from the first epoch on; BatchNorm's statistics made anew
    "streamed": {
        "method": "otmix",
        "protocol": "clean",
        "set": {**EVERY_STEP, "mix_probability": 0.8, "bn_statistics": "mixed"},
    },
    # the best epoch on the test set kept apart, BatchNorm moved by the cost's passes, one draw an epoch
    "official": {"method": "otmix", "protocol": "official", "set": {**EVERY_STEP, "curriculum_power": 0.3}},
    # class weights that begin late, F from validation images, Adam's moments, a warm-up
    "reweighted": {
        "method": "ce-drw+otmix",
        "protocol": "paper",
        "validation_per_class": 4,
        "optimizer": "adamw",
        "lr": 3e-3,
        "schedule": "cosine",
        "warmup": 0.3,
    },
    # three experts, temperatures and weights that begin late
    "experts": {"method": "ride+otmix", "protocol": "clean", "set": {**EVERY_STEP, "curriculum_power": 0.5}},
    # a second stream in every step, a buffer that is not saved, a background stream that changes its law
    "branches": {"method": "bbn-ldam-drs", "protocol": "clean", "schedule": "ldam"},
}
TIMES = ("seconds", "images_per_second")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: these tests write hundreds of checkpoints."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    place = shared / f"otmix-test-{os.getpid()}"
    place.mkdir()
    yield place
    shutil.rmtree(place)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def what_remains(run_dir: Path) -> dict[str, Any]:
    """Everything about a finished run but how long it took."""
    arrays = {}
    for name in ("predictions.npz", "pairs.npz"):
        with np.load(run_dir / name) as found:
            arrays[name] = {key: found[key].tolist() for key in found.files}
    result = json.loads((run_dir / "result.json").read_text())
    del result["seconds_per_epoch"], result["commit"]
    files = sorted(path.name for path in run_dir.iterdir())
    return {"rows": rows(run_dir), "result": result, "files": files, **arrays}


def assert_same(run_dir: Path, reference: Path) -> None:
    assert (run_dir / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert what_remains(run_dir) == what_remains(reference)


def contents(run_dir: Path) -> dict[str, str]:
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def place(run_dir: Path) -> tuple[int, int]:
    """Epoch and step at which the run would go on."""
    if not (run_dir / "checkpoint.pt").exists():
        return (0, 0)
    payload = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return payload["epoch"], payload["step"]


def configuration(name: str, out: Path, **more: Any) -> dict[str, Any]:
    return {**TINY, **RUNS[name], "out": str(out), **more}


@pytest.fixture(scope="module")
def references(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs, never stopped, and with checkpoints at the ends of epochs only."""
    base = tmp_path_factory.mktemp("references")
    for name in RUNS:
        assert server.run(configuration(name, base / name)) == Outcome("done", steps=20)
    return {name: base / name for name in RUNS}


def test_the_reference_runs_are_worth_comparing(references: dict[str, Path]) -> None:
    for name, run_dir in references.items():
        logged = rows(run_dir)
        assert [row["epoch"] for row in logged] == [0, 1, 2, 3]
        if name == "branches":  # mixes nothing
            continue
        assert any(row["transport_share"] > 0 for row in logged), name
        assert any(row["marginal_error"] is not None for row in logged), name
        assert np.load(run_dir / "pairs.npz")["transport"].sum() > 50, name
    weights = [(run_dir / "model.safetensors").read_bytes() for run_dir in references.values()]
    assert len(set(weights)) == len(weights)


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_moment_again_and_again(
    name: str, server: Server, references: dict[str, Path], folder: Path
) -> None:
    config = configuration(name, folder / "run", checkpoint_minutes=0.0)
    drawn = random.Random(f"kills of {name}")
    places = [(0, 0)]
    for _ in range(12):
        # a step and its checkpoint are some 10,000 calls: this falls into all parts of the next three steps
        outcome = server.run(config, event="call", count=drawn.randrange(1, 32_000))
        assert outcome.kind == "killed", outcome.text
        places.append(place(folder / "run"))
    assert places == sorted(places), "a checkpoint went back in time"
    assert len({step for _, step in places}) > 2, "the kills were meant to fall within epochs too"
    outcome = server.run(config)
    assert outcome.kind == "done", outcome.text
    assert outcome.steps < 20, "nothing of the killed runs was used"
    assert_same(folder / "run", references[name])


@pytest.mark.parametrize(
    ("event", "count"),
    [
        ("inside checkpoint.pt", 1),
        ("inside checkpoint.pt", 7),
        ("before checkpoint.pt", 1),
        ("before checkpoint.pt", 8),
        ("after checkpoint.pt", 1),
        ("after checkpoint.pt", 5),
        ("after checkpoint.pt", 20),
        ("before metrics.jsonl", 5),
        ("after best-0.safetensors", 1),
        ("after best-2.safetensors", 1),
        ("epoch", 4),
        ("before model.safetensors", 1),
        ("before pairs.npz", 1),
        ("before result.json", 1),
        ("after result.json", 1),
    ],
)
def test_killed_within_a_write(
    event: str, count: int, server: Server, references: dict[str, Path], folder: Path
) -> None:
    config = configuration("official", folder / "run", checkpoint_minutes=0.0)
    assert server.run(config, event=event, count=count) == Outcome("killed", "SIGKILL")
    outcome = server.run(config)
    assert outcome.kind == "done", outcome.text
    assert_same(folder / "run", references["official"])


@pytest.mark.parametrize("event", ["before config.yaml", "after config.yaml", "after data.json", "step"])
def test_killed_before_there_is_any_checkpoint(
    event: str, server: Server, references: dict[str, Path], folder: Path
) -> None:
    config = configuration("streamed", folder / "run")
    assert server.run(config, event=event, count=1) == Outcome("killed", "SIGKILL")
    assert not (folder / "run" / "checkpoint.pt").exists()
    outcome = server.run(config)
    assert outcome == Outcome("done", steps=20), outcome.text
    assert_same(folder / "run", references["streamed"])


def test_killed_from_outside_whenever_it_happens(server: Server, references: dict[str, Path], folder: Path) -> None:
    run_dir, drawn = folder / "run", random.Random("outside")
    config = configuration("reweighted", run_dir, checkpoint_minutes=0.0)
    for _ in range(5):
        before = place(run_dir)
        pid = server.start(config)
        # killed after the last checkpoint, it only has its result left to write
        while place(run_dir) == before and not (run_dir / "result.json").exists():
            time.sleep(0.002)
        time.sleep(drawn.uniform(0, 0.05))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        outcome = server.wait()
        if outcome.kind == "done":  # it was faster
            break
    assert server.run(config).kind == "done"
    assert_same(run_dir, references["reweighted"])


@pytest.mark.parametrize(
    ("number", "event", "count", "where"),
    [
        (signal.SIGINT, "step", 3, (0, 3)),
        (signal.SIGHUP, "step", 6, (1, 1)),
        (signal.SIGTERM, "step", 8, (1, 3)),
        (signal.SIGINT, "step", 5, (1, 0)),  # the last step of an epoch, which is then finished first
        (signal.SIGTERM, "epoch", 2, (2, 0)),
        (signal.SIGINT, "before metrics.jsonl", 3, (3, 0)),
        (signal.SIGINT, "inside checkpoint.pt", 1, (1, 0)),
    ],
)
def test_asked_to_stop(
    number: int,
    event: str,
    count: int,
    where: tuple[int, int],
    server: Server,
    references: dict[str, Path],
    folder: Path,
) -> None:
    config = configuration("streamed", folder / "run")
    outcome = server.run(config, event=event, count=count, signal=number)
    assert outcome.kind == "Interrupted", outcome.text
    assert str(folder / "run") in outcome.text
    assert place(folder / "run") == where
    assert len(rows(folder / "run")) == where[0]
    again = server.run(config, event="step", count=2, signal=number)
    assert again.kind == "Interrupted", again.text
    assert place(folder / "run") > where
    assert server.run(config).kind == "done"
    assert_same(folder / "run", references["streamed"])


@pytest.mark.parametrize(
    ("number", "event", "count"),
    [(signal.SIGINT, "step", 20), (signal.SIGTERM, "epoch", 4), (signal.SIGINT, "inside checkpoint.pt", 4)],
)
def test_a_stop_in_the_last_epoch_is_one_before_the_evaluation(
    number: int, event: str, count: int, server: Server, references: dict[str, Path], folder: Path
) -> None:
    config = configuration("streamed", folder / "run")
    outcome = server.run(config, event=event, count=count, signal=number)
    assert outcome.kind == "Interrupted", outcome.text
    assert place(folder / "run") == (4, 0)
    assert not (folder / "run" / "result.json").exists()
    assert server.run(config) == Outcome("done", steps=0)
    assert_same(folder / "run", references["streamed"])


def ignore_sighup(_: str) -> None:
    """As nohup does. (In the child.)"""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_under_nohup_a_closed_terminal_stops_nothing(server: Server, references: dict[str, Path], folder: Path) -> None:
    how = {"event": "step", "count": 3, "signal": signal.SIGHUP, "prepare": "test_resume ignore_sighup -"}
    assert server.run(configuration("streamed", folder / "run"), **how).kind == "done"
    assert_same(folder / "run", references["streamed"])


def test_a_second_control_c_stops_at_once_and_harms_nothing(
    server: Server, references: dict[str, Path], folder: Path
) -> None:
    config = configuration("streamed", folder / "run", checkpoint_minutes=0.0)
    how = {"signal": signal.SIGINT, "again": [signal.SIGINT]}
    outcome = server.run(config, event="inside checkpoint.pt", count=7, **how)
    assert outcome.kind == "KeyboardInterrupt", outcome.text
    assert place(folder / "run") == (1, 1)
    assert not [path.name for path in (folder / "run").iterdir() if path.name.endswith(".tmp")]
    assert server.run(config).kind == "done"
    assert_same(folder / "run", references["streamed"])


def test_the_handlers_of_signals_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otmix.training.outcome.draw_pictures", lambda run, plan: None)
    monkeypatch.setattr("otmix.training.outcome.write_page", lambda run_dir: None)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(RunConfig.from_dict({**TINY, "method": "erm", "epochs": 1, "out": str(tmp_path / "run")}))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_resuming_a_finished_run_changes_nothing(server: Server, references: dict[str, Path]) -> None:
    before = contents(references["streamed"])
    assert server.run(configuration("streamed", references["streamed"])) == Outcome("done", steps=0)
    assert contents(references["streamed"]) == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"epochs": 5},
        {"method": "cmo"},
        {"protocol": "paper"},
        {"lr": 0.05},
        {"max_per_class": 41},
        {"set": {"mix_from": 0.0}},
        {"precision": "bf16-mixed"},
    ],
)
def test_another_configuration_is_refused(change: dict[str, Any], server: Server, stopped: Path) -> None:
    before = contents(stopped)
    outcome = server.run(configuration("streamed", stopped, **change))
    assert outcome.kind == "UserError"
    assert next(iter(change)) in outcome.text
    assert contents(stopped) == before


@pytest.mark.parametrize("change", [{"checkpoint_minutes": 3.0}, {"workers": 1}, {"accelerator": "auto"}])
def test_where_and_how_it_is_computed_may_change(
    change: dict[str, Any], server: Server, stopped: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "moved")
    outcome = server.run(configuration("streamed", run_dir, **change))
    assert outcome.kind == "done", outcome.text
    assert_same(run_dir, references["streamed"])


def test_a_default_may_be_spelt_out(server: Server, stopped: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "moved")
    outcome = server.run(configuration("streamed", run_dir, set={**RUNS["streamed"]["set"], "box": "exact"}))
    assert outcome.kind == "done", outcome.text


@pytest.fixture(scope="module")
def stopped(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    outcome = server.run(configuration("streamed", run_dir), event="step", count=8, signal=signal.SIGINT)
    assert outcome.kind == "Interrupted", outcome.text
    return run_dir


def test_without_resume_a_begun_run_is_left_alone(server: Server, stopped: Path) -> None:
    before = contents(stopped)
    outcome = server.run(configuration("streamed", stopped, resume=False))
    assert outcome.kind == "UserError"
    assert "--resume" in outcome.text
    assert contents(stopped) == before


@pytest.fixture
def on_a_folder(tmp_path: Path) -> dict[str, Any]:
    """The configuration of a run on a folder of images, `data`."""
    from PIL import Image

    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(5):
                pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    return {
        "data": "folder",
        "root": str(tmp_path / "data"),
        "backbone": "resnet8",
        "method": "cmo",
        "epochs": 3,
        "batch_size": 4,
        "accelerator": "cpu",
        "resume": True,
        "out": str(tmp_path / "run"),
    }


def test_other_data_is_refused(server: Server, on_a_folder: dict[str, Any], tmp_path: Path) -> None:
    config, run_dir = on_a_folder, tmp_path / "run"
    assert server.run(config, event="step", count=4, signal=signal.SIGINT).kind == "Interrupted"
    before = contents(run_dir)
    changed = tmp_path / "data" / "train" / "a" / "0.png"
    kept = changed.read_bytes()
    changed.write_bytes((tmp_path / "data" / "train" / "b" / "1.png").read_bytes() + b"more")
    outcome = server.run(config)
    assert outcome.kind == "UserError"
    assert "data" in outcome.text
    assert contents(run_dir) == before
    changed.write_bytes(kept)
    assert server.run(config).kind == "done"


@pytest.mark.parametrize("finished", [False, True])
def test_the_data_may_have_moved(finished: bool, server: Server, on_a_folder: dict[str, Any], tmp_path: Path) -> None:
    config, run_dir, moved = on_a_folder, tmp_path / "run", tmp_path / "elsewhere" / "pictures"
    assert server.run({**config, "out": str(tmp_path / "reference")}).kind == "done"
    stopped = {} if finished else {"event": "step", "count": 4, "signal": signal.SIGINT}
    assert server.run(config, **stopped).kind == ("done" if finished else "Interrupted")
    moved.parent.mkdir()
    (tmp_path / "data").rename(moved)
    begun = contents(run_dir)
    outcome = server.run(config)
    assert outcome.kind == "UserError"
    assert "does not exist" in outcome.text
    assert contents(run_dir) == begun
    assert main(["train", "--resume", "--out", str(run_dir), "--root", str(moved)]) == 0
    for name in ("model.safetensors", "predictions.npz"):
        assert (run_dir / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()
    recorded = read_config(tmp_path / "reference").to_dict() | {"root": str(moved), "out": str(run_dir)}
    assert read_config(run_dir).to_dict() == recorded
    assert main(["train", "--resume", "--out", str(run_dir)]) == 0  # it knows where they are now
    assert main(["evaluate", str(run_dir)]) == 0
    assert main(["predict", str(run_dir), str(moved / "test")]) == 0


def test_other_data_elsewhere_is_refused(server: Server, on_a_folder: dict[str, Any], tmp_path: Path) -> None:
    config, run_dir = on_a_folder, tmp_path / "run"
    assert server.run(config, event="step", count=4, signal=signal.SIGINT).kind == "Interrupted"
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    (tmp_path / "other" / "train" / "a" / "0.png").unlink()
    before = contents(run_dir)
    outcome = server.run({**config, "root": str(tmp_path / "other")})
    assert outcome.kind == "UserError"
    assert "data are no longer those" in outcome.text
    assert contents(run_dir) == before
