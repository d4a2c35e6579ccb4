"""What other systems do otherwise, as far as Linux can show it."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from otmix import files
from otmix.__main__ import main as command
from otmix.cli import main
from otmix.cli.commands import predict, train
from otmix.cli.parsing import parse
from otmix.config import RunConfig
from otmix.config_file import read_values
from otmix.data import ArraySource, WorkerStore
from otmix.data.folder import load_folder
from otmix.errors import UserError
from otmix.evaluation import evaluate_predictions
from otmix.experiments import jobs
from otmix.interrupts import PARENT_ON_STDIN
from otmix.reports.page import write_comparison_page
from otmix.streams import nobody_listens
from otmix.training import contract, launch
from otmix.training.loop import remove_other_bests
from otmix.training.processes import StopRequest
from otmix.training.reporter import Silent
from otmix.training.run import alone_in
from otmix.types import Items
from otmix.wording import command_line

SMALL = ["--method", "erm", "--epochs", "2", "--max-per-class", "40", "--accelerator", "cpu"]

WITHOUT_POSIX = """
import os, platform, signal, sys, warnings
import lightning.fabric, torch  # they look for some of these when they are imported
platform.uname()
class Locks:
    LK_NBLCK = 2
    def locking(self, file, mode, size):
        assert (mode, size, os.fstat(file).st_size) == (2, 1, 0)
sys.modules["msvcrt"] = Locks()
import otmix.training.run
otmix.training.run.sys = type("Windows", (), {"platform": "win32"})
for name in ("fcntl", "resource", "pty", "termios", "pwd", "grp"):
    sys.modules[name] = None  # importing it is an ImportError
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "pthread_kill", "pthread_sigmask"):
    delattr(signal, name)
for name in ("fork", "geteuid", "getuid", "getpgid", "setsid", "killpg", "sched_getaffinity", "uname", "sysconf"):
    delattr(os, name)
# the encoding of a text there is another one on each machine
warnings.filterwarnings("error", category=EncodingWarning, module="otmix")
"""
STOPS_AFTER_ITS_FIRST_CHECKPOINT = """
import otmix.training.loop as loop
save = loop.save
def save_and_stop(run):
    save(run)
    sys.platform = "win32"  # now: what is imported asks for it, too
    signal.raise_signal(signal.SIGINT)
loop.save = save_and_stop
"""


def otmix(*argv: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, in which `before` is run first."""
    code = f"{before}\nimport sys\nfrom otmix.cli import main\nsys.exit(main())"
    command = [sys.executable, "-X", "warn_default_encoding", "-W", "ignore::EncodingWarning", "-c", code, *argv]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, check=False, timeout=120)


def test_a_run_is_stopped_resumed_and_used_where_nothing_of_posix_is(tmp_path: Path) -> None:
    run = str(tmp_path / "a run")
    stopped = otmix("train", *SMALL, "--out", run, before=WITHOUT_POSIX + STOPS_AFTER_ITS_FIRST_CHECKPOINT)
    assert stopped.returncode == 130, stopped.stderr.decode()
    *_, said, again = stopped.stderr.decode().splitlines()
    assert said.startswith("otmix: stopped, the run is saved; ")
    assert again == f'  otmix train --resume --out "{run}"'  # of single quotes Windows knows nothing
    resumed = otmix("train", "--resume", "--out", run, before=WITHOUT_POSIX)
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert (Path(run) / "report.html").is_file()
    evaluated = otmix("evaluate", run, before=WITHOUT_POSIX)
    assert evaluated.returncode == 0, evaluated.stderr.decode()


