"""Truncated SVD of one matrix to 4096, of rank 8 to 256, from 64 x 64 to 4096 x 16384, and of different shapes in one
call. The matrices are made from their singular values, so that every contestant's error is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rpg_fast
from benchmarks.conftest import NOT_MEASURED, Scale
from benchmarks.race import Contestant, Pace, Race, entries
from rpg_fast import spectrum
from tests.cases import resnet50_convolutions, seeded

FULL = "torch.linalg.svd, cut"
DRIVERS = ("gesvdj", "gesvda", "gesvd")  # torch's default first
FULL_ON_GPU = [f"{FULL}, {driver}" for driver in DRIVERS]
TORCH = "torch.svd_lowrank"
OURS = "rpg_fast.svd_lowrank"
NAMES = [*(FULL_ON_GPU if torch.cuda.is_available() else [FULL]), TORCH, OURS]
Triplets = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]

NITER = 2
DECAY = 1.0  # singular values i^-DECAY
SLACK = 0.02  # of the smallest possible error that q triplets leave

POINT_S = {"cuda": 1.0, "cpu": 4.0}  # of rounds at one point
SLOW_S = {"cuda": 1.0, "cpu": 20.0}  # what takes longer runs once
BUDGET_S = {"cuda": 6.0, "cpu": 20.0}  # a contestant that is expected to take longer for one call is left out
STAGE_S = 180.0  # on CUDA no point is begun later than this after the first


@dataclass(frozen=True)
class Point:
    """`q` triplets of each of the matrices [m, n]: one batch if all are alike, else a list; `small` ones run on a CPU,
    too."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    q: int
    small: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def cost(self) -> float:
        """Grows by no more than any contestant's time where the device is busy."""
        return float(sum(m * n for m, n in self.shapes))

    def shrunk(self) -> Point:
        shapes = tuple((max(8, m // 8), max(8, n // 8)) for m, n in self.shapes[:16])
        return replace(self, shapes=shapes, q=min(self.q, min(min(shape) for shape in shapes) // 2))


def batch(count: int, m: int, n: int, q: int, *, small: bool = False) -> Point:
    return Point(f"{count} of {m} x {n}, rank {q}", ((m, n),) * count, q, small)


CONVOLUTIONS = tuple((s[0], math.prod(s[1:])) for s in resnet50_convolutions() if s[0] <= 1024 and s[1] < 512)
POINTS = [
    batch(1, 64, 64, 8, small=True),
    batch(64, 64, 64, 8, small=True),
    batch(64, 64, 64, 32, small=True),
    batch(4096, 64, 64, 8),
    batch(1024, 64, 576, 16),
    batch(32, 128, 1152, 16, small=True),
    batch(256, 128, 1152, 64),
    batch(8, 256, 256, 64, small=True),
    batch(64, 256, 2304, 32),
    batch(4, 512, 4608, 16, small=True),
    batch(32, 512, 4608, 128),
    batch(1, 2048, 1024, 16, small=True),
    batch(1, 1024, 1024, 256, small=True),
    batch(1, 4096, 4096, 64),
    batch(1, 4096, 16384, 32),
    batch(1, 4096, 16384, 256),
    Point(f"list of {len(CONVOLUTIONS)} convolutions, rank 16", CONVOLUTIONS, 16, small=True),
]


def make(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """Matrices [m, n] with singular values i^-DECAY; those of one shape share two bases, in another order each."""
    generator = seeded(0)
    bases: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    matrices = []
    for m, n in shapes:
        r = min(m, n)
        if (m, n) not in bases:
            left, right = (torch.randn(size, r, generator=generator).to(device).double() for size in (m, n))
            bases[m, n] = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
        left, right = bases[m, n]
        values = values_of(r)[torch.randperm(r, generator=generator)].to(device)
        matrices.append(((left * values) @ right.mT).float())
    return matrices


def values_of(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -DECAY


def agree_on(matrices: Sequence[Tensor], q: int) -> Callable[[dict[str, Triplets]], dict[str, dict[str, Any]]]:
    """Compares what the triplets leave, ||A - U S V^T||_F, with the least that q triplets can leave, and S with the
    known values; the worst matrix counts. Ours must be within SLACK; a peer that is not is said to be `inaccurate`."""
    least = torch.stack([values_of(min(A.shape))[q:].norm() for A in matrices])
    wanted = values_of(q)

    def agree(outcomes: dict[str, Triplets]) -> dict[str, dict[str, Any]]:
        measures: dict[str, dict[str, Any]] = {}
        for name, (U, S, V) in outcomes.items():
            left = torch.stack([(A - (u * s) @ v.mT).norm() for A, u, s, v in zip(matrices, U, S, V, strict=True)])
            excess = float((left.double().cpu() / least - 1).max())
            off = float(((torch.stack(list(S)).double().cpu() - wanted).abs() / wanted).max())
            accurate = excess <= SLACK
            measures[name] = {"excess_error": excess, "value_error": off, "inaccurate": not accurate}
            if name == OURS and not accurate:
                measures[name]["wrong"] = f"leaves {excess:.1%} more than the best {q} triplets, allowed {SLACK:.1%}"
        return measures

    return agree


def contestants(point: Point, matrices: Sequence[Tensor], device: torch.device) -> list[Contestant]:
    q = point.q
    alike = len(set(point.shapes)) == 1
    argument = torch.stack(list(matrices)) if alike else matrices
    draws = torch.Generator(device)

    def full(A: Tensor, driver: str | None) -> tuple[Tensor, ...]:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False, driver=driver)
        return U[..., :q], S[..., :q], Vh[..., :q, :].mT

    def lowrank(A: Tensor) -> tuple[Tensor, ...]:
        U, S, V = torch.svd_lowrank(A, min(q + spectrum.OVERSAMPLING, *A.shape[-2:]), NITER)
        return U[..., :q], S[..., :q], V[..., :q]

    def peer(name: str, function: Callable[[Tensor], tuple[Tensor, ...]], setting: str = "") -> Contestant:
        """A peer takes a batch, or one matrix after another."""

        def run() -> Any:
            if isinstance(argument, Tensor):
                return function(argument)
            return tuple(zip(*map(function, argument), strict=True))

        return Contestant(name, run, outcome=tuple, setting=setting)

    drivers = zip(FULL_ON_GPU, DRIVERS, strict=True) if device.type == "cuda" else [(FULL, None)]
    methods = {spectrum.svd_method(shape, q, NITER, device=device) for shape in point.shapes}
    return [
        *(peer(name, partial(full, driver=driver)) for name, driver in drivers),
        peer(TORCH, lowrank, f"q = {q} + {spectrum.OVERSAMPLING}, niter = {NITER}"),
        Contestant(
            OURS,
            lambda: rpg_fast.svd_lowrank(argument, q, NITER, generator=draws),
            outcome=tuple,
            setting=f"q = {q}, niter = {NITER}, by {' and '.join(sorted(methods))}",
        ),
    ]


@pytest.fixture(scope="module")
def pace() -> Pace:
    return Pace()


@pytest.fixture(scope="module")
def race(request: pytest.FixtureRequest, scale: Scale, pace: Pace) -> Iterator[Race]:
    torch.manual_seed(0)  # torch.svd_lowrank knows no generator
    point: Point = request.param if scale.full else request.param.shrunk()
    title = f"svd_lowrank, {point.name}"
    kind = scale.device.type
    elapsed = time.monotonic() - pace.began
    if kind == "cuda" and elapsed > STAGE_S:
        missing = f"{elapsed:.0f} s since the first point, {STAGE_S:.0f} s are given"
        request.config.stash[NOT_MEASURED][title] = missing
        pytest.skip(missing)
    matrices = make(point.shapes, scale.device)
    entrants = contestants(point, matrices, scale.device)
    if scale.full:
        entrants = [replace(c, missing=pace.missing(c.name, point.cost, BUDGET_S[kind])) for c in entrants]
    limits = {"seconds": POINT_S[kind], "slow": SLOW_S[kind]}
    race = Race(title, entrants, agree_on(matrices, point.q), full=scale.full, **limits)
    yield race
    pace.learn(race, point.cost)


@pytest.mark.parametrize("name", entries(NAMES))
@pytest.mark.parametrize("race", [p for p in POINTS if p.small or torch.cuda.is_available()], ids=str, indirect=True)
def test_svd_lowrank(race: Race, name: str, benchmark: Any) -> None:
    race.report(name, benchmark)
