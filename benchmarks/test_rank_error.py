"""Error against time: what each way to a rank loss costs, and how far its gradients are from float64, on the
convolutions of a 90 % sparse ResNet-50. Where spectra are reused, the weights move in between, as in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rpg_fast
from benchmarks import peers
from benchmarks.conftest import Scale
from benchmarks.race import Contestant, Race
from benchmarks.rank_job import EXACT, FAST, POWER, TAIL_ENERGY, Limits, Outcome, RankJob, agree, in_float64
from benchmarks.rates import Rates
from benchmarks.workload import prune, resnet50
from rpg_fast import grouping

DRIFT = (
    1.3e-3  # change of a weight from one step to the next, in units of its norm, as SGD on handwritten digits has it
)
ITERATIONS = (1, 2, 4, 8)
REFRESH = (2, 10, 50)

PUBLISHED = "one SVD a layer, as published"
TORCH = "torch: Gram, eigh in float32"
CLASSIC = {niter: f"torch: randomised SVD, {niter} iterations" for niter in ITERATIONS}
EXACTLY = "rpg_fast.add_rank_grad_, exact"
WARM = "rpg_fast.add_rank_grad_, power"
FASTER = "rpg_fast.add_rank_grad_, power, fast"
PLAIN = "rpg_fast.filtered, plain torch"
STALE = {every: f"rpg_fast.add_rank_grad_, refresh_every={every}" for every in REFRESH}
STALE_LIMIT = Limits(1.0, 1.0)  # a projector that is out of date is what it is
LIMITS = {EXACTLY: EXACT, WARM: POWER, FASTER: FAST, PLAIN: POWER} | dict.fromkeys(STALE.values(), STALE_LIMIT)


@torch.no_grad()
def drift(weights: list[Tensor], generator: torch.Generator) -> None:
    """A step of training: nonzero weights change by DRIFT of the norm, in a random direction."""
    for w in weights:
        direction = torch.randn(w.shape, device=w.device, generator=generator) * (w != 0)
        w += direction * (DRIFT * w.norm() / direction.norm().clamp(min=1e-30))


def stale(job: RankJob, every: int, setting: str) -> Contestant:
    """The mean time of `every` calls of which one computes the spectra, and the error of the last of them, the weights
    having moved in between."""
    state = rpg_fast.RankState()
    options = {"method": "power" if job.on_gpu else "exact", "state": state, "refresh_every": every}
    call = partial(rpg_fast.add_rank_grad_, job.weights, 1.0, TAIL_ENERGY, **options)

    def run() -> Tensor:
        for _ in range(every):
            loss = call()
        return loss

    def last_of_a_period(_: Tensor) -> Outcome:
        before = [w.detach().clone() for w in job.weights]
        generator = torch.Generator(job.weights[0].device).manual_seed(2)
        for _ in range(every - 1):
            call()
            drift(job.weights, generator)
        job.clear()
        loss = float(call())
        gradients = [w.grad.clone() for w in job.weights if w.grad is not None]
        wanted = in_float64(job.weights)
        with torch.no_grad():
            torch._foreach_copy_(job.weights, before)
        job.clear()
        return Outcome(loss, gradients, *wanted)

    return Contestant(name=STALE[every], run=run, outcome=last_of_a_period, setting=setting, calls=every)


def told_the_ranks(job: RankJob) -> Callable[[int], Callable[[], Any]]:
    """Makers of the classic randomised SVD, to which the right rank of every weight is given."""
    state = rpg_fast.RankState()
    rpg_fast.rank_loss(job.weights, TAIL_ENERGY, method="exact", state=state)
    assert state.ranks is not None
    ranks = state.ranks.tolist()
    generator = torch.Generator(job.weights[0].device).manual_seed(3)
    return lambda niter: partial(peers.randomised_batches, job.weights, ranks, niter, generator)


@pytest.fixture(scope="module")
def race(scale: Scale, rates: Rates | None, began: float | None) -> Race:
    model = resnet50(scale.device, full=scale.full)
    prune(model)
    job = RankJob(list(rpg_fast.prunable_weights(model, include=grouping.CONVOLUTIONS).values()))
    classic = told_the_ranks(job)

    def exactly() -> Tensor:
        return rpg_fast.add_rank_grad_(job.weights, 1.0, TAIL_ENERGY, method="exact")

    backend = scale.backend("rank_filter")
    contestants = [
        job.peer(PUBLISHED, lambda: peers.svd_loop(job.weights, TAIL_ENERGY)),
        job.peer(TORCH, lambda: peers.gram_eigh_batches(job.weights, TAIL_ENERGY, torch.float32)),
        *(job.peer(name, classic(niter), setting="ranks given, 32 more columns") for niter, name in CLASSIC.items()),
        job.exact(EXACTLY, exactly, scale.backend("rank_project")),
        job.power(WARM, f"warm state, {backend}"),
        job.power(FASTER, f"warm state, {backend}", precision="fast"),
        *(stale(job, every, f"error of the last call, {backend}") for every in REFRESH),
        job.plain(PLAIN),
    ]
    if not job.on_gpu:
        missing = "the CPU has one precision, and plain torch for this op"
        contestants = [replace(c, missing=missing) if c.name in (FASTER, PLAIN) else c for c in contestants]
    title = "rank loss, error against time, 53 convolutions"
    return Race(title, contestants, agree(LIMITS), full=scale.full, rates=rates, began=began)


@pytest.mark.parametrize("name", [PUBLISHED, TORCH, *CLASSIC.values(), EXACTLY, WARM, FASTER, *STALE.values(), PLAIN])
def test_rank_error(name: str, race: Race, benchmark: Any) -> None:
    race.report(name, benchmark)
