"""A whole training step: forward, backward, and all that pruning adds. ResNet-50 on a GPU, ResNet-20 on a CPU; everyone
trains the same network on the same batch, from the same start.

Ordinary steps and the steps of topology updates are timed apart; what is reported for a way of pruning is the mean of
100 steps of which one is an update: (99 ordinary + update) / 100. The update step takes no optimizer step, in any way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Scale
from benchmarks.race import Contestant, Race, entries
from benchmarks.training import Dense, Network, Pruned, Published, Setup, Training, fastest_convolutions
from benchmarks.workload import EVERY

DENSE = "dense step, torch fused SGD"
PUBLISHED = "as published, rank loss once in 100 steps"
PUBLISHED_ALWAYS = "as published, rank loss in every step"
OURS = "rpg_fast, rank loss in every step"
ORDINARY, UPDATE = ": ordinary step", ": topology update"
MEANS = {
    PUBLISHED_ALWAYS: (PUBLISHED_ALWAYS + ORDINARY, PUBLISHED + UPDATE),
    PUBLISHED: (PUBLISHED + ORDINARY, PUBLISHED + UPDATE),
    OURS: (OURS + ORDINARY, OURS + UPDATE),
}
NAMES = [*MEANS, *dict.fromkeys(part for parts in MEANS.values() for part in parts), DENSE]

STEPS = {"cuda": 10, "cpu": 3}  # in a lap
SECONDS = {"cuda": 90.0, "cpu": 45.0}  # of rounds
TOLERANCE = {False: 1e-3, True: 2e-2}  # relative, of weights and momenta after a step; in bf16


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Relative, over all of them together, in float64."""
    pairs = [(g.double(), w.double()) for g, w in zip(got, want, strict=True)]
    return float(sum((g - w).square().sum() for g, w in pairs) / sum(w.square().sum() for _, w in pairs)) ** 0.5


def agreement(network: Network) -> Callable[[dict[str, Any]], dict[str, dict[str, Any]]]:
    """After one step: the published ordinary step is the dense one under masks, ours the published one with the rank
    loss. After one update: masks of as many ones, in the same places."""
    masks = [*network.masks.values()] * 2  # of weights, then of momenta
    limit = TOLERANCE[network.setup.bf16]

    def agree(outcomes: dict[str, Any]) -> dict[str, dict[str, Any]]:
        wanted = {
            PUBLISHED + ORDINARY: [t * mask for t, mask in zip(outcomes[DENSE], masks, strict=True)],
            OURS + ORDINARY: outcomes.get(PUBLISHED_ALWAYS + ORDINARY),
        }
        measures: dict[str, dict[str, Any]] = {}
        for name, want in wanted.items():
            if want is None or name not in outcomes:
                continue
            count = len(want) // 2  # weights first
            off = max(error(outcomes[name][part], want[part]) for part in (slice(count), slice(count, None)))
            measures[name] = {"step_error": off}
            if not off <= limit:
                measures[name]["wrong"] = f"weights or momenta off by {off:.2g} after a step, limit {limit:g}"
        if PUBLISHED + UPDATE in outcomes:
            pairs = list(zip(outcomes[OURS + UPDATE], outcomes[PUBLISHED + UPDATE], strict=True))
            differing, ones = (
                sum(int(n) for n in counts)
                for counts in zip(*(((mine != theirs).sum(), theirs.sum()) for mine, theirs in pairs), strict=True)
            )
            measures[OURS + UPDATE] = {"masks_differ": float(differing)}
            if differing > 8 * len(pairs) + 0.01 * ones:
                measures[OURS + UPDATE]["wrong"] = f"{differing} places of masks with {ones} ones differ"
        return measures

    return agree


@pytest.fixture(scope="module")
def race(scale: Scale, began: float | None) -> Iterator[Race]:
    network = Network(Setup.of(scale.device, full=scale.full), scale.device)
    dense, published, pruned = Dense(network), Published(network), Pruned(network)
    kind = scale.device.type
    steps = STEPS[kind] if scale.full else 1

    def several(
        name: str, training: Training, step: Callable[[], None], count: int = steps, **options: Any
    ) -> Contestant:
        def run() -> None:
            for _ in range(count):
                step()

        def after_one_step(_: None) -> list[Tensor]:
            training.restore()
            step()
            return training.results()

        return Contestant(name, run, after_one_step, training.restore, fresh=True, calls=count, **options)

    def update(name: str, training: Published | Pruned) -> Contestant:
        def masks(_: None) -> list[Tensor]:
            return training.masks()

        return Contestant(name, training.update, masks, training.restore, fresh=True)

    def mean(name: str, setting: str) -> Contestant:
        ordinary, rare = MEANS[name]
        return Contestant(name, mean_of={ordinary: EVERY - 1, rare: 1}, setting=setting)

    method = f"{scale.backend('rank_filter' if kind == 'cuda' else 'rank_project')}, MaskedSGD"
    contestants = [
        several(PUBLISHED + ORDINARY, published, published.step),
        update(PUBLISHED + UPDATE, published),
        several(PUBLISHED_ALWAYS + ORDINARY, published, published.rank_step, 1),
        several(OURS + ORDINARY, pruned, pruned.step),
        update(OURS + UPDATE, pruned),
        several(DENSE, dense, dense.step),
        mean(PUBLISHED, "hooks, SVDs, sorts"),
        mean(PUBLISHED_ALWAYS, "hooks, SVDs, sorts"),
        mean(OURS, method),
    ]
    details = {"images": network.setup.batch}
    race = Race(
        f"training step, {network.setup}", contestants, agreement(network), full=scale.full, seconds=SECONDS[kind],
        details=details, baseline=DENSE, began=began,
    )  # fmt: skip
    with fastest_convolutions():
        yield race


@pytest.mark.parametrize("name", entries(NAMES))
def test_train_step(name: str, race: Race, benchmark: Any) -> None:
    race.report(name, benchmark)


@pytest.mark.full
def test_one_compilation_serves_everyone() -> None:
    """As on a GPU: hooks come and go, weights are put back, and the compiled network stays what it is."""
    setup = replace(Setup.of(torch.device("cpu"), full=False), compiled=True, bf16=True)
    network = Network(setup, torch.device("cpu"))
    dense, published, pruned = Dense(network), Published(network), Pruned(network)
    with torch._dynamo.config.patch(error_on_recompile=True):
        outcomes = {}
        for name, training, step in (
            (DENSE, dense, dense.step),
            (PUBLISHED + ORDINARY, published, published.step),
            (PUBLISHED_ALWAYS + ORDINARY, published, published.rank_step),
            (OURS + ORDINARY, pruned, pruned.step),
        ):
            training.restore()
            step()
            outcomes[name] = training.results()
        for way in (published, pruned):
            way.restore()
            way.update()
    measures = agreement(network)(outcomes)
    assert set(measures) == {PUBLISHED + ORDINARY, OURS + ORDINARY}
    assert not any("wrong" in found for found in measures.values())
