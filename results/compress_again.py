"""Compress a folder of small images once more as JPEG (quality 75), its blocks 4 pixels aside of those it has already.

    python results/compress_again.py FROM TO

What a second compression costs hints at what the first has cost, where the originals cannot be had. FROM and TO hold
`train/<class>/…` and `test/<class>/…`; TO gets PNGs, so that nothing more is lost.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main(source: Path, target: Path) -> None:
    for file in sorted(source.glob("t*/*/*.jpg")):
        pixels = np.pad(np.asarray(Image.open(file).convert("RGB")), ((4, 4), (4, 4), (0, 0)), mode="edge")
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=75)
        height, width = pixels.shape[:2]
        out = (target / file.relative_to(source)).with_suffix(".png")
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.open(stream).convert("RGB").crop((4, 4, width - 4, height - 4)).save(out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
