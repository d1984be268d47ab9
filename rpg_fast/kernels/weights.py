"""Weights where they lie: what the kernels need to read, and to write, weights of any shape in one launch.

A weight [out, ...] is the matrix X [m, n] of `grouping.short_side_first` with one unit stride: along its rows ("rows",
n contiguous) or along its columns (m contiguous, a tall weight). The other stride is its pitch. What else lies
differently is copied by plain torch before the launch. One launch reads all weights of one class: equal dtype, equal
side of the unit stride, equally aligned, so that only odd weights are loaded element by element.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast import grouping

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # what the kernels read, in Triton
VECTOR_BYTES = 16  # the widest load of a thread


class Storage(NamedTuple):
    """All that a plan may know of a tensor: hashable, and the same in every step."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # its address is a multiple of VECTOR_BYTES


class MatrixLayout(NamedTuple):
    """X [m, n] in memory: element (i, j) at i * pitch + j (``rows``), else at i + j * pitch. ``aligned``: address,
    pitch and length of the unit side are all multiples of VECTOR_BYTES."""

    m: int
    n: int
    pitch: int
    dtype: torch.dtype
    rows: bool
    aligned: bool


def device_table(like: Tensor, values: Sequence[int]) -> Tensor:
    """`values` as int64 [n] on the device of `like`; on CUDA neither a synchronisation nor a copy from the host."""
    table: Tensor = torch.ops.rpg_fast.device_table(like, list(values))
    return table


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph is captured: tables that are kept must be there before the graph runs."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call with these weights is captured in a CUDA graph: call once before, to make their tables"
        )


def storage_of(tensor: Tensor) -> Storage:
    aligned = tensor.data_ptr() % VECTOR_BYTES == 0
    return Storage(tuple(tensor.shape), tensor.stride(), tensor.dtype, aligned)


def matrix_layout(tensor: Storage, weight: Storage) -> MatrixLayout | None:
    """Where X lies in `tensor`: a weight itself or a gradient of the same shape, in the order of `weight`'s columns.

    None if it has no such layout, shares memory between elements, or is of a dtype that the kernels do not know.
    Raises ValueError for n >= 2^31 (32-bit indices inside a row).
    """
    if tensor.dtype not in DTYPES:
        return None
    permutation = grouping.memory_order(torch.empty_strided(weight.shape, weight.strides, device="meta"))
    columns = [d for d in permutation if d != 0]
    permuted = torch.empty_strided(tensor.shape, tensor.strides, device="meta").permute(0, *columns)
    try:
        matrix = permuted.view(tensor.shape[0], -1)  # [out, rest]
    except RuntimeError:  # not a view
        return None
    X = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT  # [m, n]
    (m, n), (row, column) = X.shape, X.stride()
    if n >= 2**31:
        raise ValueError(f"a weight's long side must be below 2^31, got shape {tensor.shape}")
    row, column = (0 if m == 1 else row), (1 if n == 1 else column)
    if column == 1 and (row >= n or m == 1):
        rows, pitch, unit_side = True, row, n
    elif (row == 1 and column >= m) or (m == 1 and column >= 1):
        rows, pitch, unit_side = False, column, m
    else:
        return None
    vector = VECTOR_BYTES // tensor.dtype.itemsize
    aligned = tensor.aligned and pitch % vector == 0 and unit_side % vector == 0
    return MatrixLayout(m, n, pitch, tensor.dtype, rows, aligned)


def copied_layout(weight: Storage) -> MatrixLayout:
    """Of a new, row-major X. Raises ValueError for a dtype that the kernels do not know."""
    if weight.dtype not in DTYPES:
        raise ValueError(f"weights must be float32, bfloat16 or float16, got {weight.dtype}")
    X = grouping.short_side_first(torch.empty(weight.shape, device="meta"))
    m, n = X.shape
    return MatrixLayout(m, n, n, weight.dtype, True, n % (VECTOR_BYTES // weight.dtype.itemsize) == 0)


def grid_table(like: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """int32 [T, 3] on the device of `like`: for each (b, rows, columns) all (b, i, j), i < rows, j < columns, one after
    another with j fastest."""
    sizes = [rows * columns for _, rows, columns in grids]
    firsts = [sum(sizes[:g]) for g in range(len(sizes))]
    values = [value for (b, _, columns), first, size in zip(grids, firsts, sizes, strict=True)
              for value in (b, columns, first, size)]  # fmt: skip
    b, columns, first, size = device_table(like, values).view(-1, 4).unbind(-1)  # [G]
    total = sum(sizes)
    grid = torch.repeat_interleave(torch.arange(len(grids), device=like.device), size, output_size=total)  # [T]
    place = torch.arange(total, device=like.device) - first[grid]
    i = torch.div(place, columns[grid], rounding_mode="floor")
    return torch.stack([b[grid], i, place - i * columns[grid]], -1).int()


@triton.jit
def matrix_at(address, row_ptr, TYPE: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """X as a pointer, m, n and pitch. ``row_ptr``: int64, m, n, pitch; the others as in `MatrixLayout`, TYPE of its
    elements in Triton's words."""
    VECTOR: tl.constexpr = 4 if TYPE == "fp32" else 8
    base = address.to(tl.pointer_type(tl.dtype(TYPE)))
    m = tl.load(row_ptr).to(tl.int32)
    n = tl.load(row_ptr + 1).to(tl.int32)
    pitch = tl.load(row_ptr + 2)
    if ALIGNED:
        base = tl.multiple_of(base, 16)
        pitch = tl.multiple_of(pitch, VECTOR)
        if ROWS:
            n = tl.multiple_of(n, VECTOR)
        else:
            m = tl.multiple_of(m, VECTOR)
    return base, m, n, pitch


@triton.jit
def block_at(base, pitch, i, j, m, n, ROWS: tl.constexpr):
    """Addresses of the elements i x j, int32 [I] and [J], of X, and which of them there are: [I, J]."""
    if ROWS:
        at = (base + i.to(tl.int64) * pitch)[:, None] + j[None, :]
    else:
        at = (base + j.to(tl.int64) * pitch)[None, :] + i[:, None]
    return at, (i < m)[:, None] & (j < n)[None, :]
