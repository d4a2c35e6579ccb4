"""F against plain loops: soft and hard, dense and sparse, fading, over processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otmix import counting
from otmix.confusion import SOFT_TOP, ConfusionCounter
from otmix.counting import CountTable, normalise_rows
from otmix.types import ConfusionOrigin


def said(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(k, (n,), generator=g), torch.randn(n, k, generator=g).log_softmax(1)


@pytest.mark.parametrize("soft", [True, False])
@given(n=st.integers(1, 40), k=st.integers(2, 7), seed=st.integers(0, 99))
def test_matches_a_plain_loop(soft: bool, n: int, k: int, seed: int) -> None:
    labels, logp = said(n, k, seed)
    counter = ConfusionCounter(k, ConfusionOrigin(soft=soft))
    counter.add(labels[: n // 2], logp[: n // 2])
    counter.add(labels[n // 2 :], logp[n // 2 :])
    want = [[0.0] * k for _ in range(k)]
    for label, row in zip(labels.tolist(), logp):
        for column in range(k):
            want[label][column] += float(row[column].exp()) if soft else float(column == int(row.argmax()))
    for row in want:
        total = sum(row)
        row[:] = [value / total if total else 0.0 for value in row]
    estimate = counter.estimate()
    assert estimate is not None
    torch.testing.assert_close(estimate.matrix, torch.tensor(want), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("soft", [True, False])
def test_sparse_equals_dense(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, logp = said(60, SOFT_TOP, 0)  # every probability is among the largest SOFT_TOP
    dense = ConfusionCounter(SOFT_TOP, ConfusionOrigin(soft=soft), decay=0.5)
    monkeypatch.setattr(counting, "SPARSE_ABOVE", 4)
    sparse = ConfusionCounter(SOFT_TOP, ConfusionOrigin(soft=soft), decay=0.5)
    assert sparse.table.sparse
    for _ in range(2):
        for counter in (dense, sparse):
            counter.add(labels, logp)
        a, b = dense.estimate(), sparse.estimate()
        assert a is not None
        assert b is not None
        assert b.matrix.is_sparse
        torch.testing.assert_close(b.matrix.to_dense(), a.matrix)
        torch.testing.assert_close(b.lookup(labels, labels.flip(0)), a.lookup(labels, labels.flip(0)))


def test_a_class_without_images_has_a_row_of_zeros_and_nothing_is_none() -> None:
    counter = ConfusionCounter(3, ConfusionOrigin(soft=False))
    assert counter.estimate() is None
    counter.add(torch.tensor([1]), torch.tensor([[0.0, 0.0, 5.0]]).log_softmax(1))
    estimate = counter.estimate()
    assert estimate is not None
    assert estimate.matrix.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_counts_fade() -> None:
    counter = ConfusionCounter(2, ConfusionOrigin(soft=False), decay=0.25)
    zero, one = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    counter.add(torch.tensor([0]), zero)
    counter.estimate()
    counter.add(torch.tensor([0]), one)
    estimate = counter.estimate()
    assert estimate is not None
    torch.testing.assert_close(estimate.matrix[0], torch.tensor([0.25, 1.0]) / 1.25)


def test_processes_are_added_up() -> None:
    labels, logp = said(20, 3, 0)
    whole = ConfusionCounter(3, ConfusionOrigin())
    whole.add(labels, logp)
    mine, theirs = (ConfusionCounter(3, ConfusionOrigin()) for _ in range(2))
    mine.add(labels[::2], logp[::2])
    theirs.add(labels[1::2], logp[1::2])
    together, alone = mine.estimate(lambda t: t + theirs.table.value), whole.estimate()
    assert together is not None
    assert alone is not None
    torch.testing.assert_close(together.matrix, alone.matrix)


def test_count_table_round_trips_and_refuses_another_size() -> None:
    table = CountTable(3)
    table.add(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 0]))
    other = CountTable(3)
    other.value = table.value
    assert other.value.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="3 classes"):
        CountTable(3).value = torch.zeros(2, 2)


def test_rows_are_normalised_without_nan() -> None:
    counts = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    assert normalise_rows(counts).tolist() == [[0.5, 0.5], [0, 0]]
    assert normalise_rows(counts.to_sparse()).to_dense().tolist() == [[0.5, 0.5], [0, 0]]
