"""What a finished run left in its directory, as plain values. Only result.json and config.yaml must be there."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otmix.errors import UserError
from otmix.files import read_object


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The files of a run directory. Lists over classes have K entries in label order; the unknown is None or empty."""

    directory: Path
    config: dict[str, Any]
    result: dict[str, Any]
    class_names: list[str]
    counts: list[int] | None
    accuracy: list[float | None]
    confusion: NDArray[np.int64] | None
    data: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    pairs: dict[str, NDArray[np.int64]]  # foreground × background class, by the rule that paired them (`Pairs.by`)

    @property
    def title(self) -> str:
        return str(self.result.get("title") or self.result.get("method") or self.config.get("method") or "a run")

    @property
    def data_name(self) -> str:
        return str(self.data.get("name") or self.config.get("data") or "unknown data")

    @property
    def split(self) -> str:
        """The images that the result was measured on: test, validation or train."""
        return str(self.result.get("split") or "unknown")

    @property
    def evaluation(self) -> dict[str, Any]:
        return dict(self.result["evaluation"])

    @property
    def measured(self) -> list[int] | None:
        """Images per class that the result was measured on."""
        return None if self.confusion is None else [int(value) for value in self.confusion.sum(axis=1)]

    def figure(self, name: str) -> bytes | None:
        """A picture that the run drew, `figures/<name>.png`."""
        path = self.directory / "figures" / f"{name}.png"
        return path.read_bytes() if path.is_file() else None


def read_run(run_dir: Path) -> RunRecord:
    """Read a run directory. Raises UserError where result.json or config.yaml is missing, or a file is damaged."""
    import yaml

    result = _object(run_dir / "result.json")
    if not result:
        raise UserError(
            f"{run_dir} has no result.json, so there is no finished run to report on; "
            f"finish it with `otmix train --config {run_dir / 'config.yaml'} --out {run_dir} --resume`"
        )
    if not isinstance(result.get("evaluation"), dict):
        raise UserError(f"{run_dir / 'result.json'} has no evaluation; it was not written by otmix, or is damaged")
    config_path = run_dir / "config.yaml"
    if not config_path.is_file():
        raise UserError(f"{run_dir} has no config.yaml, so it is not a run of otmix")
    try:
        config = yaml.safe_load(config_path.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(
            f"{config_path} is not YAML ({' '.join(str(error).split())}); restore it from the run's backup"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{config_path} must hold the settings of a run; the run directory is damaged")
    data = _object(run_dir / "data.json")
    accuracy = list(result["evaluation"].get("per_class_accuracy") or [])
    confusion = result["evaluation"].get("confusion")
    names = [str(name) for name in data.get("class_names") or [f"class {k}" for k in range(len(accuracy))]]
    counts = data.get("counts")
    for what, values in (("per_class_accuracy", accuracy or None), ("counts", counts)):
        if values is not None and len(values) != len(names):
            raise UserError(
                f"{run_dir}: {what} is for {len(values)} classes but there are {len(names)} class names; "
                "the files are not of one run"
            )
    return RunRecord(
        directory=run_dir,
        config=config,
        result=result,
        class_names=names,
        counts=None if counts is None else [int(count) for count in counts],
        accuracy=accuracy or [None] * len(names),
        confusion=None if confusion is None else _dense(run_dir / "result.json", confusion, len(names)),
        data=data,
        environment=_object(run_dir / "environment.json"),
        history=_lines(run_dir / "metrics.jsonl"),
        pairs=_pairs(run_dir / "pairs.npz", len(names)),
    )


def _dense(path: Path, triples: list[list[int]], num_classes: int) -> NDArray[np.int64]:
    """Counts `[K,K]` from triples [true, predicted, images], as `Evaluation.to_dict` gives them."""
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    try:
        true, predicted, images = np.asarray(triples, dtype=np.int64).reshape(-1, 3).T
        table[true, predicted] = images
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: the confusion does not fit {num_classes} classes; the file is damaged") from error
    return table


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    return read_object(path) if path.is_file() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if line.strip():
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}, is not JSON ({error}); the run directory is damaged"
                ) from error
            if not isinstance(lines[-1], dict):
                raise UserError(f"{path}, line {number}, is no JSON object; the run directory is damaged")
    return lines


def _pairs(path: Path, num_classes: int) -> dict[str, NDArray[np.int64]]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: np.asarray(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); the run directory is damaged") from error
    for counts in found.values():
        if counts.shape != (num_classes, num_classes):
            raise UserError(
                f"{path} counts pairs of {counts.shape} classes, but the run has {num_classes}; "
                "the files are not of one run"
            )
    return found
