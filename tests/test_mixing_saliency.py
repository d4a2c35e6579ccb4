"""Fine-grained saliency against plain loops and OpenCV's own, bit for bit, and SaliencyMix on top of it."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from otmix.errors import UserError
from otmix.mixing import CutMix, SaliencyMix, fine_grained_saliency, salient_peaks
from otmix.mixing.saliencymix import boxes_around
from otmix.mixing.share import draw_shares
from otmix.types import Batch, Items

Pixels = NDArray[np.uint8]
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_images(pixels: Pixels) -> Tensor:
    """`[B,H,W,3]` or `[B,H,W]` 8-bit RGB or grey -> `[B,C,H,W]` in [0, 1]."""
    rows = torch.from_numpy(pixels if pixels.ndim == 4 else pixels[..., None])
    return rows.permute(0, 3, 1, 2).float() / 255


def opencv(pixels: Pixels) -> NDArray[np.int64]:
    """OpenCV's map of each image, in levels 0 … 255."""
    detector = cv2.saliency.StaticSaliencyFineGrained_create()
    maps = [
        detector.computeSaliency(np.ascontiguousarray(image[..., ::-1] if image.ndim == 3 else image))[1]
        for image in pixels
    ]
    return np.rint(np.stack(maps) * 255).astype(np.int64)


def ours(pixels: Pixels) -> NDArray[np.int64]:
    maps = fine_grained_saliency(as_images(pixels))
    assert maps.dtype == torch.float32
    levels = maps.numpy() * 255
    assert np.abs(levels - np.rint(levels)).max(initial=0) < 1e-4
    return np.rint(levels).astype(np.int64)


def reference(image: Pixels) -> NDArray[np.int64]:
    """One image `[H,W,3]` or `[H,W]`, pixel by pixel, before sums above 255 start again at 0."""
    wide = image.astype(np.int64)
    if image.ndim == 3:
        wide = (9798 * wide[..., 0] + 19235 * wide[..., 1] + 3735 * wide[..., 2] + 2**14) // 2**15
    height, width = wide.shape

    def mirrored(i: int, n: int) -> int:
        return 0 if n == 1 else -i if i < 0 else 2 * n - 2 - i if i >= n else i

    for _ in range(2):
        smooth = np.zeros_like(wide)
        for y in range(height):
            for x in range(width):
                total = 0
                for dy, dx in np.ndindex(3, 3):
                    weight = (1, 2, 1)[dy] * (1, 2, 1)[dx]
                    total += weight * int(wide[mirrored(y + dy - 1, height), mirrored(x + dx - 1, width)])
                smooth[y, x] = (total + 8) // 16
        wide = smooth
    on, off = np.zeros_like(wide), np.zeros_like(wide)
    for reach in (3 * 4, 3 * 8, 3 * 16, 7 * 4, 7 * 8, 7 * 16):
        for y in range(height):
            for x in range(width):
                square = wide[max(y - reach + 1, 0) : y + reach + 1, max(x - reach + 1, 0) : x + reach + 1]
                if square.size > 1:
                    level = int(wide[y, x])
                    difference = level * square.size - int(square.sum())  # (level - mean of the others) * (size - 1)
                    on[y, x] += max(difference, 0) // (square.size - 1)
                    off[y, x] += max(-difference, 0) // (square.size - 1)
    parts = [side.astype(np.float32) / np.float32(max(side.max(), 1)) for side in (on, off)]
    return sum(np.floor(255.0 * part.astype(np.float64)).astype(np.int64) for part in parts)  # type: ignore[return-value]


