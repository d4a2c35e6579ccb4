"""A folder of larger images of every kind, as its owner would use it: commands as processes, a kill, new pictures."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # two minutes, unless the machine is busy

COUNTS = {"badger": 130, "fox": 85, "hare": 55, "lynx": 32}
COLOURS = {"badger": "navy", "fox": "orange", "hare": "white", "lynx": "green"}
KINDS = ["RGB jpg", "RGB png", "L jpg", "RGBA png", "turned jpg", "P png", "I;16 png", "RGB jpg"]
LARGE = 40
"""Every 40th picture is a large one, of up to 12 MP; the others have 200 to 600 pixels a side."""
BY_WORKERS = """
import sys
import otmix.data.stores
from otmix.cli import main
otmix.data.stores._fits = lambda *_: False
sys.exit(main())
"""
"""`otmix` where the folder is too large to be held."""


def write_picture(path: Path, name: str, kind: str, size: tuple[int, int], random: np.random.Generator) -> Path:
    """Soft noise with ellipses in the colour of the class."""
    noise = random.integers(60, 140, (size[1] // 32 + 2, size[0] // 32 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = (int(side * random.uniform(0, 0.7)) for side in size)
        draw.ellipse((x, y, x + size[0] // 3, y + size[1] // 3), COLOURS[name])
    mode, ending = kind.split()
    exif = Image.Exif()
    if mode == "turned":
        exif[0x0112] = 6
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "RGBA":
        image.putalpha(Image.new("L", size, 230))
    else:
        image = image.convert(mode)
    path = path.with_suffix(f".{ending}")
    image.save(path, exif=exif, **({"compress_level": 1} if ending == "png" else {"quality": 85}))
    return path


def write_pictures(folder: Path, counts: dict[str, int], seed: int, below: bool = True) -> None:
    random = np.random.default_rng(seed)
    number = 0
    for name, count in counts.items():
        place = folder / name if below else folder
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            number += 1
            size = (
                (4000, 3000)
                if number % LARGE == 1
                else (int(random.integers(200, 600)), int(random.integers(200, 600)))
            )
            if number % LARGE == 2:
                size = (900, 2400)
            write_picture(place / f"{name}-{i:03d}", name, KINDS[number % len(KINDS)], size, random)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """302 pictures in four classes."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    write_pictures(folder, COUNTS, seed=0)
    return folder


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve new pictures, of every kind and of no class."""
    folder = tmp_path_factory.mktemp("new") / "new"
    write_pictures(folder, dict.fromkeys(COUNTS, 3), seed=1, below=False)
    return folder


# conftest gives tests one thread each; this network is a real one
CORES = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}


def otmix(*arguments: str | Path, timeout: float = 800) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "otmix", *map(str, arguments)]
    return subprocess.run(
        command, env=CORES, capture_output=True, text=True, encoding="utf-8", timeout=timeout, check=False
    )


def training(folder: Path, out: Path) -> list[str]:
    arguments = ["train", "--data", "folder", "--root", str(folder), "--backbone", "timm/resnet18", "--no-pretrained"]
    arguments += ["--max-per-class", "40", "--set.mix_from", "0", "--epochs", "2", "--batch-size", "32"]
    return [*arguments, "--workers", "2", "--accelerator", "cpu", "--out", str(out)]


def place(run_dir: Path) -> tuple[int, int]:
    """Epoch and step at which the run would go on."""
    if not (run_dir / "checkpoint.pt").exists():
        return (0, 0)
    payload = torch.load(run_dir / "checkpoint.pt", weights_only=True, mmap=True)
    return payload["epoch"], payload["step"]


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to. It holds the folder in memory."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    done = otmix(*training(folder, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


def test_killed_and_resumed_it_is_the_same_run(folder: Path, reference: Path, tmp_path: Path) -> None:
    """Its first life reads by workers, its second from memory: which one must not matter either."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", BY_WORKERS, *training(folder, run_dir), "--checkpoint-minutes", "0"]
    process = subprocess.Popen(command, env=CORES, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while place(run_dir) < (0, 2):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (0, 2) <= place(run_dir) < (1, 0)
    done = otmix("train", "--resume", "--out", run_dir, "--checkpoint-minutes", "10")
    assert done.returncode == 0, done.stderr
    assert (run_dir / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    with np.load(run_dir / "predictions.npz") as ours, np.load(reference / "predictions.npz") as theirs:
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs.files)
    epochs = [json.loads(line)["epoch"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1]


def test_the_run_saw_the_folder_and_learned_from_it(reference: Path) -> None:
    data = json.loads((reference / "data.json").read_text())
    assert (data["image_size"], data["counts"]) == (224, [40, 40, 40, 26])
    assert sum(split["images"] for split in data["splits"].values()) == 40 + 40 + 40 + 26 + 60
    result = json.loads((reference / "result.json").read_text())["evaluation"]
    assert result["n"] == 60
    largest = COUNTS["badger"] / sum(COUNTS.values())
    assert 1 - result["top1_error"] > largest, "no better than saying that everything is a badger"


def said(stderr: str) -> str:
    """Without the lines of progress, which a slow machine shows."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(("judging images: ", "reading images: ")))


def test_new_pictures_get_a_line_each(reference: Path, new: Path) -> None:
    done = otmix("predict", reference, new)
    assert (done.returncode, said(done.stderr)) == (0, "")
    header, *lines = csv.reader(io.StringIO(done.stdout))
    ranks = [f"{column}_{rank}" for rank in (2, 3, 4) for column in ("class", "probability")]
    assert header == ["file", "class", "probability", *ranks]  # four classes, although --top is five
    assert [line[0] for line in lines] == sorted(map(str, new.iterdir()))
    assert len(lines) == 12
    for line in lines:
        probabilities = [float(cell) for cell in line[2::2]]
        assert sorted(line[1::2]) == sorted(COUNTS)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert probabilities == sorted(probabilities, reverse=True)


def test_a_truncated_picture_among_new_ones(reference: Path, new: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    shutil.copytree(new, folder)
    torn = next(path for path in sorted(folder.iterdir()) if path.suffix == ".jpg")
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    out = tmp_path / "found.csv"
    done = otmix("predict", reference, folder, "--out", out)
    assert (done.returncode, done.stdout) == (2, "")
    told = said(done.stderr)
    assert told.startswith(f"otmix: {torn} cannot be read as an image (")
    assert told.endswith("; delete it or pass --on-bad-image skip\n")
    assert told.count("\n") == 1
    assert not out.exists()
    done = otmix("predict", reference, folder, "--out", out, "--on-bad-image", "skip")
    assert done.returncode == 0
    counted, listed, told = said(done.stderr).splitlines()
    assert told == f"11 images classified in {out}"
    assert counted == "1 image could not be read and was skipped:"
    assert listed.startswith(f"  {torn}: ")
    files = [line["file"] for line in csv.DictReader(io.StringIO(out.read_text()))]
    assert files == sorted(str(path) for path in folder.iterdir() if path != torn)
