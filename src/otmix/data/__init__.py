"""Everything from names and folders to batches of images."""

from otmix.data.augmentation import ShiftFlip, Window, WindowFlip
from otmix.data.dataset import LOADERS, ImageDataset, Loader, load_dataset, require_readable
from otmix.data.decoding import IMAGE_ENDINGS, decode
from otmix.data.longtail import choose_subset, long_tail_counts, split_by_class
from otmix.data.resizing import SMALL, to_square
from otmix.data.sources import ArraySource, FileSource, ImageSource, items_of
from otmix.data.stores import HeldStore, ImageStore, ResidentStore, WorkerStore, dead_reader, open_store

__all__ = [
    "IMAGE_ENDINGS",
    "LOADERS",
    "SMALL",
    "ArraySource",
    "FileSource",
    "HeldStore",
    "ImageDataset",
    "ImageSource",
    "ImageStore",
    "Loader",
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
