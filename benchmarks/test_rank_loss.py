"""Rank loss and its gradient, all 53 convolutions of a 90 % sparse ResNet-50."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rpg_fast
from benchmarks import peers, work
from benchmarks.conftest import Scale
from benchmarks.race import Contestant, Race, entries
from benchmarks.rank_job import EXACT, FAST, POWER, TAIL_ENERGY, RankJob, agree
from benchmarks.rates import Rates
from benchmarks.workload import prune, resnet50
from rpg_fast import grouping

PUBLISHED = "one SVD a layer, as published"
DRIVERS = ("gesvdj", "gesvda", "gesvd")  # torch's default first
TORCH = "torch: Gram, eigh in float64"
TORCH_FP32 = "torch: Gram, eigh in float32"
COMPILED = ", torch.compile"
OURS = "rpg_fast.rank_loss, backward"
FUSED = "rpg_fast.add_rank_grad_, exact"
WARM = "rpg_fast.add_rank_grad_, power"
FASTER = f"{WARM}, fast"
REUSED = f"{WARM}, refresh_every=10"
COLD = f"{WARM}, cold start"
PLAIN = "rpg_fast.filtered, plain torch"
LIMITS = {OURS: EXACT, FUSED: EXACT, WARM: POWER, FASTER: FAST, REUSED: POWER, COLD: POWER, PLAIN: POWER}

ON_CPU = [PUBLISHED, TORCH, OURS, FUSED, WARM]
PUBLISHED_ON_GPU = [f"{PUBLISHED}, {driver}" for driver in DRIVERS]
ON_GPU = [
    *PUBLISHED_ON_GPU,
    PUBLISHED_ON_GPU[0] + COMPILED,
    TORCH,
    TORCH_FP32,
    TORCH + COMPILED,
    TORCH_FP32 + COMPILED,
    *(OURS, FUSED, WARM, FASTER, REUSED, COLD, PLAIN),
]


def peers_on_cpu(job: RankJob, pool: Any) -> list[Contestant]:
    eigh = work.eigendecomposition(job.shapes, solver="fp64")
    return [
        job.peer(PUBLISHED, lambda: peers.svd_loop(job.weights, TAIL_ENERGY), work=lambda: work.published(job.shapes)),
        job.peer(
            TORCH,
            lambda: peers.gram_eigh_threads(job.weights, TAIL_ENERGY, pool),
            setting="zero rows left out, one layer a thread",
            work=lambda: eigh,
        ),
    ]


def peers_on_gpu(job: RankJob) -> list[Contestant]:
    """The published loop with each driver of cuSOLVER, batches of eigendecompositions, and both compiled."""
    weights = job.weights
    svd = partial(work.published, job.shapes)
    contestants = [
        job.peer(name, partial(peers.svd_loop, weights, TAIL_ENERGY, driver), work=svd)
        for name, driver in zip(PUBLISHED_ON_GPU, DRIVERS, strict=True)
    ]
    layer = torch.compile(peers.published_layer, dynamic=True)
    every_shape = torch._dynamo.config.patch(recompile_limit=64)  # with the default of 8, later layers run eagerly
    loop = every_shape(partial(peers.svd_loop, weights, TAIL_ENERGY, DRIVERS[0], layer))
    contestants.append(job.peer(PUBLISHED_ON_GPU[0] + COMPILED, loop, compiles=True, work=svd))
    batches = torch.compile(peers.gram_eigh_batches)
    for name, solver, dtype in ((TORCH, "fp64", torch.float64), (TORCH_FP32, "fp32", torch.float32)):
        setting = "one batch for each short side"
        cost = work.eigendecomposition(job.shapes, solver=solver)
        plain, compiled = (partial(f, weights, TAIL_ENERGY, dtype) for f in (peers.gram_eigh_batches, batches))
        options = {"setting": setting, "work": lambda cost=cost: cost}
        contestants.append(job.peer(name, plain, **options))
        contestants.append(job.peer(name + COMPILED, compiled, compiles=True, **options))
    return contestants


def ours(job: RankJob, scale: Scale) -> list[Contestant]:
    project, follow = scale.backend("rank_project"), scale.backend("rank_filter")

    def attached() -> Tensor:
        loss = rpg_fast.rank_loss(job.weights, TAIL_ENERGY, method="exact")
        loss.backward()
        return loss.detach()

    def fused() -> Tensor:
        return rpg_fast.add_rank_grad_(job.weights, 1.0, TAIL_ENERGY, method="exact")

    contestants = [
        job.exact(OURS, attached, f"exact, {project}"),
        job.exact(FUSED, fused, f"exact, {project}"),
        job.power(WARM, f"warm state, {follow}"),
    ]
    if job.on_gpu:
        contestants += [
            job.power(FASTER, f"warm state, {follow}", precision="fast"),
            job.power(REUSED, f"mean of 10 calls, {follow}", refresh_every=10),
            job.cold(COLD, f"new state, {follow}"),
            job.plain(PLAIN),
        ]
    return contestants


@pytest.fixture(scope="module")
def race(scale: Scale, rates: Rates | None, began: float | None) -> Iterator[Race]:
    model = resnet50(scale.device, full=scale.full)
    prune(model)
    job = RankJob(list(rpg_fast.prunable_weights(model, include=grouping.CONVOLUTIONS).values()))
    pool = peers.thread_pool()
    contestants = [*(peers_on_gpu(job) if job.on_gpu else peers_on_cpu(job, pool)), *ours(job, scale)]
    title = "rank loss and gradient, 53 convolutions"
    yield Race(title, contestants, agree(LIMITS), full=scale.full, rates=rates, began=began)
    pool.shutdown()


@pytest.mark.parametrize("name", entries(ON_GPU if torch.cuda.is_available() else ON_CPU, graphs=[WARM, FASTER]))
def test_rank_loss(name: str, race: Race, benchmark: Any) -> None:
    race.report(name, benchmark)
