"""ERM on CIFAR-10-LT without a line of otmix: is a high error the library's, or the data's?

    python results/independent_loop.py DATA [--epochs 100] [--blocks 3] [--seed 0]

DATA holds `train/<class>/…` and `test/<class>/…` (the JPEG copy). Everything is written as in the scripts of the field
(PIL, torchvision's transforms, NumPy's legacy generator, a ResNet with option-A shortcuts), with the recipe of the
protocol `clean`. Prints the test error of the last epoch, which decides nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms


class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.one = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(outside)
        self.two = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm_two = nn.BatchNorm2d(outside)
        self.stride, self.more = stride, outside - inside

    def forward(self, x):
        y = self.norm_two(self.two(F.relu(self.norm_one(self.one(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)


class ResNet(nn.Module):
    def __init__(self, blocks, classes):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        layers, width = [], 16
        for out, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(blocks):
                layers.append(Block(width, out, stride if i == 0 else 1))
                width = out
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        x = self.layers(F.relu(self.norm(self.first(x))))
        return self.head(x.mean((2, 3)))


class Images(torch.utils.data.Dataset):
    def __init__(self, files, labels, transform):
        self.images = [Image.open(file).convert("RGB") for file in files]
        self.labels, self.transform = labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--blocks", type=int, default=3, help="per stage: 3 is ResNet-20, 5 is ResNet-32")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    classes = sorted(folder.name for folder in (arguments.data / "train").iterdir())
    np.random.seed(0)  # noqa: NPY002  (the subset of the literature)
    files, labels = [], []
    for k, name in enumerate(classes):
        found = sorted((arguments.data / "train" / name).iterdir())
        order = np.arange(len(found))
        np.random.shuffle(order)  # noqa: NPY002
        keep = order[: int(len(found) * 0.01 ** (k / (len(classes) - 1)))]
        files += [found[i] for i in keep]
        labels += [k] * len(keep)
    normalise = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    plain = [transforms.ToTensor(), normalise]
    augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *plain]
    train = Images(files, labels, transforms.Compose(augmented))
    held = [(file, k) for k, name in enumerate(classes) for file in sorted((arguments.data / "test" / name).iterdir())]
    test = Images([file for file, _ in held], [k for _, k in held], transforms.Compose(plain))
    loader = torch.utils.data.DataLoader(train, 128, shuffle=True)
    model = ResNet(arguments.blocks, len(classes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    print(f"{len(train)} training and {len(test)} test images", flush=True)
    for epoch in range(arguments.epochs):
        passed = sum(epoch / arguments.epochs >= share for share in (100 / 240, 160 / 240, 200 / 240))
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1, 0.1, 0.01, 0.0001)[passed]
        model.train()
        began, total = time.time(), 0.0
        for images, target in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(target)
        print(f"epoch {epoch + 1}  loss {total / len(train):.3f}  {time.time() - began:.1f} s", flush=True)
    model.eval()
    wrong = 0
    with torch.no_grad():
        for images, target in torch.utils.data.DataLoader(test, 500):
            wrong += int((model(images).argmax(1) != target).sum())
    print(f"test error {100 * wrong / len(test):.2f} %")


if __name__ == "__main__":
    main()
