"""Words of sentences that people read."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`number` of what `noun` names in the singular: "1 image", "2,000 images", "3 classes"."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"
