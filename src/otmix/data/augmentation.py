"""Random crops and flips. Drawing the chances and applying them are two functions, so that a batch can be replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from otmix.data.decoding import in_threads
from otmix.data.resizing import side_needed, to_square
from otmix.randomness import derive_seed


def draw_shift_flip(n: int, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """int64 `[n,3]` on the CPU: top and left of the window, uniform in 0 … 2·padding; 1 where it is mirrored (half)."""
    window = torch.randint(2 * padding + 1, (n, 2), generator=generator)
    mirror = torch.randint(2, (n, 1), generator=generator)
    return torch.cat([window, mirror if flip else torch.zeros_like(mirror)], dim=1)


def apply_shift_flip(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """Pads `[n,C,H,W]` with zeros and cuts each image's own H × W window, mirrored where drawn: one gather, no loop."""
    _, channels, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding))
    top, left, mirror = drawn.unbind(1)
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    mirrored = torch.where(mirror[:, None] > 0, width - 1 - columns, columns)
    place = (top[:, None] + rows)[:, :, None] * (width + 2 * padding) + (left[:, None] + mirrored)[:, None, :]
    return padded.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)


@dataclass(frozen=True)
class ShiftFlip:
    """CIFAR's augmentation (He et al. 2016, section 4.2): zero padding, a random window, mirrored half of the time."""

    padding: int
    flip: bool = True

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return draw_shift_flip(n, self.padding, self.flip, generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        return apply_shift_flip(images, drawn, self.padding)


@dataclass(frozen=True)
class Window:
    """A rectangle of one image, in its pixels, and whether to mirror it."""

    top: int
    left: int
    height: int
    width: int
    mirror: bool


def draw_window(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    generator: torch.Generator,
) -> Window:
    """Area uniform in `scale` of the image's, width/height log-uniform in `ratio`, place uniform; after ten misses the
    central window with the nearest allowed ratio (Szegedy et al. 2015, as in torchvision's RandomResizedCrop)."""
    chances = torch.rand(10, 4, generator=generator).tolist()
    mirror = bool(torch.randint(2, (), generator=generator)) and flip
    for area_chance, ratio_chance, top_chance, left_chance in chances:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_chance)
        shape = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * ratio_chance)
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return Window(int(top_chance * (height - h + 1)), int(left_chance * (width - w + 1)), h, w, mirror)
    shape = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    return Window((height - h) // 2, (width - w) // 2, h, w, mirror)


def apply_window(image: Tensor, drawn: Window, size: int) -> Tensor:
    """The window of uint8 `[C,H,W]`, resized to `[C,size,size]` with antialiasing, mirrored where drawn."""
    from torchvision.transforms.v2 import functional as tv

    out: Tensor = tv.resized_crop(
        image, drawn.top, drawn.left, drawn.height, drawn.width, size=[size, size], antialias=True
    )
    return out.flip(-1) if drawn.mirror else out


@dataclass(frozen=True)
class WindowFlip:
    """ImageNet's augmentation: a random window, resized, mirrored half of the time. One image at a time."""

    size: int
    flip: bool = True
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @property
    def side_needed(self) -> int:
        """A shorter side that long leaves even the smallest window no smaller than `size`."""
        return math.ceil(self.size / math.sqrt(self.scale[0] * min(self.ratio[0], 1 / self.ratio[1])))

    def draw(self, height: int, width: int, generator: torch.Generator) -> Window:
        return draw_window(height, width, self.scale, self.ratio, self.flip, generator)

    def apply(self, image: Tensor, drawn: Window) -> Tensor:
        return apply_window(image, drawn, self.size)


Augmentation = ShiftFlip | WindowFlip


def prepare(image: Tensor, size: int, augmentation: WindowFlip | None, generator: torch.Generator | None) -> Tensor:
    """One decoded image as the model's square: augmented where both are given, else the view of evaluation."""
    if augmentation is None or generator is None:
        return to_square(image, size)
    return augmentation.apply(image, augmentation.draw(image.shape[1], image.shape[2], generator))


@dataclass(frozen=True)
class View:
    """How images of any size become those of a batch: by random windows, or without a seed as evaluation sees them."""

    channels: int
    image_size: int
    augmentation: WindowFlip | None

    @property
    def at_least(self) -> int:
        """The shorter side that images are read with: one for all requests, so that one decoded copy serves them."""
        windows = 0 if self.augmentation is None else self.augmentation.side_needed
        return max(side_needed(self.image_size), windows)

    def batch(
        self,
        image: Callable[[int], Tensor],
        indices: Sequence[int],
        seed: int | None,
        device: torch.device | str = "cpu",
        threads: bool = False,
    ) -> Tensor:
        """uint8 `[n,C,S,S]` of the images `image(i)`; each has its own generator from (seed, place in the batch)."""
        size = (len(indices), self.channels, self.image_size, self.image_size)
        pixels = torch.empty(size, dtype=torch.uint8, device=device)

        def see(place: int) -> None:
            random = None if seed is None else torch.Generator().manual_seed(derive_seed(seed, "window", place))
            pixels[place] = prepare(image(indices[place]), self.image_size, self.augmentation, random)

        if threads:
            in_threads(see, len(indices))
        else:
            for place in range(len(indices)):
                see(place)
        return pixels
