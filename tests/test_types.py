"""The values that flow: what they compute, what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from otmix.types import (
    Batch,
    ClassCounts,
    Confusion,
    ConfusionOrigin,
    Embedded,
    Items,
    Mixed,
    Pairs,
    Target,
)


def long_tail(largest: int, imbalance: float, classes: int) -> ClassCounts:
    """n_k = floor(n_max · IF^(−k/(K−1))), as CIFAR-LT is made."""
    return ClassCounts(torch.tensor([int(largest * imbalance ** (-k / (classes - 1))) for k in range(classes)]))


# ---- ClassCounts


@given(st.lists(st.integers(0, 6), min_size=1, max_size=50))
@settings(deadline=None)
def test_counts_of_labels(raw: list[int]) -> None:
    counts = [raw.count(k) for k in range(max(raw) + 1)]
    if 0 in counts:
        with pytest.raises(ValueError, match="no training image"):
            ClassCounts.from_labels(torch.tensor(raw))
        return
    found = ClassCounts.from_labels(torch.tensor(raw))
    assert found.counts.tolist() == counts
    assert found.counts.dtype == torch.int64
    assert (found.num_classes, found.total) == (len(counts), len(raw))
    torch.testing.assert_close(found.prior, torch.tensor(counts).double() / len(raw))
    assert found.imbalance == pytest.approx(max(counts) / min(counts))


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 1, 3], 3, r"label 3 is out of range; labels must be 0 … 2"),
        ([0, -1], None, r"label -1 is out of range; labels must be 0 or more"),
        ([0, 2, 2], None, r"classes \[1\] have no training image"),
        ([0, 1], 4, r"classes \[2, 3\] have no training image"),
        ([], None, "no labels"),
    ],
)
def test_labels_that_cannot_be_counted(labels: list[int], classes: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassCounts.from_labels(torch.tensor(labels), classes)


@pytest.mark.parametrize("counts", [[], [[3]], [5, 0], [5, -1]])
def test_counts_that_are_none(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"class counts|no training image"):
        ClassCounts(torch.tensor(counts, dtype=torch.int64))


@pytest.mark.parametrize(
    ("imbalance", "total", "many", "medium"),
    [(100, 12406, range(8), range(8, 10)), (50, 13996, range(9), range(9, 10)), (10, 20431, range(10), None)],
)
def test_shot_groups_of_cifar10_lt(imbalance: float, total: int, many: range, medium: range | None) -> None:
    counts = long_tail(5000, imbalance, 10)
    assert counts.total == total
    groups = counts.shot_groups()
    assert list(groups) == ["many", "medium", "few"]
    assert groups["many"] is not None
    assert groups["many"].tolist() == list(many)
    assert (groups["medium"] is None) == (medium is None)
    if medium is not None:
        # at imbalance 50 this is class 9 with exactly 100 images, which are not more than 100
        assert groups["medium"] is not None
        assert groups["medium"].tolist() == list(medium)
    assert groups["few"] is None


@pytest.mark.parametrize(("imbalance", "sizes"), [(100, (35, 35, 30)), (50, (41, 41, 18)), (10, (69, 31, 0))])
def test_shot_groups_of_cifar100_lt(imbalance: float, sizes: tuple[int, int, int]) -> None:
    groups = long_tail(500, imbalance, 100).shot_groups()
    assert tuple(0 if group is None else len(group) for group in groups.values()) == sizes


def test_shot_groups_at_their_edges() -> None:
    counts = ClassCounts(torch.tensor([101, 100, 21, 20, 19, 1]))

    def groups(few: int) -> list[list[int] | None]:
        return [None if group is None else group.tolist() for group in counts.shot_groups(few=few).values()]

    assert groups(20) == [[0], [1, 2, 3], [4, 5]]
    assert groups(21) == [[0], [1, 2], [3, 4, 5]]  # the ImageNet-LT and iNaturalist scripts


# ---- Items, Batch, Embedded


def test_items_are_sliced_and_joined_with_their_index() -> None:
    items = Items(torch.tensor([4, 5, 6]), torch.tensor([40, 50, 60]))
    picked = items[torch.tensor([2, 0])]
    assert (picked.labels.tolist(), len(picked)) == ([6, 4], 2)
    assert picked.index is not None
    assert picked.index.tolist() == [60, 40]
    assert items[1:].labels.tolist() == [5, 6]
    joined = Items.concatenate(iter([items, picked]))
    assert joined.labels.tolist() == [4, 5, 6, 6, 4]
    assert joined.index is not None
    assert joined.index.tolist() == [40, 50, 60, 60, 40]


def test_items_without_index_stay_without() -> None:
    bare = Items(torch.tensor([1, 2]))
    assert bare[:1].index is None
    assert bare.to("cpu").index is None
    assert Items.concatenate([bare, Items(torch.tensor([3]), torch.tensor([0]))]).index is None


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="vector"):
        Items(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="index has shape"):
        Items(torch.tensor([1, 2]), torch.tensor([1]))
    with pytest.raises(ValueError, match="B = 2 items"):
        Batch(Items(torch.tensor([1, 2])), torch.zeros(3, 3, 4, 4))
    with pytest.raises(ValueError, match="B = 2 items"):
        Batch(Items(torch.tensor([1, 2])), torch.zeros(2, 4, 4))


def test_batch_and_embedded_keep_rows_together() -> None:
    items = Items(torch.arange(3), torch.arange(3) * 10)
    which = torch.tensor([2, 1])
    batch = Batch(items, torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2))[which]
    assert batch.images[:, 0, 0, 0].tolist() == batch.items.labels.tolist() == [2, 1]
    embedded = Embedded(items, torch.arange(3.0)[:, None], torch.arange(3.0)[:, None] - 5)[which]
    assert embedded.features.flatten().tolist() == embedded.items.labels.tolist() == [2, 1]
    assert embedded.log_probabilities is not None
    assert embedded.log_probabilities.flatten().tolist() == [-3, -4]
    assert Embedded(items, torch.zeros(3, 2))[which].log_probabilities is None


def test_pairs_count_their_pairs() -> None:
    assert len(Pairs(torch.tensor([0, 1, 2]), torch.tensor([5, 5, 5]), by="index")) == 3


# ---- Confusion


@given(st.integers(1, 12), st.data())
@settings(deadline=None)
def test_sparse_confusion_is_looked_up_like_a_dense_one(classes: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    dense = torch.rand(classes, classes, generator=torch.Generator().manual_seed(seed))
    dense = dense.where(dense > 0.5, 0)  # some entries, perhaps some whole rows, are not there
    some = st.lists(st.integers(0, classes - 1), min_size=1, max_size=9)
    rows, columns = torch.tensor(data.draw(some)), torch.tensor(data.draw(some))
    in_halves = torch.sparse_coo_tensor(*_in_halves(dense), dense.shape, check_invariants=True)
    matrices = (dense, dense.to_sparse(), in_halves)
    for keep in (False, True):
        expected = [
            [0.0 if i == j and not keep else float(dense[i, j]) for j in columns.tolist()] for i in rows.tolist()
        ]
        for matrix in matrices:
            found = Confusion(matrix, ConfusionOrigin()).lookup(rows, columns, keep_diagonal=keep)
            torch.testing.assert_close(found, torch.tensor(expected))


def _in_halves(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values that hold each entry twice at one half: a COO tensor that is not coalesced."""
    sparse = dense.to_sparse()
    return sparse.indices().repeat(1, 2), sparse.values().repeat(2) / 2


