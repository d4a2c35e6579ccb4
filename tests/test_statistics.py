"""BatchNorm's statistics made anew for the finished model: the means over the last mixed epoch, and nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from otmix.config import RunConfig
from otmix.data import ImageDataset
from otmix.errors import UserError
from otmix.methods import parse_method
from otmix.mixer import MixSchedule
from otmix.models.batchnorm import batch_norms
from otmix.pairing import PairingContext
from otmix.protocols import Overrides, ProtocolName
from otmix.training import train
from otmix.training.build import build_run
from otmix.training.launch import make_fabric
from otmix.training.loop import RunState, finish_epoch, steps_of, train_epoch
from otmix.training.records import read_settings
from otmix.training.reporter import RunInfo, Silent
from otmix.training.setup import load_data, prepare
from otmix.training.statistics import mix_statistics

EPOCHS = 10
PLAIN_END = Overrides(mix_from=0.0, mix_until=0.85, bn_statistics="mixed")  # epochs 0 … 8 are mixed, 9 is not
TINY = RunConfig(
    data="digits",
    method="otmix",
    max_per_class=40,
    batch_size=32,
    epochs=EPOCHS,
    accelerator="cpu",
    evaluate_every=100,
    set=PLAIN_END,
)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_data(TINY)


def trained(dataset: ImageDataset, path: Path, epochs: int = EPOCHS, **changed: Any) -> RunState:
    config = replace(TINY, **changed)
    run = build_run(make_fabric(config), path, prepare(config, dataset), Silent())
    for _ in range(epochs):
        train_epoch(run)
        finish_epoch(run)
    return run


@contextmanager
def inputs_of_norms(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What each BatchNorm gets in train mode, a tensor a batch."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def keep(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                if module.training:
                    seen.setdefault(name, []).append(inputs[0].detach().double().clone())

            hooks.append(module.register_forward_pre_hook(keep))
    yield seen
    for hook in hooks:
        hook.remove()


def mixed_images(run: RunState, epoch: int) -> list[Tensor]:
    """What the model was given in an epoch, as training makes it."""
    assert run.state.mixer is not None
    moments, loaded = steps_of(run, epoch)
    return [
        run.state.mixer(
            items.background, items.foreground, run.state.make_embed(items), PairingContext(moment, run.confusion)
        ).images
        for moment, items in zip(moments, loaded, strict=True)
    ]


def assert_they_are_the_means(run: RunState, **tolerance: float) -> None:
    """Over the batches of the last mixed epochs, by a slow reference; and nothing else has changed."""
    epochs = run.stage.statistics_epochs(run.background.steps_per_epoch)
    assert epochs == list(range(9))  # of five steps each
    images = [batch for epoch in epochs for batch in mixed_images(run, epoch)]
    model = copy.deepcopy(run.state.model).train()  # transport asks the model with the statistics that it has
    with inputs_of_norms(model) as seen, torch.no_grad():
        for batch in images:
            model(batch)
    before = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    mix_statistics(run)
    assert run.bn_statistics == "mixed"
    assert seen
    for name, module in run.state.model.named_modules():
        if name in seen:
            mean = torch.stack([batch.mean((0, 2, 3)) for batch in seen[name]]).mean(0)
            variance = torch.stack([batch.var((0, 2, 3), unbiased=True) for batch in seen[name]]).mean(0)
            torch.testing.assert_close(module.running_mean.double(), mean, **tolerance)
            torch.testing.assert_close(module.running_var.double(), variance, **tolerance)
            assert module.momentum == 0.1
    after = run.state.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("running_mean", "running_var"))}


@pytest.mark.parametrize("method", ["cmo", "otmix", "ldam-drw+otmix-mixup", "ride+cmo", "ce+cutmix"])
def test_they_are_the_means_over_the_batches_of_the_last_mixed_epochs(
    method: str, digits: ImageDataset, tmp_path: Path
) -> None:
    assert_they_are_the_means(trained(digits, tmp_path, method=method), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_they_are_on_a_gpu_too(compiled: bool, digits: ImageDataset, tmp_path: Path) -> None:
    run = trained(digits, tmp_path, method="cmo", accelerator="cuda", compile=compiled)
    assert_they_are_the_means(run, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["cmo", "ce+saliencymix"])
def test_the_batches_are_those_that_training_made(method: str, digits: ImageDataset, tmp_path: Path) -> None:
    """Where the pairs do not depend on the model, to the bit; half of them mixed."""
    run = trained(digits, tmp_path, 8, method=method)
    step, seen, shares = run.stage.step, [], []

    def kept(*arguments: Any) -> Any:
        parts = step(*arguments)
        seen.append(parts.mixed.images.clone())
        shares.append(parts.mixed.pairs is not None)
        return parts

    run.stage = replace(run.stage, step=kept)
    train_epoch(run)
    finish_epoch(run)
    train_epoch(run)
    assert run.epoch == 9
    again = mixed_images(run, 8)
    steps = len(again)
    assert all(torch.equal(a, b) for a, b in zip(again, seen[:steps], strict=True))
    assert any(shares[:steps])
    assert not any(shares[steps:])


@pytest.mark.parametrize(
    ("method", "setting"),
    [("erm", {}), ("cmo", {"mix_from": 0.95, "mix_until": 0.99}), ("ce+cutmix", {"mix_until": 0.0})],
)
def test_without_mixing_nothing_changes(
    method: str, setting: dict[str, float], digits: ImageDataset, tmp_path: Path
) -> None:
    run = trained(digits, tmp_path, 1, method=method, set=Overrides(**setting))
    before = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    mix_statistics(run)
    assert run.bn_statistics == "running"
    assert all(torch.equal(before[name], value) for name, value in run.state.model.state_dict().items())


def test_statistics_that_a_stage_leaves_alone_stay(digits: ImageDataset, tmp_path: Path) -> None:
    run = trained(digits, tmp_path, 1)
    run.stage = replace(run.stage, batchnorm="eval")
    before = [norm.running_mean.clone() for norm in batch_norms(run.state.model)]
    mix_statistics(run)
    assert all(torch.equal(a, norm.running_mean) for a, norm in zip(before, batch_norms(run.state.model), strict=True))


def test_layers_that_training_does_not_run_keep_what_they_have(digits: ImageDataset, tmp_path: Path) -> None:
    run = trained(digits, tmp_path, 1)

    class Frozen(torch.nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    frozen, unused = Frozen(16), torch.nn.BatchNorm2d(3)
    for norm in (frozen, unused):
        norm.running_mean += 2.0
        norm.running_var += 3.0
    (name,) = [name for name, module in run.state.model.named_modules() if name.endswith("bn1")][:1]
    run.state.model.get_submodule(name.rpartition(".")[0]).bn1 = frozen
    run.state.model.add_module("unused", unused)
    others = [norm for norm in batch_norms(run.state.model) if norm not in (frozen, unused)]
    before = [norm.running_mean.clone() for norm in others]
    mix_statistics(run)
    assert run.bn_statistics == "mixed"
    assert not any(torch.equal(a, norm.running_mean) for a, norm in zip(before, others, strict=True))
    for norm in (frozen, unused):
        assert norm.running_mean.unique().tolist() == [2.0]
        assert norm.running_var.unique().tolist() == [4.0]


def test_statistics_that_are_not_finite_are_not_taken(digits: ImageDataset, tmp_path: Path) -> None:
    run = trained(digits, tmp_path, 1, method="cmo")
    told: list[str] = []
    run.reporter = SimpleNamespace(looking=lambda done, total: None, message=told.append)  # type: ignore[assignment]
    with torch.no_grad():
        next(run.state.model.parameters()).fill_(3e38)
    before = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    mix_statistics(run)
    assert told == ["BatchNorm's mixed statistics are not finite numbers, so the running ones stay."]
    assert run.bn_statistics == "running"
    assert all(torch.equal(before[name], value) for name, value in run.state.model.state_dict().items())


@pytest.mark.parametrize(
    ("epochs", "window", "steps", "last"),
    [
        (240, (4 / 240, 237 / 240), 97, [236]),
        (240, (4 / 240, 237 / 240), 63, [235, 236]),
        (10, (0.0, 1.0), 30, [7, 8, 9]),
        (10, (0.0, 0.999), 30, [6, 7, 8]),
        (10, (0.5, 1.0), 1, [5, 6, 7, 8, 9]),
        (3, (0.0, 0.0), 10, []),
        (1, (0.0, 1.0), 1, [0]),
    ],
)
def test_the_last_epochs_with_mixing(
    epochs: int, window: tuple[float, float], steps: int, last: list[int], digits: ImageDataset
) -> None:
    (stage,) = prepare(replace(TINY, epochs=epochs), digits).stages
    assert stage.mixer is not None
    mixer = replace(stage.mixer, schedule=MixSchedule(window=window))
    stage = replace(stage, mixer=mixer)
    assert stage.statistics_epochs(steps) == last
    assert mixer.schedule.reaches(epochs) == bool(last)
    automatic = replace(stage, bn_statistics="auto").statistics_epochs(steps)
    assert automatic == (last if steps >= 64 else [])
    for left in ({"bn_statistics": "running"}, {"batchnorm": "eval"}, {"mixer": None}):
        assert replace(stage, **left).statistics_epochs(steps) == []  # type: ignore[arg-type]


class Told(Silent):
    resumed_at_epoch: int | None = None

    def start(self, info: RunInfo) -> None:
        self.resumed_at_epoch = info.resumed_at_epoch


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("finished")
    return {
        name: train(replace(TINY, out=str(base / name), set=replace(PLAIN_END, bn_statistics=name)))
        for name in ("running", "mixed")
    }


def test_a_run_trains_as_without_and_ends_with_them(finished: dict[str, Path]) -> None:
    running, mixed = (load_file(finished[name] / "model.safetensors") for name in ("running", "mixed"))
    changed = {name for name in running if not torch.equal(running[name], mixed[name])}
    assert changed == {name for name in running if name.endswith(("running_mean", "running_var"))}
    rows = [
        [{**json.loads(line), "seconds": 0, "images_per_second": 0} for line in path.open()]
        for path in (finished[name] / "metrics.jsonl" for name in ("running", "mixed"))
    ]
    assert rows[0] == rows[1]
    settings = [json.loads((finished[name] / "settings.json").read_text()) for name in ("running", "mixed")]
    assert [one.pop("bn_statistics") for one in settings] == ["running", "mixed"]
    assert settings[0] == settings[1]


def test_result_and_page_say_so(finished: dict[str, Path]) -> None:
    for name in ("running", "mixed"):
        assert json.loads((finished[name] / "result.json").read_text())["bn_statistics"] == name
        page = (finished[name] / "report.html").read_text()
        assert ("statistics were made anew after the last epoch" in page) == (name == "mixed")


def test_a_run_that_was_killed_at_its_very_end_makes_them_again(finished: dict[str, Path], tmp_path: Path) -> None:
    """After the last checkpoint, before anything of the end was written: F and the weights are the checkpoint's."""
    run_dir = tmp_path / "killed"
    run_dir.mkdir()
    for name in ("checkpoint.pt", "config.yaml", "data.json", "environment.json", "settings.json", "metrics.jsonl"):
        shutil.copy(finished["mixed"] / name, run_dir)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    told = Told()
    train(replace(RunConfig.from_dict(config), out=str(run_dir), resume=True), told)
    assert told.resumed_at_epoch == EPOCHS
    one, other = (load_file(path / "model.safetensors") for path in (finished["mixed"], run_dir))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_runs_from_before_the_setting_kept_running_ones(finished: dict[str, Path], tmp_path: Path) -> None:
    settings = json.loads((finished["mixed"] / "settings.json").read_text())
    del settings["bn_statistics"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert read_settings(tmp_path) == {**settings, "bn_statistics": "running"}
    (tmp_path / "settings.json").write_text(json.dumps({"headline": "last"}))  # without a mixer
    assert read_settings(tmp_path) == {"headline": "last"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(TINY, method="erm", set=Overrides(bn_statistics="mixed")), "changes nothing for ce"),
        (replace(TINY, backbone="timm/vit_tiny_patch16_224", pretrained=False), "has no BatchNorm; leave it out"),
        (
            replace(TINY, set=Overrides(bn_statistics="mixed", headline="best-on-test")),
            "set headline to last, or bn_statistics to running",
        ),
        (replace(TINY, set=Overrides(bn_statistics="mixed", mix_probability=0.0)), "nothing is mixed"),
        (
            replace(TINY, backbone="resnet20", set=Overrides(bn_statistics="mixed", features="official")),
            "does not go with features official",
        ),
    ],
)
def test_where_it_would_change_nothing_or_harm_it_is_refused(config: RunConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(replace(config, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "protocol", "expected"),
    [
        ("cmo", "clean", "auto"),
        ("otmix", "clean", "auto"),
        ("ldam-drw+cmo", "clean", "auto"),
        ("ldam-drw+otmix", "clean", "running"),
        ("balanced-softmax+otmix", "clean", "running"),
        ("ride-ce+otmix", "clean", "running"),
        ("ride+cmo", "clean", "running"),
        ("ce+cutmix", "clean", "running"),
        ("ce+confusion", "clean", "running"),
        ("cmo-mixup", "clean", "running"),
        ("otmix-saliencymix", "clean", "running"),
        ("otmix", "paper", "running"),
        ("cmo", "official", "running"),
    ],
)
def test_the_default_is_what_was_measured(method: str, protocol: ProtocolName, expected: str) -> None:
    assert parse_method(method).protocol(protocol).bn_statistics == expected


@pytest.mark.parametrize("other", [{"headline": "best-on-test"}, {"features": "official"}])
def test_the_default_gives_way_to_what_it_does_not_go_with(other: dict[str, Any]) -> None:
    assert parse_method("otmix").protocol("clean", Overrides(**other)).bn_statistics == "running"
