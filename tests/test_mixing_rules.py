"""Remix and UniMix against plain loops, their laws, timm as a peer; all pixel rules with all pairings and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm.data.mixup
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_law
from scipy.stats import chisquare, kstest
from torch.nn.functional import cross_entropy

from otmix.errors import UserError
from otmix.mixer import BatchMixer
from otmix.mixing import (
    PIXEL_RULES,
    CutMix,
    Mixer,
    Mixup,
    Remix,
    SaliencyMix,
    UniMix,
    register_mixer,
    unimix_law,
)
from otmix.mixing.pasting import paste
from otmix.pairing import IndexPairing, Pairing, PairingContext, TransportPairing, WithinBatchPairing
from otmix.randomness import Moment
from otmix.types import Batch, ClassCounts, Embedded, Items, Mixed

COUNTS = ClassCounts(torch.tensor([500, 150, 50, 17, 5]))
RULES: dict[str, Callable[[], Any]] = {
    "cutmix": CutMix,
    "cutmix per image": lambda: CutMix(per="image"),
    "mixup": Mixup,
    "mixup per image": lambda: Mixup(per="image"),
    "saliencymix": SaliencyMix,
    "saliencymix per batch": lambda: SaliencyMix(per="batch"),
    "remix": lambda: Remix(COUNTS),
    "remix per image": lambda: Remix(COUNTS, per="image"),
    "unimix": lambda: UniMix(COUNTS),
}
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(seed: int, n: int = 6, channels: int = 3, height: int = 9, width: int = 7) -> Batch:
    draw = generator(seed)
    labels = torch.randint(5, (n,), generator=draw)
    return Batch(Items(labels, torch.arange(n)), torch.rand(n, channels, height, width, generator=draw))


def flipped(batch: Batch) -> Batch:
    return batch[torch.arange(len(batch)).flip(0)]


def same(a: Mixed, b: Mixed) -> bool:
    pairs = [(a.images, b.images), (a.target.labels, b.target.labels), (a.target.shares, b.target.shares)]
    return all(torch.equal(x, y) for x, y in [*pairs, (a.image_share, b.image_share), (a.mixed, b.mixed)])


# ---- Remix


def reference_remix(n_i: int, n_j: int, share: float, kappa: float, tau: float) -> float:
    if n_i / n_j >= kappa and share < tau:
        return 0.0
    if n_i / n_j <= 1 / kappa and 1 - share < tau:
        return 1.0
    return share


@given(seeds, st.sampled_from(["batch", "image"]), st.sampled_from([1.5, 3.0, 10.0, 99.0]), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_remix_is_the_reference(seed: int, per: Any, kappa: float, tau: float) -> None:
    background, foreground = random_batch(seed, 20), random_batch(seed + 1, 20)
    mixer = Remix(COUNTS, 1.0, per, kappa, tau)
    drawn = mixer.draw(20, 9, 7, generator(seed))
    assert drawn.shape == ((1,) if per == "batch" else (20,))
    mixed = mixer.apply(background, foreground, drawn)
    alike = Mixup(1.0, per).apply(background, foreground, drawn)
    assert torch.equal(mixed.images, alike.images)
    assert torch.equal(mixed.image_share, alike.image_share)
    assert torch.equal(mixed.target.labels, alike.target.labels)
    shares = drawn.float().double().expand(20).tolist()
    for i, (ours, theirs) in enumerate(mixed.target.labels.tolist()):
        expected = reference_remix(int(COUNTS.counts[ours]), int(COUNTS.counts[theirs]), shares[i], kappa, tau)
        assert mixed.target.shares[i].tolist() == pytest.approx([expected, 1 - expected], abs=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "share", "label_share"),
    [
        (300, 100, 0.49, 0.0),  # the background is three times as common and less than half of the image
        (300, 100, 0.5, 0.5),  # not less than half
        (299, 100, 0.49, 0.49),  # not three times as common
        (100, 300, 0.51, 1.0),  # the other way round
        (100, 300, 0.5, 0.5),
        (100, 299, 0.51, 0.51),
        (100, 300, 0.49, 0.49),  # the rare one is too small a part of the image
        (300, 100, 0.51, 0.51),
        (100, 100, 0.3, 0.3),
    ],
)
def test_remix_at_its_thresholds(ours: int, theirs: int, share: float, label_share: float) -> None:
    mixer = Remix(ClassCounts(torch.tensor([ours, theirs])))
    images = torch.zeros(1, 1, 2, 2)
    pair = Batch(Items(torch.tensor([0])), images), Batch(Items(torch.tensor([1])), images)
    mixed = mixer.apply(*pair, torch.tensor([share], dtype=torch.float64))
    assert mixed.target.shares[0].tolist() == pytest.approx([label_share, 1 - label_share])
    assert mixed.image_share.tolist() == pytest.approx([share])


def test_remix_without_a_class_rare_enough_is_mixup() -> None:
    background, foreground = random_batch(1), random_batch(2)
    per: Any
    for per in ("batch", "image"):
        mixup, remix = Mixup(0.7, per), Remix(COUNTS, 0.7, per, kappa=math.inf)
        drawn = mixup.draw(6, 9, 7, generator(0))
        assert torch.equal(drawn, remix.draw(6, 9, 7, generator(0)))
        assert same(mixup.apply(background, foreground, drawn), remix.apply(background, foreground, drawn))
        for unmoved in (Remix(COUNTS, 0.7, per, tau=0.0), Remix(COUNTS, 0.7, per, kappa=101.0)):
            assert same(mixup.apply(background, foreground, drawn), unmoved.apply(background, foreground, drawn))


def test_remix_losses_are_weighted_per_image() -> None:
    """Not by the batch's average label share, as one of the public codes does."""
    mixed = Remix(COUNTS, per="image").apply(
        random_batch(1, 40), random_batch(2, 40), torch.linspace(0, 1, 40).double()
    )
    assert len({*mixed.target.shares[:, 0].tolist()} - {*mixed.image_share.tolist()} | {0.0, 1.0}) == 2
    assert not torch.equal(mixed.target.shares[:, 0], mixed.image_share)
    output = torch.randn(40, 5, generator=generator(0))
    loss = mixed.loss(lambda out, labels: cross_entropy(out, labels, reduction="none"), output)
    logp = output.double().log_softmax(1)
    expected = 0.0
    for i, (ours, theirs) in enumerate(mixed.target.labels.tolist()):
        share = float(mixed.target.shares[i, 0])
        expected -= (share * float(logp[i, ours]) + (1 - share) * float(logp[i, theirs])) / 40
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kappa": 0.5}, "kappa"),
        ({"kappa": math.nan}, "kappa"),
        ({"tau": -0.1}, "tau"),
        ({"tau": 1.1}, "tau"),
        ({"tau": math.nan}, "tau"),
        ({"alpha": 0.0}, "alpha"),
        ({"per": "row"}, "'row'"),
    ],
)
def test_remix_refuses_senseless_settings(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Remix(COUNTS, **wrong)


# ---- UniMix


@given(seeds, st.floats(0.05, 20))
@settings(deadline=None)
def test_unimix_is_the_reference(seed: int, alpha: float) -> None:
    background, foreground = random_batch(seed, 20), random_batch(seed + 1, 20)
    mixer = UniMix(COUNTS, alpha)
    drawn = mixer.draw(20, 9, 7, generator(seed))
    mixed = mixer.apply(background, foreground, drawn)
    for i, (ours, theirs) in enumerate(mixed.target.labels.tolist()):
        n_i, n_j = int(COUNTS.counts[ours]), int(COUNTS.counts[theirs])
        share = float(drawn[i]) + n_j / (n_i + n_j)
        if abs(share - 1) < 1e-6:  # float32 may wrap here where float64 does not
            continue
        share = share - 1 if share > 1 else share
        assert mixed.target.shares[i].tolist() == pytest.approx([share, 1 - share], abs=1e-6)
        assert float(mixed.image_share[i]) == pytest.approx(share, abs=1e-6)
        expected = share * background.images[i].double() + (1 - share) * foreground.images[i].double()
        torch.testing.assert_close(mixed.images[i].double(), expected, rtol=0, atol=1e-5)


def shares_of_pair(alpha: float, ours: int, theirs: int, n: int = 40_000) -> np.ndarray[Any, Any]:
    """λ of `n` pairs of a class of `ours` images as background and one of `theirs`."""
    mixer = UniMix(ClassCounts(torch.tensor([ours, theirs])), alpha)
    images = torch.zeros(n, 1, 1, 1)
    pair = [Batch(Items(torch.full((n,), label)), images) for label in (0, 1)]
    return mixer.apply(*pair, mixer.draw(n, 1, 1, generator(0))).image_share.double().numpy()


@pytest.mark.parametrize(("alpha", "mean", "below_half"), [(0.8, 0.488, 0.51), (0.5, 0.445, 0.56), (0.2, 0.30, 0.71)])
def test_unimix_favours_the_rare_class_as_its_alpha_says(alpha: float, mean: float, below_half: float) -> None:
    head = shares_of_pair(alpha, 100, 1)
    assert head.mean() == pytest.approx(mean, abs=0.006)
    assert (head < 0.5).mean() == pytest.approx(below_half, abs=0.01)
    assert shares_of_pair(alpha, 1, 100).mean() == pytest.approx(1 - mean, abs=0.006)


def test_unimix_shares_follow_the_turned_beta() -> None:
    shift = 1 / 4  # n_j / (n_i + n_j) of 30 and 10

    def law(x: Any) -> Any:  # P(λ <= x): b in (0, x - shift], or b above 1 - shift come round again
        turned = beta_law.cdf(np.minimum(x + 1 - shift, 1), 0.8, 0.8) - beta_law.cdf(1 - shift, 0.8, 0.8)
        return turned + beta_law.cdf(np.maximum(x - shift, 0), 0.8, 0.8)

    assert kstest(shares_of_pair(0.8, 30, 10, 20_000), law).pvalue > 1e-3


def test_unimix_with_alpha_1_and_tau_0_is_mixup_in_law() -> None:
    """Per image: shares are uniform whatever the classes, and each image of the batch is as likely a partner."""
    n = 20_000
    for ours, theirs in ((1, 1), (100, 1), (1, 100), (3, 7)):
        shares = shares_of_pair(1.0, ours, theirs, n)
        assert kstest(shares, "uniform").pvalue > 1e-3
        assert kstest(shares, Mixup(1.0, "image").draw(n, 1, 1, generator(1)).numpy()).pvalue > 1e-3
    labels = torch.tensor([0] * 10 + [1] * 5 + [4])
    drawn = partners(WithinBatchPairing(unimix_law(COUNTS, 0.0)), labels, 400)
    assert chisquare(np.bincount(drawn, minlength=16)).pvalue > 1e-3


def test_partners_follow_the_law_of_tau() -> None:
    counts = ClassCounts(torch.tensor([100, 25, 4]))
    torch.testing.assert_close(unimix_law(counts, -0.5), torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64))
    torch.testing.assert_close(unimix_law(counts, 1.0), torch.tensor([100.0, 25.0, 4.0], dtype=torch.float64))
    assert torch.equal(unimix_law(counts, 0.0), torch.ones(3, dtype=torch.float64))
    labels = torch.tensor([0] * 8 + [1] * 3 + [2])
    drawn = partners(WithinBatchPairing(unimix_law(counts, -0.5)), labels, 1000)
    weight = np.array([0.1] * 8 + [0.2] * 3 + [0.5])
    seen = np.bincount(drawn, minlength=12)
    assert chisquare(seen, weight / weight.sum() * len(drawn)).pvalue > 1e-3


