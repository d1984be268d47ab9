"""What a training step is made with: optimizer, pruner, learning rate, mixed images, averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

import rpg_fast

from .config import TrainConfig, UserError

DECAYED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer, with weight decay on what layers of the types `DECAYED` multiply by, whatever its name, and on
    nothing else: not on biases, norms, embeddings, tokens."""
    layers = [module for module in model.modules() if isinstance(module, DECAYED)]
    decayed = {id(p): p for layer in layers for p in layer.parameters(recurse=False) if p.dim() > 1}
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    lr = learning_rate(0, 1, config)
    if config.optimizer == "sgd":
        sgd = rpg_fast.MaskedSGD if config.optimizer_impl == "masked" else torch.optim.SGD
        return sgd(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)
    adamw = rpg_fast.MaskedAdamW if config.optimizer_impl == "masked" else torch.optim.AdamW
    return adamw(groups, lr=lr)


def update_interval(total_steps: int, config: TrainConfig) -> int:
    """Steps between updates of the masks: by default 100 as published; in a run too short for 50 such updates fewer,
    but not below 5, since a step with an update trains nothing."""
    until = config.update_until if config.schedule == "constant" else config.prune_until
    usual = min(100, max(5, total_steps // 50), max(1, int(until * total_steps)))
    return config.update_every or usual


def pruned_weights(model: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """The weights of convolutions and linear layers by name, but those of the layers that are kept dense.

    Raises:
        UserError: the model has no such layer, or no other.
    """
    weights = rpg_fast.prunable_weights(model)
    kept = [name.strip() for name in (config.keep_dense or "").split(",") if name.strip()]
    for name in kept:
        if f"{name}.weight" not in weights:
            known = ", ".join(weight.removesuffix(".weight") for weight in weights)
            raise UserError(f"--keep-dense {name}: there is no such layer; known are {known}")
    pruned = {name: w for name, w in weights.items() if name.removesuffix(".weight") not in kept}
    if not pruned:
        raise UserError("--keep-dense leaves no layer to prune")
    return pruned


def make_pruner(
    model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, config: TrainConfig
) -> rpg_fast.RankPruner:
    """The pruner of one training, its randomness drawn from the seed.

    Raises:
        UserError: options that do not go together, or with the model. ValueError: what `RankPruner` refuses.
    """
    device = next(model.parameters()).device
    update_every = update_interval(total_steps, config)
    official = config.semantics == "official"
    if config.grow_steps > update_every - official:
        raise UserError(
            f"--grow-steps must be {'below' if official else 'at most'} the {update_every} steps of --update-every"
            f"{' with --semantics official' if official else ''}, got {config.grow_steps}"
        )
    return rpg_fast.RankPruner(
        model,
        optimizer,
        sparsity=config.sparsity,
        total_steps=total_steps,
        weights=pruned_weights(model, config),
        distribution=config.distribution,
        criterion=config.criterion,
        schedule=config.schedule,
        update_every=update_every,
        prune_until=config.prune_until,
        update_until=config.update_until,
        drop_fraction=config.drop_fraction,
        rank_weight=config.rank_weight,
        rank_every=config.rank_every,
        tail_energy=config.tail_energy,
        rank_method=config.rank_method,
        min_sparsity=config.min_sparsity,
        semantics=config.semantics,
        grow_steps=config.grow_steps,
        generator=torch.Generator(device).manual_seed(config.seed),
    )


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Linear over the warm-up, then half a cosine down to zero, anew at every step."""
    warmup = config.warmup / config.epochs * total_steps
    if step < warmup:
        return config.peak_lr * (step + 1) / (warmup + 1)
    return config.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


class MixUp:
    """Images mixed with their neighbours in the batch (Zhang et al. 2018): lambda x + (1 - lambda) x', the loss
    likewise; lambda is drawn from Beta(alpha, alpha) once a step, as a function of seed and step."""

    def __init__(self, alpha: float, seed: int):
        self.alpha, self.seed = alpha, seed

    def share(self, step: int) -> float:
        """lambda at this step, 1 where nothing is mixed."""
        if self.alpha == 0:
            return 1.0
        return float(np.random.default_rng([self.seed, step]).beta(self.alpha, self.alpha))

    @staticmethod
    def images(x: Tensor, share: float) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        return x if share == 1 else x.lerp(x.roll(1, 0), 1 - share)

    @staticmethod
    def loss(criterion: nn.Module, logits: Tensor, y: Tensor, share: float) -> Tensor:
        """The mean loss of logits [B, classes] for labels [B], 0-d."""
        loss: Tensor = criterion(logits, y)
        return loss if share == 1 else share * loss + (1 - share) * criterion(logits, y.roll(1, 0))


class Average:
    """The exponential moving average of a model's parameters and buffers (integers: the last). Weights that the masks
    exclude are zero in it, so that it is as sparse as the model."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = copy.deepcopy(model), decay
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        self._real = [pair for pair in pairs if pair[0].is_floating_point()]
        self._whole = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * model; to be called after each optimizer step."""
        mine, theirs = zip(*self._real, strict=True)
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        for whole, other in self._whole:
            whole.copy_(other)

    @torch.no_grad()
    def mask(self, masks: Mapping[str, Tensor]) -> None:
        """To be called when the masks have changed: {name: bool in the weight's shape}."""
        parameters = dict(self.model.named_parameters())
        for name, mask in masks.items():
            parameters[name].mul_(mask)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
