"""For each row of the table of protocols, one setting is flipped alone and the change is observed in the pieces of a
real run.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from otmix.config import RunConfig
from otmix.data import ImageDataset
from otmix.errors import UserError
from otmix.files import write_json
from otmix.pairing import PairingContext
from otmix.protocols import Overrides
from otmix.randomness import Moment, generator
from otmix.training.build import build_run
from otmix.training.confusion_source import balanced_subset
from otmix.training.launch import make_fabric
from otmix.training.loop import RunState
from otmix.training.records import data_record
from otmix.training.reporter import Silent
from otmix.training.setup import load_data, prepare
from otmix.training.stage import StepItems
from otmix.types import Batch, ClassCounts, Confusion, ConfusionOrigin, Items, Mixed, Output


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_data(RunConfig(data="digits"))


def build(
    dataset: ImageDataset, path: Path, method: str = "otmix", epochs: int = 240, seed: int = 0, **settings: Any
) -> RunState:
    config = RunConfig(method=method, epochs=epochs, seed=seed, set=Overrides(**settings))
    return build_run(make_fabric(config), path, prepare(config, dataset), Silent())


def mixes(run: RunState, epoch: int, steps: int) -> list[bool]:
    assert run.state.mixer is not None
    return [run.state.mixer.schedule.mixes(Moment(epoch=epoch, epochs=240, step=step)) for step in range(steps)]


def one_step(run: RunState, epoch: int, step: int = 0) -> tuple[Mixed, StepItems]:
    run.epoch, run.step = epoch, step
    moment = run.moment(step)
    assert run.foreground is not None
    back = run.store.fetch(run.background.epoch(moment)[0], None)
    fore = run.store.fetch(run.foreground.step(len(back), moment), None)
    items = StepItems(back, fore)
    return run.stage.step(run.state, items, PairingContext(moment, run.confusion)).mixed, items


def test_mix_probability(digits: ImageDataset, tmp_path: Path) -> None:
    assert sum(mixes(build(digits, tmp_path), 100, 200)) / 200 == pytest.approx(0.5, abs=0.1)
    assert all(mixes(build(digits, tmp_path, mix_probability=1.0), 100, 200))


def test_mix_margins(digits: ImageDataset, tmp_path: Path) -> None:
    margins = build(digits, tmp_path, mix_from=4 / 240, mix_until=237 / 240)
    none = build(digits, tmp_path, mix_from=0.0, mix_until=1.0)
    for epoch in (0, 3, 237, 239):
        assert not any(mixes(margins, epoch, 40))
        assert any(mixes(none, epoch, 40))
    assert any(mixes(margins, 4, 40))
    assert any(mixes(margins, 236, 40))


def test_mixed_fraction(digits: ImageDataset, tmp_path: Path) -> None:
    for fraction in (1.0, 0.25):
        run = build(digits, tmp_path, mix_probability=1.0, mix_fraction=fraction)
        mixed, items = one_step(run, 100)
        assert int(mixed.mixed.sum()) == round(fraction * len(items.background))


@pytest.mark.parametrize(("setting", "value"), [("curriculum_per", "epoch"), ("curriculum_one_based", False)])
def test_curriculum(digits: ImageDataset, tmp_path: Path, setting: str, value: Any) -> None:
    def transported(run: RunState, epoch: int) -> set[bool]:
        pairing: Any = run.state.mixer.pairing if run.state.mixer else None
        chosen = (pairing.choose(Moment(epoch=epoch, epochs=240, step=step)) for step in range(60))
        return {choice is pairing.then for choice in chosen}

    usual, flipped = build(digits, tmp_path), build(digits, tmp_path, **{setting: value})
    if setting == "curriculum_per":
        assert transported(usual, 120) == {True, False}
        assert all(len(transported(flipped, epoch)) == 1 for epoch in range(100, 140))
    else:  # with t from 1 the last epoch is all transport; from 0, the first has none
        assert transported(usual, 239) == {True}
        assert build(digits, tmp_path, **{setting: value}).state.mixer is not None
        assert transported(flipped, 0) == {False}
        pairing: Any = usual.state.mixer.pairing if usual.state.mixer else None
        assert pairing.probability(Moment(epoch=0, epochs=240)) > 0


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_curriculum_power(digits: ImageDataset, tmp_path: Path, power: float) -> None:
    pairing: Any = build(digits, tmp_path, curriculum_power=power).state.mixer
    assert pairing.pairing.probability(Moment(epoch=119, epochs=240)) == pytest.approx(0.5**power)


def test_foreground_classes(digits: ImageDataset, tmp_path: Path) -> None:
    """Eq. 3's r = 1 is the inverse frequency of the class; the released code's r = 0 is uniform over classes."""
    n = digits.counts.counts.double()
    laws = {1.0: 1 / n, 0.0: torch.ones(10).double()}
    for r, law in laws.items():
        run = build(digits, tmp_path, foreground_r=r)
        assert run.foreground is not None
        drawn = run.foreground.draw(20000, torch.Generator().manual_seed(0)).labels
        share = torch.bincount(drawn, minlength=10) / 20000
        assert (share - law / law.sum()).abs().max() < 0.012
    effective = build(digits, tmp_path, foreground_law="effective-number").stage.foreground_probability
    assert effective is not None
    want = 1e-4 / (1 - 0.9999**n)
    torch.testing.assert_close(effective, want / want.sum())


def test_box(digits: ImageDataset, tmp_path: Path) -> None:
    """The exact box keeps half of the background on average, the released code's clipped one .69 (on 32 × 32)."""
    for box, mean in (("exact", 0.5), ("clipped", 0.69)):
        mixer = build(digits, tmp_path, box=box).state.mixer
        assert mixer is not None
        black = torch.zeros(1, 1, 32, 32)
        back, fore = Batch(Items(torch.tensor([0])), black), Batch(Items(torch.tensor([1])), black)
        g = torch.Generator().manual_seed(0)
        shares = [float(mixer.mixer.apply(back, fore, mixer.mixer.draw(1, 32, 32, g)).image_share) for _ in range(1500)]
        assert sum(shares) / 1500 == pytest.approx(mean, abs=0.02)


