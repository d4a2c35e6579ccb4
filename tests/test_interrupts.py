"""Ctrl-C, SIGTERM and SIGHUP at any moment of a command are one sentence, also before it has begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from otmix.cli import main
from otmix.interrupts import PARENT_ON_STDIN, interruptible, stop_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself signals")

SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{number})
    time.sleep(0.2)
except BaseException as error:
    raise ImportError("this is already registered") from error
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_import_is_finished_before_it_is_stopped(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries catch what is raised while they import others."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"swallows_{number}.py").write_text(SWALLOWS.format(number=number))
    (tmp_path / "mine.py").write_text(f"import swallows_{number}, time\ntime.sleep(30)\n")
    before = [signal.getsignal(one) for one in stop_signals()]
    began = time.monotonic()
    assert main(["methods", "--import", str(tmp_path / "mine.py")]) == 130
    assert time.monotonic() - began < 20
    assert capsys.readouterr().err == "\notmix: stopped\n"
    assert f"swallows_{number}" in sys.modules
    assert [signal.getsignal(one) for one in stop_signals()] == before


def test_a_stop_before_the_command_line_is_loaded(tmp_path: Path) -> None:
    code = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == "otmix.cli.parsing" or name == "otmix.cli.commands":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
sys.argv = ["otmix", "train"]
runpy.run_module("otmix", run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    # not where a run of these settings may lie: train would end, and say so, before it is stopped
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\notmix: stopped\n")


def test_what_has_begun_to_end_is_left_in_peace() -> None:
    """SIGTERM to all processes of a group comes again from the one that passes it on."""
    ended = False
    with interruptible():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(30)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            ended = True
    assert ended


def test_an_ignored_signal_stays_ignored() -> None:
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_ends_with_the_process_that_began_it() -> None:
    code = """
import time
from otmix.interrupts import end_with_parent, interruptible
with interruptible():
    try:
        end_with_parent()
        print("begun", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("saved", flush=True)
"""
    environment = {**os.environ, PARENT_ON_STDIN: "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "begun\n"
        process.stdin.close()  # as the system does for a process that is killed
        assert process.stdout.read() == "saved\n"
