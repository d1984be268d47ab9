"""One optimizer step with masks: all 161 parameters of ResNet-50, masks of 90 % zeros on the 54 prunable ones. On a GPU
several copies of the network step one after another: none of them is still in a cache when its turn comes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpg_fast
from benchmarks.conftest import Scale
from benchmarks.race import Contestant, Race, entries, fastest
from benchmarks.rates import Rates
from benchmarks.work import Work
from benchmarks.workload import prune, resnet50
from tests.cases import relative_error

FOREACH = "torch foreach, multiplications by masks"
FUSED = "torch fused, multiplications by masks"
PUBLISHED = "masking layer by layer, as published"
COPY = "copy_ of as many bytes"
COPIES = {"cuda": 3, "cpu": 1}  # 3 x 0.3 GB and more: the largest caches of GPUs hold about 0.1 GB


@dataclass(frozen=True)
class Kind:
    """An optimizer of torch, its masked counterpart, the float32 values that a step has to read and write for each
    weight (weight, gradient and state; weight and state), and its operations on them."""

    name: str
    theirs: type[torch.optim.Optimizer]
    ours: type[torch.optim.Optimizer]
    options: dict[str, float]
    state: tuple[str, ...]
    moved: int
    flops: int


SGD = Kind(
    "SGD",
    torch.optim.SGD,
    rpg_fast.MaskedSGD,
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
    state=("momentum_buffer",),
    moved=5,
    flops=7,
)
ADAMW = Kind(
    "AdamW",
    torch.optim.AdamW,
    rpg_fast.MaskedAdamW,
    {"lr": 1e-3, "weight_decay": 1e-2},
    state=("exp_avg", "exp_avg_sq"),
    moved=7,
    flops=15,
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


Step = Callable[[], Any]


def with_multiplications(training: Training, masks: list[Tensor], keys: tuple[str, ...]) -> Step:
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


def as_published(training: Training, masks: list[Tensor], keys: tuple[str, ...]) -> Step:
    """What the published hook of every gradient does, the step of a torch optimizer, and the published loops over state
    (of AdamW, which they leave alone, its moments) and weights."""
    weights = list(training.weights.values())

    @torch.no_grad()
    def run() -> None:
        for w, mask in zip(weights, masks, strict=True):
            w.grad.mul_(mask)
        training.optimizer.step()
        for w, mask in zip(weights, masks, strict=True):
            for key in keys:
                training.optimizer.state[w][key].mul_(mask)
        for w, mask in zip(weights, masks, strict=True):
            w.mul_(mask)

    return run


def agree(outcomes: dict[str, list[Tensor]]) -> dict[str, dict[str, Any]]:
    """Weights and state of everyone after one step, against torch's foreach."""
    want = outcomes[FOREACH]
    measures: dict[str, dict[str, Any]] = {}
    for name, got in outcomes.items():
        error = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
        pruned = all(bool((g[w == 0] == 0).all()) for g, w in zip(got, want, strict=True))
        measures[name] = {"error": error}
        if not error <= 1e-5:
            measures[name]["wrong"] = f"weights or state differ by {error:.2g} after one step, limit 1e-05"
        elif not pruned:
            measures[name]["wrong"] = "a pruned weight, or its state, is not zero"
    return measures


