"""Masks with one bit per weight, and the selections that make them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rpg_fast import _ops as _ops  # registers the ops
from rpg_fast import grouping, reference

SEGMENT_BYTES = 128  # every weight's bits start at a multiple: 1024 weights, one block's work, aligned for vector loads

NamedWeights = Mapping[str, Tensor]


@dataclass(frozen=True)
class MaskLayout:
    """Where the bits of each weight lie in the one buffer: a segment per weight, its bits in the weight's memory
    order."""

    shapes: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[int, ...], ...]  # dimensions from slowest to fastest in memory
    numels: list[int] = field(init=False, compare=False)
    offsets: list[int] = field(init=False, compare=False)  # first byte of each segment
    nbytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        numels = [math.prod(shape) for shape in self.shapes]
        offsets, end = [], 0
        for numel in numels:
            offsets.append(end)
            end += -(-numel // (8 * SEGMENT_BYTES)) * SEGMENT_BYTES
        object.__setattr__(self, "numels", numels)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "nbytes", end)

    @classmethod
    def of(cls, weights: Iterable[Tensor]) -> MaskLayout:
        weights = list(weights)
        return cls(tuple(tuple(w.shape) for w in weights), tuple(grouping.memory_order(w) for w in weights))

    def views(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """One tensor per weight, in its shape, as views whose row-major order is the order of the bits."""
        return [grouping.as_it_lies(t, order) for t, order in zip(tensors, self.orders, strict=True)]

    def pack(self, masks: Iterable[Tensor]) -> Tensor:
        """Bool masks in the weights' shapes -> bits [nbytes]."""
        return torch.ops.rpg_fast.pack(self.views(masks), self.offsets, self.nbytes)

    def unpack(self, bits: Tensor) -> list[Tensor]:
        """bits [nbytes] -> bool masks in the weights' shapes."""
        return self._shaped(torch.ops.rpg_fast.unpack(bits, self.offsets, self.numels))

    def split(self, flat: Tensor) -> list[Tensor]:
        """flat [sum of numels], weight after weight in memory order -> views in the weights' shapes."""
        return self._shaped(flat.split(self.numels))

    def _shaped(self, segments: Iterable[Tensor]) -> list[Tensor]:
        shaped = []
        for segment, shape, order in zip(segments, self.shapes, self.orders, strict=True):
            inverse = sorted(range(len(order)), key=order.__getitem__)
            shaped.append(segment.view([shape[d] for d in order]).permute(inverse))
        return shaped

    def popcount(self, bits: Tensor) -> Tensor:
        """Ones per weight, int64 [B]."""
        return torch.ops.rpg_fast.popcount(bits, self.offsets, self.numels)

    def select(
        self,
        scores: Iterable[Tensor],
        counts: Tensor,
        *,
        eligible: Tensor | None = None,
        absolute: bool = False,
        per_tensor: bool = True,
    ) -> Tensor:
        """The bits [nbytes] of the `counts` best eligible scores, per weight or over all (see
        `reference.select_topk`)."""
        views = self.views(scores)
        if not per_tensor and len({v.dtype for v in views}) > 1:
            common = reference.accumulation_dtype(views)
            views = [v.to(common) for v in views]
        return torch.ops.rpg_fast.select_topk(views, counts, self.offsets, self.nbytes, eligible, absolute, per_tensor)


