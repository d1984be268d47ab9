"""Truncated spectra: the batched randomised SVD and the rank rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from rpg_fast import _ops as _ops  # registers the ops
from rpg_fast import filtered, reference

OVERSAMPLING = 8  # extra columns of the sketch, dropped from the result
HEADROOM = 2.0**-10  # a Gaussian sketch times this keeps the first product finite up to the largest float32
SHIFT = 1e-15  # of a Gram matrix's trace: above what rounding to float64 leaves of a zero eigenvalue
SMALLEST = 1e-60  # shift of a zero Gram matrix; others are above it, and its inverse root is within float32
ROUNDING = 2.0**-23  # relative: what float32 rounds off anyway
SvdMethod = Literal["svd", "qr", "products"]


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
    flat one needs more iterations. Where a full SVD costs less it is taken instead: `rpg_fast.spectrum.svd_method`
    tells, and why.

    Args:
        A: [..., m, n], or a list of matrices [..., m_i, n_i] of different shapes (equal ones, and the transposes of
            equal ones, are batched); wide or tall; float32 or float64, or 16 bits (then float32 inside).
        q: number of triplets, 1 <= q <= min(m, n).
        niter: power iterations, >= 0.
        generator: source of the sketch, on A's device; the same state gives the same result. A batch shares a sketch.

    Returns:
        U [..., m, q], S [..., q] descending, V [..., n, q] with A ~ U diag(S) V^T, in A's dtype; lists of them for a
        list. U and V are orthonormal, whatever A's rank. A matrix with NaN or inf gives NaN in its own triplets only.
        On CUDA the host waits once for each shape with q > 56 (`torch.linalg.eigh` and `svd` do), and float32 products
        have the precision that `torch.set_float32_matmul_precision` allows.

    Raises:
        ValueError: q or niter out of range, fewer than two dimensions. TypeError: no real floating-point tensor.
        RuntimeError: A requires grad (in grad mode): detach it first.

    Equivalent to: ``torch.svd_lowrank(A, q + 8, niter)``, cut to q columns.
    """
    if isinstance(A, Tensor):
        _check_matrix("A", A, q, niter)
        return _svd_lowrank(A, q, niter, generator)
    if not isinstance(A, Iterable):
        raise TypeError(f"A must be a tensor [..., m, n] or a list of such, got {type(A).__name__}")
    matrices = list(A)
    for i, matrix in enumerate(matrices):
        _check_matrix(f"A[{i}]", matrix, q, niter)
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        alike.setdefault((_wide(matrix).shape, matrix.dtype, matrix.device), []).append(i)
    triplets: dict[int, tuple[Tensor, ...]] = {}
    for members in alike.values():
        batched = _svd_lowrank(torch.stack([_wide(matrices[i]) for i in members]), q, niter, generator)
        triplets.update(zip(members, zip(*(part.unbind(0) for part in batched), strict=True), strict=True))
    ordered = [triplets[i] if _is_wide(A) else triplets[i][::-1] for i, A in enumerate(matrices)]
    return [t[0] for t in ordered], [t[1] for t in ordered], [t[2] for t in ordered]


def _is_wide(A: Tensor) -> bool:
    return A.shape[-2] <= A.shape[-1]


def _wide(A: Tensor) -> Tensor:
    return A if _is_wide(A) else A.mT


def _check_matrix(name: str, A: Tensor, q: int, niter: int) -> None:
    if not isinstance(A, Tensor) or not A.is_floating_point():
        got = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise TypeError(f"{name} must be a real floating-point tensor, got {got}")
    if A.dim() < 2:
        raise ValueError(f"{name} must be a matrix or a batch of them [..., m, n], got shape {tuple(A.shape)}")
    for option, value in (("q", q), ("niter", niter)):
        if not isinstance(value, int):
            raise TypeError(f"{option} must be whole, got {value!r}")
    if not 1 <= q <= min(A.shape[-2:]):
        raise ValueError(
            f"q must lie in 1..min(m, n) = {min(A.shape[-2:])} for {name} of shape {tuple(A.shape)}, got {q}"
        )
    if niter < 0:
        raise ValueError(f"niter must not be negative, got {niter}")
    if A.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"svd_lowrank has no derivative, and {name} requires grad: pass {name}.detach()")


