"""Where and in how many processes a run is computed: Lightning Fabric, started and kept quiet."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.extensions import IMPORTED, import_files
from otmix.training.loop import Interrupted
from otmix.training.reporter import Reporter
from otmix.training.runs import run_dir_of

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PIXELS_A_THREAD = 4096
"""benchmarks/threads.py: at 64 × 8 × 8 pixels one thread takes 1.3 times as long as two on two idle cores, and between
a tenth and 0.8 of their time where one of these is busy.
"""

Work = Callable[["Fabric", RunConfig, Reporter], Path]
"""A whole run on one of its processes."""


class ConnectionLost(UserError):
    """Another process of the run has ended, so this one cannot go on; the reason is the other's to tell."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this run has ended or cannot be reached, so this one ends as well; see what that one "
            "said, and go on with --resume once it is mended"
        )


def started_outside(config: RunConfig) -> bool:
    """Whether torchrun, SLURM or, on several machines, a person starts each process of the run, instead of us.

    Raises UserError where torchrun or SLURM starts others than the configuration asks for.
    """
    with lightning_quietly():
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
        from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

        torchrun = TorchElasticEnvironment.detect()
        slurm = not torchrun and SLURMEnvironment.detect()
    processes = config.devices * config.num_nodes
    asked = f"--devices {config.devices} --num-nodes {config.num_nodes}"
    if torchrun and int(os.environ["WORLD_SIZE"]) != processes:
        raise UserError(
            f"torchrun starts {os.environ['WORLD_SIZE']} processes, but {asked} asks for {processes}; give --devices "
            "the number of torchrun's --nproc-per-node, and --num-nodes that of its --nnodes"
        )
    if slurm and processes > 1:
        nodes = os.environ.get("SLURM_NNODES", str(config.num_nodes))
        if (nodes, os.environ.get("SLURM_NTASKS_PER_NODE")) != (str(config.num_nodes), str(config.devices)):
            raise UserError(
                f"under SLURM {asked} needs --nodes={config.num_nodes} --ntasks-per-node={config.devices}, given to "
                "sbatch or srun"
            )
    return processes > 1 and (torchrun or slurm or config.num_nodes > 1)


def make_fabric(config: RunConfig) -> Fabric:
    """Fabric for the device, precision and processes that a configuration asks for. Raises UserError where the machine
    has none such.
    """
    with lightning_quietly():
        from lightning.fabric import Fabric
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        several = config.devices * config.num_nodes > 1
        # on one machine we start the processes, from Python as from the command line
        strategy = "auto" if not several else "ddp" if started_outside(config) else "ddp_spawn"
        try:
            fabric = Fabric(
                accelerator=config.accelerator,
                devices=config.devices,
                num_nodes=config.num_nodes,
                precision=config.precision,
                strategy=strategy,
            )
        except (MisconfigurationException, RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot run on --accelerator {config.accelerator} --devices {config.devices} --precision "
                f"{config.precision}: {str(error).partition('. ')[0].rstrip('.')}; choose --accelerator auto"
            ) from error
    computed = fabric.strategy.precision.precision
    if computed != config.precision:  # Lightning replaces what a device cannot do, with no more than a warning
        where = "a CPU" if fabric.device.type == "cpu" else fabric.device.type
        raise UserError(f"--precision {config.precision} does not exist on {where}; choose --precision {computed}")
    return fabric


@contextmanager
def threads_for(pixels: int, device: torch.device) -> Iterator[None]:
    """On a CPU no more threads than one for each `PIXELS_A_THREAD` of the `pixels` of a process's step.

    More would save little: they wait for each other after each operation, and where another program has taken one of
    their cores, they wait for that as well, several times as long as the whole step takes alone.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(min(before, max(1, pixels // PIXELS_A_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_beside_others(work: Work, config: RunConfig, reporter: Reporter) -> Path:
    """The work of this process, beside which others were started from outside (`started_outside`).

    Raises `ConnectionLost` when another one has ended. A stop ends all: the first one raises it, the others just exit.
    """
    fabric = make_fabric(config)
    try:
        return launched(fabric, work, config, reporter)
    except (Interrupted, KeyboardInterrupt):
        if fabric.global_rank == 0:
            raise
        raise SystemExit(130) from None


def launched(fabric: Fabric, work: Work, config: RunConfig, reporter: Reporter) -> Path:
    """The work of a process that is connected with the others first."""
    try:
        return Path(fabric.launch(lambda fabric: work(fabric, config, reporter)))
    except RuntimeError as error:  # gloo has no exception of its own
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise ConnectionLost from error
        raise


def train_in_processes(work: Work, config: RunConfig, reporter: Reporter) -> Path:
    """Start the processes, and bring the one sentence back from the one that failed."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    with tempfile.TemporaryDirectory() as folder:
        message = Path(folder) / "message"
        fabric = make_fabric(config)
        try:
            with forwarding_signals():
                # inside a partial: Fabric would copy plain arguments field by field, which a frozen value forbids
                return Path(fabric.launch(partial(_in_one_process, work, config, reporter, message, tuple(IMPORTED))))
        except (ProcessExitedException, ProcessRaisedException) as error:
            code = getattr(error, "exit_code", None)
            if code == 130:
                raise Interrupted(run_dir_of(config)) from None
            if message.exists():
                raise UserError(message.read_text()) from None
            raise


def _in_one_process(
    work: Work, config: RunConfig, reporter: Reporter, message: Path, imports: tuple[Path, ...], fabric: Fabric
) -> str:
    try:
        import_files(imports)
        return str(work(fabric, config, reporter))
    except UserError as error:
        message.write_text(str(error))
        raise SystemExit(2) from None
    except Interrupted:
        raise SystemExit(130) from None


@contextmanager
def forwarding_signals() -> Iterator[None]:
    """While processes work for this one, Ctrl-C and SIGTERM are theirs: they save, stop, and end this one's waiting."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be caught in the main thread
        return

    def forward(number: int, frame: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def lightning_quietly() -> Iterator[None]:
    """Without Lightning's hints about itself; our own warnings are unaffected."""
    import logging

    import lightning.fabric  # noqa: F401  (its import sets the level of its logger)

    for name in ("lightning.fabric", "lightning.pytorch"):  # Fabric's hints go through the logger of either
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
