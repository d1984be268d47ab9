"""The steps of the filtered power iteration on square matrices: a window's step function and what it leaves open.

One round, for every matrix b that takes part (``stages[b] > 0``; the programs of all others exit at once):

    shift     Y = (G - tau I) / u and A = Y^2 = (G2 - 2 tau G + tau^2 I) / u^2
    compose   up to S quintics  Y <- a Y + (b A + c A^2) Y,  A <- Y^2
    inside    C = (I - Y^2) / 4, zero but for the eigenvectors in the window, and its norm
    sharpen   Y+ = Y + 2 C Y, which squares the error outside the window, and its traces

G is the Gram matrix in a power-of-two scale, G2 = G^2; ``square_with_moments`` makes G2 once a call and, of the same
tiles, the traces of G^2, G^3 and G^4, which bound u for any tau.

All are fp16 pairs [2, numel] of a `TilePlan`. The ring, fp16 [3, 2, numel], holds Y and A in turns, and in its third
part what is multiplied next: b A + c A^2, then C. After its last stage Y lies in ``ring[stages[b] % 2]``, a parity that
only the device knows, and Y+ goes to ``ring[1 - stages[b] % 2]``. Sums leave a tile as they are, fp32 [T, 3] in the
order of ``plan.tiles``: whoever adds them up does so in a fixed order, by ``plan.tile_starts``, and gets the same bits
each time.

The steps of a round are made once, which checks their arguments, and run once a round.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast.kernels.grouped_product import _multiply, product_launcher, product_step
from rpg_fast.kernels.launches import Launcher, Step
from rpg_fast.kernels.tiles import (
    TilePlan,
    _load_tile,
    _load_value,
    _store_mirrored,
    _store_value,
    _symmetrized,
    check_storage,
    check_tensor,
)

BLOCK_K = 32  # depth of a loaded tile
SUMS = tl.constexpr(3)  # partial sums of a tile


def square_with_moments(G: Tensor, plan: TilePlan, *, out: Tensor, moments: Tensor) -> None:
    """G2 = G G of all matrices into ``out`` and, per tile, what it adds to <G, G>, <G, G2> and <G2, G2>.

    Args:
        G: fp16 pairs [2, numel], symmetric.
        out: as G; must share no memory with it. Every element is written, padding included.
        moments: float32 [T, 3]; a tile off the diagonal counts for its mirror image, too.
    """
    check_storage("G", G, plan, torch.float16)
    check_storage("out", out, plan, torch.float16)
    _check_sums("moments", moments, plan)
    if out.data_ptr() == G.data_ptr() and plan.numel:
        raise ValueError("out shares memory with G, which other tiles still read: give another buffer")
    if plan.numel:
        _square_kernel[(len(plan.tiles),)](
            G, out, moments, plan.tiles, plan.numel, BLOCK=plan.block, BLOCK_K=min(BLOCK_K, plan.block)
        )


def shift(G: Tensor, G2: Tensor, aims: Tensor, stages: Tensor, plan: TilePlan, *, ring: Tensor) -> Step:
    """ring[0] <- Y = (G - tau I) / u and ring[1] <- Y^2 = (G2 - 2 tau G + tau^2 I) / u^2 where ``stages > 0``.

    Args:
        G, G2: fp16 pairs [2, numel], symmetric, G2 = G G.
        aims: float32 [B, 2], tau and 1 / u of each matrix in the scale of G; u bounds ||G - tau I||_2.
        stages: int32 [B].
        ring: fp16 [3, 2, numel]; its last part is not touched. The padding of the others stays, or becomes, zero.
    """
    check_storage("G", G, plan, torch.float16)
    check_storage("G2", G2, plan, torch.float16)
    check_tensor("aims", aims, (len(plan.sizes), 2), torch.float32, plan.tiles.device)
    check_round(ring, stages, plan)
    launcher = Launcher(_shift_kernel, (len(plan.tiles), 2))
    return functools.partial(launcher, G, G2, aims, stages, plan.orders, plan.tiles, ring, plan.numel, plan.block)


def compose(coefficients: Tensor, stages: Tensor, plan: TilePlan, *, ring: Tensor) -> Step:
    """Composes the odd quintics of each matrix on Y in ring[0], A = Y^2 in ring[1]: 3 S - 1 launches.

    Stage s has Y in ``ring[s % 2]`` and A in ``ring[1 - s % 2]`` and makes ring[2] <- b A + c A A, then Y <- a Y +
    ring[2] Y where A was, then A <- Y Y for the next stage where Y was. Matrix b does its first ``stages[b]``.

    Args:
        coefficients: float32 [B, S, 3], (a, b, c) of each stage.
        stages: int32 [B], at most S.
        ring: fp16 [3, 2, numel].
    """
    S = coefficients.shape[-2] if coefficients.dim() > 1 else 0
    check_tensor("coefficients", coefficients, (len(plan.sizes), S, 3), torch.float32, plan.tiles.device)
    check_round(ring, stages, plan)
    Y, A, B = ring.unbind()  # [2, numel] each
    factors = coefficients.flatten(1).unbind(1)  # 3 S views [B]
    block_k = min(BLOCK_K, plan.block)
    inner, odd, square = (product_launcher(plan) for _ in range(3))
    products: list[Step] = []
    for s in range(S):
        a, b, c = factors[3 * s : 3 * s + 3]
        products += (
            product_step(inner, A, A, plan, B, alpha=c, addend=A, beta=b, stages=stages, stage=s, block_k=block_k),
            product_step(odd, B, Y, plan, A, addend=Y, beta=a, stages=stages, stage=s, block_k=block_k),
        )
        Y, A = A, Y
        if s + 1 < S:
            products.append(product_step(square, Y, Y, plan, A, stages=stages, stage=s + 1, block_k=block_k))

    def run() -> None:
        for product in products:
            product()

    return run


def inside(stages: Tensor, plan: TilePlan, *, ring: Tensor, traces: Tensor) -> Step:
    """ring[2] <- C = (I - Y^2) / 4 with Y in ``ring[stages % 2]`` and, per tile, what it adds to ||C||_F^2, where
    ``stages > 0``.

    Args:
        stages: int32 [B].
        ring: fp16 [3, 2, numel].
        traces: float32 [T, 3]; the sums go to its last column, rows of matrices that take no part are not touched.
    """
    check_round(ring, stages, plan)
    _check_sums("traces", traces, plan)
    launcher = Launcher(_inside_kernel, (len(plan.tiles),))
    return functools.partial(
        launcher, stages, plan.orders, plan.tiles, ring, traces, plan.numel, plan.block, min(BLOCK_K, plan.block)
    )


def sharpen(G: Tensor, stages: Tensor, plan: TilePlan, *, ring: Tensor, traces: Tensor) -> Step:
    """``ring[1 - stages % 2]`` <- Y+ = Y + 2 C Y with Y in ``ring[stages % 2]`` and C = (I - Y^2) / 4 in ring[2] and,
    per tile, what it adds to tr Y+ and <Y+, G>, where ``stages > 0``.

    In terms of P = (I + Y) / 2 this is 3 P^2 - 2 P^3, which squares the distance of an eigenvalue from 0 or 1.

    Args:
        G: fp16 pairs [2, numel], symmetric.
        stages: int32 [B].
        ring: fp16 [3, 2, numel].
        traces: float32 [T, 3]; the sums go to its first two columns, rows of matrices that take no part are not
            touched.

    Source: McWeeny, "Some Recent Advances in Density Matrix Theory", Rev. Mod. Phys. 32, 335 (1960).
    """
    check_storage("G", G, plan, torch.float16)
    check_round(ring, stages, plan)
    _check_sums("traces", traces, plan)
    launcher = Launcher(_sharpen_kernel, (len(plan.tiles),))
    return functools.partial(
        launcher, G, stages, plan.tiles, ring, traces, plan.numel, plan.block, min(BLOCK_K, plan.block)
    )


def check_round(ring: Tensor, stages: Tensor, plan: TilePlan) -> None:
    """Raises ValueError unless ``ring`` is fp16 [3, 2, numel] and ``stages`` int32 [B], both contiguous."""
    check_tensor("ring", ring, (3, 2, plan.numel), torch.float16, plan.tiles.device)
    check_tensor("stages", stages, (len(plan.sizes),), torch.int32, plan.tiles.device)


def _check_sums(name: str, sums: Tensor, plan: TilePlan) -> None:
    check_tensor(name, sums, (len(plan.tiles), SUMS.value), torch.float32, plan.tiles.device)


@triton.jit
def _identity(rows, cols, m):
    """The tile of I, of order m, as fp32."""
    return ((rows[:, None] == cols[None, :]) & (rows < m)[:, None]).to(tl.float32)


@triton.jit
def _part(ring_ptr, index, numel):
    """A part of the ring; Y lies in that of index ``stages % 2``, Y+ in the one of ``1 - stages % 2``."""
    return ring_ptr + numel.to(tl.int64) * (2 * index)


@triton.jit
def _store_sum(sums_ptr, column, value):
    tl.store(sums_ptr + SUMS * tl.program_id(0) + column, value)


@triton.jit
def _square_kernel(
    G_ptr,  # fp16 [2, numel], as out
    out_ptr,
    moments_ptr,  # fp32 [T, 3]
    tiles_ptr,  # int32 [T, 5]
    numel,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start, pitch, i, j, _b = _load_tile(tiles_ptr, BLOCK)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    G_ptr += start
    square = _multiply(G_ptr, G_ptr, rows, cols, pitch, 1.0, 1.0, numel, True, BLOCK, BLOCK_K)
    square = _symmetrized(square, rows, cols)
    _store_mirrored(out_ptr + start, square, rows, cols, pitch, numel, i, j, True)
    G = _load_value(G_ptr, rows[:, None] * pitch + cols[None, :], numel, True)  # [BLOCK, BLOCK]
    times = tl.where(i == j, 1.0, 2.0)
    _store_sum(moments_ptr, 0, times * tl.sum(G * G))
    _store_sum(moments_ptr, 1, times * tl.sum(G * square))
    _store_sum(moments_ptr, 2, times * tl.sum(square * square))


@triton.jit
def _shift_kernel(
    G_ptr,  # fp16 [2, numel], as G2
    G2_ptr,
    aims_ptr,  # fp32 [B, 2]
    stages_ptr,  # int32 [B], as orders
    orders_ptr,
    tiles_ptr,  # int32 [T, 5]
    ring_ptr,  # fp16 [3, 2, numel]
    numel,
    BLOCK: tl.constexpr,
):
    """Programs (t, 0) do the lower tiles, (t, 1) their mirror images."""
    start, pitch, i, j, b = _load_tile(tiles_ptr, BLOCK)
    upper = tl.program_id(1)
    if (tl.load(stages_ptr + b) == 0) | ((upper == 1) & (i == j)):
        return
    tau, inverse = tl.load(aims_ptr + 2 * b), tl.load(aims_ptr + 2 * b + 1)
    rows = tl.where(upper == 1, j, i) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.where(upper == 1, i, j) * BLOCK + tl.arange(0, BLOCK)
    at = rows[:, None] * pitch + cols[None, :]
    eye = _identity(rows, cols, tl.load(orders_ptr + b))
    G = _load_value(G_ptr + start, at, numel, True)  # [BLOCK, BLOCK]
    G2 = _load_value(G2_ptr + start, at, numel, True)
    A = ((G2 - 2 * tau * G + tau * tau * eye) * inverse) * inverse
    _store_value(ring_ptr + start, at, (G - tau * eye) * inverse, numel, True)
    _store_value(_part(ring_ptr, 1, numel) + start, at, A, numel, True)


@triton.jit
def _inside_kernel(
    stages_ptr,  # int32 [B], as orders
    orders_ptr,
    tiles_ptr,  # int32 [T, 5]
    ring_ptr,  # fp16 [3, 2, numel]
    traces_ptr,  # fp32 [T, 3]
    numel,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start, pitch, i, j, b = _load_tile(tiles_ptr, BLOCK)
    stages = tl.load(stages_ptr + b)
    if stages == 0:
        return
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    Y_ptr = _part(ring_ptr, stages % 2, numel) + start
    square = _multiply(Y_ptr, Y_ptr, rows, cols, pitch, 1.0, 1.0, numel, True, BLOCK, BLOCK_K)
    eye = _identity(rows, cols, tl.load(orders_ptr + b))
    C = _symmetrized(eye - square, rows, cols) * 0.25
    _store_mirrored(_part(ring_ptr, 2, numel) + start, C, rows, cols, pitch, numel, i, j, True)
    times = tl.where(i == j, 1.0, 2.0)
    _store_sum(traces_ptr, 2, times * tl.sum(C * C))


@triton.jit
def _sharpen_kernel(
    G_ptr,  # fp16 [2, numel]
    stages_ptr,  # int32 [B]
    tiles_ptr,  # int32 [T, 5]
    ring_ptr,  # fp16 [3, 2, numel]
    traces_ptr,  # fp32 [T, 3]
    numel,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start, pitch, i, j, b = _load_tile(tiles_ptr, BLOCK)
    stages = tl.load(stages_ptr + b)
    if stages == 0:
        return
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    Y_ptr = _part(ring_ptr, stages % 2, numel) + start
    C_ptr = _part(ring_ptr, 2, numel) + start
    product = _multiply(C_ptr, Y_ptr, rows, cols, pitch, 1.0, 1.0, numel, True, BLOCK, BLOCK_K)
    at = rows[:, None] * pitch + cols[None, :]
    sharp = _symmetrized(_load_value(Y_ptr, at, numel, True) + 2 * product, rows, cols)
    _store_sum(traces_ptr, 0, tl.sum(tl.where(rows[:, None] == cols[None, :], sharp, 0.0)))
    _store_mirrored(_part(ring_ptr, 1 - stages % 2, numel) + start, sharp, rows, cols, pitch, numel, i, j, True)
    G = _load_value(G_ptr + start, at, numel, True)  # [BLOCK, BLOCK]
    times = tl.where(i == j, 1.0, 2.0)
    _store_sum(traces_ptr, 1, times * tl.sum(sharp * G))
