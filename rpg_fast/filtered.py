"""The filtered randomised power iteration: the projector of a rank loss from matrix products, without a full spectrum.

A polynomial in G = X X^T / ||X||_F^2, composed of odd quintics (power iteration by repeated squaring), is a step at
tau: 1 on the eigenvalues above a window around tau, 0 on those below it, between the two inside. The few
eigenvectors that it leaves open are found by a randomised range finder and solved exactly. A round whose window shows
the boundary between rank k and k + 1 resolves the matrix; otherwise the tail energy that it has measured tells where
the next round should look. From call to call the window follows the boundary, so that one round is enough.

Here in batched float64 torch, for any device: the meaning of the op `rank_filter`, and its fallback. It reads on the
host which matrices are still open; the kernels do not.

Sources: the quintics, Amsel et al., "The Polar Express", arXiv 2505.16932; the range finder, Halko, Martinsson and
Tropp, SIAM Review 2011. Letters as in `reference`; w the window's width, r the directions found in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rpg_fast import reference

WIDTH = 32  # w: columns of the range finder
SMALL = 64  # a matrix with m up to this is done by eigendecomposition
WARM_ROUNDS, COLD_ROUNDS = 3, 8  # in a call with a window from the last one, and without

STAGES = 10  # composed quintics, enough for the narrowest window of the table
CONVERGED = 3e-6  # error of the composed step outside the window; the last product squares it
NARROWEST, WIDEST = 1e-5, 0.3  # half a window, as a fraction of the bound on the spectrum of G - tau I
CUSHION = 0.024  # a quintic for a narrower interval would hardly gain and oscillate in the middle

NOISE = 1e-11  # squared singular values of the first sketch below this fraction of the largest are rounding errors
JUNK = 1e-3  # directions in which P - P^2 is smaller than this belong to no window
ROOM = 12  # columns that must be left over for the range finder to be accurate
BLUR, BLURRED = 1e-8, 2e-12  # how much the directions found may mix with others; see `conclude_round`
LOSS, ABSOLUTE = 2e-5, 1e-7  # how much e may owe to directions that were not found: relative to e, and beside it
ROUNDING = 3e-6  # of sums of squares, relative, in kernels of fp32 grade
LEAK = 2e-5  # ||P - P^2||_F^2 outside the directions found, above which some were missed

FIRST = 5.0  # a search starts at FIRST * tail_energy / m
SEARCH = 0.3  # half a window of a search, as a fraction of tau
FILL = 0.45  # the part of the w columns that a window should hold
DENSITY = 0.026  # ||P - P^2||_F^2 = DENSITY * half * (eigenvalues per unit), about, where these lie evenly


# ---------------------------------------------------------------------------------------------------------- the step


@functools.cache
def step_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """For 64 half-widths l of the window [64], the coefficients (a, b, c) of the quintics [64, STAGES, 3] whose
    composition is the sign function on [l, 1]; (1, 0, 0) once it has converged, so that the window is not narrowed
    further."""
    grid = torch.logspace(math.log10(NARROWEST), math.log10(WIDEST), 64, dtype=torch.float64)
    table = torch.tensor([_composed_quintics(lower) for lower in grid.tolist()], dtype=torch.float64)
    return grid.to(device), table.to(device)


def _composed_quintics(lower: float) -> list[tuple[float, float, float]]:
    upper, stages = 1.0, []
    for _ in range(STAGES):
        if upper - lower < 2 * CONVERGED:
            stages.append((1.0, 0.0, 0.0))
            continue
        a, b, c = _minimax_quintic(max(lower, CUSHION * upper), upper)
        at_lower, at_upper = (x * (a + b * x**2 + c * x**4) for x in (lower, upper))
        centre = 2 / (at_lower + at_upper)
        stages.append((centre * a, centre * b, centre * c))
        lower = centre * at_lower
        upper = 2 - lower
    return stages


def _minimax_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """a, b, c of the odd quintic a x + b x^3 + c x^5 nearest to 1 on [lower, upper]: Remez exchange of the inner
    extrema, which converges quadratically."""
    if upper / lower < 1.01:
        return 15 / 8, -10 / 8, 3 / 8  # the limit; the equations below become singular
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    a = b = c = 0.0
    for _ in range(6):
        x = torch.tensor([lower, q, r, upper], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)], 1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones_like(x)).tolist()
        root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


@dataclass(frozen=True)
class Spectrum:
    """B Gram matrices of trace 1 and what every round needs of them."""

    G: Tensor  # [B, m, m]
    square: Tensor  # [B, m, m] G G
    moments: Tensor  # [B, 3] the sums of the squares, cubes and fourth powers of the eigenvalues

    @staticmethod
    def of(G: Tensor) -> Spectrum:
        square = G @ G
        moments = torch.stack([(G * G).sum((-2, -1)), (G * square).sum((-2, -1)), (square * square).sum((-2, -1))], -1)
        return Spectrum(G, square, moments)

    def __getitem__(self, rows: Tensor) -> Spectrum:
        return Spectrum(self.G[rows], self.square[rows], self.moments[rows])

    @property
    def largest(self) -> Tensor:
        """An upper bound on the largest eigenvalue [B]."""
        return 1.01 * self.moments[:, 2] ** 0.25


@dataclass(frozen=True)
class Window:
    tau: Tensor  # [B] in units of the spectrum of G
    half: Tensor  # [B]; 0: no window yet

    def __getitem__(self, rows: Tensor) -> Window:
        return Window(self.tau[rows], self.half[rows])


def bound_on_shifted(moments: Tensor, m: int, tau: Tensor) -> Tensor:
    """An upper bound on ||G - tau I||_2 [B]: (sum_i (lambda_i - tau)^4)^(1/4), from the moments; the slack covers the
    cancellation where the spectrum is concentrated at tau."""
    second, third, fourth = moments.unbind(-1)
    terms = torch.stack([fourth, -4 * tau * third, 6 * tau**2 * second, -4 * tau**3, m * tau**4])
    return 1.01 * (terms.sum(0).clamp(min=0) + 1e-5 * terms.abs().sum(0)) ** 0.25


def soft_step(spectrum: Spectrum, window: Window) -> tuple[Tensor, Tensor]:
    """Y [B, m, m] and the half-width [B] that was used, from the table, at most the window's but for its range: Y takes
    G's eigenvalues to 1 above tau + half, to -1 below tau - half, monotone between. The step is P = (I + Y) / 2."""
    G, m = spectrum.G, spectrum.G.shape[-1]
    eye = torch.eye(m, dtype=G.dtype, device=G.device)
    tau = window.tau[:, None, None]
    bound = bound_on_shifted(spectrum.moments, m, window.tau)  # [B]
    grid, table = step_table(G.device)
    row = (torch.searchsorted(grid, (window.half / bound).clamp(NARROWEST, WIDEST), right=True) - 1).clamp(min=0)
    scale = 1 / bound[:, None, None]
    Y, A = (G - tau * eye) * scale, (spectrum.square - 2 * tau * G + tau**2 * eye) * scale**2
    for stage, (a, b, c) in enumerate(table[row].permute(1, 2, 0)[..., None, None]):  # STAGES x [3, B, 1, 1]
        A = A if stage == 0 else Y @ Y
        Y = a * Y + (b * A + c * (A @ A)) @ Y
    return Y, grid[row] * bound


