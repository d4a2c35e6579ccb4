"""A finished run put to use: classes for new images, and its evaluation again."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import torch
from torch import Tensor

from otmix.data import IMAGE_ENDINGS, FileSource, items_of, open_store, to_square
from otmix.data.decoding import UnreadableImage, in_threads
from otmix.data.folder import Found, images_below, passed_over
from otmix.data.resizing import side_needed
from otmix.errors import UserError
from otmix.evaluation import predict_probabilities
from otmix.files import printable
from otmix.streams import takes_all_letters
from otmix.training import Run, open_run
from otmix.training.evaluate import evaluate_items
from otmix.training.launch import make_fabric
from otmix.training.reporter import Reporter, Silent
from otmix.training.setup import load_data, looking_batch, split_of
from otmix.types import Batch, Items

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Device = Literal["auto", "cpu", "cuda", "mps"]

log = logging.getLogger("otmix")


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image file and its probability; `top`: the first few classes with theirs."""

    file: str
    class_name: str
    probability: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and the sentence that says why."""

    file: str
    reason: str


class Predictions(Iterator[Prediction]):
    """Predictions one by one; `top`: how many classes each of them lists, known before the first."""

    def __init__(self, found: Iterator[Prediction], top: int) -> None:
        self.top = top
        self._found = found

    def __next__(self) -> Prediction:
        return next(self._found)


def predict_paths(
    run_dir: Path,
    paths: Sequence[Path],
    *,
    top: int = 5,
    on_bad_image: Literal["error", "skip"] = "error",
    batch_size: int = 64,
    device: Device = "auto",
    on_skipped: Callable[[Sequence[Skipped]], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Classify image files with a finished run, in the order of `find_images(paths)`.

    An image is decoded, resized and judged exactly as in the run's final evaluation. With "skip", images that cannot be
    read are left out, and told to `on_skipped` after the last prediction (default: counted and listed in a warning of
    the logger "otmix", which goes to stderr). `progress` hears after each batch how many files of how many are done.
    Raises UserError, before the first prediction, for a run that is not
    finished, a path that does not exist, or no image at all; later for a broken image.
    """
    if top < 1 or batch_size < 1:
        raise UserError(f"--top and --batch-size must be at least 1, they are {top} and {batch_size}")
    if on_bad_image not in ("error", "skip"):
        raise UserError(f"--on-bad-image {on_bad_image} is unknown; give error or skip")
    found = Found()
    files = find_images(paths, found)
    run = open_run(run_dir)
    for note in passed_over(found.others):
        log.warning(note)
    top, skip = min(top, len(run.class_names)), on_bad_image == "skip"
    return Predictions(_predict(run, files, top, skip, batch_size, device, on_skipped or _warn, progress), top)


def find_images(paths: Sequence[Path], found: Found | None = None) -> list[Path]:
    """The files named by `paths`, in that order; a folder stands for the images at any depth below it, sorted by path.

    Hidden files and files with other endings in a folder are passed over, and `found` is told of the latter. A file
    that is named itself is taken anyway.
    Raises UserError for a path that does not exist, and when nothing is found.
    """
    files: list[Path] = []
    found = found or Found()
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(path / name for name in images_below(path, found))
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no file or folder {path}; name an image or a folder of images")
    if not files:
        raise UserError(
            f"there is no image ({' '.join(sorted(IMAGE_ENDINGS))}) in {', '.join(map(str, paths))}; "
            "name an image or a folder with images"
        )
    return files


def write_csv(predictions: Iterable[Prediction], stream: TextIO, top: int = 5) -> int:
    """One line per image: file, class, probability, then class_2, probability_2, … up to `top`, or to the last class.

    `Predictions` say how many there are, else the first prediction does; without any, the header has `top`. Returns
    how many lines were written, the header not counted.
    """
    if isinstance(predictions, Predictions):
        top = min(top, predictions.top)
    writer = csv.writer(stream, lineterminator="\n")
    written = 0
    for one in predictions:
        if not written:
            top = min(top, len(one.top))
            writer.writerow(_header(top))
        cells = [cell for name, probability in one.top[:top] for cell in (name, f"{probability:.6f}")]
        writer.writerow([printable(one.file), *cells])
        written += 1
    if not written:
        writer.writerow(_header(top))
    return written