class PackedMasks:
    """One bit per weight for an ordered ``{name: Tensor}``, in one buffer, as the weights lie in memory; all ones at
    first. The tensors are kept, so that optimizers find the mask of a parameter. Weights that change their memory
    format later keep their masks; the bits stay in the order of the time when they were packed, which costs speed.

    ``a == b`` tells whether names, order of names, shapes and every mask are equal, whatever the memory formats: a 0-d
    bool tensor on `a`'s device, so that nothing waits until it is read: ``if a == b`` is one read; ``a != b`` reads,
    and is a bool. Masks are mutable and have no `hash`; `digest` identifies their content.

    Args:
        weights: the masked tensors by name, of any layout, on one device.

    Attributes:
        bits: uint8 [nbytes], segments as `layout` says.
        weights, layout: the tensors by name; their `MaskLayout`.

    Raises:
        ValueError: no weights, weights on several devices, or one weight under several names. TypeError: no mapping
            from names to tensors.
    """

    def __init__(self, weights: NamedWeights):
        weights = grouping.named_weights(weights)
        if not weights:
            raise ValueError("PackedMasks got no weights: wanted at least one named tensor")
        devices = {w.device for w in weights.values()}
        if len(devices) > 1:
            raise ValueError(f"weights must be on one device, got {sorted(map(str, devices))}")
        self.weights = weights
        self._index = self._positions()
        if len(self._index) < len(self.weights):
            counts = Counter(map(id, self.weights.values()))
            shared = [name for name, w in self.weights.items() if counts[id(w)] > 1]
            raise ValueError(f"the same tensor under several names: {shared}")
        self.layout = MaskLayout.of(self.weights.values())
        self.bits = self.layout.pack(torch.ones_like(w, dtype=torch.bool) for w in self.weights.values())

    def _positions(self) -> dict[int, int]:
        return {id(w): i for i, w in enumerate(self.weights.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._index = self._positions()  # a copy holds other tensors

    def __repr__(self) -> str:
        return f"PackedMasks({len(self.weights)} weights, {sum(self.layout.numels):,} bits on {self.bits.device})"

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        if not isinstance(other, PackedMasks):
            return NotImplemented
        if self.names != other.names or self.layout.shapes != other.layout.shapes:
            return torch.zeros((), dtype=torch.bool, device=self.bits.device)
        return (self.bits == other._bits_in(self.layout.orders).to(self.bits.device)).all()

    __hash__ = None  # type: ignore[assignment]

    def _bits_in(self, orders: tuple[tuple[int, ...], ...]) -> Tensor:
        """The bits [nbytes], packed anew where weights lie in other memory orders than `orders`."""
        if orders == self.layout.orders:
            return self.bits
        return MaskLayout(self.layout.shapes, orders).pack(self.layout.unpack(self.bits))

    def digest(self) -> str:
        """SHA-256 of names, shapes and masks as 64 hexadecimal digits: the same on every device, in every process and
        run, and for every memory format. Copies the bits to the host, which waits for the device.

        Equivalent to: sha256 of ``json.dumps([names, shapes])`` in UTF-8 and the bits of contiguous weights.
        """
        row_major = tuple(tuple(range(len(shape))) for shape in self.layout.shapes)
        content = hashlib.sha256(json.dumps([self.names, self.layout.shapes]).encode())
        bits = self._bits_in(row_major).cpu()  # sync: as documented
        content.update(ctypes.string_at(bits.data_ptr(), bits.numel()))
        return content.hexdigest()

    def to(self, device: torch.device | str) -> PackedMasks:
        """Moves the bits, in place, to where ``model.to(device)`` has moved the weights. Returns itself.

        Raises:
            ValueError: a weight is on another device.
        """
        bits = self.bits.to(device)
        elsewhere = {name: str(w.device) for name, w in self.weights.items() if w.device != bits.device}
        if elsewhere:
            name, at = next(iter(elsewhere.items()))
            raise ValueError(f"masks lie beside their weights: {name} is on {at}, wanted {bits.device}; move it first")
        self.bits = bits
        return self

    def broadcast_(self, src: int = 0, process_group: dist.ProcessGroup | None = None) -> PackedMasks:
        """Takes over the masks of rank `src` of the group (default: all ranks) by one collective of the whole buffer.
        Every rank must call it, on weights of the same names, shapes and memory formats. Returns itself.

        Raises:
            RuntimeError: torch.distributed is not initialised.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("broadcast_ needs torch.distributed: call init_process_group first")
        dist.broadcast(self.bits, group=process_group, group_src=src)
        return self

    @property
    def names(self) -> list[str]:
        """The names of the weights, in order (a property)."""
        return list(self.weights)

    def index_of(self, weight: Tensor) -> int | None:
        """The position of `weight` (the very tensor) among the masked ones, None if it has no mask."""
        return self._index.get(id(weight))

    def load_(self, masks: NamedWeights) -> PackedMasks:
        """Takes over bool masks of the weights' names and shapes, from any device.

        Raises:
            ValueError: missing or unknown names, another shape. TypeError: a mask that is not bool.
        """
        missing, unknown = sorted(self.weights.keys() - masks.keys()), sorted(masks.keys() - self.weights.keys())
        if missing or unknown:
            raise ValueError(f"masks must name exactly the weights: missing {missing}, unknown {unknown}")
        for name, weight in self.weights.items():
            if masks[name].dtype != torch.bool:
                raise TypeError(f"mask of {name} must be bool, got {masks[name].dtype}")
            if masks[name].shape != weight.shape:
                raise ValueError(f"mask of {name} has shape {tuple(masks[name].shape)}, wanted {tuple(weight.shape)}")
        self.bits.copy_(self.layout.pack(masks[name].to(self.bits.device) for name in self.weights))
        return self

    def unpack(self) -> dict[str, Tensor]:
        """{name: bool mask in the weight's shape}."""
        return dict(zip(self.weights, self.layout.unpack(self.bits), strict=True))

    def count(self) -> Tensor:
        """Ones per weight, int64 [B] on the device."""
        return self.layout.popcount(self.bits)

    def state_dict(self) -> dict[str, Any]:
        """The packed bits with what is needed to read them: names, shapes and memory orders."""
        layout = self.layout
        return {
            "bits": self.bits.clone(),
            "names": self.names,
            "shapes": list(layout.shapes),
            "orders": list(layout.orders),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, also where the weights now lie in another memory format.

        Raises:
            ValueError: other names or shapes, or a buffer of another size.
        """
        missing = {"bits", "names", "shapes", "orders"} - state.keys()
        if missing:
            raise ValueError(f"not the state of PackedMasks: {sorted(missing)} missing")
        saved = MaskLayout(tuple(map(tuple, state["shapes"])), tuple(map(tuple, state["orders"])))
        theirs = dict(zip(state["names"], saved.shapes, strict=True))
        mine = dict(zip(self.names, self.layout.shapes, strict=True))
        if theirs != mine:
            differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise ValueError(f"the saved masks belong to other weights: {len(differing)} differ, first {differing[:3]}")
        if state["bits"].numel() != saved.nbytes:
            raise ValueError(f"the saved masks hold {state['bits'].numel()} bytes, wanted {saved.nbytes}")
        masks = saved.unpack(state["bits"].to(self.bits.device))
        self.load_(dict(zip(state["names"], masks, strict=True)))


@torch.no_grad()
def mask_gradients_(params: Iterable[Tensor], masks: PackedMasks, *, scale: float | Tensor | None = None) -> None:
    """Masked gradient application: every `.grad` becomes ``scale * grad`` where its mask is one, 0 elsewhere (also
    where it was NaN or inf). Parameters without a mask are only scaled, those without a gradient skipped.

    Args:
        params: parameters of any layout; those that `masks` holds are masked.
        scale: a float or a 0-d tensor, e.g. 1 / loss scale.

    Equivalent to: ``for p in params: p.grad = torch.where(mask[p], p.grad * scale, 0)``
    """
    if not isinstance(masks, PackedMasks):
        raise TypeError(f"masks must be PackedMasks, got {type(masks).__name__}")
    with_grad = [(p, p.grad) for p in params if p.grad is not None]
    masked = [(masks.index_of(p), p, g) for p, g in with_grad]
    if scale is None:
        masked = [entry for entry in masked if entry[0] is not None]
    if not masked:
        return
    views, offsets = [], []
    for index, p, g in masked:
        if g.layout != torch.strided:
            raise TypeError(f"gradients must be dense, got {g.layout} for a parameter of shape {tuple(p.shape)}")
        views.append(grouping.as_it_lies(g, grouping.memory_order(p) if index is None else masks.layout.orders[index]))
        offsets.append(-1 if index is None else masks.layout.offsets[index])
    if scale is not None and not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float64)
    torch.ops.rpg_fast.mask_(views, masks.bits, offsets, scale)


# ------------------------------------------------------------ one mask at a time


def kept_count(numel: int, sparsity: float) -> int:
    """Ones of a mask of `numel` weights: numel - floor(sparsity * numel + 0.5)."""
    return numel - math.floor(sparsity * numel + 0.5)


def topk_mask(scores: Tensor, sparsity: float | Tensor) -> Tensor:
    """The bool mask of the best scores, with exactly floor(sparsity * n + 0.5) zeros.

    Args:
        scores: any shape and real floating-point dtype; the larger the better, NaN above all. Ties go to the lower
            index in memory order (row-major for a contiguous tensor).
        sparsity: fraction of zeros in [0, 1], a float, or a 0-d tensor, whose value is not checked.

    Raises:
        ValueError: sparsity outside [0, 1]. TypeError: scores that are no floating-point tensor.

    Equivalent to: ``mask.view(-1)[scores.view(-1).argsort(descending=True, stable=True)[:n_kept]] = True``
    """
    _check_scores("scores", scores)
    n = scores.numel()
    if isinstance(sparsity, Tensor):
        counts = n - (sparsity.detach().to(scores.device).double() * n + 0.5).floor().long().reshape(1)
    else:
        check_fraction("sparsity", sparsity)
        counts = torch.full((1,), kept_count(n, sparsity), device=scores.device)
    layout = MaskLayout.of([scores])
    return layout.unpack(layout.select([scores.detach()], counts))[0]


def prune_and_grow(mask: Tensor, drop_scores: Tensor, grow_scores: Tensor, *, drop_fraction: float) -> Tensor:
    """RigL's update of one mask (Evci et al., ICML 2020): of `active` ones, n_grow = floor(drop_fraction * active)
    are dropped and as many grown, so the count does not change.

    Args:
        mask: bool, any shape.
        drop_scores: the active - n_grow best active ones stay (RigL: |weight|).
        grow_scores: the n_grow best of all that do not stay are grown (RigL: |gradient|); a dropped one may come back.
        drop_fraction: in [0, 1].

    Returns:
        The new bool mask. Ties go to the lower index in the memory order of `mask`, NaN ranks above all.

    Raises:
        ValueError: shapes that differ, drop_fraction outside [0, 1]. TypeError: wrong dtypes.
    """
    check_fraction("drop_fraction", drop_fraction)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    for name, scores in (("drop_scores", drop_scores), ("grow_scores", grow_scores)):
        _check_scores(name, scores)
        if scores.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(scores.shape)}, wanted the mask's {tuple(mask.shape)}")
    layout = MaskLayout.of([mask])
    kept, grown = drop_and_grow(
        layout, layout.pack([mask]), [drop_scores.detach()], [grow_scores.detach()], drop_fraction
    )
    return layout.unpack(kept | grown)[0]


def drop_and_grow(
    layout: MaskLayout,
    bits: Tensor,
    drop_scores: Sequence[Tensor],
    grow_scores: Sequence[Tensor],
    drop_fraction: float | Tensor,
    *,
    absolute: bool = False,
) -> tuple[Tensor, Tensor]:
    """`prune_and_grow` for all weights of a layout at once: the bits that stay and the bits that are grown, disjoint.
    A mask of ones all stays: dropping would only grow the same weights again."""
    active, inactive = layout.popcount(bits), layout.popcount(~bits)  # [B]
    n_grow = torch.where(inactive > 0, (active.double() * drop_fraction).floor().long(), 0)
    kept = layout.select(drop_scores, active - n_grow, eligible=bits, absolute=absolute)
    grown = layout.select(grow_scores, n_grow, eligible=~kept, absolute=absolute)
    return kept, grown


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError for a `value` outside [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _check_scores(name: str, scores: Tensor) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{name} must be a real floating-point tensor, got {got}")
