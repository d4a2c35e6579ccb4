"""The values that flow from a dataset to a loss. Sizes: `f` foregrounds, `m` backgrounds, `B` images in a batch, `K`
classes, `D` features, `S` labels per image (2 in a mix of two), `C H W` image.
"""

from otmix.types.batches import Batch, Embed, Embedded, Items, Output
from otmix.types.class_counts import SHOT_GROUPS, ClassCounts, ShotGroup
from otmix.types.confusion import Confusion, ConfusionOrigin
from otmix.types.mixes import Mixed, Target
from otmix.types.pairs import Pairs, Plan

__all__ = [
    "SHOT_GROUPS",
    "Batch",
    "ClassCounts",
    "Confusion",
    "ConfusionOrigin",
    "Embed",
    "Embedded",
    "Items",
    "Mixed",
    "Output",
    "Pairs",
    "Plan",
    "ShotGroup",
    "Target",
]
