"""Files that are copies of each other, byte by byte, in two splits: what is trained on would be measured on."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from contextlib import suppress

from otmix.data.sources import FileSource
from otmix.wording import counted

READ_AT_MOST = 2**28
"""Bytes: of more files that could be copies none is read. That takes a second or two; a folder of photos has few such
files, as only those of exactly one size are compared.
"""
NAMED = 5


def notes_of_copies(train: FileSource, held_out: dict[str, FileSource]) -> list[str]:
    """A sentence for each split of `held_out` that holds copies of training images; or one that says that they were not
    looked for, where that would take long. Links to a training image and files that cannot be read are not judged here.
    """
    sources = {"train": train, **held_out}
    sizes = {split: _by_size(source) for split, source in sources.items()}
    shared = sizes["train"].keys() & set().union(*(sizes[split] for split in held_out))
    suspects = {split: [i for size in sorted(shared) for i in found.get(size, ())] for split, found in sizes.items()}
    if sum(size * len(found.get(size, ())) for found in sizes.values() for size in shared) > READ_AT_MOST:
        files = counted(sum(map(len, suspects.values())), "file")
        return [f"Copies of training images in other splits were not looked for: {files} would have to be read whole."]
    content = {split: {i: _digest(sources[split], i) for i in sorted(found)} for split, found in suspects.items()}
    originals = {digest: i for i, digest in reversed(content.pop("train").items()) if digest is not None}
    return [
        note
        for split, found in content.items()
        if (note := _note(train, split, held_out[split], {i: originals[d] for i, d in found.items() if d in originals}))
    ]


def _note(train: FileSource, split: str, source: FileSource, copies: dict[int, int]) -> str | None:
    """`copies`: the places of images of `source`, and of their originals in `train`."""
    names = {i: (source.root / source.paths[i], train.root / train.paths[original]) for i, original in copies.items()}
    copies = {i: j for i, j in copies.items() if os.path.realpath(names[i][0]) != os.path.realpath(names[i][1])}
    if not copies:
        return None
    listed = [f"{source.paths[i]} of {train.paths[j]}" for i, j in list(copies.items())[:NAMED]]
    more = f" and {len(copies) - NAMED:,} more" if len(copies) > NAMED else ""
    are = "is a copy of a training image" if len(copies) == 1 else "are copies of training images"
    other = sum(int(source.labels[i]) != int(train.labels[j]) for i, j in copies.items())
    as_another = f", {other:,} of them as another class" if other else ""
    return (
        f"{len(copies):,} of {counted(len(source), f'{split} image')} {are}{as_another}: {'; '.join(listed)}{more}. "
        "What is measured on them says nothing of new images; remove one of each two."
    )


def _by_size(source: FileSource) -> dict[int, list[int]]:
    """The places of files that are not empty."""
    found: dict[int, list[int]] = defaultdict(list)
    for i, path in enumerate(source.paths):
        with suppress(OSError):
            if size := (source.root / path).stat().st_size:
                found[size].append(i)
    return found


def _digest(source: FileSource, index: int) -> bytes | None:
    with suppress(OSError), (source.root / source.paths[index]).open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()
    return None
