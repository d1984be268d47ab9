"""RankPruner: gradual prune-and-grow training with the rank loss, beside any loop and optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rpg_fast import grouping
from rpg_fast.criteria import Criterion, Momentum, check_scores, make_criterion
from rpg_fast.masks import PackedMasks, mask_gradients_
from rpg_fast.optim import MaskedAdamW, MaskedSGD, check_optimizer
from rpg_fast.rank_loss import (
    LEFT_OUT,
    RankState,
    add_published_rank_grad_,
    add_rank_grad_,
    check_options,
    check_scalar,
)
from rpg_fast.schedules import ConstantSparsity, Schedule, make_schedule
from rpg_fast.stats import PruneStats
from rpg_fast.topology import GradientMean, make_topology


class RankPruner:
    """Gradual pruning with regrowth (RigL) steered by the adversarial rank loss (RPG, Zhang et al., NeurIPS 2023)::

        pruner = RankPruner(model, optimizer, sparsity=0.98, total_steps=len(loader) * epochs, rank_weight=4.0)
        for x, y in loader:
            criterion(model(x), y).backward()     # any number of micro-batches
            if pruner.step():                     # False on a topology step: the optimizer is not stepped then
                optimizer.step()
            optimizer.zero_grad()
        pruner.finalize()                         # the exact sparsity

        # With a GradScaler, unscale first: the rank gradient is added to true gradients.
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if pruner.step():
            scaler.step(optimizer)
        scaler.update()

    A topology update prunes to the schedule's sparsity by magnitude, then drops the smallest weights and grows as
    many where the gradient (of the loss, plus `rank_weight` times the rank loss) is largest. Grown weights start at
    zero with zero optimizer state, dropped ones that grow again too. Counts are exact, ties go to the lower index,
    the target is reached exactly. If the gradient of a pruned weight is not finite, nothing changes at that update,
    be it the last, which the device decides; the schedule depends on the step alone, so the next update catches up,
    and after the last one `finalize` does, which needs no gradient. Gradients carry no hooks and `optimizer.step` is
    not patched: the masks work through `.grad`.

    Args:
        model: its convolutions and linear layers are pruned, its convolutions get the rank loss.
        optimizer: any torch optimizer that works element by element (LBFGS and Muon do not, and are refused) and holds
            the pruned weights. `MaskedSGD` and `MaskedAdamW` are given the masks and do the masking in their step.
        sparsity: final fraction of zeros, in [0, 1).
        total_steps: calls of `step` in the whole training.
        weights: ``{name: Parameter}`` to prune, default ``prunable_weights(model)``: all `weight` of convolutions and
            linear layers, but not the `in_proj_weight` of nn.MultiheadAttention.
        distribution: "global_magnitude" (one threshold over all weights, as published for ResNet-50; a layer of small
            weights may lose all of them, as some of a transformer do), "erk", "uniform", or final sparsities
            ``{name: float}`` that amount to `sparsity`.
        criterion: what grows: "rigl" (largest gradient), "set" (random), "momentum" (largest momentum of the dense
            gradients, see `criteria.Momentum`), "gmp" (nothing: gradual magnitude pruning), a callable (see
            `criteria.Criterion`); or "static": the masks never change after construction, where schedule="constant"
            has pruned by magnitude; every step then trains.
        schedule: "exponential" (RPG), "polynomial", "constant" (that sparsity from the start), or a schedule object,
            which then defines the update steps and takes the place of `update_every`, `prune_until` and `update_until`.
        update_every: steps between topology updates.
        prune_until, update_until: fractions of `total_steps`: until when the sparsity grows (if it does), until when
            weights are dropped and grown.
        drop_fraction: fraction of the active weights dropped at the first update, decaying to 0 at `update_until` by
            a cosine.
        rank_weight: factor of the rank loss, a float or a 0-d tensor; 0 turns it off.
        tail_energy, rank_method, min_sparsity: see `rank_loss`.
        rank_every: "update": the rank gradient takes part in topology steps only (with `grow_steps` in those that
            lead there too), as published, so it only steers growth; an integer N: in every N-th step.
        rank_layers: ``{name: Parameter}`` that get the rank loss, default: the model's convolutions.
        grow_steps: the last steps up to an update whose mean gradient says what grows.
        semantics: "corrected": the rules above. "official": the decisions of the published program, kept as they are
            (docs/fidelity.md): it misses its target on short runs, keeps one weight too many per threshold and
            re-enables every weight when zeros tie; for the options that it combines, which are the defaults. A resumed
            run goes on as an uninterrupted one, a gradient that is not finite changes nothing, and `finalize` leaves
            the masks as they are.
        process_group: with torch.distributed initialised, rank 0's masks are broadcast in this group (default: all
            ranks) after every update. Gradients must have been reduced.
        generator: source of randomness for "set", and for a callable.

    The pruner holds the parameters themselves: build it after the model is on its device, and again if parameters are
    replaced.

    On a GPU, `step` can be captured in CUDA graphs, one of an ordinary step and one of a topology update, each after a
    warm-up; what changes from update to update lies on the device. All ordinary steps are alike with ``grow_steps=1``
    and `rank_every` "update" or 1: capture no others. Choose by `updates_next`, and count what a graph has done with
    `advance`; capture anew where `settle` has named layers::

        (updating if pruner.updates_next else training).replay()
        pruner.advance()

    Attributes:
        masks: the `PackedMasks`. last_rank_loss: 0-d tensor of the last computed rank loss, or None.
        rank_state: the `RankState` with the ranks of `rank_layers`. step_count: calls of `step` so far.

    Raises:
        ValueError, TypeError: an option out of its range or unknown, a weight that the optimizer does not hold, too
            few steps for one update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sparsity: float,
        total_steps: int,
        weights: Mapping[str, nn.Parameter] | None = None,
        distribution: str | Mapping[str, float] = "global_magnitude",
        criterion: str | Criterion = "rigl",
        schedule: str | Schedule = "exponential",
        update_every: int = 100,
        prune_until: float = 0.9,
        update_until: float = 0.901,
        drop_fraction: float = 0.3,
        rank_weight: float | Tensor = 0.0,
        tail_energy: float | Tensor = 0.1,
        rank_every: str | int = "update",
        rank_layers: Mapping[str, nn.Parameter] | None = None,
        rank_method: str = "auto",
        min_sparsity: float = 0.0,
        grow_steps: int = 1,
        semantics: str = "corrected",
        process_group: dist.ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ):
        whole = isinstance(rank_every, int) and not isinstance(rank_every, bool)
        if rank_every != "update" and not (whole and int(rank_every) >= 1):
            raise ValueError(f'rank_every must be "update" or a positive integer, got {rank_every!r}')
        self.optimizer = optimizer
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        self.weights = grouping.named_weights(grouping.prunable_weights(model) if weights is None else weights)
        check_optimizer(optimizer, self.weights)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        self.sparsity, self.total_steps = sparsity, total_steps
        self.criterion, self._grow = criterion, make_criterion(criterion, self.weights, optimizer)
        self._momentum = self._grow if isinstance(self._grow, Momentum) else None
        self.schedule = make_schedule(schedule, sparsity, total_steps, update_every, prune_until, update_until)
        if criterion == "static" and not isinstance(self.schedule, ConstantSparsity):
            raise ValueError('criterion="static" makes masks once: take schedule="constant" (or "gmp": gradually)')
        self.rank_weight, self.tail_energy = rank_weight, tail_energy
        self.rank_every, self.rank_method, self.min_sparsity = rank_every, rank_method, min_sparsity
        convolutions = grouping.prunable_weights(model, include=grouping.CONVOLUTIONS)
        self.rank_layers = convolutions if rank_layers is None else grouping.named_weights(rank_layers, "rank_layers")
        self._check_rank_options()
        self.process_group, self.generator = process_group, generator
        self.step_count = 0
        self.last_rank_loss: Tensor | None = None
        self.rank_state = RankState()
        self.masks = PackedMasks(self.weights)
        self._topology = make_topology(
            semantics, self.weights, self.masks.layout, self.schedule, drop_fraction=drop_fraction,
            distribution=distribution, criterion=criterion, rank_every=rank_every, grow_steps=grow_steps,
        )  # fmt: skip
        self.drop = self._topology.drop
        self.semantics, self._published = semantics, semantics == "official"
        self._mean = GradientMean(grow_steps)
        # What "power" draws is a function of how often it was called: the same in every process, which all add the
        # gradient for themselves, and after a resume.
        ranked = next(iter(self.rank_layers.values()), self.masks.bits)
        self._rank_calls = torch.zeros((), dtype=torch.int64, device=ranked.device)
        self._before, self._kept = self.masks.bits.clone(), self.masks.bits.clone()  # around the last update: for stats
        self._ever_active = PackedMasks(self.weights)
        self._ever_active.bits.zero_()
        if isinstance(optimizer, (MaskedSGD, MaskedAdamW)):
            optimizer.set_masks(self.masks)
        bits = self._topology.start(self._values(), self.masks.bits)
        if bits is not None:
            self._adopt(bits, bits)

    def _check_rank_options(self) -> None:
        check_scalar("rank_weight", self.rank_weight)
        if not isinstance(self.rank_weight, Tensor) and not math.isfinite(self.rank_weight):
            raise ValueError(f"rank_weight must be finite, got {self.rank_weight}")
        if not self._uses_rank_loss():
            return
        if not self.rank_layers:
            raise ValueError("rank_weight is set, but there are no rank_layers: the model has no convolution")
        layers: list[Tensor] = list(self.rank_layers.values())
        if not any(w.requires_grad for w in layers):
            raise ValueError("rank_weight is set, but none of the rank_layers requires a gradient")
        check_options(layers, self.tail_energy, self.rank_method, "fp32", None, 1, self.min_sparsity)

    def _uses_rank_loss(self) -> bool:
        return isinstance(self.rank_weight, Tensor) or self.rank_weight != 0

    def _values(self) -> list[Tensor]:
        return [w.detach() for w in self.weights.values()]

    # ------------------------------------------------------------------------------------------------------------
    # the step

    @torch.no_grad()
    def step(self) -> bool:
        """To be called once per optimizer step, after the last backward: adds the rank gradient when due, updates the
        topology when due (returns False then: skip `optimizer.step()`), and masks `.grad`. The masked optimizers mask
        in their own step, so `.grad` stays dense for them. With torch's optimizers it is these calls that keep pruned
        weights at zero: go on with them for as long as you train. Nothing here waits for the device but the
        eigendecompositions of the rank loss.

        Raises:
            TypeError, ValueError: a sparse gradient, or unusable scores of a callable criterion.
        """
        step = self.step_count = self.step_count + 1
        ahead = self._topology.steps_to_update(step)
        window = ahead is not None and ahead < self._mean.steps
        if (window if self.rank_every == "update" else step % int(self.rank_every) == 0) and self._uses_rank_loss():
            self._add_rank_gradient()
        moves = self.criterion != "static"
        update = moves and self._topology.is_update_step(step)
        momentum = self._momentum if step <= self.schedule.last_update else None
        if update or momentum is not None or (moves and window and self._mean.steps > 1):
            grads = self._gradients()
            means = self._mean.observe(grads, opening=ahead == self._mean.steps - 1) if window else grads
            finite = None
            if momentum is not None:
                finite = self._all_finite(grads)
                momentum.observe(grads, finite, self.optimizer)
            if update:
                if finite is None or means is not grads:
                    finite = self._all_finite(means)
                if self._topology.trains_on_updates:  # by the gradients of what was active up to now
                    mask_gradients_(self.weights.values(), self.masks)
                self._update_topology(means, finite)
        if not isinstance(self.optimizer, (MaskedSGD, MaskedAdamW)):
            mask_gradients_(self.weights.values(), self.masks)
        return not update or self._topology.trains_on_updates

    def _add_rank_gradient(self) -> None:
        self._rank_calls += 1
        options: dict[str, Any] = {
            "method": self.rank_method,
            "state": self.rank_state,
            "min_sparsity": self.min_sparsity,
            "generator": self._rank_calls,
        }
        add = add_published_rank_grad_ if self._published else add_rank_grad_
        self.last_rank_loss = add(self.rank_layers, self.rank_weight, self.tail_energy, **options)

    def _gradients(self) -> list[Tensor]:
        """The dense gradients, those that are None as zeros."""
        grads = []
        for name, w in self.weights.items():
            if w.grad is not None and w.grad.layout != torch.strided:
                raise TypeError(f"gradients must be dense, got {w.grad.layout} for {name}")
            grads.append(torch.zeros_like(w) if w.grad is None else w.grad)
        return grads

    def _all_finite(self, grads: list[Tensor]) -> Tensor:
        """Whether no gradient holds NaN or inf: bool, 0-d. It is GradScaler's check, here with a scale of one."""
        found = torch.zeros((), device=self.masks.bits.device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.ones_like(found))
        return found == 0

    def _update_topology(self, grads: list[Tensor], finite: Tensor) -> None:
        before, weights, scores = self.masks.bits, self._values(), None
        if self.drop(self.step_count) > 0:
            scores = self._grow(self.masks.names, weights, grads, self.generator, self.optimizer)
        if scores is not None:
            check_scores(scores, self.weights)
        after, kept = self._topology.update(weights, before, scores, finite)
        self._before.copy_(before)
        self._ever_active.bits |= before
        after, before, kept = (bits.view(torch.int64) for bits in (after, before, kept))  # eight bytes at a time
        self._adopt(torch.where(finite, after, before), torch.where(finite, kept, -1))

    def _adopt(self, masks: Tensor, kept: Tensor) -> None:
        """Everyone takes over rank 0's bits as masks, and zeroes weights and state outside those of `kept`."""
        both = torch.stack([masks, kept]).view(torch.uint8)  # [2, nbytes]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(both, group=self.process_group, group_src=0)
        self.masks.bits.copy_(both[0])
        self._kept.copy_(both[1])
        self._zero_outside(both)

    def _zero_outside(self, both: Tensor) -> None:
        """Zeroes the weights outside the bits ``both[1]``, and whatever the optimizer keeps in their shape too; the
        published program keeps its momentum of all that is active, ``both[0]``. both [2, nbytes]."""
        layout = self.masks.layout
        tensors, offsets = [], []
        for weight, order, offset in zip(self.weights.values(), layout.orders, layout.offsets, strict=True):
            tensors.append(grouping.as_it_lies(weight.detach(), order))
            offsets.append(layout.nbytes + offset)
            for value in self.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                    tensors.append(grouping.as_it_lies(value, order))
                    offsets.append(offset if self._published else layout.nbytes + offset)
        torch.ops.rpg_fast.mask_(tensors, both.flatten(), offsets, None)

    # ---------------------------------------------------------------------------------------------------------
    # beside the step

    @torch.no_grad()
    def apply_masks_(self) -> None:
        """Zeroes weights and optimizer state outside the masks, e.g. after loading weights or editing masks."""
        self._zero_outside(torch.stack([self.masks.bits, self.masks.bits]))

    @property
    def updates_next(self) -> bool:
        """Whether the next `step` changes the topology."""
        return self.criterion != "static" and self._topology.is_update_step(self.step_count + 1)

    def advance(self) -> None:
        """Counts a step that the replay of a captured `step` has made."""
        self.step_count += 1

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Masks `.grad`, then clips the norm over all parameters of the optimizer as torch.nn.utils.clip_grad_norm_
        does; after a True `step`. Returns the total norm of the masked gradients before clipping, 0-d."""
        mask_gradients_(self.weights.values(), self.masks)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(params, max_norm)

    def stats(self) -> PruneStats:
        """Counts per weight now and in the last topology update, as device tensors."""
        layout, before, after = self.masks.layout, self._before, self.masks.bits
        total = torch.tensor(layout.numels, dtype=torch.int64)
        flags = self.rank_state.flags
        return PruneStats(
            names=self.masks.names,
            total=total.to(after.device, non_blocking=True),
            active=layout.popcount(after),
            pruned=layout.popcount(before & ~after),
            grown=layout.popcount(after & ~before),
            regrown=layout.popcount(after & ~before & self._ever_active.bits),
            restarted=layout.popcount(after & before & ~self._kept),
            left_out=None if flags is None else (flags & LEFT_OUT) > 0,
        )

    def settle(self) -> list[str]:
        """The `rank_layers` that ``rank_method="power"`` left out of its last call. Waits for the device to read them,
        and leaves them to eigendecompositions from the next call on, see `RankState.settle`. On a GPU, call it as often
        as losses are read, e.g. once an epoch, and in every process at the same step: their gradients must agree."""
        names = list(self.rank_layers)
        return [names[i] for i in self.rank_state.settle()]

    @torch.no_grad()
    def finalize(self) -> float:
        """Ends the pruning: if training stopped before the schedule did, or the last update found a gradient that was
        not finite, prunes to the final sparsity now (by magnitude, nothing grows); zeroes everything outside the
        masks, and settles the rank loss. Returns the exact overall sparsity; reading it waits for the device. Warns of
        weights of which nothing is left: their layers pass nothing on. Training may go on, with `step` as before."""
        bits = self._topology.finish(self._values(), self.masks.bits)
        self._adopt(bits, bits)
        self.settle()
        counts, numels = self.masks.count().tolist(), self.masks.layout.numels  # sync: as documented
        empty = [name for name, active, n in zip(self.masks.names, counts, numels, strict=True) if n and not active]
        if empty:
            remedy = 'distribution="erk" or "uniform" keeps a share of each'
            warnings.warn(f"nothing is left of {empty[:5]} ({len(empty)} in all): {remedy}", stacklevel=3)
        return 1 - sum(counts) / sum(numels) if sum(numels) else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Step, masks, what had been active before, and the states of rank loss, criterion and generator. The options
        are the constructor's business; of them, only sparsity and semantics are kept, and checked."""
        return {
            "sparsity": self.sparsity,
            "semantics": self.semantics,
            "step_count": self.step_count,
            "masks": self.masks.state_dict(),
            "ever_active": self._ever_active.state_dict(),
            "topology": self._topology.state_dict(),
            "gradients": self._mean.state_dict(),
            "momentum": None if self._momentum is None else self._momentum.state_dict(),
            "rank_calls": self._rank_calls.clone(),
            "rank_state": self.rank_state.state_dict(),
            "last_rank_loss": self.last_rank_loss,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned and zeroes what the masks exclude; load model and optimizer first.

        Raises:
            ValueError: the state of other weights, of another target sparsity or semantics, or something else.
        """
        wanted = {
            *("sparsity", "semantics", "step_count", "masks", "ever_active", "topology", "gradients", "momentum"),
            *("rank_calls", "rank_state", "last_rank_loss", "generator"),
        }
        if set(state) != wanted:
            raise ValueError(f"not the state of a RankPruner: got keys {sorted(state)}, wanted {sorted(wanted)}")
        if state["sparsity"] != self.sparsity:
            raise ValueError(f"the saved state prunes to sparsity {state['sparsity']}, this pruner to {self.sparsity}")
        if state["semantics"] != self.semantics:
            raise ValueError(f"the saved state has semantics {state['semantics']!r}, this pruner {self.semantics!r}")
        for name, mine in (("generator", self.generator), ("momentum", self._momentum)):
            if (state[name] is None) != (mine is None):
                raise ValueError(
                    f"the saved state must hold a {name} exactly if this pruner does; here only one has it"
                )
        self.masks.load_state_dict(state["masks"])
        self._ever_active.load_state_dict(state["ever_active"])
        self._topology.load_state_dict(state["topology"], state["step_count"])
        self._mean.load_state_dict(state["gradients"], self.masks.bits.device)
        if self._momentum is not None:
            self._momentum.load_state_dict(state["momentum"])
        self._rank_calls.copy_(state["rank_calls"])
        self.rank_state.load_state_dict(state["rank_state"])
        self.step_count = state["step_count"]
        loss = state["last_rank_loss"]
        self.last_rank_loss = None if loss is None else loss.to(self._rank_calls.device, copy=True)
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self._before.copy_(self.masks.bits)
        self._kept.copy_(self.masks.bits)
        self.apply_masks_()
