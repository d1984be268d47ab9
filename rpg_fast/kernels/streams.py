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


class Streams(NamedTuple):
    """All that a plan knows of the tensors of a call: their elements, the first bytes of their masks or -1, and, role
    by role, dtypes, whether they are contiguous, their addresses modulo VECTOR_BYTES."""

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    dtypes: tuple[tuple[torch.dtype, ...], ...]
    dense: tuple[tuple[bool, ...], ...]
    misaligned: tuple[tuple[int, ...], ...]

    def types(self, b: int) -> tuple[str, ...]:
        """The dtypes of weight, gradient and state in Triton's words; none for what is left to the reference."""
        dtypes = [of_role[b] for of_role in self.dtypes]
        known = all(dtype in DTYPES for dtype in dtypes) and len(set(dtypes[2:])) <= 1
        return tuple(DTYPES[t] for t in dtypes[:3]) if known and all(of_role[b] for of_role in self.dense) else ()

    def aligned(self, b: int) -> bool:
        return not any(of_role[b] for of_role in self.misaligned)


@dataclass(frozen=True)
class StreamPlan:
    """``table``: int64 [B, 3], of each parameter its elements, the first byte of its mask or -1, whether it is aligned;
    ``launches``: dtypes, and chunks int32 [T, 3] (parameter, 0, number); ``left``: the parameters that are left to the
    reference."""

    table: Tensor
    launches: tuple[tuple[tuple[str, ...], Tensor], ...]
    left: tuple[int, ...]


@dataclass(frozen=True)
class StreamCall:
    """What the launches of one call have in common. ``head``: int64 [HEAD]; ``addresses``: int64 [B, roles], zero where
    there is no tensor or its parameter is left to the reference."""

    plan: StreamPlan
    head: Tensor
    addresses: Tensor


def prepare(
    op: str, roles: Roles, bits: Tensor | None, offsets: Sequence[int], head: list[int], steps: Sequence[Tensor] = ()
) -> StreamCall:
    """The plan of a call, made once, and its addresses, in one table with `head`; `steps` are a last column.

    Raises:
        ValueError: lists that do not belong together, masks that do not lie in `bits`.
    """
    given = {name: tensors for name, tensors in roles.items() if tensors is not None}
    _check(op, given, bits, offsets)
    first = next(iter(given.values()))
    addresses = {name: [t.data_ptr() for t in tensors] for name, tensors in given.items()}
    streams = Streams(
        tuple([t.numel() for t in first]),
        tuple(offsets),
        tuple([tuple([t.dtype for t in tensors]) for tensors in given.values()]),
        tuple([tuple([t.is_contiguous() for t in tensors]) for tensors in given.values()]),
        tuple([tuple([address % VECTOR_BYTES for address in column]) for column in addresses.values()]),
    )
    plan = plan_streams(streams, None if bits is None else bits.numel(), first[0].device)
    columns = [addresses.get(name, [0] * len(first)) for name in roles]
    if steps:
        columns.append([step.data_ptr() for step in steps])
    for b in plan.left:
        for column in columns:
            column[b] = 0
    rows = itertools.chain.from_iterable(zip(*columns, strict=True))
    table = device_table(first[0], [*head, *[0] * (HEAD - len(head)), *rows])
    return StreamCall(plan, table[:HEAD], table[HEAD:])


def _check(op: str, given: dict[str, Sequence[Tensor]], bits: Tensor | None, offsets: Sequence[int]) -> None:
    first_name, first = next(iter(given.items()))
    lengths = {name: len(tensors) for name, tensors in given.items()} | {"offsets": len(offsets)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{op}: wanted one entry a parameter in each list, got {lengths}")
    device = first[0].device
    shapes, devices = [t.shape for t in first], [device] * len(first)
    for name, tensors in given.items():
        if [t.shape for t in tensors] != shapes or [t.device for t in tensors] != devices:
            b = next(b for b, t in enumerate(tensors) if t.shape != shapes[b] or t.device != device)
            raise ValueError(
                f"{op}: {name}[{b}] must be {list(shapes[b])} as {first_name}[{b}], on {device} as {first_name}[0], "
                f"got {list(tensors[b].shape)} on {tensors[b].device}"
            )
    if bits is not None and (bits.dtype != torch.uint8 or not bits.is_contiguous() or bits.device != device):
        raise ValueError(
            f"{op}: bits must be contiguous uint8 on {device}, got {bits.dtype} {list(bits.shape)} on {bits.device}"
        )


@functools.lru_cache(maxsize=64)
def plan_streams(streams: Streams, nbytes: int | None, device: torch.device) -> StreamPlan:
    """The tables of one call with masks in a buffer of `nbytes`, made once for parameters that lie alike.

    Raises:
        ValueError: a mask that does not lie in the buffer. RuntimeError: while a CUDA graph is captured.
    """
    refuse_capture(device)
    grids: dict[tuple[str, ...], list[tuple[int, int, int]]] = {}
    values, left = [], []
    for b, (numel, offset) in enumerate(zip(streams.numels, streams.offsets, strict=True)):
        if offset < -1 or (nbytes is not None and offset >= 0 and offset + -(-numel // 8) > nbytes):
            raise ValueError(f"mask {b} of {numel} bits at byte {offset} is not within {nbytes} bytes")
        types = streams.types(b)
        if not types:
            left.append(b)
        elif numel:
            grids.setdefault(types, []).append((b, 1, triton.cdiv(numel, CHUNK)))
        values += [numel, offset, int(streams.aligned(b))]
    like = torch.empty(0, device=device)
    launches = tuple((types, grid_table(like, members)) for types, members in grids.items())
    return StreamPlan(device_table(like, values).view(-1, COLUMNS.value), launches, tuple(left))


def at_indices(values: Sequence[Any] | None, indices: Sequence[int]) -> list[Any]:
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
        return double_word(value.item())  # sync: none, it is on the host
    word: int = struct.unpack("<q", struct.pack("<fi", value.item(), 0))[0]  # sync: none
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
