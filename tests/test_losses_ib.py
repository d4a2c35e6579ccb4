"""The influence-balanced loss against plain loops, in known cases, mixed, and where an image is classified surely."""

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from otmix.errors import UserError
from otmix.losses import IB, CrossEntropy, Reduction
from otmix.losses.ib import ib_loss, ib_steps, ib_weights
from otmix.types import ClassCounts, Output, Target
from slow_losses import draw, effective_weight, log_softmax, with_features

COUNTS = ClassCounts(torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]))
LATE = 0.9

# The formula of the fact sheet, for one image, in Python's float64.


def inverse_weight(n: list[int], label: int) -> float:
    return 1 / n[label] / math.fsum(1 / count for count in n) * len(n)


def slow_ib(
    z: list[float],
    h: list[float],
    y: int,
    w: float,
    scale: float = 1000.0,
    epsilon: float = 1e-3,
    gamma: float = 0.0,
) -> float:
    top = max(z)
    masses = [math.exp(logit - top) for logit in z]
    total = math.fsum(masses)
    p = [mass / total for mass in masses]
    others = math.fsum(p[k] for k in range(len(z)) if k != y)  # 1 − p_y, which is 0 where p_y rounds to 1
    q = math.fsum(p[k] if k != y else others for k in range(len(z))) * math.fsum(abs(x) for x in h)
    return w * -log_softmax(z, y) * scale / (q + epsilon) * others**gamma


def slow(output: Output, labels: Tensor, counts: ClassCounts, **settings: Any) -> list[float]:
    n = counts.counts.tolist()
    assert output.features is not None
    rows = zip(output.logits.double().tolist(), output.features.double().tolist(), labels.tolist())
    return [slow_ib(z, h, y, inverse_weight(n, y), **settings) for z, h, y in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "k", "scale"), [(9, 2, 4.0), (9, 10, 4.0), (9, 10, 50.0), (40, 3, 50.0), (2, 8142, 50.0)]
)
def test_the_formula(b: int, k: int, scale: float, dtype: torch.dtype) -> None:
    """With 2 images and 8142 classes nearly all classes are absent from the batch."""
    logits, labels, counts = draw(b, k, scale)
    output = with_features(logits.to(dtype))
    got = IB(counts).per_label(output, labels[:, 0], LATE)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(slow(output, labels[:, 0], counts), rel=5e-5, abs=1e-6)


@pytest.mark.parametrize("y", [0, 9])
def test_a_batch_of_one_class(y: int) -> None:
    logits, _, counts = draw(6, 10, 4.0)
    output, labels = with_features(logits), torch.full((6,), y)
    got = IB(counts).per_label(output, labels, LATE)
    assert got.tolist() == pytest.approx(slow(output, labels, counts), rel=2e-5)


@pytest.mark.parametrize(
    ("settings", "of_reference"),
    [
        ({"scale": 10.0}, {"scale": 10.0}),
        ({"epsilon": 0.5}, {"epsilon": 0.5}),
        ({"focal_gamma": 1.0}, {"gamma": 1.0}),
        ({"focal_gamma": 0.5, "scale": 2.0}, {"gamma": 0.5, "scale": 2.0}),
        ({"detach": True}, {}),
    ],
)
def test_the_settings(settings: dict[str, Any], of_reference: dict[str, float]) -> None:
    logits, labels, counts = draw(9, 10, 8.0)
    output = with_features(logits)
    got = IB(counts, **settings).per_label(output, labels[:, 0], LATE)
    assert got.tolist() == pytest.approx(slow(output, labels[:, 0], counts, **of_reference), rel=2e-5)


@pytest.mark.parametrize("weights", ["inverse", "effective", "none"])
def test_the_class_weights(weights: Literal["inverse", "effective", "none"]) -> None:
    n = COUNTS.counts.tolist()
    weight = {"inverse": inverse_weight, "effective": effective_weight, "none": lambda n, y: 1.0}[weights]
    assert ib_weights(COUNTS, weights).tolist() == pytest.approx([weight(n, y) for y in range(10)])
    assert float(ib_weights(COUNTS, weights).sum()) == pytest.approx(10)
    logits, labels, _ = draw(9, 10, 4.0)
    output = with_features(logits)
    one = IB(COUNTS, weights="none").per_label(output, labels[:, 0], LATE)
    want = [weight(n, y) * loss for y, loss in zip(labels[:, 0].tolist(), one.tolist())]
    assert IB(COUNTS, weights=weights).per_label(output, labels[:, 0], LATE).tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mixes_of_two_labels(weighted: bool, reduction: Reduction) -> None:
    """Each term has the influence and the weight of its own label."""
    logits, labels, counts = draw(8, 5, 6.0, seed=3)
    output, g = with_features(logits), torch.Generator().manual_seed(4)
    share, weight = torch.rand(8, generator=g), torch.rand(5, generator=g) + 0.1
    shares, want = torch.stack([share, 1 - share], 1), 0.0
    for s in range(2):
        losses, w = slow(output, labels[:, s], counts), [float(weight[y]) if weighted else 1.0 for y in labels[:, s]]
        total = math.fsum(float(shares[i, s]) * w[i] * losses[i] for i in range(8))
        want += total / (math.fsum(w) if weighted and reduction == "weighted-mean" else 8)
    got = IB(counts)(output, Target(labels, shares), weight if weighted else None, LATE, reduction)
    assert float(got) == pytest.approx(want, rel=1e-5)


# When it begins