def _header(top: int) -> list[str]:
    ranks = [name for rank in range(2, top + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    return ["file", "class", "probability", *ranks]


def write_jsonl(predictions: Iterable[Prediction], stream: TextIO) -> int:
    """One JSON object per line: file, class, probability, top: [{class, probability}, …]. Returns how many."""
    written = 0
    for one in predictions:
        ranked = [{"class": name, "probability": round(probability, 6)} for name, probability in one.top]
        line = {
            "file": printable(one.file),
            "class": one.class_name,
            "probability": round(one.probability, 6),
            "top": ranked,
        }
        stream.write(json.dumps(line, ensure_ascii=not takes_all_letters(stream)) + "\n")
        written += 1
    return written


def evaluate_run(
    run_dir: Path,
    split: Literal["test", "validation"] = "test",
    device: Device = "auto",
    root: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run's model on a split of its own data: `split` and the keys of result.json's evaluation.

    `root`: where the data is now, if it has moved. `reporter` hears of reading and looking. Raises UserError when the
    run is not finished, the data has no such split, or the images are not those that the run was made with.
    """
    run = open_run(run_dir)
    if split not in ("test", "validation"):
        raise UserError(f"there is no split {split!r}; give test or validation")
    config = run.config if root is None else replace(run.config, root=root)
    reporter = reporter or Silent()
    dataset = load_data(config, reporter.loading)
    now = dataset.fingerprint()
    if changed := [key for key in ("class_names", "splits") if now[key] != run.data[key]]:
        raise UserError(
            f"the data are no longer those of the run {run_dir} ({', '.join(changed)} differ from its data.json); "
            "restore the images that it was made with"
        )
    source = split_of(dataset, split)
    fabric = _place(run, device)
    workers = config.workers
    store = open_store(source, dataset, fabric.device, train=False, workers=workers, progress=reporter.loading)
    evaluation, _ = evaluate_items(
        fabric,
        run.model,
        run.criterion,
        store,
        items_of(source),
        run.counts,
        looking_batch(config, dataset),
        reporter.looking,
        many=config.many_above,
        few=config.few_below,
    )
    return {"split": split, **evaluation.to_dict()}


def _place(run: Run, device: Device) -> Fabric:
    """Model and criterion onto the device, in the number format and memory layout of the run's own evaluation."""
    single = replace(run.config, accelerator=device, devices=1, num_nodes=1, precision="32-true")
    fabric = make_fabric(single)
    if fabric.device.type != "cpu" or run.config.precision != "16-mixed":  # float16 needs a GPU
        fabric = make_fabric(replace(single, precision=run.config.precision))
    run.model.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this form
    run.criterion.to(fabric.device)
    return fabric


def _predict(
    run: Run,
    files: Sequence[Path],
    top: int,
    skip: bool,
    batch_size: int,
    device: Device,
    on_skipped: Callable[[Sequence[Skipped]], object],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Prediction]:
    fabric = _place(run, device)
    skipped: list[Skipped] = []
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        pixels, errors = read_images(chunk, run.image_size, run.channels)
        for i, error in errors.items():
            if not skip:
                raise error
            skipped.append(Skipped(str(chunk[i]), error.reason))
        readable = [file for i, file in enumerate(chunk) if i not in errors]
        if readable:
            yield from _judge(run, fabric, readable, pixels, top)
        if progress is not None:
            progress(start + len(chunk), len(files))
    if skipped:
        on_skipped(skipped)


def _judge(run: Run, fabric: Fabric, files: Sequence[Path], pixels: Tensor, top: int) -> Iterator[Prediction]:
    images = pixels.to(fabric.device).to(torch.float32).div_(255)
    batch = Batch(Items(torch.zeros(len(files), dtype=torch.int64, device=fabric.device)), images)
    probabilities, _, _ = predict_probabilities(
        run.model, [batch], probabilities=run.criterion.probabilities, autocast=fabric.autocast
    )
    # of equal ones the first class, as evaluation has it; topk takes any
    values, classes = (ranked[:, :top] for ranked in probabilities.sort(dim=1, descending=True, stable=True))
    for file, p, which in zip(files, values.tolist(), classes.tolist()):
        ranked = tuple((run.class_names[k], value) for k, value in zip(which, p))
        yield Prediction(str(file), *ranked[0], ranked)


def read_images(files: Sequence[Path], image_size: int, channels: int) -> tuple[Tensor, dict[int, UnreadableImage]]:
    """The readable ones of `files` as evaluation sees them, uint8 `[n,C,S,S]` in order; the others' errors by place."""
    source = FileSource(Path(), tuple(map(str, files)), torch.zeros(len(files), dtype=torch.int64), channels)
    images: dict[int, Tensor] = {}
    errors: dict[int, UnreadableImage] = {}

    def read(i: int) -> None:
        try:
            images[i] = to_square(source.read(i, side_needed(image_size)), image_size)
        except UnreadableImage as error:
            errors[i] = error

    in_threads(read, len(files))
    pixels = [images[i] for i in sorted(images)]
    return torch.stack(pixels) if pixels else torch.empty(0, channels, image_size, image_size, dtype=torch.uint8), dict(
        sorted(errors.items())
    )


def _warn(skipped: Sequence[Skipped]) -> None:
    listed = "".join(f"\n  {one.file}: {one.reason}" for one in skipped)
    log.warning(
        "%d image%s could not be read and %s skipped:%s",
        len(skipped),
        *(("", "was") if len(skipped) == 1 else ("s", "were")),
        listed,
    )
