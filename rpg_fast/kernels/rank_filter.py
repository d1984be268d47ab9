"""`filtered.rank_filter` on a GPU: one launch a step for all weights, nothing read by the host, capturable.

    gram.py      G of every weight, from where it lies
    filter.py    the step function of each window, by products of fp16 pairs
    thin.py      the sketch of what the step leaves open, and the projector
    csrc         one block a matrix: bases, the rank rule, where to look next, and whole spectra where m <= 64

A matrix that a round has resolved has no stages in the next one: its programs exit at once. What is known of a matrix
stays on the device, in the ledger (see `rpg_fast.ledger`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rpg_fast import filtered, grouping, reference
from rpg_fast.kernels import filter as steps
from rpg_fast.kernels import thin
from rpg_fast.kernels.gram import Grams, normalised_grams
from rpg_fast.kernels.weights import DTYPES, device_table, refuse_capture
from rpg_fast.ledger import COLUMNS

# Columns of the ledger.
K, E, TAU, HALF = (tl.constexpr(COLUMNS.index(name)) for name in ("k", "e", "tau", "half"))
WHOLE, ZEROS, NAN, LEFT_ALONE = (tl.constexpr(float(fill)) for fill in range(4))  # what `thin.finish` does with N


@dataclass(frozen=True)
class Roles:
    """Who does what, as tables: ``filtered``: int32 [B], 1 for a weight that the filter does; ``small``: int32 [S], the
    weights with m <= SMALL; ``least_zeros``: int64 [B], how many zeros make it active; ``offsets``: int64 [B], where
    each N starts."""

    filtered: Tensor
    small: Tensor
    least_zeros: Tensor
    offsets: Tensor


@functools.lru_cache(maxsize=64)
def roles_of(
    shapes: tuple[tuple[int, ...], ...], min_sparsity: float, by_eigen: tuple[int, ...], device: torch.device
) -> Roles:
    refuse_capture(device)
    like = torch.empty(0, device=device)
    weights = [torch.empty(shape, device="meta") for shape in shapes]
    short = [grouping.short_side(w) for w in weights]
    small = [b for b, m in enumerate(short) if m <= filtered.SMALL and b not in by_eigen]
    takes_part = [int(m > filtered.SMALL and b not in by_eigen) for b, m in enumerate(short)]
    return Roles(
        filtered=device_table(like, takes_part).int(),
        small=device_table(like, small).int(),
        least_zeros=device_table(like, [_least_zeros(w.numel(), min_sparsity) for w in weights]),
        offsets=device_table(like, grouping.projector_offsets(weights)[:-1]),
    )


def _least_zeros(elements: int, sparsity: float) -> int:
    """The smallest number of zeros with zeros / elements >= sparsity, as floats divide."""
    zeros = max(0, math.ceil(elements * sparsity) - 1)
    return zeros if zeros / elements >= sparsity else zeros + 1


def rank_filter(
    weights: Sequence[Tensor],
    tail_energy: Tensor,
    min_sparsity: float,
    windows: Tensor,
    seed: Tensor,
    rounds: int,
    by_eigen: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`filtered.rank_filter` for float32, bfloat16 and float16 weights; with an empty one, or one of float64, it is
    that function. `by_eigen` costs one eigendecomposition in float64 for each weight."""
    if not all(w.dtype in DTYPES and w.numel() > 0 for w in weights):
        return filtered.rank_filter(weights, tail_energy, min_sparsity, windows, seed, rounds, by_eigen)
    device = weights[0].device
    ops = torch.ops.rpg_fast
    target = tail_energy.to(device=device, dtype=torch.float64)
    roles = roles_of(tuple(tuple(w.shape) for w in weights), min_sparsity, tuple(by_eigen), device)
    # Below autograd's wrappers: the ops that follow write to buffers of this call alone, whose versions nobody counts.
    with torch.cuda.device_of(weights[0]), torch._C._AutoDispatchBelowADInplaceOrView():
        grams = normalised_grams(weights)
        plan, G = grams.plan, grams.pairs
        ledger = torch.empty(len(weights), len(COLUMNS), dtype=torch.float64, device=device)
        projector = torch.empty(grouping.projector_offsets(weights)[-1], dtype=torch.float32, device=device)
        settled, Z, Q, ring = _filter(grams, roles, target, windows, seed, rounds, ledger)
        ops.small_spectrum_(
            ledger, projector, roles.small, G, plan.tiles, plan.tile_starts, plan.orders, roles.offsets,
            grams.norms, grams.scales, target,
        )  # fmt: skip
        for b in by_eigen:
            _by_eigendecomposition(weights[b], target, ledger[b], projector[grouping.projector_offsets(weights)[b] :])
        outcome = _conclude(grams, roles, ledger)
        thin.finish(Z, Q, outcome.ends, settled, roles.offsets, plan, ring=ring, out=projector)
    o = outcome
    return o.loss, o.tails, o.ranks, o.inv_norms, o.shares, projector, o.windows, o.lost


