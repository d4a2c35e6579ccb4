"""What a run looks like in a terminal and in a log."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from otmix.display import Clock, LineReporter, LiveReporter, duration, make_reporter
from otmix.training.reporter import Progress, RunInfo
from otmix.wording import counted


class Time:
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def info(epochs: int = 100, notes: tuple[str, ...] = (), resumed: int | None = None) -> RunInfo:
    named = {"title": "ERM + OTmix", "protocol": "clean", "data": "digits", "backbone": "resnet8", "device": "cpu"}
    sizes = {"images": 1078, "classes": 10, "imbalance": 20.83, "parameters": 80_000, "steps_per_epoch": 50}
    return RunInfo(
        Path("a run"), **named, **sizes, epochs=epochs, precision="32-true", notes=notes, resumed_at_epoch=resumed
    )


def row(epoch: int, **values: Any) -> dict[str, Any]:
    errors = {"validation_error": None, "probe_error": 0.125, "test_error": None}
    shares = {"mixed_share": 0.5, "transport_share": 0.25}
    return {"epoch": epoch, "loss": 1.5, "train_error": 0.4, "images_per_second": 1234.5, **errors, **shares, **values}


def progress(epoch: int, step: int, epochs: int = 100) -> Progress:
    return Progress(epoch, epochs, step, 50, 0.75, 0.375, 999.0, 0.3)


def result(**groups: float | None) -> dict[str, Any]:
    found = {
        "n": 10,
        "top1_error": 0.25,
        "balanced_accuracy": 0.625,
        "calibration_error": 0.0625,
        "group_error": groups,
    }
    return {"method": "ce", "title": "ERM [red]", "split": "test", "protocol": "clean", "evaluation": found}


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    with io.StringIO() as opened:
        yield opened


def lines(stream: io.StringIO, time: Time | None = None) -> LineReporter:
    return LineReporter(Console(file=stream, width=120), time or Time())


def live(stream: io.StringIO, time: Time) -> LiveReporter:
    return LiveReporter(Console(file=stream, width=120, force_terminal=True, legacy_windows=False), time)


def test_terminal_is_live_and_the_rest_is_lines(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_reporter(Console(file=stream)), LineReporter)
    assert isinstance(make_reporter(Console(file=stream, force_terminal=True)), LiveReporter)
    assert isinstance(make_reporter(), LineReporter)  # pytest's stdout
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_reporter(Console(file=stream, force_terminal=True)), LineReporter)


def test_a_line_for_an_epoch(stream: io.StringIO) -> None:
    reporter = lines(stream)
    reporter.start(info(notes=("[red] is no style",)))
    reporter.epoch(row(0, validation_error=0.5))
    said = stream.getvalue().splitlines()
    assert "1,078 images in 10 classes, imbalance 20.83" in said[1]
    assert said[3].strip() == "[red] is no style"
    assert said[4].startswith("epoch 1/100  loss 1.500  error 40.0 %  validation error 50.0 %  probe error 12.5 %")
    assert "mixed 50 % (by transport 25 %)  1,234 images/s" in said[4]


def test_lines_are_rare_but_the_first_and_last_epoch_are_there(stream: io.StringIO) -> None:
    time = Time()
    reporter = lines(stream, time)
    reporter.start(info(epochs=100))
    for epoch in range(100):
        time.seconds += 0.5
        reporter.epoch(row(epoch))
    shown = [int(n) for n in re.findall(r"^epoch (\d+)/100", stream.getvalue(), re.MULTILINE)]
    assert shown[0] == 1
    assert shown[-1] == 100
    assert len(shown) == 11  # 50 seconds, one line in 5, and the first
    assert "left 0:00" in stream.getvalue().splitlines()[-1]


def test_slow_epochs_show_that_they_are_alive(stream: io.StringIO) -> None:
    time = Time()
    reporter = lines(stream, time)
    reporter.start(info(epochs=2))
    for step in range(1, 51):
        time.seconds += 10
        reporter.step(progress(0, step, epochs=2))
    said = re.findall(r"step (\d+)/50.*left (\S+)", stream.getvalue())
    assert [int(step) for step, _ in said] == [6, 12, 18, 24, 30, 36, 42, 48]
    assert said[0][1] == duration(94 * 10)


def test_lines_say_how_far_judging_is_seldom_beside_epochs(stream: io.StringIO) -> None:
    time = Time()
    reporter = lines(stream, time)
    for done in range(1, 101):
        time.seconds += 1
        reporter.looking(100 * done, 10_000)
    said = re.findall(r"^judging images: (\S+) of 10,000$", stream.getvalue(), re.MULTILINE)
    assert said == [f"{100 * done:,}" for done in range(5, 101, 5)]
    reporter.start(info(epochs=2))
    for done in range(1, 101):
        time.seconds += 1
        reporter.looking(100 * done, 10_000)
    assert stream.getvalue().count("judging") == len(said) + 1


def test_finish_says_what_the_run_is_worth(stream: io.StringIO, tmp_path: Path) -> None:
    run_dir = tmp_path / ("long" * 40)
    run_dir.mkdir()
    (run_dir / "report.html").touch()
    lines(stream).finish(result(many=0.1, medium=0.2, few=None), run_dir)
    said = stream.getvalue()
    cells = {" ".join(line.split()[:-1]): line.split()[-1] for line in said.splitlines() if line.strip()}
    assert cells["top-1 accuracy"] == "75.0"
    assert cells["balanced accuracy"] == "62.5"
    assert cells["calibration error (ECE)"] == "6.2"
    assert [cells[f"{group}-shot error"] for group in ("many", "medium", "few")] == ["10.0", "20.0", "–"]
    assert "ERM [red]: test split, 10 images" in said
    assert f"run     {run_dir}\n" in said  # on one line, however long
    assert f"report  {run_dir / 'report.html'}\n" in said


def test_brief_is_one_line_and_no_table(stream: io.StringIO) -> None:
    reporter = LineReporter(Console(file=stream, width=120), Time(), brief=True)
    reporter.start(info(notes=("a note",)))
    reporter.finish(result(), Path("a run"))
    assert stream.getvalue().count("\n") == 1


def test_live_display_is_drawn_four_times_a_second_at_most(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time()
    reporter = live(stream, time)
    reporter.start(info())
    assert reporter.bars is not None
    drawn = []
    monkeypatch.setattr(reporter.bars, "refresh", lambda: drawn.append(time.seconds))
    for step in range(1, 1001):
        time.seconds += 0.01
        reporter.step(progress(0, 1 + step % 50))
    assert 30 <= len(drawn) <= 41
    assert all(later - earlier >= 0.25 - 1e-9 for earlier, later in pairwise(drawn))
    reporter.close()


def test_live_display_shows_the_state_and_tidies_up(stream: io.StringIO) -> None:
    time = Time()
    reporter = live(stream, time)
    reporter.loading(10, 2000)
    time.seconds += 1
    reporter.loading(2000, 2000)
    reporter.looking(512, 3000)  # F of a finished run
    time.seconds += 1
    reporter.looking(3000, 3000)
    assert reporter.bars is None
    reporter.start(info(epochs=4))
    time.seconds += 10
    reporter.looking(64, 640)
    reporter.epoch(row(0))
    reporter.step(progress(1, 25, epochs=4))
    reporter.message("[red] is no style")
    reporter.close()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for part in (
        "2,000/2,000 images",
        "3,000/3,000 images",
        "judging 64/640 images",
        "1/4 epochs",
        "25/50 steps",
        "0:25 left",
        "loss 0.750  error 37.5 %",
        "999 images/s",
    ):
        assert part in said
    assert "transport 30 %" in said
    assert "probe error 12.5 %" in said
    assert "[red] is no style" in said
    hidden, shown = (stream.getvalue().rfind(f"\x1b[?25{letter}") for letter in "lh")
    assert 0 <= hidden < shown  # the cursor is back
    reporter.step(progress(1, 26))  # a late call after the end draws nothing
    assert reporter.bars is None


def test_one_of_a_thing_has_no_plural(stream: io.StringIO) -> None:
    lines(stream).start(info(epochs=1))
    assert "\n  1 epoch of 50 steps · " in stream.getvalue()
    assert [counted(n, noun) for n, noun in ((1, "class"), (2, "class"), (1, "image"), (2000, "image"))] == [
        "1 class",
        "2 classes",
        "1 image",
        "2,000 images",
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_on_a_narrow_terminal_the_numbers_are_whole(width: int, stream: io.StringIO) -> None:
    time = Time()
    reporter = LiveReporter(Console(file=stream, width=width, force_terminal=True, legacy_windows=False), time)
    reporter.start(info(epochs=240))
    time.seconds += 10
    reporter.epoch(row(99))
    time.seconds += 1
    reporter.step(progress(100, 25, epochs=240))
    reporter.close()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for part in ("epochs", "25/50 steps", "loss 0.750", *(("error 37.5 %", "999/s  OT 30 %") if width >= 80 else ())):
        assert part in said
    assert "…" not in said or width < 80


@pytest.mark.parametrize(("done", "said"), [(7, "resumed in epoch 8 "), (99, "epoch 100 "), (100, "after the last ")])
def test_resumed_run_says_so(done: int, said: str, stream: io.StringIO) -> None:
    lines(stream).start(info(resumed=done))
    assert said in stream.getvalue()


@pytest.mark.parametrize("kind", [LineReporter, LiveReporter])
def test_a_reporter_in_use_can_be_sent_to_another_process(kind: type[LineReporter | LiveReporter]) -> None:
    reporter = kind(brief=True)
    reporter.start(info())
    copy = pickle.loads(pickle.dumps(reporter))
    reporter.close()
    assert type(copy) is kind
    assert copy.brief
    copy.epoch(row(0))
    copy.close()


@given(seconds=st.lists(st.floats(0.1, 1e4), min_size=1, max_size=30), more=st.integers(0, 50))
def test_time_left_is_the_mean_of_the_last_ten_epochs(seconds: list[float], more: int) -> None:
    time = Time()
    clock = Clock(time)
    assert clock.left(0, 1) is None
    for each in seconds:
        time.seconds += each
        clock.epoch_ended()
    recent = seconds[-10:]
    expected = more * sum(recent) / len(recent)
    assert clock.left(len(seconds), len(seconds) + more) == pytest.approx(expected)
    if more:
        assert clock.left(len(seconds), len(seconds) + more, 0.5) == pytest.approx(expected * (more - 0.5) / more)


def test_time_left_within_the_first_epoch() -> None:
    time = Time()
    clock = Clock(time)
    time.seconds += 30
    assert clock.left(0, 10, 0.25) == pytest.approx(120 * 9.75)


def test_time_left_of_an_epoch_that_was_resumed() -> None:
    """Of 100 s an epoch, 98 were trained before; 10 % are judging."""
    time = Time()
    clock = Clock(time, resumed=True)
    shares = [0.981, 0.985, 0.99]
    for share in shares:
        time.seconds = 1000 + 90 * (share - 0.98)
        clock.reached(share)
        left = clock.left(0, 10, share)
        assert left is None if share == shares[0] else left == pytest.approx(90 * (10 - share))
    time.seconds = 1000 + 90 * 0.02 + 10
    clock.epoch_ended()
    assert clock.left(1, 10) == pytest.approx(9 * 100)
    time.seconds += 60
    clock.reached(0.5)
    clock.epoch_ended()
    assert clock.left(2, 10) == pytest.approx(8 * 80), "the mean of 100 s and 60 s"


@pytest.mark.parametrize("shown", [(), (0.99,)])
def test_a_rest_of_an_epoch_that_cannot_be_timed_is_not_taken_for_an_epoch(shown: tuple[float, ...]) -> None:
    time = Time()
    clock = Clock(time, resumed=True)
    for share in shown:
        clock.reached(share)
    time.seconds += 0.1
    clock.epoch_ended()
    assert clock.left(1, 10) is None
    time.seconds += 50
    assert clock.left(1, 10, 0.5) == pytest.approx(850)
    time.seconds += 50
    clock.epoch_ended()
    assert clock.left(2, 10) == pytest.approx(800)


def test_a_resumed_run_shows_the_time_that_is_left(stream: io.StringIO) -> None:
    time = Time()
    reporters = [lines(stream, time), live(stream, time)]
    for reporter in reporters:
        reporter.start(info(epochs=10, resumed=0))
        for step in range(40, 50):
            time.seconds += 10
            reporter.step(progress(0, step, epochs=10))
        reporter.close()
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert re.findall(r"step (\d+)/50 .* left (\S+)", said) == [("45", duration(455 * 10))]
    assert f"{duration(451 * 10)} left" in said


def test_duration() -> None:
    assert [duration(seconds) for seconds in (None, 0, 59.4, 61, 3599.6, 3723)] == [
        "?",
        "0:00",
        "0:59",
        "1:01",
        "1:00:00",
        "1:02:03",
    ]
