from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from otmix.evaluation import (
    Evaluation,
    evaluate_predictions,
    expected_calibration_error,
    predict_probabilities,
    top1_error,
)
from otmix.models import build_model
from otmix.types import Batch, ClassCounts, Items, Output


def slow_calibration_error(confidence: list[float], correct: list[bool], bins: int) -> float:
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).tolist()
    error = 0.0
    for low, high in pairwise(edges):
        inside = [
            i
            for i, value in enumerate(confidence)
            if low < value <= high or (low == 0 and value == 0) or value > high == 1
        ]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(accuracy - mean)
    return error


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.2, 1 / 3, 0.4, 0.6, 0.8, 1.0]) | st.floats(0, 1), st.booleans()), min_size=1
    ),
    st.integers(1, 20),
)
def test_calibration_error_is_that_of_a_loop_over_bins(pairs: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = [c for c, _ in pairs], [r for _, r in pairs]
    got = expected_calibration_error(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct), bins)
    assert got == pytest.approx(slow_calibration_error(confidence, correct, bins), abs=1e-12)


def test_calibration_error_of_known_cases() -> None:
    always = torch.full((10,), 0.8)
    assert expected_calibration_error(always, torch.arange(10) < 8) == pytest.approx(0, abs=1e-7)
    assert expected_calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 1
    # Two bins that err in opposite directions do not cancel.
    mixed = torch.tensor([0.9, 0.9, 0.6, 0.6])
    assert expected_calibration_error(mixed, torch.tensor([False, True, True, True])) == pytest.approx(0.4, abs=1e-6)


def case(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor, ClassCounts]:
    draw = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(3 * torch.randn(n, classes, generator=draw), dim=1)
    labels = torch.randint(0, max(1, classes - 1), (n,), generator=draw)  # the last class is never seen
    return probabilities, labels, ClassCounts(torch.randint(1, 200, (classes,), generator=draw))


@given(st.integers(1, 60), st.integers(2, 7), st.integers(0, 1000))
def test_every_number_is_that_of_a_loop_over_images(n: int, classes: int, seed: int) -> None:
    probabilities, labels, counts = case(n, classes, seed)
    result = evaluate_predictions(probabilities, labels, counts, many=100, few=20)
    rows = probabilities.tolist()
    predicted = [row.index(max(row)) for row in rows]
    truth = labels.tolist()
    assert result.n == n
    assert result.num_classes == classes
    assert result.top1_error == pytest.approx(sum(p != t for p, t in zip(predicted, truth, strict=True)) / n)
    accuracies = []
    for k in range(classes):
        mine = [i for i in range(n) if truth[i] == k]
        expected = sum(predicted[i] == k for i in mine) / len(mine) if mine else None
        assert result.per_class_accuracy[k] == (None if expected is None else pytest.approx(expected))
        accuracies += [expected] if expected is not None else []
        for j in range(classes):
            assert result.confusion[k, j] == sum(predicted[i] == j for i in mine)
    assert result.per_class_accuracy[-1] is None
    assert result.balanced_accuracy == pytest.approx(sum(accuracies) / len(accuracies))
    sizes = counts.counts.tolist()
    groups = {"many": lambda s: s > 100, "medium": lambda s: 20 <= s <= 100, "few": lambda s: s < 20}
    for name, belongs in groups.items():
        mine = [i for i in range(n) if belongs(sizes[truth[i]])]
        expected = sum(predicted[i] != truth[i] for i in mine) / len(mine) if mine else None
        assert result.group_error[name] == (None if expected is None else pytest.approx(expected))
    nll = -sum(math.log(row[t]) for row, t in zip(rows, truth, strict=True)) / n
    assert result.negative_log_likelihood == pytest.approx(nll)
    assert result.calibration_error == pytest.approx(
        slow_calibration_error([max(row) for row in rows], [p == t for p, t in zip(predicted, truth, strict=True)], 15)
    )


def test_a_dictionary_and_back_through_json() -> None:
    probabilities, labels, counts = case(50, 6, 0)
    result = evaluate_predictions(probabilities, labels, counts)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    back = Evaluation.from_dict(values)
    assert back.to_dict() == result.to_dict() == values
    assert torch.equal(back.confusion, result.confusion)
    assert back.confusion.dtype == torch.int64
    assert back.per_class_accuracy == result.per_class_accuracy
    assert len(values["confusion"]) == int((result.confusion > 0).sum())


def test_groups_need_training_sizes_and_follow_the_limits() -> None:
    probabilities, labels = torch.eye(3), torch.tensor([0, 1, 1])
    assert evaluate_predictions(probabilities, labels, None).group_error == dict.fromkeys(("many", "medium", "few"))
    counts = ClassCounts(torch.tensor([101, 20, 20]))
    assert evaluate_predictions(probabilities, labels, counts).group_error == {"many": 0.0, "medium": 0.5, "few": None}
    official = evaluate_predictions(probabilities, labels, counts, few=21)
    assert official.group_error == {"many": 0.0, "medium": None, "few": 0.5}
    unseen = evaluate_predictions(probabilities[:1], labels[:1], counts)  # a group with classes but no images
    assert unseen.group_error == {"many": 0.0, "medium": None, "few": None}


