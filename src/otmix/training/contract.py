"""What every method must do, whoever wrote it: the checks behind `otmix check-method` and the tests.

Each check trains tiny runs of a method on random images in a folder of its own. A method enters by its name alone.
"""

from __future__ import annotations

import math
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor

from otmix.config import RunConfig
from otmix.data import ArraySource, ImageDataset
from otmix.losses import Criterion
from otmix.methods import Method, parse_method
from otmix.mixing import Mixer
from otmix.protocols import PROTOCOLS, Overrides
from otmix.training.build import build_run
from otmix.training.checkpoint import load_checkpoint
from otmix.training.launch import make_fabric
from otmix.training.loop import Interrupted, RunState, checkpoint_path, finish_epoch, restore, save, train_epoch
from otmix.training.reporter import Silent
from otmix.training.setup import prepare
from otmix.types import Batch, Items, Output

COUNTS = (9, 4, 3, 1)
"""Training images per class: one class has a single image, and with batches of 8 the last batch has one."""
BATCH, SIDE, EPOCHS = 8, 8, 3
_ALWAYS_MIXED = {"mix_probability": 1.0, "mix_from": 0.0, "mix_until": 1.0, "curriculum_power": 0.0}

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Finding:
    """A check and what was wrong; None where nothing was."""

    check: str
    problem: str | None


class _Broken(Exception):
    """A check that failed, in words."""


def check_method(name: str, progress: Progress = lambda check: None) -> list[Finding]:
    """Run all checks on one method; one that raises anything has failed. Raises UserError for an unknown name."""
    method = parse_method(name)
    found = []
    for check in CHECKS:
        words = (check.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        progress(words)
        with TemporaryDirectory(prefix="otmix-check-") as folder:
            try:
                check(method, Path(folder))
            except Exception as error:  # whatever someone's own code raises is a finding, not our crash
                found.append(Finding(words, str(error) if isinstance(error, _Broken) else _told(error)))
            else:
                found.append(Finding(words, None))
    return found


def _told(error: Exception) -> str:
    """An error, and the last line that is not ours, nor a library's, that it went through."""
    ours = (str(Path(__file__).parents[1]), "site-packages", "dist-packages", sysconfig.get_path("stdlib"), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in ours)]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


@cache
def tiny_dataset() -> ImageDataset:
    """Random images, the same each time: `COUNTS` for training, two of each class for testing."""
    draw = torch.Generator().manual_seed(0)

    def source(counts: tuple[int, ...]) -> ArraySource:
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return ArraySource(torch.randint(256, (len(labels), 3, SIDE, SIDE), generator=draw, dtype=torch.uint8), labels)

    names = tuple("abcd")
    grey = (0.5, 0.5, 0.5)
    return ImageDataset("random", names, source(COUNTS), None, source((2,) * len(names)), SIDE, 3, grey, grey, True)


def tiny_config(method: Method, **changed: Any) -> RunConfig:
    """Three epochs of three steps, every batch mixed, each by transport where the method has it; without weight decay,
    which would change parameters that the loss does not reach.
    """
    forced = {name: value for name, value in _ALWAYS_MIXED.items() if name in method.setting_names}
    settings: dict[str, Any] = {
        "method": method.name,
        "backbone": "resnet8",
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "lr": 0.01,
        "weight_decay": 0.0,
        "accelerator": "cpu",
        "set": Overrides(**forced),  # type: ignore[arg-type]  # the names are those of settings
    }
    return RunConfig(**(settings | changed))


def tiny_run(method: Method, folder: Path, **changed: Any) -> RunState:
    """A run of `tiny_config` before its first step."""
    config = tiny_config(method, **changed)
    return build_run(make_fabric(config), folder, prepare(config, tiny_dataset()), Silent())


def epochs(run: RunState) -> Iterator[float]:
    """Train epoch by epoch to the end; the mean loss of each."""
    while run.epoch < run.stage.epochs:
        train_epoch(run)
        loss = run.tally.read()["loss"]
        finish_epoch(run)
        yield loss


def weights(run: RunState) -> dict[str, Tensor]:
    """A copy of everything that a model's file holds."""
    return {name: value.detach().clone() for name, value in run.state.model.state_dict().items()}


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise _Broken(problem)


