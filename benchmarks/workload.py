"""What the benchmarks work on: ResNet-50, Kaiming weights, 90 % of them zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rpg_fast
from rpg_fast.schedules import make_schedule
from rpg_fast.train.models import build_model

SPARSITY = 0.9

# 100 epochs of 1251 steps: pruning ends after 90 of them. UPDATE is the first that prunes to SPARSITY or more.
RECIPE = {"sparsity": 0.98, "total_steps": 125_100, "update_every": 100, "prune_until": 0.9, "drop_fraction": 0.3}
EVERY: int = RECIPE["update_every"]
SCHEDULE = make_schedule("exponential", 0.98, 125_100, EVERY, prune_until=0.9, update_until=0.901)
UPDATE = next(step for step in range(EVERY, SCHEDULE.last_update, EVERY) if SCHEDULE(step) >= SPARSITY)


def resnet50(device: torch.device, *, full: bool) -> nn.Module:
    """ResNet-50 for 1000 classes, 25.6 million weights; or the same network with an eighth of the channels."""
    torch.manual_seed(0)
    return build_model("resnet50", num_classes=1000 if full else 10, width=64 if full else 8).to(device)


@torch.no_grad()
def prune(model: nn.Module, sparsity: float = SPARSITY, *, together: bool = False) -> dict[str, Tensor]:
    """Zeroes the smallest of the 54 convolution and linear weights, in each of them or of all `together`; returns their
    bool masks."""
    weights = rpg_fast.prunable_weights(model)
    threshold = _threshold(list(weights.values()), sparsity) if together else None
    masks = {}
    for name, weight in weights.items():
        masks[name] = weight.abs() > (_threshold([weight], sparsity) if threshold is None else threshold)
        weight.mul_(masks[name])
    return masks


def _threshold(weights: list[Tensor], sparsity: float) -> Tensor:
    magnitudes = torch.cat([w.abs().flatten() for w in weights])
    return magnitudes.kthvalue(max(1, round(sparsity * magnitudes.numel()))).values


def before_update(pruner: rpg_fast.RankPruner) -> dict[str, Any]:
    """The state of a pruner of RECIPE with these masks whose next step is UPDATE."""
    return pruner.state_dict() | {"step_count": UPDATE - 1}
