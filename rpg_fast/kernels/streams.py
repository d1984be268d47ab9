"""Lists of tensors as chunks of their elements, in the order in which they lie: what kernels need to take tensors of
any sizes, with their masks, in one launch.

A plan holds what is the same in every step: sizes, places of masks, chunks. The addresses of the tensors, and numbers
of the host, reach the device anew with every call, in one table.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast.kernels.weights import DTYPES, VECTOR_BYTES, device_table, grid_table, refuse_capture

CHUNK = 2048  # elements of a program; a multiple of 8, so that chunks start with whole octets
VECTORS = tl.constexpr(16)  # a chunk of a multiple of this many aligned elements is read in vectors
COLUMNS = tl.constexpr(3)  # of the plan's table
HEAD = 4  # numbers of eight bytes before the addresses

Roles = dict[str, Sequence[Tensor] | None]  # name -> one tensor a parameter; weights and gradients come first


class Stream(NamedTuple):
    """All that a plan knows of one parameter: its elements, the first byte of its mask or -1, the dtypes of weight,
    gradient and state in Triton's words (none: left to the reference), whether all their addresses are multiples of
    VECTOR_BYTES."""

    numel: int
    offset: int
    types: tuple[str, ...]
    aligned: bool


@dataclass(frozen=True)
class StreamPlan:
    """``table``: int64 [B, 3], of each parameter its elements, the first byte of its mask or -1, whether it is aligned;
    ``launches``: dtypes, and chunks int32 [T, 3] (parameter, 0, number)."""

    table: Tensor
    launches: tuple[tuple[tuple[str, ...], Tensor], ...]


@dataclass(frozen=True)
class StreamCall:
    """What the launches of one call have in common. ``head``: int64 [HEAD]; ``addresses``: int64 [B, roles], zero where
    there is no tensor; ``left``: the parameters that are left to the reference."""

    plan: StreamPlan
    head: Tensor
    addresses: Tensor
    left: list[int]


def prepare(
    op: str, roles: Roles, bits: Tensor | None, offsets: Sequence[int], head: list[int], steps: Sequence[Tensor] = ()
) -> StreamCall:
    """The plan of a call, made once, and its addresses, in one table with `head`; `steps` are a last column."""
    given = {name: tensors for name, tensors in roles.items() if tensors is not None}
    streams = _streams(op, given, offsets)
    like = next(iter(given.values()))[0]
    if bits is not None and (bits.dtype != torch.uint8 or not bits.is_contiguous() or bits.device != like.device):
        raise ValueError(
            f"{op}: bits must be contiguous uint8 on {like.device}, "
            f"got {bits.dtype} {list(bits.shape)} on {bits.device}"
        )
    plan = plan_streams(streams, None if bits is None else bits.numel(), like.device)
    left = [b for b, stream in enumerate(streams) if not stream.types]
    nothing = [0] * len(streams)
    columns = [[t.data_ptr() for t in ts] if ts else nothing for ts in (*roles.values(), *([steps] if steps else []))]
    rows = list(zip(*columns, strict=True))
    for b in left:
        rows[b] = (0,) * len(columns)
    table = device_table(like, [*head, *[0] * (HEAD - len(head)), *itertools.chain(*rows)])
    return StreamCall(plan, table[:HEAD], table[HEAD:], left)


def _streams(op: str, given: dict[str, Sequence[Tensor]], offsets: Sequence[int]) -> tuple[Stream, ...]:
    first_name = next(iter(given))
    lengths = {name: len(tensors) for name, tensors in given.items()} | {"offsets": len(offsets)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{op}: wanted one entry a parameter in each list, got {lengths}")
    streams = []
    for b, tensors in enumerate(zip(*given.values(), strict=True)):
        first = tensors[0]
        for name, tensor in zip(given, tensors, strict=True):
            if tensor.shape != first.shape or tensor.device != first.device:
                raise ValueError(
                    f"{op}: {name}[{b}] must be {list(first.shape)} on {first.device} as {first_name}[{b}], "
                    f"got {list(tensor.shape)} on {tensor.device}"
                )
        streams.append(_stream(tensors, offsets[b]))
    return tuple(streams)


def _stream(tensors: Sequence[Tensor], offset: int) -> Stream:
    dtypes = [t.dtype for t in tensors]
    known = all(t.dtype in DTYPES and t.is_contiguous() for t in tensors) and len(set(dtypes[2:])) <= 1
    types = tuple(DTYPES[dtype] for dtype in dtypes[:3]) if known else ()
    aligned = all(t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)
    return Stream(tensors[0].numel(), offset, types, aligned)


@functools.lru_cache(maxsize=64)
def plan_streams(streams: tuple[Stream, ...], nbytes: int | None, device: torch.device) -> StreamPlan:
    """The tables of one call with masks in a buffer of `nbytes`, made once for parameters that lie alike.

    Raises:
        ValueError: a mask that does not lie in the buffer. RuntimeError: while a CUDA graph is captured.
    """
    refuse_capture(device)
    grids: dict[tuple[str, ...], list[tuple[int, int, int]]] = {}
    for b, stream in enumerate(streams):
        end = stream.offset + -(-stream.numel // 8)
        if stream.offset < -1 or (nbytes is not None and stream.offset >= 0 and end > nbytes):
            raise ValueError(f"mask {b} of {stream.numel} bits at byte {stream.offset} is not within {nbytes} bytes")
        if stream.types and stream.numel:
            grids.setdefault(stream.types, []).append((b, 1, triton.cdiv(stream.numel, CHUNK)))
    like = torch.empty(0, device=device)
    table = device_table(like, [int(x) for s in streams for x in (s.numel, s.offset, s.aligned)])
    launches = tuple((types, grid_table(like, members)) for types, members in grids.items())
    return StreamPlan(table.view(-1, COLUMNS.value), launches)


def at_indices(values: Sequence[Any] | None, indices: list[int]) -> list[Any]:
    return [] if values is None else [values[b] for b in indices]


def dense(grads: Sequence[Tensor]) -> list[Tensor]:
    return [grad.contiguous() for grad in grads]


def lanes(types: Sequence[str]) -> int:
    """Elements of a thread's widest access: 16 bytes of the widest dtype, and as many of the others."""
    return 4 if "fp32" in types else 8


