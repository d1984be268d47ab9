"""What every op means, in plain torch. A kernel is right if and only if it agrees with the function of its name here.

Sources: [RPG] Zhang et al., "Towards Higher Ranks via Adversarial Weight Pruning", NeurIPS 2023. [RigL] Evci et al.,
"Rigging the Lottery", ICML 2020. Letters: B matrices X [m, n] with m <= n the short side, k the rank, e the tail
energy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rpg_fast import grouping


def accumulation_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any of `tensors` is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _without_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


# ------------------------------------------------------------------------------------------------------------ rank loss


def nearest_rank(energies: Tensor, tail_energy: Tensor) -> tuple[Tensor, Tensor]:
    """[RPG]'s rank rule: the k in 0..m-1 whose tail energy, the sum of all but the k largest, is nearest to the
    target; on a tie the larger k.

    Args:
        energies: [..., m] squared singular values over their sum, descending.
        tail_energy: 0-d target.

    Returns:
        k int64 [...] and the tail energy e [...] at k.
    """
    tails = energies.flip(-1).cumsum(-1)  # [..., m]; entry j is the tail that k = m - 1 - j leaves
    j = (tails - tail_energy).abs().argmin(-1, keepdim=True)  # the first minimum: the larger k
    return energies.shape[-1] - 1 - j.squeeze(-1), tails.gather(-1, j).squeeze(-1)


def normalised_gram(X: Tensor) -> tuple[Tensor, Tensor]:
    """G = X X^T / ||X||_F^2 [m, m] in float64 and ||X||_F (0-d): exact products of float32 weights, no overflow or
    underflow at any scale. G is zero where X is zero or not finite; the norm is NaN where X is not finite."""
    peak = X.abs().amax().double()
    finite = peak.isfinite()
    scale = torch.where(finite & (peak > 0), peak, 1.0)
    X = torch.where(finite, X.double() / scale, 0.0)  # [m, n], entries in [-1, 1]
    gram = X @ X.mT  # [m, m]
    square = gram.diagonal().sum()
    norm = torch.where(finite, scale * square.sqrt(), torch.nan)
    return gram / torch.where(square > 0, square, 1.0), norm


def spectral_projector(G: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For G [B, m, m] of trace 1 in float64: the projector P [B, m, m] on the k leading eigenvectors, k and e [B] by
    `nearest_rank`, and the eigenvalues [B, m], descending, those that are rounding errors set to zero."""
    m = G.shape[-1]
    eigenvalues, V = torch.linalg.eigh(G)  # [B, m] ascending, [B, m, m]
    noise = m * torch.finfo(torch.float64).eps
    energies = torch.where(eigenvalues > noise, eigenvalues, 0.0).flip(-1)
    k, e = nearest_rank(energies, target)
    top = torch.arange(m, device=G.device) >= m - k[:, None]  # [B, m]
    return (V * top[:, None, :]) @ V.mT, k, e, energies


