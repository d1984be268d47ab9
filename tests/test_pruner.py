"""RankPruner: exact counts, dead weights that stay dead, an independent implementation, resume, processes."""

from __future__ import annotations

import copy
import io
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import seeded
from hypothesis import given
from hypothesis import strategies as st
from oracles import PlainPruner, official_rank_loss, round_half_up
from torch import Tensor, nn

from rpg_fast import (
    ConstantSparsity,
    ExponentialSparsity,
    MaskedAdamW,
    MaskedSGD,
    PolynomialSparsity,
    RankPruner,
    erk,
    prunable_weights,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=1e-2),
    "MaskedSGD": lambda p: MaskedSGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "MaskedAdamW": lambda p: MaskedAdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
}


class Net(nn.Module):
    """Small, with everything that matters: two convolutions, a bias, a norm without pruning, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:  # x: [B, 3, 7, 7]
        x = torch.relu(self.norm(self.a(x)))
        return self.head(torch.relu(self.b(x)).flatten(1))


def make_net(device: torch.device, dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net().to(device, dtype)


def batch(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
    generator = seeded(step)
    like = next(model.parameters())
    x = torch.randn(16, 3, 7, 7, generator=generator, dtype=torch.float64).to(like)
    return x, torch.randint(0, 5, (16,), generator=generator).to(like.device)


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(model, step)
    nn.functional.cross_entropy(model(x), y).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Any, steps: range, after: Any = None) -> None:
    """The loop of the documentation; `after(step, stepped)` looks at every step."""
    for step in steps:
        backward(model, step)
        stepped = pruner.step()
        if stepped:
            optimizer.step()
        if after is not None:
            after(step, stepped)
        optimizer.zero_grad()


def assert_dead(pruner: RankPruner, optimizer: torch.optim.Optimizer) -> None:
    """Outside the masks, weights and everything that the optimizer keeps in their shape are exactly zero."""
    for mask, weight in zip(pruner.masks.unpack().values(), pruner.weights.values(), strict=True):
        assert not weight.detach()[~mask].any()
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert not value[~mask].any()


# ------------------------------------------------------------------------------------------------------ dead stays dead


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rank_every", ["update", 1])
def test_pruned_weights_never_come_back(name: str, rank_every: str | int, device: torch.device) -> None:
    """By momentum, weight decay, moments or the rank gradient, after any of 60 steps, whatever the optimizer."""
    model = make_net(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = RankPruner(
        model, optimizer, sparsity=0.9, total_steps=60, update_every=6, rank_weight=2.0, rank_every=rank_every
    )
    moved = {w: w.detach().clone() for w in pruner.weights.values()}

    def after(step: int, stepped: bool) -> None:
        assert_dead(pruner, optimizer)
        if name.startswith("Masked") or not stepped:
            return
        for mask, weight in zip(pruner.masks.unpack().values(), pruner.weights.values(), strict=True):
            assert weight.grad is not None
            assert not weight.grad[~mask].any()  # clipping and logging see the truth

    train(model, optimizer, pruner, range(60), after)
    assert all(not torch.equal(w, old) for w, old in moved.items())
    assert pruner.finalize() == pytest.approx(0.9, abs=1e-3)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grown_weights_start_at_zero_with_zero_state(name: str, device: torch.device) -> None:
    """Those that an update dropped and grew again too; those that stay keep weight and state."""
    model = make_net(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.8, total_steps=40, update_every=8, drop_fraction=0.5)
    for step in range(40):
        backward(model, step)
        masks = pruner.masks.unpack()
        weights = {n: w.detach().clone() for n, w in pruner.weights.items()}
        if pruner.step():
            optimizer.step()
        else:
            stats = pruner.stats()
            for i, (n, w) in enumerate(pruner.weights.items()):
                new = pruner.masks.unpack()[n]
                grown = new & ~masks[n]
                assert not w[grown].any()
                restarted = new & masks[n] & (w == 0) & (weights[n] != 0)
                kept = new & masks[n] & ~restarted
                assert torch.equal(w[kept], weights[n][kept])
                counts = [int(x[i]) for x in (stats.active, stats.pruned, stats.grown, stats.restarted, stats.total)]
                assert counts[:3] == [int(new.sum()), int((masks[n] & ~new).sum()), int(grown.sum())]
                was_zero = new & masks[n] & (w == 0) & (weights[n] == 0)  # restarted or kept, nothing tells
                assert 0 <= counts[3] - int(restarted.sum()) <= int(was_zero.sum())
                assert counts[4] == w.numel()
                assert float(stats.sparsity[i]) == pytest.approx(1 - int(new.sum()) / w.numel())
                for value in optimizer.state[w].values():
                    if isinstance(value, Tensor) and value.shape == w.shape:
                        assert not value[grown | restarted].any()
        optimizer.zero_grad()


def test_dense_layers_are_not_churned(device: torch.device) -> None:
    """Where nothing is pruned there is nothing to grow into: an update must not reset the smallest weights."""
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    sparsity = {"a.weight": 0.0, "b.weight": 0.9, "head.weight": 0.5}
    pruner = RankPruner(model, optimizer, sparsity=0.68, total_steps=40, update_every=5, distribution=sparsity)

    def after(step: int, stepped: bool) -> None:
        assert (model.a.weight != 0).all()

    train(model, optimizer, pruner, range(40), after)
    assert [float(s) for s in pruner.stats().sparsity] == pytest.approx([0, 0.9, 0.5], abs=2e-3)


# ----------------------------------------------------------------------------------------------------------- the counts


@pytest.mark.parametrize("distribution", ["global_magnitude", "erk", "uniform"])
@pytest.mark.parametrize("schedule", ["exponential", "polynomial", "constant"])
@pytest.mark.parametrize("criterion", ["rigl", "set", "gmp"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_counts_are_exact_at_every_update(
    distribution: str, schedule: str, criterion: str, layout: torch.memory_format, device: torch.device
) -> None:
    model = make_net(device).to(memory_format=layout)
    optimizer = OPTIMIZERS["MaskedSGD"](model.parameters())
    pruner = RankPruner(
        model,
        optimizer,
        sparsity=0.95,
        total_steps=50,
        update_every=5,
        distribution=distribution,
        schedule=schedule,
        criterion=criterion,
        update_until=1.0,
    )
    numels = [w.numel() for w in pruner.weights.values()]
    updates: list[int] = []

    def after(step: int, stepped: bool) -> None:
        done = (step + 1) // 5
        x = min(1.0, done / 9)
        target = {"constant": 0.95, "exponential": 1 - 0.05**x, "polynomial": 0.95 * (1 - (1 - x) ** 3)}[schedule]
        target = 0.95 if x == 1 else target
        active = pruner.masks.count().tolist()
        if not stepped:
            updates.append(step + 1)
        if distribution == "uniform":
            assert active == [n - round_half_up(target, n) for n in numels]
        else:
            assert sum(active) == sum(numels) - round_half_up(target, sum(numels))
        if distribution == "erk":
            wanted = [n - round(s * n) for n, s in zip(numels, erk(pruner.weights, target).values(), strict=True)]
            assert active == pytest.approx(wanted, abs=1)

    train(model, optimizer, pruner, range(50), after)
    assert updates == list(range(5, 51, 5))


@given(
    total=st.integers(1, 400),
    every=st.integers(1, 60),
    until=st.sampled_from([0.3, 0.5, 0.8, 0.9, 1.0]) | st.floats(0.01, 1),
    sparsity=st.sampled_from([0.5, 0.9, 0.98]),
    distribution=st.sampled_from(["global_magnitude", "erk", "uniform"]),
)
def test_target_is_reached_exactly(total: int, every: int, until: float, sparsity: float, distribution: str) -> None:
    """For any length and rhythm that has room for one update; a shorter one is refused."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(7, 9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"sparsity": sparsity, "total_steps": total, "update_every": every, "prune_until": until}

    def make() -> RankPruner:
        return RankPruner(model, optimizer, distribution=distribution, update_until=until, **options)

    if int(until * total) < every:
        with pytest.raises(ValueError, match="too short"):
            make()
        return
    pruner = make()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    returned = [pruner.step() for _ in range(total)]
    active, numels = pruner.masks.count().tolist(), [w.numel() for w in pruner.weights.values()]
    if distribution == "uniform":
        assert active == [n - round_half_up(sparsity, n) for n in numels]
    else:
        assert sum(active) == sum(numels) - round_half_up(sparsity, sum(numels))
    assert returned.count(False) == int(until * total) // every
    assert all(stepped == ((i + 1) % every != 0 or i + 1 > int(until * total)) for i, stepped in enumerate(returned))


