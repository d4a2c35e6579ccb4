"""A process that has imported everything and forks one child for each run it is asked for, so that a test can kill
many.

Each line on stdin is a job (see `Job`); for each, one line with the child's pid and, at its end, one with its status go
to stdout. A child that was told to may send itself a signal at an exact event of its life.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """A run, and when to send which signal: at the `count`-th `event` of this life (from 1).

    Events: "step" (a step was counted), "epoch" (it begins to be finished), "before NAME" and "after NAME" (the rename
    of a file of that name), "inside checkpoint.pt" (half of it is written), "call" (a function is called; counted from
    the first step of this life on: any moment at all). `pictures`: draw them too, which takes seconds.
    """

    config: dict[str, Any]
    answer: str
    event: str | None = None
    count: int = 1
    signal: int = signal.SIGKILL
    again: list[int] = field(default_factory=list)
    pictures: bool = False
    prepare: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a child ended: "done", the name of an exception with its `text`, or "killed"; `steps` it had trained."""

    kind: str
    text: str = ""
    steps: int = 0


class Server:
    """The parent's side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, config: dict[str, Any], **how: Any) -> int:
        """Begins a run; its pid."""
        self.answer = self.folder / "answer.json"
        self.answer.unlink(missing_ok=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(Job(config, str(self.answer), **how))) + "\n")
        self.process.stdin.flush()
        return self._read()

    def wait(self) -> Outcome:
        status = self._read()
        if os.WIFSIGNALED(status):
            return Outcome("killed", signal.Signals(os.WTERMSIG(status)).name)
        return Outcome(**json.loads(self.answer.read_text()))

    def run(self, config: dict[str, Any], **how: Any) -> Outcome:
        self.start(config, **how)
        return self.wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server has died"
        return int(line)


class Bomb:
    """Counts events and sends the signal at the right one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.seen: Counter[str] = Counter()

    def hit(self, event: str) -> None:
        self.seen[event] += 1
        if event == self.job.event and self.seen[event] == self.job.count:
            sys.setprofile(None)
            os.kill(os.getpid(), self.job.signal)
            for number in self.job.again:
                time.sleep(0.3)  # a person's second Ctrl-C, not the echo of the first
                os.kill(os.getpid(), number)

    def profile(self, frame: object, event: str, argument: object) -> None:
        if event == "call":
            self.hit("call")


def listen(bomb: Bomb, pictures: bool) -> None:
    """Tell `bomb` of every event in this process from now on."""
    import torch
    import torch.multiprocessing

    import otmix.training.loop as loop
    import otmix.training.outcome as outcome
    import otmix.training.run as run

    replace, save, add, finish_epoch = os.replace, torch.save, loop.Tally.add, loop.finish_epoch

    def replaced(source: Any, target: Any) -> None:
        bomb.hit(f"before {Path(target).name}")
        replace(source, target)
        bomb.hit(f"after {Path(target).name}")

    def saved(value: object, stream: Any, **options: Any) -> None:
        if options:  # torch sends tensors to other processes like this
            save(value, stream, **options)
            return
        whole = io.BytesIO()
        save(value, whole)
        half = len(whole.getvalue()) // 2
        stream.write(whole.getvalue()[:half])
        stream.flush()
        bomb.hit("inside checkpoint.pt")
        stream.write(whole.getvalue()[half:])

    def added(self: Any, parts: Any, step: int) -> None:
        add(self, parts, step)
        bomb.hit("step")
        if bomb.job.event == "call" and bomb.seen["step"] == 1:
            sys.setprofile(bomb.profile)

    def finished(state: Any) -> None:
        bomb.hit("epoch")
        finish_epoch(state)

    def nothing(*_: object) -> None:
        pass

    os.replace, torch.save, loop.Tally.add, loop.finish_epoch = replaced, saved, added, finished
    os.fsync = nothing  # SIGKILL loses no write, and a disk is slow
    # several processes are forked too: they need not import everything again
    torch.multiprocessing.start_processes = partial(torch.multiprocessing.start_processes, start_method="fork")
    if not pictures:
        outcome.draw_pictures = outcome.write_page = run.write_page = nothing


def child(job: Job) -> None:
    from otmix.config import RunConfig
    from otmix.errors import UserError
    from otmix.training import train

    bomb = Bomb(job)
    try:
        listen(bomb, job.pictures)
        if job.prepare:
            module, function, argument = job.prepare.split(" ", 2)
            getattr(importlib.import_module(module), function)(argument)
        train(RunConfig.from_dict(job.config))
        outcome = Outcome("done", steps=bomb.seen["step"])
    except BaseException as error:
        kind = "UserError" if isinstance(error, UserError) else type(error).__name__
        unexpected = kind not in ("UserError", "Interrupted", "KeyboardInterrupt")
        text = traceback.format_exc() if unexpected else str(error)
        outcome = Outcome(kind, text, bomb.seen["step"])
    sys.setprofile(None)
    Path(job.answer).write_text(json.dumps(asdict(outcome)))


def warm_up() -> None:
    """Everything that a run imports, and nothing that starts threads, which a fork would lose."""
    import scipy.special

    from otmix.config import RunConfig
    from otmix.training.launch import make_fabric
    from otmix.training.setup import build_optimizer, load_data, prepare

    config = RunConfig(accelerator="cpu")
    make_fabric(config)
    plan = prepare(config, load_data(config))
    build_optimizer(plan.model, plan.stages[0].optimizer)
    scipy.special.betaincinv(1.0, 1.0, 0.5)


def main() -> None:
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests were started by nohup
    warm_up()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.close(0)
                child(Job(**json.loads(line)))
                status = 0
            finally:
                os._exit(status)
        print(pid, file=answers, flush=True)
        print(os.waitpid(pid, 0)[1], file=answers, flush=True)


if __name__ == "__main__":
    main()
