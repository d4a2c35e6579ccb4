"""What a run looks like in a terminal: a live display, or plain lines where nobody watches a cursor."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otmix.streams import lasting
from otmix.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from otmix.reports.tables import Table
    from otmix.training.reporter import Progress, Reporter, RunInfo

REFRESH_SECONDS = 0.25
LINE_SECONDS = 5.0
"""Plain lines come at most this often: quick epochs do not fill a log."""
_PLAIN_WIDTH = 160


def stdout_console() -> Console:
    """A console for stdout; where that is a file or a pipe it is wide, so that tables and paths are not broken. It goes
    on when nobody reads it any more.
    """
    from rich.console import Console

    return Console(file=lasting(sys.stdout), width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def print_table(console: Console, table: Table) -> None:
    """A table with its title and notes on lines of their own: inside, they would be broken at its width."""
    if table.title:
        console.print(table.title, style="bold", markup=False, highlight=False)
    console.print(replace(table, title="", notes=()).rich())
    for note in table.notes:
        console.print(note, markup=False, highlight=False)


def make_reporter(console: Console | None = None, *, brief: bool = False) -> Reporter:
    """A live display on a terminal, otherwise plain lines. `brief` leaves out what a run is worth, for one of many."""
    terminal = sys.stdout.isatty() if console is None else console.is_terminal
    kind = LiveReporter if terminal and os.environ.get("TERM") != "dumb" else LineReporter
    return kind(console, brief=brief)


@contextmanager
def reporter_on_stderr() -> Iterator[Reporter]:
    """For commands whose result goes to stdout."""
    from rich.console import Console

    reporter = make_reporter(Console(file=lasting(sys.stderr)))
    try:
        yield reporter
    finally:
        reporter.close()


class Clock:
    """How long the rest of a run takes, judged by its last ten epochs: OTmix's grow longer with time.

    Nobody says how far the epoch was in which a run is `resumed`: it is timed from the first step that is shown.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, *, resumed: bool = False) -> None:
        self.now = now
        self.epochs: deque[float] = deque(maxlen=10)
        self.began: float | None = None if resumed else now()
        self.before = 0.0  # the share of the epoch that was done when `began`
        self.pace: float | None = None  # seconds that all steps of the epoch take

    def reached(self, share: float) -> None:
        """Must be called at each step that is shown, with the share of its epoch that is done."""
        if self.began is None:
            self.began, self.before = self.now(), share
        elif share > self.before:
            self.pace = (self.now() - self.began) / (share - self.before)

    def epoch_ended(self) -> None:
        ended = self.now()
        # an epoch that was resumed and went on too shortly to be timed says nothing
        if self.began is not None and (self.before == 0 or self.pace is not None):
            self.epochs.append(ended - self.began + self.before * (self.pace or 0.0))
        self.began, self.before, self.pace = ended, 0.0, None

    def left(self, epoch: int, epochs: int, share: float = 0.0) -> float | None:
        """Seconds from `share` of `epoch` (from 0) to the end; None while nothing can be said."""
        if self.epochs:
            each = sum(self.epochs) / len(self.epochs)
        elif self.began is not None and share > self.before:
            each = (self.now() - self.began) / (share - self.before)
        else:
            return None
        return max(0.0, (epochs - epoch - share) * each)


class _Reporter:
    """What both displays share. It can be sent to the process that trains."""

    def __init__(
        self, console: Console | None = None, now: Callable[[], float] = time.monotonic, *, brief: bool = False
    ) -> None:
        self._console = console
        self.brief = brief
        self.now = now
        self.clock = Clock(now)
        self.epochs = 0

    def __getstate__(self) -> dict[str, Any]:
        """For the process that trains: a console and its bars belong to the process that opened them."""
        return self.__dict__ | {"_console": None, "bars": None, "tasks": {}}

    @property
    def console(self) -> Console:
        if self._console is None:
            self._console = stdout_console()
        return self._console

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def start(self, info: RunInfo) -> None:
        self.epochs = info.epochs
        self.clock = Clock(self.now, resumed=info.resumed_at_epoch is not None)
        headline, length = f"{info.title} on {info.data} (protocol {info.protocol})", counted(info.epochs, "epoch")
        if self.brief:
            self.say(f"{headline}, {length} · {info.run_dir}")
            return
        self.say(headline, style="bold")
        millions = info.parameters / 1e6
        self.say(
            f"  {counted(info.images, 'image')} in {counted(info.classes, 'class')}, imbalance {info.imbalance:.4g} · "
            f"{info.backbone}, {millions:.2f} M parameters · {info.device}, {info.precision}"
        )
        self.say(f"  {length} of {counted(info.steps_per_epoch, 'step')}{_resumed(info)} · {info.run_dir}")
        for note in info.notes:
            self.say(f"  {note}", style="dim")

    def message(self, text: str) -> None:
        self.say(text)

    def finish(self, result: dict[str, Any], run_dir: Path) -> None:
        from otmix.reports.tables import result_table

        self.close()
        if self.brief:
            return
        print_table(self.console, result_table(result))
        self.say(f"run     {run_dir}")
        if (run_dir / "report.html").is_file():
            self.say(f"report  {run_dir / 'report.html'}")

    def close(self) -> None:
        pass


