"""Who is pasted into whom."""

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from otmix.costs import CombinedCost
from otmix.errors import UserError
from otmix.pairing import (
    ConfusionPairing,
    Curriculum,
    IndexPairing,
    Pairing,
    PairingContext,
    TransportPairing,
    WithinBatchPairing,
)
from otmix.randomness import Moment
from otmix.transport import sinkhorn
from otmix.types import Confusion, ConfusionOrigin, Embed, Embedded, Items, Plan


def items(*labels: int) -> Items:
    return Items(torch.tensor(labels))


def looker(features: dict[int, torch.Tensor]) -> Embed:
    return lambda it: Embedded(it, features[id(it)])


def never(it: Items) -> Embedded:
    raise AssertionError("this pairing must not look at the images")


def context(epoch: int = 0, epochs: int = 10, step: int = 0, seed: int = 0) -> PairingContext:
    return PairingContext(Moment(seed=seed, epoch=epoch, epochs=epochs, step=step))


def test_index_pairs_the_ith_with_the_ith() -> None:
    pairs = IndexPairing()(items(1, 2, 3), items(0, 0), never, context())
    assert pairs.foreground.tolist() == pairs.background.tolist() == [0, 1]


def test_within_batch_is_a_permutation_that_changes_with_the_step() -> None:
    batch = items(*range(50))
    first, again, other = (WithinBatchPairing()(batch, batch, never, context(step=s)) for s in (0, 0, 1))
    assert sorted(first.foreground.tolist()) == list(range(50)) == first.background.tolist()
    assert first.foreground.tolist() == again.foreground.tolist() != other.foreground.tolist()


def test_within_batch_by_class_weight_draws_from_the_whole_batch_with_replacement() -> None:
    labels = torch.tensor([0] * 12 + [1] * 4)
    batch, pairing = Items(labels), WithinBatchPairing(torch.tensor([1.0, 6.0]))
    first, again, other = (pairing(batch, batch, never, context(step=s)) for s in (0, 0, 1))
    assert first.background.tolist() == list(range(16))
    assert first.foreground.tolist() == again.foreground.tolist() != other.foreground.tolist()
    assert first.by == "within-batch"
    assert not pairing.from_foregrounds
    drawn = torch.stack([pairing(batch, batch, never, context(step=s)).foreground for s in range(300)])
    expected = torch.tensor([1.0] * 12 + [6.0] * 4) / 36
    # within five standard deviations, image by image, whoever the partner is for
    assert (
        (torch.bincount(drawn.flatten(), minlength=16) / 4800 - expected).abs() < 5 * (expected / 4800).sqrt()
    ).all()
    assert bool((drawn == torch.arange(16)).any())  # an image may meet itself
    assert max(len(set(row)) for row in drawn.tolist()) < 16


def test_a_class_of_hardly_any_weight_is_hardly_drawn() -> None:
    batch, pairing = items(0, 1, 0, 1, 1), WithinBatchPairing(torch.tensor([1e-30, 1.0]))
    drawn = {j for s in range(50) for j in pairing(batch, batch, never, context(step=s)).foreground.tolist()}
    assert drawn == {1, 3, 4}


def test_an_image_alone_meets_itself() -> None:
    pairing = WithinBatchPairing(torch.ones(2))
    assert pairing(items(1), items(1), never, context()).foreground.tolist() == [0]


@pytest.mark.parametrize("weight", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 1.0]]])
def test_class_weights_must_be_weights(weight: list[float]) -> None:
    with pytest.raises(ValueError, match="class weights"):
        WithinBatchPairing(torch.tensor(weight))


def test_class_weights_never_wait_for_a_device() -> None:
    """Labels on `meta` have no values: whatever asks for one raises."""
    labels = Items(torch.zeros(4, dtype=torch.int64, device="meta"))
    pairs = WithinBatchPairing(torch.ones(2))(labels, labels, never, context())
    assert pairs.foreground.shape == pairs.background.shape == (4,)
    assert pairs.foreground.device.type == "meta"


