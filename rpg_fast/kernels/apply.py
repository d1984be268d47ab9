"""The gradient of the rank loss: weight * share_b / ||X_b||_F^2 * N_b X_b for all weights in one launch a class, from
the weights where they lie to where the gradients lie, written or added.

X / ||X||_F lies in [-1, 1]; a power of two near 2^14 / ||X||_F takes X to where fp16 is finest, and back in the end.
The product is at fp32 grade (fp16 pairs, see `grouped_product`) or "fast", of single fp16 numbers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast import reference
from rpg_fast.kernels.tiles import LO_UNIT, _split
from rpg_fast.kernels.weights import (
    DTYPES,
    Storage,
    block_at,
    device_table,
    grid_table,
    matrix_at,
    matrix_layout,
    refuse_capture,
    storage_of,
)

TILES = {  # by whether the class is aligned: what is loaded element by element takes more registers
    True: {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    False: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
}
TABLE_COLUMNS = tl.constexpr(5)
LIFT = tl.constexpr(14)  # 2^15 is the largest power of two in fp16, and powers of two are rounded down


@dataclass(frozen=True)
class ApplyClass:
    """The weights of one launch; ``tiles``: int32 [T, 3], tiles of the gradients (matrix, i, j)."""

    type: str
    rows: bool
    aligned: bool
    add: bool
    tiles: Tensor


@dataclass(frozen=True)
class ApplyPlan:
    """``table``: int64 [B, 5], of each matrix m, n, pitch, the pitch of its gradient, where N starts in the projector
    buffer."""

    table: Tensor
    classes: tuple[ApplyClass, ...]


def rank_apply(
    weights: Sequence[Tensor],
    projector: Tensor,
    inv_norms: Tensor,
    shares: Tensor,
    weight: Tensor,
    fast: bool = False,
) -> list[Tensor]:
    """`reference.rank_apply` for float32, bfloat16 and float16 weights, rounded once; with float64 it is that function.

    Args:
        weights: [out, ...] of any strides; one without a unit stride is copied first.
        projector: float32 [sum m_b^2], symmetric matrices N_b as in `grouping.projector_offsets`.
        inv_norms, shares: float64 [B].
        weight: 0-d, on the CPU or on the device.
        fast: with an error of 1e-3 of the gradient's norm, not 3e-7.

    Returns:
        One gradient a weight, in its dtype and, where it is dense, in its strides. Zero where share is 0.
    """
    if not _known([*weights, projector]):
        return reference.rank_apply(weights, projector, inv_norms, shares, weight)
    gradients = [torch.empty_like(w) for w in weights]
    fused = _fused(tuple(map(storage_of, weights)), tuple(map(storage_of, gradients)))
    sources = [w if direct else w.contiguous() for w, direct in zip(weights, fused, strict=True)]
    targets = [g if direct else torch.empty_like(x) for g, x, direct in zip(gradients, sources, fused, strict=True)]
    _launch(sources, targets, projector, inv_norms, shares, weight, fast, add=(False,) * len(weights))
    for gradient, target in zip(gradients, targets, strict=True):
        if target is not gradient:
            gradient.copy_(target)
    return gradients


def rank_apply_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    projector: Tensor,
    inv_norms: Tensor,
    shares: Tensor,
    weight: Tensor,
    fast: bool = False,
) -> None:
    """Adds what `rank_apply` returns to `grads`, of any dtypes and layouts; where share is 0, no bit of them changes.

    In place where a gradient lies like its weight, in the same dtype; others take a float32 temporary each.
    """
    if not _known([*weights, projector]):
        reference.rank_apply_(grads, weights, projector, inv_norms, shares, weight)
        return
    fused = _fused(tuple(map(storage_of, weights)), tuple(map(storage_of, grads)))
    sources = [w if direct else w.float().contiguous() for w, direct in zip(weights, fused, strict=True)]
    targets = [g if direct else torch.empty_like(x) for g, x, direct in zip(grads, sources, fused, strict=True)]
    _launch(sources, targets, projector, inv_norms, shares, weight, fast, add=fused)
    for b, (grad, target) in enumerate(zip(grads, targets, strict=True)):
        if target is not grad:
            grad.copy_(torch.where(shares[b] > 0, grad + target, grad))


def _known(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.dtype in DTYPES for tensor in tensors)


@functools.lru_cache(maxsize=64)
def _fused(weights: tuple[Storage, ...], gradients: tuple[Storage, ...]) -> tuple[bool, ...]:
    """For which weights one kernel can read the weight and write the gradient where they lie."""

    def direct(weight: Storage, gradient: Storage) -> bool:
        if 0 in weight.shape or weight.shape != gradient.shape:
            return weight.shape == gradient.shape
        X, target = matrix_layout(weight, weight), matrix_layout(gradient, weight)
        return X is not None and target is not None and (X.rows, X.dtype) == (target.rows, target.dtype)

    return tuple(direct(w, g) for w, g in zip(weights, gradients, strict=True))


def _launch(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    projector: Tensor,
    inv_norms: Tensor,
    shares: Tensor,
    weight: Tensor,
    fast: bool,
    *,
    add: tuple[bool, ...],
) -> None:
    """Gradients of all `sources` into `targets`, which lie alike and have the same dtypes; added to those in `add`."""
    storages = [tuple(map(storage_of, tensors)) for tensors in (sources, targets)]
    plan = plan_apply(*storages, add, inv_norms.device)
    if not plan.classes:
        return
    pairs = zip(sources, targets, strict=True)
    addresses = device_table(inv_norms, [tensor.data_ptr() for pair in pairs for tensor in pair])
    weight = _on_device(weight, inv_norms)
    with torch.cuda.device_of(inv_norms):
        for c in plan.classes:
            _apply_kernel[(len(c.tiles),)](
                addresses, plan.table, c.tiles, projector, inv_norms, shares, weight,
                TYPE=c.type, ROWS=c.rows, ALIGNED=c.aligned, ADD=c.add, PAIRS=not fast, **TILES[c.aligned],
            )  # fmt: skip


def _on_device(value: Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor as float64 [1] on the device of `like`."""
    if value.device.type == "cpu" and like.device.type != "cpu":
        return _float64_table(like, float(value))
    return value.to(device=like.device, dtype=torch.float64).view(1)


