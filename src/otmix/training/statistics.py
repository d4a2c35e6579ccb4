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
def mix_statistics(run: RunState) -> bool:
    """Make the running statistics of BatchNorm the means over the last epoch with mixing, with the weights as they are
    now.

    The batches are those of that epoch: the same images, shares and boxes; transport asks the model as it is now. Each
    counts equally, mixed or not, in place of the moving average over whatever came last ("precise" statistics: Wu &
    Johnson 2021, section 3). Returns whether they changed: not where no epoch was mixed, no BatchNorm keeps statistics,
    or the stage leaves them as they were.
    """
    mixer, model, stage = run.state.mixer, run.state.model, run.stage
    epoch = None if mixer is None else mixer.schedule.last_epoch(stage.epochs)
    if mixer is None or epoch is None or stage.batchnorm == "eval" or not batch_norms(model):
        return False
    measured = copy.deepcopy(model).train()  # transport keeps looking at the model with the statistics it has
    for norm in batch_norms(measured):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches, not a moving one
    moments, loaded = steps_of(run, epoch)
    for done, (moment, items) in enumerate(zip(moments, loaded, strict=True), start=1):
        context, embed = PairingContext(moment, run.confusion), run.state.make_embed(items)
        mixed = mixer(items.background, items.foreground, embed, context, None, run.state.gather)
        with run.fabric.autocast():
            measured(mixed.images.contiguous(memory_format=torch.channels_last))
        run.reporter.looking(done, len(moments))
    add_up = summed(run.fabric)
    for norm, found in zip(batch_norms(model), batch_norms(measured), strict=True):
        for name in ("running_mean", "running_var"):
            value = getattr(found, name)
            getattr(norm, name).copy_(value if add_up is None else add_up(value) / run.fabric.world_size)
    return True
