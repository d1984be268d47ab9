"""What a topology update grows: scores of all weights, of which the largest by magnitude grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rpg_fast import reference
from rpg_fast.masks import MaskLayout, NamedWeights

Criterion = Callable[
    [list[str], list[Tensor], list[Tensor], torch.Generator | None, torch.optim.Optimizer], Sequence[Tensor] | None
]
"""``criterion(names, weights, grads, generator, optimizer)`` returns one score tensor per weight, in its shape, on its
device, of a real floating-point dtype; or None: nothing is dropped or grown. Weights grow where |score| is largest, NaN
above all. `weights` are detached, as they were before the update; `grads` are the dense gradients themselves. Neither
may be changed. It is called at every update that drops (also when a gradient is not finite; its scores then have no
effect), and should not read device values on the host, which would wait for the device."""

CRITERIA = ("rigl", "set", "momentum", "gmp", "static")


def rigl(names: list[str], weights: list[Tensor], grads: list[Tensor], *_: object) -> Sequence[Tensor]:
    """The gradients, read where they are (Evci et al., ICML 2020)."""
    return grads


def random(
    names: list[str], weights: list[Tensor], grads: list[Tensor], generator: torch.Generator | None, *_: object
) -> Sequence[Tensor]:
    """SET (Mocanu et al., 2018): one draw for all weights."""
    layout = MaskLayout.of(weights)
    return layout.split(torch.rand(sum(layout.numels), device=weights[0].device, generator=generator))


def nothing(*_: object) -> None:
    """GMP: gradual magnitude pruning (Zhu and Gupta, 2017)."""


class Momentum:
    """The momentum of the dense gradients (Sparse Momentum, Dettmers and Zettlemoyer, 2019, without its redistribution
    between layers), with the coefficient that the optimizer has for each weight at that step (`momentum`, or
    `betas[0]`), which schedulers may change.

    The optimizer's own buffers cannot be asked: where the mask is zero they are zero. So this holds one more value per
    weight, float32 (float64 for float64 weights), which every step updates in a fixed number of launches; a step whose
    gradients are not all finite leaves them as they were.

    Raises:
        ValueError: the optimizer has no momentum for a weight.
    """

    def __init__(self, weights: NamedWeights, optimizer: torch.optim.Optimizer):
        self.weights = dict(weights)
        missing = [name for name, decay in zip(weights, self._decays(optimizer), strict=True) if not decay]
        if missing:
            raise ValueError(
                f'criterion="momentum" needs the optimizer\'s momentum, but {type(optimizer).__name__} has none for '
                f'{missing[:5]} ({len(missing)} in all): set it, or take "rigl"'
            )
        self.layout = MaskLayout.of(weights.values())
        some = next(iter(weights.values()))
        dtype = reference.accumulation_dtype(list(weights.values()))
        self.flat = torch.zeros(sum(self.layout.numels), dtype=dtype, device=some.device)

    def _decays(self, optimizer: torch.optim.Optimizer) -> list[float]:
        decays = {id(p): _momentum_of(group) for group in optimizer.param_groups for p in group["params"]}
        return [decays[id(w)] for w in self.weights.values()]

    def observe(self, grads: Sequence[Tensor], finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """momentum <- decay * momentum + gradient, if `finite` (bool, 0-d)."""
        following = self.flat.clone()
        views = self.layout.views(self.layout.split(following))
        torch._foreach_mul_(views, self._decays(optimizer))
        torch._foreach_add_(views, self.layout.views(grads))
        torch.where(finite, following, self.flat, out=self.flat)

    def __call__(self, *_: object) -> Sequence[Tensor]:
        return self.layout.split(self.flat)

    def state_dict(self) -> dict[str, Tensor]:
        """{name: momentum in the weight's shape}."""
        return {name: m.clone() for name, m in zip(self.weights, self.layout.split(self.flat), strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        for name, mine in zip(self.weights, self.layout.split(self.flat), strict=True):
            mine.copy_(state[name])


def _momentum_of(group: Mapping[str, object]) -> float:
    betas = group.get("betas")
    value = betas[0] if isinstance(betas, Sequence) else group.get("momentum", 0.0)
    return float(value)  # type: ignore[arg-type]


def make_criterion(criterion: str | Criterion, weights: NamedWeights, optimizer: torch.optim.Optimizer) -> Criterion:
    """The criterion of a name, or a callable as it is. Raises ValueError for an unknown name."""
    if not isinstance(criterion, str) and callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {CRITERIA} or a callable, got {criterion!r}")
    if criterion == "momentum":
        return Momentum(weights, optimizer)
    by_name: dict[str, Criterion] = {"rigl": rigl, "set": random, "gmp": nothing, "static": nothing}
    return by_name[criterion]


def check_scores(scores: Sequence[Tensor], weights: NamedWeights) -> None:
    """Raises ValueError or TypeError for scores that a criterion must not return."""
    if len(scores) != len(weights):
        raise ValueError(f"the criterion returned {len(scores)} scores for {len(weights)} weights")
    for score, (name, w) in zip(scores, weights.items(), strict=True):
        if not isinstance(score, Tensor) or not score.is_floating_point():
            got = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise TypeError(f"the criterion's score of {name} must be a real floating-point tensor, got {got}")
        if score.shape != w.shape or score.device != w.device:
            raise ValueError(
                f"the criterion's score of {name} has shape {tuple(score.shape)} on {score.device}, wanted "
                f"{tuple(w.shape)} on {w.device}"
            )
