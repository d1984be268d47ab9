"""Products of symmetric matrices of many sizes in one launch, at fp32 grade on fp16 tensor cores.

An fp32 number x is split as x = hi + lo / 2048 with fp16 hi and lo, so that a product of two matrices becomes three
fp16 products with fp32 accumulation, hi hi + (hi lo + lo hi) / 2048; the missing lo lo term is below 2^-22 (Ootomo and
Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", 2022).

The matrices commute and are symmetric (every factor is a polynomial of the same matrix), so the product is symmetric
too: only the lower tiles are computed, and each is stored twice. One kernel forms ``out = alpha L R + beta D``, which
covers the steps of a composed polynomial filter, A = X X, B = b A + c A A and X = a X + B X.

All matrices lie in one flat buffer, row-major, padded with zeros to whole tiles. Two storages of the same size:
fp32 [numel], split whenever a tile is loaded, or fp16 pairs [2, numel] (hi, then lo), split once when stored. Thin
matrices [m, w] lie one after another, too, as fp32 [rows, w], their rows padded as those of the square ones.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast.kernels.weights import device_table

LO_SCALE = tl.constexpr(2048.0)  # fp16 keeps 11 bits, so the residual of hi times 2^11 is of the size of hi
LO_UNIT = tl.constexpr(1 / 2048)
TILE_COLUMNS = tl.constexpr(5)


@dataclass(frozen=True)
class TilePlan:
    """Where B square matrices of different sizes lie in one flat buffer, and the lower tiles of all of them.

    ``sizes``: m of each matrix; ``padded``: m rounded up to ``block``; ``starts``: its first element in the buffer;
    ``numel``: length of the buffer; ``tiles``: int32 [T, 5], a row for each lower tile: start of its matrix in the
    buffer in units of block^2 elements, tiles per side, tile row i, tile column j <= i, index of the matrix. Large
    matrices come first. ``tile_starts``: int32 [B, 2], the rows of ``tiles`` that belong to a matrix, first and past
    the last; ``orders``: int32 [B], m on the device.

    ``rows``: sum of ``padded``, the rows of a thin buffer; ``row_starts``: int32 [B], the first row of each matrix;
    ``row_blocks``: int32 [rows / block, 5], as ``tiles`` for blocks of whole rows, with the first thin row of the
    matrix in units of ``block`` in the place of j.
    """

    sizes: tuple[int, ...]
    padded: tuple[int, ...]
    starts: tuple[int, ...]
    numel: int
    rows: int
    block: int
    tiles: Tensor
    tile_starts: Tensor
    orders: Tensor
    row_starts: Tensor
    row_blocks: Tensor


def plan_tiles(sizes: Sequence[int], *, block: int = 64, device: torch.device | str | None = None) -> TilePlan:
    """Lay out square matrices of the given sizes and list their lower tiles of ``block`` x ``block`` elements.

    Raises ValueError for a size outside 1..46,336 (32-bit indices inside a matrix) or a block that is no power of two
    of at least 16.
    """
    if block < 16 or block & (block - 1):
        raise ValueError(f"block must be a power of two of at least 16, got {block}")
    for m in sizes:
        if not 1 <= m <= 46_336:
            raise ValueError(f"every matrix size must be in 1..46336, got {m} in {list(sizes)}")
    sides = [triton.cdiv(m, block) for m in sizes]
    firsts = [0, *itertools.accumulate(side * side for side in sides)]
    first_rows = [0, *itertools.accumulate(sides)]
    largest_first = sorted(range(len(sides)), key=lambda b: -sides[b])
    tiles: list[int] = []
    row_blocks: list[int] = []
    tile_starts = [0] * (2 * len(sides))
    for b in largest_first:
        tile_starts[2 * b] = len(tiles) // TILE_COLUMNS.value
        for i in range(sides[b]):
            row_blocks += (firsts[b], sides[b], i, first_rows[b], b)
            for j in range(i + 1):
                tiles += (firsts[b], sides[b], i, j, b)
        tile_starts[2 * b + 1] = len(tiles) // TILE_COLUMNS.value
    like = torch.empty(0, device=device)

    def table(values: list[int], columns: int) -> Tensor:
        return device_table(like, values).to(torch.int32).view(-1, columns)

    return TilePlan(
        sizes=tuple(sizes),
        padded=tuple(side * block for side in sides),
        starts=tuple(first * block * block for first in firsts[:-1]),
        numel=firsts[-1] * block * block,
        rows=first_rows[-1] * block,
        block=block,
        tiles=table(tiles, TILE_COLUMNS.value),
        tile_starts=table(tile_starts, 2),
        orders=table(list(sizes), 1).view(-1),
        row_starts=table([first * block for first in first_rows[:-1]], 1).view(-1),
        row_blocks=table(row_blocks, TILE_COLUMNS.value),
    )


def unpack(values: Tensor, plan: TilePlan) -> list[Tensor]:
    """Views [m, m] of the matrices in a flat buffer [numel]."""
    return [
        values[start : start + p * p].view(p, p)[:m, :m]
        for m, p, start in zip(plan.sizes, plan.padded, plan.starts, strict=True)
    ]


def pack(matrices: Sequence[Tensor], plan: TilePlan) -> Tensor:
    """Copy square matrices [m, m] into a new flat fp32 buffer [numel], zero outside them."""
    if tuple(a.shape for a in matrices) != tuple((m, m) for m in plan.sizes):
        raise ValueError(f"want square matrices of sizes {plan.sizes}, got shapes {[tuple(a.shape) for a in matrices]}")
    values = torch.zeros(plan.numel, dtype=torch.float32, device=plan.tiles.device)
    for view, matrix in zip(unpack(values, plan), matrices, strict=True):
        view.copy_(matrix)
    return values


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


def split_pairs(values: Tensor, scales: Tensor, plan: TilePlan) -> Tensor:
    """fp16 pairs [2, numel] of the scaled matrices: ``scale * A = hi + lo / 2048``."""
    check_storage("values", values, plan, torch.float32)
    lengths = torch.tensor([p * p for p in plan.padded], dtype=torch.int64, device=values.device)
    scaled = values * scales.repeat_interleave(lengths, output_size=plan.numel)
    hi = scaled.half()
    return torch.stack([hi, ((scaled - hi.float()) * LO_SCALE.value).half()])


def join_pairs(pairs: Tensor) -> Tensor:
    """fp32 [numel] from pairs [2, numel]; the scale is the caller's."""
    return torch.add(pairs[0].float(), pairs[1], alpha=LO_UNIT.value)


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
    launch_product(
        left, right, plan, out, alpha=alpha, addend=addend, beta=beta, scales=(left_scale, right_scale),
        stages=stages, stage=stage, block_k=block_k, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def launch_product(
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
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """`grouped_product` without its checks, for a sequence of launches on buffers that were checked once."""
    factor = beta if alpha is None else alpha
    if plan.numel:
        _grouped_product_kernel[(len(plan.tiles),)](
            left, right, addend, out, *scales, alpha, beta, 1 if factor is None else factor.stride(0), stages, stage,
            plan.tiles, plan.numel, PAIRS=left.dtype == torch.float16, BLOCK=plan.block, BLOCK_K=block_k,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip


def check_storage(name: str, tensor: Tensor, plan: TilePlan, dtype: torch.dtype) -> None:
    shape = (2, plan.numel) if dtype == torch.float16 else (plan.numel,)
    check_tensor(name, tensor, shape, dtype, plan.tiles.device)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless `tensor` is contiguous, of that shape and dtype and on that device."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        raise ValueError(f"{name} must be contiguous {shape} {dtype} on {device}, got {got}")


def check_per_matrix(name: str, tensor: Tensor | None, plan: TilePlan, dtype: torch.dtype) -> None:
    """Raises ValueError unless `tensor` is None or holds one value a matrix, at any stride."""
    if tensor is None:
        return
    want = (len(plan.sizes),)
    if tensor.shape != want or tensor.dtype != dtype or tensor.device != plan.tiles.device:
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} must be {want} {dtype} on {plan.tiles.device}, got {got}")


@triton.jit
def _split(x):
    """hi, lo with x = hi + lo / 2048."""
    hi = x.to(tl.float16)
    lo = ((x - hi.to(tl.float32)) * LO_SCALE).to(tl.float16)
    return hi, lo


@triton.jit
def _load_pair(ptr, at, scale, numel, PAIRS: tl.constexpr):
    if PAIRS:
        hi = tl.load(ptr + at)
        lo = tl.load(ptr + numel + at)
    else:
        hi, lo = _split(tl.load(ptr + at) * scale)
    return hi, lo


@triton.jit
def _load_value(ptr, at, numel, PAIRS: tl.constexpr):
    value = tl.load(ptr + at).to(tl.float32)
    if PAIRS:
        value += tl.load(ptr + numel + at).to(tl.float32) * LO_UNIT
    return value


@triton.jit
def _store_value(ptr, at, value, numel, PAIRS: tl.constexpr):
    if PAIRS:
        hi, lo = _split(value)
        tl.store(ptr + at, hi)
        tl.store(ptr + numel + at, lo)
    else:
        tl.store(ptr + at, value)


@triton.jit
def _load_tile(tiles_ptr, BLOCK: tl.constexpr):
    """Start of the matrix (int64), its pitch, tile row, tile column and index of the matrix of this program."""
    row = tiles_ptr + TILE_COLUMNS * tl.program_id(0)
    # The table holds multiples of BLOCK, not elements: the multiplication tells the compiler that rows are aligned.
    start = tl.load(row).to(tl.int64) * (BLOCK * BLOCK)
    pitch = tl.load(row + 1) * BLOCK
    return start, pitch, tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


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
def _symmetrized(value, rows, cols):
    """A tile with its lower triangle mirrored, which changes diagonal tiles only."""
    return tl.where(rows[:, None] >= cols[None, :], value, value.T)


@triton.jit
def _store_mirrored(ptr, value, rows, cols, pitch, numel, i, j, PAIRS: tl.constexpr):
    """Stores a tile below the diagonal twice, one on the diagonal once."""
    _store_value(ptr, rows[:, None] * pitch + cols[None, :], value, numel, PAIRS)
    if i != j:
        _store_value(ptr, cols[:, None] * pitch + rows[None, :], value.T, numel, PAIRS)


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
