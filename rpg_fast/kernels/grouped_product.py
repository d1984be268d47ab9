"""Products of symmetric matrices of many sizes in one launch, at fp32 grade on fp16 tensor cores.

An fp32 number x is split as x = hi + lo / 2048 with fp16 hi and lo, so that a product of two matrices becomes three
fp16 products with fp32 accumulation, hi hi + (hi lo + lo hi) / 2048; the missing lo lo term is below 2^-22 (Ootomo and
Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", 2022).

The matrices commute and are symmetric (every factor is a polynomial of the same matrix), so the product is symmetric
too: only the lower tiles are computed, and each is stored twice. One kernel forms ``out = alpha L R + beta D``, which
covers the steps of a composed polynomial filter, A = X X, B = b A + c A A and X = a X + B X.

The matrices lie in the layout of a `tiles.TilePlan`, as fp32 [numel], split whenever a tile is loaded, or as fp16 pairs
[2, numel], split once when stored.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast.kernels.launches import Launcher, Step
from rpg_fast.kernels.tiles import (
    LO_UNIT,
    TilePlan,
    _load_tile,
    _load_value,
    _split,
    _store_mirrored,
    _symmetrized,
    check_per_matrix,
    check_storage,
)


def matrix_scales(values: Tensor, plan: TilePlan) -> Tensor:
    """Powers of two, fp32 [B], that bring the largest magnitude of each matrix in ``values`` [numel] into [1, 2).

    A zero matrix gets the largest scale, a matrix that holds a NaN or an infinity gets NaN: its whole product is NaN.
    """
    check_storage("values", values, plan, torch.float32)
    bits = torch.zeros(len(plan.sizes), dtype=torch.int32, device=values.device)
    if len(plan.tiles):
        _absmax_kernel[(len(plan.tiles),)](values, plan.tiles, bits, BLOCK=plan.block)
    exponent = bits >> 23
    scales = ((254 - exponent.clamp(1, 253)) << 23).view(torch.float32)  # the reciprocal, too, is a normal number
    return scales.masked_fill(exponent == 255, torch.nan)


def grouped_product(
    left: Tensor,
    right: Tensor,
    plan: TilePlan,
    *,
    alpha: Tensor | None = None,
    addend: Tensor | None = None,
    beta: Tensor | None = None,
    left_scale: Tensor | None = None,
    right_scale: Tensor | None = None,
    stages: Tensor | None = None,
    stage: int = 0,
    out: Tensor | None = None,
    block_k: int = 32,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Tensor:
    """``alpha_b L_b R_b + beta_b D_b`` for all matrices b of the plan, in one launch.

    Args:
        left, right: L and R, symmetric and commuting, both fp32 [numel] or both fp16 pairs [2, numel]. Pairs are
            multiplied as they are stored: their scales are the caller's, to be folded into alpha and beta.
        alpha, beta: fp32 [B] on the device, of one stride; None means 1.
        addend: D, symmetric, stored like L; may be the same tensor as ``out``.
        left_scale, right_scale: for fp32 storage, powers of two [B] that bring L and R into fp16's range before the
            split; None computes them (``matrix_scales``, one more pass over L or R).
        stages: int32 [B] on the device: only matrices with ``stage < stages[b]`` take part, the others' part of
            ``out`` is not touched; None means all.
        out: stored like L; must share no memory with L or R. Every element is written, padding included.
        block_k, num_warps, num_stages: the depth of a loaded tile, warps per tile and depth of the software pipeline.

    Returns:
        ``out``. A NaN or an infinity in one matrix leaves all others as they are.

    Equivalent to: ``alpha[b] * L[b] @ R[b] + beta[b] * D[b]`` for every b.
    """
    pairs = left.dtype == torch.float16
    storage = torch.float16 if pairs else torch.float32
    out = torch.empty_like(left) if out is None else out
    for name, tensor in (("left", left), ("right", right), ("addend", addend), ("out", out)):
        if tensor is not None:
            check_storage(name, tensor, plan, storage)
    if out.data_ptr() in (left.data_ptr(), right.data_ptr()) and plan.numel:
        raise ValueError("out shares memory with left or right, which other tiles still read: give another buffer")
    if pairs and (left_scale is not None or right_scale is not None):
        raise ValueError("left_scale and right_scale are for fp32 storage; pairs are multiplied as they are stored")
    if beta is not None and addend is None:
        raise ValueError("beta is given without an addend")
    if plan.block % block_k:
        raise ValueError(f"block_k must divide the plan's block {plan.block}, got {block_k}")
    if not pairs:
        left_scale = matrix_scales(left, plan) if left_scale is None else left_scale
        if right_scale is None:
            right_scale = left_scale if right is left else matrix_scales(right, plan)
    for name, tensor in (("alpha", alpha), ("beta", beta), ("left_scale", left_scale), ("right_scale", right_scale)):
        check_per_matrix(name, tensor, plan, torch.float32)
    check_per_matrix("stages", stages, plan, torch.int32)
    if alpha is not None and beta is not None and alpha.stride() != beta.stride():
        raise ValueError(f"alpha and beta must have one stride, got {alpha.stride()} and {beta.stride()}")
    launcher = product_launcher(plan, num_warps=num_warps, num_stages=num_stages)
    product_step(
        launcher, left, right, plan, out, alpha=alpha, addend=addend, beta=beta, scales=(left_scale, right_scale),
        stages=stages, stage=stage, block_k=block_k,
    )()  # fmt: skip
    return out


def product_launcher(plan: TilePlan, *, num_warps: int = 4, num_stages: int = 3) -> Launcher:
    """For the products of one plan that leave out the same arguments."""
    return Launcher(_grouped_product_kernel, (len(plan.tiles),), num_warps=num_warps, num_stages=num_stages)


def product_step(
    launcher: Launcher,
    left: Tensor,
    right: Tensor,
    plan: TilePlan,
    out: Tensor,
    *,
    alpha: Tensor | None = None,
    addend: Tensor | None = None,
    beta: Tensor | None = None,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    stages: Tensor | None = None,
    stage: int = 0,
    block_k: int = 32,
) -> Step:
    """`grouped_product` without its checks, to be run as often as wanted."""
    factor = beta if alpha is None else alpha
    return functools.partial(
        launcher, left, right, addend, out, *scales, alpha, beta, 1 if factor is None else factor.stride(0), stages,
        stage, plan.tiles, plan.numel, left.dtype == torch.float16, plan.block, block_k,
    )  # fmt: skip


@triton.jit
def _load_pair(ptr, at, scale, numel, PAIRS: tl.constexpr):
    if PAIRS:
        hi = tl.load(ptr + at)
        lo = tl.load(ptr + numel + at)
    else:
        hi, lo = _split(tl.load(ptr + at) * scale)
    return hi, lo


@triton.jit
def _multiply(
    left_ptr, right_ptr, rows, cols, pitch, left_scale, right_scale, numel,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK, BLOCK] of L R for symmetric R, from pointers to the first elements of L and R."""
    inner = tl.arange(0, BLOCK_K)
    left_rows = left_ptr + rows[:, None] * pitch + inner[None, :]  # [BLOCK, BLOCK_K]
    right_rows = right_ptr + cols[:, None] * pitch + inner[None, :]  # rows of a symmetric R are its columns
    main = tl.zeros([BLOCK, BLOCK], tl.float32)
    cross = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, pitch, BLOCK_K):
        left_hi, left_lo = _load_pair(left_rows, k, left_scale, numel, PAIRS)
        right_hi, right_lo = _load_pair(right_rows, k, right_scale, numel, PAIRS)
        cross = tl.dot(left_hi, right_lo.T, cross)
        cross = tl.dot(left_lo, right_hi.T, cross)
        main = tl.dot(left_hi, right_hi.T, main)  # last: with it first, Triton 3.6 fails to compile for sm_100
    return main + cross * LO_UNIT


