"""What rpg_fast races against: the published formulas as their code computes them, and the best of plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from rpg_fast import grouping

# ------------------------------------------------------------------------------------------------------------ threads


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch's own routines on one thread, so that a pool can run one layer a thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))


# ------------------------------------------------------------------------------------------------------------ rank loss


def svd_loop(
    weights: Sequence[Tensor],
    tail_energy: float,
    driver: str | None = None,
    layer: Callable[..., Tensor | None] | None = None,
) -> float:
    """`svd_loss` and its backward pass. Adds to `.grad`, returns the loss."""
    mean = svd_loss(weights, tail_energy, driver, layer)
    mean.backward()
    return mean.item()


def svd_loss(
    weights: Sequence[Tensor],
    tail_energy: float,
    driver: str | None = None,
    layer: Callable[..., Tensor | None] | None = None,
) -> Tensor:
    """The rank loss as published: layer by layer a full SVD by cuSOLVER's `driver`, host reads of norm, rank and loss,
    autograd through the norm and the residual. `layer`: `published_layer`, or that compiled."""
    losses = []
    for weight in weights:
        loss = (layer or published_layer)(weight, tail_energy, driver)
        if loss is not None and loss.item() != 0:
            losses.append(loss)
    return torch.stack(losses).mean()


def published_layer(weight: Tensor, tail_energy: float, driver: str | None) -> Tensor | None:
    """-||Wn - Wn_k||_F^2 of one weight, None if it is all-zero."""
    matrix = weight.flatten(1)
    norm = matrix.norm()
    if norm.item() == 0:
        return None
    normed = matrix / norm
    U, S, Vh = torch.linalg.svd(normed.detach(), full_matrices=False, driver=driver)
    tails = S.square().flip(0).cumsum(0)
    k = len(S) - 1 - int((tails - tail_energy).abs().argmin().item())
    return -(normed - U[:, :k] @ S[:k].diag() @ Vh[:k]).norm().square()


@torch.no_grad()
def gram_eigh_threads(weights: Sequence[Tensor], tail_energy: float, pool: ThreadPoolExecutor) -> float:
    """The rank loss on the CPU from Gram matrices in float64, zero rows left out, by LAPACK's eigendecomposition, one
    layer a thread, the largest first; the gradient in closed form. Adds to `.grad`, returns the loss."""
    largest_first = sorted(range(len(weights)), key=lambda i: -grouping.short_side(weights[i]))
    with one_thread_each():
        parts = pool.map(lambda i: _gram_eigh(weights[i], tail_energy), largest_first)
        results = dict(zip(largest_first, parts, strict=True))
    tails = [e for e, _ in results.values() if e is not None]
    active = max(1, len(tails))
    torch._foreach_add_([w.grad for w in weights], [results[i][1] for i in range(len(weights))], alpha=1 / active)
    return -sum(tails) / active


@torch.no_grad()
def _gram_eigh(weight: Tensor, tail_energy: float) -> tuple[float | None, Tensor]:
    """e of one weight, None if it is all-zero, and the gradient of -e."""
    matrix = weight.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.mT if tall else matrix  # [m, n]
    rows = X.any(1).nonzero().squeeze(1)
    m, r = len(X), len(rows)
    if r == 0:
        return None, torch.zeros_like(weight)
    Y = X if r == m else X[rows]  # [r, n]
    precise = Y.double()
    gram = precise @ precise.mT  # [r, r]
    square = gram.trace()
    eigenvalues, V = torch.linalg.eigh(gram.div_(square))  # ascending
    tails = torch.cat([eigenvalues.new_zeros(m - r), eigenvalues.clamp(min=0)]).cumsum(0)
    j = int((tails - tail_energy).abs().argmin())
    k, e = min(m - 1 - j, r), float(tails[j])
    M = _projector(V.float(), k)
    M.diagonal().sub_(1 - e)
    M *= 2 / float(square)
    if tall:
        gradient = Y.mT @ M  # [n, r]
        gradient = gradient if r == m else gradient.new_zeros(X.mT.shape).index_copy_(1, rows, gradient)
    else:
        gradient = M @ Y  # [r, n]
        gradient = gradient if r == m else gradient.new_zeros(X.shape).index_copy_(0, rows, gradient)
    return e, gradient.view(weight.shape)


def _projector(V: Tensor, k: int) -> Tensor:
    """V_k V_k^T of the last k columns, from the smaller of the two blocks."""
    r = len(V)
    if k <= r - k:
        return V[:, r - k :] @ V[:, r - k :].mT
    P = V[:, : r - k] @ V[:, : r - k].mT
    P.neg_().diagonal().add_(1)
    return P


@torch.no_grad()
def gram_eigh_batches(weights: Sequence[Tensor], tail_energy: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The rank loss on a GPU: Gram matrices in `dtype`, one batched eigendecomposition for each short side; nothing is
    read by the host outside `eigh`. Adds to `.grad`, returns the loss."""

    def project(members: list[int], G: Tensor) -> tuple[Tensor, Tensor]:
        eigenvalues, V = torch.linalg.eigh(G)
        energies = eigenvalues.clamp(min=0).cumsum(1)  # [b, m]
        j = (energies - tail_energy).abs().argmin(1, keepdim=True)
        top = V * (torch.arange(V.shape[-1], device=V.device) > j)[:, None, :]
        return top @ V.mT, energies.gather(1, j).squeeze(1)

    return _in_batches(weights, dtype, project)


