"""The losses for long-tailed data: against plain loops, in known cases, mixed, and in a training step."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from otmix.config import RunConfig
from otmix.data import ImageDataset
from otmix.errors import UserError
from otmix.losses import (
    LDAM,
    LOSSES,
    BalancedSoftmax,
    Bayias,
    ClassBalancedFocal,
    ClassBalancedSigmoid,
    ClassBalancedSoftmax,
    CrossEntropy,
    DeferredReweighting,
    Focal,
    LogitAdjustment,
    Reduction,
    effective_number_weights,
)
from otmix.losses.balanced_softmax import balanced_softmax
from otmix.losses.class_balanced import weighted_sigmoid_focal
from otmix.losses.focal import focal_loss
from otmix.losses.ib import ib_loss
from otmix.losses.lade import lader
from otmix.losses.ldam import HEAD_SCALE, ldam_loss, ldam_margins
from otmix.methods import LOSS_PARTS, loss_part, parse_method
from otmix.models.heads import HEADS, LDAM_SCALE, NormedHead, SigmoidHead
from otmix.pairing import PairingContext
from otmix.protocols import Overrides
from otmix.training.build import build_run
from otmix.training.launch import make_fabric
from otmix.training.loop import RunState, _class_weight
from otmix.training.reporter import Silent
from otmix.training.setup import load_data, prepare
from otmix.training.stage import StepItems, StepState
from otmix.types import ClassCounts, Output, Target
from slow_losses import draw, effective_weight, log_softmax, sigmoid, softplus, with_features

CIFAR = ClassCounts(torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]))
BALANCED = ClassCounts(torch.full((10,), 70))
NAMES = ["ldam", "focal", "cb-softmax", "cb-sigmoid", "cb-focal", "balanced-softmax", "logit-adjustment", "bayias"]
"""The losses that are a function of logits and one label; `ib` and `lade` have files of their own."""

# The formulas of the fact sheet, for one image, in Python's float64.


def slow_ldam(z: list[float], y: int, n: list[int]) -> float:
    margin = 0.5 * (n[y] / min(n)) ** (-1 / 4)
    return -log_softmax([30 * (z[k] / 30 - (margin if k == y else 0)) for k in range(len(z))], y)


def slow_focal(z: list[float], y: int, n: list[int], gamma: float = 1.0) -> float:
    top = max(z)
    masses = [math.exp(logit - top) for logit in z]
    others = math.fsum(masses[k] for k in range(len(z)) if k != y) / math.fsum(masses)  # 1 − p_y
    return others**gamma * -log_softmax(z, y)


def slow_cb_softmax(z: list[float], y: int, n: list[int]) -> float:
    return effective_weight(n, y) * -log_softmax(z, y)


def slow_cb_focal(z: list[float], y: int, n: list[int], gamma: float = 1.0) -> float:
    total = 0.0
    for k in range(len(z)):
        truth = z[k] if k == y else -z[k]  # log-odds of what is true about class k
        total += sigmoid(-truth) ** gamma * softplus(-truth)
    return effective_weight(n, y) * total


def slow_cb_sigmoid(z: list[float], y: int, n: list[int]) -> float:
    return slow_cb_focal(z, y, n, gamma=0.0)


def slow_balanced_softmax(z: list[float], y: int, n: list[int]) -> float:
    return -log_softmax([z[k] + math.log(n[k]) for k in range(len(z))], y)


def slow_logit_adjustment(z: list[float], y: int, n: list[int], tau: float = 1.0) -> float:
    return -log_softmax([z[k] + tau * math.log(n[k] / sum(n)) for k in range(len(z))], y)


def slow_bayias(z: list[float], y: int, n: list[int]) -> float:
    return -log_softmax([z[k] + math.log(n[k] / sum(n)) - math.log(1 / len(n)) for k in range(len(z))], y)


SLOW: dict[str, Callable[[list[float], int, list[int]], float]] = {
    "ce": lambda z, y, n: -log_softmax(z, y),
    "ldam": slow_ldam,
    "focal": slow_focal,
    "cb-softmax": slow_cb_softmax,
    "cb-sigmoid": slow_cb_sigmoid,
    "cb-focal": slow_cb_focal,
    "balanced-softmax": slow_balanced_softmax,
    "logit-adjustment": slow_logit_adjustment,
    "bayias": slow_bayias,
}


def slow(name: str, logits: Tensor, labels: Tensor, counts: ClassCounts) -> list[float]:
    n = counts.counts.tolist()
    return [SLOW[name](z, y, n) for z, y in zip(logits.double().tolist(), labels.tolist())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "k", "scale"), [(9, 2, 4.0), (9, 10, 4.0), (9, 10, 50.0), (40, 3, 50.0), (2, 8142, 50.0)]
)
@pytest.mark.parametrize("name", NAMES)
def test_each_formula(name: str, b: int, k: int, scale: float, dtype: torch.dtype) -> None:
    """With 2 images and 8142 classes nearly all classes are absent from the batch."""
    logits, labels, counts = draw(b, k, scale)
    logits = logits.to(dtype)
    got = LOSSES[name](counts).per_label(Output(logits), labels[:, 0], 0.0)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(slow(name, logits, labels[:, 0], counts), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_class(name: str) -> None:
    logits, _, counts = draw(6, 10, 4.0)
    for y in (0, 9):
        labels = torch.full((6,), y)
        got = LOSSES[name](counts).per_label(Output(logits), labels, 0.0)
        assert got.tolist() == pytest.approx(slow(name, logits, labels, counts), rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99])
def test_other_betas(beta: float) -> None:
    want = 1 / (1 - beta ** CIFAR.counts.double())
    want = (10 * want / want.sum()).float()
    deferred = DeferredReweighting(CIFAR, beta, start=0.5).class_weight(0.5)
    assert deferred is not None
    torch.testing.assert_close(deferred, want)
    for part in (ClassBalancedSoftmax, ClassBalancedSigmoid, ClassBalancedFocal):
        torch.testing.assert_close(part(CIFAR, beta=beta).weight, want)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_other_gammas(gamma: float) -> None:
    logits, labels, counts = draw(9, 10, 10.0)
    n = counts.counts.tolist()
    for criterion, formula in (
        (Focal(counts, gamma), slow_focal),
        (ClassBalancedFocal(counts, gamma=gamma), slow_cb_focal),
    ):
        want = [formula(z, y, n, gamma) for z, y in zip(logits.double().tolist(), labels[:, 0].tolist())]
        got = criterion.per_label(Output(logits), labels[:, 0], 0.0)
        assert got.tolist() == pytest.approx(want, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "k", "scale"), [(9, 10, 4.0), (40, 3, 50.0), (1, 8142, 50.0)])
@pytest.mark.parametrize("tau", [-1.0, 0.5, 2.5])
def test_other_taus(tau: float, b: int, k: int, scale: float, dtype: torch.dtype) -> None:
    logits, labels, counts = draw(b, k, scale)
    logits, y, n = logits.to(dtype), labels[:, 0], counts.counts.tolist()
    want = [slow_logit_adjustment(z, label, n, tau) for z, label in zip(logits.double().tolist(), y.tolist())]
    got = LogitAdjustment(counts, tau).per_label(Output(logits), y, 0.0)
    assert got.tolist() == pytest.approx(want, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_mixes_of_two_labels(name: str, weighted: bool, reduction: str) -> None:
    """Each term has the margin, the weight and the modulator of its own label."""
    logits, labels, counts = draw(8, 5, 6.0, seed=3)
    g = torch.Generator().manual_seed(4)
    share, weight = torch.rand(8, generator=g), torch.rand(5, generator=g) + 0.1
    terms = [slow(name, logits, labels[:, s], counts) for s in range(2)]
    shares = torch.stack([share, 1 - share], 1)
    want = 0.0
    for s in range(2):
        w = [float(weight[y]) if weighted else 1.0 for y in labels[:, s].tolist()]
        total = sum(float(shares[i, s]) * w[i] * terms[s][i] for i in range(8))
        want += total / (sum(w) if weighted and reduction == "weighted-mean" else 8)
    criterion = LOSSES[name](counts)
    got = criterion(Output(logits), Target(labels, shares), weight if weighted else None, reduction=reduction)
    assert float(got) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_share_of_one_or_zero_is_one_images_loss(name: str, reduction: Reduction, share: float) -> None:
    logits, labels, counts = draw(8, 20, 6.0, seed=3)
    output, criterion = with_features(logits), LOSSES[name](counts)
    weight = torch.rand(20, generator=torch.Generator().manual_seed(4)) + 0.1
    target = Target(labels, torch.tensor([[share, 1 - share]]).expand(8, 2))
    hard = Target.hard(labels[:, 0 if share else 1])
    got, want = (criterion(output, t, weight, 0.9, reduction) for t in (target, hard))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    other = criterion(output, Target.hard(labels[:, 1 if share else 0]), weight, 0.9, reduction)
    assert not torch.isclose(got, other, rtol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_one_hot_target_is_the_hard_label(name: str, reduction: Reduction) -> None:
    """As many labels as classes, all but one with share 0."""
    logits, labels, counts = draw(8, 5, 6.0, seed=3)
    output, criterion, y = with_features(logits), LOSSES[name](counts), labels[:, 0]
    one_hot = Target(torch.arange(5).expand(8, 5), nn.functional.one_hot(y, 5).float())
    weight = torch.rand(5, generator=torch.Generator().manual_seed(4)) + 0.1
    got, want = (criterion(output, target, weight, 0.9, reduction) for target in (one_hot, Target.hard(y)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


# Known values and cases


def test_ldam_has_the_margins_of_the_design() -> None:
    want = [0.158, 0.180, 0.204, 0.232, 0.264, 0.300, 0.341, 0.387, 0.440, 0.500]
    assert ldam_margins(CIFAR).tolist() == pytest.approx(want, abs=6e-4)


def test_ldam_is_its_codes_loss_on_the_cosines_of_its_head() -> None:
    """There the scale is in the loss: CE(s · (cos − m on the true class))."""
    assert HEAD_SCALE == LDAM_SCALE
    g = torch.Generator().manual_seed(0)
    head, features, labels = NormedHead(6, 10), torch.randn(5, 6, generator=g), torch.tensor([0, 3, 9, 9, 5])
    cosines = nn.functional.cosine_similarity(features[:, None], head.weight[None], dim=2)
    cosines = cosines - nn.functional.one_hot(labels, 10) * ldam_margins(CIFAR)[labels][:, None].float()
    want = nn.functional.cross_entropy(30 * cosines, labels, reduction="none")
    torch.testing.assert_close(LDAM(CIFAR).per_label(Output(head(features)), labels, 0.0), want, rtol=1e-4, atol=1e-4)


def test_balanced_counts_make_the_shifts_constants() -> None:
    logits, labels, _ = draw(9, 10, 4.0)
    output, y = Output(logits), labels[:, 0]
    plain = CrossEntropy(BALANCED).per_label(output, y, 0.0)
    shifted = (BalancedSoftmax(BALANCED), LogitAdjustment(BALANCED, tau=2.5), Bayias(BALANCED))
    for criterion in (*shifted, ClassBalancedSoftmax(BALANCED)):
        torch.testing.assert_close(criterion.per_label(output, y, 0.0), plain)
    assert ldam_margins(BALANCED).tolist() == [0.5] * 10
    lowered = logits - 15.0 * nn.functional.one_hot(y, 10)
    torch.testing.assert_close(
        LDAM(BALANCED).per_label(output, y, 0.0), CrossEntropy(BALANCED).per_label(Output(lowered), y, 0.0)
    )
    bce = nn.functional.binary_cross_entropy_with_logits(
        logits, nn.functional.one_hot(y, 10).float(), reduction="none"
    ).sum(1)
    torch.testing.assert_close(ClassBalancedSigmoid(BALANCED).per_label(output, y, 0.0), bce)


def test_losses_that_contain_others() -> None:
    logits, labels, _ = draw(9, 10, 4.0)
    output, y = Output(logits), labels[:, 0]
    plain = CrossEntropy(CIFAR).per_label(output, y, 0.0)
    torch.testing.assert_close(Focal(CIFAR, gamma=0.0).per_label(output, y, 0.0), plain, rtol=0, atol=0)
    torch.testing.assert_close(LogitAdjustment(CIFAR, tau=0.0).per_label(output, y, 0.0), plain, rtol=0, atol=0)
    torch.testing.assert_close(
        LogitAdjustment(CIFAR).per_label(output, y, 0.0), BalancedSoftmax(CIFAR).per_label(output, y, 0.0)
    )
    torch.testing.assert_close(
        ClassBalancedFocal(CIFAR, gamma=0.0).per_label(output, y, 0.0),
        ClassBalancedSigmoid(CIFAR).per_label(output, y, 0.0),
    )
    weight = effective_number_weights(CIFAR).float()
    torch.testing.assert_close(ClassBalancedSoftmax(CIFAR).per_label(output, y, 0.0), weight[y] * plain)


def test_the_factor_of_some_copies_of_focal_is_off() -> None:
    logits, labels, _ = draw(4, 10, 4.0)
    one, ten = (Focal(CIFAR, factor=f).per_label(Output(logits), labels[:, 0], 0.0) for f in (1.0, 10.0))
    torch.testing.assert_close(ten, 10 * one)
    torch.testing.assert_close(one, Focal(CIFAR).per_label(Output(logits), labels[:, 0], 0.0), rtol=0, atol=0)


def test_soft_labels_where_the_loss_is_linear_in_them() -> None:
    """The shift of balanced softmax does not depend on the label; LDAM's margin does."""
    logits, labels, _ = draw(6, 10, 4.0)
    target = Target(labels, torch.tensor([[0.3, 0.7]]).expand(6, 2))
    soft = target.soft_labels(10)
    shifted = logits + CIFAR.prior.log().float()
    torch.testing.assert_close(
        BalancedSoftmax(CIFAR)(Output(logits), target), nn.functional.cross_entropy(shifted, soft)
    )
    margins = 30 * ldam_margins(CIFAR).float() * soft
    assert not torch.isclose(
        LDAM(CIFAR)(Output(logits), target), nn.functional.cross_entropy(logits - margins, soft), rtol=1e-3
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: LDAM(CIFAR, max_margin=0.0),
        lambda: Focal(CIFAR, gamma=-1.0),
        lambda: Focal(CIFAR, factor=0.0),
        lambda: LogitAdjustment(CIFAR, tau=math.nan),
        lambda: ClassBalancedSoftmax(CIFAR, beta=1.0),
        lambda: ClassBalancedFocal(CIFAR, gamma=math.nan),
    ],
)
def test_impossible_settings_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UserError, match=r"max_margin|gamma|tau|beta"):
        build()