def test_the_end_of_the_parent_lets_a_process_save_on_windows_too() -> None:
    """`os.kill` ends it there; and whatever it starts would hang with the pipe that it reads."""
    code = """
import os, subprocess, sys, time
from otmix.interrupts import end_with_parent, interruptible
with interruptible():
    try:
        end_with_parent()
        started = subprocess.run([sys.executable, "-c", "import sys; print(repr(sys.stdin.read()))"], timeout=20)
        sys.platform, os.kill = "win32", lambda *_: os._exit(1)
        print("begun", flush=True)
        for _ in range(1200):
            time.sleep(0.05)
    except KeyboardInterrupt:
        print("saved", flush=True)
"""
    pipe = subprocess.PIPE
    environment = {**os.environ, PARENT_ON_STDIN: "1"}
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert [process.stdout.readline() for _ in range(2)] == ["''\n", "begun\n"]
        process.stdin.close()
        assert process.stdout.read() == "saved\n"


def test_a_comparison_that_is_stopped_terminates_nothing_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it would end the runs before they can save."""
    code = "import pathlib, sys; sys.stdin.read(); pathlib.Path(sys.argv[1]).touch()"
    monkeypatch.setattr(jobs, "command", lambda file, imports: [sys.executable, "-c", code, str(tmp_path / "saved")])
    monkeypatch.setattr(sys, "platform", "win32")
    config = RunConfig(out=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        jobs.train_in_processes([config], 1, lambda *_: None, tick=lambda: signal.raise_signal(signal.SIGINT))
    assert (tmp_path / "saved").exists()


def test_ctrl_c_in_a_console_of_windows_terminates_no_process_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have heard it, and save."""
    terminated: list[int] = []

    class Process:
        def terminate(self) -> None:
            terminated.append(1)

    class Context:
        processes = (Process(),)
        joined = 0

        def join(self, timeout: float, grace_period: float) -> bool:
            self.joined += 1
            return self.joined == 4

    monkeypatch.setattr(sys, "platform", "win32")
    for number, expected in ((signal.SIGINT, []), (signal.SIGTERM, [1])):
        stop = StopRequest()
        with stop.listening():
            signal.raise_signal(number)
        assert launch._failures(Context(), stop) == []  # type: ignore[arg-type]
        assert terminated == expected


def test_a_file_that_another_process_looks_at_is_replaced_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows does not allow it meanwhile."""
    path, replace, refusals = tmp_path / "checkpoint.pt", os.replace, iter(range(3))

    def refuse_at_first(source: Path, target: Path) -> None:
        if next(refusals, None) is not None:
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_at_first)
    monkeypatch.setattr(files, "BUSY_SECONDS", 2.0)
    files.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.1)
    refusals = iter(range(1000))
    with pytest.raises(UserError, match="cannot access the file"):
        files.write_text(path, "newer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]
    with pytest.raises(UserError, match="is a folder; name a file with --out"):
        files.write_text(tmp_path, "a file in the place of a folder")


def test_a_pipe_that_nobody_reads_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.EINVAL, "Invalid argument")
    assert not nobody_listens(error, sys.stdout)
    monkeypatch.setattr(sys, "platform", "win32")
    assert nobody_listens(error, sys.stdout)
    assert not nobody_listens(OSError(errno.EINVAL, "Invalid argument", "what?.png"), sys.stdout)


def printed(encoding: str, *argv: str) -> str:
    """What the command prints into a file of this encoding."""
    before, sys.stdout = sys.stdout, io.TextIOWrapper(file := io.BytesIO(), encoding=encoding)
    try:
        assert main([*argv]) == 0
        sys.stdout.flush()
        return file.getvalue().decode(encoding)
    finally:
        sys.stdout = before


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two classes, of which a Windows codepage of the west can write one."""
    folder = tmp_path_factory.mktemp("frogs")
    for name, grey in (("蛙", 0), ("kröte", 200)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), grey + i).save(folder / "photos" / name / f"{name}{i}.png")
    argv = ["--data", "folder", "--root", str(folder / "photos"), *SMALL]
    printed("cp437", "train", *argv, "--backbone", "resnet8", "--out", str(folder / "run"))
    return folder / "run"


