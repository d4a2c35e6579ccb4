"""Classifiers: CIFAR ResNets written here, any timm backbone by name, experts and branches of them, and looking at
images with them.
"""

from otmix.models.branches import BranchClassifier
from otmix.models.build import Architecture, build_model, default_backbone, list_backbones
from otmix.models.classifier import Classifier
from otmix.models.embedding import embed, make_embed
from otmix.models.experts import ExpertClassifier
from otmix.models.timm_backbone import TimmDataConfig, timm_data_config

__all__ = [
    "Architecture",
    "BranchClassifier",
    "Classifier",
    "ExpertClassifier",
    "TimmDataConfig",
    "build_model",
    "default_backbone",
    "embed",
    "list_backbones",
    "make_embed",
    "timm_data_config",
]
