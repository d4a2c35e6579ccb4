"""The two pictures of a run: mixed images with their pairs, and a transport plan (Fig. 3)."""

from __future__ import annotations

from dataclasses import replace

import torch

from otmix.mixer import MixSchedule
from otmix.mixing import CutMix
from otmix.pairing import Curriculum, PairingContext, TransportPairing
from otmix.reports import figures
from otmix.sampling import ForegroundStream
from otmix.training.loop import RunState
from otmix.training.setup import Plan
from otmix.training.stage import StepItems
from otmix.types import Items

GRID, PLAN = 8, 10


def draw_pictures(run: RunState, plan: Plan) -> None:
    """figures/mixed.png: the mixes of one more step, as the last epoch made them; figures/plan.png: transport between
    10 and 10 images.

    A method that mixes nothing has no such pictures; one without transport has no plan.
    """
    if run.state.mixer is None:
        return
    moment = replace(run.moment(0), epoch=run.stage.epochs - 1, step=run.background.steps_per_epoch, rank=0)
    pairing = run.state.mixer.pairing
    if isinstance(pairing, Curriculum):
        pairing = pairing.then
    run.state.model.eval()
    context = PairingContext(moment, run.confusion)

    # candidates: one batch of each stream; the pictures show a few of them
    count = min(run.stage.background_batch, len(plan.dataset.train))
    backgrounds = run.store.fetch(run.background.epoch(moment)[0][:count], None)
    foregrounds = backgrounds  # of a batch that is mixed with itself
    if run.foreground is not None:
        drawn_items = run.foreground.draw(max(2, len(backgrounds)), moment.generator("picture"))
        foregrounds = run.store.fetch(drawn_items, None)[: len(backgrounds)]
    mixer = replace(run.state.mixer, pairing=pairing, schedule=MixSchedule())
    with torch.no_grad():
        mixed = mixer(backgrounds, foregrounds, run.state.make_embed(StepItems(backgrounds, foregrounds)), context)
    assert mixed.pairs is not None  # the schedule above mixes always
    height, width = backgrounds.images.shape[-2:]
    drawn = mixer.mixer.draw(
        len(mixed.pairs), height, width, moment.generator("mix")
    )  # the same draw as in the mix above
    boxes = drawn.expand(len(mixed.pairs), 4)[:GRID] if isinstance(mixer.mixer, CutMix) else None
    shown = slice(0, GRID)
    chosen = backgrounds[mixed.pairs.background][shown], foregrounds[mixed.pairs.foreground][shown]
    figure = figures.mixed_grid(
        chosen[0].images.cpu(),
        chosen[1].images.cpu(),
        mixed.images[shown].cpu(),
        chosen[0].items.labels.cpu(),
        chosen[1].items.labels.cpu(),
        mixed.image_share[shown].cpu(),
        plan.dataset.class_names,
        title=f"{plan.method.title}: foreground, background, mix",
        boxes=boxes,
    )
    figures.save(figure, run.run_dir / "figures" / "mixed.png")
    if isinstance(pairing, TransportPairing):
        _draw_plan(run, plan, pairing, context)


def _draw_plan(run: RunState, plan: Plan, pairing: TransportPairing, context: PairingContext) -> None:
    """Ten foregrounds, one of each class (the rarest ten), against ten backgrounds from the background stream."""
    counts, labels = plan.dataset.counts, plan.dataset.train.labels
    draw = context.moment.generator("plan")
    rarest = torch.argsort(counts.counts, stable=True)[:PLAN].sort().values
    one_each = [
        ForegroundStream(labels, torch.nn.functional.one_hot(k, counts.num_classes)).draw(1, draw) for k in rarest
    ]
    order = torch.randperm(len(labels), generator=draw)[:PLAN]
    order = order[torch.argsort(labels[order], stable=True)]
    foregrounds = run.store.fetch(Items.concatenate(one_each), None)
    backgrounds = run.store.fetch(Items(labels[order], order), None)
    pairs = pairing(
        foregrounds.items, backgrounds.items, run.state.make_embed(StepItems(backgrounds, foregrounds)), context
    )
    assert pairs.plan is not None
    names = plan.dataset.class_names
    figure = figures.plan_figure(
        pairs.plan.coupling.cpu(),
        [names[int(label)] for label in foregrounds.items.labels],
        [names[int(label)] for label in backgrounds.items.labels],
        title="transport plan, rows normalised to 1",
    )
    figures.save(figure, run.run_dir / "figures" / "plan.png")
