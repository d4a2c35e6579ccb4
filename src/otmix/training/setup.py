"""From a configuration to the pieces of a run: data, model, stage, streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from otmix.config import RunConfig, with_defaults
from otmix.confusion import ConfusionCounter
from otmix.costs import CombinedCost
from otmix.data import ImageDataset, ImageSource, ImageStore, load_dataset, open_store
from otmix.errors import UserError
from otmix.losses import LOSSES, Criterion, DeferredReweighting
from otmix.methods import Method, parse_method
from otmix.mixer import BatchMixer, MixSchedule
from otmix.mixing import CutMix
from otmix.models import Classifier, build_model, default_backbone, embed
from otmix.pairing import Curriculum, IndexPairing, Pairing, TransportPairing
from otmix.protocols import Protocol
from otmix.randomness import derive_seed
from otmix.sampling import effective_number, inverse_frequency
from otmix.training.confusion_source import STREAM_DECAY, ConfusionSource, as_items, balanced_subset, confusion_origin
from otmix.training.schedules import Schedule
from otmix.training.stage import OptimizerSettings, Stage, StepItems
from otmix.types import Embed, Embedded, Items, Output

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that has been thought through but not begun: the filled-in configuration, the data, the model and the
    stage.
    """

    config: RunConfig
    method: Method
    protocol: Protocol
    dataset: ImageDataset
    model: Classifier
    stages: tuple[Stage, ...]


def load_data(config: RunConfig, progress: Callable[[int, int], None] | None = None) -> ImageDataset:
    """The dataset that a configuration names. Raises UserError for everything that can be wrong with it."""
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
        progress=progress,
    )


def prepare(config: RunConfig, dataset: ImageDataset) -> Plan:
    """Fill in the defaults, then build model and stage. Raises UserError for settings that do not go together."""
    method = parse_method(config.method)
    backbone = "resnet8" if config.data == "digits" else default_backbone(dataset.image_size, dataset.small)
    config = with_defaults(
        replace(config, method=method.name), small=dataset.small, backbone=backbone, image_size=dataset.image_size
    )
    if config.final_split == "validation" and dataset.validation is None:
        raise UserError("--final-split validation needs validation images; add --validation-per-class N")
    protocol = config.protocol_settings
    if protocol.confusion_from == "validation" and dataset.validation is None:
        raise UserError(
            "--set.confusion_from validation needs validation images; add --validation-per-class N, or use streamed or "
            "balanced-train"
        )
    criterion = LOSSES[method.loss](dataset.counts)
    assert config.backbone is not None  # with_defaults filled it in
    model = build_model(
        config.backbone,
        len(dataset.class_names),
        channels=dataset.channels,
        image_size=dataset.image_size,
        mean=dataset.mean,
        std=dataset.std,
        head=criterion.head,
        pretrained=bool(config.pretrained),
        weights=config.weights,
        seed=derive_seed(config.seed, "model"),
    )
    if method.mixer == "otmix" and protocol.features == "official" and not model.supports_official:
        raise UserError(
            f"the features of protocol 'official' exist in CIFAR ResNets only, not in {config.backbone}; choose "
            "--backbone resnet32, or --protocol clean"
        )
    return Plan(config, method, protocol, dataset, model, build_stages(config, method, protocol, dataset, criterion))


def build_stages(
    config: RunConfig, method: Method, protocol: Protocol, dataset: ImageDataset, criterion: Criterion
) -> tuple[Stage, ...]:
    """What a method's training consists of: one stage for all methods so far."""
    assert (
        config.epochs
        and config.batch_size
        and config.optimizer
        and config.lr
        and config.schedule
        and config.weight_decay is not None
    )
    foreground = None
    if method.mixer is not None:
        law = (
            effective_number(dataset.counts)
            if protocol.foreground_law == "effective-number"
            else inverse_frequency(dataset.counts, protocol.foreground_r)
        )
        foreground = law
    only = Stage(
        name=method.name,
        epochs=config.epochs,
        criterion=criterion,
        optimizer=OptimizerSettings(config.optimizer, config.lr, config.weight_decay, nesterov=config.nesterov),
        schedule=Schedule(config.schedule, warmup=config.warmup),
        background_batch=config.batch_size,
        foreground_probability=foreground,
        mixer=build_mixer(method, protocol),
        reweighting=DeferredReweighting(dataset.counts) if method.drw else None,
        reduction=protocol.weighted_mean,
    )
    return (only,)


