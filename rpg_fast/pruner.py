"""RankPruner: gradual prune-and-grow training with the rank loss, beside any loop and optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rpg_fast import grouping
from rpg_fast.criteria import Criterion, Momentum, check_scores, make_criterion
from rpg_fast.distributions import plan_counts
from rpg_fast.masks import PackedMasks, drop_and_grow, mask_gradients_
from rpg_fast.optim import MaskedAdamW, MaskedSGD
from rpg_fast.rank_loss import LEFT_OUT, RankState, add_rank_grad_, check_options
from rpg_fast.schedules import ConstantSparsity, CosineDrop, Schedule, make_schedule
from rpg_fast.stats import PruneStats

MIXING_OPTIMIZERS = ("LBFGS", "Muon")


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
        weights: ``{name: Parameter}`` to prune, default ``prunable_weights(model)``.
        distribution: "global_magnitude" (one threshold over all weights), "erk", "uniform", or final sparsities
            ``{name: float}`` that amount to `sparsity`.
        criterion: what grows: "rigl" (largest gradient), "set" (random), "momentum" (largest momentum of the dense
            gradients, see `criteria.Momentum`), "gmp" (nothing: gradual magnitude pruning), a callable (see
            `criteria.Criterion`); or "static": the masks never change after construction, where schedule="constant"
            has pruned by magnitude; every step then trains.
        schedule: "exponential" (RPG), "polynomial", "constant" (that sparsity from the start), or a schedule object,
            which then defines the update steps and takes the place of `update_every`, `prune_until` and `update_until`.
        update_every: steps between topology updates.
        prune_until, update_until: fractions of `total_steps`: until when the sparsity grows, until when weights are
            dropped and grown.
        drop_fraction: fraction of the active weights dropped at the first update, decaying to 0 at `update_until` by
            a cosine.
        rank_weight: factor of the rank loss, a float or a 0-d tensor; 0 turns it off.
        tail_energy, rank_method, min_sparsity: see `rank_loss`.
        rank_every: "update": the rank gradient takes part in topology steps only, as published, so it only steers
            growth; an integer N: in every N-th step.
        rank_layers: ``{name: Parameter}`` that get the rank loss, default: the model's convolutions.
        semantics: "corrected": the rules above. The published code misses its target on short runs, keeps one weight
            too many per threshold, re-enables every weight when zeros tie, and loses its schedule on resume.
        process_group: with torch.distributed initialised, rank 0's masks are broadcast in this group (default: all
            ranks) after every update. Gradients must have been reduced.
        generator: source of randomness for "set", and for a callable.

    The pruner holds the parameters themselves: build it after the model is on its device, and again if parameters are
    replaced.

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
        semantics: str = "corrected",
        process_group: dist.ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ):
        if semantics != "corrected":
            raise ValueError(f'semantics must be "corrected", got {semantics!r}')
        if rank_every != "update" and not (isinstance(rank_every, int) and rank_every >= 1):
            raise ValueError(f'rank_every must be "update" or a positive integer, got {rank_every!r}')
        self.optimizer = optimizer
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        self.weights = grouping.named_weights(grouping.prunable_weights(model) if weights is None else weights)
        self._check_optimizer()
        self.sparsity, self.total_steps = sparsity, total_steps
        self.criterion, self._grow = criterion, make_criterion(criterion, self.weights, optimizer)
        self._momentum = self._grow if isinstance(self._grow, Momentum) else None
        self.schedule = make_schedule(schedule, sparsity, total_steps, update_every, prune_until, update_until)
        if criterion == "static" and not isinstance(self.schedule, ConstantSparsity):
            raise ValueError('criterion="static" makes masks once: take schedule="constant" (or "gmp": gradually)')
        self.drop = CosineDrop(drop_fraction, max(self.schedule.last_update, self.schedule.until or 1))
        self.distribution = distribution if isinstance(distribution, str) else dict(distribution)
        self.rank_weight, self.tail_energy = rank_weight, tail_energy
        self.rank_every, self.rank_method, self.min_sparsity = rank_every, rank_method, min_sparsity
        convolutions = grouping.prunable_weights(model, include=grouping.CONVOLUTIONS)
        self.rank_layers = convolutions if rank_layers is None else grouping.named_weights(rank_layers)
        self._check_rank_options()
        self.process_group, self.generator = process_group, generator
        self.step_count = 0
        self.last_rank_loss: Tensor | None = None
        self.rank_state = RankState()
        self.masks = PackedMasks(self.weights)
        self._kept_counts = self._plan_counts()  # int64 [updates + 1, B or 1] on the device
        self._before, self._kept = self.masks.bits.clone(), self.masks.bits.clone()  # around the last update: for stats
        self._ever_active = PackedMasks(self.weights)
        self._ever_active.bits.zero_()
        if isinstance(optimizer, (MaskedSGD, MaskedAdamW)):
            optimizer.set_masks(self.masks)
        if self.schedule(0) > 0:
            bits = self._prune(0)
            self._adopt(bits, bits)

    def _check_rank_options(self) -> None:
        if not self._uses_rank_loss():
            return
        if not self.rank_layers:
            raise ValueError("rank_weight is set, but there are no rank_layers: the model has no convolution")
        layers: list[Tensor] = list(self.rank_layers.values())
        if not any(w.requires_grad for w in layers):
            raise ValueError("rank_weight is set, but none of the rank_layers requires a gradient")
        check_options(layers, self.tail_energy, self.rank_method, "fp32", None, 1, self.min_sparsity)

    def _check_optimizer(self) -> None:
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch optimizer, got {type(self.optimizer).__name__}")
        if type(self.optimizer).__name__ in MIXING_OPTIMIZERS:
            name = type(self.optimizer).__name__
            raise TypeError(
                f"{name} mixes the elements of a weight, so pruned ones would come back: take another optimizer"
            )
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [name for name, w in self.weights.items() if id(w) not in held]
        if missing:
            raise ValueError(f"the optimizer does not hold the pruned weights {missing[:5]} ({len(missing)} in all)")

    def _plan_counts(self) -> Tensor:
        """The ones after each pruning update, planned once so that no update copies from the host."""
        schedule = self.schedule
        sparsities = [schedule(schedule.begin + n * schedule.every) for n in range(schedule.updates + 1)]
        rows = plan_counts(self.weights, self.distribution, sparsities)
        return torch.tensor(rows, dtype=torch.int64, device=self.masks.bits.device)

    def _uses_rank_loss(self) -> bool:
        return isinstance(self.rank_weight, Tensor) or self.rank_weight != 0

    def _rank_generator(self) -> torch.Generator:
        """What a randomised `rank_method` draws is a function of the step: the same in every process and after a
        resume, which all add the gradient for themselves."""
        device = next(iter(self.rank_layers.values())).device
        return torch.Generator(device).manual_seed(self.step_count)

    # ------------------------------------------------------------------------------------------------------------
    # the step

    @torch.no_grad()
    def step(self) -> bool:
        """To be called once per optimizer step, after the last backward: adds the rank gradient when due, then
        either updates the topology (returns False: skip `optimizer.step()`) or masks `.grad` (returns True). The
        masked optimizers mask in their own step, so `.grad` stays dense for them. Nothing here waits for the device but
        the eigendecompositions of the rank loss.

        Raises:
            TypeError, ValueError: a sparse gradient, or unusable scores of a callable criterion.
        """
        self.step_count += 1
        update = self.schedule.is_update_step(self.step_count)
        due = update if self.rank_every == "update" else self.step_count % int(self.rank_every) == 0
        if due and self._uses_rank_loss():
            self.last_rank_loss = add_rank_grad_(
                self.rank_layers,
                self.rank_weight,
                self.tail_energy,
                method=self.rank_method,  # type: ignore[arg-type]
                state=self.rank_state,
                min_sparsity=self.min_sparsity,
                generator=self._rank_generator(),
            )
        update = update and self.criterion != "static"
        momentum = self._momentum if self.step_count <= self.schedule.last_update else None
        if update or momentum is not None:
            grads = self._gradients()
            finite = self._all_finite(grads)
            if momentum is not None:
                momentum.observe(grads, finite)
            if update:
                self._update_topology(grads, finite)
                return False
        if not isinstance(self.optimizer, (MaskedSGD, MaskedAdamW)):
            mask_gradients_(self.weights.values(), self.masks)
        return True

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

    def _prune(self, step: int) -> Tensor:
        """The bits that stay when the active weights are cut to the schedule's count by magnitude."""
        planned = max(0, step - self.schedule.begin) // self.schedule.every
        return self.masks.layout.select(
            [w.detach() for w in self.weights.values()],
            self._kept_counts[min(planned, self.schedule.updates)],
            eligible=self.masks.bits,
            absolute=True,
            per_tensor=self.distribution != "global_magnitude",
        )

    def _update_topology(self, grads: list[Tensor], finite: Tensor) -> None:
        before = self.masks.bits
        kept = after = self._prune(self.step_count)
        fraction = self.drop(self.step_count)
        weights = [w.detach() for w in self.weights.values()]
        scores = None
        if fraction > 0:
            scores = self._grow(self.masks.names, weights, grads, self.generator, self.optimizer)
        if scores is not None:
            check_scores(scores, self.weights)
            kept, grown = drop_and_grow(self.masks.layout, after, weights, scores, fraction, absolute=True)
            after = kept | grown
        self._before.copy_(before)
        self._ever_active.bits |= before
        after, before, kept = (bits.view(torch.int64) for bits in (after, before, kept))  # eight bytes at a time
        self._adopt(torch.where(finite, after, before), torch.where(finite, kept, -1))

    def _adopt(self, bits: Tensor, kept: Tensor) -> None:
        """Everyone takes over rank 0's `bits` as masks, and zeroes weights and state outside rank 0's `kept`."""
        both = torch.stack([bits, kept]).view(torch.uint8)  # [2, nbytes]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(both, group=self.process_group, group_src=0)
        self.masks.bits.copy_(both[0])
        self._kept.copy_(both[1])
        self._zero_outside(self._kept)

    def _zero_outside(self, bits: Tensor) -> None:
        """Zeroes the weights, and whatever state the optimizer keeps in their shape, where a bit is zero."""
        layout = self.masks.layout
        tensors, offsets = [], []
        for weight, order, offset in zip(self.weights.values(), layout.orders, layout.offsets, strict=True):
            state = [
                value
                for value in self.optimizer.state.get(weight, {}).values()
                if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point()
            ]
            for tensor in (weight.detach(), *state):
                tensors.append(grouping.as_it_lies(tensor, order))
                offsets.append(offset)
        torch.ops.rpg_fast.mask_(tensors, bits, offsets, None)

    # ---------------------------------------------------------------------------------------------------------
    # beside the step

    @torch.no_grad()
    def apply_masks_(self) -> None:
        """Zeroes weights and optimizer state outside the masks, e.g. after loading weights or editing masks."""
        self._zero_outside(self.masks.bits)

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
        masks, and settles the rank loss. Returns the exact overall sparsity; reading it waits for the device."""
        bits = self._prune(self.schedule.begin + self.schedule.updates * self.schedule.every)
        self._adopt(bits, bits)
        self.settle()
        active = int(self.masks.count().sum())
        total = sum(self.masks.layout.numels)
        return 1 - active / total if total else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Step, masks, what had been active before, and the states of rank loss, criterion and generator. The options
        are the constructor's business; of them, only the sparsity is kept, and checked."""
        return {
            "sparsity": self.sparsity,
            "step_count": self.step_count,
            "masks": self.masks.state_dict(),
            "ever_active": self._ever_active.state_dict(),
            "momentum": None if self._momentum is None else self._momentum.state_dict(),
            "rank_state": self.rank_state.state_dict(),
            "last_rank_loss": self.last_rank_loss,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned and zeroes what the masks exclude; load model and optimizer first.

        Raises:
            ValueError: the state of other weights, of another target sparsity, or something else.
        """
        wanted = {
            *("sparsity", "step_count", "masks", "ever_active", "momentum"),
            *("rank_state", "last_rank_loss", "generator"),
        }
        if set(state) != wanted:
            raise ValueError(f"not the state of a RankPruner: got keys {sorted(state)}, wanted {sorted(wanted)}")
        if state["sparsity"] != self.sparsity:
            raise ValueError(f"the saved state prunes to sparsity {state['sparsity']}, this pruner to {self.sparsity}")
        for name, mine in (("generator", self.generator), ("momentum", self._momentum)):
            if (state[name] is None) != (mine is None):
                raise ValueError(
                    f"the saved state must hold a {name} exactly if this pruner does; here only one has it"
                )
        self.masks.load_state_dict(state["masks"])
        self._ever_active.load_state_dict(state["ever_active"])
        if self._momentum is not None:
            self._momentum.load_state_dict(state["momentum"])
        self.rank_state.load_state_dict(state["rank_state"])
        self.step_count = state["step_count"]
        self.last_rank_loss = state["last_rank_loss"]
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self._before.copy_(self.masks.bits)
        self._kept.copy_(self.masks.bits)
        self.apply_masks_()
