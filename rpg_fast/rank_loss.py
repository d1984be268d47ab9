"""The rank loss of RPG and its closed-form gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rpg_fast import _ops, filtered
from rpg_fast.grouping import Weights, memory_order, rank_weights, short_side

Method = Literal["auto", "exact", "power"]
NOT_FINITE, LEFT_OUT = 1, 2  # bits of RankState.flags
NO_TAIL = 1e-12  # what a spectrum in float64 leaves of a tail that is zero
Precision = Literal["fp32", "fast"]
Randomness = torch.Generator | Tensor | None


class RankState:
    """What a rank loss keeps between calls on the same weights: where "power" looks for the boundary of each rank, the
    last spectra's ranks and, if they are to be reused, their projectors.

    Pass one to every call of `rank_loss` or `add_rank_grad_` to read them afterwards, for ``method="power"``, and for
    ``refresh_every > 1``. The tensors below stay where they are from call to call, so that a captured CUDA graph goes
    on with the state that it left.

    Attributes (None before the first call; device tensors, reading one's values synchronises):
        ranks: int64 [B], k of each weight, in the order of the weights; -1 where there is none (see flags).
        tail_energies: float64 [B], the energy beyond k as a fraction of the whole; NaN where there is no rank.
        flags: int32 [B]; 1: the weight holds NaN or inf; 2: "power" on a GPU has not found the boundary of its rank,
            and the weight was left out of this call (and of those that reuse it, see `refresh_every`): no loss, no
            gradient. On the CPU nothing is left out.
        windows: float64 [B, 2], where "power" looks for that boundary: centre and half-width, in units of the spectrum
            of W W^T / ||W||_F^2.
        by_eigen: the weights that "power" leaves to eigendecompositions, see `settle`; () lets it try them again.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.shapes: list[tuple[int, ...]] | None = None
        self.ranks: Tensor | None = None
        self.tail_energies: Tensor | None = None
        self.flags: Tensor | None = None
        self.windows: Tensor | None = None
        self.by_eigen: tuple[int, ...] = ()
        # loss, projector, inv_norms, shares; none while every call recomputes them
        self._spectra: tuple[Tensor, ...] | None = None
        self._made_with: tuple[Any, ...] | None = None  # what those depend on beside the values of the weights

    def settle(self) -> list[int]:
        """Reads on the host which weights "power" left out of the last call (flag 2), and leaves them to
        eigendecompositions from the next call on. Returns their indices.

        Most find their boundary by themselves in the next call. Those that cannot have more singular values equal to
        each other at that boundary than a window holds, as an orthogonal matrix has. It synchronises: call it as often
        as you read losses.
        """
        if self.flags is None:
            return []
        lost: list[int] = (self.flags & LEFT_OUT).nonzero().flatten().tolist()  # sync: what this is for
        self.by_eigen = tuple(sorted({*self.by_eigen, *lost}))
        return lost

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next call needs, as tensors of its own and plain values."""
        return {key: _copied(value) for key, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for the state of something else."""
        if not isinstance(state, dict) or set(state) != set(vars(self)):
            got = f"keys {sorted(state)}" if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"not the state of a RankState: got {got}, wanted {sorted(vars(self))}")
        vars(self).update({key: _copied(value) for key, value in state.items()})

    def _keep(self, **tensors: Tensor) -> None:
        """Attributes that are written in place wherever they already are what they should be."""
        for name, tensor in tensors.items():
            kept = getattr(self, name)
            if kept is not None and kept.shape == tensor.shape and kept.device == tensor.device:
                kept.copy_(tensor)
            else:
                setattr(self, name, tensor.clone())

    def _check(self, weights: Sequence[Tensor]) -> None:
        shapes = [tuple(w.shape) for w in weights]
        if self.shapes is not None and shapes != self.shapes:
            raise ValueError(
                f"this RankState belongs to weights of shapes {self.shapes}, got {shapes}: use one state per list"
            )


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value


