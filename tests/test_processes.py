"""Two processes: the data of one, each image judged once, one F, one model; errors and stops come through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from PIL import Image

from otmix.cli import main
from otmix.config import RunConfig
from otmix.confusion import ConfusionCounter
from otmix.data import open_store
from otmix.errors import UserError
from otmix.losses import CrossEntropy
from otmix.randomness import Moment
from otmix.sampling import BackgroundStream, ForegroundStream, inverse_frequency
from otmix.training import launch, open_run, train
from otmix.training.launch import started_outside
from otmix.training.setup import load_data
from otmix.types import Items
from run_server import Outcome, Server
from test_resume import assert_same, configuration, place, rows

WORLD = 2


def record(folder: str) -> None:
    """Let each process of a run write down what it saw and what it became. (In the child; see `run_server`.)"""
    import otmix.training.run as run
    import otmix.training.statistics as statistics
    from otmix.data.stores import ResidentStore
    from otmix.mixer import BatchMixer
    from otmix.training.confusion_source import ConfusionSource

    fetch, estimate, finish, count = ResidentStore.fetch, ConfusionSource.estimate, run.finish, ConfusionCounter.add
    mix, summed = BatchMixer.__call__, statistics.summed
    kinds = ("fetched", "counted", "confusions", "weights", "transported", "statistics")
    seen: dict[str, list[Any]] = {kind: [] for kind in kinds}
    counts: list[Any] = []

    def fetched(self: ResidentStore, items: Items, seed: int | None) -> Any:
        if seed is not None:  # training
            assert items.index is not None
            seen["fetched"].append(items.index.clone())
        return fetch(self, items, seed)

    def counted(self: ConfusionCounter, labels: torch.Tensor, log_probabilities: torch.Tensor) -> None:
        counts.append((labels.clone(), log_probabilities.clone()))
        count(self, labels, log_probabilities)

    def estimated(self: ConfusionSource, *arguments: Any) -> Any:
        found = estimate(self, *arguments)
        seen["counted"].append(counts.copy())
        counts.clear()
        seen["confusions"].append(None if found is None else found.matrix.clone())
        return found

    def mixed(self: BatchMixer, *arguments: Any) -> Any:
        found = mix(self, *arguments)
        if found.pairs is not None and found.pairs.plan is not None:
            coupling = found.pairs.plan.coupling.clone()
            seen["transported"].append((coupling, found.pairs.foreground.clone(), found.pairs.background.clone()))
        return found

    def own_statistics(fabric: Any) -> Any:
        add_up = summed(fabric)
        assert add_up is not None

        def noted(own: torch.Tensor) -> torch.Tensor:
            seen["statistics"].append(own.clone())
            return add_up(own)

        return noted

    def finished(state: Any, plan: Any) -> None:
        finish(state, plan)
        seen["weights"].append(dict(state.state.model.state_dict()))
        with (Path(folder) / f"rank{state.fabric.global_rank}.pt").open("wb") as stream:
            torch.save(seen, stream)

    ResidentStore.fetch, ConfusionCounter.add = fetched, counted  # type: ignore[method-assign]
    ConfusionSource.estimate, run.finish = estimated, finished  # type: ignore[method-assign]
    BatchMixer.__call__ = mixed  # type: ignore[method-assign]
    statistics.summed = own_statistics


@dataclass(frozen=True)
class Recorded:
    run_dir: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def recorded(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Recorded]:
    """A run of two processes, made once."""
    base, made = tmp_path_factory.mktemp("recorded"), {}

    def make(name: str) -> Recorded:
        if name not in made:
            (base / name).mkdir(exist_ok=True)
            config = configuration(name, base / name / "run", devices=WORLD)
            outcome = server.run(config, prepare=f"test_processes record {base / name}")
            assert outcome.kind == "done", outcome.text
            ranks = [torch.load(base / name / f"rank{r}.pt", weights_only=True) for r in range(WORLD)]
            made[name] = Recorded(base / name / "run", ranks)
        return made[name]

    return make


def test_both_end_with_the_same_weights(recorded: Callable[[str], Recorded]) -> None:
    for name in ("streamed", "official", "reweighted"):
        run = recorded(name)
        first, second = (rank["weights"][0] for rank in run.ranks)
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different, name


def test_mixed_statistics_are_the_mean_of_what_the_processes_found(recorded: Callable[[str], Recorded]) -> None:
    ranks = recorded("streamed").ranks
    weights = ranks[0]["weights"][0]
    names = [name for name in weights if name.endswith(("running_mean", "running_var"))]
    own = zip(*(rank["statistics"] for rank in ranks), strict=True)
    for name, (first, second) in zip(names, own, strict=True):
        assert not torch.equal(first, second)
        torch.testing.assert_close(weights[name], (first + second) / 2)


@pytest.mark.parametrize("name", ["streamed", "official", "reweighted"])
def test_each_image_is_judged_once_by_the_model_that_is_kept(name: str, recorded: Callable[[str], Recorded]) -> None:
    run = open_run(recorded(name).run_dir)
    dataset = load_data(run.config)
    with np.load(run.run_dir / "predictions.npz") as found:
        index, labels, probabilities = found["index"], found["labels"], found["probabilities"]
    assert dataset.test is not None
    assert index.tolist() == list(range(len(dataset.test)))
    assert len(dataset.test) % WORLD == 1, "an odd number is the harder case"
    assert labels.tolist() == dataset.test.labels.tolist()
    store = open_store(dataset.test, dataset, "cpu", train=False)
    images = store.fetch(Items(dataset.test.labels, torch.arange(len(dataset.test))), None).images
    with torch.no_grad():
        expected = CrossEntropy(run.counts).probabilities(run.model(images))
    np.testing.assert_allclose(probabilities, expected.numpy(), atol=2e-3)
    assert run.result["evaluation"]["n"] == len(dataset.test)
    wrong = (expected.argmax(1) != dataset.test.labels).double().mean()
    assert run.result["evaluation"]["top1_error"] == pytest.approx(float(wrong), abs=2 / len(dataset.test))


def test_two_processes_see_what_one_sees(recorded: Callable[[str], Recorded]) -> None:
    run = recorded("reweighted")  # every batch is mixed
    dataset = load_data(open_run(run.run_dir).config)
    labels = dataset.train.labels
    backgrounds = BackgroundStream(labels, 32)
    foregrounds = ForegroundStream(labels, inverse_frequency(dataset.counts))
    fetched = [iter(rank["fetched"]) for rank in run.ranks]
    for epoch in range(4):
        for step, batch in enumerate(backgrounds.epoch(Moment(0, 0, epoch, 4))):
            n = len(batch)
            foreground = foregrounds.step(n + n % WORLD, Moment(0, 0, epoch, 4, step))
            for expected in (batch, foreground):
                parts = [next(one) for one in fetched]
                together = torch.stack(parts, dim=1).flatten()
                assert together[:n].tolist() == expected.index[:n].tolist()
                assert len(together) == n + n % WORLD
    assert all(next(one, None) is None for one in fetched)


@pytest.mark.parametrize("name", ["streamed", "official", "reweighted"])
def test_f_is_estimated_from_all_processes(name: str, recorded: Callable[[str], Recorded]) -> None:
    run = recorded(name)
    table = torch.zeros(10, 10, dtype=torch.float64)
    estimated = 0
    for epoch in range(3):  # after the last one there is no use for it
        table *= 0.9 if name == "streamed" else 0.0
        judged = [one for rank in run.ranks for one in rank["counted"][epoch]]
        for labels, said in judged:
            hard = torch.nn.functional.one_hot(said.argmax(1), 10)
            table.index_add_(0, labels, (said.exp() if name == "streamed" else hard).double())
        first, second = (rank["confusions"][epoch] for rank in run.ranks)
        if not judged:
            assert first is None
            assert second is None
            continue
        estimated += 1
        assert torch.equal(first, second)
        expected = table / table.sum(1, keepdim=True).clamp_min(1e-30)
        torch.testing.assert_close(first.double(), expected, atol=1e-5, rtol=0)
        if name != "streamed":
            dataset = load_data(open_run(run.run_dir).config)
            held_out = dataset.test if name == "official" else dataset.validation
            assert held_out is not None
            assert sum(len(labels) for labels, _ in judged) == len(held_out), "each image once"
    assert estimated >= 2
    assert len(run.ranks[0]["confusions"]) == 3


@pytest.mark.parametrize("name", ["streamed", "official"])
def test_transport_pairs_the_batches_of_both(name: str, recorded: Callable[[str], Recorded]) -> None:
    run = recorded(name)
    steps = list(zip(*(rank["transported"] for rank in run.ranks), strict=True))
    assert steps
    sizes = set()
    for (plan, foreground, background), (other, *theirs) in steps:
        assert torch.equal(plan, other)
        assert plan.shape[0] == plan.shape[1] == WORLD * len(foreground)
        best = plan.argmax(1)
        assert torch.equal(background, best[::WORLD])
        assert torch.equal(theirs[1], best[1::WORLD])
        sizes.add(len(plan))
    assert 32 in sizes


@pytest.mark.parametrize("name", ["streamed", "reweighted"])
def test_the_log_counts_all_processes(name: str, recorded: Callable[[str], Recorded]) -> None:
    run = recorded(name)
    logged = rows(run.run_dir)
    assert [row["epoch"] for row in logged] == [0, 1, 2, 3]
    trained = 132  # 131 images, and one again so that both have equally many
    with np.load(run.run_dir / "pairs.npz") as pairs:
        by = {key: int(pairs[key].sum()) for key in pairs.files}
    assert by["transport"] == round(sum(row["transport_share"] for row in logged) * trained)
    assert by["index"] + by["transport"] == round(sum(row["mixed_share"] for row in logged) * trained)


@pytest.mark.parametrize("name", ["streamed", "official"])
@pytest.mark.parametrize(("event", "count"), [("step", 8), ("epoch", 2), ("before metrics.jsonl", 3), ("epoch", 4)])
def test_a_stop_is_agreed_on_and_resumed(
    name: str, event: str, count: int, server: Server, recorded: Callable[[str], Recorded], tmp_path: Path
) -> None:
    config = configuration(name, tmp_path / "run", devices=WORLD)
    outcome = server.run(config, event=event, count=count, signal=signal.SIGTERM)
    assert outcome == Outcome("Interrupted", f"stopped; the run is saved in {tmp_path / 'run'}")
    assert (0, 0) < place(tmp_path / "run") <= (4, 0)
    assert not (tmp_path / "run" / "result.json").exists()
    assert server.run(config).kind == "done"
    assert_same(tmp_path / "run", recorded(name).run_dir)


@pytest.mark.parametrize(("event", "count"), [("inside checkpoint.pt", 2), ("after checkpoint.pt", 3), ("step", 13)])
def test_killed_and_resumed(
    event: str, count: int, server: Server, recorded: Callable[[str], Recorded], tmp_path: Path
) -> None:
    """The processes die by themselves; the one that started them tells."""
    config = configuration("streamed", tmp_path / "run", devices=WORLD)
    outcome = server.run(config, event=event, count=count)
    assert outcome.kind == "UserError"
    assert "SIGKILL" in outcome.text
    assert server.run(config).kind == "done"
    assert_same(tmp_path / "run", recorded("streamed").run_dir)


def ranks_of(pid: int) -> list[int]:
    """The processes that compute a run which the process `pid` has started, by rank."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(
        int(child) for child in children if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()
    )


