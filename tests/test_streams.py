"""A command whose output nobody reads goes on, or ends well."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from otmix.cli import main
from otmix.display import LineReporter, stdout_console
from otmix.streams import lasting, nobody_listens, tell


@pytest.fixture
def deserted() -> Iterator[TextIO]:
    """A pipe that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


def test_a_listing_whose_reader_has_gone(deserted: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", deserted)
    assert main(["methods"]) == 0


def test_a_training_outlives_who_watches_it(deserted: TextIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", deserted)
    monkeypatch.setattr("otmix.training.outcome.draw_pictures", lambda run, plan: None)
    argv = ["train", "--method", "erm", "--epochs", "1", "--accelerator", "cpu", "--backbone", "resnet8"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_a_reporter_of_which_the_reader_has_gone(deserted: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", deserted)
    reporter = LineReporter()
    for _ in range(3):
        reporter.message("a line")
    assert stdout_console().file.fileno() == deserted.fileno()


def test_errors_are_told_to_nobody(deserted: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", deserted)
    tell("nobody reads this")
    assert main(["nothing"]) == 2


class Failing(io.StringIO):
    def __init__(self, number: int, file: int) -> None:
        super().__init__()
        self.number, self.file = number, file

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self) -> int:
        return self.file


def test_a_terminal_that_is_closed_and_a_disk_that_fails(tmp_path: Path) -> None:
    """Both are EIO; only of the second must the user hear."""
    controller, terminal = os.openpty()
    assert nobody_listens(OSError(errno.EIO, ""), Failing(errno.EIO, terminal))
    with (tmp_path / "log").open("w") as log:
        assert not nobody_listens(OSError(errno.EIO, ""), Failing(errno.EIO, log.fileno()))
        for number in (errno.EIO, errno.ENOSPC):
            with pytest.raises(OSError, match=os.strerror(number)):
                lasting(Failing(number, log.fileno())).write("a line")
    stream = lasting(Failing(errno.EIO, os.dup(terminal)))
    assert stream.write("a line") == 6
    os.close(stream.fileno())
    os.close(controller)
    os.close(terminal)


@pytest.mark.skipif(sys.platform == "win32", reason="sh")
def test_closed_from_the_beginning() -> None:
    """As a daemon has them: what is opened later must not get their numbers, also in the processes that we start."""
    code = """
import os, subprocess, sys
from otmix.cli import main
assert sys.stdin is sys.stdout is None
assert main(["methods", "erm"]) == 0
assert all(stream.fileno() == number for number, stream in enumerate((sys.stdin, sys.stdout)))
child = "import os, sys; assert sys.stdout is not None; assert os.path.samestat(os.fstat(1), os.stat(os.devnull))"
subprocess.run([sys.executable, "-c", child], check=True)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(["sh", "-c", '"$@" <&- >&-', "sh", *command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
