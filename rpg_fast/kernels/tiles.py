"""Square matrices of many sizes in one flat buffer, tile by tile, and thin ones beside them.

All matrices lie one after another, row-major, padded with zeros to whole tiles. Two storages of the same size:
fp32 [numel], or fp16 pairs [2, numel], hi and then lo with x = hi + lo / 2048. Thin matrices [m, w] lie one after
another, too, as fp32 [rows, w], their rows padded as those of the square ones.
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
def _symmetrized(value, rows, cols):
    """A tile with its lower triangle mirrored, which changes diagonal tiles only."""
    return tl.where(rows[:, None] >= cols[None, :], value, value.T)


@triton.jit
def _store_mirrored(ptr, value, rows, cols, pitch, numel, i, j, PAIRS: tl.constexpr):
    """Stores a tile below the diagonal twice, one on the diagonal once."""
    _store_value(ptr, rows[:, None] * pitch + cols[None, :], value, numel, PAIRS)
    if i != j:
        _store_value(ptr, cols[:, None] * pitch + rows[None, :], value.T, numel, PAIRS)
