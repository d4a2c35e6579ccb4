"""The criterion's combination of shares, weights and reductions, against plain loops."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from otmix.errors import UserError
from otmix.losses import (
    LOSSES,
    BalancedSoftmax,
    Criterion,
    CrossEntropy,
    DeferredReweighting,
    effective_number_weights,
    register_loss,
)
from otmix.methods.names import known_mixers
from otmix.methods.parts import (
    ALIASES,
    ARCHITECTURE_PARTS,
    LOSS_PARTS,
    PAIRING_PARTS,
    PIXEL_PARTS,
    REBALANCING_PARTS,
    Part,
)
from otmix.mixing import LOSS_NAMES, PIXEL_RULES, RESERVED, Mixup, register_mixer
from otmix.types import Batch, ClassCounts, Items, Mixed, Output, Target

BUILT_IN_LOSS_NAMES = frozenset(LOSS_NAMES)

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


@pytest.mark.parametrize("reduction", ["none", "sum", "weighted_mean"])
def test_another_reduction_is_refused(reduction: str) -> None:
    target = Target.hard(torch.tensor([0]))
    with pytest.raises(UserError, match=f"'mean' or 'weighted-mean', not by '{reduction}'"):
        CrossEntropy(COUNTS)(Output(torch.zeros(1, 10)), target, reduction=reduction)  # type: ignore[arg-type]


def test_losses_that_are_given_logits_or_labels_say_what_they_take() -> None:
    logits, mixed = torch.zeros(4, 10), Mixed.unmixed(Batch(Items(torch.arange(4)), torch.zeros(4, 1, 2, 2)))
    criterion = BalancedSoftmax(COUNTS)
    with pytest.raises(UserError, match=r"write criterion\(Output\(logits\), mixed.target\)"):
        mixed.loss(criterion, logits)
    with pytest.raises(UserError, match=r"write criterion\(Output\(logits\), mixed.target\)"):
        criterion(logits, mixed.target)
    assert criterion(Output(logits), mixed.target).ndim == 0


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_made_from_class_counts(name: str) -> None:
    with pytest.raises(UserError, match="made from ClassCounts, not from a list"):
        LOSSES[name]([80, 40])  # type: ignore[arg-type]


# ---- names that mean something else in a method's name


def spelt(*tables: dict[str, Part]) -> set[str]:
    return {word for table in tables for name, part in table.items() for word in (name, part.title.lower())}


def test_reserved_words_are_those_of_the_methods() -> None:
    words = {*ALIASES, *spelt(LOSS_PARTS, REBALANCING_PARTS, PAIRING_PARTS, ARCHITECTURE_PARTS, PIXEL_PARTS)}
    assert {word for word in words if word.isalpha()} == RESERVED | BUILT_IN_LOSS_NAMES | set(PIXEL_PARTS)
    assert {name for name in LOSS_PARTS if name.isalpha()} == BUILT_IN_LOSS_NAMES
    for word in (*words, *known_mixers()):
        with pytest.raises(UserError):
            register_loss(word)(CrossEntropy)
        with pytest.raises(UserError):
            register_mixer(word)(Mixup)


@pytest.mark.parametrize(
    "name", ["erm", "balms", "drw", "ride", "bbn", "otmix", "cmo", "mixup", "cmo-mixup", "otmix-my"]
)
def test_a_loss_that_could_never_be_called_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' means something else in a method's name"):
        register_loss(name)


@pytest.mark.parametrize("name", ["otmix", "cmo", "confusion", "focal", "ldam", "ce", "erm", "drw", "ride"])
def test_a_mixer_that_would_hide_a_method_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' means something else in a method's name"):
        register_mixer(name)


def test_a_loss_and_a_mixer_of_ones_own_cannot_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (LOSSES, PIXEL_RULES):  # as they were, afterwards
        monkeypatch.setitem(table, "first", None)
        monkeypatch.delitem(table, "first")
        monkeypatch.setitem(table, "second", None)
        monkeypatch.delitem(table, "second")
    register_loss("first")(CrossEntropy)
    with pytest.raises(UserError, match="'first' means something else"):
        register_mixer("first")
    register_mixer("second")(Mixup)
    with pytest.raises(UserError, match="'second' means something else"):
        register_loss("second")


@pytest.mark.parametrize(("register", "part"), [(register_loss, CrossEntropy), (register_mixer, Mixup)])
def test_a_decorator_without_a_name_and_what_is_no_class_are_refused(
    register: Callable[..., Any], part: type[object]
) -> None:
    with pytest.raises(UserError, match=rf'write @{register.__name__}\("my.'):
        register(part)
    with pytest.raises(UserError, match="must be a class"):
        register("mine")(lambda: part)
