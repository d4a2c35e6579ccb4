"""CutMix and Mixup (eq. 1, 9, 11): what is pasted, what the shares say of it, and torchvision's own as peers; and what
holds for every mixer. The rules of single papers: test_mixing_rules.py, test_mixing_saliency.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_law
from scipy.stats import chisquare, kstest
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from otmix.errors import UserError
from otmix.mixing import CutMix, Mixer, Mixup, Remix, SaliencyMix, UniMix, leave_unmixed
from otmix.mixing.cutmix import clipped_boxes, exact_boxes
from otmix.mixing.share import draw_shares
from otmix.types import Batch, ClassCounts, Items, Mixed, Target

COUNTS = ClassCounts(torch.tensor([500, 150, 50, 17, 5]))
MIXERS: list[Mixer] = [
    CutMix(),
    CutMix(box="clipped"),
    CutMix(per="image"),
    CutMix(box="clipped", per="image"),
    Mixup(),
    Mixup(per="image"),
    SaliencyMix(),
    SaliencyMix(per="batch"),
    Remix(COUNTS),
    Remix(COUNTS, per="image"),
    UniMix(COUNTS),
]
sides = st.integers(1, 40)
alphas = st.floats(0.01, 100)
seeds = st.integers(0, 2**32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant(value: float, n: int, height: int, width: int, label: int = 0) -> Batch:
    return Batch(Items(torch.full((n,), label)), torch.full((n, 3, height, width), value))


def random_batch(seed: int, n: int = 6, height: int = 9, width: int = 7, classes: int = 5) -> Batch:
    draw = generator(seed)
    labels = torch.randint(classes, (n,), generator=draw)
    return Batch(Items(labels, torch.arange(n)), torch.rand(n, 3, height, width, generator=draw))


def same(a: Mixed, b: Mixed) -> bool:
    pairs = [(a.images, b.images), (a.target.labels, b.target.labels), (a.target.shares, b.target.shares)]
    return all(torch.equal(x, y) for x, y in [*pairs, (a.image_share, b.image_share), (a.mixed, b.mixed)])


# ---- the law of λ


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0, 30.0, 1e4])
def test_shares_follow_beta(alpha: float) -> None:
    shares = draw_shares(alpha, 20_000, generator(0))
    assert shares.dtype == torch.float64
    assert kstest(shares.numpy(), beta_law(alpha, alpha).cdf).pvalue > 1e-3


def test_shares_drawn_one_by_one_follow_beta_too() -> None:
    """One share and many are drawn in different ways."""
    draw = generator(0)
    shares = torch.cat([draw_shares(0.8, 1, draw) for _ in range(2000)])
    assert kstest(shares.numpy(), beta_law(0.8, 0.8).cdf).pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 20])
@given(st.floats(1e-6, 1e6), seeds)
@settings(deadline=None)
def test_shares_are_shares_for_any_alpha(n: int, alpha: float, seed: int) -> None:
    shares = draw_shares(alpha, n, generator(seed))
    assert shares.shape == (n,)
    assert bool(((shares >= 0) & (shares <= 1)).all())


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_must_make_a_beta(alpha: float) -> None:
    for kind in (CutMix, Mixup):
        with pytest.raises(UserError, match="alpha"):
            kind(alpha=alpha)


def test_unknown_settings_are_refused() -> None:
    wrong: Any = "row"
    with pytest.raises(UserError, match="'row'"):
        CutMix(box=wrong)
    with pytest.raises(UserError, match="'row'"):
        CutMix(per=wrong)
    with pytest.raises(UserError, match="'row'"):
        Mixup(per=wrong)


# ---- boxes


@given(sides, sides, alphas, st.sampled_from(["exact", "clipped"]), st.sampled_from(["batch", "image"]), seeds)
@settings(deadline=None, max_examples=200)
def test_boxes_lie_in_the_image_and_shares_are_the_pixels(
    height: int, width: int, alpha: float, box: Any, per: Any, seed: int
) -> None:
    n = 5
    mixer = CutMix(alpha, box, per)
    drawn = mixer.draw(n, height, width, generator(seed))
    assert drawn.shape == ((1 if per == "batch" else n), 4)
    assert drawn.dtype == torch.int64
    assert bool((drawn >= 0).all())
    assert bool((drawn[:, :2] + drawn[:, 2:] <= torch.tensor([height, width])).all())
    mixed = mixer.apply(constant(1.0, n, height, width, label=3), constant(0.0, n, height, width, label=1), drawn)
    kept = mixed.images.mean((1, 2, 3))  # the background is 1, the foreground 0
    torch.testing.assert_close(mixed.image_share, kept, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed.target.shares, torch.stack((kept, 1 - kept), 1), rtol=0, atol=1e-6)
    assert mixed.target.labels.tolist() == [[3, 1]] * n
    assert bool(mixed.mixed.all())
    assert mixed.pairs is None


@given(sides, sides, st.floats(0, 1), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_exact_box_is_equation_11(height: int, width: int, share: float, y: float, x: float) -> None:
    one = torch.tensor([share], dtype=torch.float64)
    where = torch.tensor([[y, x]], dtype=torch.float64)
    top, left, box_height, box_width = exact_boxes(one, where, height, width)[0].tolist()
    # the exact sides, but for at most half a pixel
    assert abs(box_height - height * math.sqrt(1 - share)) <= 0.5
    assert abs(box_width - width * math.sqrt(1 - share)) <= 0.5
    assert 0 <= top <= height - box_height
    assert 0 <= left <= width - box_width


@pytest.mark.parametrize(("share", "extent"), [(0.0, (8, 12)), (1.0, (0, 0)), (0.75, (4, 6))])
def test_exact_box_at_named_shares(share: float, extent: tuple[int, int]) -> None:
    box = exact_boxes(torch.tensor([share]).double(), torch.tensor([[0.999, 0.999]]).double(), 8, 12)[0].tolist()
    assert tuple(box[2:]) == extent
    assert box[:2] == [8 - extent[0], 12 - extent[1]]  # the last place there is


def test_exact_boxes_are_uniform_among_their_places() -> None:
    n = 20_000
    share = torch.full((n,), 0.75, dtype=torch.float64)
    boxes = exact_boxes(share, torch.rand(n, 2, generator=generator(0), dtype=torch.float64), 8, 6)
    places = torch.bincount(boxes[:, 0] * 4 + boxes[:, 1], minlength=20)
    assert len(places) == (8 - 4 + 1) * (6 - 3 + 1)
    assert chisquare(places.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("box", "places"), [("exact", 3 * 3), ("clipped", 8 * 6)])
def test_each_image_of_a_batch_has_a_box_at_a_place_of_its_own(box: Any, places: int) -> None:
    """Of one draw, and all of one size: 6 x 4 in 8 x 6, or 4 x 4 around any pixel where what sticks out is cut off."""
    boxes = CutMix(1e6, box, "image").draw(40_000, 8, 6, generator(0))
    kinds, place = boxes.unique(dim=0, return_inverse=True)
    assert len(kinds) == places
    assert kinds[:, 2:].amax(0).tolist() == ([6, 4] if box == "exact" else [4, 4])
    assert chisquare(torch.bincount(place).numpy()).pvalue > 1e-3
    pairs = place[::2] * places + place[1::2]  # the place of one image says nothing of the next one's
    assert chisquare(torch.bincount(pairs, minlength=places**2).numpy()).pvalue > 1e-3


def reference_box(share: float, y: int, x: int, height: int, width: int) -> list[int]:
    """Released code, in plain integers: sides rounded down, half of them (rounded down) on each side, clipped."""
    half_height, half_width = int(height * math.sqrt(1 - share)) // 2, int(width * math.sqrt(1 - share)) // 2
    top, left = max(y - half_height, 0), max(x - half_width, 0)
    return [top, left, min(y + half_height, height) - top, min(x + half_width, width) - left]


@given(sides, sides, st.floats(0, 1), st.data())
@settings(deadline=None)
def test_clipped_box_is_the_released_code(height: int, width: int, share: float, data: st.DataObject) -> None:
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    position = torch.tensor([[(y + 0.5) / height, (x + 0.5) / width]], dtype=torch.float64)
    box = clipped_boxes(torch.tensor([share], dtype=torch.float64), position, height, width)[0].tolist()
    assert box == reference_box(share, y, x, height, width)


def test_clipped_boxes_of_an_oblong_image_keep_its_shape() -> None:
    share, centre = torch.tensor([0.75]).double(), torch.tensor([[0.5, 0.5]]).double()
    assert clipped_boxes(share, centre, 40, 8)[0].tolist() == [10, 2, 20, 4]
    assert exact_boxes(share, torch.zeros(1, 2).double(), 40, 8)[0].tolist() == [0, 0, 20, 4]


@pytest.mark.parametrize(("box", "mean", "deviation"), [("clipped", 0.69, 0.13), ("exact", 0.50, 1 / 6)])
def test_share_that_backgrounds_keep_on_average(box: Any, mean: float, deviation: float) -> None:
    # Beta(4, 4) has mean 1/2 and standard deviation 1/6; clipping leaves more of the background
    boxes = CutMix(4.0, box, "image").draw(40_000, 32, 32, generator(0))
    share = 1 - (boxes[:, 2] * boxes[:, 3]).double() / 32**2
    assert float(share.mean()) == pytest.approx(mean, abs=0.005)
    assert float(share.std()) == pytest.approx(deviation, abs=0.01)


# ---- torchvision as a peer: the batch with itself, rolled by one


def rolled(batch: Batch) -> Batch:
    return batch[torch.arange(len(batch)).roll(1)]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 7), st.integers(0, 7), seeds)
@settings(deadline=None)
def test_cutmix_is_torchvisions(y0: int, y1: int, x0: int, x1: int, seed: int) -> None:
    (top, bottom), (left, right) = sorted((y0, y1)), sorted((x0, x1))

    class Given(v2.CutMix):
        def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            share = 1.0 - (bottom - top) * (right - left) / (9 * 7)
            return {"box": (left, top, right, bottom), "lam_adjusted": share}

    batch = random_batch(seed)
    images, soft = Given(num_classes=5)(batch.images, batch.items.labels)
    one_box = torch.tensor([[top, left, bottom - top, right - left]])
    for mixed in (
        CutMix().apply(batch, rolled(batch), one_box),
        CutMix(per="image").apply(batch, rolled(batch), one_box.expand(6, 4)),
    ):
        assert torch.equal(mixed.images, images)
        torch.testing.assert_close(mixed.soft_labels(5), soft)


@given(st.floats(0, 1), seeds)
@settings(deadline=None)
def test_mixup_is_torchvisions(share: float, seed: int) -> None:
    class Given(v2.MixUp):
        def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
            return {"lam": share}

    batch = random_batch(seed)
    images, soft = Given(num_classes=5)(batch.images, batch.items.labels)
    drawn = torch.tensor([share], dtype=torch.float64)
    for mixed in (
        Mixup().apply(batch, rolled(batch), drawn),
        Mixup(per="image").apply(batch, rolled(batch), drawn.expand(6)),
    ):
        torch.testing.assert_close(mixed.images, images)
        torch.testing.assert_close(mixed.soft_labels(5), soft)


# ---- every mixer


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_same_draw_same_mix_and_inputs_untouched(mixer: Mixer) -> None:
    background, foreground = random_batch(1), random_batch(2)
    before = background.images.clone(), foreground.images.clone()
    drawn = mixer.draw(6, 9, 7, generator(3))
    kept = drawn.clone()
    mixed = mixer.apply(background, foreground, drawn)
    assert torch.equal(drawn, mixer.draw(6, 9, 7, generator(3)))
    assert not torch.equal(drawn, mixer.draw(6, 9, 7, generator(4)))
    assert same(mixed, mixer.apply(background, foreground, drawn))
    mixed.images.zero_()  # a mix that shared memory with its inputs would wipe them
    assert torch.equal(background.images, before[0])
    assert torch.equal(foreground.images, before[1])
    assert torch.equal(drawn, kept)


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_one_draw_per_batch_or_per_image(mixer: Any) -> None:
    mixed = mixer.apply(constant(1.0, 64, 32, 32), constant(0.0, 64, 32, 32), mixer.draw(64, 32, 32, generator(0)))
    per = "image" if isinstance(mixer, UniMix) else mixer.per
    assert (len(mixed.image_share.unique()) > 1) == (per == "image")
    torch.testing.assert_close(mixed.images.mean((1, 2, 3)), mixed.image_share)


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_apply_never_reads_a_device(mixer: Mixer) -> None:
    """Images and labels on `meta` have no values: whatever asks for one raises."""
    items = Items(torch.zeros(4, dtype=torch.int64, device="meta"))
    batch = Batch(items, torch.zeros(4, 3, 8, 8, device="meta"))
    mixed = mixer.apply(batch, batch, mixer.draw(4, 8, 8, generator(0)))
    mixed = leave_unmixed(mixed, batch, torch.tensor([True, False, True, False]))
    assert mixed.images.device.type == mixed.target.shares.device.type == "meta"
    assert mixed.images.shape == (4, 3, 8, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_apply_on_cuda_does_not_wait_and_agrees(mixer: Mixer) -> None:
    background, foreground = random_batch(1), random_batch(2)
    drawn = mixer.draw(6, 9, 7, generator(0))
    on_cuda = [Batch(batch.items.to("cuda"), batch.images.cuda()) for batch in (background, foreground)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed = mixer.apply(*on_cuda, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = mixer.apply(background, foreground, drawn)
    torch.testing.assert_close(mixed.images.cpu(), expected.images)
    torch.testing.assert_close(mixed.target.shares.cpu(), expected.target.shares)


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_layout_and_precision_of_images_are_kept(mixer: Mixer) -> None:
    drawn = mixer.draw(6, 9, 7, generator(0))
    for dtype in (torch.float64, torch.bfloat16):
        pair = [random_batch(seed) for seed in (1, 2)]
        pair = [Batch(b.items, b.images.to(dtype, memory_format=torch.channels_last)) for b in pair]
        mixed = mixer.apply(pair[0], pair[1], drawn)
        assert mixed.images.dtype == dtype
        assert mixed.images.is_contiguous(memory_format=torch.channels_last)
        assert mixed.image_share.dtype == mixed.target.shares.dtype == torch.float32


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_batches_must_be_paired_and_drawn_for(mixer: Mixer) -> None:
    drawn = mixer.draw(6, 9, 7, generator(0))
    with pytest.raises(ValueError, match="as many and of one size"):
        mixer.apply(random_batch(0), random_batch(1)[:5], drawn)
    with pytest.raises(ValueError, match="as many and of one size"):
        mixer.apply(random_batch(0), random_batch(1, height=7), drawn)
    with pytest.raises(ValueError, match="drawn for 3 images"):
        mixer.apply(random_batch(0), random_batch(1), drawn[:1].repeat_interleave(3, 0))


@pytest.mark.parametrize("box", [[0, 0, 10, 8], [8, 6, 3, 3], [-2, -1, 4, 4], [9, 7, 2, 2], [3, 3, -1, 2]])
def test_a_box_of_another_image_counts_for_what_it_covers(box: list[int]) -> None:
    background, foreground = constant(1.0, 2, 9, 7), constant(0.0, 2, 9, 7)
    top, left, height, width = box
    inside = [(y, x) for y in range(9) for x in range(7) if 0 <= y - top < height and 0 <= x - left < width]
    for drawn in (torch.tensor([box]), torch.tensor([box, box])):
        mixed = CutMix().apply(background, foreground, drawn)
        assert torch.nonzero(mixed.images[1, 0] == 0).tolist() == [list(pixel) for pixel in inside]
        torch.testing.assert_close(mixed.image_share, torch.full((2,), 1 - len(inside) / 63))


# ---- the loss of a mix


@pytest.mark.parametrize(
    ("mixer", "all_background", "all_foreground"),
    [
        (CutMix(), torch.tensor([[4, 4, 0, 0]]), torch.tensor([[0, 0, 9, 7]])),
        (Mixup(), torch.tensor([1.0]).double(), torch.tensor([0.0]).double()),
    ],
)
def test_a_whole_share_is_one_images_loss(mixer: Mixer, all_background: Any, all_foreground: Any) -> None:
    background, foreground = random_batch(1), random_batch(2)
    weight = torch.randn(3 * 9 * 7, 5, generator=generator(0))

    def per_image(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output, labels, reduction="none")

    for drawn, alone in ((all_background, background), (all_foreground, foreground)):
        mixed = mixer.apply(background, foreground, drawn)
        assert torch.equal(mixed.images, alone.images)
        output = mixed.images.flatten(1) @ weight
        torch.testing.assert_close(mixed.loss(per_image, output), cross_entropy(output, alone.items.labels))


@pytest.mark.parametrize("mixer", MIXERS, ids=repr)
def test_loss_is_the_soft_label_loss_and_refuses_a_mean(mixer: Mixer) -> None:
    mixed = mixer.apply(random_batch(1), random_batch(2), mixer.draw(6, 9, 7, generator(0)))
    output = torch.randn(6, 5, generator=generator(1))
    two_terms = mixed.loss(lambda out, labels: cross_entropy(out, labels, reduction="none"), output)
    torch.testing.assert_close(two_terms, cross_entropy(output, mixed.soft_labels(5)))
    with pytest.raises(ValueError, match="reduction='none'"):
        mixed.loss(cross_entropy, output)


# ---- Table 7: a part of a batch stays as it is


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from(MIXERS), seeds)
@settings(deadline=None)
def test_leave_unmixed(mask: list[bool], mixer: Mixer, seed: int) -> None:
    background, foreground, plain = random_batch(seed), random_batch(seed + 1), random_batch(seed + 2)
    whole = mixer.apply(background, foreground, mixer.draw(6, 9, 7, generator(seed)))
    part = leave_unmixed(whole, plain, torch.tensor(mask))
    assert part.mixed.tolist() == mask
    for i, kept in enumerate(mask):
        if kept:
            assert torch.equal(part.images[i], whole.images[i])
            assert torch.equal(part.target.labels[i], whole.target.labels[i])
            assert torch.equal(part.target.shares[i], whole.target.shares[i])
            assert part.image_share[i] == whole.image_share[i]
        else:
            own = int(plain.items.labels[i])
            assert torch.equal(part.images[i], plain.images[i])
            assert part.target.labels[i].tolist() == [own, own]
            assert part.target.shares[i].tolist() == [1.0, 0.0]
            assert part.image_share[i] == 1.0


def test_leave_unmixed_of_unmixed_and_of_single_labels() -> None:
    batch = random_batch(0)
    plain = Mixed.unmixed(batch)
    assert same(leave_unmixed(plain, batch, torch.ones(6, dtype=torch.bool)), plain)  # cannot become mixed
    none = leave_unmixed(plain, batch, torch.zeros(6, dtype=torch.bool))
    assert torch.equal(none.target.shares, Target.hard(batch.items.labels).shares)


def test_leave_unmixed_refuses_what_does_not_fit() -> None:
    whole = Mixed.unmixed(random_batch(0))
    with pytest.raises(ValueError, match="as many"):
        leave_unmixed(whole, random_batch(0)[:4], torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="as many"):
        leave_unmixed(whole, random_batch(0), torch.ones(4, dtype=torch.bool))
