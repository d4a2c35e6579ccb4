"""The training loop: streams, step, backward, optimiser; then F, validation and a checkpoint. Fabric does device,
precision and processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from otmix.data import ImageStore
from otmix.errors import UserError
from otmix.files import remove, write_text
from otmix.pairing import PairingContext
from otmix.randomness import Moment
from otmix.sampling import BackgroundStream, ForegroundStream
from otmix.training.checkpoint import random_state, restore_random_state, save_checkpoint
from otmix.training.confusion_source import ConfusionSource
from otmix.training.processes import StopRequest, largest, of_each, share_buffers, summed
from otmix.training.reporter import Progress, Reporter
from otmix.training.stage import Stage, StepItems, StepState
from otmix.training.tally import Tally
from otmix.transport import NotFinite
from otmix.types import Batch, Confusion, ConfusionOrigin

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SHOW_EVERY_SECONDS = 0.25


class Interrupted(Exception):
    """The run was asked to stop, and has saved a checkpoint in `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(f"stopped; the run is saved in {run_dir}")
        self.run_dir = run_dir

    def __reduce__(self) -> tuple[type[Interrupted], tuple[Path]]:
        return (type(self), (self.run_dir,))


class Watch(Protocol):
    """Looks at validation images after an epoch, and gives errors by the names they have in the log."""

    def __call__(self, run: RunState, last: bool, /) -> dict[str, float | None]: ...


@dataclass(eq=False)
class RunState:
    """Everything that changes while a stage is trained, and what it is trained with."""

    fabric: Fabric
    run_dir: Path
    seed: int
    stage_index: int
    stage: Stage
    state: StepState
    module: nn.Module
    optimizer: torch.optim.Optimizer
    store: ImageStore
    background: BackgroundStream
    foreground: ForegroundStream | None
    confusion_source: ConfusionSource | None
    tally: Tally
    reporter: Reporter
    watch: Watch
    checkpoint_minutes: float
    epoch: int = 0
    step: int = 0
    confusion: Confusion | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    bn_statistics: str = "running"
    """What BatchNorm's statistics are: "running", or "mixed" after `mix_statistics`."""
    stop: StopRequest = field(default_factory=StopRequest)

    def moment(self, step: int, epoch: int | None = None) -> Moment:
        """A step of the present epoch, or of another one."""
        at = self.epoch if epoch is None else epoch
        return Moment(self.seed, self.stage_index, at, self.stage.epochs, step, self.fabric.global_rank)


def checkpoint_path(run_dir: Path) -> Path:
    return run_dir / "checkpoint.pt"


def fit(run: RunState) -> None:
    """Train until the stage's epochs are over. Raises Interrupted after a stop that was asked for, even if nothing is
    left of the stage but what follows it, and UserError when the loss is not finite.
    """
    with run.stop.listening():
        while run.epoch < run.stage.epochs:
            train_epoch(run)
            finish_epoch(run)


def train_epoch(run: RunState) -> None:
    """The rest of the present epoch, from `run.step` on."""
    stage, tally = run.stage, run.tally
    state = replace(run.state, class_weight=_class_weight(run))
    moments, loaded = steps_of(run, run.epoch, run.step)
    steps, already = run.step + len(moments), run.step
    stage.set_modes(run.module)
    began = shown = saved = time.perf_counter()
    before = tally.seconds
    for moment in moments:
        step = moment.step
        factor = stage.schedule.factor(run.epoch, stage.epochs, step, steps)
        for group in run.optimizer.param_groups:
            group["lr"] = stage.optimizer.lr * factor

        items = next(loaded)
        try:
            parts = stage.step(state, items, PairingContext(moment, run.confusion))
        except ValueError as error:  # a cost may refuse what a broken model says before its loss is seen
            check_finite(run, alone=True)
            if isinstance(error, NotFinite):  # of weights that still are
                raise _gone_wrong(run, "the model's features or logits were", step) from error
            raise
        run.optimizer.zero_grad(set_to_none=True)
        run.fabric.backward(parts.loss)
        run.optimizer.step()
        tally.add(parts, step)

        run.step = step + 1
        now = time.perf_counter()
        tally.seconds = before + now - began
        if now - shown > SHOW_EVERY_SECONDS and (run.fabric.device.type == "cpu" or step % 50 == 49):
            shown = now
            _show(run, steps, already)
        # at the end of an epoch a checkpoint follows anyway; asking the other processes takes time
        if run.step < steps and (run.fabric.world_size == 1 or step % 10 == 9):
            stop, due = run.stop.agreed_with(run.fabric, now - saved > 60 * run.checkpoint_minutes)
            if stop or due:
                save(run)
                saved = time.perf_counter()
                began += saved - now  # the epoch's seconds are those of training
            if stop:
                raise Interrupted(run.run_dir)
    if run.fabric.device.type != "cpu":  # it is still at work on what it was given
        torch.accelerator.synchronize(run.fabric.device)
        tally.seconds = before + time.perf_counter() - began


def steps_of(run: RunState, epoch: int, first: int = 0) -> tuple[list[Moment], Iterator[StepItems]]:
    """The steps of an epoch from `first` on, and their images: a foreground batch, drawn from eq. 3, where the step
    will look at one.
    """
    batches = run.background.epoch(run.moment(0, epoch))
    moments = [run.moment(step, epoch) for step in range(first, len(batches))]
    with_foreground = [moment for moment in moments if _needs_foreground(run, moment)]
    backgrounds = run.store.stream((batches[at.step], at.seed_for("augment-background")) for at in moments)
    foregrounds: Iterator[Batch] = iter(())
    if (stream := run.foreground) is not None:
        foregrounds = run.store.stream(
            (stream.step(len(batches[at.step]), at), at.seed_for("augment-foreground")) for at in with_foreground
        )
    needed = {moment.step for moment in with_foreground}
    return moments, (StepItems(next(backgrounds), next(foregrounds) if at.step in needed else None) for at in moments)


def finish_epoch(run: RunState) -> None:
    """F for the next epoch, validation, the line of the log, and a checkpoint."""
    add_up = summed(run.fabric)
    share_buffers(run.fabric, run.state.model)  # what is judged below is the model that is kept
    check_finite(run)
    row: dict[str, Any] = {"stage": run.stage.name, "epoch": run.epoch}
    steps = run.background.steps_per_epoch
    row["lr"] = run.stage.optimizer.lr * run.stage.schedule.factor(run.epoch, run.stage.epochs, 0, steps)
    row |= run.tally.read(add_up)
    row["seconds"] = run.tally.seconds
    row["images_per_second"] = row.pop("images") / max(run.tally.seconds, 1e-9)
    marginal_error = float(largest(run.fabric, run.tally.marginal_error))
    row["marginal_error"] = marginal_error if row.pop("transport_steps") else None
    last = run.epoch + 1 == run.stage.epochs
    if run.confusion_source is not None and not last:
        run.confusion = run.confusion_source.estimate(run.state, run.confusion)
    row |= run.watch(run, last)
    run.history.append(row)
    run.epoch, run.step = run.epoch + 1, 0
    run.tally.start_epoch()
    save(run)
    if run.fabric.global_rank == 0:
        remove_other_bests(run)
    run.reporter.epoch(row)
    if run.stop.agreed(run.fabric):  # after the last epoch too: whoever trains several runs must not begin the next
        raise Interrupted(run.run_dir)


def check_finite(run: RunState, alone: bool = False) -> None:
    """Raises UserError, naming the step, when a loss of this epoch was not finite, or the weights are not after the
    last step. Nothing has been saved since. `alone`: the other processes are not asked.
    """
    model = torch.stack([value.isfinite().all() for value in run.state.model.state_dict().values()]).all()
    bad = torch.where((run.tally.bad_step < 0) & ~model, run.step - 1, run.tally.bad_step)
    step = int(bad if alone else largest(run.fabric, bad))
    if step >= 0:
        raise _gone_wrong(run, "the loss or the weights were", step)


def _gone_wrong(run: RunState, what: str, step: int) -> UserError:
    kept = (
        f"the checkpoint before it is kept in {run.run_dir}"
        if checkpoint_path(run.run_dir).exists()
        else "no checkpoint had been written yet"
    )
    return UserError(
        f"{what} not finite numbers at step {step} of epoch {run.epoch} (both counted from 0); {kept}; "
        "try a lower --lr, a --warmup of 0.05, or --precision 32-true"
    )


def save(run: RunState) -> None:
    """Write a checkpoint (rank 0), unless the loss has gone wrong."""
    check_finite(run)
    processes = of_each(run.fabric, _own(run))
    if run.fabric.global_rank == 0:
        save_checkpoint(checkpoint_path(run.run_dir), _payload(run, processes))
        write_log(run)
    run.fabric.barrier()


def best_path(run: RunState) -> Path:
    """The weights of the best epoch so far, where the protocol chooses one. Those of the best before it are kept until
    a checkpoint knows of this one.
    """
    assert run.best is not None
    return run.run_dir / f"best-{run.best['epoch']}.safetensors"


def remove_other_bests(run: RunState) -> None:
    for path in run.run_dir.glob("best-*.safetensors"):
        if run.best is not None and path != best_path(run):
            remove(path)


def write_log(run: RunState) -> None:
    """metrics.jsonl: one line for each finished epoch."""
    write_text(run.run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run.history))


def _own(run: RunState) -> dict[str, Any]:
    """What each process has by itself: its running statistics, counts and random numbers."""
    source = run.confusion_source
    kept = run.state.model.state_dict().keys()  # without the buffers that a step sets anew
    return {
        "buffers": {name: buffer.cpu() for name, buffer in run.state.model.named_buffers() if name in kept},
        "counter": None if source is None else source.counter.table.value.cpu(),
        "tally": run.tally.state_dict(),
        "random": random_state(),
    }


def _payload(run: RunState, processes: list[dict[str, Any]]) -> dict[str, Any]:
    confusion = run.confusion
    return {
        "stage_index": run.stage_index,
        "epoch": run.epoch,
        "step": run.step,
        "model": run.state.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "precision": run.fabric.strategy.precision.state_dict(),  # the loss scale of 16-mixed
        "confusion": None
        if confusion is None
        else {"matrix": confusion.matrix.cpu(), "origin": vars(confusion.origin).copy()},
        "processes": processes,
        "history": run.history,
        "best": run.best,
        "bn_statistics": run.bn_statistics,
    }


def restore(run: RunState, payload: dict[str, Any]) -> None:
    """Put a run where its checkpoint left off."""
    own = payload["processes"][run.fabric.global_rank]
    try:
        run.state.model.load_state_dict({**payload["model"], **own["buffers"]})
        run.optimizer.load_state_dict(payload["optimizer"])
        run.fabric.strategy.precision.load_state_dict(payload["precision"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"{checkpoint_path(run.run_dir)} belongs to another model or optimiser; resume with the settings the run "
            "began with"
        ) from error
    run.epoch, run.step = payload["epoch"], payload["step"]
    run.history, run.best = payload["history"], payload["best"]
    run.bn_statistics = payload.get("bn_statistics", "running")
    run.tally.load_state_dict(own["tally"])
    if run.fabric.global_rank == 0:
        write_log(run)  # a process killed between the two files left this one a line short
    saved = payload["confusion"]
    run.confusion = (
        None if saved is None else Confusion(saved["matrix"].to(run.fabric.device), ConfusionOrigin(**saved["origin"]))
    )
    if run.confusion_source is not None and own["counter"] is not None:
        run.confusion_source.counter.table.value = own["counter"]
    restore_random_state(own["random"])


def _class_weight(run: RunState) -> Tensor | None:
    """This epoch's class weights on the device, or None."""
    if run.stage.reweighting is None:
        return None
    weight = run.stage.reweighting.class_weight(run.moment(0).progress)
    return None if weight is None else weight.to(run.fabric.device)


def _needs_foreground(run: RunState, moment: Moment) -> bool:
    if run.foreground is None:
        return False
    return run.stage.both_streams or (run.state.mixer is not None and run.state.mixer.needs_foreground(moment))


def _show(run: RunState, steps: int, already: int) -> None:
    if run.fabric.device.type == "cpu" and run.fabric.world_size == 1:
        check_finite(run)
    if run.fabric.global_rank != 0:
        return
    so_far = run.tally.read()
    speed = so_far["images"] * run.fabric.world_size / max(run.tally.seconds, 1e-9)
    run.reporter.step(
        Progress(
            run.epoch,
            run.stage.epochs,
            run.step,
            steps,
            so_far["loss"],
            so_far["train_error"],
            speed,
            so_far["transport_share"],
        )
    )
