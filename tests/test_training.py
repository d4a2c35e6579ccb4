"""The training loop on tiny networks: what it draws, what it logs, what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from otmix.config import RunConfig
from otmix.data import ResidentStore, open_store
from otmix.errors import UserError
from otmix.evaluation import evaluate_predictions
from otmix.losses import LOSSES, CrossEntropy, effective_number_weights
from otmix.methods import parse_method
from otmix.pairing import Curriculum, PairingContext
from otmix.protocols import Overrides
from otmix.randomness import Moment
from otmix.sampling import BackgroundStream
from otmix.training import Interrupted, Silent, open_run, records
from otmix.training import train as train_as_asked
from otmix.training.build import build_run
from otmix.training.checkpoint import load_checkpoint
from otmix.training.evaluate import predict_items
from otmix.training.launch import make_fabric, threads_for
from otmix.training.loop import RunState, checkpoint_path, finish_epoch, restore, save, train_epoch
from otmix.training.processes import StopRequest
from otmix.training.records import command
from otmix.training.schedules import Schedule
from otmix.training.setup import load_data, prepare
from otmix.training.stage import LossParts, StepItems, StepState, mix_and_classify
from otmix.training.watching import evaluate
from otmix.transport import batched
from otmix.types import Batch, ClassCounts, Confusion, ConfusionOrigin, Items, Plan

TINY = RunConfig(
    data="digits",
    max_per_class=40,  # 131 images, the rarest class with two
    batch_size=32,
    epochs=3,
    accelerator="cpu",
    set=Overrides(mix_from=0.0, mix_until=1.0),
)
IMAGES = 131


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr("otmix.training.outcome.draw_pictures", lambda run, plan: None)
    monkeypatch.setattr("otmix.training.outcome.write_page", lambda run_dir: None)


def train(config: RunConfig, *more: Any) -> Path:
    """With those of its settings that its method reads: TINY's are of mixing."""
    return train_as_asked(replace(config, set=parse_method(config.method).only_own(config.set)), *more)


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("erm", {"alpha": 2.0}, "--set.alpha changes nothing for ce"),
        ("otmix", {"omega": 1.0, "keep_diagonal": True}, "--set.keep_diagonal changes nothing for ce"),
        ("otmix", {"mix_from": 1.5}, "mix_from is a share"),
        ("otmix", {"confusion_from": "held-out", "confusion_per_class": 7}, "F comes from all validation images"),
    ],
)
def test_settings_that_change_nothing_are_refused_from_python_too(
    method: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = replace(TINY, method=method, set=Overrides(**changed), validation_per_class=5, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=message):
        train_as_asked(config)
    assert not (tmp_path / "run").exists()


def log(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model.safetensors").read_bytes()


def built(config: RunConfig, run_dir: Path = Path("nowhere")) -> RunState:
    """A run before its first step."""
    return build_run(make_fabric(config), run_dir, prepare(config, load_data(config)), Silent())


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("protocol", ["clean", "paper", "official"])
@pytest.mark.parametrize("method", ["erm", "cmo", "otmix", "drw", "drw+otmix", "ride+otmix"])
def test_every_method_under_every_protocol(method: str, protocol: Any, tmp_path: Path) -> None:
    run_dir = train(replace(TINY, method=method, protocol=protocol, out=str(tmp_path / "run")))
    rows, result = log(run_dir), json.loads((run_dir / "result.json").read_text())
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(row["loss"]) and 0 <= row["train_error"] <= 1 for row in rows)
    assert any(row["mixed_share"] > 0 for row in rows) == ("mo" in method or "otmix" in method)
    assert any(row["transport_share"] > 0 for row in rows) == ("otmix" in method)
    assert all((row["test_error"] is not None) == (protocol == "official") for row in rows)
    assert result["looks_at_test"] == (protocol == "official")
    assert result["protocol"] == protocol
    assert result["evaluation"]["n"] == len(np.load(run_dir / "predictions.npz")["index"])


@pytest.mark.usefixtures("no_pictures")
def test_it_learns(tmp_path: Path) -> None:
    config = replace(TINY, method="otmix", max_per_class=None, epochs=15, out=str(tmp_path / "run"))
    result = open_run(train(config)).result
    assert result["evaluation"]["top1_error"] < 0.5  # 0.9 is chance


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("method", ["erm", "otmix"])
def test_the_seed_decides_and_nothing_else(method: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    once = train(replace(TINY, method=method, out=str(tmp_path / "once")))
    torch.manual_seed(2)
    torch.rand(17)
    again = train(replace(TINY, method=method, out=str(tmp_path / "again"), checkpoint_minutes=0, workers=0))
    other = train(replace(TINY, method=method, out=str(tmp_path / "other"), seed=1))
    assert weights(once) == weights(again)
    assert weights(once) != weights(other)
    assert open_run(once).data == open_run(other).data


@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
def test_what_each_step_gets_and_makes_of_it(reduction: Any, tmp_path: Path) -> None:
    """Augmented images, the newest F, class weights once they are due; and its loss is what these give."""
    changed = replace(TINY.set, mix_probability=1.0, curriculum_power=0.0, weighted_mean=reduction)
    config = replace(TINY, method="ce-drw+otmix", set=changed)
    run = built(config, tmp_path)
    taken: list[tuple[int, StepItems, PairingContext, LossParts]] = []

    def watched(state: StepState, items: StepItems, context: PairingContext) -> LossParts:
        parts = mix_and_classify(state, items, context)
        taken.append((run.epoch, items, context, parts))
        return parts

    run.stage = replace(run.stage, step=watched)
    newest: list[Confusion | None] = [None]
    for _ in range(3):
        train_epoch(run)
        finish_epoch(run)
        newest.append(run.confusion)
    assert [epoch for epoch, *_ in taken] == [0] * 5 + [1] * 5 + [2] * 5
    due = effective_number_weights(load_data(config).counts, 0.9999)
    for epoch, items, context, parts in taken:
        assert context.confusion is newest[epoch]
        weight = due if epoch == 2 else None  # from 160/240 of the run on
        losses, target, expected = -torch.log_softmax(parts.output.logits.detach(), 1), parts.mixed.target, 0.0
        n = len(losses)
        for column in range(2):
            labels, shares = target.labels[:, column].tolist(), target.shares[:, column].tolist()
            w = [1.0 if weight is None else float(weight[label]) for label in labels]
            each = [w[i] * shares[i] * float(losses[i, labels[i]]) for i in range(n)]
            expected += sum(each) / (sum(w) if reduction == "weighted-mean" else n)
        assert float(parts.loss.detach()) == pytest.approx(expected, rel=1e-5)
        assert items.foreground is not None
        for batch in (items.background, items.foreground):
            plain = run.store.fetch(batch.items, None).images
            assert int((batch.images != plain).flatten(1).any(1).sum()) > len(batch) / 2
    first, second = newest[1], newest[2]
    assert first is not None
    assert second is not None
    assert not torch.equal(first.matrix, second.matrix)


@pytest.mark.usefixtures("no_pictures")
def test_the_shares_are_those_of_the_schedules(tmp_path: Path) -> None:
    """Which batches are mixed, and which by transport, is a function of the seed and the place: recomputed here."""
    config = replace(
        TINY,
        epochs=8,
        batch_size=16,
        set=Overrides(mix_probability=0.6, mix_from=0.25, mix_until=0.875, curriculum_power=0.5, mix_fraction=0.5),
        out=str(tmp_path / "run"),
    )
    run_dir = train(config)
    plan = prepare(config, load_data(config))
    mixer = plan.stages[0].mixer
    assert mixer is not None
    assert isinstance(mixer.pairing, Curriculum)
    sizes = [16] * 8 + [3]
    transported_in_all = mixed_in_all = 0
    for row in log(run_dir):
        mixed = transported = 0
        for step, size in enumerate(sizes):
            moment = Moment(0, 0, row["epoch"], 8, step)
            chosen = mixer.schedule.which(moment, size)  # half of three images is one or two
            assert chosen is not None
            assert int(chosen.sum()) in (8, 1, 2)
            here = int(chosen.sum()) * mixer.schedule.mixes(moment)
            mixed += here
            transported += here * (mixer.pairing.choose(moment) is mixer.pairing.then)
        assert row["mixed_share"] == pytest.approx(mixed / IMAGES)
        assert row["transport_share"] == pytest.approx(transported / IMAGES)
        assert (row["marginal_error"] is None) == (transported == 0)
        assert (mixed > 0) == (2 <= row["epoch"] < 7)
        mixed_in_all, transported_in_all = mixed_in_all + mixed, transported_in_all + transported
    pairs = np.load(run_dir / "pairs.npz")
    assert pairs["transport"].sum() == transported_in_all > 0
    assert pairs["index"].sum() == mixed_in_all - transported_in_all > 0


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("method", "rules"),
    [
        ("erm", {}),
        ("ce+cutmix", {"within-batch": 2 * IMAGES}),
        ("ce+confusion", {"index": IMAGES, "confusion": IMAGES}),
    ],
)
def test_pairs_are_kept_by_the_rule_that_made_them(method: str, rules: dict[str, int], tmp_path: Path) -> None:
    """Before F is known, the confusion pairs at random."""
    changed = Overrides(mix_from=0.0, mix_until=1.0, mix_probability=1.0) if rules else Overrides()
    run_dir = train(replace(TINY, method=method, epochs=2, set=changed, out=str(tmp_path / "run")))
    with np.load(run_dir / "pairs.npz") as pairs:
        assert {rule: int(pairs[rule].sum()) for rule in pairs.files} == rules


@pytest.mark.usefixtures("no_pictures")
def test_transport_takes_over(tmp_path: Path) -> None:
    config = replace(TINY, protocol="paper", set=Overrides(), epochs=20, backbone="resnet8", out=str(tmp_path / "run"))
    rows = log(train(config))
    assert all(row["mixed_share"] == 1.0 for row in rows)
    early, late = (np.mean([row["transport_share"] for row in part]) for part in (rows[:10], rows[10:]))
    assert late > early + 0.2
    assert rows[-1]["transport_share"] == 1.0  # (t/T) is 1 in the last epoch


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"schedule": "steps", "epochs": 12, "lr": 0.2},
            lambda e, s: 0.2 * (1 if e < 5 else 0.1 if e < 8 else 0.01 if e < 10 else 1e-4),
        ),
        (
            {"schedule": "steps", "epochs": 12, "warmup": 0.25, "lr": 0.1},
            lambda e, s: 0.1 * ((e + 1) / 3 if e < 3 else 1 if e < 5 else 0.1 if e < 8 else 0.01 if e < 10 else 1e-4),
        ),
        (
            {"schedule": "cosine", "epochs": 4, "optimizer": "adamw", "lr": 0.01},
            lambda e, s: 0.01 * 0.5 * (1 + math.cos(math.pi * (5 * e + s) / 20)),
        ),
        (
            {"schedule": "cosine", "epochs": 4, "warmup": 0.25, "lr": 0.01},
            lambda e, s: 0.01 * ((s + 1) / 6 if e == 0 else 0.5 * (1 + math.cos(math.pi * (5 * e + s - 5) / 15))),
        ),
    ],
)
def test_each_step_has_the_learning_rate_of_the_schedule(
    settings: dict[str, Any],
    expected: Callable[[int, int], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import otmix.training.build as build

    used: list[list[float]] = []
    build_optimizer = build.build_optimizer

    def watched(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        optimizer.register_step_pre_hook(lambda o, *_: used.append([group["lr"] for group in o.param_groups]))
        return optimizer

    monkeypatch.setattr(build, "build_optimizer", watched)
    config = replace(TINY, method="erm", out=str(tmp_path / "run"), **settings)
    rows = log(train(config))
    steps = [(e, s) for e in range(config.epochs or 0) for s in range(5)]
    assert len(used) == len(steps)
    for (epoch, step), rates in zip(steps, used):
        assert rates == pytest.approx([expected(epoch, step)] * len(rates), rel=1e-9)
    assert [row["lr"] for row in rows] == pytest.approx([expected(row["epoch"], 0) for row in rows])


def test_sgd_has_the_numbers_of_the_configuration() -> None:
    (group,) = built(replace(TINY, optimizer="sgd", weight_decay=0.3, nesterov=True)).optimizer.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0.3)


def test_adamw_decays_neither_biases_nor_normalisation() -> None:
    run = built(replace(TINY, optimizer="adamw", weight_decay=0.3))
    decay = {id(one): group["weight_decay"] for group in run.optimizer.param_groups for one in group["params"]}
    assert {(one.ndim <= 1, decay.pop(id(one))) for one in run.state.model.parameters()} == {(True, 0.0), (False, 0.3)}
    assert not decay


@pytest.mark.usefixtures("no_pictures")
def test_the_loss_is_told_how_far_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Listening(CrossEntropy):
        def per_label(self, output: Any, labels: Tensor, progress: float) -> Tensor:
            told.append(progress)
            return super().per_label(output, labels, progress)

    monkeypatch.setitem(LOSSES, "listening", Listening)
    train(replace(TINY, method="listening", out=str(tmp_path / "run")))
    assert told == [epoch / 3 for epoch in range(3) for _ in range(5)]


def test_no_two_batches_of_an_epoch_are_augmented_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    fetch = ResidentStore.fetch

    def watched(self: ResidentStore, items: Items, seed: int | None) -> Batch:
        seeds.append(seed)
        return fetch(self, items, seed)

    monkeypatch.setattr(ResidentStore, "fetch", watched)
    train_epoch(built(replace(TINY, protocol="paper")))
    assert None not in seeds
    assert len(set(seeds)) == len(seeds) == 2 * 5


# --- probabilities are what the loss takes the logits for ---

POST_HOC = replace(TINY, method="logit-adjustment+otmix", batch_size=131, set=Overrides(parts={"loss.post_hoc": True}))


def everything(run: RunState) -> tuple[Items, Tensor]:
    """All training images, and what the loss says of them."""
    labels = run.background.labels
    items = Items(labels, torch.arange(len(labels)))
    with torch.no_grad():
        output = run.state.model.eval()(run.store.fetch(items, None).images)
    adjusted = run.state.criterion.probabilities(output)
    assert not torch.allclose(adjusted, output.logits.softmax(1), atol=0.01)
    return items, adjusted


def test_the_streamed_confusion_has_the_probabilities_of_the_loss() -> None:
    run = built(POST_HOC)
    items, want = everything(run)
    batch = run.store.fetch(items, None)
    seen = run.state.make_embed(StepItems(batch, None))(batch.items).log_probabilities
    assert seen is not None
    torch.testing.assert_close(seen.exp(), want)


@pytest.mark.parametrize("soft", [True, False])
def test_a_confusion_of_a_pass_has_the_probabilities_of_the_loss(soft: bool) -> None:
    changed = replace(POST_HOC.set, confusion_from="train", confusion_soft=soft)
    run = built(replace(POST_HOC, set=changed))
    items, want = everything(run)
    if not soft:
        want = torch.nn.functional.one_hot(want.argmax(1), 10).float()
    counts = torch.zeros(10, 10).index_add(0, items.labels, want)
    assert run.confusion_source is not None
    found = run.confusion_source.estimate(run.state, None)
    assert found is not None
    torch.testing.assert_close(found.matrix, counts / counts.sum(1, keepdim=True))


def test_the_evaluation_has_the_probabilities_of_the_loss() -> None:
    run = built(POST_HOC)
    items, want = everything(run)
    heard: list[tuple[int, int]] = []
    found = predict_items(
        run.fabric, run.state.model, run.state.criterion, run.store, items, 50, lambda *told: heard.append(told)
    )
    torch.testing.assert_close(found, want)
    n = len(items)
    assert heard == [(min(done, n), n) for done in range(50, n + 50, 50)]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("method", ["erm", "otmix"])
def test_a_last_batch_and_a_class_of_one_image(method: str, tmp_path: Path) -> None:
    config = replace(TINY, method=method, imbalance=60.0, out=str(tmp_path / "run"))
    plan = prepare(config, load_data(config))
    assert int(plan.dataset.counts.counts.min()) == 1
    config = replace(config, batch_size=(plan.dataset.counts.total - 1) // 3, protocol="paper")
    assert BackgroundStream(plan.dataset.train.labels, config.batch_size or 0).steps_per_epoch == 4
    assert plan.dataset.counts.total % (config.batch_size or 0) == 1
    rows = log(train(config))
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.usefixtures("no_pictures")
def test_the_best_epoch_on_the_test_set_is_the_result_of_official(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def factor(self: Schedule, epoch: int, epochs: int, step: int = 0, steps: int = 1) -> float:
        return 1.0 if epoch + 1 < epochs else 100.0  # which ruins it

    monkeypatch.setattr(Schedule, "factor", factor)
    run_dir = train(replace(TINY, protocol="official", epochs=6, out=str(tmp_path / "run")))
    errors = [row["test_error"] for row in log(run_dir)]
    run = open_run(run_dir)
    assert min(errors) < errors[-1], "the last epoch should not be the best one here"
    assert run.result["headline_epoch"] == errors.index(min(errors)) + 1
    assert run.result["evaluation"]["top1_error"] == pytest.approx(min(errors))
    assert evaluated(run_dir) == pytest.approx(min(errors))


def test_the_best_epoch_so_far_is_resumed(tmp_path: Path) -> None:
    config = replace(TINY, protocol="official")
    run, other = built(config, tmp_path), built(config, tmp_path)
    run.watch(run, False)
    save(run)
    restore(other, load_checkpoint(checkpoint_path(tmp_path)))
    assert other.best == run.best
    assert run.best is not None


def evaluated(run_dir: Path) -> float:
    """The test error of the weights that a run left, computed anew."""
    run = open_run(run_dir)
    dataset = load_data(run.config)
    assert dataset.test is not None
    store = open_store(dataset.test, dataset, "cpu", train=False)
    with torch.no_grad():
        images = store.fetch(Items(dataset.test.labels, torch.arange(len(dataset.test))), None).images
        probabilities = run.criterion.probabilities(run.model(images))
    return evaluate_predictions(probabilities, dataset.test.labels, run.counts).top1_error


def test_progress_costs_no_whole_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, method="erm", validation_per_class=2)
    run, plan = built(config, tmp_path), prepare(config, load_data(config))
    assert plan.dataset.validation is not None
    store = plan.store("validation", run.fabric)
    labels = plan.dataset.validation.labels
    whole, _ = evaluate(run, plan, store, Items(labels, torch.arange(len(labels))))
    monkeypatch.delattr("otmix.training.evaluate.evaluate_predictions")
    assert run.watch(run, False)["validation_error"] == whole.top1_error


@pytest.mark.usefixtures("no_pictures")
def test_what_is_watched(tmp_path: Path) -> None:
    probed = log(train(replace(TINY, method="erm", evaluate_every=2, out=str(tmp_path / "probed"))))
    assert [row["probe_error"] is not None for row in probed] == [False, True, True]  # always after the last epoch
    train(replace(TINY, method="erm", out=str(tmp_path / "each")))
    assert weights(tmp_path / "probed") == weights(tmp_path / "each")
    assert all(row["validation_error"] is None and row["test_error"] is None for row in probed)
    config = replace(TINY, method="erm", validation_per_class=2, final_split="validation", out=str(tmp_path / "val"))
    run_dir = train(config)
    validated = log(run_dir)
    assert all(row["probe_error"] is None and row["validation_error"] is not None for row in validated)
    result = open_run(run_dir).result
    assert result["split"] == "validation"
    assert result["headline_epoch"] == len(validated)
    assert result["evaluation"]["n"] == 20
    assert result["evaluation"]["top1_error"] == pytest.approx(validated[-1]["validation_error"])


@pytest.mark.usefixtures("no_pictures")
def test_the_test_images_decide_nothing_but_under_official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test images, same weights."""
    import otmix.training.setup as setup

    once = train(replace(TINY, out=str(tmp_path / "once")))
    load = setup.load_dataset

    def other(*arguments: Any, **settings: Any) -> Any:
        dataset = load(*arguments, **settings)
        return replace(dataset, test=dataset.train.select(torch.arange(50)))

    monkeypatch.setattr(setup, "load_dataset", other)
    again = train(replace(TINY, out=str(tmp_path / "again")))
    assert open_run(again).result["evaluation"]["n"] == 50
    assert weights(once) == weights(again)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("pixels", "threads"), [(64, 1), (4095, 1), (4096, 1), (8192, 2), (2**20, 3)])
def test_a_small_step_has_few_threads(pixels: int, threads: int) -> None:
    with suppress(KeyError), threads_for(pixels, torch.device("cpu")):
        assert torch.get_num_threads() == threads
        raise KeyError  # whatever ends a run gives the threads back
    assert torch.get_num_threads() == 3
    with threads_for(pixels, torch.device("cuda")):
        assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(("cores", "processes", "threads"), [(4, 2, 2), (8, 2, 3), (1, 2, 1), (1, 1, 3)])
def test_processes_of_a_machine_share_its_cores(
    cores: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otmix.training.launch.cores", lambda: cores)
    with threads_for(2**20, torch.device("cpu"), processes):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads", "no_pictures")
def test_a_run_has_the_threads_that_its_batches_can_use(tmp_path: Path) -> None:
    for batch, threads in ((32, 1), (128, 2)):  # of 8 × 8 pixels
        run_dir = train(replace(TINY, batch_size=batch, epochs=1, out=str(tmp_path / str(batch))))
        assert json.loads((run_dir / "environment.json").read_text())["threads"] == threads
    assert torch.get_num_threads() == 3


def test_the_run_directory_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTMIX_RUNS", str(tmp_path))
    run_dir = train(TINY)
    assert run_dir.parent == tmp_path
    assert run_dir.name.startswith("digits-ce+otmix-clean-seed0-")
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert files - {".lock"} == {
        "checkpoint.pt",
        "config.yaml",
        "data.json",
        "environment.json",
        "figures/mixed.png",
        "figures/plan.png",
        "metrics.jsonl",
        "model.safetensors",
        "pairs.npz",
        "predictions.npz",
        "report.html",
        "result.json",
        "settings.json",
    }
    for name in ("mixed.png", "plan.png"):
        with Image.open(run_dir / "figures" / name) as picture:
            assert min(picture.size) > 200
    with np.load(run_dir / "predictions.npz") as found:
        assert found["probabilities"].dtype == np.float16
        assert found["probabilities"].shape == (len(found["index"]), 10)
        np.testing.assert_allclose(found["probabilities"].sum(1), 1, atol=5e-3)
        error = int((found["predicted"] != found["labels"]).sum()) / len(found["labels"])
        assert (found["predicted"] == found["probabilities"].argmax(1)).mean() > 0.9  # but where float16 made ties
    result = json.loads((run_dir / "result.json").read_text())
    assert result["evaluation"]["top1_error"] == pytest.approx(error, abs=1e-12)
    assert result["hash"] == open_run(run_dir).config.hash
    text = "".join((run_dir / name).read_text() for name in ("environment.json", "data.json", "result.json"))
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


@pytest.mark.parametrize(
    ("typed", "given", "recorded"),
    [
        (["/usr/bin/otmix", "train", "--root", "my birds"], "", "otmix train --root 'my birds'"),
        (["/lib/otmix/__main__.py", "train"], "", "otmix train"),
        (["own.py", "--lr", "1"], "", "python"),
        (["/usr/bin/otmix", "train"], "otmix compare 'a b'", "otmix compare 'a b'"),
    ],
)
def test_the_recorded_command_can_be_typed_again(
    typed: list[str], given: str, recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", typed)
    monkeypatch.setenv("OTMIX_COMMAND", given)
    assert command() == recorded


def test_the_commit_says_whether_anything_of_the_package_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "package" / "training" / "records.py"
    for path in (file, tmp_path / "package" / "losses" / "one.py", tmp_path / "README.md"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(records, "__file__", str(file))
    (tmp_path / "README.md").write_text("second")
    commit = records.source_commit()
    assert commit is not None
    assert len(commit) == 12
    new = tmp_path / "package" / "losses" / "two.py"
    new.write_text("second")
    assert records.source_commit() == f"{commit}+"
    new.unlink()
    (tmp_path / "package" / "losses" / "one.py").write_text("second")
    assert records.source_commit() == f"{commit}+"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("method", ["erm", "otmix"])
def test_bfloat16(method: str, tmp_path: Path) -> None:
    config = replace(TINY, method=method, out=str(tmp_path / "bf16"))
    run_dir = train(replace(config, precision="bf16-mixed"))
    exact = train(replace(config, out=str(tmp_path / "32")))
    assert weights(run_dir) != weights(exact)
    assert all(value.dtype != torch.bfloat16 for value in open_run(run_dir).model.state_dict().values())
    assert log(run_dir)[0]["loss"] == pytest.approx(log(exact)[0]["loss"], rel=0.1)


class Noisy(CrossEntropy):
    """Draws from torch's own generator in each step, as dropout does."""

    def per_label(self, output: Any, labels: Tensor, progress: float) -> Tensor:
        return super().per_label(output, labels, progress) * (0.5 + torch.rand(len(labels)))


class StopsOnce(Silent):
    """Presses Ctrl-C after the first epoch."""

    def epoch(self, row: dict[str, Any]) -> None:
        if row["epoch"] == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("no_pictures")
def test_torchs_own_random_numbers_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "noisy", Noisy)
    config = replace(TINY, method="noisy", out=str(tmp_path / "whole"))
    whole = train(config)
    stopped = replace(config, out=str(tmp_path / "stopped"), resume=True)
    with pytest.raises(Interrupted) as caught:
        train(stopped, StopsOnce())
    assert caught.value.run_dir == tmp_path / "stopped"
    assert weights(train(stopped)) == weights(whole)
    monkeypatch.setitem(LOSSES, "noisy", CrossEntropy)
    assert weights(train(replace(config, out=str(tmp_path / "quiet")))) != weights(whole)


@pytest.mark.usefixtures("no_pictures")
def test_weights_a_run_began_with_are_not_asked_for_again(tmp_path: Path) -> None:
    begins = tmp_path / "begins.safetensors"
    begins.write_bytes(weights(train(replace(TINY, seed=3, out=str(tmp_path / "before")))))
    config = replace(TINY, weights=str(begins), out=str(tmp_path / "whole"))
    whole = train(config)
    stopped = replace(config, out=str(tmp_path / "stopped"), resume=True)
    with pytest.raises(Interrupted):
        train(stopped, StopsOnce())
    kept = begins.read_bytes()
    begins.write_bytes(weights(train(replace(TINY, seed=4, out=str(tmp_path / "other")))))
    with pytest.raises(UserError, match=r"the file of --weights no longer holds what .*stopped was begun with"):
        train(stopped)
    begins.write_bytes(kept)
    assert json.loads((tmp_path / "stopped" / "environment.json").read_text())["inputs"].keys() == {"weights"}
    begins.unlink()
    assert weights(train(stopped)) == weights(whole)
    with pytest.raises(UserError, match=r"begins\.safetensors"):
        train(replace(config, out=str(tmp_path / "new")))


@pytest.mark.usefixtures("no_pictures")
def test_the_run_that_f_came_from_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = train(replace(TINY, method="erm", protocol="official", out=str(tmp_path / "teacher")))
    fixed = replace(TINY.set, confusion_run=str(teacher), confusion_from="train", confusion_soft=False)
    config = replace(TINY, set=fixed, out=str(tmp_path / "whole"))
    whole = train(config)
    stopped = replace(config, out=str(tmp_path / "stopped"), resume=True)
    with pytest.raises(Interrupted):
        train(stopped, StopsOnce())
    teacher.rename(tmp_path / "elsewhere")
    assert weights(train(stopped)) == weights(whole)
    for run_dir in (whole, tmp_path / "stopped"):
        assert json.loads((run_dir / "result.json").read_text())["looks_at_test"]
    # another run in its place is another F
    train(replace(TINY, method="erm", protocol="official", seed=5, out=str(teacher)))
    with pytest.raises(UserError, match=r"the run of --set\.confusion_run no longer holds what .*whole was begun with"):
        train(replace(config, resume=True))


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_lost_model_and_checkpoint_begins_with_its_weights_again(tmp_path: Path) -> None:
    begins = tmp_path / "begins.safetensors"
    begins.write_bytes(weights(train(replace(TINY, seed=3, out=str(tmp_path / "before")))))
    config = replace(TINY, weights=str(begins), out=str(tmp_path / "run"))
    first = weights(train(config))
    for name in ("model.safetensors", "checkpoint.pt"):
        (tmp_path / "run" / name).unlink()
    assert weights(train(replace(config, resume=True))) == first


def test_official_features_leave_the_streamed_confusion_as_it_is(tmp_path: Path) -> None:
    changed = replace(TINY.set, features="official", mix_probability=1.0, curriculum_power=0.0)
    run = built(replace(TINY, set=changed), tmp_path)
    train_epoch(run)
    assert run.confusion_source is not None
    counted = run.confusion_source.counter.table.value.sum(1)
    torch.testing.assert_close(counted, torch.bincount(run.background.labels, minlength=10).float())
    finish_epoch(run)
    assert run.confusion is not None


def test_a_loss_with_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Learning(CrossEntropy):
        def __init__(self, counts: ClassCounts) -> None:
            super().__init__(counts)
            self.scale = torch.nn.Parameter(torch.ones(()))

    monkeypatch.setitem(LOSSES, "learning", Learning)
    config = replace(TINY, method="learning")
    with pytest.raises(UserError, match="the loss learning has parameters of its own"):
        prepare(config, load_data(config))


@pytest.mark.usefixtures("no_pictures")
def test_the_reporter_hears_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otmix.training.loop.SHOW_EVERY_SECONDS", 0.0)
    told: list[tuple[str, Any]] = []

    class Listener:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: told.append((name, arguments))

    config = replace(TINY, out=str(tmp_path / "run"), set=replace(TINY.set, bn_statistics="mixed"))
    run_dir = train(config, Listener())  # type: ignore[arg-type]
    story = [name for name, _ in told if name != "loading"]
    epochs, statistics, result = ["step"] * 5 + ["looking", "epoch"], ["looking"] * 15, ["looking"] * 2
    assert story == ["start", *epochs * 3, *statistics, *result, "finish", "close"]
    assert [arguments[0] for name, arguments in told if name == "epoch"] == log(run_dir)
    steps = [arguments[0] for name, arguments in told if name == "step"]
    places = [(step.epoch, step.step, step.steps) for step in steps]
    assert places == [(epoch, step + 1, 5) for epoch in range(3) for step in range(5)]
    info = next(arguments[0] for name, arguments in told if name == "start")
    assert (info.images, info.classes, info.epochs, info.steps_per_epoch) == (IMAGES, 10, 3, 5)


def test_the_note_says_when_no_epoch_lies_in_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otmix.training.run.fit", lambda run: None)
    monkeypatch.setattr("otmix.training.run.finish", lambda run, plan: None)
    notes: list[bool] = []

    class Listener(Silent):
        def start(self, info: Any) -> None:
            notes.append(any(note.startswith("Nothing will be mixed: none of 3 epochs") for note in info.notes))

    for name, settings in (("otmix", {"mix_from": 0.7}), ("otmix", {"mix_from": 0.6}), ("erm", {})):
        config = replace(TINY, method=name, set=Overrides(**settings), out=str(tmp_path / str(len(notes))))  # type: ignore[arg-type]
        train(config, Listener())
    assert notes == [True, False, False]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("method", "said"), [("otmix", "batches streamed from train"), ("erm", None)])
def test_the_result_says_where_f_came_from(method: str, said: str | None, tmp_path: Path) -> None:
    run_dir = train(replace(TINY, method=method, protocol="clean", epochs=2, out=str(tmp_path / "run")))
    found = json.loads((run_dir / "result.json").read_text())["confusion"]
    assert found == (None if said is None else f"soft counts on {said}, adaptive")


@pytest.mark.parametrize(("batch", "steps"), [(14, []), (13, [10]), (5, [10, 20])])
def test_several_processes_save_when_it_is_due(
    batch: int, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They ask each other in every tenth step, but in the last one, which a checkpoint follows anyway."""
    asked, saved = list[bool](), list[int]()

    def agreed_with(self: StopRequest, fabric: object, other: bool) -> list[bool]:
        asked.append(other)
        return [False, other]

    run = built(replace(TINY, method="erm", batch_size=batch, checkpoint_minutes=0.0), tmp_path)
    monkeypatch.setattr(StopRequest, "agreed_with", agreed_with)
    monkeypatch.setattr("otmix.training.loop.save", lambda run: saved.append(run.step))
    run.fabric = SimpleNamespace(world_size=2, global_rank=0, device=run.fabric.device, backward=run.fabric.backward)  # type: ignore[assignment]
    train_epoch(run)
    assert saved == steps
    assert asked == [True] * len(steps)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("rest", [1, 2])
def test_a_last_batch_too_small_for_batchnorm(rest: int, tmp_path: Path) -> None:
    """At 32 pixels timm's ResNets end in a single pixel: over one image there is no variance."""
    for split, n in (("train", 8), ("test", 2)):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(n + rest * (split == "train" and name == "a")):
                pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    config = RunConfig(
        data="folder",
        root=str(tmp_path / "data"),
        backbone="timm/resnet10t",
        pretrained=False,
        method="erm",
        epochs=1,
        batch_size=8,
        accelerator="cpu",
        out=str(tmp_path / "run"),
    )
    if rest == 1:
        with pytest.raises(UserError, match="--batch-size"):
            train(config)
    else:
        assert (train(config) / "result.json").exists()


# --- a step that never waits for the device ---

WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "item"}


class NoWaiting(TorchDispatchMode):
    """Notices when Python reads a value that was computed from tensors of the "device": on a GPU that waits for it.

    Other tensors, such as numbers drawn on the CPU, may be read.
    """

    def __init__(self, device: list[Tensor]) -> None:
        super().__init__()
        self.kept = list(device)  # held, so that no storage is given away to another tensor meanwhile
        self.there = {tensor.untyped_storage()._cdata for tensor in device}
        self.waited: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tainted = any(tensor.untyped_storage()._cdata in self.there for tensor in inputs)
        name = function._schema.name.split("::")[1]
        if tainted and name in WAITING:
            self.waited.append(name)
        result = function(*args, **(kwargs or {}))
        if tainted:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.kept.append(tensor)
                    self.there.add(tensor.untyped_storage()._cdata)
        return result


def steps(config: RunConfig) -> Iterator[tuple[list[Tensor], Callable[[], None]]]:
    """For each step of a last epoch: the tensors that are on the device before it, and all that the loop does in it."""
    dataset = load_data(config)
    plan = prepare(config, dataset)
    run = build_run(make_fabric(config), Path("nowhere"), plan, Silent())
    run.epoch = run.stage.epochs - 1
    assert isinstance(run.store, ResidentStore)
    assert run.foreground is not None
    state = replace(run.state, class_weight=torch.ones(10, device=run.fabric.device))
    run.confusion = Confusion(torch.full((10, 10), 0.1, device=run.fabric.device), ConfusionOrigin())
    for step, items in enumerate(run.background.epoch(run.moment(0))):
        moment = run.moment(step)
        drawn = run.foreground.step(len(items), moment)

        def whole(items: Items = items, drawn: Items = drawn, moment: Moment = moment) -> None:
            background = run.store.fetch(items, moment.seed_for("augment-background"))
            foreground = run.store.fetch(drawn, moment.seed_for("augment-foreground"))
            parts = run.stage.step(state, StepItems(background, foreground), PairingContext(moment, run.confusion))
            run.optimizer.zero_grad(set_to_none=True)
            run.fabric.backward(parts.loss)
            run.optimizer.step()
            run.tally.add(parts, moment.step)

        there = [*plan.model.state_dict().values(), run.store.images, state.class_weight, run.confusion.matrix]
        there += [*(table.value for table in run.tally.pairs.values()), run.tally.sums, run.tally.bad_step]
        yield there, whole


@pytest.mark.parametrize("protocol", ["clean", "paper", "official"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_never_waits_for_the_device(protocol: Any, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = 0

    def solve(cost: Tensor, epsilon: float, max_iterations: int, tolerance: float) -> Plan:
        """On a CPU `sinkhorn` has a way of its own: here the one for other devices."""
        nonlocal solved
        solved += 1
        a, b = (torch.full((n,), 1 / n) for n in cost.shape)
        return Plan(*batched.solve(cost, a, b, cost.isfinite().all(), epsilon, max_iterations, tolerance))

    monkeypatch.setattr("otmix.pairing.sinkhorn", solve)
    for there, step in steps(replace(TINY, method="drw+otmix", protocol=protocol, optimizer=optimizer)):
        with NoWaiting(there) as mode:
            step()
        assert not mode.waited
    assert solved > 0


def test_the_watcher_notices_waiting() -> None:
    there, elsewhere = torch.ones(3), torch.ones(3)
    with NoWaiting([there]) as mode:
        float(elsewhere.sum())
        assert not mode.waited
        if (there * 2 + elsewhere).sum() > 0:
            assert len(mode.waited) == 1
        assert torch.nonzero(there).shape[0] == 3
    assert len(mode.waited) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["clean", "paper", "official"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_never_waits_for_a_real_device(protocol: Any, precision: Any) -> None:
    config = replace(TINY, method="drw+otmix", protocol=protocol, precision=precision, accelerator="cuda")
    for number, (_, step) in enumerate(steps(config)):
        if number == 0:
            step()  # the first one makes the optimiser's state and loads kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["erm", "otmix"])
def test_compiled(method: str, tmp_path: Path) -> None:
    torch.compiler.reset()  # as in a process of its own: what was compiled before makes other shapes dynamic
    config = replace(TINY, method=method, epochs=2, out=str(tmp_path / "compiled"))
    compiled = train(replace(config, compile=True))
    plain = train(replace(config, out=str(tmp_path / "plain")))
    assert log(compiled)[0]["loss"] == pytest.approx(log(plain)[0]["loss"], rel=1e-2)
    state, other = (open_run(run_dir).model.state_dict() for run_dir in (compiled, plain))
    assert state.keys() == other.keys()
    checkpoint = load_checkpoint(compiled / "checkpoint.pt")
    assert checkpoint["model"].keys() == other.keys(), "a compiled run can be gone on with by any other program"


def test_a_dead_reader_is_one_sentence_wherever_it_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises it from a signal handler, in the middle of anything; other errors stay what they are."""
    import otmix.training.run as run_module

    said = "DataLoader worker (pid 7) is killed by signal: Killed. "

    def dies(*arguments: object) -> Path:
        raise RuntimeError(said)

    monkeypatch.setattr(run_module, "_run", dies)
    with pytest.raises(UserError, match=r"a process that reads images has died .*--workers 0"):
        train(replace(TINY, out=str(tmp_path / "a")))
    said = "shapes do not fit"
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(replace(TINY, out=str(tmp_path / "b")))
