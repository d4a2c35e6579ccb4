"""Files that are copies of each other, byte by byte, in two splits: what is trained on would be measured on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from contextlib import suppress

from otmix.data.sources import FileSource
from otmix.wording import counted

READ_AT_MOST = 2**28
"""Bytes: of more files that could be copies none is read. That takes a second or two; a folder of photos has few such
files, as only those of exactly one size are compared.
"""


def notes_of_copies(train: FileSource, held_out: dict[str, FileSource]) -> list[str]:
    """A sentence for each split of `held_out` that holds copies of training images; none where reading all that could
    be copies would take long. A file that cannot be read is not judged here.
    """
    trained, held = _by_size(train), {split: _by_size(source) for split, source in held_out.items()}
    shared = trained.keys() & set().union(*held.values())
    suspects = [path for sizes in (trained, *held.values()) for size in shared for path in sizes.get(size, ())]
    if sum(size * len(sizes.get(size, ())) for sizes in (trained, *held.values()) for size in shared) > READ_AT_MOST:
        return []
    content = {path: _digest(train, path) for path in suspects}
    originals = {content[path]: path for size in shared for path in reversed(trained[size])} | {None: ""}
    notes = []
    for split, source in held_out.items():
        copies = [(path, original) for path in source.paths if (original := originals.get(content.get(path)))]
        if copies:
            first, more = " of ".join(copies[0]), ", …" if len(copies) > 1 else ""
            notes.append(
                f"{len(copies):,} of {counted(len(source), f'{split} image')} "
                f"{'is a copy of a training image' if len(copies) == 1 else 'are copies of training images'} "
                f"({first}{more}), which flatters what is measured: remove the copies."
            )
    return notes


def _by_size(source: FileSource) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for path in source.paths:
        with suppress(OSError):
            found[(source.root / path).stat().st_size].append(path)
    return found


def _digest(source: FileSource, path: str) -> bytes | None:
    with suppress(OSError), (source.root / path).open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()
    return None
