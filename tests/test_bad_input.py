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
