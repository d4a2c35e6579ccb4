"""The losses that shift logits by log priors are one another; post-hoc logit adjustment shifts at test time."""

import math

import pytest
import torch

from otmix.losses import LADE, BalancedSoftmax, Bayias, CrossEntropy, LogitAdjustment
from otmix.losses.bayias import bayes_bias
from otmix.types import ClassCounts, Output
from slow_losses import draw, log_softmax


@pytest.mark.parametrize(("k", "scale"), [(2, 4.0), (10, 50.0), (8142, 50.0)])
def test_bayias_logit_adjustment_and_lade_ce_are_balanced_softmax(k: int, scale: float) -> None:
    logits, labels, counts = draw(5, k, scale)
    want = BalancedSoftmax(counts).per_label(Output(logits), labels[:, 0], 0.0)
    for criterion in (Bayias(counts), LogitAdjustment(counts, tau=1.0), LADE(counts)):
        got = criterion.per_label(Output(logits), labels[:, 0], 0.0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_the_bias_is_the_training_prior_over_the_tests() -> None:
    bias = bayes_bias(ClassCounts(torch.tensor([6, 3, 1])))
    assert bias.tolist() == pytest.approx([math.log(0.6 * 3), math.log(0.3 * 3), math.log(0.1 * 3)])
    assert Bayias(ClassCounts(torch.full((4,), 7))).bias.abs().max() < 1e-7


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "scale"), [(2, 4.0), (10, 50.0), (8142, 50.0)])
def test_post_hoc_adjustment_is_cross_entropy_in_training_and_shifts_at_test(
    k: int, scale: float, dtype: torch.dtype, tau: float
) -> None:
    logits, labels, counts = draw(3, k, scale)
    output, y = Output(logits.to(dtype)), labels[:, 0]
    criterion = LogitAdjustment(counts, tau=tau, post_hoc=True)
    assert torch.equal(criterion.per_label(output, y, 0.0), CrossEntropy(counts).per_label(output, y, 0.0))
    prior = counts.prior.tolist()
    got = criterion.probabilities(output)
    assert got.dtype == torch.float32
    for row, z in zip(got, output.logits.double().tolist()):
        shifted = [z[c] - tau * math.log(prior[c]) for c in range(k)]
        label = int(row.argmax())
        assert float(row[label]) == pytest.approx(math.exp(log_softmax(shifted, label)), rel=5e-5)
        assert float(row[0]) == pytest.approx(math.exp(log_softmax(shifted, 0)), rel=1e-4, abs=1e-30)
        assert float(row.sum()) == pytest.approx(1, rel=1e-5)


def test_the_two_ways_of_adjusting_swap_training_and_test() -> None:
    logits, labels, counts = draw(5, 6, 4.0)
    output, shift = Output(logits), counts.prior.log().float()
    in_training, post_hoc = LogitAdjustment(counts), LogitAdjustment(counts, post_hoc=True)
    torch.testing.assert_close(in_training.probabilities(output), logits.softmax(1), rtol=0, atol=0)
    # a model of the adjusted loss predicts with z, so its z + log π, put through the post-hoc rule, predicts the same
    torch.testing.assert_close(post_hoc.probabilities(Output(logits + shift)), in_training.probabilities(output))
    torch.testing.assert_close(
        post_hoc.per_label(Output(logits + shift), labels[:, 0], 0.0), in_training.per_label(output, labels[:, 0], 0.0)
    )