def synthetic(seed: int, height: int, width: int, colours: bool, kind: str, n: int = 2) -> Pixels:
    draw = np.random.default_rng(seed)
    shape = (n, height, width, 3) if colours else (n, height, width)
    if kind == "noise":
        return draw.integers(0, 256, shape, dtype=np.uint8)
    if kind == "few levels":  # sums with many divisors: where float32 could round to the wrong side
        return (draw.integers(0, 3, shape) * draw.integers(1, 100)).astype(np.uint8)
    blobs = draw.integers(0, 256, (n, 3, 3, *shape[3:]), dtype=np.uint8)
    return np.repeat(np.repeat(blobs, -(-height // 3), 1), -(-width // 3), 2)[:, :height, :width]


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from(["noise", "few levels", "blobs"]))
@settings(deadline=None, max_examples=25)
def test_map_is_the_references(seed: int, height: int, width: int, colours: bool, kind: str) -> None:
    pixels = synthetic(seed, height, width, colours, kind)
    expected = np.stack([reference(image) % 256 for image in pixels])
    np.testing.assert_array_equal(ours(pixels), expected)


@given(
    seeds, st.integers(1, 130), st.integers(1, 130), st.booleans(), st.sampled_from(["noise", "few levels", "blobs"])
)
@settings(deadline=None, max_examples=60)
def test_map_is_opencvs(seed: int, height: int, width: int, colours: bool, kind: str) -> None:
    pixels = synthetic(seed, height, width, colours, kind)
    np.testing.assert_array_equal(ours(pixels), opencv(pixels))


def test_scaling_in_whole_numbers_is_opencvs_scaling_in_floats() -> None:
    """⌊255 m/M⌋ for all sums m <= M of six contrasts; OpenCV rounds m/M to float32, then multiplies in float64."""
    largest, value = np.arange(1, 6 * 255 + 1)[:, None], np.arange(6 * 255 + 1)
    theirs = np.floor(255.0 * (value.astype(np.float32) / largest.astype(np.float32)).astype(np.float64))
    np.testing.assert_array_equal(theirs[value <= largest], (255 * value // largest)[value <= largest])


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.sampled_from(["noise", "few levels", "blobs", "constant"]))
@settings(deadline=None)
def test_peaks_are_the_first_maxima(seed: int, height: int, width: int, kind: str) -> None:
    pixels = synthetic(seed, height, width, True, kind, 3) if kind != "constant" else np.full((3, height, width, 3), 7)
    images = as_images(pixels)
    expected = fine_grained_saliency(images).flatten(1).numpy().argmax(1)
    assert salient_peaks(images).tolist() == expected.tolist()


def crops(size: int, n: int) -> Pixels:
    """Square crops of two photographs."""
    draw, photographs = np.random.default_rng(size), load_sample_images().images
    found = []
    for i in range(n):
        photograph = photographs[i % 2]
        top, left = (int(draw.integers(side - size + 1)) for side in photograph.shape[:2])
        found.append(photograph[top : top + size, left : left + size])
    return np.stack(found)


REAL = {
    **{
        f"photographs {size}": crops(size, n)
        for size, n in ((32, 60), (48, 30), (64, 20), (96, 10), (160, 6), (224, 4))
    },
    "digits": np.rint(load_digits().images[:200] * (255 / 16)).astype(np.uint8),
}


@pytest.mark.parametrize("name", REAL)
def test_real_images(name: str) -> None:
    """The same map as OpenCV's; and, were a later OpenCV to round otherwise, the same peaks for all that matters."""
    mine, theirs = ours(REAL[name]), opencv(REAL[name])
    for a, b in zip(mine, theirs):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] >= 0.98
        assert b.ravel()[a.argmax()] >= 0.95 * b.max()
    # above 2^24 / 510 pixels OpenCV's sums, in float32, may be off by one
    allowed = 0.0 if mine[0].size < 2**24 / 510 else 1e-4
    assert (mine != theirs).mean() <= allowed
    assert np.abs(mine - theirs).max() <= 1


def test_a_sum_above_255_starts_again_at_0() -> None:
    """Where the pixel with the largest contrast of one sign has some of the other sign as well."""
    y, x = np.mgrid[:127, :127]
    distance = np.maximum(abs(y - 6), abs(x - 24))
    image = np.where(distance < 5, 232, np.where(distance < 25, 46, 17)).astype(np.uint8)
    expected = reference(image)
    assert expected.max() > 255
    np.testing.assert_array_equal(ours(image[None])[0], expected % 256)
    np.testing.assert_array_equal(opencv(image[None])[0], expected % 256)


def test_images_without_contrast_are_not_salient() -> None:
    for value in (0.0, 0.37, 1.0):
        assert torch.equal(fine_grained_saliency(torch.full((2, 3, 9, 11), value)), torch.zeros(2, 9, 11))
    assert fine_grained_saliency(torch.zeros(0, 3, 8, 8)).shape == (0, 8, 8)


def test_a_map_depends_on_its_own_image_alone_and_inputs_stay() -> None:
    images = as_images(REAL["photographs 48"][:5])
    kept = images.clone()
    together = fine_grained_saliency(images)
    for i in range(5):
        assert torch.equal(fine_grained_saliency(images[i : i + 1])[0], together[i])
    assert torch.equal(images, kept)
    assert torch.equal(fine_grained_saliency(images.to(memory_format=torch.channels_last)), together)


def test_grey_images_have_any_number_of_channels() -> None:
    grey = as_images(REAL["digits"][:8])
    expected = fine_grained_saliency(grey)
    for channels in (2, 3, 4):
        assert torch.equal(fine_grained_saliency(grey.expand(8, channels, 8, 8)), expected)


def test_half_precision_images_give_a_map_of_their_own_pixels() -> None:
    images = as_images(REAL["photographs 32"][:8]).bfloat16()
    assert torch.equal(fine_grained_saliency(images), fine_grained_saliency(images.float()))


@pytest.mark.gpu
def test_map_on_cuda_is_the_cpus_and_never_waits() -> None:
    for name in REAL:
        images = as_images(REAL[name])
        on_cuda = images.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            maps = fine_grained_saliency(on_cuda)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(maps.cpu(), fine_grained_saliency(images))


# ---- SaliencyMix


def batch(pixels: Pixels, first_label: int = 0) -> Batch:
    return Batch(Items(torch.arange(len(pixels)) + first_label), as_images(pixels))


def reference_box(peak: tuple[int, int], share: float, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left, right: the official code, in plain integers."""
    half_height, half_width = int(height * np.sqrt(1 - share)) // 2, int(width * np.sqrt(1 - share)) // 2
    y, x = peak
    return max(y - half_height, 0), min(y + half_height, height), max(x - half_width, 0), min(x + half_width, width)


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from(["batch", "image"]))
@settings(deadline=None, max_examples=40)
def test_saliencymix_pastes_around_the_peak_of_the_foreground(
    seed: int, height: int, width: int, colours: bool, per: Any
) -> None:
    n = 3
    back, fore = (synthetic(seed + i, height, width, colours, kind, n) for i, kind in ((0, "noise"), (1, "blobs")))
    mixer = SaliencyMix(1.0, per)
    drawn = mixer.draw(n, height, width, generator(seed))
    mixed = mixer.apply(batch(back), batch(fore, 10), drawn)
    shares = draw_shares(1.0, 1 if per == "batch" else n, generator(seed)).tolist()
    maps = opencv(fore)
    for i in range(n):
        source = 0 if per == "batch" else i
        y, x = divmod(int(maps[source].argmax()), width)
        top, bottom, left, right = reference_box((y, x), shares[source], height, width)
        expected = back[i].copy()
        expected[top:bottom, left:right] = fore[i, top:bottom, left:right]
        assert torch.equal(mixed.images[i], as_images(expected[None])[0])
        share = 1 - (bottom - top) * (right - left) / (height * width)
        assert float(mixed.image_share[i]) == pytest.approx(share, abs=1e-6)
        assert mixed.target.shares[i].tolist() == pytest.approx([share, 1 - share], abs=1e-6)
        assert mixed.target.labels[i].tolist() == [i, 10 + i]


def test_real_peaks_end_in_the_mix() -> None:
    fore = REAL["photographs 32"][:16]
    mixer = SaliencyMix()
    drawn = torch.full((16, 2), 8)
    mixed = mixer.apply(batch(np.zeros_like(fore)), batch(fore), drawn)
    for i, theirs in enumerate(opencv(fore)):
        y, x = divmod(int(theirs.argmax()), 32)
        assert torch.equal(mixed.images[i, :, y, x], as_images(fore)[i, :, y, x])
    assert bool((mixed.image_share >= 1 - 64 / 1024).all())


def test_boxes_around_corners_are_cut_off() -> None:
    sides = torch.tensor([[4, 6]]).expand(4, 2)
    peaks = torch.tensor([0, 8, 9 * 6, 9 * 7 - 1])  # of 7 rows of 9
    assert boxes_around(peaks, sides, 7, 9).tolist() == [[0, 0, 2, 3], [0, 5, 2, 4], [4, 0, 3, 3], [4, 5, 3, 4]]


def test_sides_are_those_of_clipped_cutmix_boxes() -> None:
    """Where nothing is cut off, which a box's largest sides show."""
    sides = SaliencyMix(1.0, "image").draw(4000, 32, 20, generator(0))
    boxes = CutMix(1.0, "clipped", "image").draw(4000, 32, 20, generator(0))[:, 2:]
    assert sides.dtype == torch.int64
    assert bool((boxes <= sides).all())
    whole = (boxes == sides).all(1)
    assert 0.1 < float(whole.double().mean()) < 0.9
    assert bool((sides % 2 == 0).all())


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_saliencymix_refuses_what_makes_no_beta(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha"):
        SaliencyMix(alpha)
    wrong: Any = "row"
    with pytest.raises(UserError, match="'row'"):
        SaliencyMix(per=wrong)


def test_sides_of_another_batch_are_refused() -> None:
    one = batch(REAL["digits"][:6])
    with pytest.raises(ValueError, match="drawn for 3 images"):
        SaliencyMix().apply(one, one, torch.full((3, 2), 4))
    with pytest.raises(ValueError, match="as many and of one size"):
        SaliencyMix().apply(one, one[:5], torch.full((6, 2), 4))
