"""What a topology update grows, counts and costs: criteria against plain rules, history, non-finite gradients, ops."""

from __future__ import annotations

import copy
import io
import math
from collections import Counter
from typing import Any

import pytest
import torch
from cases import seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rpg_fast import MaskedSGD, RankPruner
from rpg_fast.rank_loss import LEFT_OUT
from rpg_fast.topology import GradientMean

SHAPES = [(6, 3, 3, 3), (20, 16), (8, 6, 3, 3)]


def make_model(layers: int = 3) -> nn.Module:
    """Parameters alone: what happens to them is up to the test."""
    model = nn.Module()
    for i in range(layers):
        shape = SHAPES[i % 3]
        layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 3)
        model.add_module(f"l{i}", layer.to(memory_format=torch.channels_last) if i % 2 else layer)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=seeded(i)))
    return model


def set_gradients(model: nn.Module, step: int) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=seeded(1000 * step + i)).to(p.device)


def make(device: torch.device, layers: int = 3, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, RankPruner]:
    model = make_model(layers).to(device)
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"sparsity": 0.8, "total_steps": 40, "update_every": 4, **options}
    return model, optimizer, RankPruner(model, optimizer, **options)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: RankPruner, steps: range) -> list[bool]:
    stepped = []
    for step in steps:
        set_gradients(model, step)
        stepped.append(pruner.step())
        if stepped[-1]:
            optimizer.step()
    return stepped


# ------------------------------------------------------------------------------------------------------------- criteria


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_momentum_grows_where_the_smoothed_dense_gradient_is_largest(
    layout: torch.memory_format, device: torch.device
) -> None:
    """Also where the mask is zero, where the optimizer's own buffer is; with a coefficient that a scheduler changes."""
    model, optimizer, pruner = make(device, criterion="momentum", schedule="constant", distribution="uniform")
    model.to(memory_format=layout)
    momenta = {name: torch.zeros_like(w) for name, w in pruner.weights.items()}
    for step in range(12):
        set_gradients(model, step)
        decay = optimizer.param_groups[0]["momentum"] = 0.9 - 0.07 * step
        if step == 5:
            model.l1.weight.grad[3, 2] = math.inf  # no part of this step counts
        else:
            momenta = {name: decay * m + pruner.weights[name].grad for name, m in momenta.items()}
        before = pruner.masks.unpack()
        weights = {name: w.detach().clone() for name, w in pruner.weights.items()}
        if pruner.step():
            optimizer.step()
            continue
        for name, after in pruner.masks.unpack().items():
            active = int(before[name].sum())
            n_grow = math.floor(pruner.drop(step + 1) * active)
            smallest = weights[name].abs().masked_fill(~before[name], -1).flatten().sort(descending=True).indices
            kept = torch.zeros(after.numel(), dtype=torch.bool, device=device)
            kept[smallest[: active - n_grow]] = True
            scores = momenta[name].abs().flatten().masked_fill(kept, -1)
            kept[scores.topk(n_grow).indices] = True
            assert torch.equal(after.flatten(), kept), f"step {step}, {name}"


def test_a_callable_decides(device: torch.device) -> None:
    """It sees names, weights, dense gradients, generator and optimizer; it may decline."""
    calls: list[tuple[Any, ...]] = []

    def smallest_gradient(*arguments: Any) -> list[Tensor] | None:
        calls.append(arguments)
        return [1 / (1 + g.abs()) for g in arguments[2]] if len(calls) < 3 else None

    generator = torch.Generator(device)
    options = {"schedule": "constant", "distribution": "uniform", "generator": generator, "drop_fraction": 0.5}
    model, optimizer, pruner = make(device, criterion=smallest_gradient, **options)
    before = pruner.masks.unpack()
    run(model, optimizer, pruner, range(4))
    names, weights, grads, given, opt = calls[0]
    assert names == pruner.masks.names
    assert [w.shape for w in weights] == [w.shape for w in pruner.weights.values()]
    assert all(g is w.grad for g, w in zip(grads, pruner.weights.values(), strict=True))
    assert given is generator
    assert opt is optimizer
    for name, after in pruner.masks.unpack().items():
        grown, never = after & ~before[name], ~after & ~before[name]
        gradient = pruner.weights[name].grad.abs()
        assert gradient[grown].max() <= gradient[never].min()
    run(model, optimizer, pruner, range(4, 11))
    bits = pruner.masks.bits.clone()
    run(model, optimizer, pruner, range(11, 12))
    assert len(calls) == 3
    assert torch.equal(pruner.masks.bits, bits)  # None: nothing is dropped, and the sparsity is constant


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (lambda w: [], ValueError, "returned 0 scores for 3 weights"),
        (lambda w: [x > 0 for x in w], TypeError, r"l0.weight must be a real floating-point tensor, got torch.bool"),
        (lambda w: [x[0] for x in w], ValueError, r"l0.weight has shape \(3, 3, 3\) on .*, wanted \(6, 3, 3, 3\)"),
    ],
)
def test_bad_scores(scores: Any, error: type[Exception], message: str, device: torch.device) -> None:
    model, optimizer, pruner = make(device, criterion=lambda names, weights, *_: scores(weights))
    with pytest.raises(error, match=message):
        run(model, optimizer, pruner, range(4))


