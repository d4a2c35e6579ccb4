"""From a configuration to the pieces of a run: data, model, stage, streams."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otmix.config import RunConfig, with_defaults
from otmix.data import ImageDataset, ImageSource, ImageStore, load_dataset, open_store
from otmix.errors import UserError
from otmix.files import read_json
from otmix.losses import Criterion
from otmix.methods import Method, check_read, parse_method
from otmix.methods.building import architecture_of, build_criterion
from otmix.models import Classifier, build_model, default_backbone, embed, list_backbones
from otmix.models.batchnorm import batch_norms
from otmix.protocols import Overrides, Protocol
from otmix.randomness import derive_seed
from otmix.training.confusion_source import ConfusionSource, confusion_origin
from otmix.training.records import read_data
from otmix.training.schedules import Schedule
from otmix.training.stage import OptimizerSettings, Stage, StepItems
from otmix.training.stages import build_stages
from otmix.types import Embed, Embedded, Items, Output

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that has been thought through but not begun: the filled-in configuration, the data, the model and the
    stage. `settings`: every setting of the method at its value, as `Method.effective` gives them.
    """

    config: RunConfig
    settings: dict[str, Any]
    method: Method
    protocol: Protocol
    dataset: ImageDataset
    model: Classifier
    stages: tuple[Stage, ...]
    _stores: dict[str, ImageStore] = field(default_factory=dict, init=False, repr=False)

    def looks_at_test(self) -> bool:
        """Whether the test set will have any influence, be it by the run that a fixed F or the weights come from."""
        protocol, weights = self.protocol, self.config.weights
        if weights is not None and _looked(Path(weights).parent):
            return True
        if not self.method.uses_confusion:
            return protocol.headline == "best-on-test"
        teacher = protocol.confusion_run
        return protocol.looks_at_test or (teacher is not None and _looked(Path(teacher)))

    def store(self, split: str, fabric: Fabric, progress: Callable[[int, int], None] | None = None) -> ImageStore:
        """The images of a split as evaluation sees them, opened once. Raises UserError when the data has none."""
        if split not in self._stores:
            source, workers = split_of(self.dataset, split), self.config.workers
            self._stores[split] = open_store(
                source, self.dataset, fabric.device, train=False, workers=workers, progress=progress
            )
        return self._stores[split]


def load_data(config: RunConfig, progress: Callable[[int, int], None] | None = None) -> ImageDataset:
    """The dataset that a configuration names. Raises UserError for everything that can be wrong with it."""
    if config.data == "digits" and config.root is not None:
        raise UserError("--root has no use with --data digits, which come with scikit-learn; add --data folder")
    return load_dataset(
        config.data,
        root=config.root,
        imbalance=config.imbalance,
        max_per_class=config.max_per_class,
        image_size=config.image_size,
        validation_per_class=config.validation_per_class,
        test_fraction=config.test_fraction,
        seed=0,  # split and subset are the same for all seeds of training, so that runs can be compared in pairs
        on_bad_image=config.on_bad_image,
        download=config.download,
        backbone=config.backbone,
        progress=progress,
    )