def _float64_table(like: Tensor, value: float) -> Tensor:
    return device_table(like, list(struct.unpack("q", struct.pack("d", value)))).view(torch.float64)


@functools.lru_cache(maxsize=64)
def plan_apply(
    sources: tuple[Storage, ...], targets: tuple[Storage, ...], add: tuple[bool, ...], device: torch.device
) -> ApplyPlan:
    """The tables of one call, made once for weights and gradients that lie alike; empty weights are in no class."""
    refuse_capture(device)
    like = torch.empty(0, device=device)
    grids: dict[tuple[str, bool, bool, bool], list[tuple[int, int, int]]] = {}
    table = []
    offset = 0
    for b, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if 0 in source.shape:
            table.append((0, 0, 0, 0, 0))
            continue
        X, gradient = matrix_layout(source, source), matrix_layout(target, source)
        assert X is not None, f"no layout of {source}"
        assert gradient is not None, f"no layout of {target}"
        aligned = X.aligned and gradient.aligned and X.m % 4 == 0 and offset % 4 == 0
        tile = TILES[aligned]
        grid = (b, triton.cdiv(X.m, tile["BLOCK_M"]), triton.cdiv(X.n, tile["BLOCK_N"]))
        grids.setdefault((DTYPES[X.dtype], X.rows, aligned, add[b]), []).append(grid)
        table.append((X.m, X.n, X.pitch, gradient.pitch, offset))
        offset += X.m**2
    classes = tuple(
        ApplyClass(*key, grid_table(like, sorted(members, key=lambda grid: -table[grid[0]][0])))  # long programs first
        for key, members in grids.items()
    )
    return ApplyPlan(device_table(like, list(itertools.chain(*table))).view(-1, TABLE_COLUMNS.value), classes)