def _filter(
    grams: Grams, roles: Roles, target: Tensor, windows: Tensor, seed: Tensor, rounds: int, ledger: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(settled, Z, Q, ring) with P = (I + Y) / 2 - Z Q^T - Q Z^T for what is resolved; k, e and the windows in the
    ledger."""
    plan, G, device = grams.plan, grams.pairs, grams.pairs.device
    batch, tiles = len(plan.sizes), len(plan.tiles)
    ops = torch.ops.rpg_fast
    grid, table = filtered.step_table(device)
    stages, settled = roles.filtered.clone(), torch.empty_like(roles.filtered)
    aims = torch.empty(batch, 2, dtype=torch.float32, device=device)
    coefficients = torch.empty(batch, filtered.STAGES, 3, dtype=torch.float32, device=device)
    sums = torch.empty(tiles, 3, dtype=torch.float32, device=device)  # of a tile
    square = torch.empty_like(G)
    ring = torch.empty(3, *G.shape, dtype=G.dtype, device=device)
    Z, Q, GQ_YQ = (
        torch.empty(*shape, plan.rows, filtered.WIDTH, dtype=torch.float32, device=device) for shape in ((), (), (2,))
    )
    steps.square_with_moments(G, plan, out=square, moments=sums)
    ops.filter_open_(
        ledger, stages, settled, aims, coefficients, sums, plan.tile_starts, plan.orders, grams.norms, grams.scales,
        target, windows, grid, table,
    )  # fmt: skip
    shift = steps.shift(G, square, aims, stages, plan, ring=ring)
    compose = steps.compose(coefficients, stages, plan, ring=ring)
    inside = steps.inside(stages, plan, ring=ring, traces=sums)
    sharpen = steps.sharpen(G, stages, plan, ring=ring, traces=sums)
    sketch = thin.sketch(seed, stages, plan, ring=ring, out=Z)
    image = thin.image(Q, stages, plan, ring=ring, out=Z)
    images = thin.images(G, Q, stages, plan, ring=ring, out=GQ_YQ)
    for draw in range(rounds):
        shift()
        compose()
        inside()
        sharpen()
        sketch(draw)
        ops.filter_range_(Q, Z, plan.orders, plan.row_starts, stages, filtered.NOISE)
        image()
        ops.filter_principal_(Q, ledger, Z, plan.orders, plan.row_starts, stages, filtered.JUNK**2)
        images()
        ops.filter_conclude_(
            ledger, stages, settled, aims, coefficients, Z, Q, GQ_YQ, sums, plan.tile_starts, plan.orders,
            plan.row_starts, target, grid, table,
        )  # fmt: skip
    return settled, Z, Q, ring


def _by_eigendecomposition(weight: Tensor, target: Tensor, row: Tensor, projector: Tensor) -> None:
    """k and e into the ledger's row, N into the front of `projector`."""
    G, norm = reference.normalised_gram(grouping.short_side_first(weight))
    P, k, e, _ = reference.spectral_projector(G[None], target)
    m = len(G)
    finite, zero = norm.isfinite(), norm == 0
    N = 2 * P[0] - 2 * (1 - e) * torch.eye(m, dtype=G.dtype, device=G.device)
    N = torch.where(finite, torch.where(zero, 0.0, N), torch.nan)
    projector[: m * m].copy_(N.flatten())
    row[K.value] = torch.where(finite, torch.where(zero, 0, k[0]), -1).double()
    row[E.value] = torch.where(finite, torch.where(zero, 0.0, e[0]), torch.nan)


@dataclass(frozen=True)
class Outcome:
    """The results of `rank_filter` but for the projector; ``ends``: as `thin.finish` wants them."""

    loss: Tensor
    tails: Tensor
    ranks: Tensor
    inv_norms: Tensor
    shares: Tensor
    windows: Tensor
    lost: Tensor
    ends: Tensor


def _conclude(grams: Grams, roles: Roles, ledger: Tensor) -> Outcome:
    batch, device = len(ledger), ledger.device

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    o = Outcome(
        new(dtype=torch.float32), new(batch), new(batch, dtype=torch.int64), new(batch), new(batch), new(batch, 2),
        new(batch, dtype=torch.bool), new(batch, 2, dtype=torch.float32),
    )  # fmt: skip
    _conclude_kernel[(1,)](
        ledger, grams.norms, grams.zeros, roles.least_zeros, roles.filtered,
        o.loss, o.tails, o.ranks, o.inv_norms, o.shares, o.windows, o.lost, o.ends,
        batch, COLUMNS=len(COLUMNS), BLOCK=triton.next_power_of_2(batch),
    )  # fmt: skip
    return o


@triton.jit(do_not_specialize=["batch"])
def _conclude_kernel(
    ledger_ptr,  # float64 [B, COLUMNS]
    norms_ptr,  # float64 [B]
    zeros_ptr,  # int64 [B], as least_zeros
    least_zeros_ptr,
    filtered_ptr,  # int32 [B]
    loss_ptr,  # float32 0-d
    tails_ptr,  # float64 [B]
    ranks_ptr,  # int64 [B]
    inv_norms_ptr,  # float64 [B], as shares
    shares_ptr,
    windows_ptr,  # float64 [B, 2]
    lost_ptr,  # bool [B]
    ends_ptr,  # float32 [B, 2]
    batch,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program; the sums are of one order."""
    b = tl.arange(0, BLOCK)
    there = b < batch
    row = ledger_ptr + COLUMNS * b
    k = tl.load(row + K, mask=there, other=0.0)
    e = tl.load(row + E, mask=there, other=0.0)
    tau = tl.load(row + TAU, mask=there, other=0.0)
    half = tl.load(row + HALF, mask=there, other=0.0)
    norm = tl.load(norms_ptr + b, mask=there, other=0.0)
    enough = tl.load(zeros_ptr + b, mask=there, other=0) >= tl.load(least_zeros_ptr + b, mask=there, other=0)
    by_filter = tl.load(filtered_ptr + b, mask=there, other=0) != 0

    finite = norm - norm == 0
    lost = by_filter & finite & (k < 0)
    active = there & (norm != 0) & enough
    count = tl.sum(active.to(tl.float64))
    share = tl.where(active & (lost == 0), 1 / tl.maximum(count, 1.0), 0.0)
    tail = tl.where(lost | (finite == 0), float("nan"), e)
    tl.store(loss_ptr, -tl.sum(tl.where(share > 0, share * tail, 0.0)).to(tl.float32))
    tl.store(tails_ptr + b, tail, mask=there)
    tl.store(ranks_ptr + b, k.to(tl.int64), mask=there)
    tl.store(inv_norms_ptr + b, tl.where(norm != 0, 1 / norm, 0.0), mask=there)
    tl.store(shares_ptr + b, share, mask=there)
    tl.store(windows_ptr + 2 * b, tl.where(by_filter, tau, 0.0), mask=there)
    tl.store(windows_ptr + 2 * b + 1, tl.where(by_filter, half, 0.0), mask=there)
    tl.store(lost_ptr + b, lost, mask=there)
    fill = tl.where(finite, tl.where(lost | (norm == 0), ZEROS, WHOLE), NAN)
    tl.store(ends_ptr + 2 * b, (1 - e).to(tl.float32), mask=there)
    tl.store(ends_ptr + 2 * b + 1, tl.where(by_filter, fill, LEFT_ALONE), mask=there)
