"""What a run directory says of how its numbers came about."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import torch
import yaml

from otmix.config import RunConfig
from otmix.config_file import of_another_version, read_record
from otmix.data import ImageDataset
from otmix.errors import UserError
from otmix.extensions import UNKNOWN, hash_of, hash_of_definition
from otmix.files import read_object, write_json, write_text
from otmix.losses import LOSSES
from otmix.methods import Method, parse_method
from otmix.mixing import PIXEL_RULES
from otmix.protocols import Overrides, Protocol
from otmix.settings import Setting
from otmix.wording import counted

PART_GROUPS = ("loss", "mixer", "model", "rebalancing")
"""What stands before the dot in the settings of a method's parts."""

DATA: dict[str, Any] = {"name": str, "class_names": list[str], "counts": list[int], "splits": dict}
OF_MODEL: dict[str, Any] = {
    "image_size": int,
    "channels": int,
    "small": bool,
    "mean": list[float],
    "std": list[float],
}
"""What is needed of data.json, and of that for a model."""

RESULT: dict[str, Any] = {
    "method": str,
    "title": str,
    "protocol": str,
    "split": str,
    "seed": int,
    "looks_at_test": bool,
    "seconds_per_epoch": float,
    "evaluation": {
        "n": int,
        "top1_error": float,
        "balanced_accuracy": float,
        "per_class_accuracy": list,
        "group_error": dict,
        "calibration_error": float,
        "negative_log_likelihood": float,
    },
}
"""What is needed of result.json."""

ENVIRONMENT: dict[str, Any] = {
    "python": str,
    "system": str,
    "device": str,
    "threads": int,
    "packages": dict,
    "commit": (str, NoneType),
}
"""What is needed of environment.json by who keeps it."""

COMMAND = "OTMIX_COMMAND"
"""Environment variable by which a comparison tells its processes the command to record."""
PACKAGES = ("otmix", "torch", "torchvision", "timm", "lightning", "numpy", "pillow", "scikit-learn")