def test_unimix_names_the_weight_of_its_partners() -> None:
    assert torch.equal(UniMix(COUNTS, tau=-0.1).partner_weight, unimix_law(COUNTS, -0.1))
    with pytest.raises(UserError, match="tau"):
        UniMix(COUNTS, tau=math.nan)


def partners(pairing: Pairing, labels: torch.Tensor, steps: int) -> np.ndarray[Any, Any]:
    batch = Items(labels)
    drawn = [pairing(batch, batch, look, PairingContext(Moment(step=step))).foreground for step in range(steps)]
    return torch.cat(drawn).numpy()


@pytest.mark.parametrize("tau", [math.nan, math.inf, -math.inf, 1e6, -1e6])
def test_a_tau_that_makes_no_law_is_refused(tau: float) -> None:
    with pytest.raises(UserError, match="tau"):
        unimix_law(COUNTS, tau)


def test_unimix_refuses_what_makes_no_beta() -> None:
    with pytest.raises(UserError, match="alpha"):
        UniMix(COUNTS, 0.0)


# ---- timm as a peer: the batch with itself, from the other end


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), seeds)
@settings(deadline=None)
def test_mixup_is_timms(shares: list[float], seed: int) -> None:
    class Given(timm.data.Mixup):  # type: ignore[misc]
        def _params_per_batch(self) -> tuple[float, bool]:
            return shares[0], False

        def _params_per_elem(self, batch_size: int) -> Any:
            return np.array(shares), np.zeros(batch_size, dtype=bool)

    batch = random_batch(seed)
    drawn = torch.tensor(shares, dtype=torch.float64)
    unmoved = Remix(COUNTS, kappa=math.inf)
    for mode, mixer, draws in (("batch", Mixup(), drawn[:1]), ("elem", Mixup(), drawn), ("elem", unmoved, drawn)):
        theirs = Given(mode=mode, label_smoothing=0.0, num_classes=5)
        images, soft = theirs(batch.images.clone(), batch.items.labels)
        mixed = mixer.apply(batch, flipped(batch), draws)
        torch.testing.assert_close(mixed.images, images, rtol=0, atol=1e-6)
        torch.testing.assert_close(mixed.soft_labels(5), soft.float(), rtol=0, atol=1e-6)


