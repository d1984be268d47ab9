"""Handwritten digits with a 98 % sparse network: plain PyTorch, and rpg_fast.RankPruner."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from rpg_fast import RankPruner


def train(epochs: int) -> nn.Module:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    pruner = RankPruner(model, optimizer, sparsity=0.98, total_steps=25 * epochs, update_every=5, rank_weight=0.1)
    for epoch in range(epochs):
        for batch in torch.randperm(1500).split(60):
            loss = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            if pruner.step():
                optimizer.step()
            optimizer.zero_grad()
        model.eval()
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
        model.train()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.3f}")
    print(f"sparsity {pruner.finalize():.4f}")
    return model


if __name__ == "__main__":
    train(epochs=20)
