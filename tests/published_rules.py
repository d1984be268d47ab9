"""The published training program's rules for rank loss and topology, one after the other in the order in which that
program meets them: bool masks, full sorts, kthvalue, Python integers, SGD by hand. Written from its behaviour, without
a line of the package, and as slow as it likes.

Nothing is repaired here. What looks like a slip (a schedule that lags, one weight too many, one too few) is what the
published program does; docs/fidelity.md names each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def published_rank(squares: Tensor, tail_energy: float) -> int:
    """The rank whose tail energy is nearest to the target; of two that are equally near, the larger one. The tail keeps
    at least one value: the rank is at most n - 1, and 0 for a target of 1."""
    distances = (squares.flip(0).cumsum(0) - tail_energy).abs().tolist()  # squares: [n], descending
    return len(distances) - 1 - distances.index(min(distances))


def published_rank_loss(weights: Iterable[Tensor], tail_energy: float, min_sparsity: float = 0.0) -> Tensor:
    """Minus the mean tail energy. Gradients flow through the norm, not through the singular vectors. A weight of zeros
    and one whose tail is exactly zero do not count in the mean."""
    terms = []
    for W in weights:
        M = W.reshape(W.shape[0], -1)  # [out, rest]
        if (M == 0).sum().item() / M.numel() < min_sparsity or M.norm().item() == 0:
            continue
        Wn = M / M.norm()
        U, S, Vh = torch.linalg.svd(Wn.detach(), full_matrices=False)
        k = published_rank(S**2, tail_energy)
        term = -(Wn - U[:, :k] @ S[:k].diag() @ Vh[:k]).square().sum()
        if term.item() != 0:
            terms.append(term)
    return sum(terms, torch.zeros(())) / max(len(terms), 1)


def published_remaining(updates_done: int, density: float, planned: int) -> float:
    """The density that the next update prunes to, `planned` updates being the whole way down."""
    return pow(pow(density, 1.0 / planned), updates_done) if updates_done < planned else density


@dataclass
class PublishedRecipe:
    """The settings, under rpg_fast's names; in brackets the published ones."""

    density: float  # [dense_allocation]
    total_steps: int
    update_every: int  # [delta]
    prune_until: float = 0.9  # [iterative_T_end_percent]
    update_until: float = 0.901  # [T_end_percent]
    drop_fraction: float = 0.3  # [alpha]
    grow_steps: int = 1  # [grad_accumulation_n]
    rank_weight: float = 0.0  # [lamb]
    tail_energy: float = 0.1  # [partial_k]
    min_sparsity: float = 0.0  # [sparsity_thres]
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0


