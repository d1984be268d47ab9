"""The pieces of `rank_filter` that one block of threads does for one matrix, in plain torch: their meaning.

The kernels keep what they know of each matrix in a ledger, float64 [B, len(COLUMNS)], that only the device reads; here
its rows become the `Search` and `Window` of `filtered` and are written back. Square matrices of the kernels are those
of `filtered` times a power of two, ``scales``; thin ones lie one after another in one buffer [rows, w].

And the eigenproblems of `svd_lowrank`, which are done in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rpg_fast import filtered, reference
from rpg_fast.filtered import Search, Spectrum, Window

# tau and half: the window of the next round; once resolved, of the next call. used_half: what the table made of half.
# k and e: -1 and 1 of a matrix that is still open. found, seen: of the principal basis. The rest: `Search`, `Spectrum`.
COLUMNS = (
    *("tau", "half", "used_half", "k", "e"),
    *("start", "low", "high", "low_gap", "high_gap", "last", "last_gap", "restarted"),
    *("scale", "second", "third", "fourth", "found", "seen"),
)
SEARCH = COLUMNS[5:13]
BLOCK = 64  # pitch of a small matrix


def column(ledger: Tensor, name: str) -> Tensor:
    """[B]"""
    return ledger[:, COLUMNS.index(name)]


def _taking_part(stages: Tensor) -> Iterator[int]:
    yield from stages.nonzero()[:, 0].tolist()


def _sum_tiles(traces: Tensor, tile_starts: Tensor, b: int) -> Tensor:
    """The sums [1, 3] over the tiles of matrix b."""
    first, last = tile_starts[b].tolist()
    return traces[first:last].double().sum(0, keepdim=True)


def _rows_of(thin: Tensor, orders: Tensor, row_starts: Tensor, b: int) -> Tensor:
    """The view [..., m, w] of matrix b in a thin buffer [..., rows, w]."""
    first = int(row_starts[b])
    return thin[..., first : first + int(orders[b]), :]


def _search(ledger: Tensor, b: int, target: Tensor) -> Search:
    row = dict(zip(COLUMNS, ledger[b : b + 1].unbind(-1), strict=True))
    parts = {name: row[name] for name in SEARCH} | {"restarted": row["restarted"] != 0}
    return Search(Window(row["tau"], row["half"]), target.clamp(min=1e-9).expand_as(row["tau"]), **parts)


def _write(ledger: Tensor, b: int, **values: Tensor | float) -> None:
    for name, value in values.items():
        ledger[b, COLUMNS.index(name)] = value.double().squeeze() if isinstance(value, Tensor) else value


def _write_search(ledger: Tensor, b: int, search: Search) -> None:
    _write(ledger, b, tau=search.window.tau, half=search.window.half, **{n: getattr(search, n) for n in SEARCH})


def _choose_step(
    ledger: Tensor, b: int, m: int, stages: Tensor, aims: Tensor, coefficients: Tensor, grid: Tensor, table: Tensor
) -> None:
    row = dict(zip(COLUMNS, ledger[b], strict=True))
    moments = torch.stack([row["second"], row["third"], row["fourth"]])[None]
    bound = filtered.bound_on_shifted(moments, m, row["tau"][None])[0]
    wanted = (row["half"] / bound).clamp(filtered.NARROWEST, filtered.WIDEST)
    step = int((torch.searchsorted(grid, wanted, right=True) - 1).clamp(min=0))
    _write(ledger, b, used_half=grid[step] * bound)
    aims[b] = torch.stack([row["tau"] * row["scale"], 1 / (bound * row["scale"])]).float()
    coefficients[b] = table[step].float()
    stages[b] = int(((table[step, :, 1:] != 0).any(-1)).sum())


def filter_open_(
    ledger: Tensor,
    stages: Tensor,
    settled: Tensor,
    aims: Tensor,
    coefficients: Tensor,
    moments: Tensor,
    tile_starts: Tensor,
    orders: Tensor,
    norms: Tensor,
    scales: Tensor,
    target: Tensor,
    windows: Tensor,
    grid: Tensor,
    table: Tensor,
) -> None:
    """`Search.begin` and the step of the first round.

    Args:
        ledger: float64 [B, len(COLUMNS)], written.
        stages: int32 [B]. In: 0 for a matrix that takes no part; so does one whose norm is zero or not finite, k = 0,
            e = 0 or k = -1, e = NaN. Out: how many stages the step of the first round has.
        settled: int32 [B], zeroed.
        aims: float32 [B, 2], tau and 1 / u in the scale of the kernels, written as coefficients, float32 [B, S, 3].
        moments: float32 [T, 3], what each tile adds to <G, G>, <G, G^2> and <G^2, G^2>.
        tile_starts: int32 [B, 2], first tile and past the last.
        orders: int32 [B], m.
        norms, scales: float64 and float32 [B].
        target: float64 0-d, the tail energy.
        windows: float64 [B, 2] of the last call, zeros for a search from scratch.
        grid, table: `filtered.step_table`.
    """
    for b in range(len(orders)):
        m, scale, norm = int(orders[b]), float(scales[b]), float(norms[b])
        powers = torch.tensor([scale**2, scale**3, scale**4], dtype=torch.float64, device=ledger.device)
        known = _sum_tiles(moments, tile_starts, b) / powers
        like = torch.empty(1, m, m, device="meta")
        search = Search.begin(Spectrum(like, like, known), target, Window(*windows[b : b + 1].unbind(-1)))
        ledger[b] = 0
        _write_search(ledger, b, search)
        second, third, fourth = known[0]
        _write(ledger, b, scale=scale, second=second, third=third, fourth=fourth, k=-1.0, e=1.0)
        settled[b] = 0
        if norm == 0:
            _write(ledger, b, k=0.0, e=0.0)
        if norm - norm != 0:
            _write(ledger, b, e=torch.nan)
        if int(stages[b]) == 0 or norm == 0 or norm - norm != 0:
            stages[b] = 0
            _write(ledger, b, tau=0.0, half=0.0)
        else:
            _choose_step(ledger, b, m, stages, aims, coefficients, grid, table)


def filter_range_(Q: Tensor, Z: Tensor, orders: Tensor, row_starts: Tensor, stages: Tensor, floor: float) -> None:
    """Q <- an orthonormal basis of the columns of Z, where ``stages > 0``, without what is below `floor` of the
    largest: `filtered.whiten` with ``relative=True``, up to a rotation of the basis and a factor of w on the floor;
    zeros where Z is not finite.

    Args:
        Q, Z: float32 [rows, w], w a multiple of 4 up to 32; rows that pad a matrix are neither read nor written.
        orders, row_starts, stages: int32 [B].
    """
    for b in _taking_part(stages):
        sketched, basis = (_rows_of(thin, orders, row_starts, b) for thin in (Z, Q))
        if bool(sketched.isfinite().all()):
            basis.copy_(filtered.whiten(sketched.double()[None], floor, relative=True)[0][0])
        else:
            basis.zero_()


def filter_principal_(
    Q: Tensor, ledger: Tensor, Z: Tensor, orders: Tensor, row_starts: Tensor, stages: Tensor, floor: float
) -> None:
    """Q <- the left singular vectors of Z whose squared singular value is above `floor`, descending, then zeros, where
    ``stages > 0``: `filtered.whiten` with ``relative=False``, whose other results are `found` and `seen` in the ledger.
    Where Z is not finite, none is found."""
    for b in _taking_part(stages):
        image, basis = (_rows_of(thin, orders, row_starts, b) for thin in (Z, Q))
        if bool(image.isfinite().all()):
            whitened, found, seen = filtered.whiten(image.double()[None], floor, relative=False)
            basis.copy_(whitened[0])
            _write(ledger, b, found=found, seen=seen)
        else:
            basis.zero_()
            _write(ledger, b, found=0.0, seen=0.0)


def filter_conclude_(
    ledger: Tensor,
    stages: Tensor,
    settled: Tensor,
    aims: Tensor,
    coefficients: Tensor,
    Z: Tensor,
    Q: Tensor,
    images: Tensor,
    traces: Tensor,
    tile_starts: Tensor,
    orders: Tensor,
    row_starts: Tensor,
    target: Tensor,
    grid: Tensor,
    table: Tensor,
) -> None:
    """`filtered.conclude_round` and `Search.advance`, where ``stages > 0``. A resolved matrix has its k, e and next
    window in the ledger, its stages move to `settled` and become 0, and P = (I + Y) / 2 - Z Q^T - Q Z^T. One that is
    still open has its next step in stages, aims and coefficients.

    Args:
        Z: float32 [rows, w], written where resolved.
        Q, images: float32 [rows, w] and [2, rows, w], the principal basis, and G Q and Y Q in the scale of the kernels.
        traces: float32 [T, 3], what each tile adds to tr Y, <Y, G> and ||P - P^2||_F^2.
    """
    for b in _taking_part(stages):
        m, scale = int(orders[b]), column(ledger, "scale")[b]
        found, seen, tau, used = (column(ledger, n)[b : b + 1] for n in ("found", "seen", "tau", "used_half"))
        sums = torch.cat([_sum_tiles(traces, tile_starts, b)[0], seen])[None]  # [1, 4]
        sums[:, 1] /= scale
        basis = _rows_of(Q, orders, row_starts, b).double()[None]
        GQ, YQ = _rows_of(images, orders, row_starts, b).double().unsqueeze(1)
        window = Window(tau.clone(), used.clone())
        outcome = filtered.conclude_round(window, target, sums, basis, found.long(), GQ / scale, YQ)
        if bool(outcome.resolved):
            rotation = outcome.Q.mT @ basis
            _rows_of(Z, orders, row_starts, b).copy_((outcome.Z @ rotation)[0])
            following = outcome.following
            _write(ledger, b, k=outcome.k, e=outcome.e, tau=following.tau, half=following.half)
            settled[b], stages[b] = stages[b].clone(), 0
        else:
            _write_search(ledger, b, _search(ledger, b, target).advance(outcome, window))
            _choose_step(ledger, b, m, stages, aims, coefficients, grid, table)


def small_spectrum_(
    ledger: Tensor,
    projector: Tensor,
    members: Tensor,
    pairs: Tensor,
    tiles: Tensor,
    tile_starts: Tensor,
    orders: Tensor,
    offsets: Tensor,
    norms: Tensor,
    scales: Tensor,
    target: Tensor,
) -> None:
    """k and e in the ledger and N = 2 P - 2 (1 - e) I [m, m] from the whole spectrum of matrices with m <= 64: zeros
    for a zero matrix, NaN for one that is not finite.

    Args:
        projector: float32 [sum m^2]; N starts at ``offsets[b]``, int64 [B].
        members: int32 [S], which matrices.
        pairs: float16 [2, numel], G = (hi + lo / 2048) / scale, each at a pitch of 64 where its first tile says.
        tiles: int32 [T, 5].
    """
    for b in members.tolist():
        m, norm = int(orders[b]), float(norms[b])
        N = projector[int(offsets[b]) :][: m * m].view(m, m)
        if norm == 0 or norm - norm != 0:
            _write(ledger, b, k=0.0 if norm == 0 else -1.0, e=0.0 if norm == 0 else torch.nan)
            N.fill_(0.0 if norm == 0 else torch.nan)
            continue
        start = int(tiles[tile_starts[b, 0], 0]) * BLOCK * BLOCK
        hi, lo = pairs[:, start : start + BLOCK * BLOCK].double().view(2, BLOCK, BLOCK)[:, :m, :m]
        G = (hi + lo / 2048) / scales[b].double()
        P, k, e, _ = reference.spectral_projector(G[None], target)
        _write(ledger, b, k=k, e=e)
        N.copy_(2 * P[0] - 2 * (1 - e) * torch.eye(m, dtype=P.dtype, device=P.device))


def small_eigh_(values: Tensor, vectors: Tensor, matrices: Tensor) -> None:
    """Symmetric eigenproblems of up to 64 x 64, without a wait.

    Args:
        values: float64 [B, w], written: the eigenvalues, descending. NaN, as the vectors, where a matrix holds NaN or
            an infinity.
        vectors: float64 [B, w, w], written: in row i the unit eigenvector of ``values[i]``.
        matrices: float64 [B, w, w], of which the lower triangle is read.
    """
    lower = matrices.tril()
    finite = lower.isfinite().all(-1).all(-1)[:, None, None]  # [B, 1, 1]
    found, columns = torch.linalg.eigh(torch.where(finite, lower, 0.0))  # ascending
    values.copy_(torch.where(finite[..., 0], found.flip(-1), torch.nan))
    vectors.copy_(torch.where(finite, columns.mT.flip(-2), torch.nan))
