"""Where and in how many processes a run is computed: Lightning Fabric, started and kept quiet."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from otmix.config import RunConfig
from otmix.errors import UserError
from otmix.extensions import IMPORTED, import_files
from otmix.interrupts import stop_signals
from otmix.training.loop import Interrupted
from otmix.training.processes import StopRequest
from otmix.training.reporter import Reporter
from otmix.training.runs import run_dir_of
from otmix.wording import counted

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch.multiprocessing.spawn import ProcessContext, ProcessException

PIXELS_A_THREAD = 4096
"""benchmarks/threads.py: at 64 × 8 × 8 pixels one thread takes 1.3 times as long as two on two idle cores, and between
a tenth and 0.8 of their time where one of these is busy.
"""

STOPPED, SAVED, LOST = 130, 3, 4
"""Exit codes of processes that we start: stopped at once, stopped after saving, and ended because another one had."""

CONSEQUENCES = {LOST, -signal.SIGTERM}
"""How processes end because another one has failed."""

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""When one process has failed, the others have so long to notice it, and again when they are told to end."""

Work = Callable[["Fabric", RunConfig, Reporter], Path]
"""A whole run on one of its processes."""


class ConnectionLost(UserError):
    """This process cannot go on without another one of its run, whose failure is the one to tell of."""

    def __init__(self, error: RuntimeError) -> None:
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". This is typically")[0]
        super().__init__(
            f"another process of this run has ended or cannot be reached ({reason}), so this one ends as well; see "
            "what that one said, and go on with --resume once it is mended"
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
    by_hand = config.num_nodes > 1 and not torchrun and not slurm
    if by_hand and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"--num-nodes {config.num_nodes} without torchrun or SLURM needs MASTER_ADDR and MASTER_PORT (where the "
            "first machine can be reached) and NODE_RANK (0, 1, …) in the environment of each machine; set them"
        )
    return processes > 1 and (torchrun or slurm or by_hand)