@dataclass
class Job:
    """One kind of step on copies of one network with gradients."""

    kind: Kind
    scale: Scale
    model: nn.Module
    masks: dict[str, Tensor]

    @property
    def copies(self) -> int:
        """How many networks step in one call; two in small runs, so that these, too, go through several."""
        return COPIES[self.scale.device.type] if self.scale.full else 2

    def trainings(self, optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> list[Training]:
        networks = [copy.deepcopy(self.model) for _ in range(self.copies)]
        for network in networks:
            for p, original in zip(network.parameters(), self.model.parameters(), strict=True):
                p.grad = original.grad.clone()
        return [Training(n, optimizer(n.parameters(), **self.kind.options, **options)) for n in networks]

    def work(self) -> Work:
        """Of the whole network; the masks add a bit a weight."""
        numel = sum(p.numel() for p in self.model.parameters())
        masked = sum(mask.numel() for mask in self.masks.values())
        return Work({"fp32": float(self.kind.flops * numel)}, 4 * self.kind.moved * numel + masked / 8)

    def contestant(self, name: str, trainings: list[Training], steps: list[Step], setting: str = "") -> Contestant:
        def reset() -> None:
            for training in trainings:
                training.reset()

        return Contestant(
            name,
            lambda: [step() for step in steps],
            lambda _: [t for training in trainings for t in training.outcome(None)],
            reset,
            graph=True,
            setting=setting,
            calls=self.copies,
            work=self.work,
        )

    def peer(self, name: str, sequence: Callable[..., Step], **how: bool) -> Contestant:
        """A sequence around the step of torch's optimizer, with float or bool masks, whichever is faster."""
        if self.scale.device.type == "cuda" and self.kind is ADAMW:
            how = how | {"capturable": True}
        trainings = self.trainings(self.kind.theirs, **how)
        candidates = []
        for setting, dtype in (("float masks", torch.float32), ("bool masks", torch.bool)):
            steps = []
            for training in trainings:
                masks = [mask.to(dtype, copy=True) for mask in self.masks.values()]
                steps.append(sequence(training, masks, self.kind.state))
            candidates.append(self.contestant(name, trainings, steps, setting))
        return fastest(*candidates) if self.scale.full else candidates[0]

    def ours(self) -> Contestant:
        trainings = self.trainings(self.kind.ours)
        for training in trainings:
            training.optimizer.set_masks(rpg_fast.PackedMasks(training.weights).load_(self.masks))
        setting = self.scale.backend("masked_sgd_" if self.kind is SGD else "masked_adamw_")
        steps = [training.optimizer.step for training in trainings]
        return self.contestant(f"rpg_fast.{self.kind.ours.__name__}", trainings, steps, setting)

    def copying(self) -> Contestant:
        """As many bytes as a step moves, half of them read and half written. A CPU fetches what it is about to
        overwrite, which a step in place is spared: it can be a little faster than this."""
        numel = int(self.work().bytes) // 8
        sources = [torch.ones(numel, device=self.scale.device) for _ in range(self.copies)]
        targets = [torch.empty_like(source) for source in sources]

        def run() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        return Contestant(COPY, run, graph=True, calls=self.copies, work=self.work)


def race_of(kind: Kind, scale: Scale, rates: Rates | None) -> Race:
    model = resnet50(scale.device, full=scale.full)
    masks = prune(model)
    generator = torch.Generator(scale.device).manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, device=p.device, generator=generator).mul_(1e-3)
    job = Job(kind, scale, model, masks)
    contestants = [
        job.peer(PUBLISHED, as_published),
        job.peer(FOREACH, with_multiplications, foreach=True),
        job.peer(FUSED, with_multiplications, fused=True),
        job.ours(),
        job.copying(),
    ]
    return Race(f"masked step, {kind.name}, 161 parameters", contestants, agree, full=scale.full, rates=rates)


@pytest.fixture(scope="module")
def sgd(scale: Scale, rates: Rates | None) -> Race:
    return race_of(SGD, scale, rates)


@pytest.fixture(scope="module")
def adamw(scale: Scale, rates: Rates | None) -> Race:
    return race_of(ADAMW, scale, rates)


def names(ours: str) -> list[str]:
    contestants = [PUBLISHED, FOREACH, FUSED, ours, COPY]
    return entries(contestants, graphs=contestants)


@pytest.mark.parametrize("name", names("rpg_fast.MaskedSGD"))
def test_masked_sgd(name: str, sgd: Race, benchmark: Any) -> None:
    sgd.report(name, benchmark)


@pytest.mark.parametrize("name", names("rpg_fast.MaskedAdamW"))
def test_masked_adamw(name: str, adamw: Race, benchmark: Any) -> None:
    adamw.report(name, benchmark)
