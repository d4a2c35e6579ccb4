"""Everything from names and folders to batches of images."""

from otmix.data.augmentation import ShiftFlip, Window, WindowFlip
from otmix.data.dataset import DEFAULT_IMBALANCE, ImageDataset, load_dataset, require_readable
from otmix.data.decoding import IMAGE_ENDINGS, decode
from otmix.data.longtail import choose_subset, long_tail_counts, split_by_class
from otmix.data.resizing import SMALL, to_square
from otmix.data.sources import ArraySource, FileSource, ImageSource, items_of
from otmix.data.stores import HeldStore, ImageStore, ResidentStore, WorkerStore, dead_reader, open_store

__all__ = [
    "DEFAULT_IMBALANCE",
    "IMAGE_ENDINGS",
    "SMALL",
    "ArraySource",
    "FileSource",
    "HeldStore",
    "ImageDataset",
    "ImageSource",
    "ImageStore",
    "ResidentStore",
    "ShiftFlip",
    "Window",
    "WindowFlip",
    "WorkerStore",
    "choose_subset",
    "dead_reader",
    "decode",
    "items_of",
    "load_dataset",
    "long_tail_counts",
    "open_store",
    "require_readable",
    "split_by_class",
    "to_square",
]
