"""When and how far to prune: functions of the step alone, so that a resumed or skipped update catches up.

Steps count from 1. A sparsity schedule prunes at every `every`-th step; of its U = (end - begin) // every pruning
updates the last one reaches `sparsity` exactly. Topology updates (drop and grow) may go on at the reached sparsity
until `until`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def _check_whole(name: str, value: object) -> None:
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number of steps, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    sparsity: float
    every: int
    end: int
    begin: int = 0
    until: int | None = None

    def __post_init__(self) -> None:
        for name in ("every", "begin", "end"):
            _check_whole(name, getattr(self, name))
        if self.until is not None:
            _check_whole("until", self.until)
        if not isinstance(self.sparsity, (int, float)):
            raise TypeError(f"sparsity must be a number, got {self.sparsity!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), got {self.sparsity}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, got {self.every}")
        if self.begin < 0 or self.begin + self.every > self.end:
            raise ValueError(
                f"no update fits: begin={self.begin}, end={self.end}, every={self.every}; "
                "wanted 0 <= begin <= end - every"
            )

    @property
    def updates(self) -> int:
        """U, the number of pruning updates."""
        return (self.end - self.begin) // self.every

    @property
    def last_update(self) -> int:
        """The step of the last topology update."""
        reached = self.begin + self.updates * self.every
        if self.until is None or self.until <= reached:
            return reached
        return self.begin + (self.until - self.begin) // self.every * self.every

    def is_update_step(self, step: int) -> bool:
        """Whether the topology changes at this step."""
        return self.begin < step <= self.last_update and (step - self.begin) % self.every == 0

    def _progress(self, step: int) -> float:
        """The fraction of the pruning updates done by this step, exactly 1 from the U-th on."""
        done = max(0, step - self.begin) // self.every
        return min(done, self.updates) / self.updates


@dataclass(frozen=True, kw_only=True)
class ConstantSparsity(_Schedule):
    """The target from the start: dynamic sparse training at constant density (RigL, SET).

    Args:
        sparsity: the target, in [0, 1). every: steps between updates. begin, end: pruning happens at the steps
            begin + every, begin + 2 every, ... up to `end`, counted from 1. until: drop and grow goes on until this
            step.

    Raises:
        ValueError: a value out of its range, or no update between `begin` and `end`.
    """

    def __call__(self, step: int) -> float:
        """The sparsity at `step`."""
        return self.sparsity


@dataclass(frozen=True, kw_only=True)
class PolynomialSparsity(_Schedule):
    """s (1 - (1 - x)^power), x the fraction of updates done (Zhu and Gupta 2017, with power 3).

    Args:
        sparsity: the target, in [0, 1). every: steps between updates. begin, end: pruning happens at the steps
            begin + every, begin + 2 every, ... up to `end`, counted from 1. until: drop and grow goes on until this
            step.

    Raises:
        ValueError: a value out of its range, or no update between `begin` and `end`.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power must be positive, got {self.power}")

    def __call__(self, step: int) -> float:
        """The sparsity at `step`."""
        x = self._progress(step)
        return self.sparsity if x == 1 else self.sparsity * (1 - (1 - x) ** self.power)


@dataclass(frozen=True, kw_only=True)
class ExponentialSparsity(_Schedule):
    """1 - d^x, d = 1 - sparsity the final density, x the fraction of updates done: RPG's schedule, where every
    update keeps the same fraction of what is left (the published code lags one update behind).

    Args:
        sparsity: the target, in [0, 1). every: steps between updates. begin, end: pruning happens at the steps
            begin + every, begin + 2 every, ... up to `end`, counted from 1. until: drop and grow goes on until this
            step.

    Raises:
        ValueError: a value out of its range, or no update between `begin` and `end`.
    """

    def __call__(self, step: int) -> float:
        """The sparsity at `step`."""
        x = self._progress(step)
        return self.sparsity if x == 1 else 1 - (1 - self.sparsity) ** x


@dataclass(frozen=True)
class CosineDrop:
    """The drop fraction alpha / 2 (1 + cos(pi step / end)) of RigL, 0 from `end` on.

    Args:
        drop_fraction: alpha, in [0, 1]. end: in steps.

    Raises:
        ValueError: a value out of its range.
    """

    drop_fraction: float
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.drop_fraction <= 1:
            raise ValueError(f"drop_fraction must lie in [0, 1], got {self.drop_fraction}")
        if self.end < 1:
            raise ValueError(f"end must be at least 1 step, got {self.end}")

    def is_update_step(self, step: int) -> bool:
        """Whether anything is dropped at this step."""
        return step < self.end

    def __call__(self, step: int) -> float:
        """The drop fraction at `step`."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(step, self.end) / self.end))


Schedule = ConstantSparsity | PolynomialSparsity | ExponentialSparsity

SCHEDULES: dict[str, type[Schedule]] = {
    "constant": ConstantSparsity,
    "polynomial": PolynomialSparsity,
    "exponential": ExponentialSparsity,
}


def make_schedule(
    schedule: str | Schedule,
    sparsity: float,
    total_steps: int,
    update_every: int,
    prune_until: float,
    update_until: float,
) -> Schedule:
    """The schedule of a name, for the options of a `RankPruner`, or a schedule object as it is.

    Raises:
        ValueError: an unknown name, an object that contradicts `sparsity` or `total_steps`, fractions outside (0, 1],
            or no room for one update. TypeError: steps that are not whole.
    """
    _check_whole("total_steps", total_steps)
    _check_whole("update_every", update_every)
    if not isinstance(schedule, str):
        if schedule.sparsity != sparsity:
            raise ValueError(f"sparsity={sparsity} contradicts the schedule's {schedule.sparsity}")
        if schedule.end > total_steps:
            raise ValueError(f"the schedule ends at step {schedule.end}, after total_steps={total_steps}")
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {tuple(SCHEDULES)} or a schedule object, got {schedule!r}")
    if not 0 < prune_until <= 1 or not 0 < update_until <= 1:
        raise ValueError(f"prune_until and update_until must lie in (0, 1], got {prune_until} and {update_until}")
    option, share = ("update_until", update_until) if schedule == "constant" else ("prune_until", prune_until)
    end = int(share * total_steps)
    if end < update_every:
        raise ValueError(
            f"total_steps={total_steps} is too short: pruning ends at step {end} ({option}={share}), "
            f"before the first update at step {update_every}: pass a smaller update_every"
        )
    return SCHEDULES[schedule](sparsity=sparsity, every=update_every, end=end, until=int(update_until * total_steps))