def test_transport_finds_the_obvious_partner() -> None:
    fore, back = items(0, 0, 0), items(1, 1, 1)
    features = {id(fore): torch.eye(3), id(back): torch.eye(3)[[2, 0, 1]]}
    pairs = TransportPairing(lambda f: CombinedCost(f, omega=1.0))(fore, back, looker(features), context())
    assert pairs.background.tolist() == [1, 2, 0]
    assert pairs.by == "transport"
    assert pairs.plan is not None
    assert bool(pairs.plan.converged)


@pytest.mark.parametrize("known", [False, True])
def test_a_cost_by_classes_alone_does_not_give_a_batch_to_a_few_backgrounds(known: bool) -> None:
    """Backgrounds of one class are equal to it: each foreground gets any of those with the largest T."""
    g = torch.Generator().manual_seed(0)
    fore, back = (Items(torch.randint(5, (128,), generator=g)) for _ in range(2))
    features = {id(it): torch.randn(128, 4, generator=g) for it in (fore, back)}
    confusion = Confusion(torch.rand(5, 5, generator=g), ConfusionOrigin()) if known else None
    pairing = TransportPairing(lambda f: CombinedCost(f, omega=0.0))
    pairs, again, other = (
        pairing(fore, back, looker(features), PairingContext(Moment(step=step), confusion)) for step in (0, 0, 1)
    )
    assert torch.equal(pairs.background, again.background)
    assert not torch.equal(pairs.background, other.background)
    assert pairs.plan is not None
    row = pairs.plan.coupling
    assert bool((row.gather(1, pairs.background[:, None]) >= row.amax(1, keepdim=True) * (1 - 1e-4)).all())
    # 128 draws of 128: 81 different ones on average; a background is drawn eight times in one of 100,000 batches
    assert len(pairs.background.unique()) > 60
    assert pairs.background.bincount().max() < 10


def test_transport_is_not_the_greedy_choice() -> None:
    """Both foregrounds are nearest to background 0; the marginals send one of them to background 1."""
    fore, back = items(0, 0), items(1, 1)
    features = {id(fore): torch.tensor([[1.0, 0.0], [0.9, 0.3]]), id(back): torch.tensor([[1.0, 0.1], [0.2, 1.0]])}
    cost = CombinedCost(omega=1.0)(Embedded(fore, features[id(fore)]), Embedded(back, features[id(back)]))
    assert cost.argmin(1).tolist() == [0, 0]
    pairs = TransportPairing(lambda f: CombinedCost(f, omega=1.0))(fore, back, looker(features), context())
    assert pairs.background.tolist() == [0, 1]


def test_more_foregrounds_than_backgrounds() -> None:
    fore, back = items(*[0] * 5), items(1, 1)
    g = torch.Generator().manual_seed(0)
    features = {id(fore): torch.randn(5, 4, generator=g), id(back): torch.randn(2, 4, generator=g)}
    pairs = TransportPairing()(fore, back, looker(features), context())
    assert pairs.foreground.tolist() == [0, 1, 2, 3, 4]
    assert set(pairs.background.tolist()) <= {0, 1}


def test_the_cost_gets_the_present_confusion() -> None:
    fore, back = items(0, 1), items(2, 3)
    features = {id(fore): torch.ones(2, 2), id(back): torch.ones(2, 2)}
    matrix = torch.tensor([[0.0, 0, 0.1, 0.9], [0, 0.0, 0.9, 0.1], [0, 0, 1, 0], [0, 0, 0, 1]])
    seen = PairingContext(Moment(), Confusion(matrix, ConfusionOrigin()))
    assert TransportPairing()(fore, back, looker(features), seen).background.tolist() == [1, 0]