# Gradients

FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ldam": ldam_loss,
    "balanced-softmax": balanced_softmax,
    **{f"focal {gamma}": lambda z, y, v, gamma=gamma: focal_loss(z, y, gamma) for gamma in (0.0, 0.5, 1.0, 2.0)},
    **{
        f"cb-focal {gamma}": lambda z, y, v, gamma=gamma: weighted_sigmoid_focal(z, y, v, gamma)
        for gamma in (0.0, 0.5, 1.0, 2.0)
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 5, generator=g, dtype=torch.float64)).requires_grad_()
    labels, vector = torch.tensor([0, 1, 4, 4]), torch.rand(5, generator=g, dtype=torch.float64) + 0.2
    assert torch.autograd.gradcheck(lambda z: FUNCTIONS[name](z, labels, vector), logits)


@pytest.mark.parametrize("scale", [50.0, 500.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_large_logits_are_finite_and_those_of_float64(name: str, scale: float) -> None:
    """Also where an image is classified perfectly, the modulator 0 and its slope infinite (gamma < 1)."""
    logits, labels, _ = draw(30, 3, scale)
    vector, grads = torch.rand(3, generator=torch.Generator().manual_seed(1)) + 0.2, []
    for dtype in (torch.float32, torch.float64):
        z = logits.to(dtype, copy=True).requires_grad_()
        FUNCTIONS[name](z, labels[:, 0], vector.to(dtype)).sum().backward()
        assert z.grad is not None
        grads.append(z.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=2e-4)


def one_lader(z: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return lader(z, Target.hard(y), v / v.sum())


def one_ib(z: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return ib_loss(z, y, torch.ones(len(y), 2), v)


@pytest.mark.parametrize("function", [weighted_sigmoid_focal, one_ib, one_lader])
def test_gradients_made_along_with_the_loss_can_be_taken_again_but_not_differentiated(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    share = torch.ones(3, requires_grad=True)
    loss = (share * function(logits, torch.tensor([0, 1, 2]), torch.ones(4))).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, create_graph=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_rounds_nothing_within_a_loss(name: str) -> None:
    results = []
    for enabled in (False, True):
        logits, labels, counts = draw(9, 40, 10.0)
        logits.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = LOSSES[name](counts)(with_features(logits), Target.hard(labels[:, 0]), progress=0.9)
        loss.backward()
        assert logits.grad is not None
        results.append((loss.detach(), logits.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_no_host_sync_and_little_kept_for_the_backward(name: str) -> None:
    """On the meta device, where a value that the host asks for does not exist; beyond the logits at most their size is
    kept.
    """
    criterion = LOSSES[name](ClassCounts(torch.arange(1, 401))).to("meta")
    logits = torch.empty(64, 400, device="meta", requires_grad=True)
    output = with_features(logits)
    target = Target(torch.zeros(64, 1, dtype=torch.int64, device="meta"), torch.ones(64, 1, device="meta"))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor is not logits and tensor.numel() > 1:
            kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = criterion(output, target, torch.ones(400, device="meta"), progress=0.9)
        loss.backward()
    assert logits.grad is not None
    assert sum(tensor.numel() for tensor in kept.values() if tensor.shape == logits.shape) <= logits.numel()
    assert criterion.probabilities(with_features(logits.detach())).shape == (64, 400)


# What evaluation and checkpoints see


@pytest.mark.parametrize("name", LOSSES)
def test_a_criterion_is_a_function_of_the_counts(name: str) -> None:
    """It is in no checkpoint: it has nothing to save, and another one built from the counts gives the same loss,
    whatever it was asked before.
    """
    logits, labels, counts = draw(5, 6, 4.0)
    output, target = with_features(logits), Target.hard(labels[:, 0])
    criterion, again = LOSSES[name](counts), LOSSES[name](ClassCounts(counts.counts.clone()))
    assert not criterion.state_dict()
    assert not [*criterion.parameters()]
    late, early = (criterion(output, target, progress=progress) for progress in (0.9, 0.0))
    assert torch.equal(early, again(output, target, progress=0.0))
    assert torch.equal(late, again(output, target, progress=0.9))
    assert torch.equal(late, early) or name in ("ib", "ride")  # which begin late


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].head != "sigmoid"])
def test_probabilities_are_the_softmax_of_plain_logits(name: str) -> None:
    """Without the margins and shifts of training."""
    logits, _, counts = draw(5, 6, 4.0)
    torch.testing.assert_close(LOSSES[name](counts).probabilities(with_features(logits)), logits.softmax(1))


@pytest.mark.parametrize("name", ["cb-sigmoid", "cb-focal"])
def test_probabilities_of_sigmoid_heads_are_their_shares(name: str) -> None:
    for scale in (4.0, 50.0):
        logits, _, counts = draw(5, 6, scale)
        got = LOSSES[name](counts).probabilities(Output(logits.bfloat16()))
        rates = [[sigmoid(z) for z in row] for row in logits.bfloat16().double().tolist()]
        assert got.dtype == torch.float32
        assert got.flatten().tolist() == pytest.approx([p / sum(row) for row in rates for p in row], rel=1e-5)
    far = LOSSES[name](counts).probabilities(Output(torch.tensor([[-500.0, -501.0]])))
    torch.testing.assert_close(far, torch.tensor([[-500.0, -501.0]]).softmax(1))  # every sigmoid is 0 in float32


def test_a_sigmoid_head_begins_at_the_rate_of_a_guess() -> None:
    """K sigmoids at 1/K: the loss does not begin at K log 2, which is what the bias is for."""
    counts = ClassCounts(torch.full((100,), 7))
    head = SigmoidHead(4, 100)
    loss = ClassBalancedSigmoid(counts).per_label(Output(head(torch.zeros(1, 4))), torch.tensor([3]), 0.0)
    assert loss.item() == pytest.approx(math.log(100) - 99 * math.log(0.99), rel=1e-5)


# In a run


def test_every_loss_explains_itself() -> None:
    assert set(LOSS_PARTS) <= set(LOSSES)
    assert all(loss_part(name).paper != "registered from outside" for name in LOSSES)
    assert set(LOSSES) >= {"ce", *NAMES, "ib", "lade"}
    assert parse_method("balms+otmix").name == "balanced-softmax+otmix"
    assert parse_method("balms-drw+cmo").name == "balanced-softmax-drw+cmo"
    assert parse_method("balms+otmix").title == "BALMS + OTmix"
    assert parse_method("ldam-drw+otmix").title == "LDAM-DRW + OTmix"


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_data(RunConfig(data="digits"))


def build(dataset: ImageDataset, path: Path, method: str) -> RunState:
    """A run in its last epoch of three, where deferred weights are on, that mixes every batch by transport."""
    settings = Overrides(mix_probability=1.0, curriculum_power=0.0)
    config = RunConfig(method=method, data="digits", epochs=3, batch_size=16, accelerator="cpu", set=settings)
    run = build_run(make_fabric(config), path, prepare(config, dataset), Silent())
    run.epoch = 2
    return run


def train_step(run: RunState) -> Tensor:
    moment = run.moment(0)
    background = run.store.fetch(run.background.epoch(moment)[0], None)
    foreground = None
    if run.foreground is not None:
        foreground = run.store.fetch(run.foreground.step(len(background), moment), None)
    state = StepState(**{**vars(run.state), "class_weight": _class_weight(run)})
    parts = run.stage.step(state, StepItems(background, foreground), PairingContext(moment, run.confusion))
    assert bool(parts.mixed.mixed.all()) == (foreground is not None)
    run.fabric.backward(parts.loss)
    run.optimizer.step()
    return parts.loss.detach()


@pytest.mark.parametrize("suffix", ["", "-drw", "+otmix", "-drw+otmix"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_training_step_changes_every_parameter(name: str, suffix: str, digits: ImageDataset, tmp_path: Path) -> None:
    run = build(digits, tmp_path, name + suffix)
    model = run.state.model
    named = dict(model.named_parameters())
    assert type(model.head) is HEADS[LOSSES[name].head]
    assert (_class_weight(run) is not None) == ("drw" in suffix)
    free = [
        parameter for group in run.optimizer.param_groups if not group["weight_decay"] for parameter in group["params"]
    ]
    assert [key for key in named if any(named[key] is parameter for parameter in free)] == (
        ["head.bias"] if name in ("cb-sigmoid", "cb-focal") else []
    )
    before = {key: value.detach().clone() for key, value in named.items()}
    loss = train_step(run)
    assert loss.ndim == 0
    assert bool(loss.isfinite())
    for key, value in named.items():
        assert value.grad is not None and bool(value.grad.any()), key  # weight decay alone would change it too
        assert bool(value.isfinite().all()), key
        assert not torch.equal(before[key], value), key