def make_fabric(config: RunConfig) -> Fabric:
    """Fabric for the device, precision and processes that a configuration asks for. Raises UserError where the machine
    has none such.
    """
    with lightning_quietly():
        from lightning.fabric import Fabric
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        # with "ddp" Fabric takes the environment's word for which of the processes this is
        strategy = "ddp" if config.devices * config.num_nodes > 1 else "auto"
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
    if strategy == "ddp" and fabric.device.type == "cuda" and not torch.distributed.is_nccl_available():
        raise UserError(
            "several GPUs need NCCL, which PyTorch has on Linux alone; give --devices 1, or train in the Windows "
            "Subsystem for Linux"
        )
    computed = fabric.strategy.precision.precision
    if computed != config.precision:  # Lightning replaces what a device cannot do, with no more than a warning
        where = "a CPU" if fabric.device.type == "cpu" else fabric.device.type
        raise UserError(f"--precision {config.precision} does not exist on {where}; choose --precision {computed}")
    return fabric


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads_for(pixels: int, device: torch.device, processes: int = 1) -> Iterator[None]:
    """On a CPU no more threads than one for each `PIXELS_A_THREAD` of the `pixels` of a process's step, nor than this
    one's part of the cores where `processes` run on the machine.

    More would save little: they wait for each other after each operation, and where another program has taken one of
    their cores, they wait for that as well, several times as long as the whole step takes alone.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        mine = before if processes == 1 else min(before, max(1, cores() // processes))
        torch.set_num_threads(min(mine, max(1, pixels // PIXELS_A_THREAD)))
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
        raise SystemExit(STOPPED) from None


def launched(fabric: Fabric, work: Work, config: RunConfig, reporter: Reporter) -> Path:
    """The work of a process that is connected with the others first."""
    try:
        run_dir = Path(fabric.launch(lambda fabric: work(fabric, config, reporter)))
        if torch.distributed.is_initialized():  # else its threads may abort the process when that ends
            torch.distributed.destroy_process_group()
        return run_dir
    except RuntimeError as error:  # gloo has no exception of its own
        if "unsupported gloo device" in str(error):  # as of some versions of PyTorch on Windows
            raise UserError(
                "the processes of a run cannot talk to each other here, as PyTorch's Gloo does not work on this "
                "system; give --devices 1"
            ) from error
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise ConnectionLost(error) from error
        raise


def train_in_processes(work: Work, config: RunConfig, reporter: Reporter) -> Path:
    """Start the processes, and bring the one sentence back from the one that failed.

    Ctrl-C, SIGTERM and SIGHUP are passed on: when all have ended, Interrupted is raised if they have saved first, else
    KeyboardInterrupt. A second Ctrl-C does not wait for them. Raises UserError also when the system ended one.
    """
    fabric, run_dir = make_fabric(config), run_dir_of(config)  # raises here what would stop each of them
    if fabric.device.type == "cpu" and config.devices > max(cores(), 2):
        raise UserError(
            f"--devices {config.devices} would start as many processes on {counted(cores(), 'core')}, which would only "
            f"wait for each other; give at most {max(cores(), 2)}"
        )
    strict = partial(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    stop = StopRequest()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (work, config, reporter, Path(folder), tuple(IMPORTED), _port(fabric), strict)
        with stop.listening():
            failures = _failures(_start(config.devices, arguments), stop)
        told, lost = ([file.read_text("utf-8") for file in Path(folder).glob(f"{kind}-*")] for kind in ("told", "lost"))
    codes = {getattr(failure, "exit_code", None) for failure in failures}
    if told:
        raise UserError(told[0])
    if SAVED in codes:
        raise Interrupted(run_dir)
    if failures and (stop.requested or STOPPED in codes):
        raise KeyboardInterrupt
    if lost and codes <= CONSEQUENCES:
        raise UserError(lost[0])
    if failures:
        raise _reason(failures, run_dir)
    return run_dir


def _port(fabric: Fabric) -> int:
    """Where the processes of this machine meet."""
    from lightning.fabric.strategies.ddp import DDPStrategy

    assert isinstance(fabric.strategy, DDPStrategy)
    assert fabric.strategy.cluster_environment is not None
    return fabric.strategy.cluster_environment.main_port


def _start(processes: int, arguments: tuple[object, ...]) -> ProcessContext:
    """Start processes that do `_in_one_process` with these arguments after their rank."""
    from torch import multiprocessing

    if sys.platform != "win32":  # where there is none
        from multiprocessing.resource_tracker import ensure_running

        ensure_running()  # otherwise it is started below, and lifts the block
    _heed_keyboard(False)  # nor do they until they allow it: an import has no sentence for Ctrl-C
    try:
        start: Callable[..., ProcessContext] = multiprocessing.start_processes  # type: ignore[attr-defined]  # unlisted
        return start(_in_one_process, arguments, processes, join=False)
    finally:
        _heed_keyboard(True)


def _heed_keyboard(yes: bool) -> None:
    """Whether Ctrl-C reaches this thread and, until they say otherwise, the processes that it starts."""
    if sys.platform != "win32" and hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK if yes else signal.SIG_BLOCK, [signal.SIGINT])


def _failures(context: ProcessContext, stop: StopRequest) -> list[ProcessException]:
    """Wait for all processes to end, which they soon must when one has failed; what failed, as it was noticed."""
    from torch.multiprocessing.spawn import ProcessException

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it warns of each process that it ends
    failures, passed_on = list[ProcessException](), False
    try:
        while True:
            try:
                if context.join(timeout=POLL_SECONDS, grace_period=GRACE_SECONDS):
                    return failures
            except ProcessException as failure:
                failures.append(failure)
            if stop.requested and not passed_on:
                passed_on = True
                if sys.platform == "win32" and stop.number == signal.SIGINT:
                    continue  # a console says it to all of its processes, and `terminate` would not let them save
                for process in context.processes:
                    process.terminate()  # in the loop it saves and stops, elsewhere it ends at once
    except KeyboardInterrupt:
        for process in context.processes:
            process.kill()
            process.join()
        raise


def _reason(failures: list[ProcessException], run_dir: Path) -> Exception:
    """What to raise of failures that nobody asked for: one that is not the consequence of another."""
    from torch.multiprocessing.spawn import ProcessExitedException

    def is_consequence(failure: ProcessException) -> bool:
        return isinstance(failure, ProcessExitedException) and failure.exit_code in CONSEQUENCES

    first = min(failures, key=is_consequence)
    if not isinstance(first, ProcessExitedException) or first.signal_name is None:
        return first
    return UserError(
        f"the system ended process {first.error_index} of this run ({first.signal_name}), perhaps because memory ran "
        f"out; what had been saved is kept in {run_dir}: go on with --resume, with fewer --workers if it happens again"
    )


def _in_one_process(
    rank: int,
    work: Work,
    config: RunConfig,
    reporter: Reporter,
    folder: Path,
    imports: tuple[Path, ...],
    port: int,
    strict: Callable[[], None],
) -> None:
    """What a process does that `train_in_processes` has started; a sentence for the user goes into `folder`."""
    try:
        for number in stop_signals():  # a forked process has the handlers of the one that started it
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _heed_keyboard(True)
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
        strict()
        import_files(imports)
        launched(make_fabric(config), work, config, reporter)
    except UserError as error:
        lost = isinstance(error, ConnectionLost)
        written, kind = folder / f"half-{rank}", "lost" if lost else "told"
        written.write_text(str(error), "utf-8")
        written.rename(folder / f"{kind}-{rank}")  # whole, even if this process is ended meanwhile
        raise SystemExit(LOST if lost else 2) from None
    except Interrupted:
        raise SystemExit(SAVED) from None
    except KeyboardInterrupt:  # which torch would take for the end of the work
        raise SystemExit(STOPPED) from None


@contextmanager
def lightning_quietly() -> Iterator[None]:
    """Without Lightning's hints about itself; our own warnings are unaffected."""
    import lightning.fabric  # noqa: F401  (its import sets the level of its logger)

    for name in ("lightning.fabric", "lightning.pytorch"):  # Fabric's hints go through the logger of either
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
