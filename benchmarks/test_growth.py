"""How the rank loss grows: one matrix from m = 64 to 4096, batches up to 512, and the linear layers of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rpg_fast
from benchmarks import peers, work
from benchmarks.conftest import NOT_MEASURED, Scale
from benchmarks.race import Contestant, Pace, Race, entries
from benchmarks.rank_job import POWER, TAIL_ENERGY, Outcome, RankJob, agree
from benchmarks.rates import Rates
from benchmarks.work import Side
from benchmarks.workload import SPARSITY

PUBLISHED = "one SVD a layer, as published"
TORCH = "torch: Gram, eigh in float32"
EXACTLY = "rpg_fast.add_rank_grad_, exact"
WARM = "rpg_fast.add_rank_grad_, power"

POINT_S = 1.5  # of rounds at one point
SLOW_S = 2.0  # what takes longer runs once
STAGE_S = 330.0  # no point is begun later than this after the first
BUDGET_S = {"cuda": 4.0, "cpu": 2.0}  # a contestant that is expected to take longer for one call is left out
COPIES, SQUARES = 7, 9  # of 4 bytes, held at most: m x n with the gradients to compare, m x m


@dataclass(frozen=True)
class Point:
    """Matrices of one job; `small` ones run on a CPU, too."""

    name: str
    shapes: tuple[Side, ...]
    small: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def cost(self) -> float:
        """Grows by no more than any contestant's time where the device is busy."""
        return float(sum(m * n for m, n in self.shapes))

    @property
    def bytes(self) -> float:
        return 4.0 * sum(COPIES * m * n + SQUARES * min(m, n) ** 2 for m, n in self.shapes)


def batch(count: int, m: int, aspect: int) -> Point:
    small = m <= 256 and count <= 8
    return Point(f"{count} of {m} x {aspect * m}", ((m, aspect * m),) * count, small)


def encoder(width: int, blocks: int) -> tuple[Side, ...]:
    """The linear layers [out, in] of a ViT's blocks: queries, keys and values together, projection, MLP of ratio 4."""
    return ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)) * blocks


def decoder(width: int, blocks: int) -> tuple[Side, ...]:
    """Of a transformer with a gated MLP of ratio 8/3, in whole multiples of 256."""
    hidden = -(-8 * width // (3 * 256)) * 256
    return (*((width, width),) * 4, (hidden, width), (hidden, width), (width, hidden)) * blocks


SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
POINTS = [
    *(batch(1, m, aspect) for m in SIZES for aspect in (1, 4)),
    *(batch(count, m, 4) for m in (64, 256, 1024) for count in (8, 64, 512)),
    Point("ViT-B, one block", encoder(768, 1)),
    Point("ViT-B, 12 blocks", encoder(768, 12)),
    Point("ViT-L, one block", encoder(1024, 1)),
    Point("ViT-L, 24 blocks", encoder(1024, 24)),
    Point("7B transformer, one block", decoder(4096, 1)),
    Point("7B transformer, 32 blocks", decoder(4096, 32)),
]


def sparse_weights(shapes: tuple[Side, ...], device: torch.device) -> list[Tensor]:
    """Normal values of which only those in the tails stay, SPARSITY of zeros to within chance."""
    generator = torch.Generator(device).manual_seed(0)
    threshold = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + SPARSITY) / 2)))
    weights = []
    for shape in shapes:
        w = torch.randn(shape, device=device, generator=generator)
        w *= w.abs() > threshold
        weights.append(w.requires_grad_())
    return weights


def agree_on_exact(outcomes: dict[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Errors against "exact", which computes in float64, where it has run."""
    if EXACTLY not in outcomes:
        return {}
    exact = outcomes[EXACTLY]
    for outcome in outcomes.values():
        outcome.wanted_loss, outcome.wanted_gradients = exact.loss, exact.gradients
    return agree({WARM: POWER})(outcomes)


def contestants(job: RankJob, scale: Scale) -> list[Contestant]:
    def exactly() -> Tensor:
        return rpg_fast.add_rank_grad_(job.weights, 1.0, TAIL_ENERGY, method="exact")

    def kept(loss: Any) -> Outcome:
        return Outcome(float(loss), [w.grad.clone() for w in job.weights if w.grad is not None], 0.0, [])

    eigh = work.eigendecomposition(job.shapes, solver="fp32")
    loop: Callable[[], Any] = partial(peers.svd_loop, job.weights, TAIL_ENERGY)
    batches: Callable[[], Any] = partial(peers.gram_eigh_batches, job.weights, TAIL_ENERGY, torch.float32)
    everyone = [
        job.peer(PUBLISHED, loop, work=lambda: work.published(job.shapes)),
        job.peer(TORCH, batches, work=lambda: eigh),
        job.exact(EXACTLY, exactly, scale.backend("rank_project")),
        job.power(WARM, f"warm state, {scale.backend('rank_filter')}"),
    ]
    return [replace(c, outcome=kept) for c in everyone]


@pytest.fixture(scope="module")
def pace() -> Pace:
    return Pace()


@pytest.fixture(scope="module")
def race(request: pytest.FixtureRequest, scale: Scale, rates: Rates | None, pace: Pace) -> Iterator[Race]:
    point: Point = request.param
    title = f"growth, {point.name}"
    missing = why_not(point, scale.device, time.monotonic() - pace.began)
    if missing:
        request.config.stash[NOT_MEASURED][title] = missing
        pytest.skip(missing)
    job = RankJob(sparse_weights(point.shapes, scale.device))
    budget = BUDGET_S[scale.device.type]
    entrants = [replace(c, missing=pace.missing(c.name, point.cost, budget)) for c in contestants(job, scale)]
    m, n = max(job.shapes)
    details = {"m": m, "n": n, "batch": len(job.shapes), "one_shape": len(set(job.shapes)) == 1}
    limits = {"seconds": POINT_S, "slow": SLOW_S}
    race = Race(title, entrants, agree_on_exact, full=scale.full, rates=rates, details=details, **limits)
    yield race
    pace.learn(race, point.cost)


def why_not(point: Point, device: torch.device, elapsed: float) -> str:
    """Why a point is not measured; empty if it is."""
    if device.type == "cpu":
        return ""
    if elapsed > STAGE_S:
        return f"{elapsed:.0f} s since the first point, {STAGE_S:.0f} s are given"
    memory = torch.cuda.get_device_properties(device).total_memory
    if point.bytes > 0.9 * memory:
        return f"needs about {point.bytes / 2**30:.0f} GiB, the device has {memory / 2**30:.0f} GiB"
    return ""


@pytest.mark.parametrize("name", entries([PUBLISHED, TORCH, EXACTLY, WARM], graphs=[WARM]))
@pytest.mark.parametrize("race", [p for p in POINTS if p.small or torch.cuda.is_available()], ids=str, indirect=True)
def test_growth(race: Race, name: str, benchmark: Any) -> None:
    race.report(name, benchmark)
