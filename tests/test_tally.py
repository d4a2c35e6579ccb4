"""What the log is told of an epoch, against sums by hand."""

from dataclasses import replace

import pytest
import torch

from otmix.training.stage import LossParts
from otmix.training.tally import Tally
from otmix.types import Mixed, Output, Pairs, Plan, Target


def step(loss: float, said: list[int], error: float) -> LossParts:
    """Foregrounds of class 1 pasted by transport into backgrounds of class 0, which keep 0.7 of the image."""
    n = len(said)
    places, none = torch.arange(n), torch.zeros(n)
    plan = Plan(torch.eye(n) / n, none, none, torch.tensor(8), torch.tensor(error), torch.tensor(True))
    target = Target(torch.tensor([[0, 1]] * n), torch.tensor([[0.7, 0.3]] * n))
    mixed = Mixed(
        torch.zeros(n, 1, 4, 4), target, target.shares[:, 0], none == 0, Pairs(places, places, "transport", plan)
    )
    return LossParts(torch.tensor(loss), mixed, Output(torch.nn.functional.one_hot(torch.tensor(said), 3).float()))


def test_two_steps_of_transport() -> None:
    tally = Tally(3, torch.device("cpu"))
    tally.add(step(1.0, [0, 1, 2, 0], error=0.1), 0)
    tally.add(step(4.0, [1, 0], error=0.05), 1)
    assert tally.read() == pytest.approx(
        {
            "loss": (4 * 1.0 + 2 * 4.0) / 6,
            "train_error": 1 - (0.7 + 0.3 + 0.0 + 0.7 + 0.3 + 0.7) / 6,
            "images": 6,
            "mixed_share": 1.0,
            "transport_share": 1.0,
            "transport_steps": 2,
        }
    )
    assert float(tally.marginal_error) == pytest.approx(0.1)
    assert int(tally.bad_step) == -1
    foreground_by_background = tally.pairs["transport"].value
    assert foreground_by_background.tolist() == [[0, 0, 0], [6, 0, 0], [0, 0, 0]]
    assert list(tally.pairs) == ["transport"]


@pytest.mark.parametrize("by", ["index", "within-batch", "confusion", "transport", "mine"])
def test_pairs_are_counted_under_the_rule_that_made_them(by: str) -> None:
    tally, other = (Tally(3, torch.device("cpu")) for _ in range(2))
    parts = step(1.0, [0, 1], error=0.1)
    assert parts.mixed.pairs is not None
    for rule in ("transport", by):
        tally.add(replace(parts, mixed=replace(parts.mixed, pairs=replace(parts.mixed.pairs, by=rule))), 0)
    other.load_state_dict(tally.state_dict())
    for one in (tally, other):
        found = {rule: int(table.value.sum()) for rule, table in one.pairs.items()}
        assert found == ({"transport": 4} if by == "transport" else {"transport": 2, by: 2})


def test_the_first_loss_that_is_not_finite_is_remembered() -> None:
    tally = Tally(3, torch.device("cpu"))
    for number, loss in enumerate([1.0, float("nan"), float("inf"), 1.0]):
        tally.add(step(loss, [0], error=0.0), number)
    assert int(tally.bad_step) == 1
