"""One topology update: prune to the schedule's sparsity, drop and grow, on the 54 prunable weights of ResNet-50 (25.5
million) where RPG's recipe for 98 % passes 90 %."""

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
from benchmarks.workload import EVERY, RECIPE, UPDATE, before_update, prune, resnet50

PUBLISHED = "kthvalue of all, two sorts a layer, as published"
TORCH = "torch: selections among the candidates"
OURS = "rpg_fast.RankPruner.step"


def agree(outcomes: dict[str, list[Tensor]]) -> dict[str, dict[str, Any]]:
    """Masks against ours: torch's differ where magnitudes tie, the published ones by their rounding, a weight or two a
    layer."""
    want = outcomes[OURS]
    measures: dict[str, dict[str, Any]] = {}
    for name, got in outcomes.items():
        differing = [int((g != w).sum()) for g, w in zip(got, want, strict=True)]
        measures[name] = {"masks_differ": float(sum(differing))}
        if max(differing) > 8:
            measures[name]["wrong"] = f"masks differ from rpg_fast's in {max(differing)} places of one weight, limit 8"
    return measures


@pytest.fixture(scope="module")
def race(scale: Scale) -> Iterator[Race]:
    model = resnet50(scale.device, full=scale.full)
    optimizer = rpg_fast.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = rpg_fast.RankPruner(model, optimizer, **RECIPE)
    sparsity, fraction = pruner.schedule(UPDATE), pruner.drop(UPDATE)
    masks = prune(model, pruner.schedule(UPDATE - EVERY), together=True)
    weights = [w.detach() for w in pruner.weights.values()]
    pruner.masks.load_(masks)
    state = before_update(pruner)
    generator = torch.Generator(scale.device).manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, device=p.device, generator=generator)
    optimizer.step()
    gradients = [w.grad for w in pruner.weights.values()]
    momenta = [optimizer.state[w]["momentum_buffer"] for w in pruner.weights.values()]
    start = [t.clone() for t in (*weights, *gradients, *momenta)]
    numel = sum(w.numel() for w in weights)
    active = numel - int(sparsity * numel + 0.5)

    def reset() -> None:
        pruner.load_state_dict(state)
        for tensor, value in zip((*weights, *gradients, *momenta), start, strict=True):
            tensor.copy_(value)

    def update() -> None:
        pruner.step_count = UPDATE - 1  # a graph is captured from runs that nothing resets
        pruner.step()

    pool = peers.thread_pool() if scale.device.type == "cpu" else None
    before = list(masks.values())
    runs = {
        PUBLISHED: lambda: peers.published_update(weights, gradients, momenta, sparsity, fraction),
        TORCH: lambda: peers.selecting_update(weights, gradients, momenta, before, active, fraction, pool),
        OURS: update,
    }
    outcomes = {OURS: lambda _: list(pruner.masks.unpack().values())}
    settings = {
        TORCH: "kthvalue and topk, " + ("one layer a thread" if pool else "layer by layer"),
        OURS: scale.backend("select_topk"),
    }
    contestants = [
        Contestant(
            name,
            run,
            outcomes.get(name, lambda masks: masks),
            reset,
            fresh=True,
            graph=name == OURS,
            setting=settings.get(name, ""),
        )
        for name, run in runs.items()
    ]
    yield Race("topology update, 54 weights", contestants, agree, full=scale.full)
    if pool:
        pool.shutdown()


@pytest.mark.parametrize("name", entries([PUBLISHED, TORCH, OURS], [OURS]))
def test_topology(name: str, race: Race, benchmark: Any) -> None:
    race.report(name, benchmark)
