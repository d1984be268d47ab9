"""Contestants side by side. Each runs once and their results are compared; then they run in turn, round by round, so
that whatever else the machine does slows all of them alike. pytest-benchmark is told the recorded times."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from benchmarks.rates import Rates
from benchmarks.work import Work

SLOW_S = 20.0  # what takes longer runs once
STAGE_S = 330.0  # no contestant is begun later than this after the stage, which is killed after 470 s
LAP_S = 0.02  # shorter calls are repeated within a lap
RACE_S = 30.0  # a race stops after the round that passes this, not before MIN_ROUNDS nor after MAX_ROUNDS
MIN_ROUNDS, MAX_ROUNDS = 3, 15
SHARE = 1 / 3  # of a race's seconds, after which a contestant rests, but not before it has run once more
GRAPH = ", CUDA graph"


@dataclass(frozen=True)
class Contestant:
    """One way of doing the same thing.

    Attributes:
        run: what is timed.
        outcome: `run`'s return value -> what the race's `agree` compares; None for a bound that computes nothing.
        reset: puts the starting state back in place, untimed; before the first run, and before every run if `fresh`.
        graph: on CUDA, also race the replay of a captured graph.
        setting: the options chosen, for the table.
        compiles: the first run compiles, so the second one tells how long a run takes. Ours do on CUDA.
        calls: how often `run` does the job; times are those of one.
        work: what the job costs, asked for when the contestant has run.
        missing: why it does not run at all; empty if it does.
        mean_of: {contestant: calls in a period} of one that does not run: its times are the weighted mean of theirs,
            round by round; those that ran in fewer rounds count with their median.
    """

    name: str
    run: Callable[[], Any] = lambda: None
    outcome: Callable[[Any], Any] | None = None
    reset: Callable[[], None] | None = None
    fresh: bool = False
    graph: bool = False
    setting: str = ""
    compiles: bool = False
    calls: int = 1
    work: Callable[[], Work] | None = None
    missing: str = ""
    mean_of: Mapping[str, int] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.name.startswith("rpg_fast")


class RecordedClock:
    """A timer for pytest-benchmark that shows the recorded times."""

    def __init__(self) -> None:
        self._now, self._laps = 0.0, iter(())

    def now(self) -> float:
        return self._now

    def wind(self, laps: Iterable[float]) -> None:
        self._now, self._laps = 0.0, iter(laps)

    def advance(self) -> None:
        self._now += next(self._laps, 0.0)


CLOCK = RecordedClock()


def entries(names: Sequence[str], graphs: Sequence[str] = ()) -> list[str]:
    """The names to parametrise a test with: on CUDA, those in `graphs` once more as captured graphs."""
    return [*names, *(name + GRAPH for name in graphs if torch.cuda.is_available())]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def lap(contestant: Contestant, repeats: int = 1) -> tuple[float, Any]:
    """Seconds per call, and what the last run returned."""
    if contestant.fresh and contestant.reset:
        contestant.reset()
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        result = contestant.run()
    synchronise()
    return (time.perf_counter() - start) / (repeats * contestant.calls), result


def fastest(*candidates: Contestant) -> Contestant:
    """The candidate with the best of three laps: a peer races with the setting that suits it best."""
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda candidate: min(lap(candidate)[0] for _ in range(3)))


class Race:
    """Contestants for one job, run when the first of them is reported.

    Args:
        title: group in pytest-benchmark's table.
        contestants: in any order. Ours run first and peers that compile last.
        agree: {name: outcome} -> {name: {measure: value}} for the report; the measure "wrong" says in words what is
            wrong with a result: its test fails when its time is recorded, and there are no ratios.
        full: False runs everything once, for the comparison of results alone.
        rates: ceilings of the device, for the shares of them that contestants with `work` reach.
        seconds: about how long the rounds last.
        slow: a contestant that takes more seconds runs once.
        details: more facts for every row of the report.
        baseline: the contestant to whose time the others add: `overhead`, the fraction that they do, is in their facts;
            the median of the rounds, or of the times where one of them rested.
        began: time.monotonic() at the beginning of a stage that must end: who has not begun STAGE_S later is missing,
            and who takes more than a tenth of `slow` then runs once. None: there is time for everyone.

    A peer that raises is left out, as is whoever runs out of memory; `missing`, in every row's facts, tells why.
    """

    def __init__(
        self,
        title: str,
        contestants: Sequence[Contestant],
        agree: Callable[[dict[str, Any]], dict[str, dict[str, Any]]],
        *,
        full: bool,
        rates: Rates | None = None,
        seconds: float = RACE_S,
        slow: float = SLOW_S,
        details: dict[str, Any] | None = None,
        began: float | None = None,
        baseline: str = "",
    ):
        self.title, self.contestants, self.agree, self.full = title, list(contestants), agree, full
        self.rates, self.seconds, self.slow, self.details = rates, seconds, slow, details or {}
        self.began, self.baseline = began, baseline
        self.laps: dict[str, list[float]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}

    def report(self, name: str, benchmark: Any) -> None:
        """Hands the times of `name` to pytest-benchmark; the first call runs the race and lets go of its tensors."""
        if self.contestants:
            contestants, self.contestants = self.contestants, []
            self._run(contestants)
        if name in self.missing:
            pytest.skip(f"{name}: {self.missing[name]}")
        if not self.laps:
            pytest.fail("the race broke off, see the first of these tests")
        benchmark.group = self.title
        benchmark.extra_info.update(self.facts[name])
        CLOCK.wind(self.laps[name])
        benchmark.pedantic(CLOCK.advance, rounds=len(self.laps[name]))
        if wrong := self.facts[name].get("wrong"):
            pytest.fail(f"{name}: {wrong}")

    def _run(self, contestants: list[Contestant]) -> None:
        means = [c for c in contestants if c.mean_of]
        contestants = [c for c in contestants if not c.mean_of]
        self.missing |= {c.name: c.missing for c in contestants if c.missing}
        contestants = [c for c in contestants if not c.missing]
        contestants = sorted([*contestants, *self._captured(contestants)], key=lambda c: (not c.ours, c.compiles))
        outcomes: dict[str, Any] = {}
        expected: dict[str, float] = {}
        peaks: dict[str, int] = {}
        for c in contestants:
            if late := self._late():
                self.missing[c.name] = late
                continue
            try:
                expected[c.name], peaks[c.name] = self._first(c, outcomes)
            except Exception as error:  # whatever a peer raises is its result
                if not self.full or (c.ours and not isinstance(error, torch.OutOfMemoryError)):
                    raise
                self.missing[c.name] = _reason(error)
                outcomes.pop(c.name, None)
        contestants = [c for c in contestants if c.name in expected]
        if self._late():  # rounds of slow ones would not end in time
            self.slow /= 10
        measures = self.agree(outcomes)
        del outcomes
        laps = {name: [seconds] for name, seconds in expected.items()}
        if self.full:
            laps |= take_turns([c for c in contestants if expected[c.name] <= self.slow], expected, self.seconds)
        for mean in means:
            self._add_mean(mean, laps, measures, peaks)
        contestants += [mean for mean in means if mean.name in laps]
        parts = {name for mean in means for name in mean.mean_of}
        for c in contestants:
            facts = measures.get(c.name, {}) | self._facts(c, contestants, laps, measures) | {"part": c.name in parts}
            self.facts[c.name] = facts | ({"peak_bytes": peaks[c.name]} if peaks[c.name] else {})
        self.laps = laps

    def _add_mean(
        self,
        mean: Contestant,
        laps: dict[str, list[float]],
        measures: dict[str, dict[str, Any]],
        peaks: dict[str, int],
    ) -> None:
        """The laps of one that does not run, and what is wrong with its parts."""
        if absent := [name for name in mean.mean_of if name not in laps]:
            self.missing[mean.name] = f"{absent[0]}: {self.missing.get(absent[0], 'has not run')}"
            return
        laps[mean.name] = weighted_mean([(calls, laps[name]) for name, calls in mean.mean_of.items()])
        peaks[mean.name] = max(peaks[name] for name in mean.mean_of)
        wrong = [f"{name}: {text}" for name in mean.mean_of if (text := measures.get(name, {}).get("wrong"))]
        if wrong:
            measures[mean.name] = {"wrong": "; ".join(wrong)}

    def _late(self) -> str:
        """Why nobody may begin any more; empty if there is time."""
        elapsed = 0.0 if self.began is None else time.monotonic() - self.began
        return f"{elapsed:.0f} s since the stage began, {STAGE_S:.0f} s are given" if elapsed > STAGE_S else ""

    def _first(self, contestant: Contestant, outcomes: dict[str, Any]) -> tuple[float, int]:
        """Adds to `outcomes`; seconds of a run, and the device memory that one takes beside its inputs."""
        if contestant.reset:
            contestant.reset()
        before = _start_peak()
        seconds, result = lap(contestant)
        peak = _end_peak(before)
        if contestant.outcome is not None:
            outcomes[contestant.name] = contestant.outcome(result)
        del result
        compiled = contestant.compiles or (contestant.ours and torch.cuda.is_available())
        if self.full and (compiled or seconds < self.slow / 10):  # the second run is the first without a warm-up
            seconds = lap(contestant)[0]
        return seconds, peak

    def _facts(
        self,
        mine: Contestant,
        contestants: list[Contestant],
        laps: dict[str, list[float]],
        measures: dict[str, dict[str, Any]],
    ) -> dict[str, Any]:
        wrong = {name for name, found in measures.items() if found.get("wrong")}
        median = statistics.median(laps[mine.name])
        facts = self.details | {
            "contestant": mine.name,
            "setting": mine.setting,
            "calls": mine.calls,
            "role": self._role(mine),
            "slow_ran_once": self.full and laps[mine.name][0] > self.slow,
            "missing": self.missing,
        }
        if mine.mean_of:
            facts["mean_of"] = dict(mine.mean_of)
        if self.baseline in laps and mine.name != self.baseline:
            facts["overhead"] = overhead(laps[mine.name], laps[self.baseline])
        if mine.ours:
            facts["times_faster_than"] = {
                c.name: statistics.median(laps[c.name]) / median
                for c in contestants
                if not c.ours and not wrong & {c.name, mine.name}
            }
        if mine.work and self.rates:
            facts |= mine.work().facts(median, self.rates)
        return facts

    def _role(self, contestant: Contestant) -> str:
        if contestant.ours:
            return "ours"
        computes = contestant.outcome or contestant.mean_of
        return "peer" if computes and contestant.name != self.baseline else "bound"

    def _captured(self, contestants: list[Contestant]) -> Iterator[Contestant]:
        """A captured copy of every contestant that asks for one; `missing` says why another has none."""
        for contestant in [c for c in contestants if c.graph and torch.cuda.is_available()]:
            name = contestant.name + GRAPH
            graph = torch.cuda.CUDAGraph()
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        contestant.run()
                torch.cuda.current_stream().wait_stream(side)
                with torch.cuda.graph(graph):
                    result = contestant.run()
            except RuntimeError as error:
                self.missing[name] = f"no CUDA graph: {_reason(error)}"
            else:
                yield replace(contestant, name=name, run=_replay(graph, result), graph=False)


@dataclass
class Pace:
    """What races along a curve have taken so far, to tell who would take too long at the next point. The cost of a
    point grows by no more than anybody's time does where the device is busy."""

    began: float = field(default_factory=time.monotonic)
    seconds_per_cost: dict[str, tuple[float, str]] = field(default_factory=dict)

    def missing(self, name: str, cost: float, budget: float) -> str:
        """Why a contestant is left out at a point of this cost; empty if it is not."""
        rate, where = self.seconds_per_cost.get(name, (0.0, ""))
        if rate * cost <= budget:
            return ""
        return f"expected to take more than {rate * cost:.3g} s, by {where}; a call has {budget:g} s"

    def learn(self, race: Race, cost: float) -> None:
        for name, laps in race.laps.items():
            self.seconds_per_cost[name] = (min(laps) / cost, race.title)


