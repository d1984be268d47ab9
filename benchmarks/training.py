"""One network in training: dense, with rpg_fast's pruner, or pruned as published. The three share the network, the data
and the loop, and differ in what comes between the backward pass and the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

import rpg_fast
from benchmarks import peers
from benchmarks.workload import EVERY, RECIPE, SCHEDULE, UPDATE, before_update, prune
from rpg_fast import grouping
from rpg_fast.train.models import build_model

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
RANK = {"rank_weight": 4.0, "tail_energy": 0.2}  # of the recipe for 98 %
STAGES = ("forward", "backward", "rank gradient and topology", "optimizer step")


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms and keeps the fastest, as training programs have it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Setup:
    """A network, its batch of images of `side` x `side` pixels, and how it computes: in fp32, contiguous and eager
    where nothing else is said."""

    arch: str
    classes: int
    batch: int
    side: int
    width: int | None = None
    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        ways = [word for word in ("bf16", "channels_last", "compiled") if getattr(self, word)]
        return ", ".join([self.arch, f"batch {self.batch} of {self.side} x {self.side}", *ways])

    @classmethod
    def of(cls, device: torch.device, *, full: bool) -> Setup:
        """ResNet-50 as it is trained on a GPU, ResNet-20 as it is on a CPU; or a small one of the latter."""
        if not full:
            return cls("resnet20", 10, batch=4, side=16, width=4, channels_last=True)
        if device.type == "cpu":
            return cls("resnet20", 10, batch=128, side=32)
        return cls("resnet50", 1000, batch=256, side=224, bf16=True, channels_last=True, compiled=True)


class Network:
    """A model with a batch of data, and its start, to which it can be put back.

    Attributes:
        masks: {name: bool} of the prunable weights, as sparse as RECIPE has them before UPDATE; so is the start.
    """

    def __init__(self, setup: Setup, device: torch.device):
        torch.manual_seed(0)
        form = torch.channels_last if setup.channels_last else torch.contiguous_format
        model = build_model(setup.arch, num_classes=setup.classes, width=setup.width)
        self.setup, self.device = setup, device
        self.model = model.to(device=device, memory_format=form)  # type: ignore[call-overload]
        self.weights = rpg_fast.prunable_weights(self.model)
        self.layers = rpg_fast.prunable_weights(self.model, include=grouping.CONVOLUTIONS)
        self.masks = prune(self.model, SCHEDULE(UPDATE - EVERY), together=True)
        self.images = torch.randn(setup.batch, 3, setup.side, setup.side, device=device).to(memory_format=form)
        self.labels = torch.randint(setup.classes, (setup.batch,), device=device)
        self._forward = torch.compile(self.model) if setup.compiled else self.model
        self._tensors = [*(p.detach() for p in self.model.parameters()), *self.model.buffers()]
        self._start = [t.clone() for t in self._tensors]
        self._hooks: list[RemovableHandle] = []

    def restore(self) -> None:
        """The start: its weights and statistics, no gradients, no hooks."""
        for tensor, start in zip(self._tensors, self._start, strict=True):
            tensor.copy_(start)
        self.model.zero_grad()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def forget_start(self) -> None:
        """Lets go of the start and its masks, which training itself does not need."""
        self.masks, self._start = {}, []

    def hook(self, make: Callable[[int], Callable[[Tensor], Tensor]]) -> None:
        """Puts the hook ``make(i)`` on the gradient of every prunable weight."""
        self._hooks = [w.register_hook(make(i)) for i, w in enumerate(self.weights.values())]

    def backward(self, more: Callable[[], Tensor] | None = None) -> None:
        """Gradients of the cross-entropy of the batch, plus what `more` returns."""
        with record_function(STAGES[0]):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.setup.bf16):
                loss = nn.functional.cross_entropy(self._forward(self.images), self.labels)
            if more is not None:
                loss = loss + more()
        with record_function(STAGES[1]):
            loss.backward()


class Training(ABC):
    """Ordinary steps and topology updates on a network that it does not own: `restore` comes first."""

    optimizer: torch.optim.Optimizer

    def __init__(self, network: Network, optimizer: torch.optim.Optimizer):
        self.network, self.optimizer = network, optimizer
        self.weights = list(network.weights.values())
        for p in network.model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes the state
        self.momenta = [optimizer.state[p]["momentum_buffer"] for p in network.model.parameters()]
        self.restore()

    def restore(self) -> None:
        """Back to the start: the network's, momenta of zero."""
        self.network.restore()
        torch._foreach_zero_(self.momenta)

    @abstractmethod
    def step(self) -> None:
        """A step that changes no mask."""

    def results(self) -> list[Tensor]:
        """Weights and momenta of the prunable layers, cloned."""
        state = (self.optimizer.state[w]["momentum_buffer"] for w in self.weights)
        return [t.detach().clone() for t in (*self.weights, *state)]


