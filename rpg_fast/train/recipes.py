"""The published hyper-parameters (RPG, Zhang et al., NeurIPS 2023, ResNet-50 on ImageNet), and where the values of a
run are from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import TrainConfig

COMMON: dict[str, Any] = {
    "arch": "resnet50",
    "epochs": 100,
    "batch_size": 1024,  # 8 GPUs with 128 images each
    "optimizer": "sgd",
    "lr": 0.4,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "warmup_epochs": 5.0,
    "label_smoothing": 0.1,
    "distribution": "global_magnitude",
    "criterion": "rigl",
    "schedule": "exponential",
    "update_every": 100,
    "prune_until": 0.9,
    "update_until": 0.901,
    "drop_fraction": 0.3,
    "dense_baseline": False,
    "rank_every": "update",
    "min_sparsity": 0.0,
    "seed": 42,
}

RECIPES: dict[str, dict[str, Any]] = {
    name: {**COMMON, "start_from": start, "sparsity": sparsity, "rank_weight": rank_weight, "tail_energy": tail_energy}
    for name, start, sparsity, rank_weight, tail_energy in (
        ("rpg-80", "pretrained", 0.80, 0.5, 0.2),
        ("rpg-90", "pretrained", 0.90, 0.5, 0.1),
        ("rpg-95", "pretrained", 0.95, 3.0, 0.2),
        ("rpg-98", "pretrained", 0.98, 4.0, 0.2),
        # from scratch only accuracies are published: these are the values of the same sparsity
        ("rpg-90-scratch", "random", 0.90, 0.5, 0.1),
        ("rpg-95-scratch", "random", 0.95, 3.0, 0.2),
    )
}


def from_recipe(options: Mapping[str, Any]) -> TrainConfig:
    """The configuration of `options`, where those that are missing are those of its "recipe", if it names one, and
    otherwise the defaults.

    Raises:
        UserError: a value is out of its range.
    """
    return TrainConfig(**{**RECIPES.get(options.get("recipe", ""), {}), **options})


def describe(config: TrainConfig, options: Mapping[str, Any], named: Mapping[str, str]) -> str:
    """Every value of a configuration and where it comes from, one line each.

    Args:
        options: what was given on the command line. named: {option: the name that it was given by}.
    """
    values = {**config.to_dict(), "lr": config.peak_lr, "warmup_epochs": config.warmup}
    recipe = RECIPES.get(config.recipe or "", {})
    width = max(len(name) for name in values) + 2
    lines = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        given = "given" if named.get(name, option) == option else f"given as {named[name]}"
        origin = given if name in options else f"recipe {config.recipe}" if name in recipe else "default"
        shown = "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        lines.append(f"{option:<{width + 2}} {shown:<20} {origin}")
    return "\n".join(lines)
