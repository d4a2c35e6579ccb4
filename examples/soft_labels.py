"""OTmix as a batch transform in torchvision's manner: (images, labels) -> (images, soft labels), for losses that take
them.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from otmix import OTMixer
from otmix.data import choose_subset
from otmix.models import build_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=30)
epochs = parser.parse_args().epochs
torch.manual_seed(0)

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
chosen, _ = choose_subset(labels[:1200], num_classes=10, imbalance=20)
train, test = Subset(TensorDataset(images, labels), chosen.tolist()), (images[1200:], labels[1200:])

model = build_model(
    "resnet8", 10, channels=1, image_size=8, mean=[0.31], std=[0.38]
)  # gives features and logits by itself
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
mixer = OTMixer(model, labels[chosen], epochs)
mix = mixer.as_transform(mixer.foreground_loader(train, batch_size=64))

for epoch in range(epochs):
    model.train()
    for batch in DataLoader(train, batch_size=64, shuffle=True):
        mixed_images, soft_labels = mix(*batch)
        loss = nn.functional.cross_entropy(model(mixed_images).logits, soft_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mixer.end_epoch()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    accuracy = (model(test[0]).logits.argmax(1) == test[1]).float().mean().item()
print(f"test accuracy {100 * accuracy:.1f} %")
