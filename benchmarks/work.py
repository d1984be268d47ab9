"""What the methods have to compute and move, from the shapes of the matrices.

m is the short side, n the long one. A symmetric product counts half: X X^T m^2 n, the square of a symmetric matrix m^3.
A product at fp32 grade on fp16 units is three products there. Bytes are those that any method has to move, each once a
pass: small matrices that stay in caches are not in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rates import Rates
from rpg_fast import filtered, grouping

Side = tuple[int, int]  # m, n
SPLIT = 3  # fp16 products that make one of fp32 grade
THIN = 4  # products of an m x m matrix with w columns: two of the range finder, two of the exact solution
# Golub and Van Loan, Matrix Computations, 8.3, 8.6: all eigenvectors of a symmetric matrix; both sides of a thin SVD.
EIGH = 9
SVD = (6, 20)  # 6 m^2 n + 20 m^3


@dataclass(frozen=True)
class Work:
    """FLOP by the arithmetic in which they are done, and bytes."""

    flops: Mapping[str, float]
    bytes: float

    def facts(self, seconds: float, rates: Rates) -> dict[str, float | str]:
        """Shares of the measured ceilings that `seconds` amount to, and the least time that they allow."""
        computing = sum(flops / rates.matrix[arithmetic] for arithmetic, flops in self.flops.items())
        moving = self.bytes / rates.copy
        total = sum(self.flops.values())
        return {
            "flops": total,
            "bytes": self.bytes,
            "flops_per_s": total / seconds,
            "bytes_per_s": self.bytes / seconds,
            "of_matrix_rate": computing / seconds,
            "of_copy_rate": moving / seconds,
            "bound_s": max(computing, moving),
            "bound_by": "matrix rate" if computing > moving else "copy bandwidth",
            "arithmetic": max(self.flops, key=lambda arithmetic: self.flops[arithmetic]),
        }


def sides(weights: Iterable[Tensor]) -> list[Side]:
    """(m, n) of each weight seen as a matrix [out, rest]."""
    return [(grouping.short_side(w), w.numel() // max(1, grouping.short_side(w))) for w in weights]


def filter_stages(weights: Sequence[Tensor], windows: Tensor) -> list[int]:
    """The quintics that the filter composes for each weight, from `RankState.windows` [B, 2 or more]."""
    grid, table = filtered.step_table(torch.device("cpu"))
    steps = (table[..., 1] != 0).sum(-1)  # [64]
    stages = []
    for w, (tau, half) in zip(weights, windows[:, :2].tolist(), strict=True):
        X = grouping.short_side_first(w.detach()).float()
        G = X @ X.mT
        A = G / G.trace() - tau * torch.eye(len(G), device=G.device)
        bound = 1.01 * math.sqrt(float((A @ A).norm())) or 1.0
        lower = min(max(half / bound, filtered.NARROWEST), filtered.WIDEST)
        stages.append(int(steps[int(torch.searchsorted(grid, lower, right=True)) - 1]))
    return stages


def _moved(shapes: Sequence[Side], itemsize: int) -> float:
    """The weights for the spectrum and again for the gradient, and `.grad` read and written."""
    return 4.0 * itemsize * sum(m * n for m, n in shapes)


def power(
    shapes: Sequence[Side],
    stages: Sequence[int],
    *,
    fast: bool = False,
    arithmetic: str = "fp16",
    split: int = SPLIT,
    itemsize: int = 4,
) -> Work:
    """A call of the filtered power iteration that one round resolves: Gram matrix and its square, three symmetric
    products a stage (but the first, whose square is known), the window's indicator and the last polish, the thin
    products, the gradient; `split` products in `arithmetic` for each, one for a `fast` gradient. Of a small matrix,
    Gram matrix and gradient."""
    products, gradient = 0.0, 0.0
    for (m, n), s in zip(shapes, stages, strict=True):
        products += m * m * n
        gradient += 2 * m * m * n
        if m > filtered.SMALL:
            products += (2 + 3 * s) * m**3 + THIN * 2 * m * m * filtered.WIDTH
    return Work({arithmetic: products * split + gradient * (1 if fast else split)}, _moved(shapes, itemsize))


def reused(shapes: Sequence[Side], *, arithmetic: str = "fp16", split: int = SPLIT, itemsize: int = 4) -> Work:
    """A call that applies projectors it has: one product; weights and projectors read, `.grad` read and written."""
    elements = sum(3 * m * n + m * m for m, n in shapes)
    return Work({arithmetic: split * sum(2.0 * m * m * n for m, n in shapes)}, itemsize * elements)


def mixture(parts: Sequence[tuple[float, Work]]) -> Work:
    """The sum of parts, given as (share, work)."""
    flops: dict[str, float] = {}
    for share, work in parts:
        for arithmetic, count in work.flops.items():
            flops[arithmetic] = flops.get(arithmetic, 0.0) + share * count
    return Work(flops, sum(share * work.bytes for share, work in parts))


def eigendecomposition(shapes: Sequence[Side], *, solver: str, products: str = "fp32", itemsize: int = 4) -> Work:
    """Gram matrix, eigendecomposition and projector in `solver`, the gradient in `products`."""
    spectral = sum(m * m * n + EIGH * m**3 + m**3 for m, n in shapes)
    gradient = sum(2.0 * m * m * n for m, n in shapes)
    return mixture([(1.0, Work({solver: spectral}, _moved(shapes, itemsize))), (1.0, Work({products: gradient}, 0.0))])


def published(shapes: Sequence[Side], *, itemsize: int = 4) -> Work:
    """A thin SVD of each matrix and the product of its leading triplets, of which half the directions are counted."""
    flops = sum(SVD[0] * m * m * n + SVD[1] * m**3 + m * m * n for m, n in shapes)
    return Work({"fp32": float(flops)}, _moved(shapes, itemsize))