def build_mixer(method: Method, protocol: Protocol) -> BatchMixer | None:
    """Pairing, pixel rule and schedule of a method under a protocol; None for a method that mixes nothing."""
    if method.mixer is None:
        return None
    pairing: Pairing = IndexPairing()
    if method.mixer == "otmix":
        cost = partial(CombinedCost, omega=protocol.omega, metric=protocol.metric, keep_diagonal=protocol.keep_diagonal)
        transport = TransportPairing(cost, protocol.epsilon, select=protocol.select)
        pairing = Curriculum(
            pairing, transport, protocol.curriculum_power, protocol.curriculum_per, protocol.curriculum_one_based
        )
    schedule = MixSchedule(protocol.mix_probability, (protocol.mix_from, protocol.mix_until), protocol.mix_fraction)
    return BatchMixer(pairing, CutMix(protocol.alpha, protocol.box, protocol.box_per), schedule)


def build_confusion_source(plan: Plan, fabric: Fabric, train_store: ImageStore) -> ConfusionSource | None:
    """Where the class cost of transport gets its F from; None for methods without one."""
    if plan.method.mixer != "otmix" or plan.protocol.omega == 1.0:
        return None
    dataset, config = plan.dataset, plan.config
    origin = confusion_origin(plan.protocol, dataset.validation is not None)
    streamed = origin.items == "streamed"
    counter = ConfusionCounter(
        len(dataset.class_names), origin, decay=STREAM_DECAY if streamed else 0.0, device=fabric.device
    )
    if streamed:
        return ConfusionSource(fabric, counter)
    if origin.split == "train":
        store = train_store
        per_class = origin.per_class
        labels = dataset.train.labels
        items = (
            as_items(labels) if per_class is None else balanced_subset(labels, dataset.counts, per_class, config.seed)
        )
    else:
        source = split_of(dataset, origin.split)
        store = open_store(source, dataset, fabric.device, train=False, workers=config.workers)
        items = as_items(source.labels)
    return ConfusionSource(fabric, counter, store, items)


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


def embed_maker(
    plan: Plan, criterion: Criterion, fabric: Fabric, store: ImageStore, source: ConfusionSource | None
) -> Callable[[StepItems], Embed]:
    """Makes, for each step, the `embed` that pairing sees: it looks at the images the step has already loaded, and
    loads others on demand.
    """
    model: Callable[[Tensor], Output] = torch.compile(plan.model) if plan.config.compile else plan.model
    official = plan.protocol.features == "official"
    counting = source is not None and source.streamed

    def make(step: StepItems) -> Embed:
        loaded = {id(batch.items): batch for batch in (step.background, step.foreground) if batch is not None}

        def look(items: Items) -> Embedded:
            batch = loaded[id(items)] if id(items) in loaded else store.fetch(items, None)
            if official:  # in train mode, as the released code does: these passes move BatchNorm's running statistics
                with torch.no_grad(), fabric.autocast():  # its gradients reach nothing, so none are kept
                    return Embedded(batch.items, plan.model.official_features(batch.images).float())
            # only the backgrounds are counted; the foregrounds need no probabilities
            wanted = counting and batch is step.background
            return embed(
                model,
                batch.images,
                batch.items,
                autocast=fabric.autocast,
                log_probabilities=wanted,
                probabilities=criterion.probabilities,
            )

        return look

    return make
