"""BBN's two branches, and its training step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from otmix.errors import UserError
from otmix.losses import LDAM, LOSSES, CrossEntropy, Reduction, effective_number_weights
from otmix.models import BranchClassifier, build_model, embed
from otmix.models.split import Branched
from otmix.pairing import PairingContext
from otmix.randomness import Moment
from otmix.training.bbn import balance_at, bbn_step
from otmix.training.stage import StepItems, StepState
from otmix.training.tally import Tally
from otmix.types import Batch, ClassCounts, Items, Output

RGB = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
TIMM = "timm/test_resnet"
OTHERS = ["timm/test_vit", "timm/test_efficientnet", "timm/mobilenetv3_small_050"]
COUNTS = ClassCounts(torch.tensor([50, 9, 4]))


def bbn(backbone: str = "resnet20", num_classes: int = 3, **options: Any) -> BranchClassifier:
    settings = {"image_size": 32, "architecture": "bbn"} | RGB | options
    model = build_model(backbone, num_classes, **settings)
    assert isinstance(model, BranchClassifier)
    return model


def images(n: int = 4, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def batch(n: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return Batch(Items(torch.randint(3, (n,), generator=g)), torch.rand(n, 3, 16, 16, generator=g))


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def network_of(model: BranchClassifier) -> Branched:
    assert isinstance(model.backbone, Branched)
    return model.backbone


def by_hand(model: BranchClassifier, conventional: Tensor, rebalancing: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """Features and logits: each stream through trunk and branch by itself."""
    network = network_of(model)
    f_c = network.branches[0](network.trunk(model.normalise(conventional)))
    f_r = network.branches[1](network.trunk(model.normalise(rebalancing)))
    features = torch.cat([2 * a * f_c, 2 * (1 - a) * f_r], 1)
    return features, model.head(features)


# The model


@pytest.mark.parametrize("a", [1.0, 0.75, 0.5, 0.01])
@pytest.mark.parametrize("backbone", ["resnet8", "resnet20", TIMM])
def test_in_training_each_stream_has_its_branch(backbone: str, a: float) -> None:
    model = bbn(backbone).train()
    twin = copy.deepcopy(model)
    model.set_balance(a)
    x = images(6)
    output = model(x)
    features, logits = by_hand(twin, x[:3], x[3:], a)
    torch.testing.assert_close(output.features, features)
    torch.testing.assert_close(output.logits, logits)
    assert output.logits.shape == (3, 3) and output.features.shape == (3, model.feature_dim)
    assert output.expert_logits is None
    # running statistics have seen one stream, then the other
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        if mine is not model.balance:
            torch.testing.assert_close(mine, theirs)


def test_a_stream_is_not_normalised_by_the_other() -> None:
    model = bbn().train()
    model.set_balance(0.5)
    x, other = images(4), torch.cat([images(4)[:2], 0.1 * images(4)[2:] + 0.9])
    d = model.feature_dim // 2
    assert torch.equal(model.features(x)[:, :d], model.features(other)[:, :d])
    assert not torch.allclose(model.features(x)[:, d:], model.features(other)[:, d:])


@pytest.mark.parametrize("backbone", ["resnet20", TIMM, "timm/test_vit"])
def test_in_evaluation_both_branches_see_each_image_unscaled(backbone: str) -> None:
    model = bbn(backbone, image_size=64).eval()
    x = images(3, 64)
    features, logits = by_hand(model, x, x, 0.5)
    for a in (1.0, 0.0):  # what training left there does not matter
        model.set_balance(a)
        output = model(x)
        torch.testing.assert_close(output.features, features)
        torch.testing.assert_close(output.logits, logits)
        assert torch.equal(model.features(x), output.features)  # type: ignore[arg-type]
    assert model(x[:1]).logits.shape == (1, 3)


def test_frozen_batchnorm_is_not_evaluation() -> None:
    """A stage may keep BatchNorm in eval mode while it trains: then the streams still have their own branches."""
    model = bbn().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert model(images(4)).logits.shape == (2, 3)


def test_training_takes_two_batches_of_equal_size() -> None:
    assert BranchClassifier.streams == 2
    with pytest.raises(ValueError, match="as many images of one stream as of the other, not 3"):
        bbn().train()(images(3))
    assert bbn().train()(images(2)).logits.shape == (1, 3)  # one image of each


@pytest.mark.parametrize(
    ("backbone", "classes", "head", "known"),
    [("resnet32", 10, "linear", 538_778), ("resnet32", 100, "linear", 550_388), ("resnet32", 10, "normed", 538_768)],
)
def test_resnet32_has_one_block_more_and_128_features(backbone: str, classes: int, head: str, known: int) -> None:
    model, plain = bbn(backbone, classes, head=head), build_model(backbone, classes, image_size=32, head=head, **RGB)
    block = 2 * 64 * 64 * 9 + 2 * 2 * 64
    assert model.feature_dim == 128
    assert parameters(model) == known == parameters(plain) + block + 64 * classes
    assert len([key for key in model.state_dict() if key.startswith("head")]) == (2 if head == "linear" else 1)


@pytest.mark.parametrize("backbone", ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56"])
def test_every_cifar_resnet_has_branches(backbone: str) -> None:
    model = bbn(backbone).eval()
    assert model(images(2)).features.shape == (2, 128)
    blocks = [key for key in network_of(model).branches[0].state_dict() if key.endswith("conv1.weight")]
    assert blocks == [f"layer3.{(int(backbone.removeprefix('resnet')) - 2) // 6 - 1}.conv1.weight"]


@pytest.mark.parametrize(
    ("backbone", "size"), [("resnet8", 8), ("resnet32", 32), ("timm/resnet18", 64), *((name, 64) for name in OTHERS)]
)
def test_any_backbone_trains_and_every_parameter_gets_a_gradient(backbone: str, size: int) -> None:
    model = bbn(backbone, image_size=size).train()
    for a in (0.7, 1.0):  # with a = 1, in the first epoch, the gradients of a branch are zeros, not absent
        model.zero_grad()
        model.set_balance(a)
        functional.cross_entropy(model(images(4, size)).logits, torch.tensor([0, 2])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    branches = network_of(model).branches
    assert any(p.grad is not None and bool(p.grad.any()) for p in branches[0].parameters())
    assert not any(p.grad is not None and bool(p.grad.any()) for p in branches[1].parameters())
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("backbone", ["resnet20", TIMM, "timm/test_vit"])
def test_a_seed_gives_the_same_weights_and_each_branch_its_own(backbone: str) -> None:
    before = torch.get_rng_state()
    first = bbn(backbone, seed=3, image_size=64)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert equal(first, bbn(backbone, seed=3, image_size=64))
    assert not equal(first, bbn(backbone, seed=4, image_size=64))
    assert not equal(*network_of(first).branches)


@pytest.mark.parametrize("backbone", ["resnet20", TIMM, "timm/test_vit"])
def test_a_saved_model_loads_back_without_the_balance(tmp_path: Path, backbone: str) -> None:
    source, path = bbn(backbone, seed=1, image_size=64).train(), tmp_path / "model.safetensors"
    source.set_balance(0.3)
    source(images(4, 64))
    safetensors.torch.save_file(source.state_dict(), path)
    assert "balance" not in source.state_dict()
    again = bbn(backbone, seed=2, image_size=64)
    again.load_state_dict(safetensors.torch.load_file(path))
    assert torch.equal(source.eval()(images(2, 64)).logits, again.eval()(images(2, 64)).logits)
    assert equal(bbn(backbone, seed=3, image_size=64, weights=str(path)), source)
    with pytest.raises(UserError, match=r"does not fit resnet20 \(Missing key"):
        build_model("resnet20", 3, image_size=64, weights=str(path), **RGB)


def test_weights_of_timm_are_in_both_branches(tmp_path: Path) -> None:
    import timm

    source, path = timm.create_model("test_resnet", num_classes=1000), str(tmp_path / "w.pt")
    torch.save(source.state_dict(), path)
    network = network_of(bbn(TIMM, weights=path))
    for part in (network.trunk, *network.branches):
        assert part.state_dict()
        for key, value in part.state_dict().items():
            assert torch.equal(value, source.state_dict()[key]), key


def test_heads_decay_and_official_features() -> None:
    assert bbn(head="sigmoid").no_weight_decay() == {"head.bias"}
    plain = build_model("timm/test_vit", 3, image_size=64, **RGB).no_weight_decay()
    want = {name.replace("backbone.", f"backbone.branches.{i}.", 1) for name in plain for i in range(2)}
    assert plain and bbn("timm/test_vit", image_size=64).no_weight_decay() == want
    assert not bbn().supports_official
    with pytest.raises(UserError, match="protocol official works with CIFAR ResNets only"):
        bbn().official_features(images())


def test_embedding_looks_with_both_branches() -> None:
    model = bbn().train()
    model.set_balance(0.9)
    got = embed(model, images(3), Items(torch.zeros(3, dtype=torch.int64)))
    assert model.training and got.features.shape == (3, 128)
    torch.testing.assert_close(got.features, model.eval()(images(3)).features.detach())


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_changes_nothing(training: bool) -> None:
    model = bbn().train(training)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    got = other(images().to(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(got, model(images()).logits, rtol=1e-3, atol=1e-4)


def test_bfloat16_autocast() -> None:
    model = bbn().train()
    model.set_balance(0.3)
    expected = model(images()).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
    functional.cross_entropy(output.logits.float(), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(
        output.logits.float(), expected, rtol=0.1, atol=0.05 * float(expected.detach().abs().max())
    )


def test_a_new_balance_needs_no_new_compilation() -> None:
    model, graphs = bbn("resnet8").train(), []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for a in (1.0, 0.7, 0.2):
        twin = copy.deepcopy(model)
        for one in (model, twin):
            one.set_balance(a)
            one.zero_grad()
        got, want = compiled(images()), twin(images())
        torch.testing.assert_close(got.logits, want.logits)
        got.logits.square().sum().backward()
        want.logits.square().sum().backward()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_to_machine_code_it_still_reads_the_balance() -> None:
    torch.compiler.reset()  # as in a process of its own: what was compiled before makes other shapes dynamic
    model = bbn("resnet8").train()
    compiled = torch.compile(model)
    for a in (1.0, 0.2):
        model.set_balance(a)
        torch.testing.assert_close(
            compiled(images()).logits, copy.deepcopy(model)(images()).logits, rtol=1e-3, atol=1e-4
        )


# The step


def state_of(model: BranchClassifier, criterion: Any = None, **options: Any) -> StepState:
    def never(_: StepItems) -> Any:
        raise AssertionError("BBN embeds nothing")

    settings: dict[str, Any] = {"class_weight": None, "reduction": "mean", "mixer": None, "counter": None} | options
    return StepState(
        model=model, forward=model, make_embed=never, criterion=criterion or CrossEntropy(COUNTS), **settings
    )


def at(epoch: int, epochs: int = 200) -> PairingContext:
    return PairingContext(Moment(epoch=epoch, epochs=epochs), None)


def test_the_balance_goes_from_one_stream_to_the_other() -> None:
    """a = 1 − ((e − 1) / E)² with epochs e counted from 1."""
    got = [balance_at(Moment(epoch=e - 1, epochs=200).progress) for e in range(1, 201)]
    assert got == pytest.approx([1 - ((e - 1) / 200) ** 2 for e in range(1, 201)], abs=1e-12)
    assert got[0] == 1.0 and got[100] == pytest.approx(0.75) and got[-1] == pytest.approx(0.009975)


@pytest.mark.parametrize("epoch", [0, 100, 199])
@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_step_is_the_fact_sheets(epoch: int, reduction: Reduction, weighted: bool) -> None:
    model = bbn("resnet8", image_size=16).train()
    twin = copy.deepcopy(model)
    weight = effective_number_weights(COUNTS).float() if weighted else None
    background, foreground = batch(5, 1), batch(5, 2)
    state = state_of(model, class_weight=weight, reduction=reduction)
    parts = bbn_step(state, StepItems(background, foreground), at(epoch))
    a = 1 - (epoch / 200) ** 2
    _, logits = by_hand(twin, background.images, foreground.images, a)
    want = torch.zeros(())
    for share, labels in ((a, background.items.labels), (1 - a, foreground.items.labels)):
        loss = functional.cross_entropy(logits, labels, reduction="none")
        w = torch.ones(5) if weight is None else weight[labels]
        want = want + share * (w * loss).sum() / (w.sum() if reduction == "weighted-mean" else 5)
    torch.testing.assert_close(parts.loss, want)
    torch.testing.assert_close(parts.output.logits, logits)
    parts.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_the_step_tells_the_log() -> None:
    model = bbn("resnet8", image_size=16).train()
    background, foreground = batch(4, 1), batch(4, 2)
    before = [t.clone() for t in (background.images, foreground.images)]
    parts = bbn_step(state_of(model), StepItems(background, foreground), at(100))
    mixed = parts.mixed
    assert mixed.target.labels.tolist() == [
        [b, f] for b, f in zip(background.items.labels.tolist(), foreground.items.labels.tolist(), strict=True)
    ]
    assert mixed.target.shares.tolist() == [[0.75, 0.25]] * 4
    assert mixed.image_share.tolist() == [0.75] * 4
    assert not mixed.mixed.any() and mixed.mixed.dtype == torch.bool and mixed.pairs is None
    assert torch.equal(mixed.images, background.images)
    assert all(torch.equal(a, b) for a, b in zip(before, (background.images, foreground.images), strict=True))
    tally = Tally(3, torch.device("cpu"))
    tally.add(parts, 0)
    said = parts.output.logits.argmax(1)
    right = 0.75 * (said == background.items.labels).sum() + 0.25 * (said == foreground.items.labels).sum()
    row = tally.read()
    assert row["images"] == 4 and row["mixed_share"] == 0
    assert row["train_error"] == pytest.approx(1 - float(right) / 4)
    assert row["loss"] == pytest.approx(float(parts.loss.detach()))


@given(n=st.integers(1, 6), m=st.integers(1, 6))
def test_the_longer_batch_is_cut(n: int, m: int) -> None:
    model = bbn("resnet8", image_size=16).eval().train()
    background, foreground = batch(n, 1), batch(m, 2)
    parts = bbn_step(state_of(model), StepItems(background, foreground), at(50))
    k = min(n, m)
    assert parts.output.logits.shape == (k, 3) and len(parts.mixed.target.labels) == k
    assert parts.mixed.images.shape[0] == k


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_any_loss_takes_two_streams(name: str) -> None:
    criterion = LOSSES[name](COUNTS)
    model = bbn("resnet8", image_size=16, head=criterion.head).train()
    weight = effective_number_weights(COUNTS).float()
    state = state_of(model, criterion, class_weight=weight)
    parts = bbn_step(state, StepItems(batch(4, 1), batch(4, 2)), at(150))
    parts.loss.backward()
    assert parts.loss.isfinite()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_training_learns_both_streams_and_ends_on_the_second() -> None:
    model = bbn("resnet8", image_size=16).train()
    background, foreground = batch(6, 1), batch(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(60):
        parts = bbn_step(state_of(model), StepItems(background, foreground), at(epoch, 60))
        optimizer.zero_grad()
        parts.loss.backward()
        optimizer.step()
    assert parts.output.logits.argmax(1).tolist() == foreground.items.labels.tolist()


def test_a_step_without_foregrounds_or_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="takes a foreground batch"):
        bbn_step(state_of(bbn()), StepItems(batch(4, 1), None), at(0))
    plain: Any = build_model("resnet8", 3, image_size=16, **RGB)
    with pytest.raises(ValueError, match="architecture='bbn'"):
        bbn_step(state_of(plain), StepItems(batch(4, 1), batch(4, 2)), at(0))


def test_the_forward_may_be_wrapped() -> None:
    """As in a run: the step speaks to the bare model, images go through the wrapper."""
    model = bbn("resnet8", image_size=16, head=LDAM.head).train()
    calls = []

    def forward(x: Tensor) -> Output:
        calls.append((tuple(x.shape), float(model.balance)))
        output: Output = model(x)
        return output

    state = StepState(model, forward, lambda _: None, LDAM(COUNTS), None, "mean", None, None)  # type: ignore[arg-type, return-value]
    bbn_step(state, StepItems(batch(4, 1), batch(4, 2)), at(100))
    assert calls == [((8, 3, 16, 16), 0.75)]
