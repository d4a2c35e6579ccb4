"""Crops, flips and resizing, against slow references and torchvision."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from otmix.data import ShiftFlip, WindowFlip, decode, to_square
from otmix.data.augmentation import apply_shift_flip, apply_window, draw_window, prepare
from otmix.data.resizing import side_needed


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def slow_shift_flip(images: torch.Tensor, drawn: torch.Tensor, padding: int) -> torch.Tensor:
    """Pixel by pixel, zeros outside."""
    n, _, height, width = images.shape
    out = torch.zeros_like(images)
    for i in range(n):
        top, left, mirror = drawn[i].tolist()
        for y in range(height):
            for x in range(width):
                row = y + top - padding
                column = (width - 1 - x if mirror else x) + left - padding
                if 0 <= row < height and 0 <= column < width:
                    out[i, :, y, x] = images[i, :, row, column]
    return out


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.integers(0, 99)
)
def test_shift_flip_against_pixel_loops(
    n: int, channels: int, height: int, width: int, padding: int, seed: int
) -> None:
    images = pixels(n, channels, height, width, seed=seed)
    augmentation = ShiftFlip(padding)
    drawn = augmentation.draw(n, torch.Generator().manual_seed(seed))
    assert torch.equal(augmentation.apply(images, drawn), slow_shift_flip(images, drawn, padding))


def test_shift_flip_leaves_the_middle_alone() -> None:
    images = pixels(4, 3, 8, 8)
    still = torch.tensor([[2, 2, 0]] * 4)
    assert torch.equal(apply_shift_flip(images, still, 2), images)
    assert torch.equal(apply_shift_flip(images.float(), still, 2), images.float())


def test_shift_flip_draws_are_uniform_and_replayable() -> None:
    draw = ShiftFlip(4).draw(18_000, torch.Generator().manual_seed(0))
    for column, values in ((0, 9), (1, 9), (2, 2)):
        share = torch.bincount(draw[:, column], minlength=values) / len(draw)
        assert len(share) == values
        assert float((share - 1 / values).abs().max()) < 0.02
    assert torch.equal(draw, ShiftFlip(4).draw(18_000, torch.Generator().manual_seed(0)))
    assert not torch.equal(draw, ShiftFlip(4).draw(18_000, torch.Generator().manual_seed(1)))


def test_no_flip_keeps_the_shifts() -> None:
    with_flip, without = (ShiftFlip(1, flip).draw(50, torch.Generator().manual_seed(0)) for flip in (True, False))
    assert torch.equal(with_flip[:, :2], without[:, :2])
    assert int(with_flip[:, 2].sum()) > 0
    assert int(without[:, 2].sum()) == 0


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10_000))
def test_windows_lie_inside(height: int, width: int, seed: int) -> None:
    drawn = WindowFlip(64).draw(height, width, torch.Generator().manual_seed(seed))
    assert drawn.height >= 1
    assert drawn.width >= 1
    assert 0 <= drawn.top <= height - drawn.height
    assert 0 <= drawn.left <= width - drawn.width


def test_windows_have_the_law_of_torchvision() -> None:
    height, width, scale, ratio = 300, 400, (0.2, 1.0), (3 / 4, 4 / 3)
    random = torch.Generator().manual_seed(0)
    ours = [draw_window(height, width, scale, ratio, True, random) for _ in range(4000)]
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        crop = v2.RandomResizedCrop(8, scale, ratio)
        theirs = [crop.make_params([image]) for _ in range(4000)]
    for measure in ("top", "left", "height", "width"):
        a = torch.tensor([float(getattr(w, measure)) for w in ours])
        b = torch.tensor([float(w[measure]) for w in theirs])
        deviation = float((a.mean() - b.mean()) / (b.std() * math.sqrt(2 / 4000)))
        assert abs(deviation) < 4, measure
        assert abs(float(a.std() / b.std()) - 1) < 0.06, measure
    assert abs(sum(w.mirror for w in ours) / 4000 - 0.5) < 0.04
    assert not any(draw_window(height, width, scale, ratio, False, random).mirror for _ in range(50))


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10)])
def test_extreme_shapes_fall_back_to_the_centre(height: int, width: int) -> None:
    drawn = draw_window(height, width, (0.9, 1.0), (3 / 4, 4 / 3), True, torch.Generator().manual_seed(0))
    assert (drawn.height, drawn.width) == ((10, 13) if height < width else (13, 10))
    assert drawn.top == (height - drawn.height) // 2
    assert drawn.left == (width - drawn.width) // 2


def test_apply_window_is_crop_resize_flip() -> None:
    image = pixels(3, 90, 120)
    drawn = draw_window(90, 120, (0.2, 0.5), (1.0, 1.0), True, torch.Generator().manual_seed(3))
    part = image[:, drawn.top : drawn.top + drawn.height, drawn.left : drawn.left + drawn.width]
    expected = v2.functional.resize(part, [70, 70], antialias=True)
    out = apply_window(image, drawn, 70)
    assert out.dtype == torch.uint8
    assert torch.equal(out, expected.flip(-1) if drawn.mirror else expected)


def test_the_smallest_window_is_not_enlarged_when_read_reduced() -> None:
    augmentation = WindowFlip(64, scale=(0.2, 1.0))
    side = augmentation.side_needed
    for seed in range(500):
        drawn = augmentation.draw(side, side, torch.Generator().manual_seed(seed))
        assert min(drawn.height, drawn.width) >= 64 - 1  # rounding


def test_prepare_without_chance_is_the_evaluation_view() -> None:
    image = pixels(3, 100, 80)
    augmentation = WindowFlip(72)
    random = torch.Generator().manual_seed(0)
    assert torch.equal(prepare(image, 72, augmentation, None), to_square(image, 72))
    assert torch.equal(prepare(image, 72, None, random), to_square(image, 72))
    assert not torch.equal(prepare(image, 72, augmentation, random), to_square(image, 72))


def test_small_squares_are_area_averages() -> None:
    images = pixels(5, 3, 32, 32)
    blocks = images.float().reshape(5, 3, 16, 2, 16, 2).mean(dim=(3, 5)).round().to(torch.uint8)
    assert torch.equal(to_square(images, 16), blocks)
    assert torch.equal(to_square(images[0], 16), blocks[0])
    assert to_square(images, 32) is images


def test_small_squares_take_the_centre_and_can_grow() -> None:
    wide = torch.zeros(1, 8, 20, dtype=torch.uint8)
    wide[:, :, 6:14] = 200
    assert torch.equal(to_square(wide, 4), torch.full((1, 4, 4), 200, dtype=torch.uint8))
    ramp = torch.arange(0, 80, 10, dtype=torch.uint8).expand(1, 8, 8)
    grown = to_square(ramp, 16)
    assert grown.shape == (1, 16, 16)
    assert len(grown[0, 0].unique()) > 8  # interpolated, not repeated


@pytest.mark.parametrize(("height", "width"), [(300, 200), (200, 300), (50, 70)])
def test_large_squares_are_the_usual_evaluation(height: int, width: int) -> None:
    image = pixels(3, height, width)
    usual = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(to_square(image, 224), usual(image))


def test_side_needed_is_never_below_what_is_resized_to() -> None:
    assert side_needed(32) == side_needed(64) == 512
    assert side_needed(224) == 512


@pytest.mark.parametrize("size", [16, 64, 72, 224])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_reading_reduced_changes_little(tmp_path: Path, size: int, ending: str) -> None:
    """Against the whole picture, in levels of 256, where detail is as strong as in photographs (1/frequency)."""
    random = np.random.default_rng(0)
    scene = np.zeros((1200, 1800, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = random.integers(0, 256, (cells, cells * 3 // 2, 3), dtype=np.uint8)
        scene += np.asarray(Image.fromarray(noise).resize((1800, 1200), Image.Resampling.BICUBIC)) / cells
    Image.fromarray(scene.astype(np.uint8)).save(tmp_path / f"a.{ending}", quality=95)
    whole = decode(tmp_path / f"a.{ending}")
    reduced = decode(tmp_path / f"a.{ending}", at_least=side_needed(size))
    assert reduced.shape[1] < whole.shape[1]
    difference = (to_square(reduced, size).int() - to_square(whole, size).int()).abs().float()
    assert float(difference.mean()) < 1
    assert int(difference.max()) <= 8
