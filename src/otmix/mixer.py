"""When a batch is mixed, and the whole way from two batches to one mixed batch: pair, then mix (Algorithm 1 of Gao et
al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from otmix.confusion import ConfusionCounter
from otmix.devices import move
from otmix.errors import UserError
from otmix.mixing import Mixer, leave_unmixed
from otmix.pairing import Curriculum, Pairing, PairingContext
from otmix.randomness import Moment
from otmix.types import Batch, Embed, Embedded, Items, Mixed, Pairs

Gather = Callable[[Tensor], Tensor]
"""Puts the parts `[n,…]` of all processes together as `[n·world,…]`: row i of process r becomes row i·world + r, its
place in the whole batch (`BackgroundStream`). All processes must call it at the same place.
"""

PLAIN_END_FROM = 10
"""Of fewer epochs none is given up for a plain end."""


@dataclass(frozen=True)
class MixSchedule:
    """Which batches are mixed, and how much of them.

    `probability` that a batch inside the window is mixed; `window`, the part of the epochs with mixing as fractions of
    the stage, [start, end): where that ends before 1, the last of `PLAIN_END_FROM` epochs or more lies outside, however
    short the rest; `fraction` of the images within a mixed batch that are mixed (Table 7), the others staying
    plain backgrounds.
    """

    probability: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    fraction: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("probability", self.probability), ("fraction", self.fraction)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"the {name} of mixing must lie in [0, 1], it is {value}")
        if not 0.0 <= self.window[0] <= self.window[1] <= 1.0:
            raise UserError(
                f"the window of mixing must be two rising fractions of the run within [0, 1], it is {self.window}"
            )

    def reaches(self, epochs: int) -> bool:
        """Whether any of so many epochs lies in the window."""
        return bool(self.last_epochs(epochs, 1))

    def last_epochs(self, epochs: int, most: int) -> list[int]:
        """The last of so many epochs that lie in the window, at most `most` of them, in order; counted from 0."""
        inside = (epoch for epoch in reversed(range(epochs)) if self._inside(epoch, epochs))
        return list(islice(inside, most))[::-1]

    def _inside(self, epoch: int, epochs: int) -> bool:
        start, end = self.window
        # BatchNorm's statistics are those of the last epoch, and 237/240 of a short run leaves none
        plain = end < 1.0 and epochs >= PLAIN_END_FROM and epoch == epochs - 1
        return start <= epoch / epochs < end and not plain

    def mixes(self, moment: Moment) -> bool:
        """Whether this step's batch is mixed: a function of the moment alone, the same on every process."""
        if not self._inside(moment.epoch, moment.epochs):
            return False
        draw = torch.rand((), generator=replace(moment, rank=0).generator("mix-or-not"), dtype=torch.float64)
        return float(draw) < self.probability

    def which(self, moment: Moment, n: int) -> Tensor | None:
        """The images of a batch of `n` that are mixed, bool `[n]` on the CPU; None for all of them."""
        if self.fraction == 1.0:
            return None
        chosen, generator = torch.zeros(n, dtype=torch.bool), moment.generator("mixed-images")
        order = torch.randperm(n, generator=generator)
        # what is left of a whole number is a chance, or a few images would never have a mixed one
        number = int(self.fraction * n + float(torch.rand((), generator=generator, dtype=torch.float64)))
        chosen[order[:number]] = True
        return chosen


