"""BatchNorm's statistics for the finished model, made anew (`bn_statistics mixed`)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from otmix.pairing import PairingContext
from otmix.training.loop import steps_of
from otmix.training.processes import summed
from otmix.training.stage import batch_norms

if TYPE_CHECKING:
    from otmix.training.loop import RunState


@torch.no_grad()
def mix_statistics(run: RunState) -> None:
    """At the end of a stage, make the running statistics of BatchNorm the means over its last epochs with mixing
    (`Stage.statistics_epochs`), with the weights as they are now; or leave them.

    The batches are those of these epochs: the same images, shares and boxes; transport asks the model as it is now,
    with the F of now. Each batch counts equally, mixed or not, in place of the moving average over whatever came last,
    as in "precise" statistics (Wu & Johnson 2021, section 3; but the variance is the mean of the batches' variances).
    They stay as they were where no batch was mixed or they are not finite numbers, and in layers that training does not
    run, or runs in eval mode. `run.bn_statistics` says what they are.
    """
    mixer, model = run.state.mixer, run.state.model
    epochs = run.stage.statistics_epochs(run.background.steps_per_epoch)
    if mixer is None or not epochs or not batch_norms(model):
        return
    measured = copy.deepcopy(model).train()  # transport keeps looking at the model with the statistics it has
    pairs = zip(batch_norms(model), batch_norms(measured), strict=True)
    trained = [(norm, new) for norm, new in pairs if new.training]
    for _, new in trained:
        new.reset_running_stats()
        new.momentum = None  # the mean over all batches, not a moving one
    seen, images = 0, len(epochs) * len(run.background.labels) // run.fabric.world_size
    any_mixed = False
    for epoch in epochs:
        moments, loaded = steps_of(run, epoch)
        for moment, items in zip(moments, loaded, strict=True):
            context, embed = PairingContext(moment, run.confusion), run.state.make_embed(items)
            mixed = mixer(items.background, items.foreground, embed, context, None, run.state.gather)
            with run.fabric.autocast():
                measured(mixed.images.contiguous(memory_format=torch.channels_last))
            any_mixed |= mixed.pairs is not None
            seen += len(mixed.images)
            run.reporter.looking(min(seen, images), images)
    if any_mixed:
        _adopt(run, trained)


def _adopt(run: RunState, trained: list[tuple[_BatchNorm, _BatchNorm]]) -> None:
    """Give the layers what their copies found, the mean over all processes."""
    add_up, found = summed(run.fabric), []
    for norm, new in trained:
        for name in ("running_mean", "running_var"):
            value = getattr(new, name)
            found.append((getattr(norm, name), new, value if add_up is None else add_up(value) / run.fabric.world_size))
    if not all(bool(value.isfinite().all()) for _, _, value in found):
        run.reporter.message("BatchNorm's mixed statistics are not finite numbers, so the running ones stay.")
        return
    for own, new, value in found:
        if new.num_batches_tracked:  # else no batch came by
            own.copy_(value)
    run.bn_statistics = "mixed"
