"""One run from a configuration to a complete run directory."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from otmix.config import RunConfig
from otmix.data import ImageStore, open_store
from otmix.errors import UserError
from otmix.evaluation import Evaluation
from otmix.files import read_json, write_atomic, write_json
from otmix.randomness import derive_seed, generator
from otmix.reports.page import write_page
from otmix.sampling import BackgroundStream, ForegroundStream
from otmix.training.confusion_source import as_items
from otmix.training.evaluate import evaluate_items
from otmix.training.loop import Interrupted, RunState, fit, restore
from otmix.training.pictures import draw_pictures
from otmix.training.records import data_record, environment, read_config, write_records
from otmix.training.reporter import Reporter, RunInfo, Silent
from otmix.training.runs import is_finished, run_dir_of
from otmix.training.setup import (
    Forward,
    Plan,
    build_confusion_source,
    build_optimizer,
    embed_maker,
    load_data,
    prepare,
    split_of,
)
from otmix.training.stage import StepState
from otmix.training.tally import Tally
from otmix.types import Items, Output

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PROBE_IMAGES = 1000
"""Training images that progress is watched on where there is no validation split: the same ones after each epoch."""


@dataclass(frozen=True, eq=False)
class Watched:
    """A split that is looked at after an epoch: the key of its error in the log, its store and items."""

    key: str
    store: ImageStore
    items: Items


def train(config: RunConfig, reporter: Reporter | None = None) -> Path:
    """Train, evaluate and record one run, or go on with one; returns its directory.

    Raises UserError for whatever the user can mend, `Interrupted` when asked to stop (a checkpoint has been saved).
    """
    reporter = reporter or Silent()
    run_dir = run_dir_of(config)
    if (
        int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) > 0
    ):  # torchrun or SLURM started us beside rank 0
        return _train(make_fabric(config), config, reporter)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; name a folder with --out")
    started = (run_dir / "config.yaml").exists()
    if started and not config.resume:
        state = "a finished run" if is_finished(run_dir) else "a run that has begun"
        raise UserError(
            f"{run_dir} already holds {state}; add --resume to go on with it, or choose another folder with --out"
        )
    if run_dir.is_dir() and not started and any(path.name[0] != "." for path in run_dir.iterdir()):
        raise UserError(f"the folder {run_dir} is not empty and holds no run; choose another folder with --out")
    try:
        with alone_in(run_dir):
            if config.devices * config.num_nodes == 1:
                return _train(make_fabric(config), config, reporter)
            return _train_in_processes(config, reporter)
    finally:
        reporter.close()


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for this process, so that two never write the same run. The system lets go when we die.

    Raises UserError when another process has it. Where the system has no such locks (Windows), nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("a")
    except OSError as error:
        raise UserError(f"cannot write into {run_dir}: {error.strerror}; choose another folder with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {run_dir}; wait for it, or choose another folder"
            ) from error
        try:
            yield
        finally:
            if not (run_dir / "config.yaml").exists():  # nothing was begun, so nothing is left behind
                (run_dir / ".lock").unlink(missing_ok=True)
                with suppress(OSError):
                    run_dir.rmdir()


def make_fabric(config: RunConfig) -> Fabric:
    """Fabric for the device, precision and processes that a configuration asks for. Raises UserError where the machine
    has none such.
    """
    with _lightning_quietly():
        from lightning.fabric import Fabric
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
        from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        several = config.devices * config.num_nodes > 1
        # torchrun and SLURM start the processes themselves; on one machine we do, from Python as from the command line
        outside = TorchElasticEnvironment.detect() or SLURMEnvironment.detect() or config.num_nodes > 1
        strategy = "auto" if not several else "ddp" if outside else "ddp_spawn"
        try:
            return Fabric(
                accelerator=config.accelerator,
                devices=config.devices,
                num_nodes=config.num_nodes,
                precision=config.precision,
                strategy=strategy,
            )
        except (MisconfigurationException, RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot run on --accelerator {config.accelerator} --devices {config.devices} --precision "
                f"{config.precision}: {error}"
            ) from error


def _train_in_processes(config: RunConfig, reporter: Reporter) -> Path:
    """Start the processes, and bring the one sentence back from the one that failed."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    with tempfile.TemporaryDirectory() as folder:
        message = Path(folder) / "message"
        fabric = make_fabric(config)
        try:
            return Path(fabric.launch(partial(_train_in_process, message=message), config, reporter))
        except (ProcessExitedException, ProcessRaisedException) as error:
            code = getattr(error, "exit_code", None)
            if code == 130:
                raise Interrupted(run_dir_of(config)) from None
            if message.exists():
                raise UserError(message.read_text()) from None
            raise


def _train_in_process(fabric: Fabric, config: RunConfig, reporter: Reporter, message: Path) -> str:
    try:
        return str(_train(fabric, config, reporter))
    except UserError as error:
        message.write_text(str(error))
        raise SystemExit(2) from None
    except Interrupted:
        raise SystemExit(130) from None


