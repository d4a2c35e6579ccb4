"""LADE against plain loops: batches with classes absent, of one class, of mixes; its known cases and gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from otmix.errors import UserError
from otmix.losses import LADE, BalancedSoftmax, Reduction
from otmix.losses.lade import lader
from otmix.types import ClassCounts, Output, Target
from slow_losses import draw, log_softmax


def slow_lader(logits: Tensor, target: Target, n: list[int], regulariser: float = 0.01) -> float:
    """The formula of the fact sheet in Python's float64, over items (image, label, share)."""
    z = logits.double().tolist()
    rows = list(zip(target.labels.tolist(), target.shares.double().tolist()))
    items = [(z[i], y, share) for i, (ys, shares) in enumerate(rows) for y, share in zip(ys, shares)]
    total, classes = 0.0, len(n)
    number = math.fsum(share for _, _, share in items)
    for c in range(classes):
        prior = n[c] / sum(n)
        of_class = [(row, share) for row, y, share in items if y == c and share > 0]
        mass = math.fsum(share for _, share in of_class)
        a = math.fsum(share * row[c] for row, share in of_class) / mass if of_class else 0.0
        exponents = [row[c] - math.log(prior) - math.log(classes) for row, _, _ in items]
        top = max(exponents)
        summed = math.fsum(item[2] * math.exp(exponent - top) for item, exponent in zip(items, exponents))
        b = math.log(summed) + top - math.log(number)
        total -= prior * (a - b - regulariser * b * b)
    return total


def slow_ce(z: list[float], y: int, n: list[int]) -> float:
    return -log_softmax([z[k] + math.log(n[k] / sum(n)) for k in range(len(z))], y)


def shares_of(share: Tensor) -> Tensor:
    return torch.stack([share, 1 - share], 1)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "k", "scale"), [(9, 2, 4.0), (9, 10, 4.0), (9, 10, 50.0), (40, 3, 50.0), (2, 8142, 50.0)]
)
def test_the_formula(b: int, k: int, scale: float, dtype: torch.dtype, mixed: bool) -> None:
    """With 2 images and 8142 classes nearly all classes are absent from the batch."""
    logits, labels, counts = draw(b, k, scale)
    logits, n = logits.to(dtype), counts.counts.tolist()
    share = torch.rand(b, generator=torch.Generator().manual_seed(1))
    target = Target(labels, shares_of(share)) if mixed else Target.hard(labels[:, 0])
    want = 0.1 * slow_lader(logits, target, n)
    for i, z in enumerate(logits.double().tolist()):
        for y, part in zip(target.labels[i].tolist(), target.shares[i].tolist()):
            want += part * slow_ce(z, y, n) / b
    got = LADE(counts)(Output(logits), target)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(want, rel=2e-5)
    assert LADE(counts).per_label(Output(logits), labels[:, 0], 0.0).shape == (b,)