def test_before_its_start_it_is_cross_entropy_and_needs_no_features() -> None:
    logits, labels, counts = draw(9, 10, 4.0)
    criterion, plain = IB(counts), CrossEntropy(counts)
    for epoch in range(200):
        output = Output(logits) if epoch < 100 else with_features(logits)
        got, want = (loss.per_label(output, labels[:, 0], epoch / 200) for loss in (criterion, plain))
        assert torch.equal(got, want) == (epoch < 100)
    with pytest.raises(UserError, match="features"):
        criterion.per_label(Output(logits), labels[:, 0], 100 / 200)


def test_its_own_steps_are_those_of_its_code() -> None:
    def factor(epoch: int, start: int) -> float:
        """Of 200 epochs, counted from 0."""
        if epoch >= start:
            return 1e-6 if epoch >= 180 else 1e-4 if epoch >= 160 else 1e-2
        return 1e-4 if epoch >= 180 else 1e-2 if epoch >= 160 else 1.0

    assert CrossEntropy(COUNTS).own_steps is None
    assert IB(COUNTS).own_steps == ((0.5, 1e-2), (0.8, 1e-4), (0.9, 1e-6))
    for start in (0, 60, 100, 160, 170, 180, 190, 200):
        steps = ib_steps(start / 200)
        shares = [share for share, _ in steps]
        assert shares == sorted(shares)
        for epoch in range(200):
            passed = [1.0, *(value for share, value in steps if epoch / 200 >= share)]
            assert passed[-1] == factor(epoch, start), (start, epoch)


# Known values and gradients


def test_an_undecided_image_of_two_classes() -> None:
    """p = 1/2 and ‖h‖₁ = 6: q = (1/2 + 1/2) · 6."""
    loss = ib_loss(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([9.0, 0.25]))
    assert loss.item() == pytest.approx(0.25 * math.log(2) * 1000 / 6.001)


def test_a_surely_classified_image_keeps_its_digits() -> None:
    """1 − p_y is 1e-13 and less, where p_y is 1 in float32; the loss multiplies it by scale / ε = 10⁶."""
    logits = torch.tensor([[30.0, 0.0], [0.0, 80.0]], requires_grad=True)
    labels, features = torch.tensor([0, 1]), torch.ones(2, 4)
    loss = ib_loss(logits, labels, features, torch.ones(2))
    assert loss.tolist() == pytest.approx([1e6 * math.exp(-30), 1e6 * math.exp(-80)], rel=1e-5)
    loss.sum().backward()
    assert logits.grad is not None
    slopes = [1e6 * math.exp(-30), 1e6 * math.exp(-80)]
    want = [-slopes[0], slopes[0], slopes[1], -slopes[1]]
    assert logits.grad.flatten().tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_gradients_are_those_of_finite_differences(gamma: float) -> None:
    """Those for logits and features: through the influence too."""
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 5, generator=g, dtype=torch.float64)).requires_grad_()
    features = (torch.rand(4, 3, generator=g, dtype=torch.float64) + 0.1).requires_grad_()
    labels, weight = torch.tensor([0, 1, 4, 4]), torch.rand(5, generator=g, dtype=torch.float64) + 0.2

    def loss(z: Tensor, h: Tensor) -> Tensor:
        return ib_loss(z, labels, h, weight, 1.0, 1e-3, gamma)

    assert torch.autograd.gradcheck(loss, (logits, features))


def test_a_detached_influence_is_a_constant_weight() -> None:
    logits, labels, counts = draw(9, 10, 4.0)
    y, gradients = labels[:, 0], []
    features = with_features(logits).features
    assert features is not None
    features.requires_grad_()
    for detach in (True, False):
        z = logits.clone().requires_grad_()
        loss = IB(counts, detach=detach).per_label(Output(z, features), y, LATE)
        gradients.append(torch.autograd.grad(loss.sum(), (z, features), allow_unused=True))
    z = logits.clone().requires_grad_()
    plain = CrossEntropy(counts).per_label(Output(z), y, LATE)
    balance = (loss / plain).detach()
    (want,) = torch.autograd.grad((balance * plain).sum(), z)
    torch.testing.assert_close(gradients[0][0], want)
    assert gradients[0][1] is None
    assert not torch.allclose(gradients[1][0], want, rtol=0.1)
    assert float(gradients[1][1].max()) < 0  # larger features are more influence, and less loss


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_gradients_of_large_logits_are_finite_and_those_of_float64(gamma: float) -> None:
    logits, labels, _ = draw(30, 3, 50.0)
    logits[0], labels[0] = torch.tensor([0.0, 500.0, -500.0]), 1  # 1 − p_y is 0 in float32
    features, weight, gradients = with_features(logits).features, torch.tensor([0.2, 1.0, 1.8]), []
    assert features is not None
    for dtype in (torch.float32, torch.float64):
        z = logits.to(dtype, copy=True).requires_grad_()
        ib_loss(z, labels[:, 0], features.to(dtype), weight.to(dtype), gamma=gamma).sum().backward()
        assert z.grad is not None
        gradients.append(z.grad.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: IB(COUNTS, start=1.5),
        lambda: IB(COUNTS, start=math.nan),
        lambda: IB(COUNTS, scale=0.0),
        lambda: IB(COUNTS, epsilon=0.0),
        lambda: IB(COUNTS, focal_gamma=-1.0),
        lambda: IB(COUNTS, weights="rare"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(build: Callable[[], IB]) -> None:
    with pytest.raises(UserError, match=r"ib needs|inverse, effective or none"):
        build()
