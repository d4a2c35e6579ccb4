"""BatchNorm's statistics for the finished model, made anew (`bn_statistics mixed`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from otmix.models.batchnorm import MeanStatistics, batch_norms
from otmix.pairing import PairingContext
from otmix.training.loop import steps_of
from otmix.training.processes import summed
from otmix.transport import NotFinite

if TYPE_CHECKING:
    from otmix.training.loop import RunState


@torch.no_grad()
def mix_statistics(run: RunState) -> None:
    """At the end of a stage, make the running statistics of BatchNorm the means over its last epochs with mixing
    (`Stage.statistics_epochs`), with the weights as they are now (`MeanStatistics`); or leave them.

    The batches are those of these epochs, mixed or not: the same images, shares and boxes; transport asks the model as
    it is now, with the F of now. They stay as they were where no batch was mixed or they are not finite numbers, and in
    layers that training does not run, or runs in eval mode. `run.bn_statistics` says what they are.
    """
    mixer, model = run.state.mixer, run.state.model
    epochs = run.stage.statistics_epochs(run.background.steps_per_epoch)
    if mixer is None or not epochs or not batch_norms(model):
        return
    statistics = MeanStatistics(model)
    seen, images = 0, len(epochs) * len(run.background.labels) // run.fabric.world_size
    any_mixed = False
    for epoch in epochs:
        moments, loaded = steps_of(run, epoch)
        for moment, items in zip(moments, loaded, strict=True):
            context, embed = PairingContext(moment, run.confusion), run.state.make_embed(items)
            try:
                mixed = mixer(items.background, items.foreground, embed, context, None, run.state.gather)
            except NotFinite:
                _none_taken(run)
                return
            with run.fabric.autocast():
                statistics.see(mixed.images.contiguous(memory_format=torch.channels_last))
            any_mixed |= mixed.pairs is not None
            seen += len(mixed.images)
            run.reporter.looking(min(seen, images), images)
    if not any_mixed:
        return
    add_up = summed(run.fabric)
    if statistics.adopt(None if add_up is None else lambda value: add_up(value) / run.fabric.world_size):
        run.bn_statistics = "mixed"
    else:
        _none_taken(run)


def _none_taken(run: RunState) -> None:
    run.reporter.message("BatchNorm's mixed statistics are not finite numbers, so the running ones stay.")
