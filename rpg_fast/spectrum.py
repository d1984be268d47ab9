"""Truncated spectra: the batched randomised SVD and the rank rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from rpg_fast import reference

OVERSAMPLING = 8  # extra columns of the sketch, dropped from the result


@overload
def svd_lowrank(
    A: Tensor, q: int, niter: int = ..., *, generator: torch.Generator | None = ...
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def svd_lowrank(
    A: Sequence[Tensor], q: int, niter: int = ..., *, generator: torch.Generator | None = ...
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...
def svd_lowrank(
    A: Tensor | Sequence[Tensor], q: int, niter: int = 2, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor] | tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The q largest singular triplets of each matrix by randomised power iteration (Halko, Martinsson, Tropp, SIAM
    Review 2011, algorithms 4.4 and 5.1): a Gaussian sketch of q + 8 columns, `niter` products with A A^T,
    orthonormalised in between, and the SVD of the small projected matrix. Accurate where the spectrum falls off; a
    flat one needs more iterations.

    Args:
        A: [..., m, n], or a list of matrices [..., m_i, n_i] of different shapes (equal ones are batched); wide or
            tall; float32 or float64, or 16 bits (then float32 inside).
        q: number of triplets, 1 <= q <= min(m, n).
        niter: power iterations, >= 0.
        generator: source of the sketch, on A's device; the same state gives the same result.

    Returns:
        U [..., m, q], S [..., q] descending, V [..., n, q] with A ~ U diag(S) V^T, in A's dtype; lists of them for a
        list. A matrix with NaN or inf gives NaN in its own triplets only.

    Raises:
        ValueError: q or niter out of range, fewer than two dimensions. TypeError: no real floating-point tensor.
        RuntimeError: A requires grad (in grad mode): detach it first.

    Equivalent to: ``torch.svd_lowrank(A, q + 8, niter)``, cut to q columns.
    """
    if isinstance(A, Tensor):
        _check_matrix("A", A, q, niter)
        return _svd_lowrank(A, q, niter, generator)
    matrices = list(A)
    for i, matrix in enumerate(matrices):
        _check_matrix(f"A[{i}]", matrix, q, niter)
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((matrix.shape, matrix.dtype, matrix.device), []).append(i)
    triplets: dict[int, tuple[Tensor, ...]] = {}
    for members in alike.values():
        batched = _svd_lowrank(torch.stack([matrices[i] for i in members]), q, niter, generator)
        triplets.update(zip(members, zip(*(part.unbind(0) for part in batched), strict=True), strict=True))
    in_order = [triplets[i] for i in range(len(matrices))]
    return [t[0] for t in in_order], [t[1] for t in in_order], [t[2] for t in in_order]


def _check_matrix(name: str, A: Tensor, q: int, niter: int) -> None:
    if not isinstance(A, Tensor) or not A.is_floating_point():
        got = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise TypeError(f"{name} must be a real floating-point tensor, got {got}")
    if A.dim() < 2:
        raise ValueError(f"{name} must be a matrix or a batch of them [..., m, n], got shape {tuple(A.shape)}")
    if not 1 <= q <= min(A.shape[-2:]):
        raise ValueError(
            f"q must lie in 1..min(m, n) = {min(A.shape[-2:])} for {name} of shape {tuple(A.shape)}, got {q}"
        )
    if niter < 0:
        raise ValueError(f"niter must not be negative, got {niter}")
    if A.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"svd_lowrank has no derivative, and {name} requires grad: pass {name}.detach()")