def test_erk_plan_is_exact_where_rounding_would_give_weights_back() -> None:
    """Largest remainders are not monotone: between these two sparsities a layer would regain a weight."""
    shapes = [(10, 5, 4), (7, 4, 11), (6,), (2, 11, 1, 1), (12, 8, 2)]
    weights = {str(i): nn.Parameter(torch.randn(s, generator=seeded(i))) for i, s in enumerate(shapes)}
    total = sum(w.numel() for w in weights.values())
    low, high = 0.23935469793941577, 0.24072832431304214
    kept = [
        [round((1 - s) * w.numel()) for s, w in zip(erk(weights, x).values(), weights.values(), strict=True)]
        for x in (low, high)
    ]
    assert any(a < b for a, b in zip(*kept, strict=True))
    optimizer = torch.optim.SGD(weights.values(), 0.1)
    schedule = PolynomialSparsity(sparsity=high, every=1, end=2, power=-math.log2(1 - low / high))
    pruner = RankPruner(
        nn.Module(), optimizer, sparsity=high, total_steps=4, weights=weights, distribution="erk", schedule=schedule
    )
    for w in weights.values():
        w.grad = torch.zeros_like(w)
    for _ in range(2):
        assert not pruner.step()
        sparsity = schedule(pruner.step_count)
        assert int(pruner.masks.count().sum()) == total - round_half_up(sparsity, total)


