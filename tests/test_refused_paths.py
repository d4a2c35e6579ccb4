"""Paths that the system refuses to look at: one sentence for each, whichever command asks."""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from otmix.cli import main
from otmix.config import RunConfig
from otmix.training import train


def close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who may not enter `folder`: root, as which tests may run, may enter every one."""
    for module, name in (*((os, name) for name in ("stat", "lstat", "mkdir", "listdir", "scandir")), (io, "open")):
        plainly = getattr(module, name)

        def refuse(path: Any, *rest: Any, plainly: Any = plainly, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike) and folder in Path(path).parents:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return plainly(path, *rest, **named)

        monkeypatch.setattr(module, name, refuse)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"data": "digits", "method": "erm", "max_per_class": 20, "batch_size": 32, "epochs": 1}
    out = tmp_path_factory.mktemp("run") / "run"
    return train(RunConfig.from_dict({**config, "backbone": "resnet8", "accelerator": "cpu", "out": str(out)}))


COMMANDS = [
    "predict RUN IMAGES --out PATH",
    "predict RUN PATH",
    "predict PATH IMAGES",
    "evaluate PATH",
    "preview --out PATH.png",
    "preview --run PATH",
    "train --out PATH --epochs 1",
    "train --resume --out PATH",
    "train --import PATH.py",
    "train --weights PATH.pt --out OUT",
    "train --data folder --root PATH --out OUT",
    "train --method ce+otmix --set.confusion_run PATH --out OUT",
    "compare erm --seeds 1 --epochs 1 --runs PATH",
    "data --data folder --root PATH",
    "data --data cifar10 --root PATH",
    "check-method erm --import PATH.py",
]


def refusal(command: str, path: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    places = {"PATH": path, "RUN": run, "IMAGES": tmp_path / "images", "OUT": tmp_path / "out"}
    argv = re.sub("|".join(places), lambda found: str(places[found[0]]), command).split(" ")
    before = sorted(tmp_path.iterdir())
    assert main(argv) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"otmix: [^;]+; [^;.]+", text.replace(str(path), "PATH")), text
    assert sorted(tmp_path.iterdir()) == before
    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_below_a_folder_that_may_not_be_entered(
    command: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    close(closed, monkeypatch)
    text = refusal(command, closed / "in" / "x", run, tmp_path, capsys)
    assert "Permission denied" in text
    if "--data folder" in command:
        assert f"the folder {closed / 'in' / 'x'} cannot be read" in text
    else:
        assert f"lies below {closed}, a folder that may not be entered" in text


@pytest.mark.skipif(os.name == "nt", reason="there a path as a whole is too long")
@pytest.mark.parametrize("below", ["", "/x"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_is_too_long(
    command: str, below: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refusal(command, Path(f"{tmp_path}/{'n' * 300}{below}"), run, tmp_path, capsys)
    assert "too long" in text
    assert "shorter" in text


def test_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(tmp_path / "mine"))

    monkeypatch.setattr("otmix.cli._run", refuse)
    monkeypatch.delenv("OTMIX_DEBUG", raising=False)
    assert main(["train"]) == 2
    said = "may not be read or written (Operation not permitted); give yourself the right to read and write it"
    assert capsys.readouterr().err == f"otmix: {tmp_path / 'mine'} {said}, or name another place\n"
    monkeypatch.setenv("OTMIX_DEBUG", "1")
    with pytest.raises(PermissionError):
        main(["train"])


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "of the disk", "file"), PermissionError(errno.EACCES, "of what?")]
)
def test_other_errors_of_the_system_are_not_hidden(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise error

    monkeypatch.setattr("otmix.cli._run", refuse)
    with pytest.raises(OSError, match="of "):
        main(["train"])
