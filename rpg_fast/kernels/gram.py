"""Gram matrices of weights of any shape, at fp32 grade, from the weights where they lie: four launches a class.

    statistics  largest magnitude and number of zeros of every weight
    gram        lower tiles of X X^T, as fp16 pairs on tensor cores (see `grouped_product`), each from CHUNK columns
    norms       ||X||_F, and the power of two s that brings the largest entry of G = X X^T / ||X||_F^2 into (1/2, 1]
    gather      chunks summed in a fixed order: s G as fp16 pairs, both triangles, in the layout of a `TilePlan`

Nothing is read by the host, and no sum depends on the order in which programs run: the same bits each time. Tensor
cores round sums towards zero; what they have summed over RUN columns is therefore added up outside of them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast import grouping
from rpg_fast.kernels.tiles import LO_UNIT, TilePlan, _load_tile, _split, _store_value, plan_tiles
from rpg_fast.kernels.weights import (
    DTYPES,
    Storage,
    block_at,
    copied_layout,
    device_table,
    grid_table,
    matrix_at,
    matrix_layout,
    refuse_capture,
    storage_of,
)

BLOCK = 64
RUN = 256
CHUNK = 1024  # columns of X behind one partial tile; more where a matrix has tiles enough to keep a GPU busy
BUSY = 512
GRAM_TILE = {"BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
TABLE_COLUMNS = tl.constexpr(6)


@dataclass(frozen=True)
class GramClass:
    """The weights of one launch; ``elements``: int32 [S, 3], blocks of X (matrix, i, j); ``tiles``: int32 [T, 4],
    partial tiles of X X^T (matrix, i, j <= i, chunk)."""

    type: str
    rows: bool
    aligned: bool
    elements: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class GramPlan:
    """``table``: int64 [B, 6], of each matrix m, n, pitch, its first partial tile, chunks, columns in a chunk;
    ``partials``: how many partial tiles there are; ``copied``: which weights have no unit stride."""

    square: TilePlan
    table: Tensor
    partials: int
    classes: tuple[GramClass, ...]
    copied: tuple[bool, ...]


@dataclass(frozen=True)
class Grams:
    """What is known of B weights.

    pairs: fp16 [2, numel] in the layout of ``plan``, s G = s X X^T / ||X||_F^2; zero where X is zero or not finite.
    scales: fp32 [B], the powers of two s >= 1; 1 where G is zero.
    norms: float64 [B], ||X||_F; NaN where X is not finite.
    zeros: int64 [B], how many elements are zero.
    """

    plan: TilePlan
    pairs: Tensor
    scales: Tensor
    norms: Tensor
    zeros: Tensor


def normalised_grams(weights: Sequence[Tensor]) -> Grams:
    """The trace-one Gram matrices of `weights`, float32, bfloat16 or float16 [out, ...] of any strides on one device.

    A weight without a unit stride (a slice of every second element, say) is copied first.

    Raises:
        ValueError: an empty weight, one of another dtype, or one with a short side above 46,336.

    Equivalent to: ``G, norm = reference.normalised_gram(grouping.short_side_first(w))`` for every w.
    """
    like = weights[0]
    plan = plan_grams(tuple(storage_of(w) for w in weights), like.device)
    lying = [
        grouping.short_side_first(w).contiguous() if copied else w
        for w, copied in zip(weights, plan.copied, strict=True)
    ]
    addresses = device_table(like, [X.data_ptr() for X in lying])
    count = len(weights)
    bits = torch.zeros(count, dtype=torch.int32, device=like.device)
    zeros = torch.zeros(count, dtype=torch.int64, device=like.device)
    partials = torch.empty(plan.partials * BLOCK * BLOCK, dtype=torch.float32, device=like.device)
    norms = torch.empty(count, dtype=torch.float64, device=like.device)
    scales = torch.empty(count, dtype=torch.float32, device=like.device)
    factors = torch.empty_like(scales)
    pairs = torch.empty(2, plan.square.numel, dtype=torch.float16, device=like.device)
    with torch.cuda.device_of(like):
        for c in plan.classes:
            _statistics_kernel[(len(c.elements),)](
                addresses, plan.table, c.elements, bits, zeros,
                TYPE=c.type, ROWS=c.rows, ALIGNED=c.aligned, BLOCK=BLOCK,
            )  # fmt: skip
        for c in plan.classes:
            _gram_kernel[(len(c.tiles),)](
                addresses, plan.table, c.tiles, bits, partials,
                TYPE=c.type, ROWS=c.rows, ALIGNED=c.aligned, BLOCK=BLOCK, RUN=RUN, **GRAM_TILE,
            )  # fmt: skip
        _norms_kernel[(count,)](partials, plan.table, bits, norms, scales, factors, BLOCK=BLOCK, BATCH=8)
        _gather_kernel[(len(plan.square.tiles),)](
            partials, plan.table, plan.square.tiles, factors, pairs, plan.square.numel, BLOCK=BLOCK
        )
    return Grams(plan.square, pairs, scales, norms, zeros)


@functools.lru_cache(maxsize=64)
def plan_grams(storages: tuple[Storage, ...], device: torch.device) -> GramPlan:
    """The tables of `normalised_grams`, made once for weights that lie alike."""
    refuse_capture(device)
    like = torch.empty(0, device=device)
    found = [matrix_layout(storage, storage) for storage in storages]
    layouts = [layout or copied_layout(storage) for layout, storage in zip(found, storages, strict=True)]
    square = plan_tiles([layout.m for layout in layouts], block=BLOCK, device=device)
    sides = [triton.cdiv(layout.m, BLOCK) for layout in layouts]
    triangles = [side * (side + 1) // 2 for side in sides]
    lengths = [_chunk_length(layout.n, triangle) for layout, triangle in zip(layouts, triangles, strict=True)]
    chunks = [triton.cdiv(layout.n, length) for layout, length in zip(layouts, lengths, strict=True)]
    firsts = [0, *itertools.accumulate(t * c for t, c in zip(triangles, chunks, strict=True))]
    table = [(x.m, x.n, x.pitch, firsts[b], chunks[b], lengths[b]) for b, x in enumerate(layouts)]
    members: dict[tuple[torch.dtype, bool, bool], list[int]] = {}
    for b, layout in enumerate(layouts):
        members.setdefault((layout.dtype, layout.rows, layout.aligned), []).append(b)
    classes = []
    for (dtype, rows, aligned), those in members.items():
        elements = grid_table(like, [(b, sides[b], triton.cdiv(layouts[b].n, BLOCK)) for b in those])
        tiles = _lower(grid_table(like, [(b, triangles[b], chunks[b]) for b in those]))
        classes.append(GramClass(DTYPES[dtype], rows, aligned, elements, tiles))
    return GramPlan(
        square=square,
        table=device_table(like, list(itertools.chain(*table))).view(-1, TABLE_COLUMNS.value),
        partials=firsts[-1],
        classes=tuple(classes),
        copied=tuple(layout is None for layout in found),
    )


def _chunk_length(n: int, triangle: int) -> int:
    """Columns of X behind each partial tile of a matrix of `triangle` lower tiles: the same whatever else there is."""
    chunks = min(triton.cdiv(n, CHUNK), max(1, BUSY // triangle))
    length: int = triton.cdiv(triton.cdiv(n, chunks), RUN) * RUN
    return length


def _lower(tiles: Tensor) -> Tensor:
    """(b, number of the lower tile, chunk) [T, 3] -> (b, i, j, chunk) [T, 4]; the tiles (0, 0), (1, 0), (1, 1), (2, 0)
    and so on have the numbers 0, 1, 2, 3."""
    b, number, chunk = tiles.unbind(-1)
    i = (((8.0 * number.double() + 1).sqrt() - 1) / 2).floor().int()  # float64: exact where it matters
    return torch.stack([b, i, number - i * (i + 1) // 2, chunk], -1)


@triton.jit
def _scale(bits):
    """The power of two that brings max |w|, given as the bits of a float, into [1, 2); for zero, the largest one."""
    exponent = tl.minimum(tl.maximum(bits >> 23, 1), 253)  # the reciprocal, too, is a normal number
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _finite(bits):
    return (bits >> 23) != 255


@triton.jit
def _statistics_kernel(
    addresses_ptr,  # int64 [B]
    table_ptr,  # int64 [B, 6]
    elements_ptr,  # int32 [S, 3]
    bits_ptr,  # int32 [B], zeroed: max |w| as the bits of a float, which order like integers, NaN above all
    zeros_ptr,  # int64 [B], zeroed
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = elements_ptr + 3 * tl.program_id(0)
    b = tl.load(row)
    base, m, n, pitch = matrix_at(tl.load(addresses_ptr + b), table_ptr + TABLE_COLUMNS * b, TYPE, ROWS, ALIGNED)
    span = tl.arange(0, BLOCK)
    at, there = block_at(base, pitch, tl.load(row + 1) * BLOCK + span, tl.load(row + 2) * BLOCK + span, m, n, ROWS)
    values = tl.load(at, mask=there, other=0.0).to(tl.float32)  # [BLOCK, BLOCK]
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(bits_ptr + b, tl.max(bits))
    tl.atomic_add(zeros_ptr + b, tl.sum((there & (bits == 0)).to(tl.int32)).to(tl.int64))


@triton.jit
def _load_pair(base, pitch, i, j, m, n, scale, TYPE: tl.constexpr, ROWS: tl.constexpr):
    at, there = block_at(base, pitch, i, j, m, n, ROWS)
    return _split(tl.load(at, mask=there, other=0.0).to(tl.float32) * scale)


@triton.jit
def _gram_kernel(
    addresses_ptr,  # int64 [B]
    table_ptr,  # int64 [B, 6]
    tiles_ptr,  # int32 [T, 4]
    bits_ptr,  # int32 [B]
    partials_ptr,  # fp32 [P, BLOCK, BLOCK]
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tiles_ptr + 4 * tl.program_id(0)
    b, i, j, chunk = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    layout = table_ptr + TABLE_COLUMNS * b
    base, m, n, pitch = matrix_at(tl.load(addresses_ptr + b), layout, TYPE, ROWS, ALIGNED)
    bits = tl.load(bits_ptr + b)
    scale = _scale(bits)
    left = i * BLOCK + tl.arange(0, BLOCK)
    right = j * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_K)
    length = tl.multiple_of(tl.load(layout + 5).to(tl.int32), RUN)  # else no wide loads
    start = chunk * length
    stop = tl.where(_finite(bits), tl.minimum(start + length, n), start)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for run in range(start, stop, RUN):
        main = tl.zeros([BLOCK, BLOCK], tl.float32)
        cross = tl.zeros([BLOCK, BLOCK], tl.float32)
        for k in range(run, tl.minimum(run + RUN, stop), BLOCK_K):
            left_hi, left_lo = _load_pair(base, pitch, left, k + inner, m, n, scale, TYPE, ROWS)
            right_hi, right_lo = _load_pair(base, pitch, right, k + inner, m, n, scale, TYPE, ROWS)
            if TYPE == "fp32":
                cross = tl.dot(left_hi, right_lo.T, cross)
                cross = tl.dot(left_lo, right_hi.T, cross)
            main = tl.dot(left_hi, right_hi.T, main)  # last: with it first, Triton 3.6 fails to compile for sm_100
        total += main + cross * LO_UNIT
    partial = tl.load(layout + 3) + (i * (i + 1) // 2 + j) * tl.load(layout + 4) + chunk
    span = tl.arange(0, BLOCK)
    tl.store(partials_ptr + partial * (BLOCK * BLOCK) + span[:, None] * BLOCK + span[None, :], total)


@triton.jit
def _norms_kernel(
    partials_ptr,  # fp32 [P, BLOCK, BLOCK]
    table_ptr,  # int64 [B, 6]
    bits_ptr,  # int32 [B]
    norms_ptr,  # float64 [B]
    scales_ptr,  # fp32 [B]
    factors_ptr,  # fp32 [B]: s over the sum of the squares of the scaled X
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
):
    b = tl.program_id(0)
    m = tl.load(table_ptr + TABLE_COLUMNS * b).to(tl.int32)
    first = tl.load(table_ptr + TABLE_COLUMNS * b + 3)
    chunks = tl.load(table_ptr + TABLE_COLUMNS * b + 4).to(tl.int32)
    on_diagonal = tl.arange(0, BLOCK) * (BLOCK + 1)
    batch = tl.arange(0, BATCH)
    sums = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    for i in range(0, tl.cdiv(m, BLOCK)):
        diagonal = tl.zeros([BLOCK], tl.float64)
        for c in range(0, chunks, BATCH):
            partial = first + (i * (i + 3) // 2) * chunks + c + batch  # tile (i, i)
            at = (partial * (BLOCK * BLOCK))[:, None] + on_diagonal[None, :]  # [BATCH, BLOCK]
            parts = tl.load(partials_ptr + at, mask=(c + batch < chunks)[:, None], other=0.0)
            diagonal += tl.sum(parts.to(tl.float64), axis=0)
        sums += diagonal
        largest = tl.maximum(largest, diagonal)
    square = tl.sum(sums)
    there = square > 0
    ratio = tl.where(there, square / tl.where(there, tl.max(largest), 1.0), 1.0)  # in [1, m]
    power = ((ratio.to(tl.int64, bitcast=True) >> 52) << 52).to(tl.float64, bitcast=True)  # without the mantissa
    bits = tl.load(bits_ptr + b)
    norm = tl.sqrt(square) / _scale(bits).to(tl.float64)
    tl.store(norms_ptr + b, tl.where(_finite(bits), norm, float("nan")))
    tl.store(scales_ptr + b, power.to(tl.float32))
    tl.store(factors_ptr + b, (power / tl.where(there, square, 1.0)).to(tl.float32))


@triton.jit
def _gather_kernel(
    partials_ptr,  # fp32 [P, BLOCK, BLOCK]
    table_ptr,  # int64 [B, 6]
    tiles_ptr,  # int32 [T, 5], of the TilePlan
    factors_ptr,  # fp32 [B]
    pairs_ptr,  # fp16 [2, numel]
    numel,
    BLOCK: tl.constexpr,
):
    start, pitch, i, j, b = _load_tile(tiles_ptr, BLOCK)
    first = tl.load(table_ptr + TABLE_COLUMNS * b + 3)
    chunks = tl.load(table_ptr + TABLE_COLUMNS * b + 4).to(tl.int32)
    span = tl.arange(0, BLOCK)
    parts = partials_ptr + (first + (i * (i + 1) // 2 + j) * chunks) * (BLOCK * BLOCK)
    parts += span[:, None] * BLOCK + span[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for c in range(0, chunks):
        total += tl.load(parts + c * (BLOCK * BLOCK))
    total *= tl.load(factors_ptr + b)
    mirrored = total.T
    rows = i * BLOCK + span
    cols = j * BLOCK + span
    total = tl.where(rows[:, None] >= cols[None, :], total, mirrored)  # changes diagonal tiles only
    _store_value(pairs_ptr + start, rows[:, None] * pitch + cols[None, :], total, numel, True)
    if i != j:
        _store_value(pairs_ptr + start, cols[:, None] * pitch + rows[None, :], mirrored, numel, True)