def _builds_and_explains_itself(method: Method, folder: Path) -> None:
    """builds from its name and explains itself"""
    _expect(parse_method(method.name) == method, f"its name {method.name} means {parse_method(method.name)}")
    _expect(all(part.title and part.paper and part.changes for part in method.parts), "a part lacks title or paper")
    for name, _, meaning, source in method.settings(PROTOCOLS["clean"]):
        _expect(bool(meaning and source), f"the setting {name} has no meaning or no source")
    for key, setting in method.part_settings.items():
        _expect(bool(setting.meaning), f"the setting {key} has no line under `Args:` in the docstring of its class")
        setting.describe()
    tiny_run(method, folder)


def _trains(method: Method, folder: Path) -> None:
    """gives finite losses, and changes every parameter it trains"""
    run = tiny_run(method, folder)
    before = {name: value.detach().clone() for name, value in run.state.model.named_parameters() if value.requires_grad}
    for epoch, loss in enumerate(epochs(run)):
        _expect(math.isfinite(loss), f"the loss of epoch {epoch} is {loss}")
    after = dict(run.state.model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    _expect(not still, f"these parameters never change: {', '.join(still)}")


def _repeats(method: Method, folder: Path) -> None:
    """gives the same losses and weights for the same seed, others for another"""
    runs = [tiny_run(method, folder / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    losses = [list(epochs(run)) for run in runs]
    _expect(losses[0] == losses[1], f"two runs with seed 1 have the losses {losses[0]} and {losses[1]}")
    _expect(losses[0] != losses[2], f"seeds 1 and 2 have the same losses {losses[0]}")
    first, second = weights(runs[0]), weights(runs[1])
    _expect(all(torch.equal(first[name], second[name]) for name in first), "two runs with seed 1 have other weights")


def _resumes(method: Method, folder: Path) -> None:
    """ends with the same weights when it is stopped in an epoch and resumed"""
    whole = tiny_run(method, folder / "whole")
    list(epochs(whole))
    (folder / "stopped").mkdir()
    stopped = tiny_run(method, folder / "stopped")
    train_epoch(stopped)
    finish_epoch(stopped)
    stopped.stop.requested = True
    with suppress(Interrupted):
        train_epoch(stopped)
    _expect(0 < stopped.step < stopped.background.steps_per_epoch, "it did not stop within an epoch")
    save(stopped)
    resumed = tiny_run(method, folder / "stopped")
    restore(resumed, load_checkpoint(checkpoint_path(folder / "stopped")))
    list(epochs(resumed))
    one, other = weights(whole), weights(resumed)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    _expect(not different, f"these differ after a resume: {', '.join(different[:5])}")


def _round_trips(method: Method, folder: Path) -> None:
    """writes its settings to YAML and reads the same ones back"""
    parts = {key: setting.default for key, setting in method.part_settings.items()}
    config = tiny_config(method)
    config = replace(config, set=replace(config.set, parts=parts))
    read = RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict())))
    _expect(read == config and read.hash == config.hash, f"{config.to_dict()} became {read.to_dict()}")
    usual = tiny_config(method)
    settings = [prepare(one, tiny_dataset()).settings for one in (config, usual)]
    _expect(settings[0] == settings[1], f"its listed defaults {settings[0]} are not those it runs with, {settings[1]}")
    losses = [[*epochs(tiny_run(method, folder / str(i), set=one.set))] for i, one in enumerate((config, usual))]
    _expect(losses[0] == losses[1], "settings given as their defaults give other losses")


def _mixes(method: Method, folder: Path) -> None:
    """mixes by what was drawn alone, leaves its inputs as they are, and shares out each label once"""
    mixer = tiny_run(method, folder).stage.mixer
    if mixer is None:
        return
    draw = torch.Generator().manual_seed(0)
    pair = [Batch(Items(torch.arange(BATCH) % k), torch.rand(BATCH, 3, SIDE, SIDE, generator=draw)) for k in (3, 4)]
    before = [(batch.items.labels.clone(), batch.images.clone()) for batch in pair]
    drawn = mixer.mixer.draw(BATCH, SIDE, SIDE, draw)
    first, second = (mixer.mixer.apply(pair[0], pair[1], drawn) for _ in range(2))
    unchanged = [
        torch.equal(batch.items.labels, labels) and torch.equal(batch.images, images)
        for batch, (labels, images) in zip(pair, before)
    ]
    _expect(all(unchanged), "apply changes the batches that it is given; it must make new images")
    _expect(torch.equal(first.images, second.images), "apply gives other images from the same drawn values")
    _expect(first.images.shape == pair[0].images.shape, f"the mixes have the shape {tuple(first.images.shape)}")
    _expect(bool(first.images.isfinite().all()), "the mixes hold numbers that are not finite")
    shares, labels = first.target.shares, first.target.labels
    whole = torch.allclose(shares.sum(1), torch.ones(BATCH), atol=1e-4) and bool(((shares >= 0) & (shares <= 1)).all())
    _expect(whole, f"the shares of an image's labels must lie in [0, 1] and sum to 1; here they are {shares.tolist()}")
    either = torch.stack([batch.items.labels for batch in pair], 1)
    known = (labels[:, :, None] == either[:, None, :]).any(2).all()
    _expect(bool(known), "a mix has a label that neither of its images has")
    _says_how_much_is_background(mixer.mixer, pair, drawn)


