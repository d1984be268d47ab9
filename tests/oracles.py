"""What the results must be, written once more and straight from the definitions: slow, in float64 or plain Python, and
without a line of the package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------ rank loss


@dataclass(frozen=True)
class Spectrum:
    """U diag(S) Vh of a normalised matrix."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def distances(self, tail_energy: float) -> list[float]:
        """How far the tail energy that each k leaves is from the target."""
        tail, result = 0.0, []
        for s in reversed(self.S.tolist()):
            tail += s**2
            result.append(abs(tail - tail_energy))
        return result[::-1]

    def k(self, tail_energy: float) -> int:
        """The official choice: as the tail grows from the smallest singular value on, the first minimum."""
        distances = self.distances(tail_energy)
        return max(k for k, d in enumerate(distances) if d == min(distances))

    def allows(self, k: int, tail_energy: float, margin: float) -> bool:
        """Whether k is the rule's choice, or as good within `margin`."""
        distances = self.distances(tail_energy)
        return 0 <= k < len(distances) and distances[k] - min(distances) < margin


def official_spectrum(Wn: Tensor) -> Spectrum:
    return Spectrum(*torch.linalg.svd(Wn.detach(), full_matrices=False))


def official_term(W: Tensor, tail_energy: float, k: int | None, spectrum: Spectrum | None) -> tuple[Tensor, Spectrum]:
    """-||Wn - Wn_k||_F^2 of one weight, differentiable through the norm and not through the singular vectors."""
    M = W.reshape(W.shape[0], -1)
    Wn = M / M.norm()
    spectrum = official_spectrum(Wn) if spectrum is None else spectrum
    k = spectrum.k(tail_energy) if k is None else k
    Wn_k = (spectrum.U[:, :k] * spectrum.S[:k]) @ spectrum.Vh[:k]
    return -(Wn - Wn_k).square().sum(), spectrum


def official_rank_loss(
    weights: Sequence[Tensor],
    tail_energy: float,
    ks: Sequence[int] | None = None,
    min_sparsity: float = 0.0,
    spectra: Sequence[Spectrum | None] | None = None,
) -> tuple[Tensor, list[Tensor], list[Spectrum | None]]:
    """The loss in float64, its gradient with respect to every weight, and the spectra (None: not active). With `ks`,
    those ranks instead of the rule's; with `spectra`, what an earlier call on the same weights returned."""
    leaves = [w.detach().double().cpu().clone().requires_grad_() for w in weights]
    terms: list[Tensor] = []
    found: list[Spectrum | None] = []
    for i, W in enumerate(leaves):
        zeros = int((W == 0).sum())
        if zeros == W.numel() or zeros / W.numel() < min_sparsity:
            found.append(None)
            continue
        k, known = None if ks is None else ks[i], None if spectra is None else spectra[i]
        term, spectrum = official_term(W, tail_energy, k, known)
        terms.append(term)
        found.append(spectrum)
    if not terms:
        return torch.zeros((), dtype=torch.float64), [torch.zeros_like(W) for W in leaves], found
    loss = torch.stack(terms).mean()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    filled = [torch.zeros_like(W) if g is None else g for W, g in zip(leaves, gradients, strict=True)]
    return loss.detach(), filled, found


def tail_energy_rank(S: Sequence[float], tail_energy: float, rule: str) -> int:
    """Either rule, by trying every k in exact fractions of the given numbers."""
    from fractions import Fraction

    if any(not math.isfinite(s) for s in S):
        return -1
    squares = [Fraction(s) ** 2 for s in S]
    total = sum(squares)
    if total == 0:
        return 0
    tails = [sum(squares[k:], Fraction(0)) / total for k in range(len(S) + 1)]
    target = Fraction(tail_energy)
    if rule == "at_most":
        return next(k for k, tail in enumerate(tails) if tail <= target)
    return min(range(len(S)), key=lambda k: (abs(tails[k] - target), -k))


# ---------------------------------------------------------------------------------------------------------------- masks


def ranking(scores: Sequence[float]) -> list[int]:
    """The indices from best to worst: NaN, inf, ..., 0.0 and -0.0 alike, ..., -inf; lower index first among equals."""
    return sorted(range(len(scores)), key=lambda i: (0, 0.0, i) if math.isnan(scores[i]) else (1, -scores[i], i))


def round_half_up(sparsity: float, n: int) -> int:
    return math.floor(sparsity * n + 0.5)


def topk_mask(scores: Sequence[float], sparsity: float) -> list[bool]:
    kept = set(ranking(scores)[: len(scores) - round_half_up(sparsity, len(scores))])
    return [i in kept for i in range(len(scores))]