boxes = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 7), st.integers(0, 7)).map(
    lambda b: (*sorted(b[:2]), *sorted(b[2:]))
)


@given(st.lists(boxes, min_size=6, max_size=6), seeds)
@settings(deadline=None)
def test_cutmix_is_timms(given_boxes: list[tuple[int, ...]], seed: int) -> None:
    next_box: Iterator[tuple[int, ...]] = iter(())

    def one(*_: Any, **__: Any) -> Any:
        box = next(next_box)
        return box, 1 - (box[1] - box[0]) * (box[3] - box[2]) / 63

    class Given(timm.data.Mixup):  # type: ignore[misc]
        def _params_per_batch(self) -> tuple[float, bool]:
            return 0.5, True

        def _params_per_elem(self, batch_size: int) -> Any:
            return np.full(batch_size, 0.5), np.ones(batch_size, dtype=bool)

    batch = random_batch(seed)
    rows = torch.tensor([[y0, x0, y1 - y0, x1 - x0] for y0, y1, x0, x1 in given_boxes])
    for mode, ours in (("batch", rows[:1]), ("elem", rows)):
        next_box = iter(given_boxes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", one)
            theirs = Given(mixup_alpha=0.0, cutmix_alpha=1.0, mode=mode, label_smoothing=0.0, num_classes=5)
            images, soft = theirs(batch.images.clone(), batch.items.labels)
        mixed = CutMix().apply(batch, flipped(batch), ours)
        assert torch.equal(mixed.images, images)
        torch.testing.assert_close(mixed.soft_labels(5), soft.float(), rtol=0, atol=1e-6)


@given(boxes, seeds)
@settings(deadline=None)
def test_both_ways_of_pasting_are_one(box: tuple[int, ...], seed: int) -> None:
    y0, y1, x0, x1 = box
    one = torch.tensor([[y0, x0, y1 - y0, x1 - x0]])
    background, foreground = random_batch(seed), random_batch(seed + 1)
    assert same(paste(background, foreground, one), paste(background, foreground, one.expand(6, 4)))


# ---- all rules


def look(items: Items) -> Embedded:
    draw = generator(len(items))
    return Embedded(items, torch.randn(len(items), 4, generator=draw), torch.full((len(items), 5), 0.2).log())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "pairing", [IndexPairing(), WithinBatchPairing(), WithinBatchPairing(unimix_law(COUNTS, -0.5)), TransportPairing()]
)
def test_any_rule_goes_with_any_pairing(rule: str, pairing: Pairing) -> None:
    background, foreground = random_batch(1, 12), random_batch(2, 12)
    mixer: Mixer = RULES[rule]()
    moment = Moment(step=3)
    mixed = BatchMixer(pairing, mixer)(background, foreground, look, PairingContext(moment))
    assert mixed.pairs is not None
    source = foreground if pairing.from_foregrounds else background
    ours, theirs = background[mixed.pairs.background], source[mixed.pairs.foreground]
    again = mixer.apply(ours, theirs, mixer.draw(12, 9, 7, moment.generator("mix")))
    assert same(mixed, again)
    assert torch.equal(mixed.target.labels, torch.stack((ours.items.labels, theirs.items.labels), 1))


