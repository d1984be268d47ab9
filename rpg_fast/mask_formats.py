"""Masks from and for other programs: torch.nn.utils.prune, and the checkpoints of the published RPG code. Bool masks
by name are `PackedMasks.load_` and `PackedMasks.unpack`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from rpg_fast import grouping
from rpg_fast.masks import NamedWeights, PackedMasks


@torch.no_grad()
def from_torch_prune(model: nn.Module) -> PackedMasks:
    """Takes over the masks that torch.nn.utils.prune has put on `model`, and makes them permanent there, so that its
    weights are parameters again: the very `weight_orig`, which an optimizer may hold, zero outside the masks.

    Args:
        model: its pruned tensors may be weights or others, of any kind of module.

    Returns:
        The masks of ``prunable_weights(model)``, all ones where nothing was pruned, and of every other pruned tensor.

    Raises:
        ValueError: nothing in `model` is pruned, a mask that is not 0 or 1 everywhere, or one weight with two different
            masks. `model` is then as it was. TypeError: no module.

    Equivalent to: ``prune.remove(module, "weight")`` for every pruned module, ``module.weight_mask`` kept.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    found: list[tuple[nn.Module, str, str]] = []
    masks: dict[int, Tensor] = {}  # by the id of the parameter
    for module_name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                tensor_name = hook._tensor_name
                name = f"{module_name}.{tensor_name}" if module_name else tensor_name
                mask = _as_bool(name, getattr(module, f"{tensor_name}_mask"))
                other = masks.setdefault(id(getattr(module, f"{tensor_name}_orig")), mask)
                if not torch.equal(mask, other):  # sync: an import
                    raise ValueError(f"{name} is shared and has another mask elsewhere: wanted one mask per tensor")
                found.append((module, tensor_name, name))
    if not found:
        raise ValueError(f"{type(model).__name__} has no masks of torch.nn.utils.prune")
    for module, tensor_name, _ in found:
        prune.remove(module, tensor_name)
    weights: dict[str, Tensor] = dict(grouping.prunable_weights(model))
    known = {id(w) for w in weights.values()}
    for module, tensor_name, name in found:
        tensor = getattr(module, tensor_name)
        if id(tensor) not in known:
            known.add(id(tensor))
            weights[name] = tensor
    return PackedMasks(weights).load_({name: masks.get(id(w), _ones(w)) for name, w in weights.items()})


@torch.no_grad()
def to_torch_prune(masks: PackedMasks, model: nn.Module) -> None:
    """Puts the masks on the modules of `model` that hold the masked parameters, with `prune.CustomFromMask`: each
    becomes `weight_orig` beside a buffer `weight_mask`.

    Raises:
        ValueError: a masked tensor is no parameter of `model`; nothing is changed then. TypeError: no `PackedMasks` or
            no module.
    """
    for got, wanted in ((masks, PackedMasks), (model, nn.Module)):
        if not isinstance(got, wanted):
            raise TypeError(f"to_torch_prune takes PackedMasks and a module, got {type(got).__name__}")
    holders = [
        (index, module, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (index := masks.index_of(parameter)) is not None
    ]
    held = {index for index, _, _ in holders}
    missing = [name for index, name in enumerate(masks.names) if index not in held]
    if missing:
        raise ValueError(f"the model does not hold the masked weights {missing[:5]} ({len(missing)} in all)")
    bools = list(masks.unpack().values())
    for index, module, name in holders:
        prune.custom_from_mask(module, name, bools[index])


def from_backward_masks(
    masks: Sequence[Tensor | None] | Mapping[str, Tensor | None], weights: NamedWeights
) -> PackedMasks:
    """The masks of a checkpoint of the published RPG or RigL code::

        checkpoint = torch.load(path, map_location="cpu")     # weights_only=False where it holds a Namespace
        masks = from_backward_masks(checkpoint["pruner"]["backward_masks"], prunable_weights(model))

    Args:
        masks: bool, or numbers that are 0 or 1, in the shapes of the weights, in their order: that of the model's
            modules. None is a dense layer. Or a mapping by name, where a prefix "module." (of DistributedDataParallel)
            does not count.
        weights: ``{name: Tensor}`` to be masked, in the same order.

    Raises:
        ValueError: another number of masks, missing or unknown names, another shape, or a value that is not 0 or 1.
        TypeError: something that is no mask.
    """
    weights = grouping.named_weights(weights)
    if isinstance(masks, Mapping):
        named = {name.removeprefix("module."): mask for name, mask in masks.items()}
    elif isinstance(masks, (list, tuple)):
        if len(masks) != len(weights):
            raise ValueError(f"got {len(masks)} masks for {len(weights)} weights, wanted one (or None) for each")
        named = dict(zip(weights, masks, strict=True))
    else:
        raise TypeError(f"masks must be a list of tensors in the order of the weights, got {type(masks).__name__}")
    none = torch.empty(0)  # of a name that is unknown, which `load_` tells
    return PackedMasks(weights).load_(
        {name: _ones(weights.get(name, none)) if mask is None else _as_bool(name, mask) for name, mask in named.items()}
    )


def to_backward_masks(masks: PackedMasks) -> list[Tensor]:
    """`backward_masks` as in a checkpoint of the published RPG or RigL code: contiguous bool tensors in the weights'
    shapes and order, on their device."""
    return [mask.contiguous() for mask in masks.unpack().values()]


def _ones(weight: Tensor) -> Tensor:
    return torch.ones_like(weight, dtype=torch.bool)


def _as_bool(name: str, mask: object) -> Tensor:
    """`mask` as bool. Raises TypeError if it is no tensor, ValueError if it has a value other than 0 and 1 (read on the
    host)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask of {name} must be a tensor or None, got {type(mask).__name__}")
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        strange = mask[(mask != 0) & (mask != 1)].flatten()
        got = strange[0].item()  # sync: for the message
        raise ValueError(f"mask of {name} must be 0 or 1 everywhere, got {got} ({len(strange)} such)")
    return mask.bool()
