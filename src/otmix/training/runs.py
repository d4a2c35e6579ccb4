"""A run on the disk: where it is, whether it is finished, and its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from otmix.config import RunConfig, default_run_dir
from otmix.errors import UserError
from otmix.losses import Criterion
from otmix.methods import parse_method
from otmix.methods.building import architecture_of, build_criterion
from otmix.models import Classifier, build_model
from otmix.training.records import read_config, read_data, read_result, read_settings_of, runs_folder
from otmix.types import ClassCounts


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run, its model on the CPU in eval mode."""

    run_dir: Path
    config: RunConfig
    data: dict[str, Any]
    result: dict[str, Any]
    class_names: tuple[str, ...]
    counts: ClassCounts
    model: Classifier
    criterion: Criterion

    @property
    def image_size(self) -> int:
        return int(self.data["image_size"])

    @property
    def channels(self) -> int:
        return int(self.data["channels"])

    @property
    def small(self) -> bool:
        return bool(self.data["small"])


def run_dir_of(config: RunConfig) -> Path:
    """`config.out`, or a name made of what the run is under $OTMIX_RUNS or ./runs."""
    return Path(config.out) if config.out else default_run_dir(config, runs_folder())


RUN_FILES = {
    *("checkpoint.pt", "config.yaml", "data.json", "environment.json", "metrics.jsonl", "model.safetensors"),
    *("pairs.npz", "predictions.npz", "report.html", "result.json", "settings.json"),
}
"""What a run writes into its folder, besides figures/ and best-EPOCH.safetensors."""


def refuse_file_of_a_run(out: Path) -> None:
    """Raises UserError where --out names a file that a run has written or will write: it would be lost."""
    path = out.resolve()
    for folder in path.parents:
        if not all((folder / name).is_file() for name in ("config.yaml", "data.json", "environment.json")):
            continue
        first, *below = path.relative_to(folder).parts
        name = first.casefold()  # some file systems take both for one
        best = name.startswith("best-") and name.endswith(".safetensors")
        if (name == "figures" and below) or (not below and (name in RUN_FILES or best)):
            raise UserError(f"--out {out} is a file of the run in {folder}, which would be lost; name another file")


def is_finished(run_dir: Path) -> bool:
    return (run_dir / "result.json").is_file()


def has_begun(run_dir: Path) -> bool:
    """Whether there is anything to go on with: before its first checkpoint a run has only noted its settings."""
    return is_finished(run_dir) or (run_dir / "checkpoint.pt").exists()


def open_run(run_dir: Path) -> Run:
    """Read a finished run. Raises UserError when it is not one of ours, not finished, or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"there is no run {run_dir}; name the folder that `otmix train` printed")
    config = read_config(run_dir)
    if not is_finished(run_dir):
        raise UserError(
            f"the run {run_dir} is not finished; go on with `otmix train --config {run_dir / 'config.yaml'} --out "
            f"{run_dir} --resume`"
        )
    data, result = read_data(run_dir, of_model=True), read_result(run_dir)
    counts = ClassCounts(torch.tensor(data["counts"]))
    try:
        method = parse_method(config.method)
    except UserError as error:
        raise UserError(
            f"{run_dir} was trained with {config.method}, of which a part is not known here; add --import FILE, the "
            "file that registers it"
        ) from error
    filled = read_settings_of(run_dir, method)
    criterion = build_criterion(method, counts, filled)
    assert config.backbone is not None  # a recorded configuration is filled in
    model = build_model(
        config.backbone,
        counts.num_classes,
        channels=data["channels"],
        image_size=data["image_size"],
        mean=data["mean"],
        std=data["std"],
        **architecture_of(method, criterion, filled),
    )
    path = run_dir / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path} is missing, damaged, or of another model ({type(error).__name__}); delete it, and "
            f"`otmix train --resume --out {run_dir}` writes it again from the checkpoint"
        ) from error
    return Run(run_dir, config, data, result, tuple(data["class_names"]), counts, model.eval(), criterion)
