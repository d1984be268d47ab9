"""Contestants side by side. Each runs once and their results are compared; then they run in turn, round by round, so
that whatever else the machine does slows all of them alike. pytest-benchmark is told the recorded times."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

SLOW_S = 20.0  # what takes longer runs once
LAP_S = 0.02  # shorter calls are repeated within a lap
RACE_S = 30.0  # a race stops after the round that passes this, not before MIN_ROUNDS nor after MAX_ROUNDS
MIN_ROUNDS, MAX_ROUNDS = 3, 15
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
    """

    name: str
    run: Callable[[], Any]
    outcome: Callable[[Any], Any] | None = None
    reset: Callable[[], None] | None = None
    fresh: bool = False
    graph: bool = False
    setting: str = ""

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
    """Seconds per run, and what the last run returned."""
    if contestant.fresh and contestant.reset:
        contestant.reset()
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        result = contestant.run()
    synchronise()
    return (time.perf_counter() - start) / repeats, result


def fastest(*candidates: Contestant) -> Contestant:
    """The candidate with the best of three laps: a peer races with the setting that suits it best."""
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda candidate: min(lap(candidate)[0] for _ in range(3)))


class Race:
    """Contestants for one job, run when the first of them is reported.

    Args:
        title: the group in pytest-benchmark's table.
        contestants: peers first.
        agree: {name: outcome} -> {name: {measure: value}} for the report; raises AssertionError where results differ.
        full: False runs everything once, for the comparison of results alone.
    """

    def __init__(
        self,
        title: str,
        contestants: Sequence[Contestant],
        agree: Callable[[dict[str, Any]], dict[str, dict[str, float]]],
        *,
        full: bool,
    ):
        self.title, self.contestants, self.agree, self.full = title, list(contestants), agree, full
        self.laps: dict[str, list[float]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.not_capturable: dict[str, str] = {}

    def report(self, name: str, benchmark: Any) -> None:
        """Hands the times of `name` to pytest-benchmark; the first call runs the race and lets go of its tensors."""
        if self.contestants:
            contestants, self.contestants = self.contestants, []
            self._run(contestants)
        if not self.laps:
            pytest.fail("the race broke off, see the first of these tests")
        if name in self.not_capturable:
            pytest.skip(f"no CUDA graph: {self.not_capturable[name]}")
        benchmark.group = self.title
        benchmark.extra_info.update(self.facts[name])
        CLOCK.wind(self.laps[name])
        benchmark.pedantic(CLOCK.advance, rounds=len(self.laps[name]))

    def _run(self, contestants: list[Contestant]) -> None:
        contestants = [*contestants, *self._captured(contestants)]
        outcomes, first = {}, {}
        for contestant in contestants:
            if contestant.reset:
                contestant.reset()
            first[contestant.name], result = lap(contestant)
            if contestant.outcome is not None:
                outcomes[contestant.name] = contestant.outcome(result)
            del result
        measures = self.agree(outcomes)
        del outcomes
        laps = {name: [seconds] for name, seconds in first.items()}
        if self.full:
            laps |= take_turns([c for c in contestants if first[c.name] <= SLOW_S], first)
        for c in contestants:
            self.facts[c.name] = measures.get(c.name, {}) | self._facts(c, contestants, laps)
        self.laps = laps

    def _facts(self, mine: Contestant, contestants: list[Contestant], laps: dict[str, list[float]]) -> dict[str, Any]:
        facts = {
            "contestant": mine.name,
            "setting": mine.setting,
            "role": "ours" if mine.ours else "peer" if mine.outcome else "bound",
            "slow_ran_once": self.full and laps[mine.name][0] > SLOW_S,
        }
        if mine.ours:
            median = statistics.median(laps[mine.name])
            facts["times_faster_than"] = {
                c.name: statistics.median(laps[c.name]) / median for c in contestants if not c.ours
            }
        return facts

    def _captured(self, contestants: list[Contestant]) -> Iterator[Contestant]:
        """A captured copy of every contestant that asks for one; `not_capturable` says why another has none."""
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
                self.not_capturable[name] = str(error).splitlines()[0]
            else:
                yield replace(contestant, name=name, run=_replay(graph, result), graph=False)


def take_turns(contestants: Sequence[Contestant], expected: dict[str, float]) -> dict[str, list[float]]:
    """Seconds of every round, each round in another order; `expected` tells how often a lap repeats a short call."""
    repeats = {c.name: 1 if c.fresh else math.ceil(LAP_S / expected[c.name]) for c in contestants}
    laps: dict[str, list[float]] = {c.name: [] for c in contestants}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            if turn >= MIN_ROUNDS and time.perf_counter() - start > RACE_S:
                break
            first = turn % max(1, len(contestants))
            for contestant in [*contestants[first:], *contestants[:first]]:
                laps[contestant.name].append(lap(contestant, repeats[contestant.name])[0])
    finally:
        gc.enable()
    return laps


def _replay(graph: torch.cuda.CUDAGraph, result: Any) -> Callable[[], Any]:
    def run() -> Any:
        graph.replay()
        return result

    return run
