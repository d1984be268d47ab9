"""What the benchmarks work on: ResNet-50, Kaiming weights, pruned to 90 % by one magnitude threshold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import rpg_fast
from rpg_fast.train.models import build_model

SPARSITY = 0.9


def resnet50(device: torch.device, *, full: bool) -> nn.Module:
    """ResNet-50 for 1000 classes, 25.6 million weights; or the same network with an eighth of the channels."""
    torch.manual_seed(0)
    return build_model("resnet50", num_classes=1000 if full else 10, width=64 if full else 8).to(device)


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Bool masks: the largest magnitudes of all weights together."""
    magnitudes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    threshold = magnitudes.kthvalue(max(1, round(sparsity * magnitudes.numel()))).values
    return {name: w.detach().abs() > threshold for name, w in weights.items()}


@torch.no_grad()
def prune(model: nn.Module, sparsity: float = SPARSITY) -> dict[str, Tensor]:
    """Zeroes the smallest of the 54 convolution and linear weights; returns their masks."""
    weights = rpg_fast.prunable_weights(model)
    masks = magnitude_masks(weights, sparsity)
    for name, weight in weights.items():
        weight.mul_(masks[name])
    return masks


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected||_F / ||expected||_F, in float64; 0 where both are zero."""
    difference = (actual.double() - expected.double()).norm().item()
    return difference / expected.double().norm().item() if difference else 0.0