def rank_project(
    weights: Sequence[Tensor], tail_energy: Tensor, min_sparsity: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """[RPG] eq. 5-7, every matrix of Wn = W / ||W||_F against its best approximation of rank k, in closed form.

    With G = Wn Wn^T = V diag(lambda) V^T: k by `nearest_rank`, P = V_k V_k^T, e = 1 - <P, G> = ||Wn - P Wn||_F^2, and

        d(-e)/dW = -(2 / ||W||_F) (R - e Wn) = N Wn / ||W||_F,   R = Wn - P Wn,   N = -2 ((1 - e) I - P).

    Returns:
        loss: 0-d, -sum_b shares_b e_b.
        tail_energies: float64 [B], e; 0 for an all-zero weight, NaN for one that is not finite.
        ranks: int64 [B], k; 0 for an all-zero weight, -1 for one that is not finite.
        inv_norms: float64 [B], 1 / ||W||_F; 0 for an all-zero weight.
        shares: float64 [B], 1 / (number of active weights), 0 for an inactive one. Active: not all-zero, and a
            fraction of zeros of at least `min_sparsity`.
        projector: [sum m_b^2], the N_b.
    """
    target = tail_energy.to(device=weights[0].device, dtype=torch.float64)
    return project_groups(weights, min_sparsity, lambda _, G: spectral_projector(G, target)[:3])


def project_groups(
    weights: Sequence[Tensor],
    min_sparsity: float,
    project: Callable[[list[int], Tensor], tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `rank_project` returns, with `project(members, G [b, m, m]) -> P [b, m, m], k [b], e [b]` called for each
    group of equal m."""
    device, dtype = weights[0].device, accumulation_dtype(weights)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    e, k, norms = [zero] * len(weights), [zero.long()] * len(weights), [zero] * len(weights)
    projectors = [zero.new_empty(0, dtype=dtype)] * len(weights)
    with _without_autocast(device):
        for m, members in grouping.groups_of_equal_m(weights).items():
            grams = [normalised_gram(grouping.short_side_first(weights[i])) for i in members]
            norm = torch.stack([norm for _, norm in grams])  # [b]
            P, group_k, group_e = project(members, torch.stack([G for G, _ in grams]))
            P = torch.where(norm[:, None, None] != 0, P, 0.0)
            N = 2 * P - 2 * torch.diag_embed((1 - group_e)[:, None].expand(-1, m))
            finite = norm.isfinite()
            N = torch.where(finite[:, None, None], N, torch.nan).to(dtype)
            group_e = torch.where(finite, group_e, torch.nan)
            group_k = torch.where(finite, torch.where(norm != 0, group_k, 0), -1)
            for j, i in enumerate(members):
                e[i], k[i], norms[i], projectors[i] = group_e[j], group_k[j], norm[j], N[j].flatten()
        norms_of_all, tails = torch.stack(norms), torch.stack(e)
        active = norms_of_all != 0
        if min_sparsity > 0:
            zeros = torch.stack([(w == 0).sum() for w in weights]).double()
            sizes = torch.tensor([w.numel() for w in weights], dtype=torch.float64, device=device)
            active = active & (zeros / sizes >= min_sparsity)  # a mean over the device would be inexact
        shares = active / active.sum().clamp(min=1).double()  # [B]
        loss = -(shares * torch.where(active, tails, 0.0)).sum().to(dtype)
        inv_norms = torch.where(norms_of_all != 0, 1 / norms_of_all, 0.0)
    return loss, tails, torch.stack(k), inv_norms, shares, torch.cat(projectors)


def _rank_gradient(weight_matrix: Tensor, projector: Tensor, inv_norm: Tensor, share: Tensor, weight: Tensor) -> Tensor:
    """weight * share * N Wn / ||W||_F as [m, n], zero where share is 0 (whatever N holds)."""
    dtype = projector.dtype
    Wn = weight_matrix.to(dtype) * inv_norm.to(dtype)  # [m, n]
    gradient = (projector @ Wn) * (weight * share * inv_norm).to(dtype)
    return torch.where(share > 0, gradient, 0.0)


def rank_apply(
    weights: Sequence[Tensor],
    projector: Tensor,
    inv_norms: Tensor,
    shares: Tensor,
    weight: Tensor,
    fast: bool = False,
) -> list[Tensor]:
    """The gradient of weight * loss with respect to every weight, in the weight's dtype and layout. `fast`: a kernel
    may multiply in 16 bits, with a relative error up to 1e-3."""
    gradients = []
    offsets = grouping.projector_offsets(weights)
    weight = weight.to(inv_norms)
    with _without_autocast(inv_norms.device):
        for b, w in enumerate(weights):
            X, gradient = grouping.matrix_view(w), torch.zeros_like(w)
            m = min(X.shape)
            if m > 0:
                N = projector[offsets[b] : offsets[b + 1]].view(m, m)
                tall = X.shape[0] > X.shape[1]
                matrix = _rank_gradient(X.mT if tall else X, N, inv_norms[b], shares[b], weight)
                gradient.copy_(grouping.from_matrix(matrix.mT if tall else matrix, w))
            gradients.append(gradient)
    return gradients


def rank_apply_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    projector: Tensor,
    inv_norms: Tensor,
    shares: Tensor,
    weight: Tensor,
    fast: bool = False,
) -> None:
    """Adds what `rank_apply` returns to `grads`, in their dtypes and layouts; inactive weights' gradients are not
    touched."""
    precise = [w.to(projector.dtype) for w in weights]
    for grad, addend in zip(grads, rank_apply(precise, projector, inv_norms, shares, weight), strict=True):
        grad.add_(addend)


# ---------------------------------------------------------------------------------------------------------------- masks


def _segment(bits: Tensor, offset: int, numel: int) -> Tensor:
    """The bool values [numel] of one segment."""
    octets = bits[offset : offset + (numel + 7) // 8]
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (octets[:, None] >> places & 1).flatten()[:numel].bool()


def pack(masks: Sequence[Tensor], offsets: Sequence[int], nbytes: int) -> Tensor:
    """Bool tensors of any shape into one buffer, uint8 [nbytes]; padding bits are zero."""
    bits = torch.zeros(nbytes, dtype=torch.uint8, device=masks[0].device)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    for mask, offset in zip(masks, offsets, strict=True):
        octets = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
        bits[offset : offset + len(octets)] = (octets << places).sum(1, dtype=torch.uint8)
    return bits


def unpack(bits: Tensor, offsets: Sequence[int], numels: Sequence[int]) -> list[Tensor]:
    """The inverse of `pack`: one flat bool tensor [numel] a segment."""
    return [_segment(bits, offset, numel) for offset, numel in zip(offsets, numels, strict=True)]


def popcount(bits: Tensor, offsets: Sequence[int], numels: Sequence[int]) -> Tensor:
    """The number of ones in each segment, int64 [B]."""
    counts = [segment.sum() for segment in unpack(bits, offsets, numels)]
    return torch.stack(counts) if counts else bits.new_zeros(0, dtype=torch.int64)


def mask_(tensors: Sequence[Tensor], bits: Tensor, offsets: Sequence[int], scale: Tensor | None) -> None:
    """x <- scale * x where the bit is set, else 0 (also for NaN and inf); an offset of -1 only scales."""
    for tensor, offset in zip(tensors, offsets, strict=True):
        scaled = tensor if scale is None else tensor * scale
        tensor.copy_(_masked(scaled, bits, offset))


def _masked(tensor: Tensor, bits: Tensor | None, offset: int) -> Tensor:
    if bits is None or offset < 0:
        return tensor
    return torch.where(_segment(bits, offset, tensor.numel()).view(tensor.shape), tensor, 0)


def sort_keys(scores: Tensor, absolute: bool) -> Tensor:
    """Integers [n] in the order of `scores` flattened: -inf < ... < -0.0 == 0.0 < ... < inf < NaN."""
    scores = scores.flatten()
    if absolute:
        scores = scores.abs()
    if scores.dtype != torch.float64:
        scores = scores.float()
    scores = torch.where(scores.isnan(), torch.nan, scores + 0.0)  # one NaN, one zero
    keys = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    keys = torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys)
    return keys.long()


def select_topk(
    scores: Sequence[Tensor],
    counts: Tensor,
    offsets: Sequence[int],
    nbytes: int,
    eligible: Tensor | None,
    absolute: bool,
    per_tensor: bool,
) -> Tensor:
    """The bits, uint8 [nbytes], of the `counts` best eligible elements: per tensor (counts int64 [B]), or over all
    tensors as one (counts int64 [1]). Order: score (its magnitude if `absolute`), NaN above all; ties go to the
    lower index, of the lower tensor. A count above the number of eligible elements takes them all, a negative one
    takes none."""
    keys = [sort_keys(score, absolute) for score in scores]
    if eligible is not None:
        never = torch.iinfo(torch.int64).min
        open_ = unpack(eligible, offsets, [score.numel() for score in scores])
        keys = [torch.where(may, key, never) for key, may in zip(keys, open_, strict=True)]
    if per_tensor:
        chosen = [_best(key, count) for key, count in zip(keys, counts, strict=True)]
    else:
        chosen = list(_best(torch.cat(keys), counts[0]).split([len(key) for key in keys]))
    if eligible is not None:
        chosen = [best & may for best, may in zip(chosen, open_, strict=True)]
    return pack(chosen, offsets, nbytes)


def _best(keys: Tensor, count: Tensor) -> Tensor:
    order = keys.argsort(descending=True, stable=True)
    return torch.empty_like(keys, dtype=torch.bool).scatter_(
        0, order, torch.arange(len(keys), device=keys.device) < count
    )


# ----------------------------------------------------------------------------------------------------------- optimizers


def _unscaled(grad: Tensor, param: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """The gradient in the arithmetic of the step: float32 for 16-bit parameters, divided by GradScaler's scale."""
    grad = grad.to(accumulation_dtype([param]))
    if grad_scale is not None:
        grad = grad / grad_scale.to(grad)
    return -grad if maximize else grad


def _commit(targets: Sequence[Tensor], values: Sequence[Tensor], found_inf: Tensor | None) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) != 0, target.to(value), value))


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
    """One step of torch.optim.SGD whose gradient, momentum and weight are zero where the mask is. `momentum_buffers`
    is empty without momentum; `first_step` sets them to the gradient, as torch does. Nothing changes where
    `found_inf` is not 0."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        p = param.to(accumulation_dtype([param]))
        g = _unscaled(grad, param, grad_scale, maximize)
        if weight_decay != 0:
            g = g + weight_decay * p
        g = _masked(g, bits, offsets[i])
        if momentum != 0:
            buffer = momentum_buffers[i]
            updated = g if first_step else momentum * buffer.to(g.dtype) + (1 - dampening) * g
            updated = _masked(updated, bits, offsets[i])
            _commit([buffer], [updated], found_inf)
            g = g + momentum * updated if nesterov else updated
        _commit([param], [_masked(p - lr.to(g.dtype) * g, bits, offsets[i])], found_inf)


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
    """One step of torch.optim.AdamW whose gradient, moments and weight are zero where the mask is. `steps` are 0-d
    float32 tensors, counted up here; `max_exp_avg_sqs` is empty without amsgrad. Nothing changes where `found_inf`
    is not 0."""
    for i, (param, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        g = _masked(_unscaled(grad, param, grad_scale, maximize), bits, offsets[i])
        p = param.to(g.dtype)
        p = p - (lr * weight_decay).to(p.dtype) * p
        t = step + 1
        m, v = exp_avgs[i].to(g.dtype), exp_avg_sqs[i].to(g.dtype)
        m = _masked(m + (1 - beta1) * (g - m), bits, offsets[i])
        v = _masked(beta2 * v + (1 - beta2) * g * g, bits, offsets[i])
        targets, values = [step, exp_avgs[i], exp_avg_sqs[i]], [t, m, v]
        if amsgrad:
            v = torch.maximum(_masked(max_exp_avg_sqs[i].to(g.dtype), bits, offsets[i]), v)
            targets, values = [*targets, max_exp_avg_sqs[i]], [*values, v]
        correction1 = 1 - beta1 ** t.double()
        correction2 = 1 - beta2 ** t.double()
        denominator = v.sqrt() / correction2.sqrt().to(v.dtype) + eps
        p = p - (lr / correction1).to(p.dtype) * m / denominator
        _commit([*targets, param], [*values, _masked(p, bits, offsets[i])], found_inf)