def prepare(config: RunConfig, dataset: ImageDataset, begun: bool = False) -> Plan:
    """Fill in the defaults, then build model and stage. Raises UserError for settings that do not go together.

    `begun`: the weights, and F, come from a checkpoint, so the file or run they began with is not asked for; it may be
    gone.
    """
    method = parse_method(config.method)
    check_read(config.set.parts, [method])  # their names are free text here; the command line checks all settings
    config = replace(config, set=method.converted(config.set))
    config = filled_in(replace(config, method=method.name), dataset.image_size, dataset.small, dataset.counts.total)
    if config.pretrained and config.weights is not None and not begun:
        raise UserError("--pretrained changes nothing with --weights, which take their place; leave one of them out")
    if config.nesterov and config.optimizer != "sgd":
        raise UserError(f"--nesterov changes nothing with --optimizer {config.optimizer}; leave it out, or choose sgd")
    protocol = config.protocol_settings
    if config.protocol == "official" and config.backbone not in list_backbones():
        raise UserError(
            f"protocol 'official' is the released code's for CIFAR ResNets, not for {config.backbone}; choose "
            "--backbone resnet32, or --protocol clean"
        )
    _check_splits(config, method, protocol, dataset, begun)
    settings = effective_settings(config)
    filled = Overrides.from_dict(settings)
    criterion = build_criterion(method, dataset.counts, filled)
    if next(criterion.parameters(), None) is not None:
        raise UserError(
            f"the loss {method.loss} has parameters of its own, which would not be trained: only the model's are; make "
            "them buffers, or part of a model"
        )
    assert config.backbone is not None  # with_defaults filled it in
    model = build_model(
        config.backbone,
        len(dataset.class_names),
        channels=dataset.channels,
        image_size=dataset.image_size,
        mean=dataset.mean,
        std=dataset.std,
        pretrained=bool(config.pretrained) and not begun,
        weights=None if begun else config.weights,
        seed=derive_seed(config.seed, "model"),
        **architecture_of(method, criterion, filled),
    )
    if method.pairing == "transport" and protocol.features == "official" and not model.supports_official:
        raise UserError(
            f"the features of protocol 'official' exist in CIFAR ResNets only, not in {config.backbone}; choose "
            "--backbone resnet32, or --protocol clean"
        )
    if config.set.bn_statistics == "mixed" and not batch_norms(model):
        raise UserError(f"--set.bn_statistics mixed changes nothing: {config.backbone} has no BatchNorm; leave it out")
    stages = build_stages(replace(config, set=filled), method, protocol, dataset, criterion)
    return Plan(config, settings, method, protocol, dataset, model, stages)


def effective_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting of a filled-in configuration's method at its value. A run records them, so that a default that is
    changed later changes no run.
    """
    assert config.schedule is not None
    deferred = Schedule.named(config.schedule).deferred
    return parse_method(config.method).effective(config.protocol, config.set, deferred)


def _looked(run_dir: Path) -> bool:
    """Whether the run there, if there is one, looked at the test set; of one that has not ended, whether it looks."""
    files = (run_dir / name for name in ("result.json", "environment.json"))
    for file in files:
        with suppress(UserError):  # a file of somebody else's
            said = read_json(file) if file.is_file() else None
            if isinstance(said, dict) and said.get("looks_at_test"):
                return True
    return False


def filled_in(config: RunConfig, image_size: int, small: bool, images: int) -> RunConfig:
    """The configuration with what its data decide."""
    backbone = "resnet8" if config.data == "digits" else default_backbone(image_size, small)
    return with_defaults(config, small=small, backbone=backbone, image_size=image_size, images=images)


def _check_splits(config: RunConfig, method: Method, protocol: Protocol, dataset: ImageDataset, begun: bool) -> None:
    if config.final_split == "validation" and dataset.validation is None:
        raise UserError("--final-split validation needs validation images; add --validation-per-class N")
    if protocol.confusion_from == "validation" and dataset.validation is None:
        raise UserError(
            "--set.confusion_from validation needs validation images; add --validation-per-class N, or use streamed or "
            "balanced-train"
        )
    origin = confusion_origin(protocol, dataset.validation is not None)
    sees = method.uses_confusion and not (method.pairing == "transport" and protocol.omega == 1.0)
    if sees and config.final_split == origin.split == "validation":
        raise UserError(
            "F would come from the validation images that --final-split measures the result on; give "
            "--set.confusion_from streamed or balanced-train"
        )
    if config.set.confusion_per_class is not None and sees and origin.items != "balanced" and not begun:
        raise UserError(
            f"--set.confusion_per_class changes nothing here: F comes from all {origin.split} images; leave it out, or "
            "give --set.confusion_from balanced-train"
        )
    if method.pairing == "confusion" and protocol.confusion_from == "streamed" and protocol.confusion_run is None:
        raise UserError(
            f"{method.name} embeds no images that F could be streamed from; use --set.confusion_from held-out, or "
            "name a finished run with --set.confusion_run"
        )
    if protocol.confusion_run is not None and method.uses_confusion and not begun:
        _check_fixed(Path(protocol.confusion_run), dataset)


def _check_fixed(run_dir: Path, dataset: ImageDataset) -> None:
    """Raises UserError where F cannot come from `run_dir`: here, before anything is written."""
    if not (run_dir / "result.json").is_file():
        raise UserError(f"--set.confusion_run must name the folder of a finished run; {run_dir} is none")
    data = read_data(run_dir)
    known = tuple(data.get(key) for key in ("class_names", "image_size", "channels"))
    if known != (list(dataset.class_names), dataset.image_size, dataset.channels):
        raise UserError(
            f"F cannot come from {run_dir}: its classes or the size of its images are not those of {dataset.name}; "
            "name a run on the same data with --set.confusion_run"
        )


def split_of(dataset: ImageDataset, split: str) -> ImageSource:
    """A split by name. Raises UserError when the data has none."""
    source: ImageSource | None = getattr(dataset, split)
    if source is None:
        raise UserError(f"{dataset.name} has no {split} images")
    return source


def build_optimizer(model: Classifier, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that are trained.

    No decay on what a module exempts (`no_weight_decay`), nor, with adamw, on biases and normalisation (common
    practice); the paper's SGD decays everything else, normalisation included.
    """
    exempt = model.no_weight_decay()
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = name in exempt or (settings.name == "adamw" and parameter.ndim <= 1)
            (free if spared else decayed).append(parameter)
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, settings.weight_decay), (free, 0.0))
        if group
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in (*decayed, *free))
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, fused=fused)


