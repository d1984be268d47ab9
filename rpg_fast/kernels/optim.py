"""Masks and masked optimizer steps at the speed of memory: all tensors of equal dtypes in one launch, one bit of mask a
weight.

A program takes one chunk of one parameter. Weight, gradient and state are read and written once, 16 bytes a thread (8
of 16-bit tensors beside float32 ones), and each octet of the mask by the threads that hold its weights. Bytes a weight,
beside that eighth of one:

    mask_           8 in float32, 4 in 16 bits
    masked_sgd_     20 in float32, 14 with 16-bit weights and gradients and a float32 momentum; 12 and 6 without one
    masked_adamw_   28 and 22; with amsgrad 36 and 30

AdamW's step counts, and what follows from them for a whole tensor, take a small launch before. Chunks of tensors that
are not aligned, and the last one of a tensor that is no multiple of 16 elements, are read and written element by
element. A gradient that does not lie as its weight does is copied first; whatever else is not contiguous, or of another
dtype, is left to the reference.

Every operation rounds, in the order of `csrc/optim.h`: no multiplication is fused with an addition.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast import reference
from rpg_fast.kernels.streams import (
    CHUNK,
    Roles,
    at_indices,
    base_of,
    chunk_of,
    dense,
    double_word,
    lanes,
    load,
    on_device,
    places,
    prepare,
    scalar,
    store_kept,
    word_of,
)

COUNTS = 128  # step counts of a program
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
RATES = tl.constexpr(4)  # columns of what follows from the step counts, three of them used


def mask_(tensors: Sequence[Tensor], bits: Tensor, offsets: Sequence[int], scale: Tensor | None) -> None:
    """`reference.mask_`, for float32, bfloat16 and float16 tensors in one launch a dtype."""
    concerned = [b for b, offset in enumerate(offsets) if offset >= 0 or scale is not None]
    if not concerned:
        return
    tensors, offsets = at_indices(tensors, concerned), at_indices(offsets, concerned)
    call = prepare("mask_", {"tensors": tensors}, bits, offsets, [] if scale is None else [word_of(scale)])
    factor = None if scale is None else scalar(scale, call.head)
    with torch.cuda.device_of(bits):
        for (dtype,), chunks in call.plan.launches:
            _mask_kernel[(len(chunks),)](
                call.addresses, call.plan.table, chunks, bits, factor,
                TYPE=dtype, LANES=lanes([dtype]), CHUNK=CHUNK, **OPTIONS,
            )  # fmt: skip
    left = partial(at_indices, indices=call.plan.left)
    reference.mask_(left(tensors), bits, left(offsets), scale)


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    bits: Tensor | None,
    offsets: Sequence[int],
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """`reference.masked_sgd_`, for float32, bfloat16 and float16 parameters in one launch for each set of dtypes."""
    if not params:
        return
    buffers = momentum_buffers if momentum != 0 else None
    roles: Roles = {"params": params, "grads": dense(grads), "momentum_buffers": buffers}
    call = prepare("masked_sgd_", roles, bits, offsets, [word_of(lr)])
    with torch.cuda.device_of(params[0]):
        for types, chunks in call.plan.launches:
            _sgd_kernel[(len(chunks),)](
                call.addresses, call.plan.table, chunks, bits,
                scalar(lr, call.head), on_device(grad_scale, params[0]), on_device(found_inf, params[0]),
                _sign(maximize), weight_decay, momentum, 1 - dampening, int(first_step),
                **_types(types), DECAY=weight_decay != 0, MOMENTUM=momentum != 0, NESTEROV=nesterov,
                LANES=lanes(types), CHUNK=CHUNK, **OPTIONS,
            )  # fmt: skip
    left = partial(at_indices, indices=call.plan.left)
    reference.masked_sgd_(
        left(params), left(grads), left(buffers), bits, left(offsets),
        lr, momentum, dampening, weight_decay, nesterov, maximize, first_step, grad_scale, found_inf,
    )  # fmt: skip


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    bits: Tensor | None,
    offsets: Sequence[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """`reference.masked_adamw_`, for float32, bfloat16 and float16 parameters in one launch for each set of dtypes and
    a small one before them, which counts the steps up."""
    if not params:
        return
    _check_steps(steps, params)
    maxima = max_exp_avg_sqs if amsgrad else None
    roles: Roles = {"params": params, "grads": dense(grads), "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    roles["max_exp_avg_sqs"] = maxima
    head = [word_of(lr), *(double_word(x) for x in (_logarithm(beta1), _logarithm(beta2), weight_decay))]
    call = prepare("masked_adamw_", roles, bits, offsets, head, steps)
    found = on_device(found_inf, params[0])
    rates = call.addresses.new_empty((len(params), RATES.value), dtype=torch.float32)
    with torch.cuda.device_of(params[0]):
        if len(call.plan.left) < len(params):
            _count_kernel[(triton.cdiv(len(params), COUNTS),)](
                call.addresses, rates, call.head.view(torch.float64), scalar(lr, call.head), found, len(params),
                COUNTS=COUNTS,
            )  # fmt: skip
        for types, chunks in call.plan.launches:
            _adamw_kernel[(len(chunks),)](
                call.addresses, call.plan.table, chunks, bits,
                rates, on_device(grad_scale, params[0]), found,
                _sign(maximize), 1 - beta1, beta2, 1 - beta2, eps,
                **_types(types), AMSGRAD=amsgrad, LANES=lanes(types), CHUNK=CHUNK, **OPTIONS,
            )  # fmt: skip
    left = partial(at_indices, indices=call.plan.left)
    reference.masked_adamw_(
        left(params), left(grads), left(exp_avgs), left(exp_avg_sqs), left(maxima), left(steps), bits, left(offsets),
        lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, grad_scale, found_inf,
    )  # fmt: skip


def _check_steps(steps: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    if len(steps) != len(params):
        raise ValueError(f"masked_adamw_: wanted {len(params)} steps, got {len(steps)}")
    for b, (step, param) in enumerate(zip(steps, params, strict=True)):
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != param.device:
            raise ValueError(
                f"masked_adamw_: steps[{b}] must be one float32 on {param.device}, "
                f"got {step.dtype} {list(step.shape)} on {step.device}"
            )


def _types(types: tuple[str, ...]) -> dict[str, str]:
    return {"TYPE": types[0], "GRAD": types[1], "STATE": types[-1]}


def _sign(maximize: bool) -> float:
    return -1.0 if maximize else 1.0


def _logarithm(beta: float) -> float:
    return -math.inf if beta == 0 else math.log(beta)


@triton.jit
def _mask_chunk(
    address_ptr, row_ptr, begin, bits_ptr, scale_ptr,
    TYPE: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at, there, keep = places(row_ptr, begin, bits_ptr, LANES, CHUNK, WIDE)
    pointers = base_of(address_ptr, begin, TYPE, WIDE) + at
    x = load(pointers, there)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr).to(tl.float32)
    store_kept(pointers, x, keep, there)


@triton.jit(do_not_specialize_on_alignment=["scale_ptr"])
def _mask_kernel(
    addresses_ptr,  # int64 [B, 1]
    table_ptr,  # int64 [B, 3]
    chunks_ptr,  # int32 [T, 3]
    bits_ptr,  # uint8 [nbytes]
    scale_ptr,  # fp32 or fp64 [1], or None
    TYPE: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b, row_ptr, begin, wide = chunk_of(chunks_ptr + 3 * tl.program_id(0), table_ptr, CHUNK)
    if wide:
        _mask_chunk(addresses_ptr + b, row_ptr, begin, bits_ptr, scale_ptr, TYPE, LANES, CHUNK, True)
    else:
        _mask_chunk(addresses_ptr + b, row_ptr, begin, bits_ptr, scale_ptr, TYPE, 1, CHUNK, False)


@triton.jit
def _sgd_chunk(
    address_ptr, row_ptr, begin, bits_ptr, lr, grad_scale_ptr, sign, weight_decay, momentum, fresh, first_step,
    TYPE: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    LANES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at, there, keep = places(row_ptr, begin, bits_ptr, LANES, CHUNK, WIDE)
    weights = base_of(address_ptr, begin, TYPE, WIDE) + at
    p = load(weights, there)
    g = load(base_of(address_ptr + 1, begin, GRAD, WIDE) + at, there)
    if MOMENTUM:
        buffers = base_of(address_ptr + 2, begin, STATE, WIDE) + at
        m = load(buffers, there)
    if grad_scale_ptr is not None:
        g = tl.div_rn(g, tl.load(grad_scale_ptr))
    g *= sign
    if DECAY:
        g += weight_decay * p
    if MOMENTUM:
        m = tl.where(first_step != 0, g, momentum * m + fresh * g)
        store_kept(buffers, m, keep, there)
        g = g + momentum * m if NESTEROV else m
    store_kept(weights, p - lr * g, keep, there)


@triton.jit(do_not_specialize=["first_step"], do_not_specialize_on_alignment=["lr_ptr"])
def _sgd_kernel(
    addresses_ptr,  # int64 [B, 3], of weight, gradient, momentum
    table_ptr,  # int64 [B, 3]
    chunks_ptr,  # int32 [T, 3]
    bits_ptr,  # uint8 [nbytes], or None
    lr_ptr,  # fp32 or fp64 [1]
    grad_scale_ptr,  # fp32 [1], or None
    found_inf_ptr,  # fp32 [1], or None
    sign,
    weight_decay,
    momentum,
    fresh,  # 1 - dampening
    first_step,
    TYPE: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    if found_inf_ptr is not None:  # noqa: SIM102 (an `and` would evaluate both sides)
        if tl.load(found_inf_ptr) != 0:
            return
    b, row_ptr, begin, wide = chunk_of(chunks_ptr + 3 * tl.program_id(0), table_ptr, CHUNK)
    address_ptr = addresses_ptr + 3 * b
    lr = tl.load(lr_ptr).to(tl.float32)
    if wide:
        _sgd_chunk(
            address_ptr, row_ptr, begin, bits_ptr, lr, grad_scale_ptr, sign, weight_decay, momentum, fresh, first_step,
            TYPE, GRAD, STATE, DECAY, MOMENTUM, NESTEROV, LANES, CHUNK, True,
        )  # fmt: skip
    else:
        _sgd_chunk(
            address_ptr, row_ptr, begin, bits_ptr, lr, grad_scale_ptr, sign, weight_decay, momentum, fresh, first_step,
            TYPE, GRAD, STATE, DECAY, MOMENTUM, NESTEROV, 1, CHUNK, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["lr_ptr"])
def _count_kernel(
    addresses_ptr,  # int64 [B, 6], the last one of the step count, 0 where none is to be counted
    rates_ptr,  # fp32 [B, 4]: lr / (1 - beta1^t), sqrt(1 - beta2^t), lr * weight_decay
    head_ptr,  # fp64 [4]: behind the first, log(beta1), log(beta2), weight_decay
    lr_ptr,  # fp32 or fp64 [1]
    found_inf_ptr,  # fp32 [1], or None
    B,
    COUNTS: tl.constexpr,
):
    if found_inf_ptr is not None:  # noqa: SIM102 (an `and` would evaluate both sides)
        if tl.load(found_inf_ptr) != 0:
            return
    b = tl.program_id(0) * COUNTS + tl.arange(0, COUNTS)
    addresses = tl.load(addresses_ptr + 6 * b + 5, mask=b < B, other=0)
    there = addresses != 0
    counts = addresses.to(tl.pointer_type(tl.float32))
    t = tl.load(counts, mask=there, other=0.0) + 1
    tl.store(counts, t, mask=there)
    t = t.to(tl.float64)
    lr = tl.load(lr_ptr)
    rate = lr.to(tl.float64) / (1 - tl.exp(t * tl.load(head_ptr + 1)))
    root2 = tl.sqrt(1 - tl.exp(t * tl.load(head_ptr + 2)))
    decay = (lr * tl.load(head_ptr + 3).to(lr.dtype)).to(tl.float32)  # in lr's own precision, as torch does
    row = rates_ptr + RATES * b
    tl.store(row, rate.to(tl.float32), mask=there)
    tl.store(row + 1, root2.to(tl.float32), mask=there)
    tl.store(row + 2, tl.zeros_like(b).to(tl.float32) + decay, mask=there)


@triton.jit
def _adamw_chunk(
    address_ptr, row_ptr, begin, bits_ptr, rates_ptr, grad_scale_ptr, sign, fresh1, beta2, fresh2, eps,
    TYPE: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, AMSGRAD: tl.constexpr,
    LANES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at, there, keep = places(row_ptr, begin, bits_ptr, LANES, CHUNK, WIDE)
    weights = base_of(address_ptr, begin, TYPE, WIDE) + at
    means = base_of(address_ptr + 2, begin, STATE, WIDE) + at
    squares = base_of(address_ptr + 3, begin, STATE, WIDE) + at
    p = load(weights, there)
    g = load(base_of(address_ptr + 1, begin, GRAD, WIDE) + at, there)
    m = load(means, there)
    v = load(squares, there)
    if AMSGRAD:
        maxima = base_of(address_ptr + 4, begin, STATE, WIDE) + at
        largest = load(maxima, there)
    rate = tl.load(rates_ptr)
    root2 = tl.load(rates_ptr + 1)
    decay = tl.load(rates_ptr + 2)

    if grad_scale_ptr is not None:
        g = tl.div_rn(g, tl.load(grad_scale_ptr))
    g *= sign
    m += fresh1 * (g - m)
    store_kept(means, m, keep, there)
    v = beta2 * v + fresh2 * g * g
    store_kept(squares, v, keep, there)
    if AMSGRAD:
        v = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
        store_kept(maxima, v, keep, there)
    # The exact root and quotients take a slow way for zeros, which pruned weights have: they compute with ones.
    v = tl.where(keep, v, 1.0)
    m = tl.where(keep, m, 1.0)
    p -= decay * p
    p -= tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
    store_kept(weights, p, keep, there)


@triton.jit
def _adamw_kernel(
    addresses_ptr,  # int64 [B, 6], of weight, gradient, exp_avg, exp_avg_sq, its maximum, step count
    table_ptr,  # int64 [B, 3]
    chunks_ptr,  # int32 [T, 3]
    bits_ptr,  # uint8 [nbytes], or None
    rates_ptr,  # fp32 [B, 4]
    grad_scale_ptr,  # fp32 [1], or None
    found_inf_ptr,  # fp32 [1], or None
    sign,
    fresh1,  # 1 - beta1
    beta2,
    fresh2,  # 1 - beta2
    eps,
    TYPE: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    if found_inf_ptr is not None:  # noqa: SIM102 (an `and` would evaluate both sides)
        if tl.load(found_inf_ptr) != 0:
            return
    b, row_ptr, begin, wide = chunk_of(chunks_ptr + 3 * tl.program_id(0), table_ptr, CHUNK)
    address_ptr = addresses_ptr + 6 * b
    rates_ptr += RATES * b
    if wide:
        _adamw_chunk(
            address_ptr, row_ptr, begin, bits_ptr, rates_ptr, grad_scale_ptr, sign, fresh1, beta2, fresh2, eps,
            TYPE, GRAD, STATE, AMSGRAD, LANES, CHUNK, True,
        )  # fmt: skip
    else:
        _adamw_chunk(
            address_ptr, row_ptr, begin, bits_ptr, rates_ptr, grad_scale_ptr, sign, fresh1, beta2, fresh2, eps,
            TYPE, GRAD, STATE, AMSGRAD, 1, CHUNK, False,
        )  # fmt: skip
