"""OTmix in a PyTorch loop of one's own, with a timm model; the four lines that it takes are numbered."""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from otmix import OTMixer
from otmix.data import choose_subset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=15)
epochs = parser.parse_args().epochs
torch.manual_seed(0)

# any dataset of (image, label): here scikit-learn's digits as 32 × 32 RGB, thinned to an imbalance of 20
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
images = nn.functional.interpolate(images, size=32).expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)
chosen, _ = choose_subset(labels[:1200], num_classes=10, imbalance=20)
train, test = Subset(TensorDataset(images, labels), chosen.tolist()), (images[1200:], labels[1200:])

model = timm.create_model("resnet10t", num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
criterion = nn.CrossEntropyLoss(reduction="none")
loader = DataLoader(train, batch_size=32, shuffle=True)


def features_and_logits(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    maps = model.forward_features(images)
    return model.forward_head(maps, pre_logits=True), model.forward_head(maps)


mixer = OTMixer(features_and_logits, labels[chosen], epochs)  # 1
foregrounds = mixer.foreground_loader(train, batch_size=32)  # 2
for epoch in range(epochs):
    model.train()
    for background, foreground in zip(loader, foregrounds):
        mixed = mixer(background, foreground)  # 3
        loss = mixed.loss(criterion, model(mixed.images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mixer.end_epoch()  # 4
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean().item()
print(f"test accuracy {100 * accuracy:.1f} %")