@given(
    st.sampled_from(sorted(RULES)),
    st.integers(1, 5),
    st.sampled_from([1, 3, 4]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([torch.float32, torch.bfloat16]),
    seeds,
)
@settings(deadline=None, max_examples=200)
def test_any_shape(rule: str, n: int, channels: int, height: int, width: int, dtype: torch.dtype, seed: int) -> None:
    background, foreground = (random_batch(seed + i, n, channels, height, width) for i in (0, 1))
    background, foreground = (Batch(b.items, b.images.to(dtype)) for b in (background, foreground))
    mixer = RULES[rule]()
    drawn = mixer.draw(n, height, width, generator(seed))
    mixed = mixer.apply(background, foreground, drawn)
    assert same(mixed, mixer.apply(background, foreground, drawn))
    assert mixed.images.shape == (n, channels, height, width)
    assert mixed.images.dtype == dtype
    assert mixed.image_share.dtype == mixed.target.shares.dtype == torch.float32
    for shares in (mixed.image_share, mixed.target.shares):
        assert bool(((shares >= 0) & (shares <= 1)).all())
    torch.testing.assert_close(mixed.target.shares.sum(1), torch.ones(n))
    # a pixel lies between the two it is made of (float32 but for rounding, bfloat16 has 8 bits)
    low = torch.minimum(background.images, foreground.images).float()
    high = torch.maximum(background.images, foreground.images).float()
    slack = 1e-6 if dtype == torch.float32 else 2**-7
    assert bool(((mixed.images.float() >= low - slack) & (mixed.images.float() <= high + slack)).all())


# ---- names


def test_rules_have_names() -> None:
    assert {"cutmix", "mixup", "saliencymix", "remix", "unimix"} <= PIXEL_RULES.keys()
    for name in ("cutmix", "mixup", "saliencymix", "remix", "unimix"):
        assert PIXEL_RULES[name].__name__.lower() == name


def test_registering_a_rule() -> None:
    try:

        @register_mixer("my_mixer2")
        class Mine(Mixup):
            pass

        assert PIXEL_RULES["my_mixer2"] is Mine
        with pytest.raises(ValueError, match="already a mixer named 'my_mixer2'"):
            register_mixer("my_mixer2")(Mixup)
    finally:
        PIXEL_RULES.pop("my_mixer2", None)


@pytest.mark.parametrize("name", ["", "ce+mine", "mine-drw", "Mine", "my mixer", "2mix", "_mix", "mine\n"])
def test_names_that_would_not_parse_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lower-case"):
        register_mixer(name)


def test_only_mixers_are_registered() -> None:
    class Half:
        def draw(self, n: int, height: int, width: int, generator: torch.Generator) -> None: ...

    wrong: Any = Half
    with pytest.raises(ValueError, match="lacks apply"):
        register_mixer("half")(wrong)
    assert "half" not in PIXEL_RULES
    with pytest.raises(ValueError, match="already"):
        register_mixer("cutmix")(Mixup)