# -------------------------------------------------------------------------------------------------------- the window


def whiten(Z: Tensor, floor: float, *, relative: bool) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis Q [B, m, w] of the columns of Z [B, m, w], by whitening its Gram matrix, without the
    directions whose squared singular value is at most `floor` (times the largest, if relative). Its columns are zero
    but for the first `found` [B]; the largest directions come first. Also the sum of the squared singular values [B]
    of those found."""
    peak = Z.abs().amax((-2, -1), keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    Z = Z / peak
    scales, V = torch.linalg.eigh(Z.mT @ Z)  # [B, w] ascending, [B, w, w]
    scales, V = scales.flip(-1), V.flip(-1)
    least = floor * scales[:, :1] if relative else floor / peak[:, 0] ** 2
    found = (scales > least) & (scales > 0)
    factors = torch.where(found, torch.where(found, scales, 1.0).rsqrt(), 0.0)
    total = torch.where(found, scales, 0.0).sum(-1) * peak[:, 0, 0] ** 2
    return Z @ (V * factors[:, None, :]), found.sum(-1), total


@dataclass(frozen=True)
class Round:
    """What one round tells about B matrices, where `resolved`: k, e, P; where not: where to look next."""

    resolved: Tensor  # bool [B]
    k: Tensor  # int64 [B]
    e: Tensor  # [B] tail energy
    Q: Tensor  # [B, m, w]; the projector on the k leading eigenvectors is (I + Y) / 2 - Z Q^T - Q Z^T
    Z: Tensor  # [B, m, w]
    following: Window  # of the next call
    soft_tail: Tensor  # [B] <I - P, G>: the tail energy below tau, about
    density: Tensor  # [B] eigenvalues per unit at tau, about
    edge: Tensor  # int64 [B]: 1 if the boundary may lie above the window, -1 if below, 0 if it is not known
    blurred: Tensor  # bool [B]: the window shows the boundary, but not sharply enough


def conclude_round(
    window: Window, target: Tensor, sums: Tensor, Q: Tensor, found: Tensor, GQ: Tensor, YQ: Tensor
) -> Round:
    """The rank rule inside the window.

    Args:
        window: as `soft_step` used it.
        target: 0-d tail energy.
        sums: [B, 4] tr Y, <Y, G>, ||P - P^2||_F^2, and the same of the directions found.
        Q: [B, m, w] orthonormal basis of the window in its first `found` [B] columns, zeros in the others.
        GQ, YQ: [B, m, w].
    """
    m, w = Q.shape[-2:]
    trace_Y, energy_Y, inside, seen = sums.unbind(-1)
    there = torch.arange(w, device=Q.device) < found[:, None]  # [B, w]
    H_G, H_Y = Q.mT @ GQ, Q.mT @ YQ  # [B, w, w]
    H_P = (torch.diag_embed(there.to(Q.dtype)) + H_Y) / 2

    # The step on the complement of the window, P - (P Q) Q^T - Q (P Q)^T + Q H_P Q^T, without forming it.
    trace = (m + trace_Y) / 2 - H_P.diagonal(dim1=-2, dim2=-1).sum(-1)
    k_above = trace.round()
    crossed = H_G.diagonal(dim1=-2, dim2=-1).sum(-1) + (YQ * GQ).sum((-2, -1))
    e_above = 1 - ((1 + energy_Y) / 2 - crossed + (H_P * H_G).sum((-2, -1)))

    ritz, R = torch.linalg.eigh(H_G - torch.diag_embed((~there).to(Q.dtype)))  # columns not there: -1, last
    ritz, R = ritz.flip(-1), R.flip(-1)
    j = torch.arange(w + 1, device=Q.device)  # how many of the window belong to the k leading ones
    tails = e_above[:, None] - torch.nn.functional.pad((ritz * there).cumsum(-1), (1, 0))  # [B, w + 1]
    possible = (j <= found[:, None]) & (k_above[:, None] + j < m)
    distance = torch.where(possible, (tails - target).abs(), torch.inf)
    best = w - distance.flip(-1).argmin(-1)  # the larger j on a tie
    e = tails.gather(-1, best[:, None])[:, 0].clamp(0, 1)

    # At an end of the window the next eigenvalue is not known; it may be known to be no better. All above the window
    # are larger than tau, and the largest below it is at least their mean.
    below = m - k_above - found  # how many
    lower_known = (best < found) | (below <= 1) | (e <= target) | (2 * (e - target) <= e / below)
    upper_known = (best > 0) | (k_above == 0) | (e >= target) | (2 * (target - e) <= window.tau)
    clear = (found <= w - ROOM) & ((trace - k_above).abs() <= 0.1) & (inside - seen <= LEAK) & possible.any(-1)
    edge = torch.where(clear & ~lower_known, -1, torch.where(clear & ~upper_known, 1, 0))

    # The step mixes what was found with c^2 = ||Y Q - Q Q^T Y Q||_F^2 of the rest, whose eigenvalues are near tau: an
    # error of c sqrt(tau / 2) in a gradient of sqrt(e (1 - e)), both over 2 / ||X||_F. Rounding alone gives c^2 ~ m.
    mixed = (YQ - Q @ H_Y).square().sum((-2, -1))
    sharp = mixed <= (BLUR * e * (1 - e) / window.tau).clamp(min=BLURRED * m)
    # An eigenvalue that was not found, at most tau + half, adds 3 (p - p^2)^2 of itself to e.
    sharp &= inside - seen <= (LOSS * e + ABSOLUTE) / (3 * (window.tau + window.half)) + ROUNDING * inside
    resolved = clear & lower_known & upper_known

    last_in = ritz.gather(-1, (best - 1).clamp(min=0)[:, None])[:, 0]
    first_out = ritz.gather(-1, best.clamp(max=w - 1)[:, None])[:, 0]
    last_in = torch.where(best > 0, last_in, window.tau + window.half)
    first_out = torch.where(best < found, first_out, window.tau - window.half)
    next_tau = (last_in + first_out) / 2
    next_half = torch.minimum(window.half * (FILL * w / found.clamp(min=1)).clamp(0.4, 1.4), next_tau / 2)

    Q_ritz, leading = Q @ R, (j[:-1] < best[:, None]).to(Q.dtype)
    correction = R.mT @ H_P @ R + torch.diag_embed(leading)
    return Round(
        resolved=resolved & sharp,
        k=(k_above + best).long(),
        e=e,
        Q=Q_ritz,
        Z=(Q_ritz + YQ @ R) / 2 - Q_ritz @ correction / 2,
        following=Window(next_tau, next_half),
        soft_tail=(1 - energy_Y) / 2,
        density=inside / (DENSITY * window.half),
        edge=edge,
        blurred=resolved & ~sharp,
    )


# -------------------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Search:
    """Where B matrices look for tau: the root of gap(x) = log(tail energy below tau / target), x = log tau, by secants
    inside a bracket. All [B]; a gap is NaN where nothing has been measured yet."""

    window: Window
    target: Tensor
    start: Tensor  # x of a search from scratch
    low: Tensor
    high: Tensor
    low_gap: Tensor
    high_gap: Tensor
    last: Tensor
    last_gap: Tensor
    restarted: Tensor

    @staticmethod
    def begin(spectrum: Spectrum, target: Tensor, last: Window) -> Search:
        """From the window of the last call, or from scratch where there is none."""
        m = spectrum.G.shape[-1]
        target = target.clamp(min=1e-9).expand_as(last.tau)  # 0 is a valid target
        low = (target / m).log()  # eigenvalues below t / m add up to less than t
        high = torch.maximum(spectrum.largest.log(), low)
        start = torch.minimum((FIRST * target / m).log(), high - 0.35)
        unknown = torch.full_like(high, torch.nan)
        cold = ~((last.half > 0) & (last.tau > 0))
        tau = torch.where(cold, start.exp(), last.tau)
        window = Window(tau, torch.where(cold, SEARCH * tau, last.half))
        never = torch.zeros_like(cold)
        return Search(window, target, start, low, high, unknown, unknown, unknown, unknown, never)

    def __getitem__(self, rows: Tensor) -> Search:
        parts = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        return Search(**parts)

    def advance(self, found: Round, used: Window) -> Search:
        """With the next window where a round that used `used` says."""
        x = used.tau.log()
        soft_tail = found.soft_tail.clamp(min=1e-12)
        gap = (soft_tail / self.target).log()
        over = gap > 0
        high, high_gap = torch.where(over, x, self.high), torch.where(over, gap, self.high_gap)
        low, low_gap = torch.where(over, self.low, x), torch.where(over, self.low_gap, gap)

        secant = (gap - self.last_gap) / (x - self.last)
        newton = used.tau.square() * found.density / soft_tail
        slope = torch.where(secant.isfinite() & (secant > 0), secant, newton).clamp(0.5, 60)
        step = x - gap / slope

        width = high - low
        part = (low_gap / (low_gap - high_gap)).clamp(0.1, 0.9)
        inside = torch.where((low < step) & (step < high), step, low + part * width)
        inside = inside.clamp(low + 0.02 * width, high - 0.02 * width)
        outside = torch.minimum(torch.maximum(step.clamp(x - 1.5, x + 1.5), low), high)
        bracketed = ~(low_gap.isnan() | high_gap.isnan())
        far = (gap.abs() > 1) & ((x - self.start).abs() > 0.5) & (low < self.start) & (self.start < high)
        restart = far & ~bracketed & ~self.restarted
        step = torch.where(bracketed, inside, torch.where(restart, self.start, outside))
        # A window that ends on the wrong side of the boundary is left behind.
        step = torch.where(
            found.edge < 0, step.minimum((used.tau - 0.9 * used.half).maximum(used.tau / 10).log()), step
        )
        step = torch.where(found.edge > 0, step.maximum((used.tau + 0.9 * used.half).log()), step)

        tau = step.exp()
        filled = FILL / 2 * WIDTH / found.density.clamp(min=1e-300)
        window = Window(
            torch.where(found.blurred, found.following.tau, tau),
            torch.where(found.blurred, used.half / 2, torch.minimum(filled, SEARCH * tau)),
        )
        return Search(window, self.target, self.start, low, high, low_gap, high_gap, x, gap, self.restarted | restart)


# ------------------------------------------------------------------------------------------------------------ the op


def filter_group(
    G: Tensor, target: Tensor, last: Window, rounds: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Window]:
    """P [B, m, m], k [B], e [B] of Gram matrices of trace 1 and the windows of the next call; k = -1, P = 0 and e = 1
    where the rounds were not enough."""
    m = G.shape[-1]
    eye = torch.eye(m, dtype=G.dtype, device=G.device)
    P, k, e = torch.zeros_like(G), torch.full_like(last.tau, -1).long(), torch.ones_like(last.tau)
    tau, half = torch.zeros_like(last.tau), torch.zeros_like(last.tau)
    spectrum = Spectrum.of(G)
    search = Search.begin(spectrum, target, last)
    rows = torch.arange(len(G), device=G.device)  # still open
    for _ in range(rounds):
        Y, half_used = soft_step(spectrum, search.window)
        used = Window(search.window.tau, half_used)
        B = (eye - Y @ Y) / 4  # P - P P, zero but for the eigenvectors in the window
        sketch = torch.randn(m, WIDTH, dtype=G.dtype, device=G.device, generator=generator)
        Q, _, _ = whiten(B @ sketch, NOISE, relative=True)
        Q, found, seen = whiten(B @ Q, JUNK**2, relative=False)
        Y = Y + 2 * (B @ Y)  # 3 P^2 - 2 P^3 (McWeeny) in terms of Y: squares the error outside the window
        trace = Y.diagonal(dim1=-2, dim2=-1).sum(-1)
        sums = torch.stack([trace, (Y * spectrum.G).sum((-2, -1)), B.square().sum((-2, -1)), seen], -1)
        outcome = conclude_round(used, target, sums, Q, found, spectrum.G @ Q, Y @ Q)
        search = search.advance(outcome, used)

        done = outcome.resolved
        cross = outcome.Z[done] @ outcome.Q[done].mT
        P[rows[done]] = (eye + Y[done]) / 2 - cross - cross.mT
        k[rows[done]], e[rows[done]] = outcome.k[done], outcome.e[done]
        tau[rows] = torch.where(done, outcome.following.tau, search.window.tau)
        half[rows] = torch.where(done, outcome.following.half, search.window.half)
        rows, spectrum, search = rows[~done], spectrum[~done], search[~done]
        if len(rows) == 0:
            break
    return P, k, e, Window(tau, half)


def rank_filter(
    weights: Sequence[Tensor],
    tail_energy: Tensor,
    min_sparsity: float,
    windows: Tensor,
    seed: Tensor,
    rounds: int,
    by_eigen: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `reference.rank_project` returns, by the filtered power iteration, in batched float64 torch over groups of
    equal m.

    Args:
        windows: float64 [B, 2], (tau, half) from the last call, zeros for a search from scratch.
        seed: int64 0-d, of the Gaussian sketches.
        rounds: the windows tried, at most, for one matrix.
        by_eigen: the weights that are done by eigendecomposition, beside those with m <= SMALL.

    Returns:
        The six of `rank_project`, then the next windows [B, 2], and bool [B]: not resolved. Such a weight is left out
        of this call: rank -1, tail energy NaN, a share and a projector of zero.
    """
    device = weights[0].device
    target = tail_energy.to(device=device, dtype=torch.float64)
    generator = torch.Generator(device).manual_seed(int(seed))
    next_windows = torch.zeros_like(windows)
    lost = torch.zeros(len(weights), dtype=torch.bool, device=device)

    def project(members: list[int], G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        P, k, e = torch.zeros_like(G), torch.zeros(len(G), dtype=torch.int64, device=device), G.new_zeros(len(G))
        nonzero = G.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        exact = torch.tensor([G.shape[-1] <= SMALL or i in by_eigen for i in members], device=device)
        index = torch.tensor(members, device=device)
        rows = exact & nonzero
        if bool(rows.any()):
            P[rows], k[rows], e[rows], _ = reference.spectral_projector(G[rows], target)
        rows = ~exact & nonzero
        if bool(rows.any()):
            last = Window(*windows[index[rows]].unbind(-1))
            P[rows], k[rows], e[rows], following = filter_group(G[rows], target, last, rounds, generator)
            next_windows[index[rows]] = torch.stack([following.tau, following.half], -1)
        lost[index] = k < 0
        return P, k, e

    _, tails, ranks, inv_norms, shares, projector = reference.project_groups(weights, min_sparsity, project)
    shares = torch.where(lost, 0.0, shares)
    tails = torch.where(lost, torch.nan, tails)
    loss = -torch.where(shares > 0, shares * tails, 0.0).sum().to(projector.dtype)
    return loss, tails, ranks, inv_norms, shares, projector, next_windows, lost


def rank_filter_on_host(
    weights: Sequence[Tensor],
    tail_energy: Tensor,
    min_sparsity: float,
    windows: Tensor,
    seed: Tensor,
    rounds: int,
    by_eigen: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`rank_filter` where the host may read: what the rounds have not resolved is done by eigendecomposition in the
    same call, so that nothing is left out."""
    results = rank_filter(weights, tail_energy, min_sparsity, windows, seed, rounds, by_eigen)
    lost = results[-1].nonzero().flatten().tolist()  # sync: on the host
    if not lost:
        return results
    next_windows = results[-2]
    *results_of_all, _, none_lost = rank_filter(
        weights, tail_energy, min_sparsity, windows, seed, rounds, [*by_eigen, *lost]
    )
    return (*results_of_all, next_windows, none_lost)  # type: ignore[return-value]
