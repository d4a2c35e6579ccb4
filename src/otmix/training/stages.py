"""From a method and its settings to the stages of its training."""

from __future__ import annotations

from otmix.config import RunConfig
from otmix.data import ImageDataset
from otmix.losses import Criterion
from otmix.methods import Method
from otmix.methods.building import build_mixer, build_rebalancing
from otmix.protocols import Protocol
from otmix.sampling import effective_number, inverse_frequency
from otmix.training.bbn import bbn_step
from otmix.training.schedules import Schedule
from otmix.training.stage import OptimizerSettings, Stage, mix_and_classify


def build_stages(
    config: RunConfig, method: Method, protocol: Protocol, dataset: ImageDataset, criterion: Criterion
) -> tuple[Stage, ...]:
    """What a method's training consists of: one stage for all methods so far. `config.set` has every setting."""
    assert (
        config.epochs
        and config.batch_size
        and config.optimizer
        and config.lr
        and config.schedule
        and config.weight_decay is not None
        and config.warmup is not None
    )
    counts = dataset.counts
    foreground = None
    if method.architecture == "bbn":
        foreground = inverse_frequency(counts)  # BBN's reversed sampler: the class's probability is ~ 1/n
    elif method.second_stream:
        by_number = protocol.foreground_law == "effective-number"
        foreground = effective_number(counts) if by_number else inverse_frequency(counts, protocol.foreground_r)
    schedule = Schedule.named(config.schedule, config.warmup, criterion.own_steps)
    reweighting, law = build_rebalancing(method, counts, config.set)
    only = Stage(
        name=method.name,
        epochs=config.epochs,
        criterion=criterion,
        optimizer=OptimizerSettings(config.optimizer, config.lr, config.weight_decay, nesterov=config.nesterov),
        schedule=schedule,
        background_batch=config.batch_size,
        foreground_probability=foreground,
        background_law=None if law is None else law.class_probability,
        both_streams=method.architecture == "bbn",
        mixer=build_mixer(method, protocol, counts, config.set),
        reweighting=reweighting,
        reduction=protocol.weighted_mean,
        bn_statistics=protocol.bn_statistics,
        step=bbn_step if method.architecture == "bbn" else mix_and_classify,
    )
    return (only,)
