"""Classifiers: CIFAR ResNets written here, any timm backbone by name, and looking at images with them."""

from otmix.models.build import build_model, default_backbone, list_backbones
from otmix.models.classifier import Classifier
from otmix.models.embedding import embed, make_embed
from otmix.models.timm_backbone import TimmDataConfig, timm_data_config

__all__ = [
    "Classifier",
    "TimmDataConfig",
    "build_model",
    "default_backbone",
    "embed",
    "list_backbones",
    "make_embed",
    "timm_data_config",
]