def svd_method(
    shape: Sequence[int], q: int, niter: int = 2, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> SvdMethod:
    """How `svd_lowrank` does a batch of shape [..., m, n], w = min(q + 8, m, n).

    "products", for up to float32 on CUDA: matrix products, triangular w x w factors and one symmetric w x w
        eigenproblem, all batched, where Householder QR and the SVD go from matrix to matrix. A full SVD, without a
        sketch, where w = min(m, n).
    "svd", where w = min(m, n) or (niter + 1) w > 1.5 min(m, n): `torch.linalg.svd`, cut. On a CPU it then costs less
        than the products and their orthonormalisations do.
    "qr", elsewhere: Householder QR between the products. It keeps the digits of float64, and is as fast on a CPU.
    """
    if device.type == "cuda" and dtype != torch.float64:
        return "products"
    short = min(shape[-2:])
    width = min(q + OVERSAMPLING, short)
    return "svd" if width == short or 2 * (niter + 1) * width > 3 * short else "qr"


def _svd_lowrank(A: Tensor, q: int, niter: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    if not _is_wide(A):
        V, S, U = _svd_lowrank(A.mT, q, niter, generator)
        return U, S, V
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        X = A.to(reference.accumulation_dtype([A]))  # [..., m, n], m <= n
        method = svd_method(A.shape, q, niter, device=A.device, dtype=A.dtype)
        if method == "svd":
            triplets = _by_svd(X, q)
        elif method == "qr":
            triplets = _by_qr(X, q, niter, generator)
        else:
            triplets = _by_products(X, q, niter, generator)
        U, S, V = (part.to(A.dtype) for part in triplets)
        return U, S, V


def _by_svd(X: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    finite = X.isfinite().all(-1).all(-1)[..., None, None]
    U, S, Vh = torch.linalg.svd(torch.where(finite, X, 0.0), full_matrices=False)
    U, S, V = U[..., :q], S[..., :q], Vh[..., :q, :].mT
    return (
        torch.where(finite, U, torch.nan),
        torch.where(finite[..., 0], S, torch.nan),
        torch.where(finite, V, torch.nan),
    )


def _by_qr(X: Tensor, q: int, niter: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    Z, scale = _first_sketch(X, q, generator)
    Z = torch.linalg.qr(Z).Q.mul_(scale)  # [..., n, w]
    for _ in range(niter):
        Q = torch.linalg.qr(X @ Z).Q.mul_(scale)  # [..., m, w]
        Z = torch.linalg.qr(X.mT @ Q).Q.mul_(scale)
    Y = X @ Z  # scale X ~ Y (Z / scale)^T
    finite = Y.sum((-2, -1), keepdim=True).isfinite()
    U, S, Vh = torch.linalg.svd(torch.where(finite, Y, 0.0), full_matrices=False)  # of [..., m, w]
    U, S, V = (torch.where(finite, part, torch.nan)[..., :q] for part in (U, S[..., None, :], Vh.mT))
    return U, (S / scale).squeeze(-2), Z @ (V / scale)


def _by_products(X: Tensor, q: int, niter: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """CholeskyQR in place of QR, with float64 Gram matrices of float32 columns: these tell directions apart down to
    where float32 rounds them off. Between two products the columns need not be orthonormal, only well-conditioned."""
    Z, scale = _first_sketch(X, q, generator)
    full = Z.shape[-1] == X.shape[-2]
    for _ in range(0 if full else niter):
        Q = X @ (Z.double() @ (_whitening(Z) * scale)).to(X.dtype)  # [..., m, w]
        Z = X.mT @ (Q.double() @ (_whitening(Q) * scale)).to(X.dtype)  # [..., n, w]
    Z = _orthonormal(_roughened(X.mT * scale if full else Z, generator))
    Y = X @ (Z * scale).to(X.dtype)  # [..., m, w]
    Q = _orthonormal(_roughened(Y, generator))

    core = Q.mT @ Y.double()  # [..., w, w]; scale X ~ Q core Z^T
    finite = core.sum((-2, -1), keepdim=True).isfinite()
    core = torch.where(finite, core, 0.0)
    energies, P = _eigh(core.mT @ core)
    P = P[..., :q]
    S = energies[..., None, :q].clamp(min=0).sqrt()  # [..., 1, q]
    missing = ROUNDING * S[..., :1] >= S  # no left vector is left of these
    noise = torch.randn(P.shape[-2:], dtype=P.dtype, device=P.device, generator=generator)
    L = _orthonormal(torch.where(missing, noise, core @ P / torch.where(missing, 1.0, S)))
    L, S, P = (torch.where(finite, part, torch.nan) for part in (L, S, P))
    return Q @ L, (S / scale).squeeze(-2), Z @ P


def _eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., w], descending, and eigenvectors [..., w, w] in columns of float64 matrices G [..., w, w]."""
    w = G.shape[-1]
    if w > filtered.SMALL:  # the others a kernel does, a batch at once without a wait
        energies, P = torch.linalg.eigh(G)  # ascending
        return energies.flip(-1), P.flip(-1)
    matrices = G.reshape(-1, w, w).contiguous()
    energies, P = torch.empty_like(matrices[..., 0]), torch.empty_like(matrices)
    torch.ops.rpg_fast.small_eigh_(energies, P, matrices)
    return energies.view(G.shape[:-1]), P.view(G.shape).mT


def _first_sketch(X: Tensor, q: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """X^T Omega [..., n, w] times a power of two [..., 1, 1], and that: it brings X's products near the square root of
    their size, so that none of them leaves the range of float32."""
    m = X.shape[-2]
    sketch = torch.randn(m, min(q + OVERSAMPLING, m), dtype=X.dtype, device=X.device, generator=generator)
    Y = X.mT @ (HEADROOM * sketch)
    exponent = torch.frexp(torch.linalg.vector_norm(Y, torch.inf, (-2, -1), keepdim=True)).exponent
    scale = torch.ldexp(torch.ones_like(Y[..., :1, :1]), -(exponent // 2))
    return Y * scale, scale


def _whitening(Y: Tensor) -> Tensor:
    """The upper triangle T [..., w, w] in float64 for which the columns of Y T are orthonormal (Y [..., n, w]). The
    columns that depend on those before them come out shorter, a zero column as zero."""
    Y = Y.double()
    G = Y.mT @ Y
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    diagonal.add_((SHIFT * trace).clamp_(min=SMALLEST))
    factor = torch.linalg.cholesky_ex(G).L.mT  # not finite where Y is not; no host waits for its `info`
    return torch.linalg.solve_triangular(factor, torch.eye(G.shape[-1], dtype=G.dtype, device=G.device), upper=True)


def _orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis of Y [..., n, w] in float64 that keeps the flag of its columns: CholeskyQR, three times
    because the first two may leave a column short."""
    for _ in range(3):
        Y = Y.double() @ _whitening(Y)
    return Y


def _roughened(Y: Tensor, generator: torch.Generator | None) -> Tensor:
    """Y plus noise as large as its rounding errors: no column depends exactly on others, nor is zero."""
    noise = torch.randn(Y.shape[-2:], dtype=Y.dtype, device=Y.device, generator=generator)
    norm = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True, dtype=torch.float64)  # [..., 1, 1]
    size = torch.where(norm > 0, norm * (ROUNDING / math.sqrt(noise.numel())), 1.0)
    return torch.addcmul(Y, noise, size.to(Y.dtype))


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
