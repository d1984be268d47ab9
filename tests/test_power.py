"""method="power" against the exact method: along trajectories, from bad windows, on hostile weights."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

import rpg_fast
from rpg_fast import filtered, reference
from rpg_fast.rank_loss import choose_method
from rpg_fast.train.data import load_digits
from rpg_fast.train.models import BasicBlock, ResNet

TOLERANCE = 3e-4  # of the gradient, relative; the loss 2e-5 e + 1e-7
SHAPES = [(48, 16, 3, 3), (80, 160, 1, 1), (96, 96), (160, 66)]  # the first and the last have m <= 64 or just above


def both(weights: list[Tensor], state: rpg_fast.RankState | None, tail_energy: float, seed: int = 0) -> float:
    """Runs "power" with `state` and "exact" beside it, asserts equal k and loss; the worst relative error of a
    gradient."""
    exact, power = rpg_fast.RankState(), state or rpg_fast.RankState()
    leaves = [w.detach().requires_grad_() for w in weights]
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    loss = rpg_fast.rank_loss(leaves, tail_energy, method="power", state=power, generator=generator)
    wanted = rpg_fast.rank_loss(leaves, tail_energy, method="exact", state=exact)
    assert not left_out(power).any()
    assert torch.equal(power.ranks, exact.ranks)
    assert torch.allclose(power.tail_energies, exact.tail_energies, rtol=2e-5, atol=1e-7)
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True)
    return max(cases.relative_error(got, want) for got, want in pairs)


def left_out(state: rpg_fast.RankState) -> Tensor:
    return (state.flags & 2).bool()


def gram(W: Tensor) -> Tensor:
    """[1, m, m]"""
    return reference.normalised_gram(W if len(W) <= W[0].numel() else W.mT)[0][None]


def filter_alone(
    W: Tensor, tail_energy: float, window: filtered.Window | None, rounds: int
) -> tuple[int, Tensor, float]:
    """k (-1: not found), P and e of one matrix, without any eigendecomposition."""
    G = gram(W)
    zero = G.new_zeros(1)
    target = torch.tensor(tail_energy, dtype=G.dtype)
    generator = torch.Generator().manual_seed(0)
    last = filtered.Window(zero, zero) if window is None else window
    P, k, e, following = filtered.filter_group(G, target, last, rounds, generator)
    filter_alone.window = following  # type: ignore[attr-defined]
    return int(k), P[0], float(e)


@pytest.mark.parametrize("family", ["kaiming", "power-0.5", "power-1.2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_follows_a_trajectory_with_a_jump(family: str, sparsity: float, device: torch.device) -> None:
    weights = [cases.make_weight(family, shape, sparsity).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    generator = torch.Generator(device).manual_seed(1)
    for step in range(8):
        assert both(weights, state, 0.1) < TOLERANCE, step
        for w in weights:
            drift = torch.randn(w.shape, generator=generator, device=device) * (w != 0)
            w += 5e-3 * w.norm() / drift.norm() * drift
            if step == 4:  # a mask change of about half the norm
                w *= torch.rand(w.shape, generator=generator, device=device) > 0.3
    assert state.by_eigen == ()


def test_one_round_follows_a_drift() -> None:
    """What a step of training costs: a single window."""
    W = cases.make_weight("power-0.5", (120, 300), 0.8)
    window = None
    for step in range(12):
        k, _, e = filter_alone(W, 0.1, window, 8 if window is None else 1)
        _, wanted_k, wanted_e, _ = reference.spectral_projector(gram(W), torch.tensor(0.1, dtype=torch.float64))
        assert (k, pytest.approx(e, rel=2e-5)) == (int(wanted_k), float(wanted_e)), step
        window = filter_alone.window  # type: ignore[attr-defined]
        drift = torch.randn(W.shape, generator=cases.seeded(step)) * (W != 0)
        W = W + 2e-3 * W.norm() / drift.norm() * drift


def test_a_state_of_a_hundred_steps_ago(device: torch.device) -> None:
    weights = [cases.make_weight("power-0.8", shape, 0.8).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    both(weights, state, 0.2)
    for w in weights:
        drift = torch.randn(w.shape, generator=torch.Generator(device).manual_seed(5), device=device) * (w != 0)
        w += 0.15 * w.norm() / drift.norm() * drift
    assert both(weights, state, 0.2) < TOLERANCE


@pytest.mark.parametrize("family", ["kaiming", "power-0.5", "power-1.2"])
@pytest.mark.parametrize("factor", [0.01, 0.1, 0.3, 0.9, 0.99, 1.01, 1.1, 3.0, 30.0])
def test_a_wrong_window_is_right_or_flagged_and_right_at_the_next_call(factor: float, family: str) -> None:
    for shape in ((72, 200), (96, 288), (128, 256)):
        W = cases.make_weight(family, shape, 0.8)
        for tail_energy in (0.1, 0.2):
            target = torch.tensor(tail_energy, dtype=torch.float64)
            P, wanted, _, _ = reference.spectral_projector(gram(W), target)
            filter_alone(W, tail_energy, None, filtered.COLD_ROUNDS)
            window = filter_alone.window  # type: ignore[attr-defined]
            window = filtered.Window(window.tau * factor, window.half)
            k, got, _ = filter_alone(W, tail_energy, window, filtered.WARM_ROUNDS)
            for _ in range(1 if 0.3 <= factor <= 3 else 2):  # how many calls it may be flagged
                if k >= 0:
                    break
                assert not got.any()
                assert not 0.8 < factor < 1.2
                window = filter_alone.window  # type: ignore[attr-defined]
                k, got, _ = filter_alone(W, tail_energy, window, filtered.WARM_ROUNDS)
            assert k == int(wanted), (shape, tail_energy)
            assert (got - P[0]).norm() < 1e-3


@pytest.mark.parametrize("width", [1e-3, 0.1, 10.0, 1e3])
def test_a_window_of_the_wrong_width(width: float, device: torch.device) -> None:
    weights = [cases.make_weight("kaiming", shape, 0.9).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    both(weights, state, 0.1)
    state.windows[:, 1] *= width
    for _ in range(2):
        assert both(weights, state, 0.1) < TOLERANCE


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_does_not_matter(scale: float, device: torch.device) -> None:
    weights = [scale * cases.make_weight("kaiming", shape, 0.9).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    for _ in range(3):
        assert both(weights, state, 0.1) < TOLERANCE
    assert state.by_eigen == ()


def test_without_a_state_every_call_searches(device: torch.device) -> None:
    weights = [cases.make_weight("power-0.5", shape, 0.9).to(device) for shape in SHAPES]
    weights.append(torch.linalg.qr(torch.randn(96, 96, generator=cases.seeded(3))).Q.to(device))
    leaves = [w.requires_grad_() for w in weights]
    loss = rpg_fast.rank_loss(leaves, 0.1, method="power")
    wanted = rpg_fast.rank_loss(leaves, 0.1)
    torch.testing.assert_close(loss, wanted, rtol=2e-5, atol=1e-7)
    pairs = zip(torch.autograd.grad(loss, leaves[:-1]), torch.autograd.grad(wanted, leaves[:-1]), strict=True)
    assert all(cases.relative_error(got, want) < TOLERANCE for got, want in pairs)


def cluster(m: int, equal: int, tail: float) -> Tensor:
    """[m, 2 m] with `equal` singular values of 1 and the others at `tail`, all different."""
    values = torch.cat([torch.ones(equal), tail * torch.linspace(1, 0.5, m - equal)])
    left = torch.linalg.qr(torch.randn(m, m, generator=cases.seeded(1))).Q
    right = torch.linalg.qr(torch.randn(2 * m, m, generator=cases.seeded(2))).Q
    return (left * values) @ right.mT


def test_hostile_weights_and_their_neighbours(device: torch.device) -> None:
    good = torch.randn(96, 200, generator=cases.seeded(3))
    broken = good.clone()
    broken[5, 7] = torch.nan
    orthogonal = torch.linalg.qr(torch.randn(96, 96, generator=cases.seeded(4))).Q
    hostile = {
        "good": good,
        "rank one": torch.outer(good[:, 0], good[0]),
        "zero": torch.zeros(96, 200),
        "broken": broken,
        "orthogonal": orthogonal,
        "cluster": cluster(110, 100, 0.01),
    }
    weights = [w.to(device) for w in hostile.values()]
    state = rpg_fast.RankState()
    for call in range(3):
        leaves = [w.clone().requires_grad_() for w in weights]
        loss = rpg_fast.rank_loss(leaves, 0.1, method="power", state=state)
        gradients = dict(zip(hostile, torch.autograd.grad(loss, leaves), strict=True))
        alone = torch.autograd.grad(rpg_fast.rank_loss([leaves[0]], 0.1), leaves[0])[0]
        assert cases.relative_error(gradients["good"], alone / 5) < TOLERANCE  # five of the six are not zero
        assert loss.isnan()
        assert gradients["broken"].isnan().all()
        assert all(gradient.isfinite().all() for name, gradient in gradients.items() if name != "broken")
        assert not gradients["zero"].any()
        flags = dict(zip(hostile, state.flags.tolist(), strict=True))
        assert flags["broken"] == 1
        assert flags["good"] == flags["rank one"] == flags["zero"] == 0
        for name in ("orthogonal", "cluster"):  # no window can hold the boundary: said, then done in another way
            if call == 0 and device.type != "cpu":
                assert flags[name] == 2
                assert not gradients[name].any()
                assert state.ranks[list(hostile).index(name)] == -1
            else:
                assert flags[name] == 0
                assert gradients[name].any()
                e = float(state.tail_energies[list(hostile).index(name)])
                assert e == pytest.approx(0.1, abs=1 / 96)  # any k inside the cluster will do, its energy is certain
        if call == 0 and device.type != "cpu":
            assert sorted(state.settle()) == [4, 5]
            assert state.by_eigen == (4, 5)


def test_a_weight_left_out_changes_nothing_else() -> None:
    """Of the op where nothing is read on the host, as a GPU has it."""
    good = cases.make_weight("kaiming", (96, 200))
    orthogonal = torch.linalg.qr(torch.randn(96, 96, generator=cases.seeded(4))).Q
    weights, target, one = [good, orthogonal], torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.0)
    windows, seed = torch.zeros(2, 2, dtype=torch.float64), torch.tensor(3)
    loss, e, k, inv_norms, shares, projector, _, lost = filtered.rank_filter(
        weights, target, 0.0, windows, seed, filtered.COLD_ROUNDS, ()
    )
    assert lost.tolist() == [False, True]
    assert int(k[1]) == -1
    assert e[1].isnan()
    gradients = reference.rank_apply(weights, projector, inv_norms, shares, one)
    alone = reference.rank_project([good], target, 0.0)
    torch.testing.assert_close(loss, alone[0] / 2, rtol=2e-5, atol=1e-7)  # the other one counts, with nothing
    wanted = reference.rank_apply([good], alone[5], alone[3], alone[4], one)[0] / 2
    assert cases.relative_error(gradients[0], wanted) < TOLERANCE
    assert not gradients[1].any()


def crowded(seed: int) -> tuple[Tensor, float]:
    """Many eigenvalues just outside the window, one at the boundary, 25 small ones; and its tail energy."""
    m, many, rest = 96, 70, 7.8e-4
    generator = cases.seeded(seed)
    boundary = (1 - rest) / (many * 1.4 + 1)
    crowd = boundary * 1.4 * (1 + 0.1 * torch.rand(many, generator=generator).double())
    small = rest / (m - many - 1) * (1 - 0.5 * torch.rand(m - many - 1, generator=generator).double())
    spectrum = torch.cat([crowd, torch.tensor([boundary], dtype=torch.float64), small])
    U, V = (torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    shares = spectrum / spectrum.sum()
    return ((U * spectrum.sqrt()) @ V.mT).float(), float(shares[many + 1 :].sum() + 0.8 * shares[many])


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_at_the_window_does_not_blur_what_is_in_it(seed: int, device: torch.device) -> None:
    W, tail_energy = crowded(seed)
    state = rpg_fast.RankState()
    for call in range(6):
        assert both([W.to(device)], state, tail_energy, seed=call) < TOLERANCE, call


def test_nearly_rank_one_when_the_tail_energy_changes(device: torch.device) -> None:
    """The loss is small, and an eigenvalue just outside the window would count in it."""
    for seed in range(10):
        generator = cases.seeded(seed)
        spike = torch.outer(torch.randn(96, generator=generator), torch.randn(120, generator=generator))
        noise = torch.randn(96, 120, generator=generator)
        W = (spike / spike.norm() + 0.03 * noise / noise.norm()).to(device)
        state = rpg_fast.RankState()
        for tail_energy in (0.2, 0.1, 0.2, 0.0005):
            both([W], state, tail_energy, seed=seed)


def test_results_are_not_the_states_own() -> None:
    W = torch.randn(70, 80).requires_grad_()
    state = rpg_fast.RankState()
    first = rpg_fast.add_rank_grad_([W], 1.0, state=state, refresh_every=2)
    value = float(first)
    first.mul_(100)
    saved = state.state_dict()
    saved["_spectra"][1].fill_(7.0)
    assert float(rpg_fast.add_rank_grad_([W], 1.0, state=state, refresh_every=2)) == value
    assert not (state._spectra[1] == 7).all()


def test_a_state_outlives_inference_mode(device: torch.device) -> None:
    W = torch.randn(70, 80, device=device).requires_grad_()
    state = rpg_fast.RankState()
    with torch.inference_mode():
        rpg_fast.rank_loss([W], method="power", state=state)
    rpg_fast.rank_loss([W], method="power", state=state).backward()
    assert W.grad.any()


@pytest.mark.parametrize("tail_energy", [0.0, 1.0, 0.5, 0.001])
def test_any_tail_energy(tail_energy: float, device: torch.device) -> None:
    weights = [cases.make_weight("power-0.5", shape, 0.5).to(device) for shape in SHAPES]
    state = rpg_fast.RankState()
    leaves = [w.requires_grad_() for w in weights]
    for _ in range(2):
        loss = rpg_fast.rank_loss(leaves, tail_energy, method="power", state=state)
    wanted = rpg_fast.rank_loss(leaves, tail_energy)
    assert state.flags.tolist() == [0] * len(weights)
    torch.testing.assert_close(loss, wanted, rtol=2e-5, atol=1e-7)


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


def test_the_state_stays_in_place_and_is_saved_as_it_is(device: torch.device) -> None:
    weights = [cases.make_weight("kaiming", shape).to(device) for shape in SHAPES]
    state, resumed = rpg_fast.RankState(), rpg_fast.RankState()
    both(weights, state, 0.1)
    places = [getattr(state, name).data_ptr() for name in ("ranks", "tail_energies", "flags", "windows")]
    saved = state.state_dict()
    resumed.load_state_dict(saved)
    both(weights, state, 0.3)
    assert places == [getattr(state, name).data_ptr() for name in ("ranks", "tail_energies", "flags", "windows")]
    assert torch.equal(saved["windows"], resumed.windows)
    assert not torch.equal(saved["windows"], state.windows)
    both(weights, resumed, 0.1)


def test_what_auto_takes_and_why() -> None:
    assert choose_method("power", "cpu") == ("power", "as asked")
    assert choose_method("auto", "cpu")[0] == "exact"
    assert choose_method("auto", "cuda", kernels=True)[0] == "power"
    for reason, options in {
        "float64": {"float64": True},
        "RankState": {"state": False},
        "kernels": {"kernels": False},
    }.items():
        method, why = choose_method("auto", "cuda", **({"kernels": True} | options))
        assert method == "exact"
        assert reason in why


def test_the_composed_step_is_a_sign_outside_the_window() -> None:
    grid, table = filtered.step_table(torch.device("cpu"))
    for lower, stages in zip(grid[::9], table[::9], strict=True):
        x = torch.cat([torch.linspace(float(lower), 1, 2001, dtype=torch.float64), torch.tensor([0.0])])
        y = x
        for a, b, c in stages:
            y = y * (a + b * y**2 + c * y**4)
        assert (y[:-1] - 1).abs().max() < filtered.CONVERGED
        assert y[-1] == 0


@pytest.mark.full
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("sparsity", cases.SPARSITIES)
def test_every_convolution_of_resnet50(family: str, sparsity: float, device: torch.device) -> None:
    weights = [cases.make_weight(family, shape, sparsity).to(device) for shape in cases.RESNET50]
    for tail_energy in (0.1, 0.2):
        state = rpg_fast.RankState()
        for _ in range(2):  # cold, warm
            assert both(weights, state, tail_energy) < TOLERANCE
        assert state.by_eigen == ()


@pytest.mark.full
def test_weights_of_a_network_that_is_trained_and_pruned(device: torch.device) -> None:
    """Real gradients, real mask changes: handwritten digits, 90 % sparse after 120 steps."""
    digits = load_digits()
    model = ResNet(BasicBlock, (1, 1, 1), (80, 96, 160), num_classes=10, in_channels=1, stem="small").to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = rpg_fast.RankPruner(model, optimizer, sparsity=0.9, total_steps=120, update_every=10, rank_weight=0.1)
    weights = [w for w in rpg_fast.prunable_weights(model).values() if w.dim() == 4]
    states = {every: rpg_fast.RankState() for every in (1, 10, 100)}
    for step in range(120):
        index = torch.randint(len(digits.train), (64,))
        images, labels = digits.train.images[index].to(device), digits.train.labels[index].to(device)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        if pruner.step():
            optimizer.step()
        optimizer.zero_grad()
        for every, state in states.items():
            if step % every == 0:
                assert both(weights, state, 0.1) < TOLERANCE, (every, step)
    assert all(state.by_eigen == () for state in states.values())


def test_a_tensor_is_the_seed_itself(device: torch.device) -> None:
    """Equal seeds give equal bits, other seeds others, and nothing else is drawn."""
    weights = [torch.randn(96, 200, generator=cases.seeded(3)).to(device).requires_grad_()]
    before, losses = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        weights[0].grad = None
        state = rpg_fast.RankState()
        at = torch.tensor(seed, device=device)
        rpg_fast.add_rank_grad_(weights, 1.0, method="power", state=state, generator=at)
        losses.append(weights[0].grad.clone())
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    assert torch.equal(before, torch.get_rng_state())
    for bad in (torch.tensor(1.0), torch.tensor([1])):
        with pytest.raises(ValueError, match=r"a seed must be an int64 0-d tensor on .*, got"):
            rpg_fast.rank_loss(weights, method="power", generator=bad.to(device))
