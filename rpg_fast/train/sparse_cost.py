"""What a sparse network would cost to run, were every pruned weight skipped: multiply-adds and parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rpg_fast


@dataclass(frozen=True)
class LayerCost:
    """One weight in one forward pass of one image: it is used at `positions` places of the output."""

    name: str
    size: int
    kept: int
    positions: int

    @property
    def multiply_adds(self) -> int:
        return self.size * self.positions

    @property
    def sparse_multiply_adds(self) -> int:
        return self.kept * self.positions


@dataclass(frozen=True)
class NetworkCost:
    """Sums over the layers. A multiply-add counts as one, as in the published tables (ResNet-50 at 224 pixels: 4.09
    billion); norms, activations and pooling are not counted. `parameters` are all of them, `sparse_parameters` those
    that the masks keep, biases and norms included."""

    layers: tuple[LayerCost, ...]
    image_size: int
    parameters: int
    sparse_parameters: int

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def sparse_multiply_adds(self) -> int:
        return sum(layer.sparse_multiply_adds for layer in self.layers)

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Weights that the forward pass uses in no call of their layer: auxiliary heads, or projections that attention
        reads by itself."""
        return tuple(layer.name for layer in self.layers if layer.positions == 0)


def network_cost(model: nn.Module, masks: Mapping[str, Tensor], *, in_channels: int, image_size: int) -> NetworkCost:
    """Counts by a forward pass of shapes, without arithmetic, on an image [1, in_channels, image_size, image_size].

    Args:
        masks: {name: bool} of the masked weights of convolutions and linear layers; the others count whole.

    Raises:
        RuntimeError: the model does not accept such an image.
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    weights = rpg_fast.prunable_weights(shapes)
    names = {id(weight): name for name, weight in weights.items()}
    positions = dict.fromkeys(weights, 0)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions[names[id(weight)]] += output.numel() // len(weight)

    for module in shapes.modules():
        if id(getattr(module, "weight", None)) in names:
            module.register_forward_hook(count)
    dtype = next(shapes.parameters()).dtype
    with torch.no_grad():
        shapes(torch.empty(1, in_channels, image_size, image_size, device="meta", dtype=dtype))

    kept = {name: int(masks[name].sum()) if name in masks else weight.numel() for name, weight in weights.items()}
    layers = tuple(LayerCost(name, weights[name].numel(), kept[name], positions[name]) for name in weights)
    parameters = sum(math.prod(parameter.shape) for parameter in shapes.parameters())
    pruned = sum(layer.size - layer.kept for layer in layers)
    return NetworkCost(layers, image_size, parameters, parameters - pruned)