def _svd_lowrank(A: Tensor, q: int, niter: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    if A.shape[-2] > A.shape[-1]:
        V, S, U = _svd_lowrank(A.mT, q, niter, generator)
        return U, S, V
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        X = A.to(reference.accumulation_dtype([A]))  # [..., m, n], m <= n
        m = X.shape[-2]
        width = min(q + OVERSAMPLING, m)
        sketch = torch.randn(*X.shape[:-1], width, dtype=X.dtype, device=X.device, generator=generator)
        Z, _, _ = _scaled_qr(X.mT @ sketch)  # [..., n, width]
        for _ in range(niter):
            Q, _, _ = _scaled_qr(X @ Z)  # [..., m, width]
            Z, _, _ = _scaled_qr(X.mT @ Q)
        Q, R, scale = _scaled_qr(X @ Z)  # X ~ X Z Z^T = scale Q R Z^T
        finite = scale.isfinite()
        small = torch.linalg.svd(R)  # of [..., width, width]
        U = torch.where(finite, (Q @ small.U)[..., :q], torch.nan)
        S = small.S[..., :q] * scale.squeeze(-1)
        V = torch.where(finite, (Z @ small.Vh.mT)[..., :q], torch.nan)
        return U.to(A.dtype), S.to(A.dtype), V.to(A.dtype)


def _scaled_qr(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, R, scale with Y = scale Q R and entries of Y / scale in [-1, 1], so that no norm overflows; where Y is not
    finite, the scale is NaN and R is zero."""
    peak = Y.abs().amax((-2, -1), keepdim=True) if Y.numel() else Y.new_zeros(*Y.shape[:-2], 1, 1)
    finite = peak.isfinite()
    scale = torch.where(peak > 0, peak, 1.0)
    Q, R = torch.linalg.qr(torch.where(finite, Y / scale, 0.0))
    return Q, R, torch.where(finite, scale, torch.nan)


def tail_energy_rank(S: Tensor, tail_energy: float | Tensor, rule: Literal["nearest", "at_most"] = "nearest") -> Tensor:
    """The rank k at which the tail energy, sum_{i > k} S_i^2 / sum_i S_i^2, meets a target.

    Args:
        S: [..., r] singular values, descending.
        tail_energy: the target in [0, 1], a float or a 0-d tensor.
        rule: "nearest" (RPG): k in 0..r-1 with the tail nearest to the target, on a tie the larger k. "at_most"
            (TRP's energy threshold): the smallest k in 0..r whose tail is at most the target.

    Returns:
        int64 [...]; 0 for an all-zero spectrum, -1 for one with NaN or inf.

    Raises:
        ValueError: an unknown rule, no spectrum (r = 0), or a target outside [0, 1]. TypeError: no tensor.

    Equivalent to: ``r - 1 - ((S**2 / (S**2).sum()).flip(0).cumsum(0) - tail_energy).abs().argmin()`` for "nearest".
    """
    if rule not in ("nearest", "at_most"):
        raise ValueError(f'rule must be "nearest" or "at_most", got {rule!r}')
    if not isinstance(S, Tensor):
        raise TypeError(f"S must be a tensor of singular values [..., r], got {type(S).__name__}")
    if S.dim() < 1 or S.shape[-1] == 0:
        raise ValueError(f"S must hold at least one singular value [..., r], got shape {tuple(S.shape)}")
    if not isinstance(tail_energy, Tensor) and not 0 <= tail_energy <= 1:
        raise ValueError(f"tail_energy must lie in [0, 1], got {tail_energy}")
    S = S.double()
    finite = S.isfinite().all(-1)
    peak = S.amax(-1, keepdim=True)
    energies = torch.where(finite[..., None] & (peak > 0), S / peak, 0.0).square()  # [..., r], no overflow
    total = energies.sum(-1, keepdim=True)
    energies = energies / torch.where(total > 0, total, 1.0)
    target = torch.as_tensor(tail_energy, dtype=torch.float64, device=S.device)
    if rule == "nearest":
        k, _ = reference.nearest_rank(energies, target)
    else:
        tails = energies.flip(-1).cumsum(-1).flip(-1).clamp(max=1)  # [..., r]; entry i is the tail that k = i leaves
        k = (tails > target).sum(-1)
    k = torch.where(total.squeeze(-1) > 0, k, 0)
    return torch.where(finite, k, -1)
