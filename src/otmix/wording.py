"""Words of sentences that people read."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """`number` of what `noun` names in the singular: "1 image", "2,000 images", "3 classes"."""
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural}"


def command_line(words: Sequence[str]) -> str:
    """Words as one types them here: cmd.exe takes single quotes for part of a name."""
    if sys.platform == "win32":
        from subprocess import list2cmdline  # it quotes what has a space, and nothing else that a shell would read

        plain = re.compile(r"[\w.:\\/+=~-]+")
        return " ".join(word if plain.fullmatch(word) else '"' + list2cmdline([f" {word}"])[2:] for word in words)
    else:  # noqa: RET505 (so that mypy sees one system at a time)
        return shlex.join(words)