def environment(device: torch.device) -> dict[str, Any]:
    """The command as it was typed, versions, device and source commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": command(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "packages": versions,
        "commit": source_commit(),
    }


def command() -> str:
    """What was typed to start this; for a run of a comparison, the comparison's."""
    if known := os.environ.get(COMMAND):
        return known
    return shlex.join(["otmix", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("otmix", "__main__") else "python"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type


def source_commit() -> str | None:
    """The commit of the source tree this package runs from, "+" appended where it has changes; None for an installed
    package.
    """
    package = Path(__file__).resolve().parents[1]
    try:
        known = (
            subprocess.run(
                ["git", "ls-files", "--error-unmatch", __file__], cwd=package, capture_output=True, check=False
            ).returncode
            == 0
        )
        if not known:
            return None
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=package, capture_output=True, check=True, encoding="ascii"
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=package, capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def data_record(dataset: ImageDataset) -> dict[str, Any]:
    """data.json: names, counts, sizes, hashes and notes, and what a model of this data needs to know to be rebuilt."""
    return {
        **dataset.fingerprint(),
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "small": dataset.small,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "notes": list(dataset.notes),
        "left_out": dict(dataset.left_out),
    }


def changed_data(run_dir: Path, dataset: ImageDataset) -> list[str]:
    """What of the data is no longer as in the record of a run. Where they are may change, and what their folder is
    called: the hashes of their splits say whether they are the same.
    """
    then, now = read_data(run_dir), data_record(dataset)
    return [key for key in now if key not in ("notes", "left_out", "name") and now[key] != then.get(key)]


INPUTS = {
    "weights": "the file of --weights",
    "loss": "the code that defines the loss",
    "mixer": "the code that defines the mixer",
    "confusion_run": "the run of --set.confusion_run",
}


def inputs(config: RunConfig) -> dict[str, str]:
    """Hashes of what decides a run besides settings and data, as far as it is one's own and is there: by the keys of
    `INPUTS`. Of a loss and a mixer what `hash_of_definition` says.
    """
    method = parse_method(config.method)

    def of(path: Path | None) -> str | None:
        return None if path is None or not path.is_file() else hash_of(path)

    teacher = config.set.confusion_run
    found = {
        "weights": of(None if config.weights is None else Path(config.weights)),
        "confusion_run": of(None if teacher is None else Path(teacher) / "model.safetensors"),
        "loss": hash_of_definition(LOSSES[method.loss]),
        "mixer": None if method.pixels is None else hash_of_definition(PIXEL_RULES[method.pixels]),
    }
    return {key: value for key, value in found.items() if value is not None}


def changed_inputs(run_dir: Path, config: RunConfig) -> str:
    """Which of `inputs` are others than those of a run, in words, as far as it recorded them and they are known."""
    then = read_environment(run_dir).get("inputs") or {}
    other = [
        key for key, now in inputs(config).items() if then.get(key, now) != now and UNKNOWN not in (now, then[key])
    ]
    return " and ".join(INPUTS[key] for key in other)


def write_records(
    run_dir: Path,
    config: RunConfig,
    settings: dict[str, Any],
    dataset: ImageDataset,
    device: torch.device,
    looks_at_test: bool,
) -> None:
    """data.json, environment.json, settings.json and, last, config.yaml: a directory that has it is a run that has
    begun.
    """
    write_json(run_dir / "data.json", data_record(dataset))
    more = {"inputs": inputs(config), "looks_at_test": looks_at_test}  # now: another run's files may go meanwhile
    write_json(run_dir / "environment.json", environment(device) | more)
    write_json(run_dir / "settings.json", settings)
    _write_config(run_dir, config)


def record_root(run_dir: Path, root: str | None) -> None:
    """Note where the data of a run are now, so that `--resume` and `evaluate` find them without being told again."""
    before = read_config(run_dir)
    now = _placed(replace(before, root=root))
    if now != before:
        _write_config(run_dir, now)


def _placed(config: RunConfig) -> RunConfig:
    """With the folder of the data as it is called from anywhere: the run may be used from another one."""
    return config if config.root is None else replace(config, root=os.path.abspath(config.root))  # noqa: PTH100 (keeps links)


def _write_config(run_dir: Path, config: RunConfig) -> None:
    config = _placed(config)
    write_text(run_dir / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))


def read_config(run_dir: Path) -> RunConfig:
    """The configuration of a run. Raises UserError when `run_dir` is not one."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is not the directory of an otmix run: it has no config.yaml")
    return read_record(path)


_OF_MIXING_LATER = {"bn_statistics": "running"}
"""Settings that methods which mix did not have at first, at the values of the runs from then."""


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Every setting of the method of a run at the value it runs with. Raises UserError where they are missing or not
    those of this version.
    """
    path = run_dir / "settings.json"
    values = read_object(path, {"headline": str})  # which every method has
    if "mix_probability" in values:
        values = _OF_MIXING_LATER | values
    known = get_type_hints(Protocol)
    for key, value in values.items():
        if key in known:
            _in_type(path, key, Setting(key, known[key], None, ""), value)
        elif key.partition(".")[0] not in PART_GROUPS or "." not in key:
            raise of_another_version(path, key)
    return values


def read_settings_of(run_dir: Path, method: Method) -> Overrides:
    """`read_settings`, those of the method's parts checked too."""
    values, known, path = read_settings(run_dir), method.part_settings, run_dir / "settings.json"
    for key, value in values.items():
        if key in known:
            _in_type(path, key, known[key], value)
        elif "." in key:
            raise of_another_version(path, key)
    return Overrides.from_dict(values)


def _in_type(path: Path, key: str, setting: Setting, value: object) -> None:
    try:
        setting.convert(value, f"its {key}")
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}; restore it, or repeat the run") from None


def read_data(run_dir: Path, of_model: bool = False) -> dict[str, Any]:
    """data.json of a run; `of_model`: with what a model of its data needs to be rebuilt. Raises UserError where it is
    missing or damaged.
    """
    path = run_dir / "data.json"
    data = read_object(path, DATA | (OF_MODEL if of_model else {}))
    if len(data["counts"]) != len(data["class_names"]):
        raise UserError(
            f"{path} is damaged: it has {counted(len(data['counts']), 'count')} of images for "
            f"{counted(len(data['class_names']), 'name')} of classes; restore it, or repeat the run"
        )
    return data


def read_result(run_dir: Path) -> dict[str, Any]:
    """result.json of a finished run. Raises UserError where it is missing or damaged."""
    return read_object(run_dir / "result.json", RESULT)


def read_environment(run_dir: Path, whole: bool = False) -> dict[str, Any]:
    """environment.json of a run; `whole`: with all that even the oldest ones noted. Raises UserError where it is
    missing or damaged.
    """
    return read_object(run_dir / "environment.json", ENVIRONMENT if whole else {}, {"inputs": (dict, NoneType)})


def runs_folder() -> Path:
    """$OTMIX_RUNS, or ./runs."""
    return Path(os.environ.get("OTMIX_RUNS") or "runs")