def test_nothing_is_lost_in_a_file_that_a_windows_shell_writes(run: Path) -> None:
    """What is redirected there is in a codepage of 256 letters."""
    photos = str(run.parent / "photos" / "蛙")
    listed = printed("cp1252", "predict", str(run), photos)
    assert [line.split(",")[0].rpartition("/")[2] for line in listed.splitlines()[1:]] == [
        f"\\u86d9{i}.png" for i in range(4)
    ]
    listed = printed("cp1252", "predict", str(run), photos, "--format", "jsonl")
    assert [Path(json.loads(line)["file"]).name for line in listed.splitlines()] == [f"蛙{i}.png" for i in range(4)]
    measured = printed("cp1252", "evaluate", str(run), "--json")
    assert json.loads(measured)["class_names"] == ["kröte", "蛙"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_settings_come_back_from_a_file_that_a_windows_shell_wrote(encoding: str, tmp_path: Path) -> None:
    """PowerShell's `>` writes UTF-16, that of cmd.exe what it is given."""
    written = "utf-8" if encoding.startswith("utf") else encoding
    argv = ["train", "--data", "folder", "--root", "kröten und 蛙", "--print_config"]
    (tmp_path / "mine.yaml").write_bytes(printed(written, *argv).encode(encoding))
    assert read_values(tmp_path / "mine.yaml")["root"] == "kröten und 蛙"


def test_a_sentence_of_a_process_is_read_as_it_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")  # the default on Windows
    code = "import sys; sys.stderr.write('otmix: the images of the kröte are gone'); sys.exit(2)"
    monkeypatch.setattr(jobs, "command", lambda file, imports: [sys.executable, "-c", code])
    said: list[str | None] = []
    jobs.train_in_processes([RunConfig(out=str(tmp_path / "run"))], 1, lambda config, error: said.append(error))
    assert said == ["the images of the kröte are gone"]


def test_a_command_to_repeat_is_one_that_windows_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "otmix",
        "train",
        "--out",
        r"runs\photos",
        "--root",
        "C:\\my photos\\",
        "--method",
        "a&b",
        "--x",
        'say "b"',
    ]
    assert shlex.split(command_line(words)) == words
    monkeypatch.setattr(sys, "platform", "win32")
    assert command_line(words) == (
        r'otmix train --out runs\photos --root "C:\my photos\\" --method "a&b" --x "say \"b\""'
    )


class Interrupting(ArraySource):
    """Whoever reads an image of it hears Ctrl-C."""

    def read(self, index: int, at_least: int | None = None) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return super().read(index, at_least)


@pytest.fixture
def spawning() -> Iterator[None]:
    """Processes begin anew, as on Windows and macOS, rather than as copies of this one."""
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    yield
    torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("spawning")
def test_processes_that_begin_anew_read_images_and_leave_ctrl_c_to_who_trains() -> None:
    images = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)
    store = WorkerStore(Interrupting(images, torch.arange(4)), 8, "cpu", workers=1)
    (batch,) = store.stream([(Items(torch.tensor([2, 1]), torch.tensor([2, 1])), None)])
    assert torch.equal(batch.images, images[[2, 1]] / 255)


def test_no_fortran_answers_ctrl_c_in_our_place_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "FOR_DISABLE_CONSOLE_CTRL_HANDLER"  # github.com/ContinuumIO/anaconda-issues/issues/905
    monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["otmix", "--version"])
    monkeypatch.setattr(sys, "platform", "win32")
    assert command() == 0
    assert os.environ[name] == "1"


