"""BatchNorm's statistics for the finished model, made anew (`bn_statistics mixed`)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from otmix.pairing import PairingContext
from otmix.training.loop import steps_of
from otmix.training.processes import summed
from otmix.training.stage import batch_norms

if TYPE_CHECKING:
    from otmix.training.loop import RunState


@torch.no_grad()
def mix_statistics(run: RunState) -> None:
    """At the end of a stage, make the running statistics of BatchNorm the means over its last epoch with mixing, with
    the weights as they are now; or leave them, where `Stage.statistics_epoch` says so.

    The batches are those of that epoch: the same images, shares and boxes; transport asks the model as it is now. Each
    counts equally, mixed or not, in place of the moving average over whatever came last ("precise" statistics: Wu &
    Johnson 2021, section 3).
    """
    mixer, model = run.state.mixer, run.state.model
    epoch = run.stage.statistics_epoch(model)
    if mixer is None or epoch is None:
        return
    measured = copy.deepcopy(model).train()  # transport keeps looking at the model with the statistics it has
    for norm in batch_norms(measured):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches, not a moving one
    moments, loaded = steps_of(run, epoch)
    seen, images = 0, len(run.background.labels) // run.fabric.world_size
    for moment, items in zip(moments, loaded, strict=True):
        context, embed = PairingContext(moment, run.confusion), run.state.make_embed(items)
        mixed = mixer(items.background, items.foreground, embed, context, None, run.state.gather)
        with run.fabric.autocast():
            measured(mixed.images.contiguous(memory_format=torch.channels_last))
        seen += len(mixed.images)
        run.reporter.looking(min(seen, images), images)
    add_up = summed(run.fabric)
    for norm, found in zip(batch_norms(model), batch_norms(measured), strict=True):
        for name in ("running_mean", "running_var"):
            value = getattr(found, name)
            getattr(norm, name).copy_(value if add_up is None else add_up(value) / run.fabric.world_size)
