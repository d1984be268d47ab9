"""Runs the published program's own scheduler and rank loss beside published_rules.py, on the CPU in float64, and
compares masks and weights after every step::

    git clone https://github.com/huawei-noah/Efficient-Computing
    python tests/against_published.py Efficient-Computing/Pruning/RPG

It is no test of `make test`, because the published files are not part of this project."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from published_rules import PublishedProgram, PublishedRecipe
from torch import Tensor, nn

USUAL: dict[str, Any] = {
    "density": 0.2,
    "total_steps": 198,
    "update_every": 3,
    "prune_until": 0.8,
    "update_until": 0.95,
    "rank_weight": 0.5,
    "tail_energy": 0.2,
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"update_every": 5, "total_steps": 330},
    {"momentum": 0.9, "weight_decay": 1e-3},
    {"grow_steps": 2, "momentum": 0.9},
    {"grow_steps": 3},
    {"grow_steps": 7},
    {"drop_fraction": 0.0},
    {"drop_fraction": 0.0, "momentum": 0.9, "grow_steps": 2, "rank_weight": 5.0},
    {"prune_until": 0.9, "update_until": 0.901},
    {"prune_until": 0.9, "update_until": 0.9, "total_steps": 200},
    {"prune_until": 0.5, "update_until": 0.6, "update_every": 4, "grow_steps": 3},
    {"min_sparsity": 0.5},
    {"density": 0.02, "momentum": 0.9},
    {"density": 0.004},
    {"total_steps": 1782},
]


def load(root: Path) -> tuple[Any, Any]:
    """The published scheduler and rank loss from the files in `root`; torchvision, of which they only want two names,
    may be missing."""
    if not (root / "image_classification" / "rank_kit.py").is_file():
        sys.exit(f"wanted the folder Pruning/RPG of the published repository, got {root}")
    names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
    for name, parent in zip(names, (None, *names), strict=False):
        module = sys.modules.setdefault(name, ModuleType(name))
        if parent is not None:
            setattr(sys.modules[parent], name.rpartition(".")[2], module)
    sys.modules[names[-1]].Bottleneck = sys.modules[names[-1]].BasicBlock = nn.Identity
    for name in ("image_classification", "image_classification.rigl_torch"):  # without the imports of its __init__
        package = ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package
    from image_classification.rank_kit import get_loss_para
    from image_classification.rigl_torch.RigL import RigLScheduler

    return RigLScheduler, get_loss_para


def run(scheduler: Any, get_loss_para: Any, recipe: PublishedRecipe, micro_batches: int) -> float:
    """The largest difference between two weights; raises AssertionError where masks differ."""
    torch.manual_seed(0)
    sizes = {"0": (3, 8, 3), "1": (8, 16, 3), "2": (16, 12, 1)}
    net = nn.Sequential(
        *(nn.Conv2d(*size, bias=False) for size in sizes.values()), nn.Linear(12, 10, bias=False)
    ).double()
    weights: dict[str, Tensor] = {str(i): layer.weight for i, layer in enumerate(net)}
    optimizer = torch.optim.SGD(net.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    plain = PublishedProgram(weights, list(sizes), recipe)
    args = SimpleNamespace(
        delta=recipe.update_every,
        iterative_T_end_percent=recipe.prune_until,
        iterative_T_end=int(recipe.prune_until * recipe.total_steps),
        svd_flops=dict.fromkeys(("solve", "iter", "min_solve", "min_iter"), 0),
    )
    pruner = scheduler(
        net,
        optimizer,
        dense_allocation=recipe.density,
        T_end=int(recipe.update_until * recipe.total_steps),
        sparsity_distribution="magnitude-exponential",
        delta=recipe.update_every,
        alpha=recipe.drop_fraction,
        grad_accumulation_n=recipe.grow_steps,
        args=args,
    )
    worst = 0.0
    for step in range(1, recipe.total_steps + 1):
        batches = [{n: 0.1 * torch.randn_like(w) for n, w in weights.items()} for _ in range(micro_batches)]
        for batch in batches:
            loss = sum((w * batch[name]).sum() for name, w in weights.items())
            if pruner.check_if_backward_hook_should_accumulate_grad():
                rank_loss, _, _ = get_loss_para(net, recipe.tail_energy, None, recipe.min_sparsity, None, args)
                loss = loss + recipe.rank_weight * rank_loss
            loss.backward()
        for w in weights.values():
            w.grad /= micro_batches
        if took_step := pruner():
            optimizer.step()
        optimizer.zero_grad()
        assert plain.step([batches]) == took_step, f"step {step}"
        for (name, w), mask in zip(weights.items(), pruner.backward_masks, strict=True):
            assert torch.equal(mask, plain.masks[name]), f"step {step}: mask of weight {name}"
            worst = max(worst, (w - plain.weights[name]).abs().max().item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the folder Pruning/RPG of the published repository")
    scheduler, get_loss_para = load(parser.parse_args().path)
    for number, settings in enumerate(SETTINGS):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the sparsities at every update
            worst = run(scheduler, get_loss_para, PublishedRecipe(**{**USUAL, **settings}), 1 + 2 * (number == 3))
        print(f"masks equal, weights within {worst:.0e}: {settings or 'as usual'}", flush=True)


if __name__ == "__main__":
    main()