@triton.jit
def _reciprocal(power_of_two):
    """Exact, by the exponent bits."""
    return (0x7F000000 - power_of_two.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _absmax_kernel(values_ptr, tiles_ptr, bits_ptr, BLOCK: tl.constexpr):
    """max |A| as the bits of a float, which order like integers and put NaN above everything."""
    start, pitch, i, j, b = _load_tile(tiles_ptr, BLOCK)
    span = tl.arange(0, BLOCK)
    at = (i * BLOCK + span)[:, None] * pitch + (j * BLOCK + span)[None, :]
    values = tl.load(values_ptr + start + at)  # [BLOCK, BLOCK]
    tl.atomic_max(bits_ptr + b, tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF))


# One binary for all stages:
@triton.jit(do_not_specialize=["factor_stride", "stage"], do_not_specialize_on_alignment=["alpha_ptr", "beta_ptr"])
def _grouped_product_kernel(
    left_ptr,  # fp32 [numel] or fp16 [2, numel], as right, addend and out
    right_ptr,
    addend_ptr,  # or None
    out_ptr,
    left_scale_ptr,  # fp32 [B], or None with PAIRS
    right_scale_ptr,
    alpha_ptr,  # fp32 [B] at factor_stride, or None for 1
    beta_ptr,
    factor_stride,
    stages_ptr,  # int32 [B], or None for all matrices
    stage,
    tiles_ptr,  # int32 [T, 5]
    numel,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start, pitch, i, j, b = _load_tile(tiles_ptr, BLOCK)
    if stages_ptr is not None:  # noqa: SIM102 (the compiler would evaluate both sides of an `and`)
        if stage >= tl.load(stages_ptr + b):
            return
    rows = i * BLOCK + tl.arange(0, BLOCK)
    cols = j * BLOCK + tl.arange(0, BLOCK)
    left_scale = 1.0
    right_scale = 1.0
    if not PAIRS:
        left_scale = tl.load(left_scale_ptr + b)
        right_scale = tl.load(right_scale_ptr + b)
    value = _multiply(
        left_ptr + start, right_ptr + start, rows, cols, pitch, left_scale, right_scale, numel, PAIRS, BLOCK, BLOCK_K
    )
    if alpha_ptr is not None:
        value *= tl.load(alpha_ptr + b * factor_stride)
    if not PAIRS:  # one factor after the other: their product may overflow where the result does not
        value = value * _reciprocal(left_scale) * _reciprocal(right_scale)
    if addend_ptr is not None:
        added = _load_value(addend_ptr + start, rows[:, None] * pitch + cols[None, :], numel, PAIRS)
        if beta_ptr is not None:
            added *= tl.load(beta_ptr + b * factor_stride)
        value += added
    _store_mirrored(out_ptr + start, _symmetrized(value, rows, cols), rows, cols, pitch, numel, i, j, PAIRS)