def rank_loss(
    weights: Weights,
    tail_energy: float | Tensor = 0.1,
    *,
    method: Method = "auto",
    precision: Precision = "fp32",
    state: RankState | None = None,
    refresh_every: int = 1,
    min_sparsity: float = 0.0,
    generator: Randomness = None,
) -> Tensor:
    """The adversarial rank loss of RPG (Zhang et al., NeurIPS 2023): minimising it raises the rank of the weights.

    Every weight W [out, ...] is seen as a matrix [out, rest], Wn = W / ||W||_F. Wn_k is its best approximation of
    rank k, where k leaves the tail energy ||Wn - Wn_k||_F^2 nearest to `tail_energy` (the larger k on a tie). The
    loss is the mean of -||Wn - Wn_k||_F^2 over the active weights: not all-zero, and with at least `min_sparsity` of
    zeros. As published, the norm is differentiated and the singular vectors are not; the gradient is a closed form,
    so no autograd runs through an SVD.

    Args:
        weights: a module (its convolutions, as in the paper), a mapping, or an iterable of tensors [out, ...]; float32,
            float64, bfloat16 or float16, any layout, one device. All are weighted alike.
        tail_energy: the paper's delta, in [0, 1]; a float, or a 0-d tensor, whose value is not checked. 0.1 or 0.2
            in the paper.
        method: "exact": Gram matrix and eigendecomposition. "power": filtered randomised power iteration, which
            needs matrix products only and follows the spectrum from call to call through `state` (without one every
            call searches from scratch, and reads on the host whether it has found everything); to fp32 grade: loss
            within 2e-5, gradient within 3e-4. "auto": see `choose_method`.
        precision: of the last product, the gradient's. "fp32" grade, or "fast": a GPU multiplies in fp16, and the
            gradient's relative error is up to 1e-3. Ranks and loss are the same; so is everything on the CPU.
        state: a `RankState`, filled with ranks and tail energies.
        refresh_every: recompute the spectra at every N-th call with this `state` and reuse them in between: the
            gradient then uses the current weights with the last projectors, the value is the last one. Another option,
            dtype, device or memory format recomputes them at once; another value in a tensor `tail_energy` does not.
        min_sparsity: weights with a smaller fraction of zeros take no part (0: all do).
        generator: source of the sketches of "power", on the weights' device, or their seed itself: an int64 0-d tensor
            there, of which a captured CUDA graph sees what it holds. "exact" draws nothing.

    Returns:
        0-d loss in [-1, 0], float64 if a weight is float64, else float32; differentiable once, in
        reverse mode. 0 with a zero gradient if every weight is all-zero. A weight with NaN or inf makes the loss
        NaN, and its own gradient only.

    Raises:
        ValueError, TypeError: no weights, fewer than two dimensions, no floating-point tensors, several devices, or
            an option out of its range. Calling backward twice through (double backward) raises RuntimeError.

    Equivalent to::

        def loss_of(W):
            Wn = W.flatten(1) / W.norm()
            U, S, Vh = torch.linalg.svd(Wn.detach(), full_matrices=False)
            tails = S.square().flip(0).cumsum(0)
            k = len(S) - 1 - (tails - tail_energy).abs().argmin()
            return -(Wn - U[:, :k] @ S[:k].diag() @ Vh[:k]).square().sum()
        rank_loss = torch.stack([loss_of(W) for W in weights]).mean()
    """
    matrices = rank_weights(weights)
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(w).tangent is not None for w in matrices):
        raise RuntimeError("rank_loss has no forward-mode derivative: use backward, or torch.autograd.grad")
    loss, projector, inv_norms, shares = _spectra(
        matrices, tail_energy, method, precision, state, refresh_every, min_sparsity, generator
    )
    return torch.ops.rpg_fast.rank_attach(matrices, loss, projector, inv_norms, shares, precision == "fast")


@torch.no_grad()
def add_rank_grad_(
    weights: Weights,
    weight: float | Tensor,
    tail_energy: float | Tensor = 0.1,
    *,
    method: Method = "auto",
    precision: Precision = "fp32",
    state: RankState | None = None,
    refresh_every: int = 1,
    min_sparsity: float = 0.0,
    generator: Randomness = None,
) -> Tensor:
    """Adds `weight` times the gradient of `rank_loss` to the `.grad` of every weight in one fused pass, without a
    graph.

    A `.grad` of None becomes the gradient itself. `weight` is a float or a 0-d tensor; all else is as in `rank_loss`.

    A weight that requires no gradient counts in the mean and gets none.

    Returns:
        The detached 0-d loss (not multiplied by `weight`).

    Raises:
        ValueError: besides what `rank_loss` raises, for a weight that is no leaf (it keeps no `.grad`), or if no weight
            requires a gradient.

    Equivalent to: ``(weight * rank_loss(weights, tail_energy)).backward()``
    """
    matrices = _leaves(weights)
    loss, *spectra = _spectra(matrices, tail_energy, method, precision, state, refresh_every, min_sparsity, generator)
    _apply_(matrices, spectra, weight, precision)
    return loss.clone()  # the state may keep the other


