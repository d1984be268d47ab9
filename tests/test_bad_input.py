"""Arguments of the wrong kind: an error that says what was got and what was wanted, at the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpg_fast

MODEL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
WEIGHTS = rpg_fast.prunable_weights(MODEL)
MASKS = rpg_fast.PackedMasks(WEIGHTS)
MAPPING = r"must be a mapping \{name: tensor\}, got "


def pruner(model: Any = MODEL, optimizer: Any = None, **options: Any) -> rpg_fast.RankPruner:
    optimizer = optimizer or torch.optim.SGD(MODEL.parameters(), 0.1)
    return rpg_fast.RankPruner(model, optimizer, **{"sparsity": 0.5, "total_steps": 1000, **options})


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "masks of a module": (lambda: rpg_fast.PackedMasks(MODEL), MAPPING + r"Sequential: pass prunable_weights"),
    "masks of a list": (lambda: rpg_fast.PackedMasks([torch.ones(3)]), MAPPING + "list"),
    "masks of numbers": (lambda: rpg_fast.PackedMasks({"a": 1.0}), MAPPING + "float for 'a'"),
    "uniform of a module": (lambda: rpg_fast.uniform(MODEL, 0.5), MAPPING + "Sequential"),
    "erk of a module": (lambda: rpg_fast.erk(MODEL, 0.5), MAPPING + "Sequential"),
    "global_magnitude of a module": (lambda: rpg_fast.global_magnitude(MODEL, 0.5), MAPPING + "Sequential"),
    "gradients by bool masks": (
        lambda: rpg_fast.mask_gradients_(MODEL.parameters(), MASKS.unpack()),
        "masks must be PackedMasks, got dict",
    ),
    "optimizer with bool masks": (
        lambda: rpg_fast.MaskedSGD(MODEL.parameters(), 0.1, masks=MASKS.unpack()),
        "masks must be PackedMasks, got dict",
    ),
    "state of another kind": (lambda: rpg_fast.rank_loss(MODEL, state={}), "state must be a RankState, got dict"),
    "a target in words": (lambda: rpg_fast.rank_loss(MODEL, "0.1"), "tail_energy must be a float .* got str"),
    "no weights at all": (lambda: rpg_fast.rank_loss(None), "a module, a mapping or an iterable .* got NoneType"),
    "one tensor": (lambda: rpg_fast.rank_loss(torch.ones(3, 3)), "got one tensor: wrap it in a list"),
    "a list of values": (lambda: rpg_fast.tail_energy_rank([3.0, 1.0], 0.1), "S must be a tensor .* got list"),
    "exclude by number": (lambda: rpg_fast.prunable_weights(MODEL, exclude=3), "exclude takes .* got 3"),
    "exclude by numbers": (lambda: rpg_fast.prunable_weights(MODEL, exclude=["1", 3]), "exclude takes .* got 3"),
    "weights of an optimizer": (lambda: rpg_fast.prunable_weights({}), "model must be a module, got dict"),
    "pruner, swapped": (
        lambda: pruner(torch.optim.SGD(MODEL.parameters(), 0.1), MODEL),
        "model must be a module, got SGD",
    ),
    "pruner without an optimizer": (lambda: pruner(optimizer=[1]), "optimizer must be a torch optimizer, got list"),
    "pruner, list of weights": (lambda: pruner(weights=list(WEIGHTS.values())), MAPPING + "list"),
    "pruner, module as layers": (lambda: pruner(rank_layers=MODEL), MAPPING + "Sequential"),
    "pruner with LBFGS": (
        lambda: pruner(optimizer=torch.optim.LBFGS(MODEL.parameters())),
        "LBFGS mixes the elements of a weight",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_type(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_biases_among_the_weights() -> None:
    with pytest.raises(
        ValueError, match=r"weights\[1\] must have at least two dimensions .* pass the module or prunable_weights"
    ):
        rpg_fast.rank_loss(MODEL.parameters())


def test_a_state_of_another_sparsity() -> None:
    state = pruner(sparsity=0.5).state_dict()
    with pytest.raises(ValueError, match=r"prunes to sparsity 0\.5, this pruner to 0\.9"):
        pruner(sparsity=0.9).load_state_dict(state)


def test_scaled_gradients_take_the_rank_gradient_unscaled() -> None:
    """The loop with a GradScaler gives the weights of the loop without one."""
    x, y = torch.randn(16, 3, 3, 3), torch.randint(4, (16,))
    ends = []
    for scaled in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
        optimizer = rpg_fast.MaskedSGD(model.parameters(), 0.1, momentum=0.9)
        steps = {"sparsity": 0.5, "total_steps": 20, "update_every": 3, "rank_weight": 1.0, "rank_every": 1}
        trained = rpg_fast.RankPruner(model, optimizer, **steps)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for _ in range(20):
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            if trained.step():
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    for plain, amp in zip(*ends, strict=True):
        torch.testing.assert_close(amp, plain, rtol=1e-6, atol=1e-7)


def test_a_parametrized_weight_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    nn.utils.parametrizations.weight_norm(model[1])
    for function in (rpg_fast.prunable_weights, rpg_fast.rank_loss):
        with pytest.raises(ValueError, match=r"1\.weight is computed from other parameters"):
            function(model)
    assert list(rpg_fast.prunable_weights(model, exclude=r"^1\.")) == ["0.weight"]


def test_a_distribution_that_contradicts_the_sparsity() -> None:
    with pytest.raises(ValueError, match=r"amounts to sparsity 0\.9\d*, wanted 0\.5"):
        pruner(distribution=dict.fromkeys(WEIGHTS, 0.9))


def test_frozen_rank_layers() -> None:
    frozen = nn.Sequential(nn.Conv2d(3, 8, 3)).requires_grad_(False)
    with pytest.raises(ValueError, match="none of the rank_layers requires a gradient"):
        pruner(rank_weight=1.0, rank_layers=rpg_fast.prunable_weights(frozen))


def test_no_forward_mode() -> None:
    weight = torch.randn(8, 20)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda w: rpg_fast.rank_loss([w]), (weight,), (weight,))


def test_an_expanded_gradient_is_not_written() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    weight.grad = torch.ones(1).expand(4, 4)
    with pytest.raises(RuntimeError):
        rpg_fast.mask_gradients_([weight], rpg_fast.PackedMasks({"weight": weight}))
    with pytest.raises(RuntimeError):
        rpg_fast.add_rank_grad_([weight], 1.0)
    assert torch.equal(weight.grad, torch.ones(4, 4))


@pytest.mark.parametrize("change", ["memory format", "dtype", "tail energy", "method"])
def test_cached_spectra_are_not_used_for_something_else(change: str) -> None:
    weight = nn.Parameter(torch.randn(40, 4, 3, 3))
    state, options = rpg_fast.RankState(), {"tail_energy": 0.1, "method": "exact"}
    rpg_fast.rank_loss([weight], state=state, refresh_every=10, **options)
    if change == "memory format":
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    elif change == "dtype":
        weight = nn.Parameter(weight.detach().double())
    elif change == "tail energy":
        options["tail_energy"] = 0.5
    else:
        options["method"] = "power"
    got = rpg_fast.rank_loss([weight], state=state, refresh_every=10, **options)
    want = rpg_fast.rank_loss([weight], **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in (got, want)))


def test_a_failed_call_leaves_the_state_alone() -> None:
    state = rpg_fast.RankState()
    with pytest.raises(ValueError, match="method"):
        rpg_fast.rank_loss(MODEL, method="none", state=state)
    assert state.calls == 0
    assert state.shapes is None


@pytest.mark.parametrize("bad_step", [80, 90])
def test_the_target_is_reached_though_an_update_meets_an_overflow(bad_step: int) -> None:
    layer = nn.Linear(40, 40)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    trained = rpg_fast.RankPruner(layer, optimizer, sparsity=0.9, total_steps=100, update_every=10)
    for step in range(1, 101):
        layer.weight.grad = torch.randn(40, 40)
        if step == bad_step:
            layer.weight.grad[0, 0] = torch.inf
        if trained.step():
            optimizer.step()
    assert (int(trained.masks.count()) == 160) == (bad_step == 80)  # the last update left everything as it was
    assert trained.finalize() == 0.9
    assert int(trained.masks.count()) == 160
    assert int((layer.weight != 0).sum()) <= 160
