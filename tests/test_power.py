"""method="power" against the exact method: along trajectories, from bad windows, on hostile weights."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

import rpg_fast
from rpg_fast import filtered

TOLERANCE = 3e-4  # of the gradient, relative; the loss 2e-5 e + 1e-7
SHAPES = [(48, 16, 3, 3), (80, 160, 1, 1), (96, 64)]


def both(weights: list[Tensor], state: rpg_fast.RankState, tail_energy: float) -> tuple[rpg_fast.RankState, float]:
    """Runs "power" with `state` and "exact" beside it, asserts equal k and loss; returns the exact state and the worst
    relative error of a gradient."""
    exact = rpg_fast.RankState()
    leaves = [w.detach().requires_grad_() for w in weights]
    generator = torch.Generator(weights[0].device).manual_seed(0)
    loss = rpg_fast.rank_loss(leaves, tail_energy, method="power", state=state, generator=generator)
    wanted = rpg_fast.rank_loss(leaves, tail_energy, method="exact", state=exact)
    assert torch.equal(state.ranks, exact.ranks)
    assert torch.allclose(state.tail_energies, exact.tail_energies, rtol=2e-5, atol=1e-7, equal_nan=True)
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True)
    return exact, max(cases.relative_error(got, want) for got, want in pairs)


def by_eigen(state: rpg_fast.RankState) -> list[bool]:
    return (state.flags & 2).bool().tolist()


@pytest.mark.parametrize("family", ["kaiming", "power-0.5", "power-1.2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_follows_a_trajectory_with_a_jump(family: str, sparsity: float, device: torch.device) -> None:
    weights = [cases.make_weight(family, shape, sparsity).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    generator = torch.Generator(device).manual_seed(1)
    filtered_calls = 0
    for step in range(8):
        _, error = both(weights, state, 0.1)
        assert error < TOLERANCE, step
        assert all(by_eigen(state)) or step > 0  # a cold start
        filtered_calls += by_eigen(state).count(False)
        for w in weights:
            drift = torch.randn(w.shape, generator=generator, device=device) * (w != 0)
            w += 5e-3 * w.norm() / drift.norm() * drift
            if step == 4:  # a mask change of about half the norm
                w *= torch.rand(w.shape, generator=generator, device=device) > 0.3
    assert filtered_calls >= 6 * len(weights)  # the filter does the work, not the eigendecomposition


@pytest.mark.parametrize("factor", [0.01, 0.1, 0.3, 0.9, 0.99, 1.01, 1.1, 3.0, 30.0])
def test_a_wrong_window_is_noticed(factor: float, device: torch.device) -> None:
    weights = [cases.make_weight("power-0.5", shape, 0.8).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    both(weights, state, 0.2)
    state.windows[:, 0] *= factor
    _, error = both(weights, state, 0.2)
    assert error < TOLERANCE
    _, error = both(weights, state, 0.2)
    assert error < TOLERANCE
    assert not any(by_eigen(state))


@pytest.mark.parametrize("width", [1e-3, 0.1, 10.0, 1e3])
def test_a_window_of_the_wrong_width_is_noticed(width: float, device: torch.device) -> None:
    weights = [cases.make_weight("kaiming", shape, 0.9).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    both(weights, state, 0.1)
    state.windows[:, 1] *= width
    for _ in range(2):
        _, error = both(weights, state, 0.1)
        assert error < TOLERANCE


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_does_not_matter(scale: float, device: torch.device) -> None:
    weights = [scale * cases.make_weight("kaiming", shape, 0.9).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    for _ in range(3):
        _, error = both(weights, state, 0.1)
        assert error < TOLERANCE
    assert not any(by_eigen(state))


def test_hostile_weights_and_their_neighbours(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    good = torch.randn(96, 200, generator=generator)
    broken = good.clone()
    broken[5, 7] = torch.nan
    orthogonal = torch.linalg.qr(torch.randn(96, 96, generator=generator)).Q
    weights = [w.to(device) for w in (good, torch.outer(good[:, 0], good[0]), torch.zeros(96, 200), broken, orthogonal)]
    state = rpg_fast.RankState()
    for _ in range(3):
        leaves = [w.clone().requires_grad_() for w in weights]
        loss = rpg_fast.rank_loss(leaves, 0.1, method="power", state=state)
        gradients = torch.autograd.grad(loss, leaves)
        alone = torch.autograd.grad(rpg_fast.rank_loss([leaves[0]], 0.1), leaves[0])[0]
        assert cases.relative_error(gradients[0], alone / 4) < TOLERANCE  # four of the five are not zero
        assert loss.isnan()
        assert gradients[3].isnan().all()
        assert all(gradients[i].isfinite().all() for i in (0, 1, 2, 4))
        assert not gradients[2].any()
        assert gradients[4].any()
        assert state.ranks[3] == -1
        assert state.flags[3] & 1
        assert abs(state.tail_energies[4] - 0.1) < 1 / 96  # any k inside a cluster will do, its energy is certain


def test_same_bits_from_the_same_generator_state(device: torch.device) -> None:
    weights = [cases.make_weight("power-0.5", shape, 0.9).to(device).requires_grad_() for shape in SHAPES]
    runs = []
    for _ in range(2):
        generator = torch.Generator(device).manual_seed(11)
        state = rpg_fast.RankState()
        for _ in range(3):
            loss = rpg_fast.rank_loss(weights, 0.1, method="power", state=state, generator=generator)
        runs.append([loss, *torch.autograd.grad(loss, weights)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_state_dict_carries_the_windows(device: torch.device) -> None:
    weights = [cases.make_weight("kaiming", shape).to(device) for shape in SHAPES]
    state, resumed = rpg_fast.RankState(), rpg_fast.RankState()
    both(weights, state, 0.1)
    resumed.load_state_dict(state.state_dict())
    both(weights, resumed, 0.1)
    assert not any(by_eigen(resumed))


def test_the_composed_step_is_a_sign_outside_the_window() -> None:
    grid, table = filtered.step_table(torch.device("cpu"))
    for lower, stages in zip(grid[::9], table[::9], strict=True):
        x = torch.cat([torch.linspace(float(lower), 1, 2001, dtype=torch.float64), torch.tensor([0.0])])
        y = x
        for a, b, c in stages:
            y = y * (a + b * y**2 + c * y**4)
        assert (y[:-1] - 1).abs().max() < filtered.CONVERGED
        assert y[-1] == 0
