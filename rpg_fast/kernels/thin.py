"""Products of the filter's square matrices with thin ones, and the projector that is made of both.

    sketch    Z = C Omega, Omega Gaussian and made in the kernel, with C = (I - Y^2) / 4 of `filter.inside`
    image     Z = C Q
    images    G Q and Y+ Q in one launch, Y+ the sharpened step of `filter.sharpen`
    finish    N = 2 P - 2 (1 - e) I with P = (I + Y+) / 2 - Z Q^T - Q Z^T, into the flat projector

Square matrices as in `filter`. Thin ones [m, w] are fp32 [rows, w] of a `TilePlan`; what their padding rows hold is
never read. The products are of fp32 grade: the thin factor is split into fp16 pairs when it is loaded.

The products are made once, which checks their arguments, and run once a round.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast.kernels.filter import _identity, _part, check_round
from rpg_fast.kernels.launches import Launcher, Step
from rpg_fast.kernels.tiles import (
    LO_UNIT,
    TilePlan,
    _load_tile,
    _load_value,
    _split,
    _symmetrized,
    check_storage,
    check_tensor,
)

LANES = tl.constexpr(4)  # Gaussian numbers of one call of Philox
DRAWS_PER_SEED = 128


def sketch(seed: Tensor, stages: Tensor, plan: TilePlan, *, ring: Tensor, out: Tensor) -> Callable[[int], None]:
    """``out`` <- C Omega with C in ring[2], where ``stages > 0``, as a function of the draw, 0..127: which Omega of
    this seed.

    An element of Omega is standard normal and depends on the seed, the draw and its matrix, row and column alone.

    Args:
        seed: int64 0-d on the device.
        stages: int32 [B].
        ring: fp16 [3, 2, numel].
        out: float32 [rows, w], w a power of two of at least 16; padding rows become zero.
    """
    check_tensor("seed", seed, (), torch.int64, plan.tiles.device)
    check_round(ring, stages, plan)
    _check_thin("out", out, plan, out.shape[-1])
    run = _thin_product(ring[2], None, None, out, seed, stages, plan)

    def sketched(draw: int) -> None:
        if not 0 <= draw < DRAWS_PER_SEED:
            raise ValueError(f"draw must be in 0..{DRAWS_PER_SEED - 1}, got {draw}")
        run(draw)

    return sketched


def image(Q: Tensor, stages: Tensor, plan: TilePlan, *, ring: Tensor, out: Tensor) -> Step:
    """``out`` <- C Q with C in ring[2], where ``stages > 0``.

    Args:
        Q: float32 [rows, w], w a power of two of at least 16, its elements in fp16's range.
        stages: int32 [B].
        ring: fp16 [3, 2, numel].
        out: as Q; must share no memory with it. Padding rows become zero.
    """
    check_round(ring, stages, plan)
    _check_thin("Q", Q, plan, Q.shape[-1])
    _check_thin("out", out, plan, Q.shape[-1])
    return functools.partial(_thin_product(ring[2], None, Q, out, None, stages, plan), 0)


def images(G: Tensor, Q: Tensor, stages: Tensor, plan: TilePlan, *, ring: Tensor, out: Tensor) -> Step:
    """out[0] <- G Q and out[1] <- Y+ Q with Y+, the sharpened step, in ``ring[1 - stages % 2]``, where
    ``stages > 0``.

    Args:
        G: fp16 pairs [2, numel].
        Q: float32 [rows, w], w a power of two of at least 16, its elements in fp16's range.
        stages: int32 [B].
        ring: fp16 [3, 2, numel].
        out: float32 [2, rows, w]; must share no memory with Q. Padding rows become zero.
    """
    check_storage("G", G, plan, torch.float16)
    check_round(ring, stages, plan)
    _check_thin("Q", Q, plan, Q.shape[-1])
    check_tensor("out", out, (2, plan.rows, Q.shape[-1]), torch.float32, plan.tiles.device)
    return functools.partial(_thin_product(G, ring, Q, out, None, stages, plan), 0)


def finish(
    Z: Tensor, Q: Tensor, ends: Tensor, stages: Tensor, offsets: Tensor, plan: TilePlan, *, ring: Tensor, out: Tensor
) -> None:
    """N = 2 P - 2 (1 - e) I, P = (I + Y+) / 2 - Z Q^T - Q Z^T of every matrix into ``out``, without padding.

    Args:
        Z, Q: float32 [rows, w], w a power of two of at least 16, their elements in fp16's range.
        ends: float32 [B, 2], 1 - e and what becomes of N: 0 as above, 1 zeros, 2 NaN, 3 left as it is.
        stages: int32 [B], those of the last round in which a matrix took part: its sharpened step Y+ lies in
            ``ring[1 - stages % 2]``.
        offsets: int64 [B], where N starts in ``out``, in elements.
        ring: fp16 [3, 2, numel].
        out: float32, N [m, m] row-major from each offset on; what lies between them is not touched.
    """
    check_round(ring, stages, plan)
    _check_thin("Z", Z, plan, Q.shape[-1])
    _check_thin("Q", Q, plan, Q.shape[-1])
    device, batch = plan.tiles.device, len(plan.sizes)
    check_tensor("ends", ends, (batch, 2), torch.float32, device)
    check_tensor("offsets", offsets, (batch,), torch.int64, device)
    check_tensor("out", out, (out.numel(),), torch.float32, device)
    if plan.numel:
        _finish_kernel[(len(plan.tiles),)](
            Z, Q, ends, stages, offsets, plan.orders, plan.tiles, plan.row_starts, ring, out, plan.numel,
            BLOCK=plan.block, W=Q.shape[-1],
        )  # fmt: skip


def _check_thin(name: str, tensor: Tensor, plan: TilePlan, width: int) -> None:
    if width < 16 or width & (width - 1):
        raise ValueError(f"{name} must have a power of two of at least 16 columns, got {width}")
    check_tensor(name, tensor, (plan.rows, width), torch.float32, plan.tiles.device)


def _thin_product(
    matrices: Tensor,
    ring: Tensor | None,
    Q: Tensor | None,
    out: Tensor,
    seed: Tensor | None,
    stages: Tensor,
    plan: TilePlan,
) -> Callable[[int], None]:
    """A function of the draw."""
    launcher = Launcher(_thin_kernel, (len(plan.row_blocks), 1 if ring is None else 2))
    return lambda draw: launcher(
        matrices, ring, Q, out, seed, draw, stages, plan.orders, plan.row_blocks, plan.numel, plan.rows,
        plan.block, out.shape[-1],
    )  # fmt: skip


@triton.jit
def _gaussians(seed, draw, b, rows, W: tl.constexpr):
    """Standard normal numbers [rows, W], functions of (seed, draw, b, row, column)."""
    columns = tl.arange(0, W // LANES)
    counter = ((draw * (1 << 24) + b).to(tl.int64) << 32) + rows[:, None] * (W // LANES) + columns[None, :]
    x, y, z, t = tl.randn4x(seed, counter)  # [rows, W / 4] each
    return tl.reshape(tl.join(tl.join(x, y), tl.join(z, t)), [rows.shape[0], W])


@triton.jit(do_not_specialize=["draw"])
def _thin_kernel(
    matrices_ptr,  # fp16 [2, numel]
    ring_ptr,  # fp16 [3, 2, numel] for a second product, or None
    Q_ptr,  # fp32 [rows, W], or None for Gaussian numbers
    out_ptr,  # fp32 [rows, W] or [2, rows, W]
    seed_ptr,  # int64 0-d, or None with Q
    draw,
    stages_ptr,  # int32 [B], as orders
    orders_ptr,
    row_blocks_ptr,  # int32 [rows / BLOCK, 5]
    numel,
    rows_total,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
):
    """Programs (i, 0) multiply a block of rows of the first matrices, (i, 1) one of Y+ in the ring."""
    start, pitch, i, first, b = _load_tile(row_blocks_ptr, BLOCK)
    stages = tl.load(stages_ptr + b)
    if stages == 0:
        return
    m = tl.load(orders_ptr + b)
    span = tl.arange(0, BLOCK)
    columns = tl.arange(0, W)
    thin = first.to(tl.int64) * (BLOCK * W)  # the first element of the matrix in a thin buffer
    matrix_ptr = matrices_ptr + start
    if ring_ptr is not None:  # noqa: SIM102 (the compiler would evaluate both sides of an `and`)
        if tl.program_id(1) == 1:
            matrix_ptr = _part(ring_ptr, 1 - stages % 2, numel) + start
            out_ptr += rows_total.to(tl.int64) * W

    left = matrix_ptr + (i * BLOCK + span)[:, None] * pitch + span[None, :]  # [BLOCK, BLOCK]
    main = tl.zeros([BLOCK, W], tl.float32)
    cross = tl.zeros([BLOCK, W], tl.float32)
    for k in range(0, pitch, BLOCK):
        rows = k + span
        if Q_ptr is None:
            right = _gaussians(tl.load(seed_ptr), draw, b, rows, W)  # [BLOCK, W]
        else:
            right = tl.load(Q_ptr + thin + rows[:, None] * W + columns[None, :], mask=(rows < m)[:, None], other=0.0)
        right_hi, right_lo = _split(right)
        left_hi = tl.load(left + k)
        left_lo = tl.load(left + numel + k)
        cross = tl.dot(left_hi, right_lo, cross)
        cross = tl.dot(left_lo, right_hi, cross)
        main = tl.dot(left_hi, right_hi, main)
    out_rows = (i * BLOCK + span)[:, None] * W + columns[None, :]
    tl.store(out_ptr + thin + out_rows, main + cross * LO_UNIT)


@triton.jit
def _load_thin(ptr, rows, m, W: tl.constexpr):
    at = rows[:, None] * W + tl.arange(0, W)[None, :]
    return tl.load(ptr + at, mask=(rows < m)[:, None], other=0.0)  # [BLOCK, W]


@triton.jit
def _thin_dot(left, right):
    """left right^T at fp32 grade."""
    left_hi, left_lo = _split(left)
    right_hi, right_lo = _split(right)
    cross = tl.dot(left_hi, right_lo.T)
    cross = tl.dot(left_lo, right_hi.T, cross)
    return tl.dot(left_hi, right_hi.T) + cross * LO_UNIT


@triton.jit
def _finish_kernel(
    Z_ptr,  # fp32 [rows, W], as Q
    Q_ptr,
    ends_ptr,  # fp32 [B, 2]
    stages_ptr,  # int32 [B]
    offsets_ptr,  # int64 [B]
    orders_ptr,  # int32 [B], as row_starts
    tiles_ptr,  # int32 [T, 5]
    row_starts_ptr,
    ring_ptr,  # fp16 [3, 2, numel]
    out_ptr,  # fp32
    numel,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
):
    start, pitch, i, j, b = _load_tile(tiles_ptr, BLOCK)
    fill = tl.load(ends_ptr + 2 * b + 1)
    if fill == 3:
        return
    m = tl.load(orders_ptr + b)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    N = tl.zeros([BLOCK, BLOCK], tl.float32)
    if fill == 0:
        Y_ptr = _part(ring_ptr, 1 - tl.load(stages_ptr + b) % 2, numel) + start
        Y = _load_value(Y_ptr, rows[:, None] * pitch + cols[None, :], numel, True)  # [BLOCK, BLOCK]
        thin = tl.load(row_starts_ptr + b).to(tl.int64) * W  # the first element of the matrix in a thin buffer
        update = _thin_dot(_load_thin(Z_ptr + thin, rows, m, W), _load_thin(Q_ptr + thin, cols, m, W))
        update += _thin_dot(_load_thin(Q_ptr + thin, rows, m, W), _load_thin(Z_ptr + thin, cols, m, W))
        N = Y - 2 * update + _identity(rows, cols, m) * (1 - 2 * tl.load(ends_ptr + 2 * b))
        N = _symmetrized(N, rows, cols)
    elif fill == 2:
        N += float("nan")
    N_ptr = out_ptr + tl.load(offsets_ptr + b)
    there = (rows < m)[:, None] & (cols < m)[None, :]
    tl.store(N_ptr + rows[:, None] * m + cols[None, :], N, mask=there)
    if i != j:
        tl.store(N_ptr + cols[:, None] * m + rows[None, :], N.T, mask=there.T)
