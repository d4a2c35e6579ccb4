"""Backgrounds by eq. 2, foregrounds by eq. 3: the law of what is drawn, each process's part of it, drawing it again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.utils.data import DataLoader, TensorDataset

from otmix.errors import UserError
from otmix.randomness import Moment
from otmix.sampling import (
    BackgroundStream,
    ClassSampling,
    ForegroundSampler,
    ForegroundStream,
    _uniform_below,
    effective_number,
    inverse_frequency,
)
from otmix.types import ClassCounts, Items

C10_100 = ClassCounts(torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]))
counts_of_classes = st.lists(st.integers(1, 10**7), min_size=1, max_size=30).map(lambda n: ClassCounts(torch.tensor(n)))


def shuffled_labels(counts: ClassCounts, seed: int = 0) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(counts.num_classes), counts.counts)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def index_of(items: Items) -> torch.Tensor:
    assert items.index is not None
    return items.index


# ---- class probabilities


def test_inverse_frequency_of_cifar10_lt() -> None:
    expected = [0.0040, 0.0067, 0.0112, 0.0187, 0.0312, 0.0520, 0.0867, 0.1447, 0.2424, 0.4024]
    q = inverse_frequency(C10_100)
    assert q.dtype == torch.float64
    assert [round(x, 4) for x in q.tolist()] == expected


def test_effective_number_weights_of_cifar10_lt() -> None:
    expected = [0.051, 0.077, 0.121, 0.195, 0.319, 0.525, 0.868, 1.443, 2.409, 3.993]
    assert [round(x, 3) for x in (10 * effective_number(C10_100)).tolist()] == expected


@given(counts_of_classes, st.floats(-3, 3))
@settings(deadline=None)
def test_inverse_frequency_is_equation_3(counts: ClassCounts, r: float) -> None:
    n = counts.counts.tolist()
    expected = [k**-r / math.fsum(x**-r for x in n) for k in n]
    torch.testing.assert_close(inverse_frequency(counts, r), torch.tensor(expected, dtype=torch.float64))


@given(counts_of_classes)
@settings(deadline=None)
def test_exponents_with_a_name(counts: ClassCounts) -> None:
    torch.testing.assert_close(inverse_frequency(counts, -1.0), counts.prior)
    torch.testing.assert_close(inverse_frequency(counts, 0.0), torch.full_like(counts.prior, 1 / counts.num_classes))


def test_extreme_exponent_does_not_overflow() -> None:
    q = inverse_frequency(ClassCounts(torch.tensor([10**9, 1, 10**9])), 100.0)
    assert q.tolist() == [0.0, 1.0, 0.0]


@given(counts_of_classes, st.floats(0, 0.999))
@settings(deadline=None)
def test_effective_number_is_the_formula(counts: ClassCounts, beta: float) -> None:
    weights = [(1 - beta) / (1 - beta**n) for n in counts.counts.tolist()]
    expected = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights)
    torch.testing.assert_close(effective_number(counts, beta), expected)


@pytest.mark.parametrize("beta", [1 - 1e-12, 1 - 2**-53])
def test_effective_number_tends_to_inverse_frequency(beta: float) -> None:
    counts = ClassCounts(torch.tensor([1, 7, 1000]))
    torch.testing.assert_close(effective_number(counts, beta), inverse_frequency(counts), rtol=1e-8, atol=0)


def test_effective_number_of_huge_classes_is_uniform() -> None:
    q = effective_number(ClassCounts(torch.tensor([10**12, 10**15, 10**18])))
    torch.testing.assert_close(q, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("beta", [1.0, -0.1, 1.5, math.nan])
def test_effective_number_refuses(beta: float) -> None:
    with pytest.raises(UserError, match="beta"):
        effective_number(C10_100, beta)


@pytest.mark.parametrize("r", [math.inf, math.nan])
def test_inverse_frequency_refuses(r: float) -> None:
    with pytest.raises(UserError, match="exponent"):
        inverse_frequency(C10_100, r)


# ---- foregrounds


@pytest.mark.parametrize("q", [inverse_frequency(C10_100), inverse_frequency(C10_100, 0.0), effective_number(C10_100)])
def test_class_law_of_foregrounds(q: torch.Tensor) -> None:
    labels = shuffled_labels(C10_100)
    n = 200_000
    items = ForegroundStream(labels, q).draw(n, torch.Generator().manual_seed(1))
    assert torch.equal(items.labels, labels[index_of(items)])
    assert chisquare(torch.bincount(items.labels, minlength=10).numpy(), (n * q).numpy()).pvalue > 1e-3


def test_images_are_uniform_within_their_class() -> None:
    counts = ClassCounts(torch.tensor([300, 40, 5, 1]))
    labels = shuffled_labels(counts)
    n = 200_000
    items = ForegroundStream(labels, inverse_frequency(counts, 0.0)).draw(n, torch.Generator().manual_seed(2))
    drawn = torch.bincount(index_of(items), minlength=len(labels))
    for k in range(3):
        assert chisquare(drawn[labels == k].numpy()).pvalue > 1e-3
    assert drawn.min() > 0


def test_class_and_place_are_independent() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    items = ForegroundStream(labels, torch.tensor([0.5, 0.5])).draw(40_000, torch.Generator().manual_seed(3))
    assert chisquare(torch.bincount(index_of(items), minlength=4).numpy()).pvalue > 1e-3
    pairs = 4 * index_of(items)[:-1] + index_of(items)[1:]  # successive draws
    assert chisquare(torch.bincount(pairs, minlength=16).numpy()).pvalue > 1e-3


@given(st.integers(0, 2**32), st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_draws_have_an_image_and_a_probability(seed: int, raw: list[int], n: int) -> None:
    labels = torch.tensor(raw)
    present = torch.bincount(labels, minlength=6) > 0
    items = ForegroundStream(labels, present.double()).draw(n, torch.Generator().manual_seed(seed))
    assert len(items) == n
    assert torch.equal(labels[index_of(items)], items.labels)
    assert bool(present[items.labels].all())


def test_class_of_probability_zero_is_never_drawn() -> None:
    # the zeros stand first, between and last, where a search that is off by one would find them
    stream = ForegroundStream(torch.arange(5), torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0]))
    assert set(stream.draw(10_000, torch.Generator().manual_seed(0)).labels.tolist()) == {1, 3}


@given(st.integers(1, 2**52))
@settings(deadline=None)
def test_last_uniform_stays_below_n(n: int) -> None:
    edge = torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert _uniform_below(edge, torch.tensor(n)).tolist()[0] == 0
    assert int(_uniform_below(edge, torch.tensor(n)).max()) == n - 1


@pytest.mark.parametrize(
    ("labels", "q", "message"),
    [
        ([0, 1], [0.5, 0.3, 0.2], r"classes \[2\] have no image"),
        ([0, 2], [0.5, 0.5], "0 to 2"),
        ([0, -1], [0.5, 0.5], "-1 to 0"),
        ([0, 1], [0.5, -0.5], "none negative"),
        ([0, 1], [0.0, 0.0], "not all zero"),
        ([0, 1], [math.nan, 1.0], "finite"),
        ([0, 1], [[1.0], [1.0]], "vector"),
        ([], [1.0], "N >= 1"),
    ],
)
def test_foreground_stream_refuses(labels: list[int], q: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ForegroundStream(labels, torch.tensor(q))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_processes_share_one_draw_of_foregrounds(n: int, world: int, step: int) -> None:
    labels = shuffled_labels(ClassCounts(torch.tensor([50, 20, 3])))
    q = torch.ones(3)
    moment = Moment(seed=5, epoch=2, epochs=4, step=step)
    whole = ForegroundStream(labels, q).step(n * world, moment)
    stream = ForegroundStream(labels, q, world)
    for rank in range(world):
        share = stream.step(n, replace(moment, rank=rank))
        assert torch.equal(index_of(share), index_of(whole)[rank::world])
        assert torch.equal(share.labels, whole.labels[rank::world])


def test_foregrounds_depend_on_their_moment() -> None:
    stream = ForegroundStream(shuffled_labels(C10_100), inverse_frequency(C10_100))
    moment = Moment(seed=1, stage=1, epoch=1, epochs=3, step=1)
    first = index_of(stream.step(64, moment))
    assert torch.equal(first, index_of(stream.step(64, replace(moment))))
    for other in ({"seed": 2}, {"stage": 2}, {"epoch": 2}, {"step": 2}):
        assert not torch.equal(first, index_of(stream.step(64, replace(moment, **other))))


# ---- backgrounds


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_an_epoch_covers_all_images(n: int, batch_size: int, world: int, epoch: int) -> None:
    labels = torch.arange(n) % 7
    stream = BackgroundStream(labels, batch_size, world)
    moment = Moment(seed=3, epoch=epoch, epochs=4)
    one_process = BackgroundStream(labels, batch_size).epoch(moment)
    ranks = [stream.epoch(replace(moment, rank=rank)) for rank in range(world)]
    assert stream.steps_per_epoch == math.ceil(n / batch_size) == len(one_process)
    assert sorted(torch.cat([index_of(items) for items in one_process]).tolist()) == list(range(n))
    for step, whole in enumerate(one_process):
        assert len(whole) == min(batch_size, n - step * batch_size)
        shares = [index_of(rank[step]) for rank in ranks]
        assert {len(share) for share in shares} == {math.ceil(len(whole) / world)}
        dealt = torch.stack(shares, dim=1).flatten()  # the global batch again, with its padding
        padding = dealt[len(whole) :]
        assert torch.equal(dealt[: len(whole)], index_of(whole))
        assert len(padding) < world
        assert padding.tolist() == [int(index_of(whole)[i % len(whole)]) for i in range(len(padding))]
        assert all(torch.equal(rank[step].labels, labels[index_of(rank[step])]) for rank in ranks)


def test_backgrounds_are_permuted_anew_each_epoch_and_replayable() -> None:
    stream = BackgroundStream(torch.zeros(100, dtype=torch.int64), 32)

    def order(moment: Moment) -> list[int]:
        return torch.cat([index_of(items) for items in stream.epoch(moment)]).tolist()

    moment = Moment(seed=1, stage=1, epoch=1, epochs=5)
    assert order(moment) == order(replace(moment, step=7))
    assert order(moment) != list(range(100))
    for other in ({"seed": 2}, {"stage": 2}, {"epoch": 2}):
        assert order(moment) != order(replace(moment, **other))


def test_every_image_is_equally_often_first() -> None:
    stream = BackgroundStream(torch.zeros(6, dtype=torch.int64), 1)
    first = [int(index_of(stream.epoch(Moment(epoch=epoch, epochs=3000))[0])) for epoch in range(3000)]
    assert chisquare(torch.bincount(torch.tensor(first), minlength=6).numpy()).pvalue > 1e-3


def test_streams_refuse_impossible_places() -> None:
    with pytest.raises(UserError, match="batch size"):
        BackgroundStream([0, 1], 0)
    with pytest.raises(UserError, match="rank 2"):
        BackgroundStream([0, 1], 1, world=2).epoch(Moment(rank=2))
    with pytest.raises(UserError, match="rank 2"):
        ForegroundStream([0, 1], torch.ones(2), world=2).step(1, Moment(rank=2))
    with pytest.raises(UserError, match="processes"):
        ForegroundStream([0, 1], torch.ones(2), world=0)
    with pytest.raises(UserError, match="N >= 1"):
        BackgroundStream(torch.zeros(0), 1)


# ---- the sampler for someone's own DataLoader


def test_sampler_is_replayable_by_seed_and_epoch() -> None:
    labels = shuffled_labels(C10_100).tolist()
    sampler = ForegroundSampler(labels, 500, seed=3)
    sampler.set_epoch(1)
    first, again = list(sampler), list(sampler)
    assert first == again
    sampler.set_epoch(2)
    assert list(sampler) != first
    late = ForegroundSampler(labels, 500, seed=3)
    late.set_epoch(1)
    assert list(late) == first
    assert list(ForegroundSampler(labels, 500, seed=4)) != list(ForegroundSampler(labels, 500, seed=3))


def test_sampler_follows_the_class_law() -> None:
    labels = shuffled_labels(C10_100)
    for r in (1.0, 0.0):
        drawn = torch.bincount(labels[list(ForegroundSampler(labels, 50_000, r=r))], minlength=10)
        assert chisquare(drawn.numpy(), (50_000 * inverse_frequency(C10_100, r)).numpy()).pvalue > 1e-3


@given(st.integers(1, 50), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_sampler_shares_one_stream_among_processes(n: int, world: int) -> None:
    labels = [0, 0, 0, 1, 1, 2]
    shares = [list(ForegroundSampler(labels, n, rank=rank, world=world)) for rank in range(world)]
    assert {len(share) for share in shares} == {math.ceil(n / world)}
    assert all(len(ForegroundSampler(labels, n, rank=rank, world=world)) == len(shares[0]) for rank in range(world))
    dealt = [index for together in zip(*shares) for index in together]
    assert dealt == list(ForegroundSampler(labels, math.ceil(n / world) * world))


def test_sampler_defaults_to_the_inverse_frequency() -> None:
    labels = shuffled_labels(C10_100).tolist()
    inverse, uniform = (list(ForegroundSampler(labels, 100, r=r)) for r in (1.0, 0.0))
    assert list(ForegroundSampler(labels, 100)) == inverse != uniform


def test_sampler_defaults_to_one_draw_per_image_and_refuses_nonsense() -> None:
    assert len(ForegroundSampler([0, 1, 1])) == len(list(ForegroundSampler([0, 1, 1]))) == 3
    with pytest.raises(UserError, match="foregrounds"):
        ForegroundSampler([0, 1], 0)
    with pytest.raises(UserError, match="rank 1"):
        ForegroundSampler([0, 1], rank=1)
    with pytest.raises(ValueError, match=r"classes \[1\]"):
        ForegroundSampler([0, 2])


def test_sampler_draws_the_same_under_several_workers() -> None:
    labels = shuffled_labels(ClassCounts(torch.tensor([30, 5])))
    data = TensorDataset(torch.arange(len(labels)), labels)

    def epoch(workers: int) -> torch.Tensor:
        loader = DataLoader(data, batch_size=8, sampler=ForegroundSampler(labels, 40, seed=1), num_workers=workers)
        return torch.cat([index for index, _ in loader])

    assert torch.equal(epoch(0), epoch(2))


# Re-sampling


def test_laws_of_the_background_stream() -> None:
    natural = C10_100.counts.double() / C10_100.total
    assert ClassSampling(C10_100, power=1.0).class_probability(0.5) is None
    balanced = ClassSampling(C10_100).class_probability(0.0)
    assert balanced is not None
    torch.testing.assert_close(balanced, torch.full((10,), 0.1).double())
    square_root = ClassSampling(C10_100, power=0.5).class_probability(0.0)
    assert square_root is not None
    torch.testing.assert_close(square_root, natural.sqrt() / natural.sqrt().sum())
    deferred = ClassSampling(C10_100, start=160 / 240)
    assert [deferred.class_probability(epoch / 240) is None for epoch in (0, 159, 160, 239)] == [
        True,
        True,
        False,
        False,
    ]
    for bad in ({"start": 1.5}, {"start": -0.1}, {"power": math.inf}):
        with pytest.raises(UserError, match=next(iter(bad))):
            ClassSampling(C10_100, **bad)


def test_deferred_resampling_switches_the_stream() -> None:
    """Before the start an epoch is a permutation; from it on, all classes come equally often, no two epochs alike."""
    counts = ClassCounts(torch.tensor([600, 120, 24]))
    labels = shuffled_labels(counts)
    stream = BackgroundStream(labels, 64, law=ClassSampling(counts, start=0.5).class_probability)
    before = Items.concatenate(stream.epoch(Moment(epoch=4, epochs=10)))
    assert index_of(before).sort().values.tolist() == list(range(744))
    seen = torch.zeros(3)
    for epoch in range(5, 10):
        batches = stream.epoch(Moment(epoch=epoch, epochs=10))
        assert [len(batch) for batch in batches] == [64] * 11 + [40]
        items = Items.concatenate(batches)
        assert torch.equal(labels[index_of(items)], items.labels)
        seen += torch.bincount(items.labels, minlength=3)
    assert chisquare(seen.numpy()).pvalue > 1e-3
    again = Items.concatenate(stream.epoch(Moment(epoch=9, epochs=10)))
    assert torch.equal(index_of(items), index_of(again))
    other = Items.concatenate(stream.epoch(Moment(epoch=8, epochs=10)))
    assert not torch.equal(index_of(items), index_of(other))


@pytest.mark.parametrize("world", [2, 3])
def test_resampled_batches_are_shared_out_over_processes(world: int) -> None:
    counts = ClassCounts(torch.tensor([50, 9, 2]))
    labels, law = shuffled_labels(counts), ClassSampling(counts).class_probability
    whole = BackgroundStream(labels, 12, law=law).epoch(Moment())
    parts = [BackgroundStream(labels, 12, world, law).epoch(Moment(rank=rank)) for rank in range(world)]
    for step, batch in enumerate(whole[:-1]):
        together = torch.stack([index_of(part[step]) for part in parts], dim=1).flatten()
        assert torch.equal(together, index_of(batch))


def test_labels_that_are_no_integers_are_refused() -> None:
    with pytest.raises(UserError, match="class numbers, integers, not"):
        ForegroundSampler([0.0, 1.7])  # type: ignore[list-item]


@pytest.mark.parametrize("law", [inverse_frequency, effective_number])
def test_laws_are_made_from_class_counts(law: Callable[[ClassCounts], torch.Tensor]) -> None:
    with pytest.raises(UserError, match="made from ClassCounts, not from a Tensor"):
        law(torch.tensor([80, 40]))  # type: ignore[arg-type]