def looking_batch(config: RunConfig, dataset: ImageDataset) -> int:
    """How many images a process of a run looks at together outside training: of larger ones as many as a step has room
    for. Whoever evaluates the run again takes as many, as another size of batch may round otherwise.
    """
    return 512 if dataset.small else max(1, (config.batch_size or 1) // (config.devices * config.num_nodes))


class Forward(nn.Module):
    """A model whose forward returns plain tensors: Fabric and DDP copy what passes through them, which a frozen
    `Output` does not allow.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        output: Output = self.model(images)
        return output.logits, output.features, output.expert_logits


def compiled(module: nn.Module, fabric: Fabric) -> nn.Module:
    """The module compiled; for a single GPU with CUDA graphs, or a step of a small network would mostly launch kernels.

    Each size of batch is compiled by itself: there are two, and sizes left open make slower kernels.
    """
    graphs = fabric.device.type == "cuda" and fabric.world_size == 1
    optimized: nn.Module = torch.compile(module, dynamic=False, mode="reduce-overhead" if graphs else None)  # type: ignore[assignment]  # an OptimizedModule is a Module
    return optimized


def embed_maker(
    plan: Plan, criterion: Criterion, fabric: Fabric, store: ImageStore, source: ConfusionSource | None
) -> Callable[[StepItems], Embed]:
    """Makes, for each step, the `embed` that pairing sees: it looks at the images the step has already loaded, and
    loads others on demand.
    """
    model: Callable[[Tensor], Output] = compiled(plan.model, fabric) if plan.config.compile else plan.model
    official = plan.protocol.features == "official"
    counting = source is not None and source.streamed

    def make(step: StepItems) -> Embed:
        loaded = {id(batch.items): batch for batch in (step.background, step.foreground) if batch is not None}

        def look(items: Items) -> Embedded:
            batch = loaded[id(items)] if id(items) in loaded else store.fetch(items, None)
            # only the backgrounds are counted; the foregrounds need no probabilities
            wanted = counting and batch is step.background
            seen = None
            if wanted or not official:
                seen = embed(
                    model,
                    batch.images,
                    batch.items,
                    autocast=fabric.autocast,
                    log_probabilities=wanted,
                    probabilities=criterion.probabilities,
                )
            if official:  # in train mode, as the released code does: these passes move BatchNorm's running statistics
                with torch.no_grad(), fabric.autocast():  # its gradients reach nothing, so none are kept
                    features = plan.model.official_features(batch.images).float()
                return Embedded(batch.items, features, None if seen is None else seen.log_probabilities)
            assert seen is not None
            return seen

        return look

    return make