@torch.no_grad()
def randomised_batches(
    weights: Sequence[Tensor], ranks: Sequence[int], niter: int, generator: torch.Generator | None = None
) -> Tensor:
    """The rank loss from the classic randomised SVD (Halko, Martinsson, Tropp, algorithms 4.4, 5.3), told the rank of
    every weight in advance: Gram matrices in float32, `niter` power iterations with QR in between, sketches 32 columns
    wider than the largest rank of a short side. Adds to `.grad`, returns the loss."""

    def project(members: list[int], G: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.tensor([ranks[i] for i in members], device=G.device)
        width = min(G.shape[-1], int(max(ranks[i] for i in members)) + 32)
        Q = torch.randn(*G.shape[:-1], width, dtype=G.dtype, device=G.device, generator=generator)
        for _ in range(niter + 1):
            Q = torch.linalg.qr(G @ Q).Q  # [b, m, l]
        _, Z = torch.linalg.eigh(Q.mT @ (G @ Q))  # ascending
        leading = torch.arange(width, device=G.device) >= width - k[:, None]
        U = (Q @ Z) * leading[:, None, :]
        P = U @ U.mT
        return P, 1 - (P * G).sum((-2, -1))

    return _in_batches(weights, torch.float32, project)


def _in_batches(
    weights: Sequence[Tensor], dtype: torch.dtype, project: Callable[[list[int], Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """The rank loss with `project(members, G [b, m, m] of trace 1) -> P [b, m, m], e [b]` for each short side m."""
    groups = grouping.groups_of_equal_m(weights)
    tails = torch.zeros(len(weights), dtype=dtype, device=weights[0].device)
    nonzero = torch.zeros_like(tails)
    gradients: list[Tensor] = [torch.empty(0)] * len(weights)
    for m, members in groups.items():
        matrices = [weights[i].flatten(1) for i in members]
        grams = torch.stack([_gram(W.to(dtype)) for W in matrices])  # [b, m, m]
        squares = grams.diagonal(dim1=1, dim2=2).sum(1)  # [b]
        safe = torch.where(squares > 0, squares, 1.0)
        P, e = project(members, grams / safe[:, None, None])
        M = (P - torch.diag_embed((1 - e)[:, None].expand(-1, m))) * (2 / safe)[:, None, None]
        for i, W, product in zip(members, matrices, M.to(matrices[0].dtype), strict=True):
            gradients[i] = (product @ W if len(W) <= W.shape[1] else W @ product).view(weights[i].shape)
        index = torch.tensor(members, device=e.device)
        nonzero[index] = (squares > 0).to(dtype)
        tails[index] = e * nonzero[index]
    active = nonzero.sum().clamp(min=1)
    torch._foreach_mul_(gradients, (1 / active).to(gradients[0].dtype))
    torch._foreach_add_([w.grad for w in weights], gradients)
    return -tails.sum() / active


def _gram(W: Tensor) -> Tensor:
    return W @ W.mT if len(W) <= W.shape[1] else W.mT @ W


# ------------------------------------------------------------------------------------------------------------ topology


@torch.no_grad()
def published_update(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    sparsity: float,
    drop_fraction: float,
) -> list[Tensor]:
    """A topology update as published: one threshold over all magnitudes by `kthvalue`, then, layer by layer, a full
    sort of the magnitudes to drop and one of the gradients to grow; weights, momenta and gradients are masked. Returns
    bool masks."""
    magnitudes = torch.cat([w.abs().flatten() for w in weights])
    threshold = magnitudes.kthvalue(max(1, round(sparsity * magnitudes.numel()))).values
    masks = []
    for w, gradient, momentum in zip(weights, gradients, momenta, strict=True):
        mask = w.abs() >= threshold
        w.mul_(mask)
        n = w.numel()
        zeros = 1 - mask.sum().item() / n
        if zeros > 0:
            ones = int((1 - zeros) * n)
            grow = int(ones * drop_fraction)
            kept = _leading(w.abs().flatten(), ones - grow)
            candidates = torch.where(kept, -1.0, gradient.abs().flatten())
            grown = _leading(candidates, grow)
            mask = (kept | grown).view_as(w)
            w.masked_fill_((grown & (w.flatten() == 0)).view_as(w), 0)
        momentum.mul_(mask)
        w.mul_(mask)
        gradient.mul_(mask)
        masks.append(mask)
    return masks


def _leading(scores: Tensor, count: int) -> Tensor:
    """The `count` best as a bool mask, by sorting them all."""
    order = torch.topk(scores, k=scores.numel(), sorted=True).indices
    return torch.empty_like(scores, dtype=torch.bool).scatter_(
        0, order, torch.arange(len(order), device=order.device) < count
    )


@torch.no_grad()
def selecting_update(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    active: int,
    drop_fraction: float,
    pool: ThreadPoolExecutor | None,
) -> list[Tensor]:
    """The same update without sorting: `active` weights stay of those that `masks` left, found by one selection among
    them alone; then, in each layer, a selection among the active ones and one among the rest; grown weights start at
    zero."""
    magnitudes = [w[mask].abs_() for w, mask in zip(weights, masks, strict=True)]
    together = torch.cat(magnitudes)
    prune = max(0, len(together) - active)
    threshold = together.kthvalue(prune).values if prune else together.new_tensor(-1.0)

    def layer(i: int) -> Tensor:
        with torch.no_grad():
            survivors = magnitudes[i][magnitudes[i] > threshold]
            grow = int(len(survivors) * drop_fraction)
            lowest = survivors.kthvalue(grow).values if grow else threshold
            kept = weights[i].abs() > torch.maximum(lowest, threshold)
            kept &= masks[i]
            result = kept
            if grow:
                scores = gradients[i].abs().masked_fill_(kept, -1.0).flatten()
                result = kept.clone()
                result.view(-1)[scores.topk(grow, sorted=False).indices] = True
            weights[i].mul_(kept)
            momenta[i].mul_(kept)
            return result

    if pool is None:
        return [layer(i) for i in range(len(weights))]
    largest_first = sorted(range(len(weights)), key=lambda i: -weights[i].numel())
    with one_thread_each():
        results = dict(zip(largest_first, pool.map(layer, largest_first), strict=True))
    return [results[i] for i in range(len(weights))]