def test_channels_last_counts_as_contiguous(device: torch.device) -> None:
    counts = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = make_net(device, torch.float64).to(memory_format=layout)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=30, update_every=5, rank_weight=1.0)
        train(model, optimizer, pruner, range(30))
        counts.append(pruner.masks.count().tolist())
        assert_dead(pruner, optimizer)
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------- against an independent one


@pytest.mark.parametrize("name", ["SGD", "MaskedSGD"])
@pytest.mark.parametrize("distribution", ["global_magnitude", "uniform"])
def test_equals_plain_masks_and_sorts(name: str, distribution: str, device: torch.device) -> None:
    """24 updates: masks and weights are equal, bit by bit where the optimizer is the same."""
    ours, theirs = make_net(device), make_net(device)
    optimizer, plain_optimizer = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS["SGD"](theirs.parameters())
    options = {"sparsity": 0.95, "total_steps": 130, "update_every": 5, "update_until": 0.95}
    pruner = RankPruner(ours, optimizer, distribution=distribution, **options)
    plain = PlainPruner(
        dict(prunable_weights(theirs)), plain_optimizer, global_threshold=distribution != "uniform", **options
    )
    updates = 0
    for step in range(130):
        backward(ours, step)
        backward(theirs, step)
        stepped = pruner.step()
        assert stepped == plain.step()
        updates += not stepped
        if stepped:
            optimizer.step()
            plain_optimizer.step()
        assert all(torch.equal(m, plain.masks[n]) for n, m in pruner.masks.unpack().items()), f"step {step}"
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            if name == "SGD":
                assert torch.equal(p, q)
            else:
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
                p.data.copy_(q.data)
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
    assert updates == 24


def test_equals_plain_rules_with_the_official_rank_gradient(device: torch.device) -> None:
    """In float64, where the two gradients agree to the last few bits, the masks are equal over 20 updates."""
    ours, theirs = make_net(device, torch.float64), make_net(device, torch.float64)
    make = OPTIMIZERS["SGD"]
    optimizer, plain_optimizer = make(ours.parameters()), make(theirs.parameters())
    options = {"sparsity": 0.9, "total_steps": 90, "update_every": 4, "rank_weight": 20.0, "tail_energy": 0.2}
    pruner = RankPruner(ours, optimizer, **options)  # type: ignore[arg-type]
    plain = PlainPruner(
        dict(prunable_weights(theirs)), plain_optimizer, rank_layers=[theirs.a.weight, theirs.b.weight], **options
    )
    for step in range(90):
        backward(ours, step)
        backward(theirs, step)
        wanted, _, spectra = official_rank_loss([ours.a.weight, ours.b.weight], 0.2)
        stepped = pruner.step()
        assert stepped == plain.step()
        if stepped:
            optimizer.step()
            plain_optimizer.step()
        else:
            assert float(pruner.last_rank_loss) == pytest.approx(float(wanted))
            assert pruner.rank_state.ranks.tolist() == [s.k(0.2) for s in spectra if s]
        assert all(torch.equal(m, plain.masks[n]) for n, m in pruner.masks.unpack().items()), f"step {step}"
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
        optimizer.zero_grad()
        plain_optimizer.zero_grad()


# -------------------------------------------------------------------------------------------------------- the rank loss


@pytest.mark.parametrize("rank_every", ["update", 1, 3])
def test_rank_gradient_is_added_when_due(rank_every: str | int, device: torch.device) -> None:
    """With a masked optimizer `.grad` stays dense, so that what was added can be read off."""
    model = make_net(device)
    optimizer = OPTIMIZERS["MaskedSGD"](model.parameters())
    pruner = RankPruner(
        model,
        optimizer,
        sparsity=0.5,
        total_steps=20,
        update_every=5,
        rank_weight=3.0,
        tail_energy=0.2,
        rank_every=rank_every,
    )
    for step in range(1, 21):
        backward(model, step)
        before = {n: p.grad.clone() for n, p in model.named_parameters()}
        _, wanted, _ = official_rank_loss([model.a.weight, model.b.weight], 0.2)
        stepped = pruner.step()
        due = step % 5 == 0 and step <= 18 if rank_every == "update" else step % int(rank_every) == 0
        for name, p in model.named_parameters():
            added = p.grad - before[name]
            index = {"a.weight": 0, "b.weight": 1}.get(name)
            if due and index is not None:
                right = 3 * wanted[index].to(added)
                torch.testing.assert_close(added, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
            else:
                assert not added.any()
        if stepped:
            optimizer.step()
        optimizer.zero_grad()


def test_rank_layers_and_live_weight(device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS["MaskedSGD"](model.parameters())
    weight = torch.tensor(0.0, device=device)
    pruner = RankPruner(
        model, optimizer, sparsity=0.5, total_steps=20, update_every=5, rank_weight=weight, rank_every=1,
        rank_layers={"head": model.head.weight}, weights={"b": model.b.weight},
    )  # fmt: skip
    backward(model, 0)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    pruner.step()
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    weight.fill_(2.0)
    pruner.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p.grad, before[n])]
    assert changed == ["head.weight"]
    assert pruner.masks.names == ["b"]