def control_c(pid: int) -> None:
    """As a terminal sends it: to all of its processes."""
    for process in [*ranks_of(pid), pid]:
        os.kill(process, signal.SIGINT)


def wait_for(happened: Callable[[], Any]) -> None:
    ends = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


def assert_gone(processes: list[int]) -> None:
    assert processes
    wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


@pytest.mark.parametrize("rank", range(WORLD))
def test_one_that_the_system_kills_ends_the_run(
    rank: int, server: Server, recorded: Callable[[str], Recorded], tmp_path: Path
) -> None:
    config = configuration("streamed", tmp_path / "run", devices=WORLD)
    pid = server.start(config)
    wait_for((tmp_path / "run" / "checkpoint.pt").exists)
    ranks = ranks_of(pid)
    os.kill(ranks[rank], signal.SIGKILL)
    outcome = server.wait()
    assert outcome.kind == "UserError", outcome.text
    assert outcome.text.startswith(f"the system ended process {rank} of this run (SIGKILL)")
    assert "--resume" in outcome.text
    assert_gone(ranks)
    assert server.run(config).kind == "done"
    assert_same(tmp_path / "run", recorded("streamed").run_dir)


@pytest.mark.parametrize("stop", [control_c, lambda pid: os.kill(pid, signal.SIGTERM)], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_while_the_pictures_are_drawn(stop: Callable[[int], None], server: Server, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = configuration("streamed", run_dir, devices=WORLD)
    pid = server.start(config, pictures=True)
    wait_for((run_dir / "model.safetensors").exists)
    ranks = ranks_of(pid)
    stop(pid)
    outcome = server.wait()
    assert outcome.kind == "KeyboardInterrupt", outcome.text
    assert_gone(ranks)
    assert not (run_dir / "result.json").exists()
    assert server.run(config).kind == "done"


def test_a_second_control_c_does_not_wait_for_a_process_that_hangs(server: Server, tmp_path: Path) -> None:
    pid = server.start(configuration("streamed", tmp_path / "run", devices=WORLD, epochs=10_000))
    wait_for((tmp_path / "run" / "checkpoint.pt").exists)
    ranks = ranks_of(pid)
    os.kill(ranks[1], signal.SIGSTOP)
    os.kill(pid, signal.SIGINT)
    time.sleep(1)
    assert ranks_of(pid) == ranks
    os.kill(pid, signal.SIGINT)
    assert server.wait().kind == "KeyboardInterrupt"
    assert_gone(ranks)


def stopped_by(number: int, run_dir: Path, epochs: int, when: Callable[[int], object]) -> tuple[str, list[int]]:
    """What the command says that is sent a signal, as a terminal does, and the processes that it had started."""
    command = [sys.executable, "-m", "otmix", "train", "--devices", str(WORLD), "--accelerator", "cpu"]
    command += ["--method", "erm", "--epochs", str(epochs), "--out", str(run_dir)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            when(process.pid)
            ranks = ranks_of(process.pid)
            os.killpg(process.pid, number)
            said, _ = process.communicate(timeout=60)
        except BaseException:  # whatever it was, nobody must wait for 10,000 epochs
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 130, said
    assert "Traceback" not in said
    return said, ranks


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_the_processes_start(number: int, tmp_path: Path) -> None:
    def they_import_torch(pid: int) -> None:
        wait_for(lambda: len(ranks_of(pid)) == WORLD)
        time.sleep(0.5)

    said, ranks = stopped_by(number, tmp_path / "run", 10_000, they_import_torch)
    assert said == "\notmix: stopped\n"
    assert_gone(ranks)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # half a minute on a busy machine
def test_a_stop_at_the_end_as_a_user_sees_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    said, ranks = stopped_by(signal.SIGINT, run_dir, 1, lambda _: wait_for((run_dir / "model.safetensors").exists))
    assert said.endswith(
        f"its last checkpoint is kept; this goes on with it:\n  otmix train --resume --out {run_dir}\n"
    )
    assert_gone(ranks)


def test_started_as_a_user_starts_it(recorded: Callable[[str], Recorded], tmp_path: Path) -> None:
    """Fresh processes, one of which starts the others, end where the forked ones of these tests do."""
    config = {**configuration("streamed", tmp_path / "run", devices=WORLD)}
    script = tmp_path / "script.py"
    script.write_text(
        "from otmix.config import RunConfig\n"
        "from otmix.training import train\n"
        "if __name__ == '__main__':\n"
        f"    train(RunConfig.from_dict({config!r}))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == rows(recorded("streamed").run_dir)
    weights = [run / "model.safetensors" for run in (tmp_path / "run", recorded("streamed").run_dir)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_more_processes_than_cores_are_refused_before_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_start", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(launch, "cores", lambda: 4)
    argv = ["train", "--accelerator", "cpu", "--epochs", "1", "--batch-size", "60", "--out", str(tmp_path / "run")]
    assert main([*argv, "--devices", "5"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("otmix: --devices 5 would start as many processes on 4 cores, ")
    assert said.endswith("; give at most 4\n")
    assert not (tmp_path / "run").exists()


def test_an_error_of_all_processes_arrives_as_one_sentence(server: Server, tmp_path: Path) -> None:
    config = configuration("streamed", tmp_path / "run", devices=WORLD, final_split="validation")
    outcome = server.run(config)
    assert outcome.kind == "UserError"
    assert "--validation-per-class" in outcome.text
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_stops_the_others(server: Server, tmp_path: Path) -> None:
    """Each process reads its own images from the disk here; the second one meets a broken file."""
    for split, n in (("train", 8), ("test", 3)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(i).integers(0, 255, (70, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    broken = tmp_path / "data" / "train" / "a" / "3.png"
    config = {
        "data": "folder",
        "root": str(tmp_path / "data"),
        "image_size": 66,
        "backbone": "resnet8",
        "method": "erm",
        "epochs": 2,
        "batch_size": 8,
        "accelerator": "cpu",
        "workers": 0,
        "devices": WORLD,
        "out": str(tmp_path / "run"),
    }
    broken.write_bytes(broken.read_bytes()[:500])
    outcome = server.run(config)
    assert outcome.kind == "UserError", outcome.text
    assert str(broken) in outcome.text


def test_a_full_disk_stops_all(server: Server, tmp_path: Path) -> None:
    """Only the first process writes."""
    config = configuration("streamed", tmp_path / "run", devices=WORLD)
    outcome = server.run(config, prepare="test_bad_input fill_the_disk checkpoint.pt 2")
    assert outcome.kind == "UserError", outcome.text
    assert "disk is full" in outcome.text
    assert place(tmp_path / "run") == (1, 0)
    assert server.run(config).kind == "done"


def test_a_loss_that_is_not_finite_stops_all(server: Server, tmp_path: Path) -> None:
    config = configuration("streamed", tmp_path / "run", devices=WORLD)
    outcome = server.run(config, prepare="test_bad_input poison 8 1")
    assert outcome.kind == "UserError", outcome.text
    assert "step 2 of epoch 1 " in outcome.text
    assert place(tmp_path / "run") == (1, 0)


@pytest.mark.slow  # half a minute on a busy machine
def test_torchrun_starts_the_processes(recorded: Callable[[str], Recorded], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(
        "from otmix.config import RunConfig\n"
        "from otmix.training import train\n"
        f"train(RunConfig.from_dict({configuration('streamed', run_dir, devices=WORLD)!r}))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(script)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert rows(run_dir) == rows(recorded("streamed").run_dir)
    weights = [run / "model.safetensors" for run in (run_dir, recorded("streamed").run_dir)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "otmix",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
"""What SLURM tells the first of two processes on one machine."""


def beside(argument: str) -> None:
    """Start the second process of a run beside this one, as SLURM does, and note how it ends. (In the child.)"""
    note, config = argument.split(" ", 1)
    os.environ |= SLURM | {"MASTER_PORT": str(find_free_network_port())}
    if os.fork() > 0:
        return
    os.environ |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    ended = "by a mistake of ours"
    try:
        train(RunConfig.from_dict(json.loads(config)))
        ended = "done"
    except (UserError, SystemExit) as error:
        ended = f"{type(error).__name__}: {error}"
    finally:
        Path(note).write_text(ended)
        os._exit(0)


def run_beside(server: Server, folder: Path, config: dict[str, Any], **how: Any) -> tuple[Outcome, str]:
    """How the first and the second process of a run end that SLURM starts."""
    note = folder / "second.txt"
    outcome = server.run(config, prepare=f"test_processes beside {note} {json.dumps(config)}", **how)
    wait_for(lambda: note.exists() and note.read_text())
    return outcome, note.read_text()


def test_slurm_starts_the_processes(server: Server, recorded: Callable[[str], Recorded], tmp_path: Path) -> None:
    config = configuration("streamed", tmp_path / "run", devices=WORLD)
    outcome, second = run_beside(server, tmp_path, config)
    assert (outcome.kind, second) == ("done", "done"), outcome.text
    assert_same(tmp_path / "run", recorded("streamed").run_dir)


def test_a_stop_ends_processes_that_slurm_started(
    server: Server, recorded: Callable[[str], Recorded], tmp_path: Path
) -> None:
    config = configuration("streamed", tmp_path / "run", devices=WORLD)
    outcome, second = run_beside(server, tmp_path, config, event="step", count=8, signal=signal.SIGTERM)
    assert (outcome.kind, second) == ("Interrupted", "SystemExit: 130"), outcome.text
    assert server.run(config).kind == "done", "by our own processes"
    assert_same(tmp_path / "run", recorded("streamed").run_dir)


def test_the_others_end_when_the_first_may_not_begin(server: Server, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").touch()
    config = configuration("streamed", tmp_path / "run", devices=WORLD)
    outcome, second = run_beside(server, tmp_path, config)
    assert outcome.kind == "UserError", outcome.text
    assert "is not empty and holds no run" in outcome.text
    assert second.startswith("ConnectionLost: another process of this run has ended")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}, "torchrun starts 4 processes"),
        (SLURM | {"SLURM_NTASKS_PER_NODE": "4"}, "needs --nodes=1 --ntasks-per-node=2"),
        (SLURM | {"SLURM_NNODES": "2"}, "needs --nodes=1 --ntasks-per-node=2"),
    ],
)
def test_other_processes_than_asked_for_are_refused(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        started_outside(RunConfig(devices=WORLD))


def test_runs_of_one_process_may_be_the_tasks_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert not started_outside(RunConfig())
    assert started_outside(RunConfig(devices=WORLD))


def test_processes_start_where_there_is_no_resource_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, where its module cannot be imported."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "multiprocessing.resource_tracker", None)
    started: list[object] = []
    monkeypatch.setattr("torch.multiprocessing.start_processes", lambda *given, join: started.append(given))
    launch._start(2, ("work",))
    assert started == [(launch._in_one_process, ("work",), 2)]
