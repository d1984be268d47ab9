"""Weights of any shape and layout, seen as matrices, as flat memory, and as groups of equal short side. Views, never
copies, wherever the layout allows one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

Selector = str | type | Callable[[str, nn.Module], bool]
Weights = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable_weights(
    model: nn.Module,
    *,
    include: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
    exclude: Sequence[Selector] | Selector = (),
) -> dict[str, nn.Parameter]:
    """The weights of `model` that may be pruned, as an ordered ``{qualified name: Parameter}``; a shared weight
    appears once, under its first name, and is excluded if any of its names is. What is not the `weight` of a layer is
    not among them: add the queries, keys and values of nn.MultiheadAttention by name, ``weights |
    {"attention.in_proj_weight": model.attention.in_proj_weight}``.

    Args:
        include: module types whose `weight` is taken.
        exclude: one or several of: a regular expression (searched in the qualified weight name, e.g. ``"^fc"``), a
            module type, or a predicate ``(module name, module) -> bool``.

    Raises:
        ValueError: an `exclude` entry matches nothing (a misspelt name would otherwise be pruned in silence), or a
            weight that is not excluded is computed by a parametrization or by torch.nn.utils.prune.
        TypeError: an `exclude` entry is none of the three kinds.

    Equivalent to: ``{f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, include)}``
    """
    one = isinstance(exclude, (str, type)) or callable(exclude) or not isinstance(exclude, Iterable)
    selectors: list[Selector] = [exclude] if one else list(exclude)  # type: ignore[arg-type, list-item]
    for selector in selectors:
        if not (isinstance(selector, (str, type)) or callable(selector)):
            raise TypeError(f"exclude takes regular expressions, module types or predicates, got {selector!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    used = [False] * len(selectors)
    excluded: set[int] = set()
    chosen: dict[int, tuple[str, nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, include) or not isinstance(weight, Tensor):
            continue
        name = f"{module_name}.weight" if module_name else "weight"
        hits = [_matches(selector, name, module_name, module) for selector in selectors]
        used = [was or hit for was, hit in zip(used, hits, strict=True)]
        if any(hits):
            excluded.add(id(weight))
        elif not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"{name} is computed from other parameters (a parametrization?), not a Parameter: exclude it"
            )
        else:
            chosen.setdefault(id(weight), (name, weight))
    kept = {name: weight for name, weight in chosen.values() if id(weight) not in excluded}
    unused = [selector for selector, was in zip(selectors, used, strict=True) if not was]
    if unused:
        raise ValueError(f"exclude matched no prunable weight: {unused}; there are {list(kept)}")
    return kept


def _matches(selector: Selector, weight_name: str, module_name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return re.search(selector, weight_name) is not None
    if isinstance(selector, type):
        return isinstance(module, selector)
    return bool(selector(module_name, module))


def named_weights(weights: object, argument: str = "weights") -> dict[str, Tensor]:
    """`weights` as a dictionary of its own. Raises TypeError if it is no mapping from names to tensors, which names the
    `argument`."""
    if not isinstance(weights, Mapping):
        hint = ": pass prunable_weights(model)" if isinstance(weights, nn.Module) else ""
        raise TypeError(f"{argument} must be a mapping {{name: tensor}}, got {type(weights).__name__}{hint}")
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            raise TypeError(f"{argument} must be a mapping {{name: tensor}}, got {type(weight).__name__} for {name!r}")
    return dict(weights)


def rank_weights(weights: Weights) -> list[Tensor]:
    """The matrices of a rank loss, as a list of tensors [out, ...]: the convolutions of a module (as in the paper), the
    values of a mapping, or the tensors of an iterable.

    Raises:
        ValueError: no weight at all, or one with fewer than two dimensions.
        TypeError: something that is no real floating-point tensor.
    """
    if isinstance(weights, Tensor) or not isinstance(weights, (nn.Module, Mapping, Iterable)):
        got = "one tensor: wrap it in a list" if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a module, a mapping or an iterable of tensors, got {got}")
    if isinstance(weights, nn.Module):
        named: dict[str, Tensor] = dict(prunable_weights(weights, include=CONVOLUTIONS))
        if not named:
            raise ValueError(
                f"{type(weights).__name__} has no convolution; pass the weights themselves to include others"
            )
    elif isinstance(weights, Mapping):
        named = dict(weights)
    else:
        named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    if not named:
        raise ValueError("got no weights: wanted at least one tensor [out, ...]")
    for name, weight in named.items():
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, got {_describe(weight)}")
        if weight.dim() < 2:
            raise ValueError(
                f"{name} must have at least two dimensions [out, ...], got shape {tuple(weight.shape)}: "
                "pass the module or prunable_weights(module) to leave biases and norms out"
            )
    return list(named.values())


def _describe(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of `tensor` from the slowest to the fastest in memory; the identity for a contiguous tensor,
    (0, 2, 3, 1) for a channels_last one. Dimensions of size one keep their place beside the dimension that follows
    them."""
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    strides = list(tensor.stride())
    for d in reversed(range(tensor.dim())):
        if tensor.shape[d] == 1:
            strides[d] = strides[d + 1] * tensor.shape[d + 1] if d + 1 < tensor.dim() else 1
    return tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))


