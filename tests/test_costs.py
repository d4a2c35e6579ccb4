"""Eq. 5, 6, 7 against plain loops."""

import math

import pytest
import torch

from otmix.costs import CombinedCost, ConfusionCost, FeatureCost
from otmix.types import Confusion, ConfusionOrigin, Embedded, Items


def embedded(n: int, k: int, seed: int, d: int = 5) -> Embedded:
    g = torch.Generator().manual_seed(seed)
    return Embedded(Items(torch.randint(k, (n,), generator=g)), torch.randn(n, d, generator=g))


def confusion(k: int) -> Confusion:
    matrix = torch.rand(k, k, generator=torch.Generator().manual_seed(3))
    return Confusion(matrix / matrix.sum(1, keepdim=True), ConfusionOrigin())


def slow_cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b))
    return 1 - dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


@pytest.mark.parametrize("keep_diagonal", [False, True])
def test_combined_cost_is_eq_7(keep_diagonal: bool) -> None:
    fore, back, f = embedded(6, 4, 0), embedded(9, 4, 1), confusion(4)
    got = CombinedCost(f, omega=0.3, keep_diagonal=keep_diagonal)(fore, back)
    for i in range(6):
        for j in range(9):
            y_f, y_b = int(fore.items.labels[i]), int(back.items.labels[j])
            f_hat = float(f.matrix[y_f, y_b]) if keep_diagonal or y_f != y_b else 0.0
            want = 0.3 * slow_cosine(fore.features[i].tolist(), back.features[j].tolist()) + 0.7 * (1 - f_hat)
            assert float(got[i, j]) == pytest.approx(want, abs=1e-6)


def test_rows_of_f_are_the_foregrounds_class() -> None:
    """The order of the released code; eq. 6 read literally would be the transpose."""
    matrix = torch.tensor([[0.0, 0.9], [0.2, 0.8]])
    fore = Embedded(Items(torch.tensor([0])), torch.ones(1, 1))
    back = Embedded(Items(torch.tensor([1])), torch.ones(1, 1))
    cost = ConfusionCost(Confusion(matrix, ConfusionOrigin()))
    assert cost(fore, back).item() == pytest.approx(1 - 0.9)
    assert cost(back, fore).item() == pytest.approx(1 - 0.2)


def test_same_class_costs_one_and_no_estimate_costs_one() -> None:
    fore, back = embedded(6, 2, 0), embedded(9, 2, 1)
    same = fore.items.labels[:, None] == back.items.labels[None, :]
    assert (ConfusionCost(confusion(2))(fore, back)[same] == 1).all()
    assert (ConfusionCost(None)(fore, back) == 1).all()


def test_omega_picks_the_parts_of_table_4() -> None:
    fore, back, f = embedded(6, 4, 0), embedded(9, 4, 1), confusion(4)
    torch.testing.assert_close(CombinedCost(f, omega=1.0)(fore, back), FeatureCost()(fore, back))
    torch.testing.assert_close(CombinedCost(f, omega=0.0)(fore, back), ConfusionCost(f)(fore, back))


def test_euclidean_is_the_plain_distance() -> None:
    fore, back = embedded(4, 2, 0), embedded(3, 2, 1)
    got = FeatureCost("euclidean")(fore, back)
    for i in range(4):
        for j in range(3):
            assert float(got[i, j]) == pytest.approx(
                math.dist(fore.features[i].tolist(), back.features[j].tolist()), abs=1e-5
            )


def test_zero_features_do_not_make_nan() -> None:
    fore = Embedded(Items(torch.tensor([0])), torch.zeros(1, 3))
    back = Embedded(Items(torch.tensor([1])), torch.ones(1, 3))
    assert FeatureCost()(fore, back).item() == 1.0


def test_omega_outside_0_1_is_refused() -> None:
    with pytest.raises(ValueError, match="omega"):
        CombinedCost(omega=1.5)


@pytest.mark.parametrize("cost", [FeatureCost, CombinedCost])
def test_a_misspelt_metric_is_refused(cost: type[FeatureCost] | type[CombinedCost]) -> None:
    with pytest.raises(ValueError, match="'cosine' or 'euclidean', not by 'euclidian'"):
        cost(metric="euclidian")  # type: ignore[arg-type]
