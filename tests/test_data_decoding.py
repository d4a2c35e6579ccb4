"""Every kind of image file becomes upright RGB or grey bytes; what cannot be read is named."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from otmix.data import FileSource, decode
from otmix.data.decoding import UnreadableImage, find_unreadable, in_threads, size_of
from otmix.errors import UserError

HINT = "delete it or pass --on-bad-image skip"


def picture(height: int = 6, width: int = 9, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def as_array(decoded: torch.Tensor) -> np.ndarray:
    assert decoded.dtype == torch.uint8
    return decoded.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "ppm", "pnm", "webp", "jp2"])
def test_lossless_colour(tmp_path: Path, ending: str) -> None:
    path = write(
        Image.fromarray(picture()), tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {})
    )
    assert np.array_equal(as_array(decode(path)), picture())


def test_grey_is_repeated_and_colour_becomes_luma(tmp_path: Path) -> None:
    grey = picture()[..., 0]
    path = write(Image.fromarray(grey), tmp_path / "grey.png")
    assert np.array_equal(as_array(decode(path)), np.stack([grey] * 3, axis=-1))
    assert np.array_equal(as_array(decode(path, channels=1))[..., 0], grey)
    path = write(Image.fromarray(picture()), tmp_path / "colour.png")
    luma = (picture() @ np.array([299, 587, 114])) / 1000
    assert np.abs(as_array(decode(path, channels=1))[..., 0] - luma).max() <= 0.51


def test_one_bit(tmp_path: Path) -> None:
    bits = picture()[..., 0] > 127
    path = write(Image.fromarray(bits), tmp_path / "bits.png")
    assert np.array_equal(as_array(decode(path, channels=1))[..., 0], bits * np.uint8(255))


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65000, 65406, 65535]], dtype=np.uint16)
    path = write(Image.fromarray(values), tmp_path / f"deep.{ending}")
    with Image.open(path) as image:
        assert image.mode.startswith("I")  # else this tests nothing
    assert np.array_equal(as_array(decode(path, channels=1))[..., 0], np.round(values / 257).astype(np.uint8))
    assert decode(path).shape == (3, 2, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    alpha = np.array([[0, 128, 255]], dtype=np.uint8)
    colour = np.full((1, 3, 3), 40, dtype=np.uint8)
    image = Image.fromarray(colour).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    decoded = as_array(decode(write(image, tmp_path / "a.png")))
    expected = alpha / 255 * 40 + (1 - alpha / 255) * 255
    assert np.abs(decoded - expected[..., None]).max() <= 1
    assert decoded[0, 0].tolist() == [255, 255, 255]


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    plain = as_array(decode(write(image, tmp_path / "plain.png")))
    assert plain.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    clear = as_array(decode(write(image, tmp_path / "clear.png", transparency=0)))
    assert clear.tolist() == [[[255, 255, 255], [200, 100, 50]]]
    assert decode(write(image, tmp_path / "a.gif")).shape == (3, 1, 2)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = write(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert as_array(decode(path))[0, 0].tolist() == [255, 0, 0]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    path = write(image.convert("CMYK"), tmp_path / "a.jpg", quality=95)
    assert np.abs(as_array(decode(path)).astype(int) - [200, 30, 60]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(image, tmp_path / "a.png", exif=exif)
    with Image.open(path) as opened:
        expected = np.array(ImageOps.exif_transpose(opened))
    decoded = as_array(decode(path))
    assert np.array_equal(decoded, expected)
    assert decoded.shape == ((9, 6, 3) if orientation >= 5 else (6, 9, 3))


def test_damaged_exif_does_not_lose_the_picture(tmp_path: Path) -> None:
    path = write(Image.fromarray(picture()), tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff")
    assert decode(path).shape == (3, 6, 9)


def test_large_jpegs_may_come_smaller_but_never_too_small(tmp_path: Path) -> None:
    smooth = Image.fromarray(picture(8, 12)).resize((1200, 800), Image.Resampling.BICUBIC)
    path = write(smooth, tmp_path / "a.jpg", quality=95)
    assert decode(path).shape == (3, 800, 1200)
    reduced = decode(path, at_least=150)
    assert 150 <= min(reduced.shape[1:]) < 300
    reference = np.array(smooth.resize((reduced.shape[2], reduced.shape[1]), Image.Resampling.BOX)).astype(int)
    assert np.abs(as_array(reduced) - reference).mean() < 3
    assert decode(path, at_least=801).shape == (3, 800, 1200)


@pytest.mark.parametrize(
    ("size", "at_least", "factor"), [((605, 400), 100, 4), ((301, 400), 100, 3), ((399, 640), 200, 1)]
)
def test_other_files_come_smaller_too_by_averages(
    tmp_path: Path, size: tuple[int, int], at_least: int, factor: int
) -> None:
    pixels = np.asarray(Image.fromarray(picture()).resize(size, Image.Resampling.BICUBIC))
    path = write(Image.fromarray(pixels), tmp_path / "a.png")
    reduced = as_array(decode(path, at_least=at_least))
    height, width = (side // factor for side in pixels.shape[:2])
    whole = pixels[: height * factor, : width * factor].astype(float)
    means = whole.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
    assert np.abs(reduced[:height, :width] - means).max() <= 0.6  # in fixed point
    assert reduced.shape[:2] == tuple(-(-side // factor) for side in pixels.shape[:2])
    assert min(reduced.shape[:2]) >= at_least


KINDS = ["RGB jpg", "L jpg", "CMYK jpg", "turned jpg", "RGB png", "L png", "P png", "RGBA png", "I;16 png", "RGB webp"]


def kind_of_file(kind: str, path: Path, size: tuple[int, int] = (500, 370)) -> Path:
    mode, ending = kind.split()
    image = Image.fromarray(picture(7, 9)).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if mode == "turned":
        exif[0x0112] = 6
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    return write(image, path.with_suffix(f".{ending}"), exif=exif)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_least", [None, 50, 92, 93, 185, 370, 371])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_header_tells_how_much_memory_it_takes(
    tmp_path: Path, kind: str, at_least: int | None, channels: int
) -> None:
    path = kind_of_file(kind, tmp_path / "a")
    source = FileSource(tmp_path, (path.name,), torch.tensor([0]), channels)
    read = source.read(0, at_least)
    assert source.nbytes(0, at_least) == read.nbytes
    assert min(read.shape[1:]) >= min(370, at_least or 370)
    assert size_of(path, at_least) in (tuple(read.shape[1:]), tuple(read.shape[:0:-1]))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_truncated_files_are_named(tmp_path: Path, ending: str) -> None:
    path = write(Image.fromarray(picture(64, 64)), tmp_path / f"cut.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"cut\.{ending} cannot be read as an image .*{HINT}"):
        decode(path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fake.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"fake\.png cannot be read as an image .*{HINT}"):
        decode(path)
    assert size_of(path) is None


def test_what_the_system_does_not_hand_out_is_not_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, pixels = tmp_path / "link.png", tmp_path / "kept.png"
    link.symlink_to("nowhere.png")
    with pytest.raises(UnreadableImage) as found:
        decode(link)
    said = "(No such file or directory); mend the link, which leads to nowhere.png, or pass --on-bad-image skip"
    assert str(found.value) == f"{link} cannot be read as an image {said}"
    write(Image.fromarray(picture()), pixels)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Image, "open", refuse)  # root may read anything
    with pytest.raises(UnreadableImage) as found:
        decode(pixels)
    said = "(Permission denied); give yourself the right to read it or pass --on-bad-image skip"
    assert str(found.value) == f"{pixels} cannot be read as an image {said}"
    assert find_unreadable(tmp_path, ["kept.png"]) == {0: "Permission denied"}


def test_a_large_photograph_is_one_and_a_larger_one_is_to_be_reduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(Image.fromarray(picture(20, 50)), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(path).shape == (3, 20, 50)
        assert size_of(path) is not None
    assert caught == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(path)
    huge = tmp_path / "huge.bmp"
    header = bytearray(write(Image.new("L", (8, 8)), huge).read_bytes())
    header[18:26] = (20_000).to_bytes(4, "little") + (10_000).to_bytes(4, "little")
    huge.write_bytes(header)
    monkeypatch.undo()
    with pytest.raises(UnreadableImage) as found:
        decode(huge)
    said = "(it has 200 million pixels; at most 178 million are decoded); reduce it or pass --on-bad-image skip"
    assert str(found.value) == f"{huge} cannot be read as an image {said}"
    assert size_of(huge) is None


def test_missing_file_and_odd_pixels_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png"):
        decode(tmp_path / "gone.png")
    floats = write(Image.fromarray(np.ones((2, 2), dtype=np.float32)), tmp_path / "f.tiff")
    with pytest.raises(UserError, match=r"f\.tiff .*floating-point"):
        decode(floats)
    deep = write(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)), tmp_path / "i.tiff")
    with pytest.raises(UserError, match=r"i\.tiff .*outside 0 … 65535"):
        decode(deep)


def test_messages_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "fake.jpg"
    path.write_bytes(b"\xff\xd8\xff" + b"\0" * 20)
    with pytest.raises(UserError) as caught:
        decode(path)
    assert "\n" not in str(caught.value)


def test_find_unreadable_names_the_places(tmp_path: Path) -> None:
    paths = [f"{i}.png" for i in range(100)]
    for i, name in enumerate(paths):
        write(Image.fromarray(picture(seed=i)), tmp_path / name)
    for bad in (3, 77):
        (tmp_path / paths[bad]).write_bytes(b"x")
    steps: list[tuple[int, int]] = []
    found = find_unreadable(tmp_path, paths, progress=lambda done, n: steps.append((done, n)))
    assert list(found) == [3, 77]
    assert steps[-1] == (100, 100)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_glance_finds_every_truncated_file(tmp_path: Path, kind: str, share: float) -> None:
    """It makes few pixels, and must not miss what reading them all would."""
    path = kind_of_file(kind, tmp_path / "a")
    assert find_unreadable(tmp_path, [path.name]) == {}
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError) as caught:
        decode(path)
    assert find_unreadable(tmp_path, [path.name]) == {0: str(caught.value.__cause__)}


def test_a_few_files_occupy_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    meeting = threading.Barrier(4, timeout=20)
    in_threads(lambda _: meeting.wait() * 0, 8)  # passes only where four tasks run at once


def test_threads_stop_soon_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    begun = []

    def task(i: int) -> None:
        begun.append(i)
        if i == 0:
            raise UserError("the first")
        time.sleep(0.01)

    with pytest.raises(UserError, match="the first"):
        in_threads(task, 3200)
    assert len(begun) < 64, "the other thread finished its block, and perhaps more"


def test_threads_raise_the_first_error_in_order() -> None:
    def task(i: int) -> None:
        if i in (40, 90):
            raise UserError(f"at {i}")

    with pytest.raises(UserError, match="at 40"):
        in_threads(task, 200)


def test_file_source_reads_selects_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(3):
        write(Image.fromarray(picture(seed=i)), tmp_path / "a" / f"{i}.png")
    source = FileSource(tmp_path, ("a/0.png", "a/1.png", "a/2.png"), torch.tensor([0, 1, 1]))
    chosen = source.select(torch.tensor([2, 0]))
    assert [chosen.name_of(i) for i in range(len(chosen))] == ["a/2.png", "a/0.png"]
    assert chosen.labels.tolist() == [1, 0]
    assert np.array_equal(as_array(chosen.read(0)), picture(seed=2))
    assert chosen.stamp(0) == str((tmp_path / "a/2.png").stat().st_size).encode()
    with pytest.raises(UserError, match="3 images need labels"):
        FileSource(tmp_path, source.paths, torch.tensor([0, 1]))
