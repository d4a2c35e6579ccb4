"""Mixed images beside what they were made of."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otmix.reports.figures.style import BLUE, GREY, INK, as_array, finish, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 12
_TILE_INCHES = 1.06
_GAP = 0.08  # between tiles, in tile widths
_LINE = 0.122  # height of a line of caption, in tile widths


@dataclass(frozen=True)
class _Row:
    label: str
    images: Any
    captions: list[str]
    boxes: Any = None
    colour: str = INK


def mixed_grid(
    background: Any,
    foreground: Any,
    mixed: Any,
    background_labels: Sequence[int] | Any,
    foreground_labels: Sequence[int] | Any,
    shares: Sequence[float] | Any,
    class_names: Sequence[str],
    title: str = "",
    boxes: Any = None,
) -> Figure:
    """Foregrounds on top, backgrounds below them, their mixes at the bottom; the first 12 columns.

    Args:
        background, foreground, mixed: images `[n,C,H,W]` in [0, 1], C = 1 or 3; small ones show their pixels.
        background_labels, foreground_labels: `[n]`, into `class_names`.
        shares: `[n]`, the part of each mix that is background.
        boxes: `[n,4]` top, left, height, width of what was pasted, in pixels; outlined where given.
    """
    rows = [
        _Row("foreground", foreground, _names(foreground_labels, class_names), boxes),
        _Row("background", background, _names(background_labels, class_names)),
        _Row("mix", mixed, _shares(background_labels, foreground_labels, shares, class_names), boxes),
    ]
    return _grid(rows, title)


def preview_grid(
    *,
    foreground: Any,
    foreground_labels: Sequence[int] | Any,
    random_background: Any,
    random_labels: Sequence[int] | Any,
    random_mixed: Any,
    transport_background: Any,
    transport_labels: Sequence[int] | Any,
    transport_mixed: Any,
    shares: Sequence[float] | Any,
    class_names: Sequence[str],
    title: str = "",
    boxes: Any = None,
) -> Figure:
    """The same foregrounds in random backgrounds and in those that transport chose.

    Shapes as in `mixed_grid`; `boxes` and `shares` hold for both mixes.
    """
    rows = [
        _Row("foreground", foreground, _names(foreground_labels, class_names), boxes),
        _Row("random\nbackground", random_background, _names(random_labels, class_names), colour=GREY),
        _Row("mix", random_mixed, _shares(random_labels, foreground_labels, shares, class_names), boxes, GREY),
        _Row("background\nby transport", transport_background, _names(transport_labels, class_names), colour=BLUE),
        _Row("mix", transport_mixed, _shares(transport_labels, foreground_labels, shares, class_names), boxes, BLUE),
    ]
    return _grid(rows, title)


def _names(labels: Any, class_names: Sequence[str]) -> list[str]:
    return [shorten(class_names[int(label)], 16) for label in as_array(labels)[:MAX_COLUMNS]]


def _shares(background: Any, foreground: Any, shares: Any, class_names: Sequence[str]) -> list[str]:
    captions = []
    for back, fore, share in zip(as_array(background)[:MAX_COLUMNS], as_array(foreground), as_array(shares)):
        percent = round(100 * share)
        below, above = shorten(class_names[int(back)], 11), shorten(class_names[int(fore)], 10)
        captions.append("not mixed" if share >= 1 else f"{percent} % {below}\n+ {100 - percent} % {above}")
    return captions


def _grid(rows: Sequence[_Row], title: str) -> Figure:
    pictures = [_pixels(row.images) for row in rows]
    columns = min(MAX_COLUMNS, len(pictures[0]))
    if columns == 0:
        raise ValueError("there are no images to draw")
    aspect = max(picture.shape[1] / picture.shape[2] for picture in pictures)
    heights = [aspect + 0.13 + _LINE * max(caption.count("\n") + 1 for caption in row.captions) for row in rows]
    left = 0.16 + 0.14 * max(row.label.count("\n") + 1 for row in rows)
    width, height = columns * (1 + _GAP), sum(heights)
    heading = textwrap.wrap(title, max(12, round(11 * width)))  # about so many characters fit into the width
    top = 0.19 * len(heading) + 0.12
    figure = new_figure((width + left) * _TILE_INCHES, (height + top) * _TILE_INCHES)
    figure.set_layout_engine("none")  # the places below are exact already
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    y = 0.0
    for row, pixels, row_height in zip(rows, pictures, heights):
        beside: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8.5, "fontweight": "bold"}
        axes.text(
            -0.07, y + aspect / 2, row.label, color=row.colour, linespacing=1.1, multialignment="center", **beside
        )
        boxes = None if row.boxes is None else as_array(row.boxes)
        for column in range(columns):
            x = column * (1 + _GAP)
            _tile(axes, pixels[column], x, y, aspect, None if boxes is None else boxes[column])
            below: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 7.5, "linespacing": 1.15}
            axes.text(x + 0.5, y + aspect + 0.04, row.captions[column], color=row.colour, **below)
        y += row_height
    axes.set_aspect("auto")
    axes.set_xlim(-left, width)
    axes.set_ylim(height, -top)
    axes.text(0, -0.08, "\n".join(heading), ha="left", va="bottom", fontsize=11, color=INK)
    return finish(figure)


def _tile(
    axes: Axes, pixels: NDArray[np.float64], x: float, y: float, aspect: float, box: NDArray[np.float64] | None
) -> None:
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    smoothing = "nearest" if max(height, width) <= 96 else "antialiased"
    axes.imshow(pixels, extent=(x, x + 1, y + aspect, y), interpolation=smoothing, aspect="auto")
    if box is not None and box[2] > 0 and box[3] > 0:
        top, left, box_height, box_width = box
        place = (x + left / width, y + aspect * top / height)
        size = (box_width / width, aspect * box_height / height)
        for colour, line in (("white", 2.4), ("#E4002B", 1.1)):  # two strokes, to show on dark and on light pixels
            axes.add_patch(Rectangle(place, *size, fill=False, edgecolor=colour, linewidth=line))


def _pixels(images: Any) -> NDArray[np.float64]:
    """`[n,C,H,W]` to `[n,H,W,3]`."""
    pixels = as_array(images)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"images must be [n,C,H,W] with 1 or 3 channels, not of shape {pixels.shape}")
    pixels = np.nan_to_num(np.clip(pixels, 0, 1)).transpose(0, 2, 3, 1)
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
