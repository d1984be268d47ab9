"""The table of ops: schema, fake, and the plain-torch reference as the default on every device.

Backends implement these leaves and nothing else: C++ and CUDA register kernels in `csrc/`, Triton in
`rpg_fast/kernels/`; the dispatcher picks a kernel by device. A missing extension leaves the reference. `python -m
rpg_fast` prints who serves what.

Conventions of the table
    bits       one uint8 buffer [nbytes]; bit i of the segment that starts at byte `offsets[b]` (bit ``i % 8`` of byte
               ``offsets[b] + i // 8``) belongs to element i, in row-major order of the view that is passed, of the
               b-th tensor. Segments start at multiples of `masks.SEGMENT_BYTES`; padding bits are zero. An offset of
               -1 means "no mask".
    0-d        `tail_energy`, `weight`, `lr`, `scale` are 0-d tensors, on the CPU (a constant) or on the device (live in
               a captured graph).
    projector  the matrices N_b = -2 ((1 - e) I - P), [m_b, m_b] row-major one after another in one flat buffer.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpg_fast import _extension, filtered, grouping, ledger, reference

NAMESPACE = "rpg_fast"
_library = torch.library.Library(NAMESPACE, "DEF")

SCHEMAS: dict[str, str] = {}


def _define(schema: str, meaning: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    SCHEMAS[name] = schema
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(name, meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _count_versions(name)


def _count_versions(name: str) -> None:
    """Makes an op that writes to its arguments count their versions up, as every op of torch does: a backward that
    needs the values from before then raises instead of being wrong."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    written = [
        i for i, argument in enumerate(op._schema.arguments) if argument.alias_info and argument.alias_info.is_write
    ]
    if not written:
        return

    def count_and_go_on(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _library.impl(name, count_and_go_on, "ADInplaceOrView", with_keyset=True)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether a kernel of its own, other than the reference, serves the op for "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key)


def _no_output(*_args: Any, **_kwargs: Any) -> None:
    return None


# ------------------------------------------------------------ rank loss


def _rank_project_fake(weights: list[Tensor], tail_energy: Tensor, min_sparsity: float) -> tuple[Tensor, ...]:
    batch, dtype = len(weights), reference.accumulation_dtype(weights)
    like = weights[0]
    return (
        like.new_empty((), dtype=dtype),
        like.new_empty(batch, dtype=torch.float64),
        like.new_empty(batch, dtype=torch.int64),
        like.new_empty(batch, dtype=torch.float64),
        like.new_empty(batch, dtype=torch.float64),
        like.new_empty(grouping.projector_offsets(weights)[-1], dtype=dtype),
    )


_define(
    "rank_project(Tensor[] weights, Tensor tail_energy, float min_sparsity)"
    " -> (Tensor loss, Tensor tail_energies, Tensor ranks, Tensor inv_norms, Tensor shares, Tensor projector)",
    reference.rank_project,
    _rank_project_fake,
)
_define(
    "rank_filter(Tensor[] weights, Tensor tail_energy, float min_sparsity, Tensor windows, Tensor seed, int rounds,"
    " int[] by_eigen) -> (Tensor loss, Tensor tail_energies, Tensor ranks, Tensor inv_norms, Tensor shares,"
    " Tensor projector, Tensor next_windows, Tensor lost)",
    filtered.rank_filter,
    lambda weights, tail_energy, min_sparsity, windows, seed, rounds, by_eigen: (
        *_rank_project_fake(weights, tail_energy, min_sparsity),
        torch.empty_like(windows),
        windows.new_empty(len(weights), dtype=torch.bool),
    ),
)
_define(
    "rank_attach(Tensor[] weights, Tensor loss, Tensor projector, Tensor inv_norms, Tensor shares, bool fast)"
    " -> Tensor",
    lambda weights, loss, projector, inv_norms, shares, fast: loss.clone(),
    lambda weights, loss, projector, inv_norms, shares, fast: torch.empty_like(loss),
)
_define(
    "rank_apply(Tensor[] weights, Tensor projector, Tensor inv_norms, Tensor shares, Tensor weight, bool fast=False)"
    " -> Tensor[]",
    reference.rank_apply,
    lambda weights, projector, inv_norms, shares, weight, fast=False: [torch.empty_like(w) for w in weights],
)
_define(
    "rank_apply_(Tensor(a!)[] grads, Tensor[] weights, Tensor projector, Tensor inv_norms, Tensor shares,"
    " Tensor weight, bool fast=False) -> ()",
    reference.rank_apply_,
    _no_output,
)


def _attach_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, _loss, projector, inv_norms, shares, ctx.fast = inputs
    ctx.save_for_backward(*weights, projector, inv_norms, shares)


def _attach_backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
    *weights, projector, inv_norms, shares = ctx.saved_tensors
    grads = torch.ops.rpg_fast.rank_apply(weights, projector, inv_norms, shares, grad_loss, ctx.fast)
    return grads, None, None, None, None, None


def _apply_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "rank_loss is differentiable once: its gradient has no derivative (double backward is not defined)"
    )


