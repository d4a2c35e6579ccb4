"""The names of `--data`: apart from what loads them (`data/dataset.py:LOADERS`), so that commands start quickly."""

from typing import Literal

DataName = Literal["digits", "cifar10", "cifar100", "folder"]
