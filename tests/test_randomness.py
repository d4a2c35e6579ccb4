"""Seeds are a pure function of the place in the run, stay what they are, and give independent streams."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, kstest

from otmix.randomness import Moment, derive_seed, generator

parts = st.lists(st.one_of(st.integers(-(10**9), 10**9), st.text("abc-01", max_size=4)), max_size=5)


@pytest.mark.parametrize(
    ("of", "seed"),
    [
        ((), 6510301506637419378),
        ((0,), 3581690635855307741),
        (("0",), 5199204929721980132),
        ((0, "mix", 0, 1, 2, 3), 408129814509417388),
        ((0, "background", 0, 0, 0, 0), 7065850445502076525),
    ],
)
def test_seeds_stay_what_they_are(of: tuple[int | str, ...], seed: int) -> None:
    # a change here changes every run that anyone has recorded
    assert derive_seed(*of) == seed


def test_streams_stay_what_they_are() -> None:
    draw = generator(0, "background")
    assert torch.randint(1000, (4,), generator=draw).tolist() == [366, 724, 265, 930]
    draw = generator(1, "foreground", 1, 239, 96, 1)
    assert torch.randint(1000, (4,), generator=draw).tolist() == [26, 798, 560, 815]


@given(parts, parts)
@settings(deadline=None)
def test_equal_parts_equal_seed_and_only_they(a: list[int | str], b: list[int | str]) -> None:
    assert 0 <= derive_seed(*a) < 2**63
    assert (derive_seed(*a) == derive_seed(*b)) == ([(type(x), x) for x in a] == [(type(x), x) for x in b])


def test_parts_are_not_run_together() -> None:
    seeds = [
        derive_seed(*of) for of in ((1, 23), (12, 3), (123,), ("1", 23), ("123",), ("12", "3"), ("", 123), (1, 2, 3))
    ]
    assert len(set(seeds)) == len(seeds)


def test_each_coordinate_of_a_moment_counts() -> None:
    moment = Moment(seed=1, stage=2, epoch=3, epochs=9, step=4, rank=5)
    others = [replace(moment, **{name: 7}) for name in ("seed", "stage", "epoch", "step", "rank")]
    seeds = [here.seed_for("mix") for here in [moment, *others]] + [moment.seed_for("background")]
    assert len(set(seeds)) == 7
    # the length of a run must not change what its first epochs draw
    assert replace(moment, epochs=100).seed_for("mix") == moment.seed_for("mix")
    assert {field.name for field in fields(Moment)} == {"seed", "stage", "epoch", "epochs", "step", "rank"}


def test_a_moment_is_its_generator() -> None:
    moment = Moment(seed=1, stage=2, epoch=3, epochs=9, step=4, rank=5)
    by_moment = torch.rand(5, generator=moment.generator("mix"))
    assert torch.equal(by_moment, torch.rand(5, generator=generator(1, "mix", stage=2, epoch=3, step=4, rank=5)))
    assert moment.generator("mix").initial_seed() == moment.seed_for("mix")
    assert torch.equal(by_moment, torch.rand(5, generator=moment.generator("mix")))  # asking leaves no trace


def test_at_epoch_is_shared_by_steps_and_processes() -> None:
    moment = Moment(seed=1, stage=2, epoch=3, epochs=9, step=4, rank=5)
    assert moment.at_epoch() == Moment(seed=1, stage=2, epoch=3, epochs=9)
    assert replace(moment, step=8, rank=0).at_epoch() == moment.at_epoch()


@given(st.integers(1, 500), st.data())
@settings(deadline=None)
def test_progress_is_the_share_of_finished_epochs(epochs: int, data: st.DataObject) -> None:
    epoch = data.draw(st.integers(0, epochs - 1))
    progress = Moment(epoch=epoch, epochs=epochs, step=3).progress
    assert progress == Moment(epoch=epoch, epochs=epochs).progress == epoch / epochs
    assert 0 <= progress < 1


def test_global_randomness_is_left_alone() -> None:
    state = torch.get_rng_state()
    torch.rand(3, generator=Moment(seed=9).generator("mix"))
    assert torch.equal(state, torch.get_rng_state())


def test_no_two_places_of_a_run_share_a_seed() -> None:
    places = product(("background", "foreground", "mix", "pairing"), range(20), range(100), range(2))
    seeds = [derive_seed(0, purpose, 0, epoch, step, rank) for purpose, epoch, step, rank in places]
    assert len(set(seeds)) == len(seeds) == 16_000


def test_draws_of_successive_steps_are_uniform_and_independent() -> None:
    """The first draw at each of 3,000 steps, for two purposes: close places must not give like streams."""
    mix, pairing = (
        torch.cat([torch.rand(1, generator=generator(0, purpose, step=step)) for step in range(3000)])
        for purpose in ("mix", "pairing")
    )
    assert kstest(mix.numpy(), "uniform").pvalue > 1e-3
    for a, b in ((mix, pairing), (mix[:-1], mix[1:])):  # two purposes at a step; two steps in a row
        table = torch.bincount((a * 5).long() * 5 + (b * 5).long(), minlength=25).reshape(5, 5)
        assert chi2_contingency(table.numpy()).pvalue > 1e-3