def test_group_error_counts_images_not_classes() -> None:
    labels = torch.tensor([0] * 9 + [1])
    probabilities = torch.tensor([[0.9, 0.1]]).expand(10, 2)
    result = evaluate_predictions(probabilities, labels, ClassCounts(torch.tensor([500, 400])))
    assert result.group_error["many"] == pytest.approx(0.1)
    assert result.balanced_accuracy == pytest.approx(0.5)


def test_certainty_gone_wrong_stays_finite() -> None:
    result = evaluate_predictions(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), None)
    assert math.isfinite(result.negative_log_likelihood)
    assert result.negative_log_likelihood > 80
    assert result.top1_error == result.calibration_error == 1


@pytest.mark.parametrize(
    ("probabilities", "labels", "counts", "message"),
    [
        (torch.rand(3), torch.zeros(3), None, r"must be \[n,K\]"),
        (torch.rand(3, 2), torch.zeros(2), None, r"must be \[n,K\]"),
        (torch.rand(0, 2), torch.zeros(0), None, "no images"),
        (torch.rand(2, 2), torch.tensor([0, 2]), None, "label 2 is out of range; labels must be 0 … 1"),
        (torch.rand(2, 2), torch.tensor([0, -1]), None, "label -1"),
        (torch.tensor([[float("nan"), 1.0]]), torch.tensor([0]), None, "NaN"),
        (torch.tensor([[-3.0, 2.0]]), torch.tensor([0]), None, "not logits"),
        (
            torch.rand(2, 2),
            torch.tensor([0, 1]),
            ClassCounts(torch.ones(3, dtype=torch.int64)),
            "3 classes, the probabilities 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    probabilities: Tensor, labels: Tensor, counts: ClassCounts | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(probabilities, labels, counts)


def test_rounding_above_one_is_accepted() -> None:
    result = evaluate_predictions(torch.tensor([[1.0 + 1e-6, 0.0]]), torch.tensor([0]), None)
    assert result.top1_error == 0


def test_predicting_covers_all_batches_in_order_and_leaves_the_model_alone() -> None:
    model = build_model("resnet8", 3, image_size=8, channels=1, mean=(0.5,), std=(0.2,))
    images, items = torch.rand(7, 1, 8, 8), Items(torch.arange(7) % 3, torch.arange(7) + 100)
    whole = Batch(items, images)
    model.backbone.bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    probabilities, labels, index = predict_probabilities(model, (whole[part] for part in (slice(0, 4), slice(4, 7))))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    torch.testing.assert_close(probabilities, model.eval()(images).logits.detach().softmax(1))
    assert probabilities.dtype == torch.float32
    assert torch.equal(labels, items.labels)
    assert index is not None
    assert torch.equal(index, torch.arange(7) + 100)


def test_predicting_follows_the_method_and_the_precision() -> None:
    model = build_model("resnet8", 3, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    batch = Batch(Items(torch.zeros(2, dtype=torch.int64)), torch.rand(2, 3, 8, 8))

    def sigmoid(output: Output) -> Tensor:
        assert output.logits.dtype == torch.float32
        return output.logits.sigmoid()

    exact, _, index = predict_probabilities(model, [batch], probabilities=sigmoid)
    low, _, _ = predict_probabilities(
        model, [batch], probabilities=sigmoid, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    assert index is None
    torch.testing.assert_close(exact, model.eval()(batch.images).logits.detach().sigmoid())
    assert low.dtype == torch.float32
    assert not torch.equal(low, exact)
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0.05)


def test_predicting_nothing_is_an_error_and_restores_the_model() -> None:
    model = build_model("resnet8", 3, image_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    with pytest.raises(ValueError, match="no images"):
        predict_probabilities(model, [])
    assert all(module.training for module in model.modules())


def test_arrays_and_lists_are_taken_as_tensors_but_no_fractions_as_labels() -> None:
    said, labels = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]]), torch.tensor([0, 1, 1])
    want = evaluate_predictions(said, labels, None).to_dict()
    assert evaluate_predictions(said.numpy(), labels.numpy(), None).to_dict() == want  # type: ignore[arg-type]
    assert evaluate_predictions(said.tolist(), labels.tolist(), None).to_dict() == want  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class numbers, integers, not"):
        evaluate_predictions(said, labels + 0.5, None)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=5, max_size=5), min_size=1, max_size=20),
    st.integers(0, 99),
)
def test_the_error_alone_is_that_of_the_whole_evaluation(rows: list[list[float]], seed: int) -> None:
    """Ties too are decided alike."""
    labels = torch.randint(5, (len(rows),), generator=torch.Generator().manual_seed(seed))
    assert top1_error(torch.tensor(rows), labels) == evaluate_predictions(torch.tensor(rows), labels, None).top1_error


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1, math.inf])
def test_the_error_alone_wants_probabilities_too(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"probabilities must be within \[0, 1\]"):
        top1_error(torch.tensor([[0.5, wrong]]), torch.tensor([0]))
