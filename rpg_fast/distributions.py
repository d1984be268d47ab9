"""How a sparsity is distributed over the weights, and the counts that a pruning plan keeps of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rpg_fast import grouping
from rpg_fast.masks import NamedWeights, PackedMasks, check_fraction, kept_count

DISTRIBUTIONS = ("global_magnitude", "erk", "uniform")


def uniform(weights: NamedWeights, sparsity: float) -> dict[str, float]:
    """The same sparsity for every weight: ``{name: sparsity}``. Raises ValueError for a sparsity outside [0, 1],
    TypeError if `weights` is no mapping from names to tensors."""
    check_fraction("sparsity", sparsity)
    return dict.fromkeys(grouping.named_weights(weights), float(sparsity))


def erk(weights: NamedWeights, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel (Mocanu et al. 2018, Evci et al. 2020): the density of a weight [out, in, ...] is
    proportional to (sum of its dimensions) / (product of its dimensions), at most 1.

    Returns:
        {name: fraction of zeros}, each a whole number of zeros over the weight's size, so that the zeros of all
        weights together are exactly floor(sparsity * n + 0.5).

    Raises:
        ValueError: sparsity outside [0, 1].
    """
    check_fraction("sparsity", sparsity)
    weights = grouping.named_weights(weights)
    numels = {name: w.numel() for name, w in weights.items()}
    budget = kept_count(sum(numels.values()), sparsity)
    raw = {name: sum(w.shape) / w.numel() if w.numel() else 0.0 for name, w in weights.items()}
    dense: set[str] = set()
    while True:
        open_ = [name for name in weights if name not in dense]
        room = budget - sum(numels[name] for name in dense)
        mass = sum(raw[name] * numels[name] for name in open_)
        factor = room / mass if mass else 0.0
        full = {name for name in open_ if factor * raw[name] > 1}
        if not full:
            break
        dense |= full
    wanted = {name: numels[name] if name in dense else factor * raw[name] * numels[name] for name in weights}
    kept = {name: math.floor(count) for name, count in wanted.items()}
    by_remainder = sorted(weights, key=lambda name: kept[name] - wanted[name])  # largest remainder first
    for name in by_remainder[: budget - sum(kept.values())]:
        kept[name] += 1
    return {name: 1 - kept[name] / numels[name] if numels[name] else 0.0 for name in weights}


def global_magnitude(weights: NamedWeights, sparsity: float) -> dict[str, Tensor]:
    """The sparsity that one magnitude threshold over all weights together gives each of them.

    Returns:
        {name: 0-d float64 tensor on the weights' device}; the zeros of all weights are exactly floor(sparsity * n +
        0.5), ties go to the earlier weight and the lower index in memory order.

    Raises:
        ValueError: no weights, several devices, sparsity outside [0, 1].
    """
    check_fraction("sparsity", sparsity)
    masks = PackedMasks(weights)
    layout = masks.layout
    counts = torch.full((1,), kept_count(sum(layout.numels), sparsity), device=masks.bits.device)
    bits = layout.select([w.detach() for w in weights.values()], counts, absolute=True, per_tensor=False)
    ones = layout.popcount(bits)
    return {name: 1 - ones[i].double() / max(1, layout.numels[i]) for i, name in enumerate(weights)}


def plan_counts(
    weights: NamedWeights, distribution: str | Mapping[str, float], sparsities: Sequence[float]
) -> list[list[int]]:
    """The ones of each weight after each pruning update, [updates + 1][B], or of all weights together, [updates +
    1][1], under one global threshold. No count ever rises.

    Args:
        distribution: one of `DISTRIBUTIONS`, or final sparsities ``{name: float}``.
        sparsities: of the whole, before and after each update.

    Raises:
        ValueError: an unknown distribution, or a mapping of other names, out of range, or that does not amount to the
            last sparsity.
    """
    numels = [w.numel() for w in weights.values()]
    if not isinstance(distribution, Mapping) and distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS} or a mapping, got {distribution!r}")
    if distribution == "global_magnitude":
        return [[kept_count(sum(numels), sparsity)] for sparsity in sparsities]
    if isinstance(distribution, Mapping):
        _check_mapping(weights, distribution, sparsities[-1])
    rows: list[list[int]] = []
    for sparsity in sparsities:
        if isinstance(distribution, Mapping):
            share = sparsity / sparsities[-1] if sparsities[-1] else 0.0
            shares = [share * distribution[name] for name in weights]
        else:
            shares = list((erk if distribution == "erk" else uniform)(weights, sparsity).values())
        rows.append([kept_count(n, s) for n, s in zip(numels, shares, strict=True)])
        if len(rows) > 1:
            _forbid_rises(rows[-2], rows[-1])
    return rows


def _check_mapping(weights: NamedWeights, distribution: Mapping[str, float], sparsity: float) -> None:
    unknown = sorted(distribution.keys() ^ weights.keys())
    if unknown:
        raise ValueError(f"distribution must name exactly the pruned weights, these differ: {unknown[:5]}")
    beyond = {name: share for name, share in distribution.items() if not 0 <= share <= 1}
    if beyond:
        raise ValueError(f"the sparsities of the distribution must lie in [0, 1], got {beyond}")
    total = sum(w.numel() for w in weights.values())
    zeros = sum(w.numel() * distribution[name] for name, w in weights.items())
    if abs(zeros - sparsity * total) > len(weights):
        raise ValueError(f"the distribution amounts to sparsity {zeros / total:.6f}, wanted {sparsity}")


def _forbid_rises(earlier: list[int], later: list[int]) -> None:
    """Changes the counts `later` so that none exceeds `earlier`'s, and their sum stays: rounding by largest remainders
    may give a weight of fewer ones a higher count, but an update cannot."""
    surplus = 0
    for i, limit in enumerate(earlier):
        surplus += max(0, later[i] - limit)
        later[i] = min(later[i], limit)
    for i, limit in enumerate(earlier):
        room = min(surplus, limit - later[i])
        later[i] += room
        surplus -= room