def test_box_per_image(digits: ImageDataset, tmp_path: Path) -> None:
    for per, several in (("batch", False), ("image", True)):
        mixed, _ = one_step(build(digits, tmp_path, mix_probability=1.0, box_per=per), 100)
        assert (len(mixed.image_share.unique()) > 1) == several


def test_features(digits: ImageDataset, tmp_path: Path) -> None:
    """The released code's features are the flattened last map; computing them moves BatchNorm's statistics."""
    for features, size, moved in (("pooled", 64, False), ("official", 64 * 2 * 2, True)):
        run = build(digits, tmp_path, features=features)
        run.stage.set_modes(run.module)
        back = run.store.fetch(run.background.epoch(run.moment(0))[0], None)
        before = {name: value.clone() for name, value in run.state.model.named_buffers()}
        embedded = run.state.make_embed(StepItems(back, None))(back.items)
        assert embedded.features.shape == (len(back), size)
        assert not embedded.features.requires_grad
        changed = [name for name, value in run.state.model.named_buffers() if not torch.equal(value, before[name])]
        assert bool(changed) == moved
        assert run.state.model.training


def test_where_f_comes_from(digits: ImageDataset, tmp_path: Path) -> None:
    seen = {}
    for source in ("streamed", "held-out", "train", "test"):
        run = build(digits, tmp_path, mix_probability=1.0, curriculum_power=0.0, confusion_from=source)
        run.stage.set_modes(run.module)
        one_step(run, 100)
        assert run.confusion_source is not None
        images = float(run.confusion_source.counter.table.value.sum())
        estimate = run.confusion_source.estimate(run.state, None)
        assert estimate is not None
        seen[source] = (estimate.origin.split, estimate.origin.items, round(images))
    # only the streamed counts come from the step itself; digits have no validation split, so held-out is balanced
    # training
    assert seen["streamed"] == ("train", "streamed", 64)
    assert seen["held-out"] == ("train", "balanced", 0)
    assert seen["train"] == ("train", "all", 0)
    assert seen["test"] == ("test", "all", 0)


def test_held_out_prefers_a_validation_split(tmp_path: Path) -> None:
    data = load_data(RunConfig(data="digits", validation_per_class=3))
    run = build(data, tmp_path, confusion_from="held-out")
    assert run.confusion_source is not None
    assert run.confusion_source.counter.origin.split == "validation"
    assert run.confusion_source.items is not None
    assert len(run.confusion_source.items) == 30


