"""One optimizer step with masks: all 161 parameters of ResNet-50, masks of 90 % zeros on the 54 prunable ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpg_fast
from benchmarks.conftest import Scale
from benchmarks.race import Contestant, Race, entries, fastest
from benchmarks.workload import prune, resnet50
from tests.cases import relative_error

FOREACH = "torch foreach, multiplications by masks"
FUSED = "torch fused, multiplications by masks"
COPY = "copy_ of as many bytes"


@dataclass(frozen=True)
class Kind:
    """An optimizer of torch, its masked counterpart, and the float32 values that a step has to read and write for each
    weight: weight, gradient and state; weight and state."""

    name: str
    theirs: type[torch.optim.Optimizer]
    ours: type[torch.optim.Optimizer]
    options: dict[str, float]
    state: tuple[str, ...]
    moved: int


SGD = Kind(
    "SGD",
    torch.optim.SGD,
    rpg_fast.MaskedSGD,
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    state=("momentum_buffer",),
    moved=5,
)
ADAMW = Kind(
    "AdamW",
    torch.optim.AdamW,
    rpg_fast.MaskedAdamW,
    {"lr": 1e-3, "weight_decay": 1e-2},
    state=("exp_avg", "exp_avg_sq"),
    moved=7,
)


class Training:
    """A pruned ResNet-50 with gradients, and an optimizer that has stepped, both of which can be put back."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.weights = rpg_fast.prunable_weights(model)
        self.parameters = list(model.parameters())
        optimizer.step()
        self.state = [
            value for p in self.parameters for value in optimizer.state[p].values() if isinstance(value, Tensor)
        ]
        self.start = [t.detach().clone() for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [*(p.detach() for p in self.parameters), *self.state, *(p.grad for p in self.parameters)]

    def reset(self) -> None:
        for tensor, start in zip(self._tensors(), self.start, strict=True):
            tensor.copy_(start)

    def outcome(self, _: None) -> list[Tensor]:
        return [t.clone() for t in self._tensors()[: len(self.parameters) + len(self.state)]]


def with_multiplications(training: Training, masks: list[Tensor], keys: tuple[str, ...]) -> Any:
    """The step of a torch optimizer between the multiplications by masks of gradients, and of state and weights."""
    weights = list(training.weights.values())
    gradients = [w.grad for w in weights]
    after = [*(training.optimizer.state[w][key] for w in weights for key in keys), *(w.detach() for w in weights)]
    masks_after = [*(mask for mask in masks for _ in keys), *masks]

    def run() -> None:
        torch._foreach_mul_(gradients, masks)
        training.optimizer.step()
        torch._foreach_mul_(after, masks_after)

    return run


def agree(outcomes: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """Weights and state of everyone after one step, against torch's foreach."""
    want = outcomes[FOREACH]
    measures = {}
    for name, got in outcomes.items():
        error = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
        assert error <= 1e-5, f"{name}: weights or state differ by {error} after one step"
        pruned = all(bool((g[w == 0] == 0).all()) for g, w in zip(got, want, strict=True))
        assert pruned, f"{name}: a pruned weight, or its state, is not zero"
        measures[name] = {"error": error}
    return measures


def race_of(kind: Kind, scale: Scale) -> Race:
    model = resnet50(scale.device, full=scale.full)
    masks = prune(model)
    generator = torch.Generator(scale.device).manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, device=p.device, generator=generator).mul_(1e-3)

    copying = _copying(kind, model)
    ours = _ours(kind, _copy(model), masks, scale)
    foreach = _peer(kind, FOREACH, _copy(model), masks, "foreach", scale.full)
    fused = _peer(kind, FUSED, _copy(model), masks, "fused", scale.full)
    return Race(f"masked step, {kind.name}, 161 parameters", [foreach, fused, ours, copying], agree, full=scale.full)


def _copy(model: nn.Module) -> nn.Module:
    network = copy.deepcopy(model)
    for p, original in zip(network.parameters(), model.parameters(), strict=True):
        p.grad = original.grad.clone()
    return network


def _peer(kind: Kind, name: str, model: nn.Module, masks: dict[str, Tensor], how: str, full: bool) -> Contestant:
    on_gpu = next(model.parameters()).is_cuda
    capturable = {"capturable": True} if on_gpu and kind is ADAMW else {}
    training = Training(model, kind.theirs(model.parameters(), **kind.options, **{how: True}, **capturable))
    candidates = []
    for setting, dtype in (("float masks", torch.float32), ("bool masks", torch.bool)):
        run = with_multiplications(training, [mask.to(dtype) for mask in masks.values()], kind.state)
        candidates.append(Contestant(name, run, training.outcome, training.reset, graph=True, setting=setting))
    return fastest(*candidates) if full else candidates[0]


def _ours(kind: Kind, model: nn.Module, masks: dict[str, Tensor], scale: Scale) -> Contestant:
    training = Training(model, kind.ours(model.parameters(), **kind.options))
    training.optimizer.set_masks(rpg_fast.PackedMasks(training.weights).load_(masks))
    setting = scale.backend("masked_sgd_" if kind is SGD else "masked_adamw_")
    name = f"rpg_fast.{kind.ours.__name__}"
    return Contestant(name, training.optimizer.step, training.outcome, training.reset, graph=True, setting=setting)


def _copying(kind: Kind, model: nn.Module) -> Contestant:
    """As many bytes as a step moves, half of them read and half written; the masks add a bit a weight. A CPU fetches
    what it is about to overwrite, which a step in place is spared: it can be a little faster than this."""
    numel = sum(p.numel() for p in model.parameters())
    source = torch.ones((4 * kind.moved * numel + numel // 8) // 8, device=next(model.parameters()).device)
    target = torch.empty_like(source)
    return Contestant(COPY, lambda: target.copy_(source), graph=True)


@pytest.fixture(scope="module")
def sgd(scale: Scale) -> Race:
    return race_of(SGD, scale)


@pytest.fixture(scope="module")
def adamw(scale: Scale) -> Race:
    return race_of(ADAMW, scale)


def names(ours: str) -> list[str]:
    contestants = [FOREACH, FUSED, ours, COPY]
    return entries(contestants, graphs=contestants)


@pytest.mark.parametrize("name", names("rpg_fast.MaskedSGD"))
def test_masked_sgd(name: str, sgd: Race, benchmark: Any) -> None:
    sgd.report(name, benchmark)


@pytest.mark.parametrize("name", names("rpg_fast.MaskedAdamW"))
def test_masked_adamw(name: str, adamw: Race, benchmark: Any) -> None:
    adamw.report(name, benchmark)