def _resumed(info: RunInfo) -> str:
    if info.resumed_at_epoch is None:
        return ""
    over = info.resumed_at_epoch >= info.epochs
    return ", resumed after the last" if over else f", resumed in epoch {info.resumed_at_epoch + 1}"


class LineReporter(_Reporter):
    """One line for an epoch, and not more than one in five seconds."""

    def __init__(
        self, console: Console | None = None, now: Callable[[], float] = time.monotonic, *, brief: bool = False
    ) -> None:
        super().__init__(console, now, brief=brief)
        self.shown = now()

    def start(self, info: RunInfo) -> None:
        super().start(info)
        self.shown = self.now()

    def loading(self, done: int, total: int) -> None:
        if self.now() - self.shown >= LINE_SECONDS:
            self.shown = self.now()
            self.say(f"reading images: {done:,} of {total:,}")

    def looking(self, done: int, total: int) -> None:
        # beside the lines of the epochs seldom
        if self.now() - self.shown >= (12 if self.epochs else 1) * LINE_SECONDS:
            self.shown = self.now()
            self.say(f"judging images: {done:,} of {total:,}")

    def step(self, progress: Progress) -> None:
        share = progress.step / progress.steps
        self.clock.reached(share)
        # an epoch of hours still shows that it is alive
        if self.now() - self.shown >= 12 * LINE_SECONDS:
            self.shown = self.now()
            left = self.clock.left(progress.epoch, progress.epochs, share)
            self.say(
                f"epoch {progress.epoch + 1}/{progress.epochs}  step {progress.step}/{progress.steps}"
                f"  loss {progress.loss:.3f}  error {percent(progress.error)}"
                f"  {progress.images_per_second:,.0f} images/s  left {duration(left)}"
            )

    def epoch(self, row: dict[str, Any]) -> None:
        self.clock.epoch_ended()
        done = row["epoch"] + 1
        if row["epoch"] > 0 and done < self.epochs and self.now() - self.shown < LINE_SECONDS:
            return
        self.shown = self.now()
        left = self.clock.left(done, self.epochs)
        parts = [
            f"epoch {done}/{self.epochs}",
            f"loss {row['loss']:.3f}",
            f"error {percent(row['train_error'])}",
            *watched(row),
        ]
        if row["mixed_share"]:
            parts.append(f"mixed {percent(row['mixed_share'], 0)} (by transport {percent(row['transport_share'], 0)})")
        parts += [f"{row['images_per_second']:,.0f} images/s", f"left {duration(left)}"]
        self.say("  ".join(parts))