@pytest.mark.parametrize("select", ["sample", "softmax"])
def test_selection_follows_its_law(select: str) -> None:
    """800 draws of one row against its probabilities; the softmax of a plan is nearly uniform (Table 4)."""
    fore, back = items(0), items(1, 1, 1)
    features = {id(fore): torch.tensor([[1.0, 0.0]]), id(back): torch.tensor([[1.0, 0.2], [1.0, 0.1], [1.0, 0.0]])}
    pairing = TransportPairing(lambda f: CombinedCost(f, omega=1.0), epsilon=0.05, select=select)  # type: ignore[arg-type]
    counts = torch.zeros(3)
    plan = None
    for step in range(800):
        pairs = pairing(fore, back, looker(features), context(step=step))
        counts[pairs.background] += 1
        plan = pairs.plan
    assert plan is not None
    row = plan.coupling[0] if select == "sample" else plan.coupling[0].softmax(0)
    assert (counts / 800 - row / row.sum()).abs().max() < 0.06


def test_softmax_is_over_the_backgrounds_of_a_foreground(monkeypatch: pytest.MonkeyPatch) -> None:
    none = torch.zeros(3)
    plan = Plan(torch.tensor([[3.0, 0, 0]] * 2), none[:2], none, torch.tensor(1), torch.tensor(0.0), torch.tensor(True))
    monkeypatch.setattr("otmix.pairing.sinkhorn", lambda cost, **settings: plan)
    fore, back = items(0, 0), items(1, 1, 1)
    features, pairing = {id(fore): torch.ones(2, 2), id(back): torch.ones(3, 2)}, TransportPairing(select="softmax")
    drawn = torch.cat([pairing(fore, back, looker(features), context(step=s)).background for s in range(300)])
    assert float((drawn == 0).float().mean()) == pytest.approx(math.e**3 / (math.e**3 + 2), abs=0.05)


def test_the_solver_gets_the_settings_of_the_pairing(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def solve(cost: torch.Tensor, **settings: Any) -> Plan:
        given.update(settings)
        return sinkhorn(cost, **settings)

    monkeypatch.setattr("otmix.pairing.sinkhorn", solve)
    fore, back = items(0), items(1, 1)
    features = {id(fore): torch.ones(1, 2), id(back): torch.ones(2, 2)}
    settings = {"epsilon": 0.2, "max_iterations": 7, "tolerance": 0.3}
    TransportPairing(**settings)(fore, back, looker(features), context())  # type: ignore[arg-type]
    assert given == settings


def test_autocast_does_not_reach_the_cost() -> None:
    fore, back = items(*[0] * 16), items(*[1] * 16)
    g = torch.Generator().manual_seed(0)
    features = {id(fore): torch.randn(16, 32, generator=g), id(back): torch.randn(16, 32, generator=g)}
    plain = TransportPairing()(fore, back, looker(features), context())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = TransportPairing()(fore, back, looker(features), context())
    assert plain.plan is not None
    assert under.plan is not None
    assert torch.equal(plain.plan.coupling, under.plan.coupling)


def test_fixed_confusion_takes_the_most_confused_class_or_any() -> None:
    matrix = torch.tensor([[0.5, 0.1, 0.4], [0.9, 0.05, 0.05], [0.0, 0.0, 1.0]])
    confusion = Confusion(matrix, ConfusionOrigin(adaptive=False))
    pairing, fore, back = ConfusionPairing(), items(0, 1, 1), items(2, 0, 2, 0)

    def at(step: int) -> PairingContext:
        return PairingContext(Moment(step=step), confusion)

    met: list[set[int]] = [set(), set(), set()]
    for step in range(60):
        for i, j in enumerate(pairing(fore, back, never, at(step)).background.tolist()):
            met[i].add(j)
    assert met == [{0, 2}, {1, 3}, {1, 3}]  # class 0 is most confused with 2 (not with itself), class 1 with 0
    absent = {int(pairing(items(0), items(1, 1, 0), never, at(step)).background) for step in range(60)}
    assert absent == {0, 1, 2}


def test_confusion_pairing_by_the_present_matrix() -> None:
    """It pairs at random before there is one."""
    pairing, fore, back = ConfusionPairing(), items(0, 1), items(1, 0)
    assert pairing(fore, back, never, context()).by == "index"
    confusion = Confusion(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), ConfusionOrigin())
    known = PairingContext(Moment(), confusion)
    assert pairing(fore, back, never, known).background.tolist() == [0, 1]
    # a class that is confused with none goes anywhere, not to class 0
    sure = PairingContext(Moment(), Confusion(torch.eye(2), ConfusionOrigin()))
    met = {
        int(pairing(items(1), items(0, 1), never, PairingContext(Moment(step=step), sure.confusion)).background)
        for step in range(40)
    }
    assert met == {0, 1}


