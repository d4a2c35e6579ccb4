"""The criterion's combination of shares, weights and reductions, against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otmix.losses import LOSSES, Criterion, CrossEntropy, DeferredReweighting, effective_number_weights, register_loss
from otmix.types import ClassCounts, Output, Target

COUNTS = ClassCounts(torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]))


def slow_cross_entropy(logits: list[float], label: int) -> float:
    top = max(logits)
    return math.log(sum(math.exp(z - top) for z in logits)) + top - logits[label]


@given(b=st.integers(1, 6), k=st.integers(2, 5), seed=st.integers(0, 999), weighted=st.booleans())
def test_mean_reduction_is_eq_10(b: int, k: int, seed: int, weighted: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(b, k, generator=g) * 5, torch.randint(k, (b, 2), generator=g)
    share = torch.rand(b, generator=g)
    weight = torch.rand(k, generator=g) + 0.1 if weighted else None
    target = Target(labels, torch.stack([share, 1 - share], 1))
    want = 0.0
    for i in range(b):
        for s in range(2):
            y = int(labels[i, s])
            w = 1.0 if weight is None else float(weight[y])
            want += float(target.shares[i, s]) * w * slow_cross_entropy(logits[i].tolist(), y) / b
    got = CrossEntropy(ClassCounts(torch.ones(k, dtype=torch.int64)))(Output(logits), target, weight)
    assert float(got) == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_weighted_mean_is_two_calls_of_cross_entropy_with_weights() -> None:
    """The released code's reduction: each term divided by its own batch's weights."""
    g = torch.Generator().manual_seed(0)
    logits, labels, weight = (
        torch.randn(8, 3, generator=g),
        torch.randint(3, (8, 2), generator=g),
        torch.tensor([0.1, 1.0, 2.5]),
    )
    target = Target(labels, torch.tensor([[0.7, 0.3]]).expand(8, 2))
    criterion = CrossEntropy(ClassCounts(torch.ones(3, dtype=torch.int64)))
    ce = torch.nn.functional.cross_entropy
    want = 0.7 * ce(logits, labels[:, 0], weight=weight) + 0.3 * ce(logits, labels[:, 1], weight=weight)
    torch.testing.assert_close(criterion(Output(logits), target, weight, reduction="weighted-mean"), want)
    assert not torch.isclose(criterion(Output(logits), target, weight, reduction="mean"), want)
    # without weights both are the plain mean
    torch.testing.assert_close(
        criterion(Output(logits), target, None, reduction="weighted-mean"), criterion(Output(logits), target, None)
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_one_or_zero_is_one_images_loss(share: float) -> None:
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(5, 4, generator=g), torch.randint(4, (5, 2), generator=g)
    criterion = CrossEntropy(ClassCounts(torch.ones(4, dtype=torch.int64)))
    mixed = criterion(Output(logits), Target(labels, torch.tensor([[share, 1 - share]]).expand(5, 2)))
    torch.testing.assert_close(mixed, criterion(Output(logits), Target.hard(labels[:, 0 if share else 1])))


def test_a_label_free_part_is_counted_once_and_unweighted() -> None:
    class WithFree(CrossEntropy):
        def label_free(self, output: Output, progress: float) -> torch.Tensor:
            return torch.tensor(7.0)

    counts = ClassCounts(torch.ones(3, dtype=torch.int64))
    logits, labels = torch.zeros(2, 3), torch.tensor([[0, 1], [1, 2]])
    target = Target(labels, torch.full((2, 2), 0.5))
    for weight in (None, torch.tensor([3.0, 3.0, 3.0])):
        with_free, without = (
            WithFree(counts)(Output(logits), target, weight),
            CrossEntropy(counts)(Output(logits), target, weight),
        )
        torch.testing.assert_close(with_free, without + 7.0)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    criterion = CrossEntropy(COUNTS)
    logits = torch.full((2, 10), 50.0).bfloat16()
    loss = criterion.per_label(Output(logits), torch.tensor([0, 1]), 0.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), math.log(10)))


def test_effective_number_weights_have_the_known_values() -> None:
    want = [0.051, 0.077, 0.121, 0.195, 0.319, 0.525, 0.868, 1.443, 2.409, 3.993]
    assert effective_number_weights(COUNTS).tolist() == pytest.approx(want, abs=6e-4)
    assert float(effective_number_weights(COUNTS).sum()) == pytest.approx(10)


def test_drw_switches_on_at_160_of_240_and_stays() -> None:
    drw = DeferredReweighting(COUNTS)
    on = [epoch for epoch in range(240) if drw.class_weight(epoch / 240) is not None]
    assert on == list(range(160, 240))
    under_ldam = DeferredReweighting(COUNTS, start=160 / 200)
    assert [epoch for epoch in range(200) if under_ldam.class_weight(epoch / 200) is not None] == list(range(160, 200))


def test_a_criterion_without_per_label_says_so() -> None:
    with pytest.raises(TypeError, match="must define per_label"):
        Criterion(COUNTS)(Output(torch.zeros(1, 10)), Target.hard(torch.tensor([0])))


def test_registering_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'ce'"):
        register_loss("ce")(CrossEntropy)
    assert LOSSES["ce"] is CrossEntropy