class PublishedProgram:
    """One training run. It owns its weights; `rank_layers` names those that have a rank loss."""

    def __init__(self, weights: Weights, rank_layers: Sequence[str], recipe: PublishedRecipe):
        self.weights = {name: w.detach().clone() for name, w in weights.items()}
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self.momenta: dict[str, Tensor] = {}
        self.rank_layers, self.recipe = rank_layers, recipe
        self.pruning_ends = int(recipe.prune_until * recipe.total_steps)
        self.updates_end = int(recipe.update_until * recipe.total_steps)
        self.t = 0  # optimizer steps asked for so far, updates among them
        self.updates_done = 0
        self.sparsities = dict.fromkeys(self.weights, 0.0)
        self.schedule_is_over = False
        self.sums: list[dict[str, Tensor]] | None = None  # of dense gradients, for each process
        self.rank_loss: float | None = None  # of the last evaluation

    # ------------------------------------------------------------------------------------------------------- one step

    def step(self, gradients: Sequence[Sequence[Weights]]) -> bool:
        """`gradients[process][micro_batch][name]` is a dense gradient of the task's loss. Returns whether the optimizer
        took a step."""
        self._backward(gradients)
        recipe, self.t = self.recipe, self.t + 1
        if self.t % recipe.update_every == 0 and self.t < self.updates_end:
            self._update()
            self.updates_done += 1
            if recipe.drop_fraction != 0:
                return False
        self._optimizer_step()
        return True

    def window_is_open(self) -> bool:
        """Asked before the step is counted: is an update at most `grow_steps` steps away, this one included?"""
        every = self.recipe.update_every
        return self.t < self.updates_end and every - self.t % every <= self.recipe.grow_steps

    def _backward(self, gradients: Sequence[Sequence[Weights]]) -> None:
        """Sums of dense gradients for growth, masked gradients for the optimizer; the rank loss in both."""
        extra = self._rank_gradients() if self.window_is_open() else None
        if extra is None:
            self.sums = None
        elif self.sums is None:
            self.sums = [{name: torch.zeros_like(w) for name, w in self.weights.items()} for _ in gradients]
        self.grads = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        for process, micro_batches in enumerate(gradients):
            for micro_batch in micro_batches:
                for name, g in micro_batch.items():
                    if extra is not None and self.sums is not None:
                        g = g + extra[name]
                        self.sums[process][name] += g / self.recipe.grow_steps
                    self.grads[name] += g * self.masks[name] / (len(micro_batches) * len(gradients))

    def _rank_gradients(self) -> dict[str, Tensor]:
        leaves = {name: w.clone().requires_grad_() for name, w in self.weights.items()}
        recipe = self.recipe
        loss = published_rank_loss([leaves[name] for name in self.rank_layers], recipe.tail_energy, recipe.min_sparsity)
        self.rank_loss = loss.item()
        if not loss.requires_grad or recipe.rank_weight == 0:
            return {name: torch.zeros_like(w) for name, w in self.weights.items()}
        found = torch.autograd.grad(recipe.rank_weight * loss, list(leaves.values()), allow_unused=True)
        return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(leaves.items(), found, strict=True)}

    def _optimizer_step(self) -> None:
        recipe = self.recipe
        for name, w in self.weights.items():
            g = self.grads[name] + recipe.weight_decay * w
            if recipe.momentum:
                g = recipe.momentum * self.momenta[name] + g if name in self.momenta else g.clone()
                self.momenta[name] = g * self.masks[name]
            w -= recipe.lr * g
            w *= self.masks[name]

    # ----------------------------------------------------------------------------------------------------- one update

    def _update(self) -> None:
        recipe = self.recipe
        if not self.schedule_is_over:
            planned = self.pruning_ends // recipe.update_every
            remaining = published_remaining(self.updates_done, recipe.density, planned)
            self._prune_globally(1.0 - remaining)
            self.schedule_is_over = remaining == recipe.density and any(s > 0 for s in self.sparsities.values())
        fraction = recipe.drop_fraction / 2 * (1 + math.cos(self.t * math.pi / self.updates_end))
        for name, sparsity in self.sparsities.items():
            if sparsity > 0:
                self._drop_and_grow(name, sparsity, fraction)
        for name, mask in self.masks.items():
            if name in self.momenta:
                self.momenta[name] *= mask
            self.weights[name] *= mask
            self.grads[name] *= mask

    def _prune_globally(self, sparsity: float) -> None:
        """Every weight at least as large as the k-th smallest stays: the k-th itself too, and all that equal it. With k
        zeros or more among all weights the threshold is zero, and everything stays or comes back."""
        magnitudes = torch.cat([w.abs().flatten() for w in self.weights.values()])
        threshold = 0.0
        if sparsity != 0:
            threshold = magnitudes.kthvalue(round(sparsity * len(magnitudes))).values.item()
        for name, w in self.weights.items():
            self.masks[name] = w.abs() >= threshold
            w *= self.masks[name]
            self.sparsities[name] = (~self.masks[name]).sum().item() / w.numel()

    def _drop_and_grow(self, name: str, sparsity: float, fraction: float) -> None:
        """Both counts are rounded down, from a density that one minus a fraction may have left a trifle too small."""
        w, n = self.weights[name], self.weights[name].numel()
        n_active, n_grow = int((1 - sparsity) * n), int((1 - sparsity) * n * fraction)
        kept = self._largest(w.abs().flatten(), n_active - n_grow)
        if self.recipe.drop_fraction == 0:
            self.masks[name] = kept.view(w.shape)
            return
        grown = self._largest(self._grow_scores(name).flatten().masked_fill(kept, -1.0), n_grow)
        w[grown.view(w.shape) & ~self.masks[name]] = 0
        self.masks[name] = (kept | grown).view(w.shape)

    def _grow_scores(self, name: str) -> Tensor:
        """The mean over processes of the magnitude of what each saw by itself."""
        assert self.sums is not None
        return torch.stack([sums[name].abs() for sums in self.sums]).mean(0)

    @staticmethod
    def _largest(scores: Tensor, count: int) -> Tensor:
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
        return chosen