def test_frozen_rank_layers_get_no_gradient(device: torch.device) -> None:
    model = make_net(device)
    model.a.weight.requires_grad_(False)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = RankPruner(
        model, optimizer, sparsity=0.5, total_steps=20, update_every=5, rank_weight=2.0, rank_every=1,
        weights={"b": model.b.weight},
    )  # fmt: skip
    frozen = model.a.weight.detach().clone()
    train(model, optimizer, pruner, range(20))
    assert torch.equal(model.a.weight, frozen)


def test_no_rank_loss_by_default(device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.5, total_steps=10, update_every=5)
    train(model, optimizer, pruner, range(10))
    assert pruner.last_rank_loss is None
    assert pruner.rank_state.calls == 0


# ----------------------------------------------------------------------------------------------------------- robustness


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["SGD", "MaskedAdamW"])
def test_non_finite_gradient_leaves_everything_and_the_next_update_catches_up(
    value: float, name: str, device: torch.device
) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=30, update_every=5, rank_weight=1.0)
    train(model, optimizer, pruner, range(9))
    backward(model, 9)
    model.b.weight.grad[3, 2, 1, 0] = value
    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    bits = pruner.masks.bits.clone()
    assert pruner.step() is False
    assert torch.equal(pruner.masks.bits, bits)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    for index, values in optimizer.state_dict()["state"].items():
        for key, saved in values.items():
            assert torch.equal(torch.as_tensor(saved), torch.as_tensor(state[index][key]))
    stats = pruner.stats()
    assert not stats.pruned.any()
    assert not stats.grown.any()
    assert not stats.restarted.any()
    optimizer.zero_grad()
    train(model, optimizer, pruner, range(10, 15))
    total = sum(w.numel() for w in pruner.weights.values())
    assert int(pruner.masks.count().sum()) == total - round_half_up(1 - 0.1 ** (3 / 5), total)
    assert_dead(pruner, optimizer)


def test_missing_gradients_are_zero(device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=10, update_every=2)
    for _ in range(10):
        if pruner.step():
            optimizer.step()
    assert pruner.finalize() == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("name", ["SGD", "MaskedSGD"])
def test_nothing_is_hooked_or_patched(name: str, device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    step, keys = optimizer.step.__func__, set(model.state_dict())  # type: ignore[attr-defined]
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=10, update_every=2, rank_weight=1.0)
    train(model, optimizer, pruner, range(10))
    assert optimizer.step.__func__ is step  # type: ignore[attr-defined]
    assert "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    for p in model.parameters():
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks
        assert p.is_leaf
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert set(model.state_dict()) == keys
    Net().load_state_dict(model.state_dict())


def test_accumulation_and_a_second_zero_grad_mode(device: torch.device) -> None:
    """Micro-batches sum in `.grad` before one step; gradients may be zeroed in place or dropped."""
    models = [make_net(device, torch.float64) for _ in range(2)]
    bits = []
    for model, set_to_none in zip(models, (True, False), strict=True):
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=20, update_every=4, rank_weight=1.0)
        for step in range(20):
            backward(model, 2 * step)
            backward(model, 2 * step + 1)
            if pruner.step():
                optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        bits.append(pruner.masks.bits)
    assert torch.equal(*bits)


@pytest.mark.parametrize("name", ["SGD", "MaskedSGD", "MaskedAdamW"])
def test_clip_grad_norm(name: str, device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=10, update_every=2)
    train(model, optimizer, pruner, range(4))
    backward(model, 4)
    masks = pruner.masks.unpack()
    squares = [(p.grad * masks.get(n, 1)).double().square().sum() for n, p in model.named_parameters()]
    assert pruner.step()
    norm = pruner.clip_grad_norm_(0.01)
    assert float(norm) == pytest.approx(math.sqrt(sum(float(s) for s in squares)), rel=1e-5)
    total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert total == pytest.approx(0.01, rel=1e-3)
    assert all(not model.get_parameter(n).grad[~m].any() for n, m in masks.items())


@pytest.mark.parametrize("name", ["SGD", "MaskedSGD"])
def test_grad_scaler(name: str, device: torch.device) -> None:
    """The fp16 loop of the documentation, with an overflow on an ordinary step and one on an update."""
    model, plain = make_net(device), make_net(device)
    optimizer, plain_optimizer = (OPTIMIZERS[name](m.parameters()) for m in (model, plain))
    options = {"sparsity": 0.9, "total_steps": 30, "update_every": 5}
    pruner, plain_pruner = RankPruner(model, optimizer, **options), RankPruner(plain, plain_optimizer, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, growth_interval=1000)
    for step in range(30):
        x, y = batch(model, step)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step in (7, 9):
            model.head.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        if pruner.step():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        backward(plain, step)
        if step in (7, 9):
            plain.head.weight.grad[0, 0] = torch.inf
        if plain_pruner.step() and step != 7:
            plain_optimizer.step()
        plain_optimizer.zero_grad()
        assert_dead(pruner, optimizer)
    assert torch.equal(pruner.masks.bits, plain_pruner.masks.bits)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- saved, ended, shared