class LiveReporter(_Reporter):
    """Bars for the run and for the epoch, refreshed at most four times a second, by no thread of its own."""

    def __init__(
        self, console: Console | None = None, now: Callable[[], float] = time.monotonic, *, brief: bool = False
    ) -> None:
        super().__init__(console, now, brief=brief)
        self.bars: RichProgress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.steps = 0
        self.drawn = now() - REFRESH_SECONDS

    def start(self, info: RunInfo) -> None:
        self.close()
        super().start(info)
        at, self.steps = info.resumed_at_epoch or 0, info.steps_per_epoch
        self._open({"run": (at, info.epochs, "epochs"), "epoch": (0, info.steps_per_epoch, "steps")})

    def loading(self, done: int, total: int) -> None:
        if self.bars is None:
            self._open({"reading": (done, total, "images")})
        if "reading" in self.tasks:
            self._update("reading", completed=done, total=total, shown=f"{done:,}/{total:,} images")
            self._draw(always=done >= total)
        if done >= total and "reading" in self.tasks:
            self.close()

    def looking(self, done: int, total: int) -> None:
        if self.bars is None:
            self._open({"judging": (done, total, "images")})
        shown = f"{done:,}/{total:,} images"
        if "judging" in self.tasks:
            self._update("judging", completed=done, total=total, shown=shown)
        elif "epoch" in self.tasks:
            self._update("epoch", state=f"judging {shown}")
        self._draw(always=done >= total)
        if done >= total and "judging" in self.tasks:
            self.close()

    def step(self, progress: Progress) -> None:
        share = progress.step / progress.steps
        self.clock.reached(share)
        if self.bars is None:
            return
        left = self.clock.left(progress.epoch, progress.epochs, share)
        state = self._state(progress.loss, progress.error, progress.images_per_second, progress.transport_share)
        epochs, steps = f"{progress.epoch}/{progress.epochs} epochs", f"{progress.step}/{progress.steps} steps"
        self._update("run", completed=progress.epoch + share, shown=epochs, left=f"{duration(left)} left")
        self._update("epoch", completed=progress.step, shown=steps, state=state)
        self._draw()

    def epoch(self, row: dict[str, Any]) -> None:
        self.clock.epoch_ended()
        if self.bars is None:
            return
        done = row["epoch"] + 1
        state = self._state(row["loss"], row["train_error"], row["images_per_second"], row["transport_share"])
        left = f"{duration(self.clock.left(done, self.epochs))} left"
        self._update("run", completed=done, shown=f"{done}/{self.epochs} epochs", left=left)
        if seen := watched(row):
            self._update("run", state="  ".join(seen))
        self._update("epoch", completed=self.steps, shown=f"{self.steps}/{self.steps} steps", state=state)
        self._draw(always=done == self.epochs)

    def close(self) -> None:
        if self.bars is not None:
            self.bars.stop()
        elif self._console is None and sys.stdout.isatty():
            # another process may have drawn here and been stopped before it could tidy up
            self.console.show_cursor(True)
        self.bars, self.tasks = None, {}

    def _open(self, tasks: dict[str, tuple[int, int, str]]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        # on a narrow terminal rather the numbers than the bar
        bar = [] if self._narrow else [BarColumn(bar_width=24)]
        shown, left = ("", "") if self._narrow else (":>16", ":>13")
        self.bars = Progress(
            TextColumn("{task.description:<7}"),
            *bar,
            TextColumn(f"{{task.fields[shown]{shown}}}"),
            TextColumn(f"{{task.fields[left]{left}}}"),
            TextColumn("{task.fields[state]}"),
            console=self.console,
            auto_refresh=False,
        )
        for name, (done, total, unit) in tasks.items():
            self.tasks[name] = self.bars.add_task(
                name, total=total, completed=done, shown=f"{done}/{total} {unit}", left="", state=""
            )
        self.bars.start()

    @property
    def _narrow(self) -> bool:
        return self.console.width < 120

    def _state(self, loss: float, error: float, images_per_second: float, transport: float) -> str:
        if self._narrow:
            by_transport = f"  OT {percent(transport, 0)}" if transport else ""
            return f"loss {loss:.3f}  error {percent(error)}  {images_per_second:,.0f}/s{by_transport}"
        by_transport = f"  transport {percent(transport, 0)}" if transport else ""
        return f"loss {loss:.3f}  error {percent(error)}  {images_per_second:,.0f} images/s{by_transport}"

    def _update(self, name: str, **values: Any) -> None:
        assert self.bars is not None
        self.bars.update(self.tasks[name], **values)

    def _draw(self, always: bool = False) -> None:
        now = self.now()
        if self.bars is not None and (always or now - self.drawn >= REFRESH_SECONDS):
            self.drawn = now
            self.bars.refresh()


def watched(row: dict[str, Any]) -> list[str]:
    """The errors on the images that progress is watched on, where this epoch has them."""
    return [
        f"{split} error {percent(row[key])}"
        for split in ("validation", "probe", "test")
        if row.get(key := f"{split}_error") is not None
    ]


def percent(share: float, decimals: int = 1) -> str:
    return f"{100 * share:.{decimals}f} %"


def duration(seconds: float | None) -> str:
    """1:02:03, or 2:03 below an hour; ? where nothing is known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