@triton.jit
def _exponent(x):
    """floor(log2(x)) of a positive, normal float64; -1023 of zero, 1024 of infinity and NaN."""
    return ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023


@triton.jit
def _power_of_two(exponent):
    """fp32, for an exponent in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _apply_kernel(
    addresses_ptr,  # int64 [B, 2], of the weights and the gradients
    table_ptr,  # int64 [B, 5]
    tiles_ptr,  # int32 [T, 3]
    projector_ptr,  # fp32 [sum m^2]
    inv_norms_ptr,  # float64 [B]
    shares_ptr,  # float64 [B]
    weight_ptr,  # float64 [1]
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADD: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tiles_ptr + 3 * tl.program_id(0)
    b = tl.load(row)
    share = tl.load(shares_ptr + b)
    if ADD:  # noqa: SIM102 (an `and` would evaluate both sides)
        if share <= 0:
            return
    rows = tl.load(row + 1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.load(row + 2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    layout = table_ptr + TABLE_COLUMNS * b
    base, m, n, pitch = matrix_at(tl.load(addresses_ptr + 2 * b), layout, TYPE, ROWS, ALIGNED)
    offset = tl.load(layout + 4)
    if ALIGNED:
        offset = tl.multiple_of(offset, 4)
        if ROWS:  # else it has a hint already, and the last one counts
            m = tl.multiple_of(m, 4)
    inv_norm = tl.load(inv_norms_ptr + b)
    exponent = tl.minimum(tl.maximum(_exponent(inv_norm) + LIFT, -126), 127)
    lift = _power_of_two(exponent)

    N = projector_ptr + offset
    main = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    cross = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, tl.where(share > 0, m, 0), BLOCK_K):  # N may hold anything where the share is 0
        left_there = (rows < m)[:, None] & (k + inner < m)[None, :]
        left = tl.load(N + rows[:, None] * m + (k + inner)[None, :], mask=left_there, other=0.0)
        at, there = block_at(base, pitch, k + inner, cols, m, n, ROWS)
        right = tl.load(at, mask=there, other=0.0).to(tl.float32) * lift  # [BLOCK_K, BLOCK_N]
        if PAIRS:
            left_hi, left_lo = _split(left)
            right_hi, right_lo = _split(right)
            cross = tl.dot(left_hi, right_lo, cross)
            cross = tl.dot(left_lo, right_hi, cross)
            main = tl.dot(left_hi, right_hi, main)  # last: with it first, Triton 3.6 fails to compile for sm_100
        else:
            main = tl.dot(left.to(tl.float16), right.to(tl.float16), main)
    if PAIRS:
        main += cross * LO_UNIT

    # In two factors of about the same size: neither their product nor the gradient's need be within fp32's range.
    coefficient = tl.load(weight_ptr) * share * inv_norm * inv_norm / lift.to(tl.float64)
    half = tl.minimum(tl.maximum(_exponent(tl.abs(coefficient)) >> 1, -126), 127)
    other_half = _power_of_two(half)
    value = main * (coefficient / other_half.to(tl.float64)).to(tl.float32) * other_half
    target = tl.load(addresses_ptr + 2 * b + 1).to(base.dtype)
    target_pitch = tl.load(layout + 3)
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        target_pitch = tl.multiple_of(target_pitch, 4 if TYPE == "fp32" else 8)
    at, there = block_at(target, target_pitch, rows, cols, m, n, ROWS)
    value = tl.where(share > 0, value, 0.0)
    if ADD:
        value += tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, value.to(base.dtype.element_ty), mask=there)