def _says_how_much_is_background(rule: Mixer, pair: list[Batch], drawn: Any) -> None:
    """White backgrounds with black foregrounds, and the reverse: where the two add up to white, each pixel is so much
    of the one and the rest of the other, and the mean is the background's part. Other rules say what they think right.
    """
    white, black = (torch.full((BATCH, 3, SIDE, SIDE), value) for value in (1.0, 0.0))
    mixes = [
        rule.apply(replace(pair[0], images=one), replace(pair[1], images=other), drawn)
        for one, other in ((white, black), (black, white))
    ]
    if not torch.allclose(mixes[0].images + mixes[1].images, white, atol=1e-3):
        return
    found, said = mixes[0].images.mean((1, 2, 3)), mixes[0].image_share
    _expect(
        torch.allclose(found, said.to(found.dtype), atol=1e-3),
        "image_share must be the background's part of each mix (label shares alone may differ from it); it is "
        f"{_listed(said)}, but of white backgrounds with black foregrounds {_listed(found)} is left",
    )


def _listed(values: Tensor) -> str:
    """A few numbers, one where all are the same."""
    return ", ".join(dict.fromkeys(f"{value:.3g}" for value in values.tolist()))


def _predicts(method: Method, folder: Path) -> None:
    """gives probabilities that sum to 1 for each image"""
    run = tiny_run(method, folder)
    model = run.state.model.eval()
    with torch.no_grad():
        said = run.state.criterion.probabilities(model(torch.rand(3, 3, SIDE, SIDE)))
    fine = said.shape == (3, len(COUNTS)) and bool((said >= 0).all())
    _expect(
        fine and torch.allclose(said.sum(1), torch.ones(3), atol=1e-4), f"the probabilities of three images: {said}"
    )


def _works_in_bfloat16(method: Method, folder: Path) -> None:
    """trains in bfloat16, with a loss that takes bfloat16 logits"""
    run = tiny_run(method, folder, precision="bf16-mixed")
    for loss in epochs(run):
        _expect(math.isfinite(loss), f"a loss is {loss}")
    _takes_bfloat16(run)


def _takes_bfloat16(run: RunState) -> None:
    """Our loop gives a loss float32, whatever the precision; one's own under autocast gives it bfloat16."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        said = run.state.model.eval()(torch.rand(BATCH, 3, SIDE, SIDE, generator=draw))
    rounded = [None if one is None else one.bfloat16() for one in (said.features, said.expert_logits)]
    output, labels = Output(said.logits.bfloat16(), *rounded), torch.arange(BATCH) % len(COUNTS)
    must = (
        "per_label must take bfloat16 logits and features, which a model under autocast gives in a loop of one's own, "
        "and give a finite loss of each image; begin with output.logits.float(). Here it"
    )
    for epoch in (0, EPOCHS - 1):
        if type(run.state.criterion).per_label is Criterion.per_label:  # it sees the batch as a whole alone
            return
        try:
            losses = run.state.criterion.per_label(output, labels, epoch / EPOCHS)
        except Exception as error:  # someone's own code
            raise _Broken(f"{must} raises {_told(error)}") from error
        _expect(losses.shape == labels.shape, f"{must} gives the shape {list(losses.shape)} for {BATCH} images")
        _expect(bool(losses.isfinite().all()), f"{must} gives {_listed(losses)}")


CHECKS: tuple[Callable[[Method, Path], None], ...] = (
    _builds_and_explains_itself,
    _trains,
    _repeats,
    _resumes,
    _round_trips,
    _mixes,
    _predicts,
    _works_in_bfloat16,
)