@given(b=st.integers(1, 6), k=st.integers(1, 5), s=st.integers(1, 3), seed=st.integers(0, 999))
def test_lader_of_any_batch(b: int, k: int, s: int, seed: int) -> None:
    logits, _, counts = draw(b, k, 6.0, seed)
    g = torch.Generator().manual_seed(seed)
    shares = torch.rand(b, s, generator=g, dtype=torch.float64) * (torch.rand(b, s, generator=g) < 0.7) + 1e-9
    target = Target(torch.randint(k, (b, s), generator=g), shares / shares.sum(1, keepdim=True))
    got = lader(logits.double(), target, counts.prior, 0.3)
    assert float(got) == pytest.approx(slow_lader(logits, target, counts.counts.tolist(), 0.3), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("y", [0, 9])
def test_a_batch_of_one_class(y: int) -> None:
    logits, _, counts = draw(6, 10, 4.0)
    target = Target.hard(torch.full((6,), y))
    got = lader(logits, target, counts.prior.float())
    assert float(got) == pytest.approx(slow_lader(logits, target, counts.counts.tolist()), rel=1e-5)
    # A of the other classes is 0, so their logits are only in B
    raised = logits.clone()
    raised[:, y] += 1  # A and B rise together
    for_b = lader(raised, target, counts.prior.float(), 0.0) - lader(logits, target, counts.prior.float(), 0.0)
    assert float(for_b) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "weighted-mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mixes_of_two_labels(weighted: bool, reduction: Reduction) -> None:
    """Class weights and the reduction are those of the cross-entropy; LADER is added once."""
    logits, labels, counts = draw(8, 5, 6.0, seed=3)
    g, n = torch.Generator().manual_seed(4), counts.counts.tolist()
    shares, weight = shares_of(torch.rand(8, generator=g)), torch.rand(5, generator=g) + 0.1
    want = 0.7 * slow_lader(logits, Target(labels, shares), n, 0.2)
    for s in range(2):
        w = [float(weight[y]) if weighted else 1.0 for y in labels[:, s]]
        losses = [slow_ce(z, y, n) for z, y in zip(logits.tolist(), labels[:, s].tolist())]
        total = math.fsum(float(shares[i, s]) * w[i] * losses[i] for i in range(8))
        want += total / (math.fsum(w) if weighted and reduction == "weighted-mean" else 8)
    criterion = LADE(counts, strength=0.7, regulariser=0.2)
    got = criterion(Output(logits), Target(labels, shares), weight if weighted else None, reduction=reduction)
    assert float(got) == pytest.approx(want, rel=1e-5)


# Known cases


@pytest.mark.parametrize(("k", "scale"), [(2, 4.0), (10, 50.0), (8142, 50.0)])
def test_with_strength_0_it_is_balanced_softmax(k: int, scale: float) -> None:
    logits, labels, counts = draw(6, k, scale)
    target = Target(labels, shares_of(torch.rand(6, generator=torch.Generator().manual_seed(1))))
    got, want = LADE(counts, strength=0.0)(Output(logits), target), BalancedSoftmax(counts)(Output(logits), target)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not torch.isclose(LADE(counts)(Output(logits), target), want, rtol=1e-3)


def test_a_share_of_zero_is_an_item_that_is_not_there() -> None:
    """Also where no other item is of its class."""
    logits, labels, counts = draw(5, 30, 4.0)
    for column in range(2):
        shares = torch.zeros(5, 2)
        shares[:, column] = 1.0
        mixed, hard = Target(labels, shares), Target.hard(labels[:, column])
        got, want = (lader(logits, target, counts.prior.float()) for target in (mixed, hard))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_how_a_label_is_split_and_ordered_does_not_matter() -> None:
    logits, labels, counts = draw(8, 5, 4.0)
    prior, shares = counts.prior.float(), shares_of(torch.rand(8, generator=torch.Generator().manual_seed(1)))
    split = lader(logits, Target(labels[:, :1].expand(8, 2), shares), prior)
    torch.testing.assert_close(split, lader(logits, Target.hard(labels[:, 0]), prior))
    turned = lader(logits, Target(labels.flip(1), shares.flip(1)), prior)
    torch.testing.assert_close(turned, lader(logits, Target(labels, shares), prior))


def test_two_images_of_two_classes_by_hand() -> None:
    """π = (3/4, 1/4), K = 2: B_c = log((e^a + e^b) / 2) − log(2 π_c)."""
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    got = lader(logits, Target.hard(torch.tensor([0, 1])), torch.tensor([0.75, 0.25]), 0.1)
    b = [math.log((math.e + 1) / 2) - math.log(1.5), math.log((1 + math.e**2) / 2) - math.log(0.5)]
    want = -0.75 * (1 - b[0] - 0.1 * b[0] ** 2) - 0.25 * (2 - b[1] - 0.1 * b[1] ** 2)
    assert float(got) == pytest.approx(want, rel=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 5, generator=g, dtype=torch.float64)).requires_grad_()
    shares = shares_of(torch.rand(6, generator=g, dtype=torch.float64))
    target = Target(torch.tensor([[0, 1], [0, 0], [4, 1], [4, 4], [1, 0], [0, 4]]), shares)
    prior = ClassCounts(torch.tensor([50, 20, 9, 4, 1])).prior
    assert torch.autograd.gradcheck(lambda z: lader(z, target, prior, 0.3), logits)


def test_gradients_of_large_logits_are_finite_and_those_of_float64() -> None:
    logits, labels, counts = draw(30, 3, 50.0)
    target, gradients = Target(labels, torch.full((30, 2), 0.5)), []
    for dtype in (torch.float32, torch.float64):
        z = logits.to(dtype, copy=True).requires_grad_()
        lader(z, target, counts.prior.to(dtype)).backward()
        assert z.grad is not None
        gradients.append(z.grad.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda counts: LADE(counts, strength=-0.1),
        lambda counts: LADE(counts, strength=math.inf),
        lambda counts: LADE(counts, regulariser=math.nan),
    ],
)
def test_impossible_settings_are_refused(build: Callable[[ClassCounts], LADE]) -> None:
    with pytest.raises(UserError, match="strength and regulariser"):
        build(ClassCounts(torch.tensor([3, 2])))
