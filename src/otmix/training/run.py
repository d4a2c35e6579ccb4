"""One run from a configuration to a complete run directory."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from otmix.config import RunConfig
from otmix.data import ImageDataset, dead_reader, require_readable
from otmix.errors import UserError
from otmix.files import remove, remove_temporaries
from otmix.methods import check_settings, parse_method
from otmix.randomness import derive_seed
from otmix.reports.page import write_page
from otmix.training.build import build_run
from otmix.training.checkpoint import load_checkpoint
from otmix.training.launch import make_fabric, started_outside, threads_for, train_beside_others, train_in_processes
from otmix.training.loop import RunState, checkpoint_path, fit, restore
from otmix.training.outcome import finish
from otmix.training.records import (
    changed_data,
    changed_inputs,
    read_config,
    read_result,
    read_settings,
    record_root,
    write_records,
)
from otmix.training.reporter import Reporter, RunInfo, Silent
from otmix.training.runs import has_begun, is_finished, run_dir_of
from otmix.training.setup import Plan, load_data, prepare, split_of
from otmix.training.stage import Stage
from otmix.training.statistics import mix_statistics
from otmix.wording import counted

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def train(config: RunConfig, reporter: Reporter | None = None) -> Path:
    """Train, evaluate and record one run, or go on with one; returns its directory.

    Raises UserError for whatever the user can mend, `Interrupted` when asked to stop (a checkpoint has been saved),
    KeyboardInterrupt when nothing was being trained then (the last checkpoint is kept).
    Where torchrun or SLURM has started several processes, each of them calls this.
    """
    reporter = reporter or Silent()
    method = parse_method(config.method)
    config = replace(config, set=method.converted(config.set))
    check_settings(config.set, config.protocol, [method.name])  # now: reading the data may take long
    try:
        if started_outside(config):
            return train_beside_others(_train_beside_others, config, reporter)
        with directory_of(config):
            if config.devices * config.num_nodes == 1:
                return _train(make_fabric(config), config, reporter)
            return train_in_processes(_train, config, reporter)
    finally:
        reporter.close()


def _train_beside_others(fabric: Fabric, config: RunConfig, reporter: Reporter) -> Path:
    """The whole run, on one of its processes; the first one looks after the directory."""
    with directory_of(config) if fabric.global_rank == 0 else nullcontext():
        fabric.barrier()  # the others end here where the first one may not begin
        return _train(fabric, config, reporter)


@contextmanager
def directory_of(config: RunConfig) -> Iterator[None]:
    """Holds the run's directory. Raises UserError where the run may not begin or go on in it."""
    run_dir = run_dir_of(config)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; name a folder with --out")
    started = has_begun(run_dir)
    if started and not config.resume:
        if is_finished(run_dir):
            raise UserError(f"{run_dir} already holds a finished run; choose another folder with --out")
        raise UserError(
            f"{run_dir} already holds a run that has begun; add --resume to go on with it, or choose another folder "
            "with --out"
        )
    # what a run leaves that has no checkpoint, as it ended before the first or a damaged one was deleted: it may begin
    # anew
    left = {"data.json", "environment.json", "settings.json"}
    if all((run_dir / name).exists() for name in ("config.yaml", *left)):
        left |= {"config.yaml", *(path.name for path in _of_before(run_dir)), "figures"}
        if not started and (run_dir / "model.safetensors").exists():
            raise UserError(
                f"{run_dir} holds a model without the result.json or checkpoint.pt of its run; move model.safetensors "
                "away to begin the run anew, or choose another folder with --out"
            )
    there = () if started or not run_dir.is_dir() else run_dir.iterdir()
    if any(path.name[0] != "." and path.name not in left for path in there):
        raise UserError(f"the folder {run_dir} is not empty and holds no run; choose another folder with --out")
    with alone_in(run_dir):
        yield


def _of_before(run_dir: Path) -> list[Path]:
    """What a run without a checkpoint has left that would be taken for the new one's, which begins in its folder."""
    patterns = ("metrics.jsonl", "best-*.safetensors", "predictions.npz", "pairs.npz", "figures/*.png")
    return [path for pattern in patterns for path in run_dir.glob(pattern)]


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for this process, so that two never write the same run. The system lets go when we die.

    Raises UserError when another process has it. Where the file system (some network drives) has no such locks, nothing
    is held.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("ab")
    except OSError as error:
        raise UserError(f"cannot write into {run_dir}: {error.strerror}; choose another folder with --out") from error
    with lock:
        try:
            _lock(lock)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"another process is training in {run_dir}; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
        try:
            yield
        finally:
            if not (run_dir / "config.yaml").exists():  # nothing was begun, so nothing is left behind
                if sys.platform == "win32":
                    lock.close()  # no open file can be deleted there
                with suppress(OSError):
                    (run_dir / ".lock").unlink(missing_ok=True)
                    for folder in made:
                        folder.rmdir()


