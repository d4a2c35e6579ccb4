"""A run as one typed value. The command line's flags and YAML files are views of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from otmix.datanames import DataName
from otmix.errors import UserError
from otmix.protocols import Overrides, Protocol, ProtocolName

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

LARGEST = 2**31 - 1
"""Of whole numbers that have no bound of their own: what is computed from them still fits into 64 bits."""

RANGES = {
    "epochs": (1, LARGEST),
    "batch_size": (1, LARGEST),
    "evaluate_every": (1, LARGEST),
    "devices": (1, 1024),  # Lightning makes a list of them
    "num_nodes": (1, LARGEST),
    "workers": (0, 512),  # of which each takes some 100 MB
    "max_per_class": (1, LARGEST),
    "validation_per_class": (0, LARGEST),
    "image_size": (4, 2**14),
    "many_above": (0, LARGEST),
    "few_below": (0, LARGEST),
}
"""The least and the largest value of the settings that are whole numbers."""

ADDED = {"many_above": 100, "few_below": 20}
"""Settings that older runs do not know, with the values these had: they keep their names."""

# what may differ between a run and its continuation: where and how it is computed and shown, not what is computed; so
# may `root`, but two folders of images make two runs, which their names must tell apart; `evaluate_every` decides no
# weight either, but which errors the log has, and runs and results that there are already have it in their names
NOT_IDENTITY = ("out", "resume", "workers", "checkpoint_minutes", "accelerator", "download")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of one training run.

    None stands for a default that depends on the data; `with_defaults` fills it in. A run directory records the
    filled-in values.

    Args:
        data: where the images come from.
        root: folder of the data (required for `folder`; for CIFAR, where the archive is or is downloaded to).
        imbalance: thin the training classes to this ratio of the largest to the smallest (default 100 for CIFAR, 20 for
            digits, untouched for a folder).
        max_per_class: at most this many training images in the largest class.
        validation_per_class: take this many validation images per class out of the training images (CIFAR: unused ones
            first).
        test_fraction: share of each class held out for testing when a folder has no test split.
        image_size: side of the square image the model sees, in pixels (default: that of small images; for larger ones
            that of the timm backbone).
        on_bad_image: stop at a broken image, or skip it and list it.
        download: may CIFAR be downloaded.
        method: `[ride-|bbn-]loss[-drw|-drs|-cbs|-srs][+mixer]`; see `otmix methods`.
        protocol: clean (ours), paper, or official (the released code; looks at the test set).
        set: single settings of the method changed, e.g. `--set.alpha 1` or `--set.loss.tau 2`.
        backbone: resnet8/20/32 for small images, or `timm/<name>`.
        pretrained: start timm backbones from pretrained weights (default: yes for large images).
        weights: file with pretrained weights (.safetensors, .pt, .pth) instead of a download.
        epochs: passes over the training images.
        batch_size: images per step, over all processes together (default 128 for CIFAR and folders of small images, 64
            for digits, 32 or 64 for large images; less for a folder of few).
        optimizer: sgd (momentum .9) or adamw.
        lr: initial learning rate (default .1 for small images; for a folder of them less where batches are smaller than
            128; AdamW .001, and a tenth with weights to begin with).
        weight_decay: L2 penalty (sgd) or decoupled decay (adamw).
        nesterov: Nesterov momentum for sgd.
        schedule: steps (x .1, .01, .0001 from 100, 160, 200 of 240 epochs, the paper's for CIFAR), imagenet-lt (the
            same from 40, 80, 160 of 200) or inaturalist (x .1 at 30, 80, 130, 180 of 210), the paper's for those; ldam
            (LDAM's code: x .01, .0001 from 160, 180 of 200), bbn (BBN's code: the same from 119, 159 of 200), or
            cosine. Deferred re-weighting begins at 160 of 240, 160 of 200 with ldam and bbn, 80 of 200 with
            imagenet-lt, 160 of 210 with inaturalist.
        warmup: share of the run during which the learning rate rises linearly (default 0; 5 of 200 epochs with ldam,
            bbn and imagenet-lt, 5 of 210 with inaturalist).
        evaluate_every: epochs between evaluations on validation images (or a fixed probe of training images where there
            are none).
        final_split: the images that the result is measured on, once, at the end.
        many_above: a class with more training images than this is many-shot.
        few_below: a class with fewer is few-shot (the official ImageNet-LT and iNaturalist scripts: 21).
        seed: of every random choice of a run; which images are its data does not depend on it.
        accelerator: auto, cpu, cuda or mps.
        devices: processes on this machine, one device each.
        num_nodes: machines.
        precision: number format of the training step.
        compile: compile the model with torch.compile.
        workers: processes that read images where they are not kept in memory, so many for each stream and device;
            OTmix, CMO and BBN, for example, have two streams (0: the training process reads them itself).
        checkpoint_minutes: a checkpoint is written at the end of each epoch, and after this many minutes within one.
        out: folder of the run (default: under $OTMIX_RUNS or ./runs, named after what it is).
        resume: go on with the run in `out`; start it if there is none.
    """

    data: DataName = "digits"
    root: str | None = None
    imbalance: float | None = None
    max_per_class: int | None = None
    validation_per_class: int | None = None
    test_fraction: float = 0.2
    image_size: int | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    download: bool = True
    method: str = "otmix"
    protocol: ProtocolName = "clean"
    set: Overrides = field(default_factory=Overrides)
    backbone: str | None = None
    pretrained: bool | None = None
    weights: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: Literal["sgd", "adamw"] | None = None
    lr: float | None = None
    weight_decay: float | None = None
    nesterov: bool = False
    schedule: Literal["steps", "ldam", "bbn", "imagenet-lt", "inaturalist", "cosine"] | None = None
    warmup: float | None = None
    evaluate_every: int = 1
    final_split: Literal["test", "validation"] = "test"
    many_above: int = 100
    few_below: int = 20
    seed: int = 0
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Precision = "32-true"
    compile: bool = False
    workers: int = 2
    checkpoint_minutes: float = 10.0
    out: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.set, Mapping):
            object.__setattr__(self, "set", Overrides.from_dict(self.set))
        self._take_experts()
        for name, kinds in _kinds().items():
            object.__setattr__(self, name, _in_kind(name, kinds, getattr(self, name)))
        for name in ("root", "weights"):  # photos, photos/ and ./photos are one folder
            # not past a link: what lies above its folder is not what lies above the link
            if (path := getattr(self, name)) and ".." not in Path(path).parts:
                object.__setattr__(self, name, os.path.normpath(path))
        for name, choices in _choices().items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserError(f"--{name.replace('_', '-')} must be one of {', '.join(choices)}, it is {value}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bound = f"at least {low}" if value < low else f"at most {high}"
                raise UserError(f"--{name.replace('_', '-')} must be {bound}, it is {value}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be a whole number from 0 to 2^63 - 1, it is {self.seed}")
        if self.few_below > self.many_above + 1:
            raise UserError(
                f"--few-below {self.few_below} and --many-above {self.many_above} overlap: a class would be both many- "
                "and few-shot"
            )
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"--lr must be a positive number, it is {self.lr}")
        if self.weight_decay is not None and not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise UserError(f"--weight-decay must be a finite number of at least 0, it is {self.weight_decay}")
        if not self.checkpoint_minutes >= 0:
            raise UserError(f"--checkpoint-minutes must be at least 0, it is {self.checkpoint_minutes}")
        if not 0 < self.test_fraction < 1:
            raise UserError(f"--test-fraction must lie between 0 and 1, it is {self.test_fraction}")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise UserError(f"--warmup is the share of the run that warms up, in [0, 1); it is {self.warmup}")
        if self.imbalance is not None and not (self.imbalance >= 1 and math.isfinite(self.imbalance)):
            raise UserError(
                f"--imbalance is the ratio of the largest class to the smallest, 1 or more; it is {self.imbalance}"
            )

    def _take_experts(self) -> None:
        """ "RIDE (4 experts)", a row of the paper's tables, is `ride` with a setting."""
        from otmix.methods import experts_of

        if not isinstance(self.method, str) or (found := experts_of(self.method)) is None:
            return
        name, number = found
        asked = self.set.parts.get("model.experts", number)
        if asked != number:
            raise UserError(
                f"{self.method} has {number} experts, --set.model.experts says {asked}; leave one of them out"
            )
        object.__setattr__(self, "method", name)
        if number != 3:  # RIDE's default
            parts = {**self.set.parts, "model.experts": number}
            object.__setattr__(self, "set", replace(self.set, parts=parts))

    @property
    def protocol_settings(self) -> Protocol:
        """The protocol with the method's own defaults and the single settings changed. Raises UserError where a value
        is out of range.
        """
        from otmix.methods import parse_method

        return parse_method(self.method).protocol(self.protocol, self.set)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a run's config.yaml; `set` holds only what was changed."""
        return asdict(self) | {"set": self.set.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`. Raises UserError for an unknown key."""
        known, changeable = {f.name for f in fields(cls)}, {f.name for f in fields(Protocol)}
        changed = values.get("set") or {}
        unknown = [key for key in values if key not in known] + [
            f"set.{key}"
            for key, value in changed.items()
            if key not in changeable and "." not in key and not isinstance(value, Mapping)
        ]
        if unknown:
            raise UserError(f"unknown setting {', '.join(unknown)}; `otmix train --print_config` shows all there are")
        return cls(**{**values, "set": Overrides.from_dict(changed)})

    @property
    def identity(self) -> dict[str, Any]:
        """The part of `to_dict` that decides the result, the method by its canonical name."""
        from otmix.methods import parse_method

        values = {
            key: value
            for key, value in self.to_dict().items()
            if key not in NOT_IDENTITY and not (key in ADDED and value == ADDED[key])
        }
        return values | {"method": parse_method(self.method).name}

    @property
    def hash(self) -> str:
        """Ten hexadecimal digits that name the identity."""
        return hashlib.blake2b(
            json.dumps(self.identity, sort_keys=True, default=str).encode(), digest_size=5
        ).hexdigest()

    def identity_with(self, settings: Mapping[str, object]) -> dict[str, object]:
        """The identity with every setting of the method, as `Method.effective` gives them, in place of those that were
        changed: `set.alpha` and so on.
        """
        same = {key: value for key, value in self.identity.items() if key != "set"}
        return same | {f"set.{key}": value for key, value in settings.items()}


@cache
def _kinds() -> dict[str, tuple[Any, ...]]:
    """The types of each setting that has no choices, NoneType among them where it may be left open."""
    hints = {name: hint for name, hint in get_type_hints(RunConfig).items() if name not in {"set", *_choices()}}
    return {name: get_args(hint) or (hint,) for name, hint in hints.items()}


_CALLED = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _in_kind(name: str, kinds: tuple[Any, ...], value: Any) -> Any:
    """A value as its setting has it: a path as a text, a number of NumPy's as Python's. Raises UserError for another
    type: "no" would count as true, and 2.5 epochs are none.
    """
    if value is None and NoneType in kinds:
        return None
    kind = kinds[0]
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if isinstance(value, bool) is (kind is bool):
        if kind is int and isinstance(value, Integral):
            return int(value)
        if kind is float and isinstance(value, Real):
            return float(value)
        if kind is bool:
            return value
    raise UserError(f"{name} must be {_CALLED[kind]}, it is {value!r}")


@cache
def _choices() -> dict[str, tuple[str, ...]]:
    """The values of each setting that has a few."""
    kinds = {name: (hint, *get_args(hint)) for name, hint in get_type_hints(RunConfig).items()}
    return {name: get_args(one) for name, kind in kinds.items() for one in kind if get_origin(one) is Literal}


@dataclass(frozen=True)
class Recipe:
    """How to train on one kind of data unless told otherwise."""

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    schedule: Literal["steps", "cosine"]


RECIPES: dict[str, Recipe] = {
    "cifar": Recipe(240, 128, "sgd", 0.1, 2e-4, "steps"),  # paper, section 5.1; weight decay from the released code
    "digits": Recipe(120, 64, "sgd", 0.1, 5e-4, "steps"),  # the shape of the paper's recipe in a minute on two cores
    "small": Recipe(240, 128, "sgd", 0.1, 2e-4, "steps"),  # a folder of small images: as CIFAR
    "large-pretrained": Recipe(
        30, 32, "adamw", 1e-4, 0.05, "cosine"
    ),  # common fine-tuning practice; the paper trains ImageNet-LT 200 epochs from scratch
    "large": Recipe(100, 64, "adamw", 1e-3, 0.05, "cosine"),
}


OTHER_OPTIMIZER = {"sgd": (0.1, 2e-4), "adamw": (1e-3, 0.05)}
"""Learning rate and weight decay of an optimizer that is not its recipe's, from scratch; a tenth of the rate with
weights to begin with, as the recipes with AdamW have it.
"""


WARMUPS = {"ldam": 5 / 200, "bbn": 5 / 200, "imagenet-lt": 5 / 200, "inaturalist": 5 / 210}
"""The share of the run that warms up, by schedule, as in LDAM's, BBN's and OTmix's released code; that has none on
CIFAR.
"""


def recipe_name(data: str, small: bool, pretrained: bool) -> str:
    """Which recipe a run follows."""
    if data in ("cifar10", "cifar100"):
        return "cifar"
    if data == "digits":
        return "digits"
    return "small" if small else "large-pretrained" if pretrained else "large"


def with_defaults(
    config: RunConfig, *, small: bool, backbone: str, image_size: int, images: int | None = None
) -> RunConfig:
    """Every None that depends on the data filled in, so that the record of a run says what was done.

    A folder of few `images` gets smaller batches (`batch_for`), and SGD a learning rate that is smaller by as much.
    """
    backbone = config.backbone or backbone
    pretrained = config.pretrained
    if pretrained is None:
        pretrained = not small and backbone.startswith("timm/") and config.weights is None
    begun = pretrained or config.weights is not None
    recipe = RECIPES[recipe_name(config.data, small, begun)]
    if config.optimizer not in (None, recipe.optimizer):
        lr, weight_decay = OTHER_OPTIMIZER[config.optimizer]
        recipe = replace(recipe, optimizer=config.optimizer, lr=lr / 10 if begun else lr, weight_decay=weight_decay)
    if config.data == "folder" and images is not None:
        size = batch_for(images, recipe.batch_size)
        lr = recipe.lr * (config.batch_size or size) / recipe.batch_size if recipe.optimizer == "sgd" else recipe.lr
        recipe = replace(recipe, batch_size=size, lr=min(lr, recipe.lr))
    chosen = {
        f.name: getattr(config, f.name) if getattr(config, f.name) is not None else getattr(recipe, f.name)
        for f in fields(Recipe)
    }
    warmup = WARMUPS.get(chosen["schedule"], 0.0) if config.warmup is None else config.warmup
    return replace(config, backbone=backbone, pretrained=pretrained, image_size=image_size, warmup=warmup, **chosen)


def batch_for(images: int, usual: int) -> int:
    """A power of two with which an epoch has 16 steps at least, but 16 to `usual` images.

    With the usual 128, 180 images have two steps an epoch: 240 epochs of OTmix then had a balanced accuracy of 33 %
    (five classes of CIFAR, one seed), with 16 of 47 %.
    """
    return min(usual, max(16, 1 << (max(images // 16, 1).bit_length() - 1)))


def default_run_dir(config: RunConfig, runs: Path) -> Path:
    """`<runs>/<data>-<method>-<protocol>-seed<seed>-<hash>`."""
    from otmix.methods import parse_method

    return runs / f"{config.data}-{parse_method(config.method).name}-{config.protocol}-seed{config.seed}-{config.hash}"