def as_it_lies(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """A view of `tensor` whose row-major order is the memory order `order` of another tensor of the same shape."""
    return tensor if order == tuple(range(len(order))) else tensor.permute(order)


def matrix_view(weight: Tensor) -> Tensor:
    """`weight` [out, ...] as a matrix [out, rest], its columns in the order in which they lie in memory (a
    permutation of the columns changes neither X X^T nor the singular values). A view where one exists: contiguous,
    channels_last, sliced."""
    if weight.dim() == 2:
        return weight
    order = [d for d in memory_order(weight) if d != 0]
    return weight.permute(0, *order).flatten(1)  # [out, rest]


def column_order_inverse(weight: Tensor) -> tuple[int, ...]:
    """The permutation that undoes the one of `matrix_view`, for a matrix unflattened to the permuted shape."""
    order = [0, *(d for d in memory_order(weight) if d != 0)]
    inverse = [0] * len(order)
    for position, d in enumerate(order):
        inverse[d] = position
    return tuple(inverse)


def from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `matrix_view`: [out, rest] back to the shape of `weight`."""
    if weight.dim() == 2:
        return matrix
    order = [d for d in memory_order(weight) if d != 0]
    permuted_shape = [weight.shape[0], *(weight.shape[d] for d in order)]
    return matrix.reshape(permuted_shape).permute(column_order_inverse(weight))


def short_side(weight: Tensor) -> int:
    """m of a weight [out, ...] seen as the matrix [out, rest]: min(out, rest)."""
    rest = 1
    for size in weight.shape[1:]:
        rest *= size
    return min(weight.shape[0], rest)


def short_side_first(weight: Tensor) -> Tensor:
    """`weight` as the matrix X [m, n] with m <= n; a view wherever `matrix_view` is one."""
    matrix = matrix_view(weight)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def groups_of_equal_m(weights: Sequence[Tensor]) -> dict[int, list[int]]:
    """{m: indices of the weights with short side m}, smallest m first; empty weights (m = 0) belong to no group."""
    groups: dict[int, list[int]] = {}
    for index, weight in enumerate(weights):
        m = short_side(weight)
        if m > 0:
            groups.setdefault(m, []).append(index)
    return dict(sorted(groups.items()))


def projector_offsets(weights: Sequence[Tensor]) -> list[int]:
    """Where each m x m projector starts in the flat workspace, in elements; the last entry is the workspace's
    length."""
    offsets = [0]
    for weight in weights:
        offsets.append(offsets[-1] + short_side(weight) ** 2)
    return offsets