class OfMetal(torch.Tensor):
    """A tensor of a GPU of Apple: it comes to the CPU in its own dtype, and has no float64."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if function is torch.Tensor.double or torch.float64 in args[1:]:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return super().__torch_function__(function, types, args, kwargs)


def test_probabilities_of_apples_gpus_are_judged() -> None:
    said = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    found = evaluate_predictions(said.as_subclass(OfMetal), torch.tensor([0, 0]), None)
    assert found.to_dict() == evaluate_predictions(said, torch.tensor([0, 0]), None).to_dict()


def test_a_stick_with_a_folder_for_each_class(tmp_path: Path) -> None:
    for name in ("bee", "ant", "$RECYCLE.BIN", "System Volume Information"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    assert load_folder(tmp_path).class_names == ("ant", "bee")


def test_home_is_known_where_no_shell_writes_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    call = parse("predict", predict, ["~/run", "~/photos", "photos"])
    assert call.positional == (tmp_path / "run", [tmp_path / "photos", Path("photos")])


def test_bars_are_drawn_with_what_the_encoding_has() -> None:
    drawn = printed("cp1252", "data")
    assert "#" * 40 in drawn
    assert "?" not in drawn


def test_where_there_is_no_compiler_nothing_is_compiled(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    failed = otmix("train", *SMALL, "--compile", "--out", folder, CXX="none", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert failed.returncode == 2
    said = failed.stderr.decode()
    assert said.startswith("otmix: --compile does not work here (InvalidCxxCompiler: ")
    assert said.count("\n") == 1


def test_two_processes_never_write_one_run_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [None, PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EINVAL, "Invalid argument")]

    class Locks:
        LK_NBLCK = 2

        def locking(self, file: int, mode: int, size: int) -> None:
            if (answer := answers.pop(0)) is not None:
                raise answer

    monkeypatch.setitem(sys.modules, "msvcrt", Locks())  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "platform", "win32")
    with alone_in(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run").exists(), "nothing was begun"
    with pytest.raises(UserError, match="another process is training in"), alone_in(tmp_path / "run"):
        raise AssertionError
    with alone_in(tmp_path / "run"):  # a network drive without locks
        pass
    assert answers == []


def test_what_is_of_no_more_use_may_stay_where_another_process_looks_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows; no training ends for that."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    (tmp_path / ".checkpoint.pt.1.tmp").touch()
    (tmp_path / "best-3.safetensors").touch()
    monkeypatch.setattr(Path, "unlink", refuse)
    files.remove_temporaries(tmp_path)
    remove_other_bests(SimpleNamespace(run_dir=tmp_path, best={"epoch": 4}))  # type: ignore[arg-type]
    monkeypatch.setattr(jobs, "command", lambda file, imports: [sys.executable, "-c", ""])
    said: list[str | None] = []
    jobs.train_in_processes([RunConfig(out=str(tmp_path / "run"))], 1, lambda config, error: said.append(error))
    assert said == [None]


def test_several_gpus_without_nccl_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has it on Linux alone."""
    monkeypatch.setattr("lightning.fabric.Fabric", lambda **_: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="several GPUs need NCCL"):
        launch.make_fabric(RunConfig(devices=2))


def test_an_error_in_ones_own_code_is_found_behind_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows Python's own code lies in another folder than lib/python3.…"""
    monkeypatch.setattr(os, "sep", "\\")
    with pytest.raises(ValueError) as caught:
        exec(compile("import json\njson.loads('{')", "mine.py", "exec"), {})
    assert contract._told(caught.value).endswith("(mine.py, line 2)")


def test_a_folder_in_quotes_that_ends_in_a_backslash(monkeypatch: pytest.MonkeyPatch) -> None:
    r"""Windows takes \" for a quotation mark in the name, and what follows for the rest of it."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match=r"leave out the .* at the end of a name"):
        parse("train", train, ["--root", 'C:\\my photos" --out runs'])


def test_several_processes_where_gloo_does_not_work_are_refused() -> None:
    def launch_(work: Any) -> None:
        raise RuntimeError("makeDeviceForHostname(): unsupported gloo device")

    fabric: Any = SimpleNamespace(launch=launch_)
    with pytest.raises(UserError, match="give --devices 1") as caught:
        launch.launched(fabric, lambda *_: Path(), RunConfig(), Silent())
    assert not isinstance(caught.value, launch.ConnectionLost)


def test_a_page_on_another_drive_is_linked(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, start: Path) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", refuse)
    row = {"method": "ce", "top1_error": [0.25], "n_seeds": 1}
    page = write_comparison_page(tmp_path / "comparison.html", [row], runs=[run])
    assert f'href="file://{run}/report.html"' in page.read_text(encoding="utf-8")
