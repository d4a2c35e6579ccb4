"""The foregrounds of anyone's loop (eq. 3): a DataLoader that goes on for as long as it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Sampler

from otmix.errors import UserError
from otmix.own_loop.batches import labelled
from otmix.randomness import Moment
from otmix.types import Items

if TYPE_CHECKING:
    from otmix.own_loop.otmixer import OTMixer


class ForegroundLoader(DataLoader[Any]):
    """A DataLoader whose batches are held against the labels that were drawn, here, as an error in a worker comes with
    its whole traceback. Raises UserError where they differ.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches, steps = super().__iter__(), self.sampler
        # whoever puts another sampler in, or lets workers overtake each other, is not looked at
        if not isinstance(steps, ForegroundSteps) or not getattr(self, "in_order", True):
            yield from batches
            return
        place = steps.place()
        for step, batch in enumerate(batches, place.step):
            _check_labels(batch, steps.draw(replace(place, step=step)))
            yield batch


class ForegroundSteps(Sampler[int]):
    """Eq. 3, step by step, without end: what a step draws is a function of the mixer's epoch and the step alone. It
    begins at the step where the mixer is. Raises UserError where it began before in this epoch and the mixer has moved
    on since: `end_epoch` was forgotten.
    """

    def __init__(self, mixer: OTMixer, batch_size: int) -> None:
        self.mixer, self.batch_size = mixer, batch_size
        self._began = (-1, 0)  # which of the mixer's entries into an epoch, and at what step

    def place(self) -> Moment:
        """Where the mixer is."""
        return replace(self.mixer.moment, epoch=self.mixer.epoch)  # also after the last epoch

    def draw(self, place: Moment) -> Items:
        """The foregrounds of one step."""
        return self.mixer.stream.step(self.batch_size, place)

    def __iter__(self) -> Iterator[int]:
        place, entry = self.place(), self.mixer.entries
        if entry == self._began[0] and place.step > self._began[1]:
            raise UserError(
                f"the foregrounds begin again in epoch {place.epoch}, after {place.step} steps; call end_epoch() "
                "after each pass over your loader, or make a new OTMixer for a new start"
            )
        self._began = entry, place.step
        for step in count(place.step):
            items = self.draw(replace(place, step=step))
            assert items.index is not None  # drawn from a labelled dataset
            yield from items.index.tolist()


def _check_labels(batch: object, drawn: Items) -> None:
    """Raises UserError where a batch has other labels. One of another form is for `OTMixer.__call__` to judge, once its
    user has made images and labels of it; labels on a GPU are not looked at, that would wait for it.
    """
    try:
        labels = labelled(batch)[1]
    except UserError:
        return
    if labels.device.type != "cpu" or labels.shape != drawn.labels.shape:
        return
    different = (labels != drawn.labels).nonzero()
    if len(different):
        first = int(different[0])
        assert drawn.index is not None
        raise UserError(
            f"image {int(drawn.index[first])} of the foreground dataset has label {int(labels[first])}, but "
            f"{int(drawn.labels[first])} among the labels that OTMixer was given; give both of the same images, in the "
            "same order"
        )
