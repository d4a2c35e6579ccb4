"""scikit-learn's handwritten digits: 1,797 grey images of 8 × 8, inside the package, nothing to download."""

from __future__ import annotations

import torch

from otmix.data.longtail import split_by_class
from otmix.data.sources import ArraySource, RawData, average_channels, to_channels

MEAN, STD = (0.3053,), (0.3761,)
TEST_FRACTION = 0.3


def load_digits(channels: int = 1) -> RawData:
    """30 % of each digit are the test split, always the same ones (Alpaydin & Kaynak 1998, UCI). Never mirrored."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    source = ArraySource(to_channels(images, channels), torch.from_numpy(found.target), prefix="digits")
    names = tuple(str(digit) for digit in range(10))
    train, test = split_by_class(source.labels, names, TEST_FRACTION)
    return RawData(
        name="digits",
        class_names=names,
        train=source.select(train),
        validation=None,
        test=source.select(test),
        mean=average_channels(MEAN, channels),
        std=average_channels(STD, channels),
        channels=channels,
        flip=False,
        image_size=8,
        notes=(f"{TEST_FRACTION:.0%} of the images of each digit are the test split.",),
    )