def double_word(value: float) -> int:
    word: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return word


def word_of(value: Tensor) -> int:
    """The eight bytes through which a number of the host reaches the device; 0 for one that is there."""
    if value.device.type != "cpu":
        return 0
    if value.dtype == torch.float64:
        return double_word(value.item())
    word: int = struct.unpack("<q", struct.pack("<fi", value.item(), 0))[0]
    return word


def scalar(value: Tensor, head: Tensor) -> Tensor:
    """A 0-d tensor as float64 or, of any other dtype, float32 [1] on the device: `head` if that holds its word."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    if value.device.type == "cpu":
        return head.view(dtype)[:1]
    return value.to(head.device, dtype).view(1)


def on_device(value: Tensor | None, like: Tensor) -> Tensor | None:
    return None if value is None else value.to(like.device, torch.float32).view(1)


@triton.jit
def chunk_of(chunk_ptr, table_ptr, CHUNK: tl.constexpr):
    """Of one program: which parameter, its row of the table, the first element of the chunk, whether all of it can be
    read in vectors."""
    b = tl.load(chunk_ptr)
    row_ptr = table_ptr + COLUMNS * b
    begin = tl.load(chunk_ptr + 2).to(tl.int64) * CHUNK
    rest = tl.load(row_ptr) - begin
    wide = (tl.load(row_ptr + 2) != 0) & ((rest >= CHUNK) | (rest % VECTORS == 0))
    return b, row_ptr, begin, wide


@triton.jit
def places(row_ptr, begin, bits_ptr, LANES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Of the elements of a chunk: where they lie behind the first, int32 [CHUNK / LANES, LANES], which there are, and
    which the mask keeps."""
    length = tl.minimum(tl.load(row_ptr) - begin, CHUNK).to(tl.int32)
    if WIDE:
        length = tl.multiple_of(length, VECTORS)
    first = tl.arange(0, CHUNK // LANES) * LANES
    at = first[:, None] + tl.arange(0, LANES)[None, :]
    if bits_ptr is None:
        keep = at >= 0
    else:
        offset = tl.load(row_ptr + 1)
        octet_ptrs = bits_ptr + (offset + begin // 8) + first // 8
        octets = tl.load(octet_ptrs, mask=(first < length) & (offset >= 0), other=255).to(tl.int32)
        keep = ((octets[:, None] >> (at % 8)) & 1) != 0
    return at, at < length, keep


@triton.jit
def base_of(address_ptr, begin, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """The address of a chunk's first element."""
    base = tl.load(address_ptr).to(tl.pointer_type(tl.dtype(TYPE)))
    if WIDE:
        base = tl.multiple_of(base, 16)
    return base + begin


@triton.jit
def load(pointers, there):
    return tl.load(pointers, mask=there, other=0.0).to(tl.float32)


@triton.jit
def store_kept(pointers, values, keep, there):
    """Zero, whatever the value, where the mask does not keep it."""
    tl.store(pointers, tl.where(keep, values, 0.0).to(pointers.dtype.element_ty), mask=there)
