"""Truncated SVD of batches and of matrices of different shapes, at equal accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rpg_fast
from benchmarks.conftest import Scale
from benchmarks.race import Contestant, Race, entries
from rpg_fast.spectrum import OVERSAMPLING
from tests.cases import power_law, resnet50_convolutions, seeded

FULL = "torch.linalg.svd, cut"
TORCH = "torch.svd_lowrank"
OURS = "rpg_fast.svd_lowrank"
Triplets = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]

# title -> shapes; equal ones are given as one batch, different ones as a list.
SHAPES = {
    "32 of 128 x 1152": [(128, 1152)] * 32,
    "4 of 512 x 4608": [(512, 4608)] * 4,
    "1 of 2048 x 1024": [(2048, 1024)],
    "list of 43 convolutions": [
        (shape[0], torch.Size(shape[1:]).numel())
        for shape in resnet50_convolutions()
        if shape[0] <= 1024 and shape[1] < 512
    ],
}
Q, NITER = 16, 2
SLACK = 0.02  # of the smallest possible error that q triplets leave


def agree_on(matrices: Sequence[Tensor], q: int) -> Any:
    """Compares what the triplets leave, ||A - U S V^T||_F, with the least that q triplets can leave."""

    def agree(outcomes: dict[str, Triplets]) -> dict[str, dict[str, float]]:
        least = _left(matrices, outcomes[FULL])
        measures = {}
        for name, triplets in outcomes.items():
            excess = float((_left(matrices, triplets) / least - 1).max())
            assert excess <= SLACK, f"{name}: leaves {excess:.1%} more than the best {q} triplets, allowed {SLACK:.1%}"
            measures[name] = {"excess_error": excess}
        return measures

    return agree


def _left(matrices: Sequence[Tensor], triplets: Triplets) -> Tensor:
    rests = [(A - U @ S.diag() @ V.mT).double().norm() for A, U, S, V in zip(matrices, *triplets, strict=True)]
    return torch.stack(rests)


@pytest.fixture(scope="module")
def race(request: pytest.FixtureRequest, scale: Scale) -> Race:
    shrink = 1 if scale.full else 8
    make, generator = power_law(1.0, noise=0.05), seeded(0)
    shapes = [(max(Q, m // shrink), max(Q, n // shrink)) for m, n in SHAPES[request.param]]
    matrices = [make(shape, generator).to(scale.device) for shape in shapes]
    alike = len(set(shapes)) == 1
    argument = torch.stack(matrices) if alike else matrices
    q = min(Q, min(min(shape) for shape in shapes) // 2)
    draws = torch.Generator(scale.device)

    def every(function: Any) -> Any:
        """Peers take a batch, or one matrix after another."""
        if alike:
            return lambda: function(argument)
        return lambda: tuple(zip(*(function(A) for A in matrices), strict=True))

    def full(A: Tensor) -> tuple[Tensor, ...]:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        return U[..., :q], S[..., :q], Vh[..., :q, :].mT

    def lowrank(A: Tensor) -> tuple[Tensor, ...]:
        U, S, V = torch.svd_lowrank(A, min(q + OVERSAMPLING, *A.shape[-2:]), NITER)
        return U[..., :q], S[..., :q], V[..., :q]

    def outcome(triplets: Triplets) -> Triplets:
        return triplets

    torch.manual_seed(0)
    contestants = [
        Contestant(FULL, every(full), outcome),
        Contestant(TORCH, every(lowrank), outcome, setting=f"q = {q} + {OVERSAMPLING}, niter = {NITER}"),
        Contestant(
            OURS,
            lambda: rpg_fast.svd_lowrank(argument, q, NITER, generator=draws),
            outcome,
            setting=f"q = {q}, niter = {NITER}",
        ),
    ]
    return Race(f"svd_lowrank, {request.param}", contestants, agree_on(matrices, q), full=scale.full)


@pytest.mark.parametrize("name", entries([FULL, TORCH, OURS]))
@pytest.mark.parametrize("race", list(SHAPES), indirect=True)
def test_svd_lowrank(race: Race, name: str, benchmark: Any) -> None:
    race.report(name, benchmark)
