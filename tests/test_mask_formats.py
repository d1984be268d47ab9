"""Masks of torch.nn.utils.prune and of published checkpoints, there and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import seeded
from torch import Tensor, nn
from torch.nn.utils import prune

from rpg_fast import MaskedSGD, PackedMasks, mask_formats, prunable_weights


def make_model(device: torch.device | str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(6, 4))
    return nn.Sequential(*layers).to(device)


def random_masks(weights: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: (torch.rand(w.shape, generator=seeded(i)) < 0.5).to(w.device)
        for i, (name, w) in enumerate(weights.items())
    }


# ------------------------------------------------------------------------------------------------- torch.nn.utils.prune


def test_a_pruned_model_is_taken_over(device: torch.device) -> None:
    """Several kinds and rounds of pruning, a bias and a norm too; the output stays, the optimizer's parameters stay."""
    model = make_model(device)
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.ln_structured(model[0], "weight", amount=2, n=2, dim=0)
    prune.random_unstructured(model[4], "weight", amount=7)
    prune.l1_unstructured(model[4], "bias", amount=1)
    prune.l1_unstructured(model[1], "weight", amount=3)
    model = model.to(memory_format=torch.channels_last)
    wanted = {name.removesuffix("_mask"): mask.bool() for name, mask in model.named_buffers() if name.endswith("_mask")}
    x = torch.randn(2, 3, 5, 5, generator=seeded(0)).to(device)
    output = model(x)
    masks = mask_formats.from_torch_prune(model)
    assert torch.equal(model(x), output)
    assert list(prunable_weights(model)) == ["0.weight", "2.weight", "4.weight"]
    assert set(masks.names) == {"0.weight", "2.weight", "4.weight", "4.bias", "1.weight"}
    for name, mask in masks.unpack().items():
        assert torch.equal(mask, wanted.get(name, torch.ones_like(mask)))
    assert all(masks.index_of(model.get_parameter(name)) is not None for name in masks.names)
    optimizer.set_masks(masks)  # it holds the very parameters
    assert not prune.is_pruned(model)


def test_to_torch_prune_and_back(device: torch.device) -> None:
    model = make_model(device)
    weights = prunable_weights(model)
    masks = PackedMasks(weights).load_(random_masks(weights))
    digest = masks.digest()
    mask_formats.to_torch_prune(masks, model)
    assert prune.is_pruned(model)
    assert torch.equal(model[2].weight_mask.bool(), masks.unpack()["2.weight"])
    assert model[2].weight_orig is weights["2.weight"]
    with pytest.raises(ValueError, match="computed from other parameters"):
        prunable_weights(model)
    assert mask_formats.from_torch_prune(copy.deepcopy(model.eval())).digest() == digest
    assert mask_formats.from_torch_prune(model) == masks


def test_bad_torch_prune() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"Sequential has no masks of torch.nn.utils.prune"):
        mask_formats.from_torch_prune(model)
    with pytest.raises(TypeError, match="model must be a module, got dict"):
        mask_formats.from_torch_prune({})  # type: ignore[arg-type]
    prune.identity(model[0], "weight")
    prune.identity(model[4], "weight")
    model[4].weight_mask[1, 2] = 0.5
    with pytest.raises(ValueError, match=r"mask of 4.weight must be 0 or 1 everywhere, got 0.5 \(1 such\)"):
        mask_formats.from_torch_prune(model)
    assert prune.is_pruned(model[0])  # as it was
    masks = PackedMasks({"a": torch.zeros(3), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"does not hold the masked weights \['a', 'b'\] \(2 in all\)"):
        mask_formats.to_torch_prune(masks, model)
    with pytest.raises(TypeError, match="takes PackedMasks and a module, got Linear"):
        mask_formats.to_torch_prune(model[4], masks)  # type: ignore[arg-type]


def test_a_shared_weight_has_one_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for linear in model:
        prune.custom_from_mask(linear, "weight", torch.eye(4))
    masks = mask_formats.from_torch_prune(model)
    assert masks.names == ["0.weight"]
    assert model[0].weight is model[1].weight
    mask_formats.to_torch_prune(masks, model)
    model[1].weight_mask.fill_(1)
    with pytest.raises(ValueError, match=r"1.weight is shared and has another mask elsewhere"):
        mask_formats.from_torch_prune(model)


# ------------------------------------------------------------------------------------------------------- backward_masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8], ids=str)
def test_backward_masks_there_and_back(dtype: torch.dtype, device: torch.device) -> None:
    """None is a dense layer; the masks come from wherever the checkpoint was loaded to."""
    model = make_model(device).to(memory_format=torch.channels_last)
    weights = prunable_weights(model)
    wanted = random_masks(dict(weights))
    published: list[Tensor | None] = [mask.cpu().to(dtype) for mask in wanted.values()]
    published[1], wanted["2.weight"] = None, torch.ones_like(wanted["2.weight"])
    masks = mask_formats.from_backward_masks(published, weights)
    assert all(torch.equal(mask, wanted[name]) for name, mask in masks.unpack().items())
    exported = mask_formats.to_backward_masks(masks)
    assert all(mask.dtype == torch.bool and mask.is_contiguous() for mask in exported)
    assert mask_formats.from_backward_masks(exported, weights) == masks
    named = {f"module.{name}": mask for name, mask in zip(weights, published, strict=True)}
    assert mask_formats.from_backward_masks(named, weights) == masks


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m[:2], ValueError, "got 2 masks for 3 weights"),
        (lambda m: [m[0], m[2], m[1]], ValueError, r"mask of 2.weight has shape \(4, 6\), wanted \(6, 6, 3, 3\)"),
        (lambda m: [m[0] * 2.0, m[1], m[2]], ValueError, "mask of 0.weight must be 0 or 1 everywhere, got 2.0"),
        (lambda m: [m[0], m[1], "dense"], TypeError, "mask of 4.weight must be a tensor or None, got str"),
        (lambda m: {"0.weight": m[0], "w": None}, ValueError, r"missing \['2.weight', '4.weight'\], unknown \['w'\]"),
        (lambda m: m[0], TypeError, "masks must be a list of tensors in the order of the weights, got Tensor"),
    ],
)
def test_bad_backward_masks(change: Any, error: type[Exception], message: str) -> None:
    weights = prunable_weights(make_model())
    good = [torch.ones_like(w) for w in weights.values()]
    with pytest.raises(error, match=message):
        mask_formats.from_backward_masks(change(good), weights)
