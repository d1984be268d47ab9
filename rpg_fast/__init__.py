"""Fast kernels for rank-aware pruning in PyTorch: the rank loss of RPG, batched truncated SVD, packed masks, masked
optimizers."""

from rpg_fast import mask_formats
from rpg_fast.distributions import erk, global_magnitude, uniform
from rpg_fast.grouping import prunable_weights
from rpg_fast.masks import PackedMasks, mask_gradients_, prune_and_grow, topk_mask
from rpg_fast.optim import MaskedAdamW, MaskedSGD
from rpg_fast.pruner import RankPruner
from rpg_fast.rank_loss import RankState, add_rank_grad_, rank_loss
from rpg_fast.schedules import ConstantSparsity, CosineDrop, ExponentialSparsity, PolynomialSparsity
from rpg_fast.spectrum import svd_lowrank, tail_energy_rank
from rpg_fast.stats import PruneStats

__version__ = "0.1.0"

__all__ = [
    "ConstantSparsity",
    "CosineDrop",
    "ExponentialSparsity",
    "MaskedAdamW",
    "MaskedSGD",
    "PackedMasks",
    "PolynomialSparsity",
    "PruneStats",
    "RankPruner",
    "RankState",
    "add_rank_grad_",
    "erk",
    "global_magnitude",
    "mask_formats",
    "mask_gradients_",
    "prunable_weights",
    "prune_and_grow",
    "rank_loss",
    "svd_lowrank",
    "tail_energy_rank",
    "topk_mask",
    "uniform",
]