def test_balanced_subset_has_as_many_of_each_class_as_there_are(digits: ImageDataset, tmp_path: Path) -> None:
    run = build(digits, tmp_path, confusion_from="balanced-train", confusion_per_class=12)
    assert run.confusion_source is not None
    assert run.confusion_source.items is not None
    got = torch.bincount(run.confusion_source.items.labels, minlength=10)
    assert torch.equal(got, digits.counts.counts.clamp_max(12))


@given(st.lists(st.integers(0, 5), max_size=50), st.integers(1, 8), st.integers(0, 5))
def test_the_balanced_subset_is_that_of_a_search_for_each_class(labels: list[int], per_class: int, seed: int) -> None:
    every = torch.tensor([*labels, 5, 4, 3, 2, 1, 0])
    order = torch.randperm(len(every), generator=generator(seed, "balanced-subset"))
    want = torch.cat([order[every[order] == k][:per_class] for k in range(6)])
    found = balanced_subset(every, ClassCounts.from_labels(every), per_class, seed)
    assert found.index is not None
    assert found.index.tolist() == want.tolist()
    assert found.labels.tolist() == every[want].tolist()


def test_the_balanced_subset_is_drawn_by_the_seed(digits: ImageDataset, tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        source = build(digits, tmp_path, seed=seed, confusion_from="balanced-train").confusion_source
        assert source is not None
        assert source.items is not None
        assert source.items.index is not None
        assert torch.equal(source.items.labels, digits.train.labels[source.items.index])
        drawn.append(source.items.index[source.items.labels == 0].tolist())
    once, again, other = drawn
    assert once == again
    assert set(once) != set(other)


def test_soft_and_hard_counts(digits: ImageDataset, tmp_path: Path) -> None:
    for soft in (True, False):
        run = build(digits, tmp_path, confusion_from="train", confusion_soft=soft)
        assert run.confusion_source is not None
        estimate = run.confusion_source.estimate(run.state, None)
        assert estimate is not None
        counts = estimate.matrix * digits.counts.counts[:, None]
        assert bool(torch.allclose(counts, counts.round(), atol=1e-3)) == (not soft)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("omega", 0.5),
        ("omega", 0.0),
        ("omega", 1.0),
        ("metric", "euclidean"),
        ("keep_diagonal", True),
        ("epsilon", 0.1),
        ("select", "sample"),
        ("select", "softmax"),
        ("alpha", 0.2),
    ],
)
def test_what_reaches_the_plan_and_the_mix(digits: ImageDataset, tmp_path: Path, setting: str, value: Any) -> None:
    """The same step of the same run differs in its plan (or its choice, or its box) when one setting does."""
    g = torch.Generator().manual_seed(5)
    matrix = torch.rand(10, 10, generator=g) + 5 * torch.eye(10)
    results = []
    for settings in ({}, {setting: value}):
        run = build(digits, tmp_path, mix_probability=1.0, curriculum_power=0.0, **settings)
        run.confusion = Confusion(matrix / matrix.sum(1, keepdim=True), ConfusionOrigin())
        mixed, _ = one_step(run, 100)
        assert mixed.pairs is not None
        assert mixed.pairs.plan is not None
        results.append((mixed.pairs.plan.coupling, mixed.pairs.background, mixed.image_share))
    (plan_a, chosen_a, share_a), (plan_b, chosen_b, share_b) = results
    if setting == "alpha":
        assert torch.equal(chosen_a, chosen_b)
        assert not torch.equal(share_a, share_b)
    elif setting == "select":
        assert torch.equal(plan_a, plan_b)
        assert not torch.equal(chosen_a, chosen_b)
    else:
        assert not torch.allclose(plan_a, plan_b, rtol=0.05)
    if setting == "epsilon":  # more entropy: a flatter plan
        assert float(plan_b.max()) < float(plan_a.max())


@pytest.mark.parametrize("setting", ["confusion_shuffle", "confusion_noise"])
def test_a_wrong_confusion(digits: ImageDataset, tmp_path: Path, setting: str) -> None:
    """The same model and images give another F, and the record says that it was made wrong."""
    found = []
    for share in (0.0, 1.0):
        run = build(digits, tmp_path, confusion_from="balanced-train", **{setting: share})
        assert run.confusion_source is not None
        estimate = run.confusion_source.estimate(run.state, None)
        assert estimate is not None
        assert ("wrong on purpose" in str(estimate.origin)) == (share > 0)
        found.append(estimate.matrix)
    assert not torch.allclose(found[0], found[1], atol=0.01)