def _train(fabric: Fabric, config: RunConfig, reporter: Reporter) -> Path:
    """The whole run, on each of its processes."""
    main = fabric.global_rank == 0
    reporter = reporter if main else Silent()
    run_dir = run_dir_of(config)
    torch.manual_seed(
        derive_seed(config.seed, "torch", fabric.global_rank)
    )  # dropout and the like draw from torch's own generator
    dataset = load_data(config, reporter.loading)
    plan = prepare(config, dataset)
    if (run_dir / "config.yaml").exists():
        check_same_run(run_dir, plan)
        if is_finished(run_dir):
            if main and not (run_dir / "report.html").exists():  # stopped between the result and its page
                write_page(run_dir)
            reporter.message(f"{run_dir} is finished already")
            reporter.finish(read_json(run_dir / "result.json"), run_dir)
            return run_dir
    elif main:
        write_records(run_dir, plan.config, dataset, fabric.device)
    fabric.barrier()

    run = build_run(fabric, run_dir, plan, reporter)
    resumed = run.checkpoint_path.exists()
    if resumed:
        restore(run)
    reporter.start(_info(plan, run, run.epoch if resumed else None))
    fit(run)
    finish(run, plan)
    return run_dir


def build_run(fabric: Fabric, run_dir: Path, plan: Plan, reporter: Reporter) -> RunState:
    """Model, optimiser, streams and stores on their device, ready for the first step."""
    config, dataset, stage = plan.config, plan.dataset, plan.stage
    stage.prepare(plan.model)
    stage.criterion.to(fabric.device)
    store = open_store(
        dataset.train, dataset, fabric.device, train=True, workers=config.workers, progress=reporter.loading
    )
    model = plan.model.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form
    optimizer = build_optimizer(model, stage.optimizer)
    forward_module: torch.nn.Module = Forward(model)
    if config.compile:
        forward_module = torch.compile(forward_module)  # type: ignore[assignment]  # an OptimizedModule is a Module
    with _lightning_quietly():
        wrapped, optimizer = fabric.setup(forward_module, optimizer)

    def forward(images: Tensor) -> Output:
        return Output(*wrapped(images.contiguous(memory_format=torch.channels_last)))

    world = fabric.world_size
    source = build_confusion_source(plan, fabric, store)
    labels = dataset.train.labels
    foreground = (
        None if stage.foreground_probability is None else ForegroundStream(labels, stage.foreground_probability, world)
    )
    return RunState(
        fabric=fabric,
        run_dir=run_dir,
        seed=config.seed,
        stage_index=0,
        stage=stage,
        state=StepState(
            model=model,
            forward=forward,
            make_embed=embed_maker(plan, fabric, store, source),
            criterion=stage.criterion,
            class_weight=None,
            reduction=stage.reduction,
            mixer=stage.mixer,
            counter=source.counter if source is not None and source.streamed else None,
        ),
        module=wrapped,
        optimizer=optimizer,
        store=store,
        background=BackgroundStream(labels, stage.background_batch, world),
        foreground=foreground,
        confusion_source=source,
        tally=Tally(dataset.counts.num_classes, fabric.device),
        reporter=reporter,
        watch=partial(watch, plan=plan, splits=watched_splits(fabric, plan, store)),
        checkpoint_minutes=config.checkpoint_minutes,
    )


def watched_splits(fabric: Fabric, plan: Plan, train_store: ImageStore) -> list[Watched]:
    """What progress shows: validation images where there are any, else a fixed probe of training images; the test set
    only under `best-on-test`.
    """
    dataset = plan.dataset
    splits: list[Watched] = []

    def whole(split: str) -> Watched:
        source = split_of(dataset, split)
        store = open_store(source, dataset, fabric.device, train=False, workers=plan.config.workers)
        return Watched(f"{split}_error", store, as_items(source.labels))

    if dataset.validation is not None:
        splits.append(whole("validation"))
    else:
        labels = dataset.train.labels
        order = torch.randperm(len(labels), generator=generator(plan.config.seed, "probe"))
        probe = order[:PROBE_IMAGES].sort().values
        splits.append(Watched("probe_error", train_store, Items(labels[probe], probe)))
    if plan.protocol.headline == "best-on-test":
        splits.append(whole("test"))
    return splits


def watch(run: RunState, last: bool, plan: Plan, splits: list[Watched]) -> dict[str, float | None]:
    """Errors on the watched splits; under `best-on-test` also keeps the model of the best epoch so far."""
    errors: dict[str, float | None] = dict.fromkeys(("validation_error", "probe_error", "test_error"))
    choosing = plan.protocol.headline == "best-on-test"
    if not (last or choosing or (run.epoch + 1) % plan.config.evaluate_every == 0):
        return errors
    for split in splits:
        errors[split.key] = _evaluate(run, plan, split.store, split.items)[0].top1_error
    test_error = errors["test_error"]
    if choosing and test_error is not None and (run.best is None or test_error < run.best["test_error"]):
        run.best = {"epoch": run.epoch, "test_error": test_error}
        if run.fabric.global_rank == 0:
            save_weights(run, "best.safetensors")
    return errors


