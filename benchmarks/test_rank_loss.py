"""Rank loss and its gradient, all 53 convolutions of a 90 % sparse ResNet-50."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rpg_fast
from benchmarks import peers
from benchmarks.conftest import Scale
from benchmarks.race import Contestant, Race, entries
from benchmarks.workload import prune, resnet50
from rpg_fast import grouping
from tests.cases import TOLERANCES, relative_error

TAIL_ENERGY = 0.1
PUBLISHED = "one SVD a layer, as published"
TORCH = "torch: Gram, eigh in float64"
OURS = "rpg_fast.rank_loss, backward"
FUSED = "rpg_fast.add_rank_grad_"
PUBLISHED_LOSS, PUBLISHED_GRADIENT = 1e-3, 1e-2  # float32 SVD: LAPACK is a hundred times better, GPU drivers are not


def agree(outcomes: dict[str, tuple[float, list[Tensor]]]) -> dict[str, dict[str, float]]:
    """Everyone's loss and gradients against those of the float64 eigendecomposition."""
    loss, gradients = outcomes[TORCH]
    measures = {}
    for name, (got_loss, got_gradients) in outcomes.items():
        loss_error = abs(got_loss - loss) / abs(loss)
        gradient_error = max(relative_error(got, want) for got, want in zip(got_gradients, gradients, strict=True))
        exact = TOLERANCES["exact", torch.float32]
        limits = (PUBLISHED_LOSS, PUBLISHED_GRADIENT) if name == PUBLISHED else (exact.loss, exact.gradient)
        assert loss_error <= limits[0], f"{name}: loss {got_loss}, wanted {loss}"
        assert gradient_error <= limits[1], f"{name}: relative error of a gradient {gradient_error}, limit {limits[1]}"
        measures[name] = {"loss_error": loss_error, "gradient_error": gradient_error}
    return measures


@pytest.fixture(scope="module")
def race(scale: Scale) -> Iterator[Race]:
    model = resnet50(scale.device, full=scale.full)
    prune(model)
    weights = list(rpg_fast.prunable_weights(model, include=grouping.CONVOLUTIONS).values())
    for w in weights:
        w.grad = torch.zeros_like(w)

    def clear() -> None:
        torch._foreach_zero_([w.grad for w in weights])

    def outcome(loss: Any) -> tuple[float, list[Tensor]]:
        return float(loss), [w.grad.clone() for w in weights]

    def ours() -> Tensor:
        loss = rpg_fast.rank_loss(weights, TAIL_ENERGY, method="exact")
        loss.backward()
        return loss.detach()

    pool = peers.thread_pool()
    on_cpu = scale.device.type == "cpu"
    runs = {
        PUBLISHED: lambda: peers.svd_loop(weights, TAIL_ENERGY),
        TORCH: lambda: (
            peers.gram_eigh_threads(weights, TAIL_ENERGY, pool)
            if on_cpu
            else peers.gram_eigh_batches(weights, TAIL_ENERGY)
        ),
        OURS: ours,
        FUSED: lambda: rpg_fast.add_rank_grad_(weights, 1.0, TAIL_ENERGY, method="exact"),
    }
    settings = {
        TORCH: "zero rows left out, one layer a thread" if on_cpu else "one batch for each short side",
        OURS: scale.backend("rank_project"),
        FUSED: scale.backend("rank_project"),
    }
    contestants = [Contestant(n, run, outcome, clear, setting=settings.get(n, "")) for n, run in runs.items()]
    yield Race("rank loss and gradient, 53 convolutions", contestants, agree, full=scale.full)
    pool.shutdown()


@pytest.mark.parametrize("name", entries([PUBLISHED, TORCH, OURS, FUSED]))
def test_rank_loss(name: str, race: Race, benchmark: Any) -> None:
    race.report(name, benchmark)