@pytest.mark.parametrize("setting", ["confusion_shuffle", "confusion_noise"])
def test_how_a_confusion_is_wrong_is_drawn_by_the_seed(digits: ImageDataset, tmp_path: Path, setting: str) -> None:
    true = Confusion(torch.eye(10), ConfusionOrigin())
    found = []
    for seed in (0, 0, 1):
        source = build(digits, tmp_path, seed=seed, **{setting: 1.0}).confusion_source
        assert source is not None
        found.append(source.perturb(true).matrix)
    once, again, other = found
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of which F can be had."""
    from otmix.training import train

    folder = tmp_path_factory.mktemp("finished") / "teacher"
    train(RunConfig(data="digits", method="erm", epochs=2, batch_size=128, evaluate_every=2, out=str(folder)))
    return folder


def test_a_fixed_confusion(digits: ImageDataset, teacher: Path, tmp_path: Path) -> None:
    """F is the finished run's from the first step on, on the data that are named, and no epoch changes it."""
    from otmix.training import open_run
    from otmix.training.loop import finish_epoch, train_epoch

    run = build(digits, tmp_path, epochs=2, confusion_run=str(teacher), confusion_from="train", confusion_soft=False)
    assert run.confusion_source is None
    assert run.confusion is not None
    assert not run.confusion.origin.adaptive
    model = open_run(teacher).model
    images = run.store.fetch(Items(digits.train.labels, torch.arange(len(digits.train))), None).images
    with torch.no_grad():
        said = model(images).logits.argmax(1)
    counts = torch.zeros(10, 10)
    for true, guess in zip(digits.train.labels.tolist(), said.tolist()):
        counts[true, guess] += 1
    torch.testing.assert_close(run.confusion.matrix, counts / counts.sum(1, keepdim=True))
    before = run.confusion.matrix.clone()
    train_epoch(run)
    finish_epoch(run)
    assert torch.equal(run.confusion.matrix, before)


@pytest.mark.parametrize("setting", ["confusion_shuffle", "confusion_noise"])
def test_a_fixed_confusion_can_be_made_wrong(digits: ImageDataset, teacher: Path, tmp_path: Path, setting: str) -> None:
    """As an adaptive one of the same seed is."""
    data: dict[str, Any] = {"confusion_from": "balanced-train", "confusion_per_class": 5}
    right = build(digits, tmp_path, confusion_run=str(teacher), **data).confusion
    wrong = build(digits, tmp_path, confusion_run=str(teacher), **data, **{setting: 0.5}).confusion
    adaptive = build(digits, tmp_path, **data, **{setting: 0.5}).confusion_source
    assert right is not None
    assert wrong is not None
    assert adaptive is not None
    assert not torch.allclose(wrong.matrix, right.matrix, atol=0.01)
    torch.testing.assert_close(wrong.matrix, adaptive.perturb(right).matrix)
    assert "wrong on purpose" not in str(right.origin)
    assert "wrong on purpose" in str(wrong.origin)


@pytest.mark.parametrize(("method", "told"), [("otmix", True), ("cmo", False)])
def test_what_the_run_of_a_fixed_confusion_saw_counts(
    method: str, told: bool, digits: ImageDataset, tmp_path: Path
) -> None:
    write_json(tmp_path / "data.json", data_record(digits))
    for looked in (True, False):
        write_json(tmp_path / "result.json", {"looks_at_test": looked})
        changed = Overrides(confusion_run=str(tmp_path)) if method == "otmix" else Overrides()
        assert prepare(RunConfig(method=method, set=changed), digits).looks_at_test() == (looked and told)