class Named:
    """A pairing that only says who it is."""

    from_foregrounds = True

    def __init__(self, name: str) -> None:
        self.name = name


def share_of_then(curriculum: Curriculum, epoch: int, epochs: int, steps: int) -> float:
    chosen = [curriculum.choose(Moment(epoch=epoch, epochs=epochs, step=s)).name for s in range(steps)]  # type: ignore[attr-defined]
    return chosen.count("then") / steps


def pair_of_names() -> tuple[Pairing, Pairing]:
    return Named("first"), Named("then")  # type: ignore[return-value]


def test_curriculum_is_bernoulli_t_over_t_to_the_mu() -> None:
    first, then = pair_of_names()
    for power in (0.5, 1.0, 2.0):
        curriculum = Curriculum(first, then, power)
        for epoch in (0, 4, 9):
            assert curriculum.probability(Moment(epoch=epoch, epochs=10)) == pytest.approx(((epoch + 1) / 10) ** power)
            assert share_of_then(curriculum, epoch, 10, 1500) == pytest.approx(((epoch + 1) / 10) ** power, abs=0.045)


def test_curriculum_from_zero_never_transports_in_the_first_epoch_and_per_epoch_is_all_or_nothing() -> None:
    first, then = pair_of_names()
    assert share_of_then(Curriculum(first, then, one_based=False), 0, 10, 300) == 0
    shares = {share_of_then(Curriculum(first, then, per="epoch"), epoch, 40, 20) for epoch in range(40)}
    assert shares == {0.0, 1.0}


@pytest.mark.parametrize(
    ("per", "place"), [("batch", name) for name in ("seed", "stage", "epoch", "step")]
    + [("epoch", name) for name in ("seed", "stage", "epoch")],
)  # fmt: skip
def test_the_curriculum_depends_on_its_moment(per: Literal["batch", "epoch"], place: str) -> None:
    curriculum, moment = Curriculum(*pair_of_names(), per=per), Moment(epoch=500_000, epochs=10**6)
    others = (replace(moment, **{place: getattr(moment, place) + i}) for i in range(40))
    assert {curriculum.choose(other).name for other in others} == {"first", "then"}  # type: ignore[attr-defined]


def test_all_processes_choose_alike() -> None:
    curriculum = Curriculum(*pair_of_names())
    for step in range(50):
        a, b = (curriculum.choose(Moment(epoch=4, epochs=10, step=step, rank=rank)) for rank in (0, 1))
        assert a is b


def test_misspelt_settings_are_refused() -> None:
    with pytest.raises(UserError, match="'sample' or 'softmax', not 'argmx'"):
        TransportPairing(select="argmx")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="per 'batch' or per 'epoch', not per 'step'"):
        Curriculum(IndexPairing(), TransportPairing(), per="step")  # type: ignore[arg-type]
    for power in (math.nan, -1.0):
        with pytest.raises(UserError, match="must be 0 or more"):
            Curriculum(IndexPairing(), TransportPairing(), power)
