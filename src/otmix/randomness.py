"""Counter-based randomness: every random choice is a pure function of where in the run it is made.

There is no generator whose state has to be carried along. A choice names its purpose and its place (seed, stage, epoch,
step, rank), and gets a fresh generator that depends on nothing else; so any step can be replayed alone, and a run that
is resumed in the middle of an epoch makes the same choices as one that never stopped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any sequence of integers and strings (BLAKE2b of their text; stable across machines and
    versions).
    """
    text = "\x1f".join(f"int:{int(part)}" if not isinstance(part, str) else f"str:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, stage: int = 0, epoch: int = 0, step: int = 0, rank: int = 0) -> torch.Generator:
    """A CPU generator for one purpose at one place of a run; equal arguments give equal streams.

    torch keeps the low 32 bits of a CPU seed, so of 100,000 places in a run one or two may share their stream.
    """
    return torch.Generator().manual_seed(derive_seed(seed, purpose, stage, epoch, step, rank))


@dataclass(frozen=True)
class Moment:
    """A place in a run: which step of which epoch of which stage, on which process, under which seed.

    `epoch` and `step` count from 0; `epochs` is the length of the stage. `rank` is 0 for choices that all processes
    must share.
    """

    seed: int = 0
    stage: int = 0
    epoch: int = 0
    epochs: int = 1
    step: int = 0
    rank: int = 0

    @property
    def progress(self) -> float:
        """Share of the stage's epochs that are finished, in [0, 1): constant during an epoch, so schedules never wait
        for a device.
        """
        return self.epoch / self.epochs

    def seed_for(self, purpose: str) -> int:
        """A 63-bit seed for one purpose at this step, for code that derives further seeds from it (workers)."""
        return derive_seed(self.seed, purpose, self.stage, self.epoch, self.step, self.rank)

    def generator(self, purpose: str) -> torch.Generator:
        """The generator for one purpose at this step."""
        return generator(self.seed, purpose, self.stage, self.epoch, self.step, self.rank)

    def at_epoch(self) -> Moment:
        """This epoch as a whole: step 0, shared by all processes."""
        return replace(self, step=0, rank=0)