@torch.no_grad()
def add_published_rank_grad_(
    weights: Weights,
    weight: float | Tensor,
    tail_energy: float | Tensor,
    *,
    state: RankState,
    method: Method = "auto",
    min_sparsity: float = 0.0,
    generator: Randomness = None,
) -> Tensor:
    """`add_rank_grad_` with the mean of the published program, which divides by the number of weights whose loss is not
    zero: those without a tail count neither above nor below the line. Returns the detached 0-d loss, 0 if none is left.
    """
    matrices = _leaves(weights)
    loss, projector, inv_norms, shares = _spectra(
        matrices, tail_energy, method, "fp32", state, 1, min_sparsity, generator
    )
    tails = state.tail_energies
    assert tails is not None
    counted = (shares != 0) & ~(tails <= NO_TAIL)  # NaN counts
    shares = counted.to(shares.dtype) / counted.sum().clamp(min=1)
    _apply_(matrices, [projector, inv_norms, shares], weight, "fp32")
    return -torch.where(counted, tails * shares, 0.0).sum().to(loss.dtype)


def _leaves(weights: Weights) -> list[Tensor]:
    matrices = rank_weights(weights)
    if not all(w.is_leaf for w in matrices):
        raise ValueError(
            "add_rank_grad_ writes to `.grad`, but a weight is not a leaf: pass the parameters, or use rank_loss"
        )
    if not any(w.requires_grad for w in matrices):
        raise ValueError("add_rank_grad_ writes to `.grad`, but no weight requires a gradient")
    return matrices


def _apply_(matrices: list[Tensor], spectra: list[Tensor], weight: float | Tensor, precision: str) -> None:
    """Adds `weight` times the gradient that [projector, inv_norms, shares] give to `.grad`."""
    scale = _scalar("weight", weight, matrices[0].device)
    trained, spectra = _of_trained(matrices, spectra)
    for w in trained:
        if w.grad is None:
            w.grad = torch.zeros_like(w)
    torch.ops.rpg_fast.rank_apply_([w.grad for w in trained], trained, *spectra, scale, precision == "fast")


