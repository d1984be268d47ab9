"""SGD and AdamW whose step masks gradient, state and weight in the same pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from rpg_fast import grouping, reference
from rpg_fast.masks import NamedWeights, PackedMasks

MIXING_OPTIMIZERS = ("LBFGS", "Muon")


class _MaskedOptimizer(torch.optim.Optimizer):
    """What both share: the masks, GradScaler's protocol, and one op call per group of parameters that step alike."""

    _step_supports_amp_scaling = (
        True  # GradScaler sets grad_scale and found_inf and leaves unscaling and skipping to the step
    )

    def __init__(self, params: ParamsT, defaults: dict[str, Any], masks: PackedMasks | None):
        super().__init__(params, defaults)
        self.masks = masks
        if masks is not None:
            self.set_masks(masks)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "masks": self.masks}  # torch's has no place for more: copies would lack them

    def set_masks(self, masks: PackedMasks | None) -> None:
        """Masks the parameters that `masks` holds from the next step on; None masks nothing.

        Raises:
            ValueError: `masks` holds a tensor that is no parameter of this optimizer (its mask would have no effect).
            TypeError: no `PackedMasks`.
        """
        if masks is not None:
            if not isinstance(masks, PackedMasks):
                raise TypeError(f"masks must be PackedMasks, got {type(masks).__name__}")
            mine = {id(p) for group in self.param_groups for p in group["params"]}
            foreign = [name for name, weight in masks.weights.items() if id(weight) not in mine]
            if foreign:
                raise ValueError(
                    f"the optimizer does not hold the masked weights {foreign[:5]} ({len(foreign)} in all)"
                )
        self.masks = masks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; with a `closure`, it is called first (with gradients enabled) and its loss returned.

        Raises:
            TypeError: a sparse gradient. RuntimeError: the first step of a parameter with state, in a CUDA graph.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.device, bool], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise TypeError(
                        f"gradients must be dense, got {p.grad.layout} for a parameter of shape {tuple(p.shape)}"
                    )
                alike.setdefault((p.device, self._is_fresh(p)), []).append(p)
            for (_, first_step), params in alike.items():
                self._update(group, params, first_step)
        return loss

    @abstractmethod
    def _is_fresh(self, p: Tensor) -> bool:
        """Whether `p` has not been stepped yet."""

    @abstractmethod
    def _update(self, group: dict[str, Any], params: list[Tensor], first_step: bool) -> None:
        """One step of parameters on one device that are all fresh or all not."""

    def _new_state(self, p: Tensor) -> Tensor:
        """Zeros in the parameter's layout, float32 for 16-bit parameters. They outlive a graph, which would zero them
        again with every replay."""
        if p.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the first step of a parameter of shape {tuple(p.shape)} is captured in a CUDA graph: step once "
                "before, to make its state"
            )
        return torch.zeros_like(p, dtype=reference.accumulation_dtype([p]))

    def _bits(self, params: list[Tensor]) -> tuple[Tensor | None, list[int], list[tuple[int, ...]]]:
        """The mask buffer, and each parameter's first byte in it (-1: no mask) and memory order."""
        if self.masks is None:
            return None, [-1] * len(params), [grouping.memory_order(p) for p in params]
        offsets, orders = [], []
        for p in params:
            index = self.masks.index_of(p)
            offsets.append(-1 if index is None else self.masks.layout.offsets[index])
            orders.append(grouping.memory_order(p) if index is None else self.masks.layout.orders[index])
        return self.masks.bits, offsets, orders

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the float32 state of 16-bit parameters stays float32."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for saved_id, p in zip(saved_ids, params, strict=True):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if key == "step":
                    self.state[p][key] = torch.as_tensor(value).to(device=p.device, dtype=torch.float32, copy=True)
                elif isinstance(value, Tensor):
                    self.state[p][key] = self._new_state(p).copy_(value)


def _as_they_lie(tensors: Iterable[Tensor], orders: list[tuple[int, ...]]) -> list[Tensor]:
    return [grouping.as_it_lies(t, order) for t, order in zip(tensors, orders, strict=True)]


def _lr(lr: float | Tensor) -> Tensor:
    """A 0-d tensor: on the host for a number, as it is for a tensor (live in a captured graph)."""
    return lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)


