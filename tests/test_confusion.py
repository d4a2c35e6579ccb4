"""F against plain loops: soft and hard, dense and sparse, fading, over processes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otmix import counting
from otmix.confusion import SOFT_TOP, ConfusionCounter, perturb
from otmix.counting import CountTable, normalise_rows
from otmix.errors import UserError
from otmix.types import Confusion, ConfusionOrigin


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


@pytest.mark.parametrize("reads", [(3,), (0, 1, 2, 3, 4, 5, 6), (5, 6)])
def test_reading_a_sparse_table_meanwhile_changes_no_bit_of_it(reads: tuple[int, ...]) -> None:
    """A checkpoint reads it whenever the clock says so. 2,000 soft counts in each step fall into few cells, whose sum
    depends on its order.
    """
    once, often = CountTable(2000), CountTable(2000)
    exact = torch.zeros(2000, 2000, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for step in range(8):
        rows, columns = torch.randint(1997, 2000, (2, 2000), generator=g)
        values = torch.rand(2000, generator=g)
        exact.index_put_((rows, columns), values.double(), accumulate=True)
        for table in (once, often):
            table.add(rows, columns, values)
        if step in reads:
            resumed = CountTable(2000)
            resumed.value = often.value
            often = resumed
    assert once.value.is_coalesced()
    assert torch.equal(once.value.indices(), often.value.indices())
    assert torch.equal(once.value.values(), often.value.values())
    torch.testing.assert_close(once.value.to_dense(), exact.float())


def test_a_sparse_table_sums_in_the_order_of_a_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = CountTable(5)
    monkeypatch.setattr(counting, "SPARSE_ABOVE", 4)
    sparse = CountTable(5)
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        rows, columns = torch.randint(3, (2, 500), generator=g)
        values = torch.rand(500, generator=g)
        for table in (dense, sparse):
            table.add(rows, columns, values)
    assert torch.equal(sparse.value.to_dense(), dense.value)


def test_rows_are_normalised_without_nan() -> None:
    counts = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    assert normalise_rows(counts).tolist() == [[0.5, 0.5], [0, 0]]
    assert normalise_rows(counts.to_sparse()).to_dense().tolist() == [[0.5, 0.5], [0, 0]]


# F made wrong on purpose


def some_confusion(k: int, seed: int = 0) -> Confusion:
    matrix = torch.rand(k, k, generator=torch.Generator().manual_seed(seed))
    return Confusion(matrix / matrix.sum(1, keepdim=True), ConfusionOrigin())


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(k=st.integers(2, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_shuffling_moves_whole_rows_of_a_share_of_the_classes(k: int, share: float, seed: int) -> None:
    true = some_confusion(k)
    wrong = perturb(true, share, 0.0, drawn(seed))
    moved = [i for i in range(k) if not torch.equal(wrong.matrix[i], true.matrix[i])]
    assert len(moved) == (max(2, round(share * k)) if share > 0 else 0)
    assert sorted(map(tuple, wrong.matrix.tolist())) == sorted(map(tuple, true.matrix.tolist()))
    assert torch.equal(wrong.matrix, perturb(true, share, 0.0, drawn(seed)).matrix)
    assert wrong.origin.perturbed == (share > 0)


@given(k=st.integers(2, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_noise_replaces_a_share_of_each_row(k: int, share: float, seed: int) -> None:
    true = some_confusion(k)
    true.matrix[0] = 0  # a class that was never seen stays without a row
    wrong = perturb(true, 0.0, share, drawn(seed))
    torch.testing.assert_close(wrong.matrix.sum(1), true.matrix.sum(1))
    assert bool((wrong.matrix >= (1 - share) * true.matrix - 1e-6).all())
    assert bool((wrong.matrix[0] == 0).all())
    if share == 1:
        assert not torch.allclose(wrong.matrix, true.matrix)


@given(k=st.integers(2, 12), share=st.floats(0.05, 1), shuffle=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99))
def test_the_share_of_noise_is_the_share_that_is_named(k: int, share: float, shuffle: float, seed: int) -> None:
    """What stands beside 1 - share of F is one random matrix, whatever F and the share are."""
    noise = perturb(some_confusion(k, 1), 0.0, 1.0, drawn(seed)).matrix
    torch.testing.assert_close(noise.sum(1), torch.ones(k))
    assert bool((noise >= 0).all())
    true = some_confusion(k)
    true.matrix[0] = 0  # a class that was never seen: of it nothing is noise
    kept = perturb(true, shuffle, 0.0, drawn(seed)).matrix
    wrong = perturb(true, shuffle, share, drawn(seed)).matrix
    rest = (wrong - (1 - share) * kept) / share
    torch.testing.assert_close(rest, noise * kept.sum(1, keepdim=True), atol=2e-5, rtol=1e-4)


@given(k=st.integers(2, 12), shuffle=st.sampled_from([0.0, 0.5, 1.0]), noise=st.sampled_from([0.0, 0.3]))
def test_a_sparse_matrix_is_made_wrong_as_a_dense_one(k: int, shuffle: float, noise: float) -> None:
    true = some_confusion(k)
    true.matrix[true.matrix < 0.1] = 0
    sparse = Confusion(true.matrix.to_sparse(), ConfusionOrigin())
    got = perturb(sparse, shuffle, noise, drawn(3))
    assert torch.equal(got.matrix.to_dense(), perturb(true, shuffle, noise, drawn(3)).matrix)
    assert got.matrix.is_sparse == (noise == 0)
    assert noise > 0 or got.matrix.is_coalesced(), "else each step would coalesce it again"
    rows, columns = torch.arange(k), torch.arange(k).flip(0)
    assert torch.equal(got.lookup(rows, columns), perturb(true, shuffle, noise, drawn(3)).lookup(rows, columns))


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_an_image_of_which_the_model_says_no_number_is_not_counted(
    soft: bool, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last it says something: one class for certain."""
    if sparse:
        monkeypatch.setattr(counting, "SPARSE_ABOVE", 4)
    labels, logp = said(40, SOFT_TOP, 0)
    logits = torch.zeros(4, SOFT_TOP)
    logits[0, 3], logits[1, 3], logits[2], logits[3, 1:] = math.nan, math.inf, -math.inf, -math.inf
    found, want = (ConfusionCounter(SOFT_TOP, ConfusionOrigin(soft=soft)) for _ in range(2))
    for counter in (found, want):
        counter.add(labels, logp)
    found.add(torch.tensor([0, 1, 2, 3]), logits.log_softmax(1))
    want.add(torch.tensor([3]), torch.eye(SOFT_TOP)[:1].log())
    torch.testing.assert_close(found.table.value.to_dense(), want.table.value.to_dense())


@pytest.mark.parametrize("sparse", [True, False])
def test_where_no_image_counts_there_is_no_estimate(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if sparse:
        monkeypatch.setattr(counting, "SPARSE_ABOVE", 4)
    counter = ConfusionCounter(SOFT_TOP, ConfusionOrigin())
    counter.add(torch.tensor([0]), torch.full((1, SOFT_TOP), float("nan")))
    assert counter.estimate() is None


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("shape", [(4, 8), (4, 2), (3, 3), (4,)])
def test_other_than_one_logit_a_class_is_refused(soft: bool, shape: tuple[int, ...]) -> None:
    counter = ConfusionCounter(3, ConfusionOrigin(soft=soft))
    with pytest.raises(UserError, match=r"of 4 images .* 3 classes; .* \(features, logits\) in that order"):
        counter.add(torch.tensor([0, 1, 2, 0]), torch.zeros(shape))
