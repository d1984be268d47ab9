"""What a topology update does to the masks: `RankPruner`'s own rules, and those of the published program.

What differs from one update to the next, counts and drop fraction, is a row of tables on the device, and the number of
the row lies there too and is advanced by the update itself: a captured CUDA graph finds the next row at every replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rpg_fast import reference
from rpg_fast.distributions import plan_counts
from rpg_fast.masks import MaskLayout, NamedWeights, drop_and_grow
from rpg_fast.schedules import CosineDrop, ExponentialSparsity, Schedule

Scores = Sequence[Tensor] | None
Update = tuple[Tensor, Tensor]
"""The bits of the new masks, and of the weights among them that keep their values."""


class Corrected:
    """Prunes to the schedule's sparsity by magnitude, then drops the smallest weights of each and grows as many where
    the scores are largest. Exact counts, ties to the lower index; what grows starts at zero, with zero state."""

    trains_on_updates = False  # whether the optimizer takes a step there too

    def __init__(
        self,
        weights: NamedWeights,
        layout: MaskLayout,
        schedule: Schedule,
        drop: CosineDrop,
        distribution: str | Mapping[str, float],
    ):
        self.layout, self.schedule, self.drop = layout, schedule, drop
        self.per_tensor = distribution != "global_magnitude"
        steps = range(schedule.begin, schedule.last_update + 1, schedule.every)
        device = next(iter(weights.values())).device
        planned = plan_counts(weights, distribution, [schedule(step) for step in steps[: schedule.updates + 1]])
        self.counts = torch.tensor(planned, dtype=torch.int64, device=device)  # [updates + 1, B or 1]
        self.fractions = torch.tensor([drop(step) for step in steps], dtype=torch.float64, device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # updates made

    def is_update_step(self, step: int) -> bool:
        return self.schedule.is_update_step(step)

    def steps_to_update(self, step: int) -> int | None:
        """How far away the next update is, 0 if it is `step`; None if there is none any more."""
        ahead = (self.schedule.begin - step) % self.schedule.every
        return ahead if self.is_update_step(step + ahead) else None

    def start(self, weights: Sequence[Tensor], bits: Tensor) -> Tensor | None:
        """The bits that a constant schedule begins with."""
        return self._prune(weights, bits, self.counts[0]) if self.schedule(0) > 0 else None

    def finish(self, weights: Sequence[Tensor], bits: Tensor) -> Tensor:
        """The bits of the final sparsity."""
        return self._prune(weights, bits, self.counts[-1])

    def update(self, weights: Sequence[Tensor], bits: Tensor, scores: Scores, finite: Tensor) -> Update:
        """The update of the next number. `scores` of what grows, None: nothing is dropped or grown."""
        self.number += 1
        row = self.number.clamp(max=self.schedule.updates).reshape(1)
        kept = after = self._prune(weights, bits, self.counts.index_select(0, row).squeeze(0))
        if scores is not None:
            fraction = self.fractions.index_select(0, self.number.clamp(max=len(self.fractions) - 1).reshape(1))
            kept, grown = drop_and_grow(self.layout, after, weights, scores, fraction, absolute=True)
            after = kept | grown
        return after, kept

    def _prune(self, weights: Sequence[Tensor], bits: Tensor, counts: Tensor) -> Tensor:
        """The bits that stay when the active weights are cut to `counts` by magnitude."""
        return self.layout.select(weights, counts, eligible=bits, absolute=True, per_tensor=self.per_tensor)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Goes on after `step`, which alone tells the number of the next update: an altered schedule reaches its
        target too."""
        self.number.fill_(max(0, min(step, self.schedule.last_update) - self.schedule.begin) // self.schedule.every)


class Official:
    """The decisions of the published program (distribution "magnitude-exponential"), kept as they are. docs/fidelity.md
    tells what is meant by the numbers.

    All weights at or above the threshold stay, which is one too many, all ties, and everything if the threshold is
    zero (Q-R10, Q-R11). The schedule lags one update behind (Q-R7), and the last one may come too late (Q-R8). What of
    a layer is active is computed as int((1 - S) n), in Python's floats, which may lose one (Q-R12). A weight that the
    threshold has cut restarts at zero where it grows; one that was dropped and grows at once keeps its value (Q-R13),
    and both keep their momentum.

    Raises:
        ValueError: options that the published program does not combine in this way, or no room for one update.
    """

    def __init__(self, weights: NamedWeights, layout: MaskLayout, schedule: Schedule, drop_fraction: float):
        self.layout = layout
        self.every, self.end = schedule.every, schedule.until or schedule.end  # end: T_end, the first step without one
        updates = (self.end - 1) // self.every
        if updates < 1:
            raise ValueError(f"no update fits: the first is at step {self.every}, and the last before {self.end}")
        total, density = sum(layout.numels), round(1 - schedule.sparsity, 12)
        counts, final = [], []
        for done in range(updates):
            remaining = pow(pow(density, 1 / schedule.updates), done) if done < schedule.updates else density
            counts.append([min(total, total - round((1 - remaining) * total) + 1)])
            final.append(remaining == density)
        self.drop = CosineDrop(drop_fraction, self.end)
        self.trains_on_updates = drop_fraction == 0
        device = next(iter(weights.values())).device
        self.counts = torch.tensor(counts, dtype=torch.int64, device=device)  # [updates, 1]
        self.final = torch.tensor(final, device=device)  # [updates], bool: at the final sparsity
        fractions = [self.drop(self.every * (done + 1)) for done in range(updates)]
        self.fractions = torch.tensor(fractions, dtype=torch.float64, device=device)  # [updates]
        self.numels = torch.tensor(layout.numels, dtype=torch.int64, device=device)  # [B]
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.zeros = torch.zeros_like(self.numels)  # [B], below the last threshold
        self.stationary = torch.zeros((), dtype=torch.bool, device=device)  # no threshold any more

    def is_update_step(self, step: int) -> bool:
        return step > 0 and step % self.every == 0 and step < self.end

    def steps_to_update(self, step: int) -> int | None:
        """How far away the next multiple of `update_every` is, 0 if it is `step`. At the very end the published program
        waits for one that does not come (Q-R1)."""
        return -step % self.every if step <= self.end else None

    def start(self, weights: Sequence[Tensor], bits: Tensor) -> Tensor | None:
        return None

    def finish(self, weights: Sequence[Tensor], bits: Tensor) -> Tensor:
        """As they are: nothing was published for the end."""
        return bits

    def update(self, weights: Sequence[Tensor], bits: Tensor, scores: Scores, finite: Tensor) -> Update:
        row = self.number.clamp(max=len(self.fractions) - 1).reshape(1)
        above = self._above_threshold(weights, self.counts.index_select(0, row).squeeze(0))
        zeros = torch.where(self.stationary, self.zeros, self.numels - self.layout.popcount(above))  # [B]
        pruned = torch.where(self.stationary, bits, above)
        sizes = self.numels.double()
        density = 1 - zeros / sizes.clamp(min=1)
        active = (density * sizes).floor().long()
        exchanged = (density * sizes * self.fractions.index_select(0, row)).floor().long()
        sparse = zeros > 0  # the others are left alone
        kept = self.layout.select(
            weights, torch.where(sparse, active - exchanged, self.numels), eligible=pruned, absolute=True
        )
        after = kept
        if scores is not None:
            exchanged = torch.where(sparse, exchanged, 0)
            after = kept | self.layout.select(scores, exchanged, eligible=~kept, absolute=True)
        done = self.final.index_select(0, row).squeeze(0) & sparse.any()
        self.stationary.copy_(torch.where(finite, self.stationary | done, self.stationary))
        self.zeros.copy_(torch.where(finite, zeros, self.zeros))
        self.number += 1
        return after, after & pruned

    def _above_threshold(self, weights: Sequence[Tensor], count: Tensor) -> Tensor:
        """The bits of all weights that are no smaller than the `count`-th largest."""
        best = self.layout.select(weights, count, absolute=True, per_tensor=False)
        dtype = reference.accumulation_dtype(list(weights))
        magnitudes = [w.abs().to(dtype) for w in weights]
        least = [
            torch.where(mask & ~magnitude.isnan(), magnitude, torch.inf).amin()  # NaN is the best, but no threshold
            for mask, magnitude in zip(self.layout.unpack(best), magnitudes, strict=True)
            if magnitude.numel()
        ]
        threshold = torch.stack(least).amin() if least else torch.inf
        return self.layout.pack(magnitude >= threshold for magnitude in magnitudes)

    def state_dict(self) -> dict[str, Any]:
        return {"zeros": self.zeros.clone(), "stationary": self.stationary.clone()}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Goes on after `step`."""
        self.number.fill_(min(step, self.end - 1) // self.every)
        self.zeros.copy_(state["zeros"])
        self.stationary.copy_(state["stationary"])


class GradientMean:
    """The mean of the dense gradients of the `steps` steps up to an update."""

    def __init__(self, steps: int):
        self.steps = steps
        self.sums: list[Tensor] | None = None

    def observe(self, grads: list[Tensor], opening: bool) -> list[Tensor]:
        """Takes in the gradients of one step, the first of a window if `opening`. Returns the means so far, which are
        the gradients themselves where one step is all."""
        if self.steps == 1:
            return grads
        if self.sums is None:
            dtype = reference.accumulation_dtype(grads)
            self.sums = [torch.zeros_like(g, dtype=dtype) for g in grads]
        if opening:
            torch._foreach_zero_(self.sums)
        torch._foreach_add_(self.sums, grads, alpha=1 / self.steps)  # no quotient that 16 bits would round
        return self.sums

    def state_dict(self) -> dict[str, Any]:
        return {"sums": None if self.sums is None else [s.clone() for s in self.sums]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums = None if state["sums"] is None else [s.to(device, copy=True) for s in state["sums"]]


def make_topology(
    semantics: str,
    weights: NamedWeights,
    layout: MaskLayout,
    schedule: Schedule,
    *,
    drop_fraction: float,
    distribution: str | Mapping[str, float],
    criterion: object,
    rank_every: str | int,
    grow_steps: int,
) -> Corrected | Official:
    """The rules that `RankPruner` names "corrected" or "official".

    Raises:
        ValueError: an unknown name, or "official" with options that the published program does not combine.
    """
    if semantics not in ("corrected", "official"):
        raise ValueError(f'semantics must be "corrected" or "official", got {semantics!r}')
    if not isinstance(grow_steps, int) or isinstance(grow_steps, bool) or not 1 <= grow_steps <= schedule.every:
        raise ValueError(f"grow_steps must be whole, from 1 to update_every={schedule.every}, got {grow_steps!r}")
    if semantics == "corrected":
        drop = CosineDrop(drop_fraction, schedule.last_update if schedule.until is None else max(1, schedule.until))
        return Corrected(weights, layout, schedule, drop, distribution)
    wanted = {
        "distribution": (distribution, "global_magnitude"),
        "criterion": (criterion, "rigl"),
        "rank_every": (rank_every, "update"),
    }
    for name, (got, published) in wanted.items():
        if got != published:
            raise ValueError(f'semantics="official" is for {name}="{published}", as published, got {got!r}')
    if not isinstance(schedule, ExponentialSparsity) or schedule.begin != 0:
        raise ValueError('semantics="official" is for schedule="exponential" from step 0, as published')
    if grow_steps >= schedule.every:
        raise ValueError(f'semantics="official" needs grow_steps < update_every={schedule.every}, got {grow_steps}')
    return Official(weights, layout, schedule, drop_fraction)
