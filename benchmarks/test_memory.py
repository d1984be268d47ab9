"""Peak memory of training steps, one of them a topology update: with pruning and the rank loss, and dense. ResNet-50,
on a CPU with few images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import rpg_fast
from benchmarks.conftest import Scale
from benchmarks.memory import MEASURED, Footprint, footprint, kept, replayed
from benchmarks.race import Contestant, Race, entries
from benchmarks.training import Dense, Network, Pruned, Setup

DENSE = "dense step, torch fused SGD"
OURS = "rpg_fast, rank loss in every step"
BOUND = 30_000_000  # of ResNet-50: packed masks and the workspace of the rank loss
ON_CPU = Setup("resnet50", 1000, batch=4, side=224)
SMALL = Setup("resnet50", 10, batch=8, side=64, width=8)


class Outcome:
    """What training took, and of a pruned one what it keeps between two steps."""

    def __init__(self, measured: Footprint, kept_bytes: dict[str, int]):
        self.measured, self.kept = measured, kept_bytes


def train(way: type[Dense] | type[Pruned], setup: Setup, device: torch.device) -> Outcome:
    """Two steps and an update, or a third step, after as many to warm up."""
    found: dict[str, int] = {}

    def build() -> Callable[[], None]:
        training = way(Network(setup, device))
        update = training.update if isinstance(training, Pruned) else training.step

        def run() -> None:
            for step in (training.step, update, training.step):
                step()

        training.network.forget_start()
        run()
        if isinstance(training, Pruned):
            found.update(kept(training.pruner, training.optimizer))
        return run

    return Outcome(footprint(build, device), found)


def agree(outcomes: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Peaks, and how much higher ours is; nothing here can be wrong."""
    measures: dict[str, dict[str, Any]] = {}
    for name, outcome in outcomes.items():
        measures[name] = {"held_bytes": outcome.measured.held, "step_peak_bytes": outcome.measured.peak}
    added = outcomes[OURS].measured.peak - outcomes[DENSE].measured.peak
    measures[OURS] |= {"added_bytes": added, "kept_bytes": outcomes[OURS].kept, "bound_bytes": BOUND}
    return measures


@pytest.fixture(scope="module")
def race(scale: Scale, began: float | None) -> Race:
    setup = SMALL
    if scale.full:
        setup = ON_CPU if scale.device.type == "cpu" else Setup.of(scale.device, full=True)
    contestants = [
        Contestant(name, partial(train, way, setup, scale.device), outcome=lambda outcome: outcome)
        for name, way in ((DENSE, Dense), (OURS, Pruned))
    ]
    title = f"memory of training, {setup}"
    return Race(title, contestants, agree, full=scale.full, slow=0.0, began=began)


@pytest.mark.parametrize("name", entries([DENSE, OURS]))
def test_peak_of_training(name: str, race: Race, benchmark: Any) -> None:
    race.report(name, benchmark)


# ------------------------------------------------------------------------------------------------------ without a clock


def test_nothing_is_kept_but_what_is_documented() -> None:
    """Masks are one bit a weight in four buffers: now, before the last update, kept in it, and ever active. The rank
    state is a few numbers a layer: no projector stays that no call will reuse."""
    training = Pruned(Network(SMALL, torch.device("cpu")))
    training.step()
    training.update()
    found = kept(training.pruner, training.optimizer)
    weights = list(training.network.weights.values())
    bits = training.pruner.masks.bits
    numel = sum(w.numel() for w in weights)
    assert numel / 8 <= bits.nbytes <= numel / 8 + 128 * len(weights)
    assert found["masks"] == 4 * bits.nbytes
    assert 0 < found["rank state"] <= 64 * len(training.network.layers)
    assert found["tables"] <= 64 * 1024
    assert found["optimizer"] == 4 * sum(p.numel() for p in training.network.model.parameters())


def test_a_mask_of_bytes_would_be_found() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3))
    optimizer = rpg_fast.MaskedSGD(model.parameters(), lr=0.1)
    pruner = rpg_fast.RankPruner(model, optimizer, sparsity=0.9, total_steps=1000)
    before = kept(pruner, optimizer)
    pruner.extra = {"masks": [torch.ones_like(w, dtype=torch.bool) for w in pruner.weights.values()]}
    assert kept(pruner, optimizer)["tables"] - before["tables"] == sum(w.numel() for w in pruner.weights.values())


def test_peak_of_known_allocations() -> None:
    def build() -> Callable[[], None]:
        held = [torch.zeros(1 << 18)]  # 1 MiB

        def run() -> None:
            first = torch.zeros(1 << 19)  # 2 MiB more
            del first
            held.append(torch.zeros(1 << 18))
            held.clear()

        return run

    assert footprint(build, torch.device("cpu")) == Footprint(1 << 20, 3 << 20)


def test_releases_lower_the_peak() -> None:
    events = [{"name": "[memory]", "ts": ts, "args": {"Bytes": size}} for ts, size in ((1, 8), (3, -8), (4, 6), (5, 1))]
    marker = {"name": MEASURED, "ph": "X", "ts": 2}
    assert replayed([*events, marker]) == Footprint(8, 8)
    assert replayed([*events[1:], marker]) == Footprint(0, 0)
