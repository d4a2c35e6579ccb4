"""Image files of any kind become uint8 `[C,H,W]`: greyscale, palette, 16-bit, transparent, CMYK, turned by EXIF."""

from __future__ import annotations

import errno
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from otmix.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]
"""Told (done, of how many) now and then, in the calling thread."""

_JPEG, _NETPBM = (".jpg", ".jpeg", ".jpe", ".jfif"), (".ppm", ".pgm", ".pnm")
IMAGE_ENDINGS = frozenset((*_JPEG, *_NETPBM, ".png", ".bmp", ".webp", ".avif", ".tif", ".tiff", ".gif", ".jp2"))
_BROKEN = (OSError, SyntaxError, ValueError, IndexError, KeyError, EOFError, OverflowError, struct.error, zlib.error)
_BLOCK = 32  # files per task: a task costs as much as decoding a thumbnail
GLANCE = 64  # pixels of the shorter side that are enough to know whether a file can be read


def decode(path: str | Path, channels: int = 3, at_least: int | None = None) -> Tensor:
    """The first frame of an image file, uint8 `[channels,H,W]` with 3 (RGB) or 1 (grey, ITU-R 601) channels.

    It is turned upright as its EXIF says; transparent pixels are laid on white; grey of 16 bits, v, becomes
    round(v / 257), colour its upper byte.
    With `at_least`, it comes reduced by a whole number, its shorter side still that long: a JPEG by 2, 4 or 8 while it
    is decoded, which is several times faster on photographs, and what is left to do by averages over squares. Raises
    UserError that names the file when it cannot be read.
    """
    from PIL import Image

    try:
        with _open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            pixels = _pixels(_upright(image), channels, at_least)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


class UnreadableImage(UserError):
    """An image file cannot be read; `reason` says why without naming it."""

    reason: str


def unreadable(path: str | Path, error: Exception) -> UnreadableImage:
    """What to tell the user of an error in reading an image file: why, and what to do about it."""
    reason, advice = _why(Path(path), error)
    told = UnreadableImage(f"{path} cannot be read as an image ({reason}); {advice} or pass --on-bad-image skip")
    told.reason = reason
    return told


def _why(path: Path, error: Exception) -> tuple[str, str]:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))  # Pillow says it in words only
        many = "too many pixels" if pixels is None else f"{int(pixels[0]) / 1e6:,.0f} million pixels"
        return f"it has {many}; at most {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million are decoded", "reduce it"
    if isinstance(error, UnidentifiedImageError):
        return "not an image", "delete it"
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return str(error) or repr(error), "delete it"
    # the file may be well, but the system does not hand it out
    if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
        return error.strerror, f"mend the link, which leads to {path.readlink()},"
    if error.errno in (errno.EACCES, errno.EPERM):
        return error.strerror, "give yourself the right to read it"
    return error.strerror, "restore it" if error.errno == errno.ENOENT else "see to it that it can be read"


def _open(path: str | Path) -> Image:
    """The image without its pixels, and without Pillow's warning of photographs of more than 89 million."""
    from PIL import Image

    # each time, for whoever catches warnings meanwhile takes the filter back; threads cannot catch them here
    if not any(category is Image.DecompressionBombWarning for _, _, category, *_ in warnings.filters):
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image.open(path)


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    with suppress(*_BROKEN):  # a picture with a damaged EXIF block is still a picture; its pixels are loaded already
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _pixels(image: Image, channels: int, at_least: int | None) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """`[H,W,channels]`, writable."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError("its pixels lie outside 0 … 65535; convert it to 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if (factor := _reduction(image.size, at_least)) > 1:
        image = image.reduce(factor)
    pixels = np.array(image)
    return pixels.reshape(*pixels.shape[:2], channels)


def _reduction(size: tuple[int, int], at_least: int | None) -> int:
    return 1 if at_least is None else max(1, min(size) // at_least)


def size_of(path: str | Path, at_least: int | None = None) -> tuple[int, int] | None:
    """The two sides that `decode` gives, in either order, from the file's header alone; None where it has no readable
    one."""
    from PIL import Image

    try:
        with _open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            factor = _reduction(image.size, at_least)
            return -(-image.width // factor), -(-image.height // factor)
    except (*_BROKEN, Image.DecompressionBombError):
        return None


def in_threads(task: Callable[[int], object], n: int, progress: Progress | None = None) -> None:
    """`task(i)` for i < n, on all cores in blocks of neighbours. The first error by place in the sequence is raised."""
    threads = min(16, os.cpu_count() or 1)
    size = max(1, min(_BLOCK, n // (4 * threads)))  # a few large files must occupy all threads too
    stop = threading.Event()

    def block(start: int) -> None:
        for i in range(start, min(start + size, n)):
            if stop.is_set():
                return
            task(i)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for number, _ in enumerate(pool.map(block, range(0, n, size)), start=1):
                if progress is not None:
                    progress(min(number * size, n), n)
        finally:
            stop.set()  # after an error or Ctrl-C nobody waits for the rest of the blocks


def find_unreadable(
    root: Path, paths: Sequence[str], channels: int = 3, progress: Progress | None = None
) -> dict[int, str]:
    """Decodes every file once; which places of `paths` cannot be read, and why."""
    reasons: dict[int, str] = {}

    def check(i: int) -> None:
        try:
            decode(root / paths[i], channels, GLANCE)  # every byte is read, but few pixels are made
        except UnreadableImage as error:
            reasons[i] = error.reason

    in_threads(check, len(paths), progress)
    return dict(sorted(reasons.items()))