def test_static_masks_never_change(device: torch.device) -> None:
    model, optimizer, pruner = make(device, criterion="static", schedule="constant")
    first = pruner.masks.digest()
    assert all(run(model, optimizer, pruner, range(40)))
    assert pruner.finalize() == pytest.approx(0.8, abs=1e-3)
    assert pruner.masks.digest() == first
    with pytest.raises(ValueError, match='"static" makes masks once: take schedule="constant"'):
        make(device, criterion="static")


def test_momentum_needs_momentum() -> None:
    model = make_model()
    groups = [{"params": [model.l1.weight], "momentum": 0.0}, {"params": [model.l0.weight, model.l2.weight]}]
    for optimizer in (torch.optim.SGD(groups, 0.1, momentum=0.9), torch.optim.Adagrad(groups)):
        with pytest.raises(ValueError, match=r"none for \['l(0|1).weight'.*\] \(. in all\): set it, or take"):
            RankPruner(model, optimizer, sparsity=0.8, total_steps=40, update_every=4, criterion="momentum")
    RankPruner(
        model, torch.optim.NAdam(model.parameters()), sparsity=0.8, total_steps=40, update_every=4, criterion="momentum"
    )


def test_momentum_and_history_survive_a_resume(device: torch.device) -> None:
    options = {"criterion": "momentum", "schedule": "constant", "update_until": 1.0}
    model, optimizer, pruner = make(device, **options)
    run(model, optimizer, pruner, range(14))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, pruner)], file)
    other = make(device, **options)
    for x, state in zip(other, torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
        x.load_state_dict(state)
    run(model, optimizer, pruner, range(14, 40))
    run(*other, range(14, 40))
    assert pruner.masks == other[2].masks
    assert pruner.stats().read() == other[2].stats().read()
    _, _, without = make(device, schedule="constant")
    with pytest.raises(ValueError, match="must hold a momentum exactly if this pruner does"):
        without.load_state_dict(pruner.state_dict())


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("schedule", ["constant", "exponential"])
def test_regrown_weights_had_been_active_before(schedule: str, device: torch.device) -> None:
    """Against a history in bools, over 9 updates."""
    model, optimizer, pruner = make(
        device, schedule=schedule, criterion="set", generator=torch.Generator(device).manual_seed(0)
    )
    ever = {name: mask.clone() for name, mask in pruner.masks.unpack().items()}
    seen = 0
    for step in range(40):
        before = pruner.masks.unpack()
        if all(run(model, optimizer, pruner, range(step, step + 1))):
            continue
        stats = pruner.stats()
        rows = stats.read()
        for i, (name, after) in enumerate(pruner.masks.unpack().items()):
            grown = after & ~before[name]
            counts = {
                "total": after.numel(),
                "active": int(after.sum()),
                "pruned": int((before[name] & ~after).sum()),
                "grown": int(grown.sum()),
                "regrown": int((grown & ever[name]).sum()),
            }
            seen += counts["grown"] - counts["regrown"]
            assert {key: rows[name][key] for key in counts} == counts
            assert float(stats.sparsity[i]) == pytest.approx(1 - counts["active"] / counts["total"])
            ever[name] |= after
    assert (seen > 0) == (schedule == "constant")  # a dense start has had them all


def test_weights_that_power_left_out_show_and_settle(device: torch.device) -> None:
    model, optimizer, pruner = make(device, rank_weight=1.0, rank_every=1, rank_method="power")
    assert pruner.stats().left_out is None
    assert pruner.settle() == []
    run(model, optimizer, pruner, range(1))
    assert pruner.stats().left_out.tolist() == [False, False]
    pruner.rank_state.flags[1] = LEFT_OUT
    assert pruner.stats().left_out.tolist() == [False, True]
    assert pruner.settle() == ["l2.weight"]
    assert pruner.rank_state.by_eigen == (1,)


# ----------------------------------------------------------------------------------------------------------- robustness


@pytest.mark.parametrize("criterion", ["rigl", "set", "momentum", "gmp"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_at_the_last_update_too_leaves_everything_and_finalize_catches_up(
    criterion: str, value: float, device: torch.device
) -> None:
    model, optimizer, pruner = make(device, criterion=criterion)
    last = pruner.schedule.last_update
    run(model, optimizer, pruner, range(last - 1))
    set_gradients(model, last)
    model.l2.weight.grad[1, 2, 0, 1] = value
    kept = [p.detach().clone() for p in model.parameters()]
    digest = pruner.masks.digest()
    assert pruner.step() is False
    assert pruner.masks.digest() == digest
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))
    sizes = [w.numel() for w in pruner.weights.values()]
    wanted = math.floor(0.8 * sum(sizes) + 0.5) / sum(sizes)
    assert 1 - int(pruner.masks.count().sum()) / sum(sizes) < wanted
    assert pruner.finalize() == wanted


def test_sparse_gradients_are_refused(device: torch.device) -> None:
    model, _, pruner = make(device, update_every=1)
    set_gradients(model, 0)
    model.l1.weight.grad = model.l1.weight.grad.to_sparse()
    with pytest.raises(TypeError, match=r"gradients must be dense, got torch.sparse_coo for l1.weight"):
        pruner.step()


# ------------------------------------------------------------------------------------------------------------- the cost


class CountOps(TorchDispatchMode):
    """Counts the ops that launch something: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("distribution", ["global_magnitude", "uniform"])
@pytest.mark.parametrize("criterion", ["rigl", "set", "momentum", "gmp"])
def test_ops_of_a_step_do_not_grow_with_the_layers(criterion: str, distribution: str, device: torch.device) -> None:
    """Neither those of an update nor those of a step that masks; and none reads a value on the host."""
    counts = []
    for layers in (2, 24):
        model, optimizer, pruner = make(device, layers, criterion=criterion, distribution=distribution)
        run(model, optimizer, pruner, range(6))
        kinds = []
        for step in (6, 7):
            set_gradients(model, step)
            with CountOps() as ops:
                stepped = pruner.step()
            assert stepped == (step == 6)
            kinds.append(ops.counts)
        counts.append(kinds)
    assert counts[0] == counts[1]
    assert not any("_local_scalar_dense" in name for kind in counts[0] for name in kind)
    assert sum(counts[0][1].values()) < 40


@pytest.mark.parametrize("semantics", ["corrected", "official"])
def test_updates_go_on_by_themselves_as_captured_ones_do(semantics: str, device: torch.device) -> None:
    """A CUDA graph repeats what the host did at capture: here every update is made as the host's first one, and a step
    between is counted by `advance` as a replay is. What differs from update to update lies on the device."""
    runs = []
    for captured in (False, True):
        model, optimizer, pruner = make(device, rank_weight=0.5, semantics=semantics)
        for step in range(40):
            set_gradients(model, step)
            update = pruner.updates_next
            if captured and update:
                count, pruner.step_count = pruner.step_count, 3
                assert not pruner.step()
                pruner.step_count = count
                pruner.advance()
            elif pruner.step():
                assert not update
                optimizer.step()
        assert pruner.step_count == 40
        runs.append([pruner.masks.bits, *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    active = int(pruner.masks.count().sum())
    assert active < 0.3 * sum(pruner.masks.layout.numels)


@pytest.mark.parametrize("grow_steps", [1, 3])
def test_the_mean_of_the_last_gradients_says_what_grows(grow_steps: int, device: torch.device) -> None:
    """At constant sparsity with nothing but the update: what grew are the largest means of `grow_steps` gradients."""
    model, _, pruner = make(device, 2, schedule="constant", drop_fraction=0.5, grow_steps=grow_steps)
    means = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(4):
        set_gradients(model, step)
        if step >= 4 - grow_steps:
            for mean, p in zip(means, model.parameters(), strict=True):
                mean += p.grad / grow_steps
        before = pruner.masks.unpack()
        stepped = pruner.step()
        assert stepped == (step != 3)
    for name, mask in pruner.masks.unpack().items():
        mean = means[[n for n, _ in model.named_parameters()].index(name)].abs()
        grown = mask & ~before[name]
        assert grown.any()
        assert mean[grown].min() >= mean[~mask & ~before[name]].max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_16_bit_gradients_are_not_rounded_on_the_way(dtype: torch.dtype, device: torch.device) -> None:
    """A third of float16's smallest number is zero in float16."""
    mean = GradientMean(3)
    values = torch.tensor([2.0**-24, 3e-7, 1.0, -7.0], dtype=dtype, device=device)
    for step in range(3):
        means = mean.observe([values], opening=step == 0)
    torch.testing.assert_close(means[0], values.float(), rtol=1e-6, atol=0)


def test_a_state_in_the_middle_of_a_window_goes_on(device: torch.device) -> None:
    runs = []
    for resumed in (False, True):
        model, optimizer, pruner = make(device, grow_steps=3)
        run(model, optimizer, pruner, range(7))  # one of the three gradients of the second update is in
        if resumed:
            saved = [copy.deepcopy(x.state_dict()) for x in (model, optimizer, pruner)]
            model, optimizer, pruner = make(device, grow_steps=3)
            for x, state in zip((model, optimizer, pruner), saved, strict=True):
                x.load_state_dict(state)
        run(model, optimizer, pruner, range(7, 20))
        runs.append([pruner.masks.bits, *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