def _of_trained(weights: list[Tensor], spectra: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that require a gradient, and of [projector, inv_norms, shares] what is theirs."""
    if all(w.requires_grad for w in weights):
        return weights, spectra
    trained = [w.requires_grad for w in weights]
    sizes = [short_side(w) ** 2 for w in weights]
    parts = [spectra[0].split(sizes), spectra[1].unbind(), spectra[2].unbind()]
    projectors, *scalars = ([x for x, keep in zip(part, trained, strict=True) if keep] for part in parts)
    return [w for w in weights if w.requires_grad], [torch.cat(projectors), *map(torch.stack, scalars)]


def _spectra(
    weights: list[Tensor],
    tail_energy: float | Tensor,
    method: str,
    precision: str,
    state: RankState | None,
    refresh_every: int,
    min_sparsity: float,
    generator: Randomness,
) -> tuple[Tensor, ...]:
    """(loss, projector, inv_norms, shares) of the weights as they are, or the state's while those may be reused."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # a state outlives it
        with torch.inference_mode(False), torch.no_grad():
            return _spectra(weights, tail_energy, method, precision, state, refresh_every, min_sparsity, generator)
    check_options(weights, tail_energy, method, precision, state, refresh_every, min_sparsity, generator)
    layouts = tuple((str(w.dtype), str(w.device), memory_order(w)) for w in weights) if refresh_every > 1 else ()
    made_with = (layouts, method, min_sparsity, None if isinstance(tail_energy, Tensor) else tail_energy)
    if state is not None:
        state._check(weights)
        if state._spectra is not None and state.calls % refresh_every != 0 and state._made_with == made_with:
            state.calls += 1
            return state._spectra
    target = _scalar("tail_energy", tail_energy, weights[0].device)
    matrices = [w.detach() for w in weights]
    double = any(w.dtype == torch.float64 for w in weights)
    chosen, _ = choose_method(method, target.device.type, float64=double, state=state is not None)
    if chosen == "power":
        spectra = _by_power(matrices, target, min_sparsity, state, generator)
    else:
        loss, tails, ranks, inv_norms, shares, projector = torch.ops.rpg_fast.rank_project(
            matrices, target, float(min_sparsity)
        )
        spectra = (loss, projector, inv_norms, shares)
        if state is not None:
            state._keep(ranks=ranks, tail_energies=tails, flags=inv_norms.isnan().int() * NOT_FINITE)
    if state is not None:
        state._spectra, state._made_with = (spectra if refresh_every > 1 else None), made_with
        state.shapes = [tuple(w.shape) for w in weights]
        state.calls += 1
    return spectra


def _by_power(
    weights: list[Tensor],
    target: Tensor,
    min_sparsity: float,
    state: RankState | None,
    generator: Randomness,
) -> tuple[Tensor, ...]:
    device = weights[0].device
    kept = RankState() if state is None else state
    if kept.windows is None:
        windows = torch.zeros(len(weights), 2, dtype=torch.float64, device=device)
        rounds = filtered.COLD_ROUNDS
    else:  # of another device where a state was loaded
        windows, rounds = kept.windows.to(device), filtered.WARM_ROUNDS
    if isinstance(generator, Tensor):
        seed = generator
    else:
        seed = torch.randint(2**62, (), generator=generator, device=device)
    loss, tails, ranks, inv_norms, shares, projector, windows, lost = torch.ops.rpg_fast.rank_filter(
        weights, target, float(min_sparsity), windows, seed, rounds, kept.by_eigen
    )
    flags = inv_norms.isnan().int() * NOT_FINITE + lost.int() * LEFT_OUT
    kept._keep(ranks=ranks, tail_energies=tails, flags=flags, windows=windows)
    if state is None and device.type != "cpu" and kept.settle():
        return _by_power(weights, target, min_sparsity, kept, generator)
    return loss, projector, inv_norms, shares


def choose_method(
    method: str, device: str, *, float64: bool = False, state: bool = True, kernels: bool | None = None
) -> tuple[str, str]:
    """The method that `rank_loss` takes, and why.

    Args:
        method: as asked for; all but "auto" is taken at its word.
        device: its type, "cpu" or "cuda".
        float64: whether a weight is float64. state: whether there is a `RankState`.
        kernels: whether there are kernels of "power" on the device; None looks.
    """
    if method != "auto":
        return method, "as asked"
    if device != "cuda":
        return "exact", "without a GPU, eigendecompositions are faster than the products of power"
    if float64:
        return "exact", "float64 weights, and the kernels of power are of fp32 grade"
    if not state:
        return "exact", "no RankState in which power would keep its windows"
    if not (_ops.has_kernel("rank_filter", "CUDA") if kernels is None else kernels):
        return "exact", "no kernels of power: Triton or the compiled CUDA library is missing"
    return "power", "on a GPU, with a RankState that keeps its windows"


def check_options(
    weights: list[Tensor],
    tail_energy: float | Tensor,
    method: str,
    precision: str,
    state: RankState | None,
    refresh_every: int,
    min_sparsity: float,
    generator: Randomness = None,
) -> None:
    """Raises ValueError or TypeError for what `rank_loss` does not take."""
    if state is not None and not isinstance(state, RankState):
        raise TypeError(f"state must be a RankState, got {type(state).__name__}")
    check_scalar("tail_energy", tail_energy)
    devices = {w.device for w in weights}
    if len(devices) > 1:
        raise ValueError(f"weights must be on one device, got {sorted(map(str, devices))}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if precision not in ("fp32", "fast"):
        raise ValueError(f'precision must be "fp32" or "fast", got {precision!r}')
    if isinstance(refresh_every, bool) or not hasattr(refresh_every, "__index__") or refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1 and whole, got {refresh_every}")
    if refresh_every > 1 and state is None:
        raise ValueError(f"refresh_every={refresh_every} needs state=RankState() to keep the spectra in")
    if not isinstance(min_sparsity, (int, float)) or not 0 <= min_sparsity <= 1:
        raise ValueError(f"min_sparsity must lie in [0, 1], got {min_sparsity!r}")
    if isinstance(generator, Tensor):
        if generator.dtype != torch.int64 or generator.dim() or generator.device not in devices:
            got = f"{generator.dtype} {tuple(generator.shape)} on {generator.device}"
            raise ValueError(f"a seed must be an int64 0-d tensor on {weights[0].device}, got {got}")
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or an int64 0-d tensor, got {type(generator).__name__}")
    if not isinstance(tail_energy, Tensor) and not 0 <= tail_energy <= 1:
        raise ValueError(f"tail_energy must lie in [0, 1], got {tail_energy}")


def check_scalar(name: str, value: float | Tensor) -> None:
    """Raises ValueError or TypeError for what is neither a number nor a tensor with one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a float or a tensor with one element, got shape {tuple(value.shape)}")
    elif not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a 0-d tensor, got {type(value).__name__}")


def _scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """A 0-d float64 tensor on `device`, made there without a copy from the host."""
    check_scalar(name, value)
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device=device, dtype=torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)
