"""What all pictures share: colours, names that fit, and how a figure becomes a file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from otmix.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
GREY, LIGHT, INK = "#7A7A7A", "#D9D9D9", "#222222"
DPI = 140
# class names are the user's own: where a font for their script is installed, it stands in for what DejaVu lacks
_FALLBACKS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Noto Sans",
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, known to nobody but the caller."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def finish(figure: Figure) -> Figure:
    """Take every text literally (a class may be called `$5$`) and in fonts that are installed."""
    from matplotlib.font_manager import fontManager
    from matplotlib.text import Text

    installed = {font.name for font in fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in _FALLBACKS if name in installed)]
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_fontfamily(families)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG, its label as the description in it; equal figures give equal bytes."""
    buffer = io.BytesIO()
    label = str(figure.get_label())
    metadata = {"Software": None, **({"Description": label} if label else {})}
    with warnings.catch_warnings():
        # a script without an installed font is drawn as boxes; the page and the tables still have the name
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="png", dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def save(figure: Figure, path: Path | str) -> Path:
    """Write the figure as a PNG, whole or not at all; missing folders are made."""
    write_atomic(Path(path), lambda stream: stream.write(png_bytes(figure)))
    return Path(path)


def as_array(values: Any) -> NDArray[np.float64]:
    """Numbers from a tensor on any device, an array or nested lists, as float64 on the host."""
    detach = getattr(values, "detach", None)
    if detach is not None:  # a tensor; told by its method, so that this needs no torch
        values = detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def shorten(name: str, length: int = 18) -> str:
    """One line of at most `length` characters; a longer name loses its middle, since many differ at their ends."""
    line = " ".join(str(name).split())
    if len(line) <= length:
        return line
    tail = (length - 1) // 3
    return f"{line[: length - 1 - tail]}…{line[-tail:] if tail else ''}"


def plain(axes: Axes) -> None:
    """No box around the axes, a light horizontal grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def name_ticks(axis: Axis, names: Sequence[str], length: int = 18, rotation: float = 0, size: float = 8) -> None:
    """Class names at the places 0 … K−1 of an axis; short ones are not turned."""
    rotation = rotation if any(len(name) > 3 for name in names) else 0
    axis.set_ticks(np.arange(len(names)), labels=[shorten(name, length) for name in names])
    for label in axis.get_ticklabels():
        label.set_fontsize(size)
        if rotation:
            label.set_rotation(rotation)
            label.set_rotation_mode("anchor")
            label.set_horizontalalignment("right")
            label.set_verticalalignment("center" if rotation == 90 else "top")


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at the powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