def prune_and_grow(
    mask: Sequence[bool], drop_scores: Sequence[float], grow_scores: Sequence[float], drop_fraction: float
) -> list[bool]:
    active = sum(mask)
    n_grow = math.floor(drop_fraction * active)
    stay = [i for i in ranking(drop_scores) if mask[i]][: active - n_grow]
    grown = [i for i in ranking(grow_scores) if i not in stay][:n_grow]
    return [i in stay or i in grown for i in range(len(mask))]


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """min(1, factor * sum / product) with the factor, found by bisection, that gives the whole this density."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    low, high = 0.0, 1 / min(raw)
    for _ in range(200):
        factor = (low + high) / 2
        whole = sum(min(1.0, factor * r) * n for r, n in zip(raw, sizes, strict=True))
        low, high = (factor, high) if whole < density * sum(sizes) else (low, factor)
    return [min(1.0, high * r) for r in raw]


# ------------------------------------------------------------------------------------------------------------- training


class PlainPruner:
    """The corrected prune-and-grow rules with bool masks and full sorts, for contiguous weights and any optimizer."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        update_every: int,
        prune_until: float = 0.9,
        update_until: float = 0.901,
        drop_fraction: float = 0.3,
        global_threshold: bool = True,
        rank_layers: Sequence[Tensor] = (),
        rank_weight: float = 0.0,
        tail_energy: float = 0.1,
    ):
        self.weights, self.optimizer = weights, optimizer
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        self.sparsity, self.every = sparsity, update_every
        self.updates = int(prune_until * total_steps) // update_every
        self.until = int(update_until * total_steps)
        self.drop_fraction, self.global_threshold = drop_fraction, global_threshold
        self.rank_layers, self.rank_weight, self.tail_energy = rank_layers, rank_weight, tail_energy
        self.t = 0

    @torch.no_grad()
    def step(self) -> bool:
        self.t += 1
        last = max(self.updates * self.every, self.until // self.every * self.every)
        if self.t % self.every != 0 or self.t > last:
            for name, w in self.weights.items():
                w.grad.mul_(self.masks[name])
            return True
        if self.rank_weight:
            with torch.enable_grad():
                _, gradients, _ = official_rank_loss(self.rank_layers, self.tail_energy)
            for w, g in zip(self.rank_layers, gradients, strict=True):
                w.grad += (self.rank_weight * g).to(w.grad)
        if not all(bool(w.grad.isfinite().all()) for w in self.weights.values()):
            return False
        done = self.t // self.every
        sparsity = self.sparsity if done >= self.updates else 1 - (1 - self.sparsity) ** (done / self.updates)
        self._prune(sparsity)
        fraction = self.drop_fraction / 2 * (1 + math.cos(math.pi * self.t / max(last, self.until)))
        for name, w in self.weights.items():
            before = self.masks[name].flatten()
            if bool(before.all()):
                continue  # nothing to grow into
            n_grow = math.floor(fraction * int(before.sum()))
            stay = self._best(w.flatten().abs(), before, int(before.sum()) - n_grow)
            grown = self._best(w.grad.flatten().abs(), ~stay, n_grow)
            self._keep_only(name, stay)
            self.masks[name] = (stay | grown).view(w.shape)
        return False

    def _prune(self, sparsity: float) -> None:
        names = list(self.weights)
        parts = [names] if self.global_threshold else [[name] for name in names]
        for part in parts:
            magnitudes = torch.cat([self.weights[name].flatten().abs() for name in part])
            open_ = torch.cat([self.masks[name].flatten() for name in part])
            kept = self._best(magnitudes, open_, len(open_) - round_half_up(sparsity, len(open_)))
            for name, piece in zip(part, kept.split([self.weights[name].numel() for name in part]), strict=True):
                self.masks[name] = piece.view(self.weights[name].shape).clone()
                self._keep_only(name, piece)

    def _keep_only(self, name: str, stay: Tensor) -> None:
        w = self.weights[name]
        stay = stay.view(w.shape)
        w[~stay] = 0
        for value in self.optimizer.state[w].values():
            if isinstance(value, Tensor) and value.shape == w.shape:
                value[~stay] = 0

    @staticmethod
    def _best(scores: Tensor, open_: Tensor, count: int) -> Tensor:
        order = scores.sort(descending=True, stable=True).indices
        order = order[open_[order]][:count]
        best = torch.zeros_like(open_)
        best[order] = True
        return best