class Dense(Training):
    """Forward, backward, torch's fused SGD."""

    def __init__(self, network: Network):
        super().__init__(network, torch.optim.SGD(network.model.parameters(), **SGD, fused=True))

    def step(self) -> None:
        self.network.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Pruned(Training):
    """rpg_fast: the rank gradient in every step, by the method that is automatic, with a state; MaskedSGD."""

    optimizer: rpg_fast.MaskedSGD

    def __init__(self, network: Network):
        optimizer = rpg_fast.MaskedSGD(network.model.parameters(), **SGD)
        self.pruner = rpg_fast.RankPruner(network.model, optimizer, **RECIPE, **RANK, rank_every=1)
        super().__init__(network, optimizer)

    def restore(self) -> None:
        """The masks, too; the rank state stays, as warm as it is."""
        self.pruner.load_state_dict(before_update(self.pruner))
        self.pruner.masks.load_(self.network.masks)
        super().restore()

    def step(self) -> None:
        self.pruner.step_count = UPDATE - 2
        self._step()

    def update(self) -> None:
        """A step of which the schedule makes a topology update; the optimizer rests."""
        self.pruner.step_count = UPDATE - 1
        self._step()

    def _step(self) -> None:
        self.network.backward()
        with record_function(STAGES[2]):
            ordinary = self.pruner.step()
        with record_function(STAGES[3]):
            if ordinary:
                self.optimizer.step()
            self.optimizer.zero_grad()

    def masks(self) -> list[Tensor]:
        return list(self.pruner.masks.unpack().values())


class Published(Training):
    """As published: hooks multiply the gradients by the masks, momenta and weights are masked after the optimizer's
    step. In the step of a topology update the rank loss, one SVD a layer, joins the loss, and the hooks keep the dense
    gradients; the update is one threshold by kthvalue, and two sorts a layer."""

    def __init__(self, network: Network):
        self._masks = [mask.float() for mask in network.masks.values()]
        self._kept: list[Tensor] | None = None  # dense gradients, while they are wanted
        super().__init__(network, torch.optim.SGD(network.model.parameters(), **SGD, fused=True))

    def restore(self) -> None:
        super().restore()
        for mask, start in zip(self._masks, self.network.masks.values(), strict=True):
            mask.copy_(start)
        self.network.hook(self._hook)

    def _hook(self, i: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            if self._kept is not None:
                self._kept[i] = gradient.clone()
            return gradient * self._masks[i]

        return hook

    def _rank_loss(self) -> Tensor:
        layers = list(self.network.layers.values())
        return RANK["rank_weight"] * peers.svd_loss(layers, RANK["tail_energy"])

    def step(self) -> None:
        self._step(None)

    def rank_step(self) -> None:
        """An ordinary step with the rank loss, which the published program does not take."""
        self._step(self._rank_loss)

    @torch.no_grad()
    def _step(self, more: Callable[[], Tensor] | None) -> None:
        with torch.enable_grad():
            self.network.backward(more)
        self.optimizer.step()
        momenta = [self.optimizer.state[w]["momentum_buffer"] for w in self.weights]
        for momentum, mask in zip(momenta, self._masks, strict=True):
            momentum.mul_(mask)
        for w, mask in zip(self.weights, self._masks, strict=True):
            w.mul_(mask)
        self.optimizer.zero_grad()

    def update(self) -> None:
        with self._keeping() as gradients:
            self.network.backward(self._rank_loss)
        momenta = [self.optimizer.state[w]["momentum_buffer"] for w in self.weights]
        fraction = rpg_fast.CosineDrop(RECIPE["drop_fraction"], SCHEDULE.last_update)(UPDATE)
        with torch.no_grad():
            weights = [w.detach() for w in self.weights]
            masks = peers.published_update(weights, gradients, momenta, SCHEDULE(UPDATE), fraction)
            torch._foreach_copy_(self._masks, masks)
        self.optimizer.zero_grad()

    @contextmanager
    def _keeping(self) -> Iterator[list[Tensor]]:
        """The dense gradients of a backward pass within."""
        self._kept = [torch.empty(0)] * len(self.weights)
        try:
            yield self._kept
        finally:
            self._kept = None

    def masks(self) -> list[Tensor]:
        return [mask.bool() for mask in self._masks]