def _evaluate(run: RunState, plan: Plan, store: ImageStore, items: Items) -> tuple[Evaluation, Tensor]:
    size = 512 if plan.dataset.small else max(1, (plan.config.batch_size or 1) // run.fabric.world_size)
    return evaluate_items(run.fabric, run.state.model, run.state.criterion, store, items, plan.dataset.counts, size)


def save_weights(run: RunState, name: str) -> None:
    from safetensors.torch import save

    weights = {key: value.detach().cpu().contiguous() for key, value in run.state.model.state_dict().items()}
    write_atomic(run.run_dir / name, lambda stream: stream.write(save(weights)))


def finish(run: RunState, plan: Plan) -> None:
    """The final evaluation and everything that is written once. `result.json` comes last: a run that has it is
    finished.
    """
    config, dataset, method = plan.config, plan.dataset, plan.method
    if plan.protocol.headline == "best-on-test" and run.best is not None:
        from safetensors.torch import load_file

        run.state.model.load_state_dict(load_file(run.run_dir / "best.safetensors"))
    source = split_of(dataset, config.final_split)
    store = open_store(source, dataset, run.fabric.device, train=False, workers=config.workers)
    evaluation, probabilities = _evaluate(run, plan, store, as_items(source.labels))
    if run.fabric.global_rank != 0:
        run.fabric.barrier()
        return
    save_weights(run, "model.safetensors")
    _save_arrays(run, source.labels, probabilities)
    seconds = [row["seconds"] for row in run.history]
    where = environment(run.fabric.device)
    result = {
        "method": method.name,
        "title": method.title,
        "protocol": config.protocol,
        "set": config.to_dict()["set"],
        "looks_at_test": plan.protocol.looks_at_test
        if method.mixer == "otmix"
        else plan.protocol.headline == "best-on-test",
        "headline_epoch": run.best["epoch"] if run.best is not None else config.epochs,
        "data": dataset.name,
        "split": config.final_split,
        "seed": config.seed,
        "epochs": config.epochs,
        "backbone": config.backbone,
        "hash": plan.config.hash,
        "commit": where["commit"],
        "device": where["device"],
        "precision": config.precision,
        "seconds_per_epoch": float(np.median(seconds)),
        "evaluation": evaluation.to_dict(),
    }
    draw_pictures(run, plan)
    write_json(run.run_dir / "result.json", result)
    write_page(run.run_dir)
    run.reporter.finish(result, run.run_dir)
    run.fabric.barrier()


def _save_arrays(run: RunState, labels: Tensor, probabilities: Tensor) -> None:
    arrays: dict[str, Any] = {
        "index": np.arange(len(labels)),
        "labels": labels.cpu().numpy(),
        "probabilities": probabilities.half().numpy(),
    }
    write_atomic(run.run_dir / "predictions.npz", lambda stream: np.savez_compressed(stream, **arrays))
    pairs: dict[str, Any] = {by: table.value.to_dense().cpu().long().numpy() for by, table in run.tally.pairs.items()}
    write_atomic(run.run_dir / "pairs.npz", lambda stream: np.savez_compressed(stream, **pairs))


def check_same_run(run_dir: Path, plan: Plan) -> None:
    """Raises UserError when the run in `run_dir` was begun with other settings or other data."""
    differences = plan.config.difference(read_config(run_dir))
    if differences:
        raise UserError(
            f"{run_dir} holds a run with other settings ({'; '.join(differences)}); resume with the same ones, or "
            "choose another folder with --out"
        )
    then, now = read_json(run_dir / "data.json"), data_record(plan.dataset)
    changed = [key for key in now if key not in ("notes", "root") and now[key] != then.get(key)]
    if changed:
        raise UserError(
            f"the data are no longer those that {run_dir} was begun with ({', '.join(changed)} changed); restore them, "
            "or start a new run with --out"
        )


def _info(plan: Plan, run: RunState, resumed_at: int | None) -> RunInfo:
    config, dataset = plan.config, plan.dataset
    return RunInfo(
        run_dir=run.run_dir,
        title=plan.method.title,
        protocol=config.protocol,
        data=dataset.name,
        images=dataset.counts.total,
        classes=dataset.counts.num_classes,
        imbalance=dataset.counts.imbalance,
        backbone=str(config.backbone),
        parameters=sum(parameter.numel() for parameter in run.state.model.parameters()),
        epochs=run.stage.epochs,
        steps_per_epoch=run.background.steps_per_epoch,
        device=str(run.fabric.device),
        precision=config.precision,
        notes=tuple(dataset.notes),
        resumed_at_epoch=resumed_at,
    )


@contextmanager
def _lightning_quietly() -> Iterator[None]:
    """Without Lightning's hints about itself; our own warnings are unaffected."""
    import logging

    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