def _lock(file: BinaryIO) -> None:
    """Raises OSError where another process has it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # not flock, which workers would inherit: they outlive a killed process by seconds
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _train(fabric: Fabric, config: RunConfig, reporter: Reporter) -> Path:
    """The whole run, on each of its processes."""
    main = fabric.global_rank == 0
    reporter = reporter if main else Silent()
    run_dir = run_dir_of(config)
    torch.manual_seed(
        derive_seed(config.seed, "torch", fabric.global_rank)
    )  # dropout and the like draw from torch's own generator
    dataset = _load_with_others(fabric, config, reporter)
    has_weights = checkpoint_path(run_dir).exists() or (run_dir / "model.safetensors").exists()
    plan = prepare(config, dataset, begun=has_begun(run_dir) and has_weights)
    assert plan.config.batch_size is not None  # `prepare` filled it in
    pixels = plan.config.batch_size // fabric.world_size * dataset.image_size**2
    with threads_for(pixels, fabric.device, config.devices):
        try:
            return _run(fabric, run_dir, plan, reporter)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the memory of {fabric.device} does not suffice; choose a smaller --batch-size, or --precision "
                "bf16-mixed"
            ) from error
        except RuntimeError as error:
            if "DefaultCPUAllocator" in str(error):  # which has no exception of its own
                raise UserError("the memory does not suffice; choose a smaller --batch-size or --image-size") from error
            if plan.config.compile and type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
                reason = str(error).partition("\n")[0].rstrip(". ")
                raise UserError(
                    f"--compile does not work here ({reason}); leave it out, or install the C++ compiler that it "
                    "needs, on Windows that of Visual Studio, whose own command prompt must be used then"
                ) from error
            if (told := dead_reader(error)) is None:
                raise
            raise told from error


def _load_with_others(fabric: Fabric, config: RunConfig, reporter: Reporter) -> ImageDataset:
    """The data; what is downloaded, the first process of each machine downloads before the others look for it."""
    alone = fabric.world_size == 1 or not config.data.startswith("cifar")
    if not alone and fabric.local_rank != 0:
        fabric.barrier()
    dataset = load_data(config, reporter.loading)
    if not alone and fabric.local_rank == 0:
        fabric.barrier()
    return dataset


def _run(fabric: Fabric, run_dir: Path, plan: Plan, reporter: Reporter) -> Path:
    """What is left to do of the run in `run_dir`."""
    main, dataset = fabric.global_rank == 0, plan.dataset
    if has_begun(run_dir):
        check_same_run(run_dir, plan)
        if main:
            record_root(run_dir, plan.config.root)
        if is_finished(run_dir) and (run_dir / "model.safetensors").exists():
            result = read_result(run_dir)
            if main and not (run_dir / "report.html").exists():  # stopped between the result and its page
                write_page(run_dir)
            reporter.message(f"{run_dir} is finished already")
            reporter.finish(result, run_dir)
            return run_dir
    elif main:
        if plan.config.on_bad_image == "error":  # with "skip" all have been read; now, not when training is over
            require_readable(split_of(dataset, plan.config.final_split), reporter.loading)
        for path in _of_before(run_dir):
            remove(path)
        write_records(run_dir, plan.config, plan.settings, dataset, fabric.device, plan.looks_at_test())
    if main:
        remove_temporaries(run_dir)
    fabric.barrier()

    path = checkpoint_path(run_dir)
    saved = load_checkpoint(path) if path.exists() else None
    first = 0 if saved is None else saved["stage_index"]
    run = None
    for index in range(first, len(plan.stages)):
        resumed = saved is not None and index == first
        run = build_run(fabric, run_dir, plan, reporter, index, run, resumed=resumed)
        if saved is not None and resumed:
            restore(run, saved)
        reporter.start(_info(plan, run, run.epoch if resumed else None))
        fit(run)
        mix_statistics(run)
    assert run is not None  # a plan has at least one stage
    finish(run, plan)
    return run_dir


def check_same_run(run_dir: Path, plan: Plan) -> None:
    """Raises UserError when the run in `run_dir` was begun with other settings, data or files of one's own."""
    here = plan.config.identity_with(plan.settings)
    there = read_config(run_dir).identity_with(read_settings(run_dir))
    differences = [
        f"{key}: {here.get(key)} here, {there.get(key)} there"
        for key in here | there
        if key != "root" and here.get(key) != there.get(key)
    ]
    if differences:
        raise UserError(
            f"{run_dir} holds a run with other settings ({'; '.join(differences)}); resume with the same ones, or "
            "choose another folder with --out"
        )
    if changed := changed_data(run_dir, plan.dataset):
        raise UserError(
            f"the data are no longer those that {run_dir} was begun with ({', '.join(changed)} changed); restore them, "
            "or start a new run with --out"
        )
    if files := changed_inputs(run_dir, plan.config):
        raise UserError(
            f"{files} no longer holds what {run_dir} was begun with; restore it, or start a new run with --out"
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
        notes=(*dataset.notes, *_unmixed(run.stage)),
        resumed_at_epoch=resumed_at,
    )


def _unmixed(stage: Stage) -> Iterator[str]:
    if stage.mixer is not None and not stage.mixer.schedule.reaches(stage.epochs):
        yield (
            f"Nothing will be mixed: none of {counted(stage.epochs, 'epoch')} begins within the window "
            f"{stage.mixer.schedule.window} of the run; train for more epochs, or move it (mix_from, mix_until)."
        )