def test_lookup_changes_nothing() -> None:
    matrix = torch.full((3, 3), 1 / 3)
    confusion = Confusion(matrix, ConfusionOrigin())
    confusion.lookup(torch.arange(3), torch.arange(3)).fill_(9.0)
    assert torch.equal(matrix, torch.full((3, 3), 1 / 3))
    assert confusion.num_classes == 3


def test_an_origin_names_its_data() -> None:
    assert str(ConfusionOrigin()) == "soft counts on batches streamed from train, adaptive"
    released = ConfusionOrigin("test", "all", soft=False)
    assert str(released) == "hard counts on all of test, adaptive"
    balanced = ConfusionOrigin("validation", "balanced", per_class=5, soft=False, adaptive=False)
    assert str(balanced) == "hard counts on 5 a class of validation, fixed"


# ---- Target and Mixed


def a_mix(n: int = 6, classes: int = 4, seed: int = 0) -> Mixed:
    draw = torch.Generator().manual_seed(seed)
    share = torch.rand(n, generator=draw)
    labels = torch.randint(classes, (n, 2), generator=draw)
    images = torch.rand(n, 1, 2, 2, generator=draw)
    return Mixed(images, Target(labels, torch.stack((share, 1 - share), 1)), share, torch.ones(n, dtype=torch.bool))