def weighted_mean(parts: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """(weight, seconds of every round) -> the mean in every round of the part that ran in most of them."""
    rounds = max(len(laps) for _, laps in parts)
    full = [(weight, laps if len(laps) == rounds else [statistics.median(laps)] * rounds) for weight, laps in parts]
    total = sum(weight for weight, _ in parts)
    return [sum(weight * laps[i] for weight, laps in full) / total for i in range(rounds)]


def overhead(mine: Sequence[float], baseline: Sequence[float]) -> float:
    """What `mine` takes more, as a fraction."""
    if len(mine) != len(baseline):
        return statistics.median(mine) / statistics.median(baseline) - 1
    return statistics.median(a / b for a, b in zip(mine, baseline, strict=True)) - 1


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _start_peak() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _end_peak(before: int) -> int:
    return torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0


def take_turns(
    contestants: Sequence[Contestant], expected: dict[str, float], seconds: float = RACE_S
) -> dict[str, list[float]]:
    """Seconds of every round, each round in another order; `expected` tells how often a lap repeats a short call."""
    repeats = {c.name: 1 if c.fresh else math.ceil(LAP_S / (expected[c.name] * c.calls)) for c in contestants}
    laps: dict[str, list[float]] = {c.name: [] for c in contestants}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            if turn >= MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            first = turn % max(1, len(contestants))
            for contestant in [*contestants[first:], *contestants[:first]]:
                name, calls = contestant.name, repeats[contestant.name] * contestant.calls
                if calls * sum(laps[name]) <= SHARE * seconds:
                    laps[name].append(lap(contestant, repeats[name])[0])
    finally:
        gc.enable()
    return laps


def _replay(graph: torch.cuda.CUDAGraph, result: Any) -> Callable[[], Any]:
    def run() -> Any:
        graph.replay()
        return result

    return run
