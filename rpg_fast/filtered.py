"""The filtered randomised power iteration: the projector of a rank loss from matrix products, without a full spectrum.

A polynomial in G = X X^T / ||X||_F^2, composed of odd quintics (power iteration by repeated squaring), is a step at
tau: 1 on the eigenvalues above a window around tau, 0 on those below it, between the two inside. The few
eigenvectors that it leaves open are found by a randomised range finder and solved exactly; from call to call the
window follows the boundary between rank k and k + 1.

Sources: the quintics, Amsel et al., "The Polar Express", arXiv 2505.16932; the range finder, Halko, Martinsson and
Tropp, SIAM Review 2011. Letters as in `reference`; w the window's width, r the directions found in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_fast import reference

WIDTH = 32  # w: columns of the range finder; a smaller matrix is done by eigendecomposition
STAGES = 10  # composed quintics, enough for the narrowest window of the table
CONVERGED = 3e-5  # error of the composed step outside the window
NARROWEST, WIDEST = 1e-5, 0.3  # half a window, as a fraction of the bound on the spectrum of G - tau I
CUSHION = 0.024  # a quintic for a narrower interval would hardly gain and oscillate in the middle
JUNK = 1e-3  # directions of the range finder with |beta| below this are noise
FILL = 0.45  # the part of the w columns that the window should hold


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
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    a = b = c = 0.0
    for _ in range(6):
        x = torch.tensor([lower, q, r, upper], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)], 1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones_like(x)).tolist()
        root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def soft_step(G: Tensor, tau: Tensor, half: Tensor) -> Tensor:
    """P [B, m, m]: G's eigenvalues to 1 above tau + half, to 0 below tau - half, monotone between; tau, half [B]."""
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    X = G - tau[:, None, None] * eye
    A = X @ X
    # A bound on ||X||_2 that holds whatever tau is: the spectrum of X / bound lies in [-1, 1].
    bound = 1.01 * torch.minimum(A.norm(dim=(-2, -1)), A.abs().sum(-1).amax(-1)).sqrt()  # [B]
    bound = torch.where(bound > 0, bound, 1.0)
    grid, table = step_table(G.device)
    row = torch.searchsorted(grid, (half / bound).clamp(NARROWEST, WIDEST), right=True) - 1
    Y = X / bound[:, None, None]
    for a, b, c in table[row].permute(1, 2, 0)[..., None, None]:  # STAGES x [3, B, 1, 1]
        A = Y @ Y
        Y = a * Y + (b * A + c * (A @ A)) @ Y
    return (eye + Y) / 2


def orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis of the columns of Y [B, m, w] by twice whitening its Gram matrix; directions that Y does
    not have become zero columns."""
    for floor in (1e-13, 0.5):
        peak = Y.abs().amax((-2, -1), keepdim=True)
        Y = Y / torch.where(peak > 0, peak, 1.0)
        scales, Z = torch.linalg.eigh(Y.mT @ Y)  # [B, w], [B, w, w]
        there = (scales > floor * scales[:, -1:]) & (scales > 0)
        Y = Y @ (Z * torch.where(there, torch.where(there, scales, 1.0).rsqrt(), 0.0)[:, None, :])
    return Y


@dataclass
class Window:
    """What one pass of the filter finds for B matrices."""

    P: Tensor  # [B, m, m] projector on the k leading eigenvectors
    k: Tensor  # int64 [B]
    e: Tensor  # [B] tail energy
    tau: Tensor  # [B] the next window
    half: Tensor  # [B]
    resolved: Tensor  # bool [B]; where it is not, nothing else is valid


def solve_window(G: Tensor, target: Tensor, tau: Tensor, half: Tensor, sketch: Tensor) -> Window:
    """One pass: G [B, m, m] of trace 1, the target tail energy, the windows [B], a Gaussian sketch [m, w]."""
    m, w = sketch.shape
    P = soft_step(G, tau, half)
    inside = P - P @ P  # zero but for the eigenvectors in the window
    Q = orthonormal(inside @ orthonormal(inside @ sketch))  # [B, m, w]
    beta, Z = torch.linalg.eigh(Q.mT @ (inside @ Q))
    found = beta.abs() > JUNK  # [B, w]
    Q = (Q @ Z) * found[:, None, :]
    r = found.sum(-1)

    PQ = P @ Q
    above = P - PQ @ Q.mT - Q @ PQ.mT + Q @ (Q.mT @ PQ) @ Q.mT  # the step on the window's complement
    square = above @ above
    defect = (square - above).norm(dim=(-2, -1))
    above = 3 * square - 2 * square @ above  # McWeeny: the error of a projector squared
    trace = above.diagonal(dim1=-2, dim2=-1).sum(-1)
    k_above = trace.round()
    e_above = 1 - (above * G).sum((-2, -1))

    ritz, Z = torch.linalg.eigh(Q.mT @ (G @ Q) - torch.diag_embed((~found).to(G.dtype)))  # columns not found: -1, last
    ritz, Q = ritz.flip(-1), Q @ Z.flip(-1)  # [B, w] descending
    j = torch.arange(w + 1, device=G.device)  # how many of the window belong to the k leading ones
    tails = e_above[:, None] - torch.nn.functional.pad(ritz.cumsum(-1), (1, 0))  # [B, w + 1]
    possible = (j <= r[:, None]) & (k_above[:, None] + j < m)
    distance = torch.where(possible, (tails - target).abs(), torch.inf)
    best = w - distance.flip(-1).argmin(-1)  # the larger j on a tie
    leading = Q * (j[:-1] < best[:, None])[:, None, :]

    # A neighbour of k that the window does not show may be nearer to the target.
    at_edge = ((best == 0) & (k_above > 0)) | ((best == r) & (k_above + r < m - 1))
    doubtful = (r == 0) | (r > w - 4) | ((trace - k_above).abs() > 0.1) | (defect > 0.05)
    last_in = ritz.gather(-1, (best - 1).clamp(min=0)[:, None])[:, 0]
    first_out = ritz.gather(-1, best.clamp(max=w - 1)[:, None])[:, 0]
    next_tau = (last_in + first_out) / 2
    next_half = torch.minimum(half * (FILL * w / r.clamp(min=1)).clamp(0.4, 1.4), next_tau / 2)
    e = tails.gather(-1, best[:, None])[:, 0]
    k = (k_above + best).long()
    return Window(above + leading @ leading.mT, k, e, next_tau, next_half, ~(doubtful | at_edge))


def eigen_window(G: Tensor, target: Tensor) -> Window:
    """The same from the full spectrum, for a cold start and for what a pass has left unresolved. The window that it
    proposes reaches FILL * w / 2 eigenvalues to both sides of the boundary."""
    m = G.shape[-1]
    P, k, e, energies = reference.spectral_projector(G, target)
    positions = torch.arange(m, device=G.device)
    boundary = (k - 1).clamp(min=0)[:, None] + torch.tensor([0, 1], device=G.device)
    tau = energies.gather(-1, boundary.clamp(max=m - 1)).mean(-1)  # [B]
    reach = max(1, int(FILL * WIDTH / 2))
    upper = energies.gather(-1, (k - reach).clamp(min=0)[:, None])[:, 0]
    lower = energies.gather(-1, (k + reach - 1).clamp(max=positions[-1])[:, None])[:, 0]
    half = torch.minimum((upper - lower) / 2, tau / 2)
    return Window(P, k, e, tau, half, torch.ones_like(k, dtype=torch.bool))


def rank_filter(
    weights: Sequence[Tensor], tail_energy: Tensor, min_sparsity: float, windows: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `reference.rank_project` returns, by the filtered power iteration, in batched float64 torch over groups
    of equal m.

    Matrices that have no window yet, are not wider than w, or are not resolved by one pass are done by
    eigendecomposition in the same call; which ones is read on the host.

    Args:
        windows: float64 [B, 2], (tau, half) from the last call, zeros for a cold start.
        seed: int64 0-d, of the Gaussian sketches.

    Returns:
        The six of `rank_project`, then the next windows [B, 2], and int32 [B]: 1 for a matrix done by
        eigendecomposition.
    """
    device = weights[0].device
    target = tail_energy.to(device=device, dtype=torch.float64)
    generator = torch.Generator(device).manual_seed(int(seed))
    next_windows = torch.zeros_like(windows)
    by_eigen = torch.zeros(len(weights), dtype=torch.int32, device=device)

    def project(members: list[int], G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = G.shape[-1]
        tau, half = windows[members].unbind(-1)
        sketch = torch.randn(m, WIDTH, dtype=G.dtype, device=device, generator=generator)
        filtered = (half > 0) & (m > WIDTH)  # [b]
        P, k, e = torch.empty_like(G), torch.zeros_like(tau).long(), torch.zeros_like(tau)
        following = torch.zeros_like(windows[members])  # [b, 2]

        def take(rows: Tensor, window: Window) -> None:
            P[rows], k[rows], e[rows] = window.P, window.k, window.e
            following[rows] = torch.stack([window.tau, window.half], -1)

        if bool(filtered.any()):
            window = solve_window(G[filtered], target, tau[filtered], half[filtered], sketch)
            take(filtered, window)
            filtered = filtered.masked_scatter(filtered, window.resolved)
        if not bool(filtered.all()):
            take(~filtered, eigen_window(G[~filtered], target))
        next_windows[members] = following
        by_eigen[members] = (~filtered).int()
        return P, k, e

    return (*reference.project_groups(weights, min_sparsity, project), next_windows, by_eigen)