torch.library.register_autograd(
    f"{NAMESPACE}::rank_attach", _attach_backward, setup_context=_attach_setup, lib=_library
)
torch.library.register_autograd(f"{NAMESPACE}::rank_apply", _apply_backward, lib=_library)


# ------------------------------------------------------------ pieces of rank_filter

_define(
    "device_table(Tensor like, int[] values) -> Tensor",
    lambda like, values: torch.tensor(values, dtype=torch.int64, device=like.device),
    lambda like, values: like.new_empty(len(values), dtype=torch.int64),
)
_define(
    "filter_open_(Tensor(a!) ledger, Tensor(b!) stages, Tensor(c!) settled, Tensor(d!) aims, Tensor(e!) coefficients,"
    " Tensor moments, Tensor tile_starts, Tensor orders, Tensor norms, Tensor scales, Tensor target, Tensor windows,"
    " Tensor grid, Tensor table) -> ()",
    ledger.filter_open_,
    _no_output,
)
_define(
    "filter_range_(Tensor(a!) Q, Tensor Z, Tensor orders, Tensor row_starts, Tensor stages, float floor) -> ()",
    ledger.filter_range_,
    _no_output,
)
_define(
    "filter_principal_(Tensor(a!) Q, Tensor(b!) ledger, Tensor Z, Tensor orders, Tensor row_starts, Tensor stages,"
    " float floor) -> ()",
    ledger.filter_principal_,
    _no_output,
)
_define(
    "filter_conclude_(Tensor(a!) ledger, Tensor(b!) stages, Tensor(c!) settled, Tensor(d!) aims,"
    " Tensor(e!) coefficients, Tensor(f!) Z, Tensor Q, Tensor images, Tensor traces, Tensor tile_starts, Tensor orders,"
    " Tensor row_starts, Tensor target, Tensor grid, Tensor table) -> ()",
    ledger.filter_conclude_,
    _no_output,
)
_define(
    "small_spectrum_(Tensor(a!) ledger, Tensor(b!) projector, Tensor members, Tensor pairs, Tensor tiles,"
    " Tensor tile_starts, Tensor orders, Tensor offsets, Tensor norms, Tensor scales, Tensor target) -> ()",
    ledger.small_spectrum_,
    _no_output,
)
_define("small_eigh_(Tensor(a!) values, Tensor(b!) vectors, Tensor matrices) -> ()", ledger.small_eigh_, _no_output)

# ------------------------------------------------------------ masks

_define(
    "pack(Tensor[] masks, int[] offsets, int nbytes) -> Tensor",
    reference.pack,
    lambda masks, offsets, nbytes: masks[0].new_empty(nbytes, dtype=torch.uint8),
)
_define(
    "unpack(Tensor bits, int[] offsets, int[] numels) -> Tensor[]",
    reference.unpack,
    lambda bits, offsets, numels: [bits.new_empty(numel, dtype=torch.bool) for numel in numels],
)
_define(
    "popcount(Tensor bits, int[] offsets, int[] numels) -> Tensor",
    reference.popcount,
    lambda bits, offsets, numels: bits.new_empty(len(offsets), dtype=torch.int64),
)
_define(
    "mask_(Tensor(a!)[] tensors, Tensor bits, int[] offsets, Tensor? scale) -> ()",
    reference.mask_,
    _no_output,
)
_define(
    "select_topk(Tensor[] scores, Tensor counts, int[] offsets, int nbytes, Tensor? eligible, bool absolute,"
    " bool per_tensor) -> Tensor",
    reference.select_topk,
    lambda scores, counts, offsets, nbytes, eligible, absolute, per_tensor: scores[0].new_empty(
        nbytes, dtype=torch.uint8
    ),
)

# ------------------------------------------------------------ optimizers

_define(
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor? bits, int[] offsets,"
    " Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step,"
    " Tensor? grad_scale, Tensor? found_inf) -> ()",
    reference.masked_sgd_,
    _no_output,
)
_define(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor? bits, int[] offsets, Tensor lr, float beta1,"
    " float beta2, float eps, float weight_decay, bool amsgrad, bool maximize, Tensor? grad_scale,"
    " Tensor? found_inf) -> ()",
    reference.masked_adamw_,
    _no_output,
)


# ------------------------------------------------------------ backends


def _serve_by_triton() -> None:
    """Registers the launchers of `rpg_fast.kernels` for CUDA. They, and Triton, are imported when first called."""
    if importlib.util.find_spec("triton") is None:
        return
    served = {"rank_apply": "apply", "rank_apply_": "apply"}
    if has_kernel("device_table", "CUDA"):  # without it, addresses reach the device by a copy that the host waits for
        served |= {"mask_": "optim", "masked_sgd_": "optim", "masked_adamw_": "optim"}
    if has_kernel("filter_conclude_", "CUDA"):  # the blocks between the products, without which the host would read
        served["rank_filter"] = "rank_filter"

    def launcher(op: str, module: str) -> Callable[..., Any]:
        return lambda *args: getattr(importlib.import_module(f"rpg_fast.kernels.{module}"), op)(*args)

    for op, module in served.items():
        _library.impl(op, launcher(op, module), "CUDA")


_library.impl("rank_filter", filtered.rank_filter_on_host, "CPU")
_extension.load()
_serve_by_triton()
