"""One rank loss with its gradient, done in every way there is, and how far each result is from float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rpg_fast
from benchmarks import peers, work
from benchmarks.race import Contestant
from benchmarks.work import Work
from rpg_fast import filtered, reference
from tests.cases import TOLERANCES, relative_error

TAIL_ENERGY = 0.1
INACCURATE = 1e-2  # a peer whose gradients are further off than this does not count as the best one


@dataclass(frozen=True)
class Limits:
    """Relative errors that are allowed, of the loss and of the gradient of any weight."""

    loss: float
    gradient: float


EXACT = Limits(TOLERANCES["exact", torch.float32].loss, TOLERANCES["exact", torch.float32].gradient)
POWER = Limits(2e-5, 3e-4)
FAST = Limits(2e-5, 1e-3)


@dataclass
class Outcome:
    """A loss and gradients, and what they should be."""

    loss: float
    gradients: list[Tensor]
    wanted_loss: float
    wanted_gradients: list[Tensor]

    def measures(self) -> dict[str, Any]:
        loss = abs(self.loss - self.wanted_loss) / abs(self.wanted_loss)
        pairs = zip(self.gradients, self.wanted_gradients, strict=True)
        gradient = max(relative_error(got, want) for got, want in pairs)
        return {"loss_error": loss, "gradient_error": gradient, "inaccurate": gradient > INACCURATE}


def in_float64(weights: Sequence[Tensor], tail_energy: float = TAIL_ENERGY) -> tuple[float, list[Tensor]]:
    """Loss and gradients by eigendecompositions, everything in float64."""
    precise = [w.detach().double() for w in weights]
    for w in precise:
        w.grad = torch.zeros_like(w)
    loss = peers.gram_eigh_batches(precise, tail_energy)
    return float(loss), [w.grad for w in precise if w.grad is not None]


def agree(limits: Mapping[str, Limits]) -> Callable[[dict[str, Outcome]], dict[str, dict[str, Any]]]:
    """The errors of everyone; ours must keep to their limits, a peer's are told."""

    def errors(outcomes: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
        measures = {name: outcome.measures() for name, outcome in outcomes.items()}
        for name, limit in limits.items():
            if name not in measures:
                continue
            found = (("the loss", "loss_error", limit.loss), ("a gradient", "gradient_error", limit.gradient))
            wrong = [
                f"relative error of {what} {measures[name][key]:.2g}, limit {most:.2g}"
                for what, key, most in found
                if not measures[name][key] <= most
            ]
            if wrong:
                measures[name]["wrong"] = ", ".join(wrong)
        return measures

    return errors


class RankJob:
    """Weights with gradients to add to, and makers of contestants that do so."""

    def __init__(self, weights: Sequence[Tensor]):
        self.weights = list(weights)
        self.shapes = work.sides(self.weights)
        self.on_gpu = self.weights[0].is_cuda
        self.wanted: tuple[float, list[Tensor]] | None = None
        for w in self.weights:
            w.grad = torch.zeros_like(w)

    def clear(self) -> None:
        torch._foreach_zero_([w.grad for w in self.weights if w.grad is not None])

    def outcome(self, loss: Any, calls: int = 1) -> Outcome:
        """The gradients that `calls` equal calls have added up to."""
        if self.wanted is None:
            self.wanted = in_float64(self.weights)
        return Outcome(float(loss), [w.grad / calls for w in self.weights if w.grad is not None], *self.wanted)

    def peer(self, name: str, run: Callable[[], Any], **options: Any) -> Contestant:
        return Contestant(name, run, self.outcome, self.clear, **options)

    def exact(self, name: str, run: Callable[[], Any], setting: str) -> Contestant:
        cost = work.eigendecomposition(self.shapes, solver="fp64")
        return Contestant(name, run, self.outcome, self.clear, setting=setting, work=lambda: cost)

    def power(self, name: str, setting: str, *, precision: str = "fp32", refresh_every: int = 1) -> Contestant:
        """`add_rank_grad_` with a state that has seen these weights. With `refresh_every`, a run is that many calls."""
        state = rpg_fast.RankState()

        def call() -> Tensor:
            return rpg_fast.add_rank_grad_(
                self.weights,
                1.0,
                TAIL_ENERGY,
                method="power",
                precision=precision,
                state=state,
                refresh_every=refresh_every,
            )

        def run() -> Tensor:
            for _ in range(refresh_every):
                loss = call()
            return loss

        def warm() -> None:
            for _ in range(2):
                run()
            self.clear()

        return Contestant(
            name,
            run,
            lambda loss: self.outcome(loss, refresh_every),
            warm,
            graph=refresh_every == 1,
            setting=setting,
            calls=refresh_every,
            work=lambda: self.power_work(state, precision, refresh_every),
        )

    def cold(self, name: str, setting: str) -> Contestant:
        """The first call with a new state."""

        def run() -> Tensor:
            state = rpg_fast.RankState()
            return rpg_fast.add_rank_grad_(self.weights, 1.0, TAIL_ENERGY, method="power", state=state)

        return Contestant(name, run, self.outcome, self.clear, setting=setting)

    def plain(self, name: str) -> Contestant:
        """The meaning of "power", batched torch in float64, where kernels serve the op."""
        device = self.weights[0].device
        target = torch.tensor(TAIL_ENERGY, dtype=torch.float64, device=device)
        one = torch.ones((), dtype=torch.float64, device=device)
        seed = torch.zeros((), dtype=torch.int64, device=device)
        state = {"windows": torch.zeros(len(self.weights), 2, dtype=torch.float64, device=device)}

        @torch.no_grad()
        def run() -> Tensor:
            matrices = [w.detach() for w in self.weights]
            found = filtered.rank_filter(
                matrices, target, 0.0, state["windows"], seed, rounds=filtered.COLD_ROUNDS, by_eigen=[]
            )
            loss, _, _, inv_norms, shares, projector, state["windows"], _ = found
            grads = [w.grad for w in self.weights if w.grad is not None]
            reference.rank_apply_(grads, matrices, projector, inv_norms, shares, one)
            return loss

        def warm() -> None:
            run()
            self.clear()

        return Contestant(name, run, self.outcome, warm, setting="batched torch in float64, reads the host")

    def power_work(self, state: rpg_fast.RankState, precision: str, refresh_every: int = 1) -> Work:
        assert state.windows is not None
        stages = work.filter_stages(self.weights, state.windows)
        arithmetic = {"arithmetic": "fp16"} if self.on_gpu else {"arithmetic": "fp64", "split": 1}
        once = work.power(self.shapes, stages, fast=precision == "fast", **arithmetic)
        again = work.reused(self.shapes, **arithmetic)
        return work.mixture([(1 / refresh_every, once), (1 - 1 / refresh_every, again)])