@pytest.mark.parametrize("name", ["SGD", "AdamW", "MaskedSGD", "MaskedAdamW"])
@pytest.mark.parametrize("criterion", ["rigl", "set"])
@pytest.mark.parametrize(("at", "rank_method"), [(7, "exact"), (10, "power"), (23, "power")])
def test_resume_equals_an_uninterrupted_run_bit_by_bit(
    name: str, criterion: str, at: int, rank_method: str, device: torch.device
) -> None:
    def make() -> tuple[Net, torch.optim.Optimizer, RankPruner]:
        model = make_net(device)
        optimizer = OPTIMIZERS[name](model.parameters())
        generator = torch.Generator(device).manual_seed(1) if criterion == "set" else None
        return model, optimizer, RankPruner(
            model, optimizer, sparsity=0.9, total_steps=40, update_every=5, rank_weight=1.0, rank_every=3,
            criterion=criterion, generator=generator, rank_method=rank_method,
        )  # fmt: skip

    model, optimizer, pruner = make()
    train(model, optimizer, pruner, range(at))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, pruner)], file)
    train(model, optimizer, pruner, range(at, 40))
    other = make()
    states = torch.load(io.BytesIO(file.getvalue()), weights_only=True, map_location="cpu")
    for x, state in zip(other, states, strict=True):
        x.load_state_dict(state)
    train(*other, range(at, 40))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other[0].parameters(), strict=True))
    assert torch.equal(pruner.masks.bits, other[2].masks.bits)
    assert pruner.rank_state.calls == other[2].rank_state.calls == 40 // 3
    assert torch.equal(pruner.rank_state.ranks, other[2].rank_state.ranks)
    assert pruner.step_count == other[2].step_count == 40
    assert torch.equal(pruner.last_rank_loss, other[2].last_rank_loss)


@pytest.mark.parametrize(
    "schedule",
    [
        {"update_every": 5},
        {"update_every": 20},
        {"schedule": ExponentialSparsity(sparsity=0.8, every=3, begin=44, end=80)},
    ],
)
def test_a_resume_with_another_schedule_follows_it(schedule: dict[str, Any], device: torch.device) -> None:
    """The number of an update depends on the step alone, not on how many the old schedule had made by then."""
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.8, total_steps=80, update_every=10)
    train(model, optimizer, pruner, range(40))
    state, active = pruner.state_dict(), int(pruner.masks.count().sum())
    pruner = RankPruner(model, optimizer, sparsity=0.8, total_steps=80, **schedule)
    pruner.load_state_dict(state)
    numel = sum(pruner.masks.layout.numels)

    def after(step: int, stepped: bool) -> None:
        if not stepped:
            planned = numel - round_half_up(pruner.schedule(step + 1), numel)
            assert int(pruner.masks.count().sum()) == min(planned, active)

    train(model, optimizer, pruner, range(40, 80), after)
    assert int(pruner.masks.count().sum()) == numel - round_half_up(0.8, numel)