def per_image(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(output, labels, reduction="none")


def test_soft_labels_add_up_where_both_labels_are_one() -> None:
    target = Target(torch.tensor([[1, 2], [3, 3]]), torch.tensor([[0.25, 0.75], [0.4, 0.6]]))
    torch.testing.assert_close(target.soft_labels(4), torch.tensor([[0, 0.25, 0.75, 0], [0, 0, 0, 1.0]]))


@given(st.integers(0, 1000))
@settings(deadline=None)
def test_loss_is_the_mean_of_shared_losses(seed: int) -> None:
    mixed = a_mix(seed=seed)
    output = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    by_hand = [
        float(share) * float(cross_entropy(output[i], label))
        for i in range(6)
        for share, label in zip(mixed.target.shares[i], mixed.target.labels[i])
    ]
    loss = mixed.loss(per_image, output)
    torch.testing.assert_close(loss, torch.tensor(sum(by_hand) / 6))
    torch.testing.assert_close(loss, cross_entropy(output, mixed.soft_labels(4)))


def test_loss_carries_gradient_to_the_output() -> None:
    mixed, output = a_mix(), torch.zeros(6, 4, requires_grad=True)
    mixed.loss(per_image, output).backward()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, (torch.full((6, 4), 0.25) - mixed.soft_labels(4)) / 6)


@pytest.mark.parametrize("n", [1, 6])
def test_loss_refuses_a_criterion_that_has_averaged(n: int) -> None:
    with pytest.raises(ValueError, match="reduction='none'"):
        a_mix(n).loss(cross_entropy, torch.zeros(n, 4))
    with pytest.raises(ValueError, match=rf"shape \({n}, 1\) for {n} images"):
        a_mix(n).loss(lambda output, labels: per_image(output, labels)[:, None], torch.zeros(n, 4))


def test_three_labels_are_combined_as_two() -> None:
    target = Target(torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.3, 0.2]]))
    assert target.combine(lambda labels: (labels + 1).float()).tolist() == pytest.approx([0.5 + 0.6 + 0.6])


def test_unmixed_is_the_batch_with_its_own_labels() -> None:
    batch = Batch(Items(torch.tensor([2, 0])), torch.rand(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)))
    plain = Mixed.unmixed(batch)
    output = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, 0.0]])
    assert plain.images is batch.images
    assert plain.mixed.tolist() == [False, False]
    assert plain.image_share.tolist() == [1.0, 1.0]
    assert plain.pairs is None
    assert torch.equal(plain.soft_labels(3), one_hot(batch.items.labels, 3).float())
    torch.testing.assert_close(plain.loss(per_image, output), cross_entropy(output, batch.items.labels))


@pytest.mark.parametrize(("labels", "shares"), [((3,), (3,)), ((3, 2), (3, 1)), ((3, 2), (2, 2))])
def test_target_refuses_shapes_that_differ(labels: tuple[int, ...], shares: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B,S\]"):
        Target(torch.zeros(labels, dtype=torch.int64), torch.zeros(shares))
