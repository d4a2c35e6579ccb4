"""Long-tailed subsets: the counts and the very images of the literature, for any data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from otmix.data import choose_subset, long_tail_counts, split_by_class
from otmix.data.longtail import largest_head, shuffled_classes
from otmix.errors import UserError

CIFAR10_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize(
    ("num_classes", "n_max", "imbalance", "total"),
    [
        (10, 5000, 100, 12_406),
        (10, 5000, 50, 13_996),
        (10, 5000, 10, 20_431),
        (100, 500, 100, 10_847),
        (100, 500, 50, 12_608),
        (100, 500, 10, 19_573),
    ],
)
def test_totals_of_the_literature(num_classes: int, n_max: int, imbalance: float, total: int) -> None:
    counts = long_tail_counts(n_max, imbalance, num_classes)
    assert sum(counts) == total
    assert (counts[0], counts[-1]) == (n_max, n_max // imbalance)


def test_counts_of_cifar10_at_100() -> None:
    assert long_tail_counts(5000, 100, 10) == CIFAR10_100
    assert long_tail_counts(4000, 100, 10)[::9] == [4000, 40]


@given(st.integers(1, 6000), st.integers(1, 300), st.integers(1, 30))
def test_counts_against_exact_integers(n_max: int, imbalance: int, num_classes: int) -> None:
    """n_k is the largest integer with n_k^(K−1) · IF^k <= n_max^(K−1), or 1."""
    steps = max(1, num_classes - 1)
    for k, n in enumerate(long_tail_counts(n_max, imbalance, num_classes)):
        assert n >= 1
        assert n == 1 or n**steps * imbalance**k <= n_max**steps
        assert (n + 1) ** steps * imbalance**k > n_max**steps


def test_whole_quotients_are_not_rounded_down() -> None:
    assert all(long_tail_counts(n * imb, imb, 2)[1] == n for imb in range(1, 200) for n in (1, 3, 7, 100))


@given(st.lists(st.integers(1, 400), min_size=2, max_size=12), st.floats(1, 200))
def test_largest_head_fits_and_is_largest(available: list[int], imbalance: float) -> None:
    have = torch.tensor(available)
    head = largest_head(have, imbalance)
    assert head >= 1

    def fits(n_max: int) -> bool:
        return all(n <= a for n, a in zip(long_tail_counts(n_max, imbalance, len(available)), available))

    assert fits(head)
    # floor() may let a slightly larger head fit too; one that is a whole image too large for some class must not.
    shares = [imbalance ** (-k / (len(available) - 1)) for k in range(len(available))]
    assert any((head + 1) * share > a for share, a in zip(shares, available))


def test_the_subset_is_the_one_of_the_released_code() -> None:
    labels = torch.from_numpy(np.random.RandomState(7).randint(0, 4, 900))
    counts = [100, 46, 21, 10]
    state = np.random.get_state()  # noqa: NPY002 - the literature's own call is the reference
    try:
        np.random.seed(0)  # noqa: NPY002
        expected = []
        for k, n in enumerate(counts):
            places = np.where(labels.numpy() == k)[0]
            np.random.shuffle(places)  # noqa: NPY002
            expected.append(places[:n])
    finally:
        np.random.set_state(state)  # noqa: NPY002
    train, validation = choose_subset(labels, 4, imbalance=10, max_per_class=100)
    assert validation is None
    assert train.tolist() == np.concatenate(expected).tolist()


def test_first_images_of_the_cifar10_subset_stay_put() -> None:
    """Any change of the shuffle would silently make another benchmark (from `numpy.random.seed(0)`, two shuffles)."""
    first, second = shuffled_classes(torch.arange(2).repeat_interleave(5000), 2)
    assert first[:8].tolist() == [398, 3833, 4836, 4572, 636, 2545, 1161, 2230]
    assert (second[:8] - 5000).tolist() == [597, 332, 521, 3935, 4800, 1102, 4304, 1826]


def test_a_long_tail_by_size_keeps_the_most_of_a_folder() -> None:
    sizes = [2, 96, 10, 48, 24]
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    train, _ = choose_subset(labels, 5, imbalance=48, by_size=True)
    counts = torch.bincount(labels[train], minlength=5).tolist()
    assert [counts[k] for k in (1, 3, 4, 2, 0)] == long_tail_counts(counts[1], 48, 5)
    assert counts[1] > 60
    assert all(n <= have for n, have in zip(counts, sizes, strict=True))


def test_global_numpy_state_is_left_alone() -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    choose_subset(torch.tensor([0, 0, 1, 1]), 2, imbalance=2)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=6),
    st.none() | st.floats(1, 50),
    st.none() | st.integers(1, 40),
    st.integers(0, 20),
    st.integers(0, 3),
)
def test_subsets_never_overlap_or_empty_a_class(
    sizes: list[int], imbalance: float | None, max_per_class: int | None, held: int, seed: int
) -> None:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    assume(not held or max(sizes) > 1)  # else there is no image for validation, which is refused
    train, validation = choose_subset(labels, len(sizes), imbalance, max_per_class, held, seed)
    counts = torch.bincount(labels[train], minlength=len(sizes))
    assert len(set(train.tolist())) == len(train)
    assert int(counts.min()) >= 1
    if max_per_class is not None:
        assert int(counts.max()) <= max_per_class
    if imbalance is not None:
        assert counts.tolist() == long_tail_counts(int(counts[0]), imbalance, len(sizes))
    elif max_per_class is None:
        assert len(train) + (0 if validation is None else len(validation)) == len(labels)
    if held:
        assert validation is not None
        assert not set(train.tolist()) & set(validation.tolist())
        taken = torch.bincount(labels[validation], minlength=len(sizes)).tolist()
        assert taken == [min(held, n // 2) for n in sizes]
    else:
        assert validation is None


def test_validation_does_not_change_the_training_subset() -> None:
    labels = torch.arange(3).repeat_interleave(50)
    alone, _ = choose_subset(labels, 3, imbalance=10, max_per_class=40)
    beside, validation = choose_subset(labels, 3, imbalance=10, max_per_class=40, validation_per_class=10)
    assert torch.equal(alone, beside)
    assert validation is not None
    shuffled = shuffled_classes(labels, 3)
    assert validation.tolist() == torch.cat([places[-10:] for places in shuffled]).tolist()


def test_imbalance_1_is_balanced_even_from_unequal_classes() -> None:
    labels = torch.tensor([0] * 9 + [1] * 4 + [2] * 7)
    train, _ = choose_subset(labels, 3, imbalance=1)
    assert torch.bincount(labels[train]).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"imbalance": 0.5}, "imbalance 0.5"),
        ({"imbalance": float("nan")}, "imbalance nan"),
        ({"imbalance": float("inf")}, "imbalance inf"),
        ({"max_per_class": 0}, "--max-per-class 0"),
        ({"validation_per_class": -1}, "--validation-per-class -1"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_impossible_requests(arguments: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        choose_subset(torch.tensor([0, 0, 1, 1]), 2, **arguments)  # type: ignore[arg-type]


def test_classes_of_one_image_give_no_validation() -> None:
    with pytest.raises(UserError, match="--validation-per-class 3 finds no class with two training images"):
        choose_subset(torch.arange(4), 4, validation_per_class=3)
    _, validation = choose_subset(torch.tensor([0, 1, 1]), 2, validation_per_class=3)
    assert validation is not None
    assert len(validation) == 1


@given(st.lists(st.integers(2, 50), min_size=2, max_size=6), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split_by_class_keeps_everything_once(sizes: list[int], fraction: float, seed: int) -> None:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    names = tuple(f"c{k}" for k in range(len(sizes)))
    kept, held = split_by_class(labels, names, fraction, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept.tolist())
    out = torch.bincount(labels[held], minlength=len(sizes)).tolist()
    assert out == [min(max(round(fraction * n), 1), n - 1) for n in sizes]
    assert all(torch.equal(a, b) for a, b in zip((kept, held), split_by_class(labels, names, fraction, seed)))


def test_split_depends_on_the_seed() -> None:
    labels = torch.arange(2).repeat_interleave(40)
    first, second = (split_by_class(labels, ("a", "b"), 0.25, seed)[1].tolist() for seed in (0, 1))
    assert first != second


def test_a_single_image_cannot_be_split() -> None:
    with pytest.raises(UserError, match="class 'rare' has 1 image"):
        split_by_class(torch.tensor([0, 0, 1]), ("common", "rare"), 0.2)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(UserError, match="--test-fraction"):
        split_by_class(torch.tensor([0, 0, 1, 1]), ("a", "b"), fraction)
