"""What the weights of a network look like, layer by layer: sparsity, spectrum, rank, dead filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rpg_fast
from rpg_fast.grouping import groups_of_equal_m, short_side, short_side_first


@dataclass(frozen=True)
class LayerStatistics:
    """One prunable weight [out, ...], seen as the matrix [out, rest]; m is its short side.

    `rank` is the paper's k: how many singular values hold all but the tail energy. `effective_rank` is the exponential
    of the entropy of the singular values divided by their sum (Roy and Vetterli 2007), between 1 and m, and 0 for a
    zero matrix. A dead filter is an output row of zeros. `spectrum` holds the m singular values, largest first.
    Weights that are not finite give NaN for rank, effective rank and spectrum.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    rank: float
    effective_rank: float
    dead_filters: int
    spectrum: tuple[float, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size

    @property
    def m(self) -> int:
        return len(self.spectrum)

    @property
    def is_convolution(self) -> bool:
        return len(self.shape) > 2


@dataclass(frozen=True)
class NetworkStatistics:
    """Sums over all prunable weights, and means over the convolutions, which are what the rank loss acts on."""

    layers: tuple[LayerStatistics, ...]

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size

    @property
    def convolutions(self) -> tuple[LayerStatistics, ...]:
        return tuple(layer for layer in self.layers if layer.is_convolution)

    @property
    def mean_rank_ratio(self) -> float:
        return _mean([layer.rank / layer.m for layer in self.convolutions])

    @property
    def effective_rank(self) -> float:
        return _mean([layer.effective_rank for layer in self.convolutions])

    @property
    def largest_effective_rank(self) -> float:
        return _mean([layer.m for layer in self.convolutions])

    @property
    def dead_filters(self) -> int:
        return sum(layer.dead_filters for layer in self.convolutions)

    @property
    def filters(self) -> int:
        return sum(layer.shape[0] for layer in self.convolutions)


def network_statistics(model: nn.Module, tail_energy: float) -> NetworkStatistics:
    """Looks at every prunable weight of `model`: computed on its device in float64, read back in one transfer."""
    named = rpg_fast.prunable_weights(model)
    weights = [weight.detach() for weight in named.values()]
    spectra = singular_values(weights)
    columns = []
    for weight, spectrum in zip(weights, spectra, strict=True):
        rows = weight.flatten(1)
        share = spectrum / spectrum.sum()
        entropy = -torch.special.xlogy(share, share).sum()
        # 0 for a zero matrix, NaN for one that is not finite
        effective_rank = torch.where(spectrum.sum() == 0, 0.0, entropy.exp())
        rank = rpg_fast.tail_energy_rank(spectrum, tail_energy).double()
        rank = torch.where(rank < 0, math.nan, rank)
        zeros, dead = (rows == 0).sum().double(), (rows == 0).all(1).sum().double()
        columns.append(torch.cat([torch.stack([zeros, dead, rank, effective_rank]), spectrum]))
    flat = torch.cat(columns).tolist()  # the only transfer

    layers, start = [], 0
    for name, weight in zip(named, weights, strict=True):
        zeros_, dead_, rank_, effective_ = flat[start : start + 4]
        end = start + 4 + short_side(weight)
        spectrum_ = tuple(flat[start + 4 : end])
        layers.append(LayerStatistics(name, tuple(weight.shape), int(zeros_), rank_, effective_, int(dead_), spectrum_))
        start = end
    return NetworkStatistics(tuple(layers))


def singular_values(weights: Sequence[Tensor]) -> list[Tensor]:
    """The singular values [m] of each weight [out, ...] as a matrix, float64, largest first.

    From the eigenvalues of X X^T in float64, one batch for each m: several times faster than an SVD, and exact to
    1e-8 of the largest value. Values below that come out as 0. NaN throughout where a weight is not finite.
    """
    found: dict[int, Tensor] = {}
    for m, members in groups_of_equal_m(weights).items():
        gram = weights[members[0]].new_empty(len(members), m, m, dtype=torch.float64)  # [B, m, m]
        for slot, index in enumerate(members):
            x = short_side_first(weights[index]).double()  # [m, n]
            torch.mm(x, x.mT, out=gram[slot])
        finite = gram.isfinite().all(-1).all(-1)  # [B]
        gram = torch.where(finite[:, None, None], gram, 0.0)
        energies = torch.linalg.eigvalsh(gram).flip(-1)  # [B, m]
        noise = energies[:, :1] * m * torch.finfo(torch.float64).eps
        values = torch.where(energies > noise, energies, 0.0).sqrt()
        values = torch.where(finite[:, None], values, math.nan)
        found.update(zip(members, values, strict=True))
    return [found[index] for index in range(len(weights))]


def layer_table(statistics: NetworkStatistics) -> str:
    """One line for each prunable weight, and one for the whole network."""
    width = max(len(layer.name) for layer in statistics.layers)
    lines = [
        f"{'weight':<{width}}  {'shape':>16}  {'sparsity':>9}  {'k':>5} {'m':>5} {'k/m':>6}  "
        f"{'effective rank':>14}  {'dead filters':>12}"
    ]
    for layer in statistics.layers:
        shape = " x ".join(str(side) for side in layer.shape)
        dead = f"{layer.dead_filters}/{layer.shape[0]}"
        lines.append(
            f"{layer.name:<{width}}  {shape:>16}  {layer.sparsity:>8.2%}  {layer.rank:>5.0f} {layer.m:>5} "
            f"{layer.rank / layer.m:>6.3f}  {layer.effective_rank:>14.1f}  {dead:>12}"
        )
    dead = f"{statistics.dead_filters}/{statistics.filters}"
    lines.append(
        f"{'all (ranks: mean over convolutions)':<{width + 18}}  {statistics.sparsity:>8.2%}  {'':>5} {'':>5} "
        f"{statistics.mean_rank_ratio:>6.3f}  {statistics.effective_rank:>14.1f}  {dead:>12}"
    )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