def _check_not_negative(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


class MaskedSGD(_MaskedOptimizer):
    """torch.optim.SGD that masks gradient, momentum and weight in its one pass: a pruned weight is exactly zero
    after every step, and so is its momentum.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD; `lr` may be a 0-d
            tensor.
        masks: the `PackedMasks` of some of the parameters; `set_masks` changes them.

    float32, float64, bfloat16 and float16 parameters; 16-bit ones step in float32 and keep a float32 momentum. With
    a GradScaler, unscaling and skipping happen inside the step, without a host synchronisation (beside a `RankPruner`,
    unscale before its step, as it shows); with dampening, a first step that is skipped leaves a zero momentum behind
    where torch would leave none.

    A step can be captured in a CUDA graph (no `capturable` has to be asked for) once one has been taken before, which
    makes the state. In the graph `lr` is live as a tensor on the parameters' device; all other options are constants.

    Equivalent to::

        for p in params: p.grad = torch.where(mask[p], p.grad, 0)
        torch.optim.SGD.step(self)                     # then, again, of weight and momentum:
        for p in params: p[~mask[p]] = 0; self.state[p]["momentum_buffer"][~mask[p]] = 0
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        masks: PackedMasks | None = None,
    ):
        _check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov needs momentum > 0 and dampening = 0, got {momentum} and {dampening}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, masks)

    def _is_fresh(self, p: Tensor) -> bool:
        return self.state[p].get("momentum_buffer") is None

    def _update(self, group: dict[str, Any], params: list[Tensor], first_step: bool) -> None:
        buffers: list[Tensor] = []
        if group["momentum"] != 0:
            for p in params:
                if first_step:
                    self.state[p]["momentum_buffer"] = self._new_state(p)
                buffers.append(self.state[p]["momentum_buffer"])
        bits, offsets, orders = self._bits(params)
        torch.ops.rpg_fast.masked_sgd_(
            _as_they_lie(params, orders),
            _as_they_lie((p.grad for p in params if p.grad is not None), orders),
            _as_they_lie(buffers, orders) if buffers else [],
            bits,
            offsets,
            _lr(group["lr"]),
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
            first_step,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )


class MaskedAdamW(_MaskedOptimizer):
    """torch.optim.AdamW that masks gradient, moments and weight in its one pass: a pruned weight is exactly zero
    after every step, and so are its moments.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW; `lr` may be a 0-d tensor.
        masks: the `PackedMasks` of some of the parameters; `set_masks` changes them.

    Dtypes, GradScaler and CUDA graphs as in `MaskedSGD`. The step counts are tensors on the parameters' device, live in
    a graph.

    Equivalent to: torch.optim.AdamW between the maskings that `MaskedSGD` shows, of `exp_avg` and `exp_avg_sq` as well.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        masks: PackedMasks | None = None,
    ):
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults, masks)

    def _is_fresh(self, p: Tensor) -> bool:
        return "step" not in self.state[p]

    def _update(self, group: dict[str, Any], params: list[Tensor], first_step: bool) -> None:
        if first_step:
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
            for p in params:
                moments = {name: self._new_state(p) for name in names}
                self.state[p].update(step=torch.zeros((), dtype=torch.float32, device=p.device), **moments)
        states = [self.state[p] for p in params]
        maxima = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
        bits, offsets, orders = self._bits(params)
        torch.ops.rpg_fast.masked_adamw_(
            _as_they_lie(params, orders),
            _as_they_lie((p.grad for p in params if p.grad is not None), orders),
            _as_they_lie((state["exp_avg"] for state in states), orders),
            _as_they_lie((state["exp_avg_sq"] for state in states), orders),
            _as_they_lie(maxima, orders) if maxima else [],
            [state["step"] for state in states],
            bits,
            offsets,
            _lr(group["lr"]),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["amsgrad"],
            group["maximize"],
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )


def check_optimizer(optimizer: torch.optim.Optimizer, weights: NamedWeights) -> None:
    """Raises TypeError or ValueError for an optimizer that a pruner of `weights` cannot work beside."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if any(kind.__name__ in MIXING_OPTIMIZERS for kind in type(optimizer).__mro__):
        name = type(optimizer).__name__
        raise TypeError(
            f"{name} mixes the elements of a weight, so pruned ones would come back: take another optimizer"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, w in weights.items() if id(w) not in held]
    if missing:
        raise ValueError(f"the optimizer does not hold the pruned weights {missing[:5]} ({len(missing)} in all)")
    masks = optimizer.masks if isinstance(optimizer, (MaskedSGD, MaskedAdamW)) else None
    mine = {id(w) for w in weights.values()}
    others = [name for name, w in masks.weights.items() if id(w) in held - mine] if masks is not None else []
    if others:
        raise ValueError(
            f"the optimizer already masks {others[:5]} ({len(others)} in all), which this pruner does not prune: a "
            "masked optimizer takes one pruner, of all its pruned weights (or set_masks(None) before)"
        )