def test_what_the_run_of_the_weights_saw_counts(digits: ImageDataset, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    plain = prepare(RunConfig(data="digits", method="erm"), digits)
    save_file(plain.model.state_dict(), weights)
    config = RunConfig(data="digits", method="erm", weights=str(weights))
    assert not prepare(config, digits).looks_at_test()
    for result, looked in (({"looks_at_test": True}, True), ({"looks_at_test": False}, False), ([1], False)):
        write_json(tmp_path / "result.json", result)
        assert prepare(config, digits).looks_at_test() == looked
    (tmp_path / "result.json").write_text("somebody else's")
    assert not prepare(config, digits).looks_at_test()
    (tmp_path / "result.json").unlink()  # the best so far of a run that has not ended
    write_json(tmp_path / "environment.json", {"looks_at_test": True})
    assert prepare(config, digits).looks_at_test()
    with pytest.raises(UserError, match="--pretrained changes nothing with --weights"):
        prepare(replace(config, pretrained=True), digits)


def test_a_fixed_confusion_must_fit(digits: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must name the folder of a finished run"):
        build(digits, tmp_path, confusion_run=str(tmp_path / "nowhere"))


def test_class_weighted_mean(digits: ImageDataset, tmp_path: Path) -> None:
    losses = {}
    for reduction in ("mean", "weighted-mean"):
        run = build(digits, tmp_path, method="ce-drw+otmix", mix_probability=1.0, weighted_mean=reduction)
        mixed, _ = one_step(run, 200)
        reweighting = run.stage.reweighting
        assert reweighting is not None
        weight = reweighting.class_weight(200 / 240)
        output = Output(torch.zeros(len(mixed.images), 10))
        losses[reduction] = float(run.state.criterion(output, mixed.target, weight, 200 / 240, run.state.reduction))
    # constant logits cost log 10 each: divided by its own weights, the loss is exactly that; the plain mean feels the
    # weights
    assert losses["weighted-mean"] == pytest.approx(torch.tensor(10.0).log().item(), rel=1e-5)
    assert losses["mean"] != pytest.approx(losses["weighted-mean"], rel=0.05)


@pytest.fixture(scope="module")
def balanced() -> ImageDataset:
    return load_data(RunConfig(data="digits", imbalance=1.0))


@pytest.mark.parametrize("pixels", ["cutmix", "mixup", "saliencymix"])
@pytest.mark.parametrize("pairing", ["cmo", "otmix"])
def test_balanced_data(balanced: ImageDataset, tmp_path: Path, pairing: str, pixels: str) -> None:
    """Table 3: both streams draw the classes evenly, also by eq. 3 with r = 1, and a step of any pixel rule trains."""
    settings = {"foreground_r": 1.0, "mix_probability": 1.0, "curriculum_power": 0.0}
    run = build(balanced, tmp_path, f"{pairing}-{pixels}", **settings)
    backgrounds = torch.cat([batch.labels for batch in run.background.epoch(run.moment(0))])
    assert len(torch.bincount(backgrounds, minlength=10).unique()) == 1
    assert run.foreground is not None
    drawn = torch.bincount(run.foreground.draw(20000, torch.Generator().manual_seed(0)).labels, minlength=10)
    assert (drawn / 20000 - 0.1).abs().max() < 0.012

    run.epoch, moment = 100, Moment(epoch=100, epochs=240)
    back = run.store.fetch(run.background.epoch(moment)[0], None)
    items = StepItems(back, run.store.fetch(run.foreground.step(len(back), moment), None))
    before = run.state.model.head.weight.detach().clone()
    parts = run.stage.step(run.state, items, PairingContext(moment, run.confusion))
    run.fabric.backward(parts.loss)
    run.optimizer.step()
    assert bool(parts.mixed.mixed.all())
    assert parts.mixed.pairs is not None
    assert parts.mixed.pairs.by == ("index" if pairing == "cmo" else "transport")
    assert bool(parts.loss.isfinite())
    assert not torch.equal(before, run.state.model.head.weight)


def test_headline(digits: ImageDataset, tmp_path: Path) -> None:
    """Only `best-on-test` looks at the test images after an epoch."""
    for headline, looks in (("last", False), ("best-on-test", True)):
        run = build(digits, tmp_path / headline, headline=headline)
        row = run.watch(run, False)
        assert (row["test_error"] is not None) == looks
        assert (run.best is not None) == looks
        assert (tmp_path / headline / "best-0.safetensors").exists() == looks
    run.epoch = 1  # as good as the first: the released code keeps the earlier one
    assert run.watch(run, False)["test_error"] == row["test_error"]
    assert run.best is not None
    assert run.best["epoch"] == 0