@pytest.mark.parametrize("rank_method", ["exact", "power"])
def test_the_rank_gradient_is_the_same_in_every_process(rank_method: str, device: torch.device) -> None:
    """Whatever each has drawn before: processes add it to their reduced gradients without exchanging it."""
    gradients = []
    for seed in (1, 2):
        model = make_net(device)
        optimizer = OPTIMIZERS["MaskedSGD"](model.parameters())
        pruner = RankPruner(
            model, optimizer, sparsity=0.5, total_steps=20, update_every=5, rank_weight=3.0, rank_every=1,
            rank_method=rank_method,
        )  # fmt: skip
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        for _ in range(3):
            pruner.step()
        assert torch.equal(torch.get_rng_state(), before)
        gradients.append([p.grad for p in (model.a.weight, model.b.weight)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_loaded_masks_rule(device: torch.device) -> None:
    """Weights loaded with something in the holes are zeroed there."""
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=10, update_every=2)
    train(model, optimizer, pruner, range(10))
    state = pruner.state_dict()
    fresh = make_net(device)
    fresh_optimizer = OPTIMIZERS["SGD"](fresh.parameters())
    other = RankPruner(fresh, fresh_optimizer, sparsity=0.9, total_steps=10, update_every=2)
    other.load_state_dict(state)
    assert_dead(other, fresh_optimizer)
    assert torch.equal(other.masks.bits, pruner.masks.bits)


def test_bad_states(device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=10, update_every=2)
    with pytest.raises(ValueError, match="not the state of a RankPruner"):
        pruner.load_state_dict({"step": 3})
    with pytest.raises(ValueError, match="here only one has"):
        pruner.load_state_dict({**pruner.state_dict(), "generator": torch.Generator().get_state()})
    other = RankPruner(model, optimizer, sparsity=0.9, total_steps=10, update_every=2, weights={"x": model.a.weight})
    with pytest.raises(ValueError, match="belong to other weights"):
        pruner.load_state_dict(other.state_dict())
    official = RankPruner(model, optimizer, sparsity=0.9, total_steps=10, update_every=2, semantics="official")
    for mine, theirs in ((pruner, official), (official, pruner)):
        with pytest.raises(ValueError, match="the saved state has semantics"):
            mine.load_state_dict(theirs.state_dict())
    assert pruner.step_count == 0


@pytest.mark.parametrize("semantics", ["corrected", "official"])
def test_weights_of_nan_and_of_no_elements_take_nothing_with_them(semantics: str, device: torch.device) -> None:
    sizes = {"a": 100, "empty": 0}
    for names in (["a", "empty"], ["empty"]):
        weights = {name: nn.Parameter(torch.randn(sizes[name], generator=seeded(1)).to(device)) for name in names}
        optimizer = torch.optim.SGD(weights.values(), 0.0)
        pruner = RankPruner(
            nn.Module(), optimizer, sparsity=0.5, total_steps=40, update_every=2, weights=weights, semantics=semantics
        )
        if "a" in weights:
            weights["a"].data[3] = math.nan
        for step in range(40):
            for w in weights.values():
                w.grad = torch.randn(w.shape, generator=seeded(step)).to(device)
            if pruner.step():
                optimizer.step()
        active = dict(zip(weights, pruner.masks.count().tolist(), strict=True))
        assert active["empty"] == 0
        assert all(int(w.isfinite().sum()) >= w.numel() - 1 for w in weights.values())
        if "a" in weights:
            assert 50 <= active["a"] <= 56  # official misses the target of a short run
            assert int((weights["a"] != 0).sum()) > 30


@pytest.mark.parametrize("name", ["SGD", "MaskedSGD"])
def test_what_an_official_update_brings_back_does_not_move_with_it(name: str, device: torch.device) -> None:
    """Where zeros tie at the threshold everything comes back (Q-R11). With drop_fraction=0 the optimizer takes a step
    at updates too, by gradients that were masked as they arose: before the update."""
    weight = nn.Parameter(torch.arange(1.0, 101.0, device=device))
    optimizer = {"SGD": torch.optim.SGD, "MaskedSGD": MaskedSGD}[name]([weight], 0.1)
    pruner = RankPruner(
        nn.Module(), optimizer, sparsity=0.5, total_steps=40, update_every=2, weights={"w": weight}, drop_fraction=0.0,
        semantics="official",
    )  # fmt: skip
    for step in range(8):
        if step == 7:
            pruned = ~pruner.masks.unpack()["w"]
            weight.data[-10:] = 0
        before = weight.detach().clone()
        weight.grad = torch.ones_like(weight)
        assert pruner.step()
        optimizer.step()
    assert pruned.any()
    assert pruner.masks.unpack()["w"].all()
    assert torch.equal(weight == before, pruned)


@pytest.mark.parametrize("distribution", ["global_magnitude", "erk", "uniform"])
def test_finalize_after_an_early_stop(distribution: str, device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.95, total_steps=100, update_every=5, distribution=distribution)
    train(model, optimizer, pruner, range(23))
    numels = [w.numel() for w in pruner.weights.values()]
    assert int(pruner.masks.count().sum()) > 0.4 * sum(numels)
    largest = torch.cat([w.detach().abs().flatten() for w in pruner.weights.values()]).topk(5).values
    sparsity = pruner.finalize()
    kept = (
        sum(n - round_half_up(0.95, n) for n in numels)
        if distribution == "uniform"
        else sum(numels) - round_half_up(0.95, sum(numels))
    )
    assert sparsity == 1 - kept / sum(numels)
    zeros = sum(int((w == 0).sum()) for w in pruner.weights.values())
    assert zeros >= sum(numels) - kept
    if distribution == "global_magnitude":
        after = torch.cat([w.detach().abs().flatten() for w in pruner.weights.values()]).topk(5).values
        assert torch.equal(after, largest)
    bits = pruner.masks.bits.clone()
    assert pruner.finalize() == sparsity  # again changes nothing
    assert torch.equal(pruner.masks.bits, bits)
    assert_dead(pruner, optimizer)


def test_edited_masks_take_effect(device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS["MaskedSGD"](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.5, total_steps=10, update_every=2)
    train(model, optimizer, pruner, range(3))
    masks = pruner.masks.unpack()
    masks["a.weight"][0] = False
    pruner.masks.load_(masks)
    pruner.apply_masks_()
    assert not model.a.weight[0].any()
    assert_dead(pruner, optimizer)


def test_two_processes_end_with_the_masks_of_the_first(tmp_path: Path) -> None:
    """Each has gradients and random scores of its own; without the broadcast their masks would part at the first
    update."""
    script = Path(__file__).with_name("ddp_pruner.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    environment["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store"), str(tmp_path / "out")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in processes:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2))
    assert first["digests"][0] != first["digests"][1] == second["digests"][0] == second["digests"][1]
    for criterion in ("rigl", "set"):
        assert torch.equal(first[criterion], second[criterion])
        for rank in (first, second):
            for zeros, mask in zip(rank[f"{criterion} zeros"], rank[f"{criterion} masks"].values(), strict=True):
                assert zeros[~mask].all()
        active = sum(int(m.sum()) for m in first[f"{criterion} masks"].values())
        total = sum(m.numel() for m in first[f"{criterion} masks"].values())
        assert active == total - round_half_up(0.8, total)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity must lie in \[0, 1\), got 1.0"),
        (
            {"total_steps": 5},
            ValueError,
            "total_steps=5 is too short: pruning ends at step 4 .* first update at step 10",
        ),
        ({"criterion": "magnitude"}, ValueError, r"criterion must be one of .*'rigl'.* got 'magnitude'"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of .* got 'linear'"),
        ({"distribution": "layerwise"}, ValueError, "distribution must be one of .* got 'layerwise'"),
        ({"distribution": {"a.weight": 0.5}}, ValueError, r"these differ: \['b.weight', 'head.weight'\]"),
        (
            {"distribution": {"a.weight": 0.5, "b.weight": 1.5, "head.weight": 0.5}},
            ValueError,
            r"must lie in \[0, 1\], got {'b.weight': 1.5}",
        ),
        ({"rank_every": 0}, ValueError, "rank_every must be .* got 0"),
        ({"rank_every": "step"}, ValueError, "rank_every must be .* got 'step'"),
        ({"semantics": "published"}, ValueError, "semantics must be .* got 'published'"),
        ({"semantics": "official", "criterion": "set"}, ValueError, "criterion=.rigl., as published, got 'set'"),
        ({"semantics": "official", "distribution": "erk"}, ValueError, "distribution=.global_magnitude., .* got 'erk'"),
        ({"semantics": "official", "rank_every": 1}, ValueError, "rank_every=.update., as published, got 1"),
        ({"semantics": "official", "schedule": "constant"}, ValueError, "schedule=.exponential. from step 0"),
        (
            {"semantics": "official", "grow_steps": 10, "update_every": 10},
            ValueError,
            "grow_steps < update_every=10, got 10",
        ),
        ({"sparsity": "0.9"}, TypeError, "sparsity must be a number, got '0.9'"),
        ({"rank_every": True}, ValueError, "rank_every must be .* got True"),
        ({"rank_layers": nn.Conv2d}, TypeError, "rank_layers must be a mapping"),
        ({"grow_steps": 0}, ValueError, "grow_steps must be whole, from 1 to update_every=.*, got 0"),
        ({"grow_steps": 11, "update_every": 10}, ValueError, "grow_steps must be whole, from 1 to .*=10, got 11"),
        ({"drop_fraction": 1.5}, ValueError, "drop_fraction must lie in"),
        ({"prune_until": 0.0}, ValueError, "prune_until and update_until must lie in"),
        ({"update_until": 1.5}, ValueError, "prune_until and update_until must lie in"),
        ({"update_every": 0}, ValueError, "every must be at least 1 step, got 0"),
        (
            {"schedule": ExponentialSparsity(sparsity=0.5, every=5, end=50)},
            ValueError,
            "sparsity=0.9 .* schedule's 0.5",
        ),
        ({"schedule": ExponentialSparsity(sparsity=0.9, every=5, end=150)}, ValueError, "150, after total_steps=100"),
        ({"rank_weight": 1.0, "rank_layers": {}}, ValueError, "no rank_layers"),
        ({"rank_weight": 1.0, "rank_method": "svd"}, ValueError, "method must be"),
        ({"rank_weight": 1.0, "tail_energy": 2.0}, ValueError, "tail_energy must lie in"),
        ({"rank_weight": 1.0, "min_sparsity": -1.0}, ValueError, "min_sparsity must lie in"),
        ({"weights": {}}, ValueError, "no weights"),
        ({"distribution": None}, ValueError, "distribution must be one of .* got None"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"rank_weight": "4"}, TypeError, "rank_weight must be a float or a 0-d tensor, got str"),
        ({"rank_weight": math.nan}, ValueError, "rank_weight must be finite, got nan"),
        ({"rank_weight": torch.ones(2)}, ValueError, r"rank_weight must be .* got shape \(2,\)"),
        ({"rank_weight": 1.0, "tail_energy": torch.ones(2)}, ValueError, r"tail_energy must be .* got shape \(2,\)"),
        ({"update_every": 10.0}, TypeError, "update_every must be a whole number of steps, got 10.0"),
        ({"total_steps": "100"}, TypeError, "total_steps must be a whole number of steps, got '100'"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """At construction, not in the middle of a training."""
    model = make_net(torch.device("cpu"))
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with pytest.raises(error, match=message):
        RankPruner(model, optimizer, **{"sparsity": 0.9, "total_steps": 100, "update_every": 10, **options})


def test_variants_of_mixing_optimizers_are_refused() -> None:
    class Mine(torch.optim.LBFGS):
        pass

    model = make_net(torch.device("cpu"))
    with pytest.raises(TypeError, match="Mine mixes the elements of a weight"):
        RankPruner(model, Mine(model.parameters()), sparsity=0.9, total_steps=100, update_every=10)


def test_optimizer_must_hold_the_weights() -> None:
    model = make_net(torch.device("cpu"))
    optimizer = OPTIMIZERS["SGD"](model.head.parameters())
    with pytest.raises(ValueError, match=r"does not hold the pruned weights \['a.weight', 'b.weight'\] \(2 in all\)"):
        RankPruner(model, optimizer, sparsity=0.9, total_steps=100, update_every=10)


@pytest.mark.parametrize(
    "options",
    [
        {"update_every": 5, "prune_until": 1.0, "update_until": 0.5},
        {"schedule": ExponentialSparsity(sparsity=0.9, every=5, end=40, until=20)},
    ],
    ids=["named", "object"],
)
def test_nothing_grows_after_update_until_though_pruning_goes_on(options: dict[str, Any], device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=40, **options)
    grown: dict[int, int] = {}

    def after(step: int, stepped: bool) -> None:
        if not stepped:
            counts = pruner.stats()
            grown[step + 1] = int((counts.grown + counts.restarted).sum())

    train(model, optimizer, pruner, range(40), after)
    assert sorted(grown) == list(range(5, 41, 5))
    assert [step for step, count in grown.items() if count] == [5, 10, 15]
    total = sum(pruner.masks.layout.numels)
    assert int(pruner.masks.count().sum()) == total - round_half_up(0.9, total)


def test_constant_sparsity_is_updated_until_update_until(device: torch.device) -> None:
    """No step is lost to updates that would change nothing."""
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    options: dict[str, Any] = {"sparsity": 0.9, "total_steps": 40, "update_every": 5, "schedule": "constant"}
    pruner = RankPruner(model, optimizer, update_until=0.5, **options)
    updates: list[int] = []
    train(model, optimizer, pruner, range(40), lambda step, stepped: None if stepped else updates.append(step + 1))
    assert updates == [5, 10, 15, 20]
    with pytest.raises(ValueError, match=r"pruning ends at step 4 \(update_until=0.1\)"):
        RankPruner(model, optimizer, update_until=0.1, **options)


def test_a_masked_optimizer_takes_one_pruner() -> None:
    """The masks of a second one would take the place of the first one's, whose weights would come back."""
    model = make_net(torch.device("cpu"))
    optimizer = MaskedSGD(model.parameters(), 0.1)
    options: dict[str, Any] = {"sparsity": 0.9, "total_steps": 100, "update_every": 10}
    RankPruner(model, optimizer, weights={"a": model.a.weight}, **options)
    with pytest.raises(
        ValueError, match=r"the optimizer already masks \['a'\] \(1 in all\), which this pruner does not"
    ):
        RankPruner(model, optimizer, weights={"b": model.b.weight}, **options)
    pruner = RankPruner(model, optimizer, **options)  # all that was masked, and more
    assert optimizer.masks is pruner.masks


def test_schedule_objects_define_the_updates(device: torch.device) -> None:
    model = make_net(device)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    schedule = PolynomialSparsity(sparsity=0.9, every=3, begin=2, end=11, until=15)
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=20, schedule=schedule)
    returned: list[int] = []
    train(model, optimizer, pruner, range(20), lambda step, stepped: None if stepped else returned.append(step + 1))
    assert returned == [5, 8, 11, 14]
    constant = ConstantSparsity(sparsity=0.9, every=3, begin=2, end=11)
    pruner = RankPruner(
        make_net(device), optimizer, sparsity=0.9, total_steps=20, schedule=constant, weights={"a": model.a.weight}
    )
    assert int(pruner.masks.count()) == 216 - round_half_up(0.9, 216)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_that_steps_on_updates_too_revives_nothing(name: str, device: torch.device) -> None:
    """A loop that ignores what `step` returns loses a step of training, not the sparsity."""
    model = make_net(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = RankPruner(model, optimizer, sparsity=0.9, total_steps=40, update_every=4)
    for step in range(60):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=seeded(1000 * step + i)).to(p)
        pruner.step()
        optimizer.step()
        for weight, mask in zip(pruner.weights.values(), pruner.masks.unpack().values(), strict=True):
            assert not weight[~mask].any()


def test_finalize_warns_of_layers_of_which_nothing_is_left(device: torch.device) -> None:
    model = make_net(device)
    with torch.no_grad():
        model.b.weight *= 1e-6
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    options: dict[str, Any] = {"sparsity": 0.8, "total_steps": 20, "update_every": 4, "schedule": "constant"}
    pruner = RankPruner(model, optimizer, **options)
    with pytest.warns(UserWarning, match=r"nothing is left of \['b.weight'\] \(1 in all\)"):
        pruner.finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RankPruner(model, optimizer, distribution="erk", **options).finalize()
