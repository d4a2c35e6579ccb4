"""Several trainings at once, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from otmix.config import RunConfig
from otmix.files import remove
from otmix.interrupts import PARENT_ON_STDIN
from otmix.training.launch import cores
from otmix.training.processes import StopRequest
from otmix.training.records import COMMAND
from otmix.training.records import command as recorded_command

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Child:
    config: RunConfig
    process: subprocess.Popen[bytes]
    log: Path

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()

    def ask_to_end(self) -> None:
        if sys.platform == "win32":  # where `terminate` lets no process save, but this does (`end_with_parent`)
            self.close()
        else:
            self.process.terminate()


def train_in_processes(
    configs: Sequence[RunConfig],
    at_once: int,
    ended: Callable[[RunConfig, str | None], None],
    *,
    imports: Sequence[str] = (),
    tick: Callable[[], None] | None = None,
) -> None:
    """Train every configuration (each with its `out`), `at_once` at a time, going on where a run left off.

    `ended(config, error)` is told of each one, with None or the sentence that stopped it. Each process gets its share
    of the cores; it saves and ends when this one is killed. Ctrl-C, SIGTERM or SIGHUP is passed on; once all have saved
    and ended, KeyboardInterrupt is raised. A second Ctrl-C does not wait for them.
    """
    waiting, running = deque(configs), list[_Child]()
    stop = StopRequest()
    with TemporaryDirectory(prefix="otmix-") as folder, stop.listening():
        try:
            while (waiting or running) and not stop.requested:
                while waiting and len(running) < at_once:
                    running.append(_start(waiting.popleft(), Path(folder), at_once, imports))
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    ended(child.config, _error(child))
                if tick is not None:
                    tick()
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            _stop(running)
    if stop.requested:
        raise KeyboardInterrupt


def command(config_file: Path, imports: Sequence[str]) -> list[str]:
    """What is run for one configuration."""
    loaded = [part for path in imports for part in ("--import", path)]
    return [sys.executable, "-m", "otmix", "train", "--config", str(config_file), *loaded]


def write_config(config: RunConfig, path: Path) -> None:
    """The settings in which a run differs from the defaults, as `otmix train --config` reads them."""
    defaults = RunConfig().to_dict()
    changed = {key: value for key, value in config.to_dict().items() if value != defaults[key]}
    path.write_text(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _start(config: RunConfig, folder: Path, at_once: int, imports: Sequence[str]) -> _Child:
    assert config.out is not None  # compare names the folder of every run
    run_dir = Path(config.out)
    config_file = folder / f"{run_dir.name}.yaml"
    write_config(replace(config, resume=True), config_file)
    # a wide terminal keeps an error on one line
    environment = os.environ | {
        **{name: str(_threads(name, at_once)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")},
        "COLUMNS": "2000",
        "NO_COLOR": "1",
        "PYTHONIOENCODING": "utf-8",  # as the log is read
        COMMAND: recorded_command(),
        PARENT_ON_STDIN: "1",
    }
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_name(f"{run_dir.name}.log")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(config_file, imports),
            stdin=subprocess.PIPE,  # nothing is written to it: it ends when this process does
            stdout=subprocess.DEVNULL,
            stderr=stream,
            env=environment,
        )
    return _Child(config, process, log)


def _threads(variable: str, at_once: int) -> int:
    """A process's share of the cores, or what the user wants in `variable` if that is less."""
    share, wanted = max(1, cores() // at_once), os.environ.get(variable, "")
    return min(share, int(wanted)) if wanted.isdecimal() and int(wanted) else share


def _error(child: _Child) -> str | None:
    """Why a process that has ended failed: the last line on its stderr; None for success. Only a crash leaves a log."""
    child.close()
    code = child.process.returncode
    if code == 0:
        remove(child.log)
        return None
    try:
        text = child.log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # somebody has tidied up
        text = "its log is gone"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = lines[-1].removeprefix("otmix: ") if lines else "it said nothing"
    if code == 2:
        remove(child.log)
        return said
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{said} ({how}; see {child.log})"


def _stop(running: Sequence[_Child]) -> None:
    """Ask processes to save and end, and wait for them."""
    for child in running:
        child.ask_to_end()
    try:
        for child in running:
            child.process.wait()
            child.close()
            remove(child.log)
    except KeyboardInterrupt:
        for child in running:
            child.process.kill()
        raise