@dataclass(frozen=True)
class BatchMixer:
    """A pairing, a pixel rule and a schedule: everything between the two streams and the model."""

    pairing: Pairing
    mixer: Mixer
    schedule: MixSchedule = MixSchedule()

    def needs_foreground(self, moment: Moment) -> bool:
        """Whether this step will look at the foreground stream at all."""
        return self.schedule.mixes(moment) and _pairing_at(self.pairing, moment).from_foregrounds

    def __call__(
        self,
        background: Batch,
        foreground: Batch | None,
        embed: Embed,
        context: PairingContext,
        counter: ConfusionCounter | None = None,
        gather: Gather | None = None,
    ) -> Mixed:
        """Mix one batch, or return it as it is where the schedule says so.

        `embed` is called with `foreground.items` and `background.items` only. `counter`, if given, counts how the model
        confuses the backgrounds that the cost embedded (the "streamed" confusion: it costs no forward pass of its own).
        With `gather`, a pairing that searches sees the whole batch, of which each of several processes has a part, and
        pairs it as one process would; the images that are mixed are this process's foregrounds. Raises UserError for a
        pairing that leaves foregrounds out.
        """
        moment = context.moment
        if not self.schedule.mixes(moment):
            return Mixed.unmixed(background)
        pairing = _pairing_at(self.pairing, moment)
        if pairing.from_foregrounds and foreground is None:
            raise ValueError("this pairing takes its foregrounds from a second stream; pass a foreground batch")
        source = foreground if pairing.from_foregrounds and foreground is not None else background

        def watched(items: Items) -> Embedded:
            embedded = embed(items)
            if counter is not None and items is background.items and embedded.log_probabilities is not None:
                counter.add(items.labels, embedded.log_probabilities)
            return embedded

        plain = background  # what an image that stays unmixed looks like
        if gather is not None and pairing.searches:
            pairs, background = _pair_the_whole(pairing, source, background, watched, context, gather)
        else:
            pairs = pairing(source.items, background.items, watched, context)
        if len(pairs) < (wanted := min(len(source), len(plain))):
            raise UserError(
                f"the pairing {type(pairing).__name__} gave {len(pairs)} pairs for {wanted} foregrounds, so images of "
                "the batch would be lost; it must give each foreground a background"
            )
        height, width = background.images.shape[-2:]
        drawn = self.mixer.draw(len(pairs), height, width, moment.generator("mix"))
        # index pairs of equal batches need no copy: the i-th with the i-th
        if pairs.by == "index" and len(pairs) == len(source) == len(background):
            chosen_foreground, chosen_background = source, background
        else:
            chosen_foreground, chosen_background = source[pairs.foreground], background[pairs.background]
        mixed = replace(self.mixer.apply(chosen_background, chosen_foreground, drawn), pairs=pairs)
        which = self.schedule.which(moment, len(pairs))
        if which is not None:
            places = torch.arange(len(pairs), device=background.images.device) % len(plain)
            mixed = leave_unmixed(mixed, plain[places], move(which, places.device))
        return mixed


def _pairing_at(pairing: Pairing, moment: Moment) -> Pairing:
    """The pairing of this step."""
    while isinstance(pairing, Curriculum):
        pairing = pairing.choose(moment)
    return pairing


def _pair_the_whole(
    pairing: Pairing, source: Batch, background: Batch, embed: Embed, context: PairingContext, gather: Gather
) -> tuple[Pairs, Batch]:
    """The pairs of this process's foregrounds, by their places in its part, and the backgrounds of all processes."""
    whole_source, whole_background = _whole(source.items, gather), _whole(background.items, gather)

    def look(items: Items) -> Embedded:  # each process at its own part only
        seen = embed(source.items if items is whole_source else background.items)
        logp = seen.log_probabilities
        return Embedded(items, gather(seen.features), None if logp is None else gather(logp))

    moment = context.moment
    shared = replace(context, moment=replace(moment, rank=0))
    pairs = pairing(whole_source, whole_background, look, shared)
    mine = slice(moment.rank, None, len(whole_source) // len(source))
    places = torch.arange(len(source), device=pairs.background.device)
    own = replace(pairs, foreground=places, background=pairs.background[mine])
    return own, Batch(whole_background, gather(background.images))


def _whole(items: Items, gather: Gather) -> Items:
    return Items(gather(items.labels), None if items.index is None else gather(items.index))
