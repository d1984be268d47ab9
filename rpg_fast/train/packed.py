"""Sparse weights as they lie in files: values with a bit mask, or torch's CSR matrices. Both keep the mask, also where
a weight in it is zero, and every bit of the values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rpg_fast.masks import MaskLayout

Shapes = Mapping[str, Sequence[int]]


def pack(state_dict: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each masked weight NAME with n elements, row-major: `NAME.mask`, uint8 [ceil(n / 8)], element i in bit i % 8
    (the lowest first) of byte i // 8, and `NAME.values` [ones of the mask]. Tensors without a mask as they are.

    Equivalent to: ``numpy.packbits(mask, bitorder="little")`` and ``weight[mask]``
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name in masks:
            mask = masks[name].contiguous()
            bits = MaskLayout.of([mask]).pack([mask])
            packed[f"{name}.mask"] = bits[: math.ceil(mask.numel() / 8)].clone()
            packed[f"{name}.values"] = tensor.contiguous()[mask]
        else:
            packed[name] = tensor.clone(memory_format=torch.contiguous_format)
    return packed


def unpack(tensors: Mapping[str, Tensor], shapes: Shapes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse of `pack`: the state_dict and the masks.

    Args:
        shapes: of the masked weights, by name.

    Raises:
        ValueError: a tensor is missing, or sizes do not agree; it names the weight.
    """
    parts = {f"{name}.{part}" for name in shapes for part in ("mask", "values")}
    state_dict = {name: tensor for name, tensor in tensors.items() if name not in parts}
    masks = {}
    for name, shape in shapes.items():
        missing = [key for key in (f"{name}.mask", f"{name}.values") if key not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        bits, values = tensors[f"{name}.mask"], tensors[f"{name}.values"]
        masks[name] = _unpack_bits(name, bits, shape)
        ones = int(masks[name].sum())
        if values.shape != (ones,):
            raise ValueError(f"{name} has {ones} ones in its mask, but values of shape {tuple(values.shape)}")
        state_dict[name] = values.new_zeros(list(shape)).masked_scatter_(masks[name], values)
    return state_dict, masks


def _unpack_bits(name: str, bits: Tensor, shape: Sequence[int]) -> Tensor:
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (math.ceil(numel / 8),):
        raise ValueError(
            f"{name}.mask is {bits.dtype} of shape {tuple(bits.shape)}, "
            f"wanted {math.ceil(numel / 8)} bytes for a weight of shape {tuple(shape)}"
        )
    layout = MaskLayout((tuple(shape),), (tuple(range(len(shape))),))
    segment = bits.new_zeros(layout.nbytes)
    segment[: len(bits)] = bits
    return layout.unpack(segment)[0]


def to_csr(state_dict: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each masked weight [out, ...] as a CSR matrix [out, rest] with int32 indices; other tensors as they are."""
    return {
        name: _csr_matrix(tensor, masks[name]) if name in masks else tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }


def _csr_matrix(weight: Tensor, mask: Tensor) -> Tensor:
    rows, keep = weight.contiguous().flatten(1), mask.contiguous().flatten(1)  # [out, rest]
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    starts[1:] = keep.sum(1).cumsum(0)
    columns = keep.nonzero()[:, 1].to(torch.int32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, rows[keep], rows.shape, check_invariants=True)


def from_csr(tensors: Mapping[str, Tensor], shapes: Shapes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse of `to_csr`: the state_dict and the masks.

    Args:
        shapes: of the masked weights, by name.

    Raises:
        ValueError: a weight is missing, no valid CSR matrix, or of another size; it names the weight.
    """
    state_dict, masks = dict(tensors), {}
    for name, shape in shapes.items():
        matrix = tensors.get(name)
        if matrix is None:
            raise ValueError(f"{name} is missing")
        wanted = (shape[0], math.prod(shape[1:]))
        if matrix.layout != torch.sparse_csr or matrix.shape != wanted:
            raise ValueError(f"{name} is {matrix.layout} of shape {tuple(matrix.shape)}, wanted CSR {wanted}")
        starts, columns, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
        try:
            torch.sparse_csr_tensor(starts, columns, values, wanted, check_invariants=True)
        except RuntimeError as error:
            raise ValueError(f"{name} is no valid CSR matrix: {str(error).splitlines()[0]}") from error
        rows = torch.repeat_interleave(torch.arange(wanted[0]), starts.diff().long())
        keep = torch.zeros(wanted, dtype=torch.bool)
        keep[rows, columns.long()] = True
        masks[name] = keep.view(list(shape))
        state_dict[name] = values.new_zeros(wanted).masked_scatter_(keep, values).view(list(shape))
    return state_dict, masks
