"""Races: who is left out and why, which lap counts, what work amounts to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import race as racing
from benchmarks.race import Contestant, Pace, Race, overhead, weighted_mean
from benchmarks.rates import Rates
from benchmarks.work import Work, eigendecomposition, power, published


def contestant(name: str, run: Callable[[], Any] = lambda: 1, **options: Any) -> Contestant:
    return Contestant(name, run, outcome=lambda result: result, **options)


def ran(*contestants: Contestant, full: bool = True, **options: Any) -> Race:
    race = Race("a job", contestants, lambda outcomes: {name: {} for name in outcomes}, full=full, **options)
    race._run(race.contestants)
    return race


def fail() -> None:
    raise ValueError("no algorithm\nand more")


def test_a_peer_that_raises_is_left_out_with_its_reason() -> None:
    race = ran(contestant("a peer"), contestant("another", fail), contestant("rpg_fast.thing"), seconds=0.0)
    assert race.missing == {"another": "ValueError: no algorithm"}
    assert set(race.laps) == {"a peer", "rpg_fast.thing"}
    assert race.facts["a peer"]["missing"] == race.missing
    assert set(race.facts["rpg_fast.thing"]["times_faster_than"]) == {"a peer"}


def test_ours_must_not_raise_nor_anyone_in_a_small_run() -> None:
    with pytest.raises(ValueError, match="no algorithm"):
        ran(contestant("a peer"), contestant("rpg_fast.thing", fail))
    with pytest.raises(ValueError, match="no algorithm"):
        ran(contestant("a peer", fail), full=False)


def test_who_is_missing_from_the_start_does_not_run() -> None:
    race = ran(contestant("a peer"), contestant("slow", fail, missing="would take an hour"), seconds=0.0)
    assert race.missing == {"slow": "would take an hour"}


def test_slow_ones_run_once_and_compilation_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"slow": iter([30.0]), "compiled": iter([50.0, 0.5, 0.5, 0.5, 0.5]), "quick": iter([0.5] * 5)}
    monkeypatch.setattr(racing, "lap", lambda contestant, repeats=1: (next(times[contestant.name]), None))
    race = ran(contestant("slow"), contestant("compiled", compiles=True), contestant("quick"), seconds=0.0)
    assert race.laps["slow"] == [30.0]
    assert race.facts["slow"]["slow_ran_once"]
    assert race.laps["compiled"] == race.laps["quick"] == [0.5]  # one lap is more than their share of no time
    assert not race.facts["compiled"]["slow_ran_once"]


def test_ours_run_first_and_nobody_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def timed(contestant: Contestant, repeats: int = 1) -> tuple[float, None]:
        order.append(contestant.name)
        now[0] += 160.0
        return 15.0, None

    monkeypatch.setattr(racing, "lap", timed)
    monkeypatch.setattr(racing.time, "monotonic", lambda: now[0])
    everyone = [contestant("compiled", compiles=True), contestant("a peer"), contestant("another")]
    race = ran(*everyone, contestant("rpg_fast.thing"), began=-20.0, seconds=0.0)
    assert order == ["rpg_fast.thing", "a peer"]  # each once: rounds would come too late
    assert race.missing == dict.fromkeys(("another", "compiled"), "340 s since the stage began, 330 s are given")
    assert race.laps == {"rpg_fast.thing": [15.0], "a peer": [15.0]}
    assert race.facts["a peer"]["slow_ran_once"]
    assert race.facts["rpg_fast.thing"]["missing"] == race.missing


class Recorder:
    """What a race hands to pytest-benchmark."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.rounds = "", {}, 0

    def pedantic(self, run: Callable[[], Any], rounds: int) -> None:
        self.rounds = rounds


def test_who_is_wrong_is_timed_without_ratios_and_fails() -> None:
    """The others' times and ratios stay."""

    def agree(outcomes: dict[str, int]) -> dict[str, dict[str, Any]]:
        return {
            name: {"error": 0.5, "wrong": "off by half"} if got == 2 else {"error": 0.0}
            for name, got in outcomes.items()
        }

    entrants = [contestant("a peer"), contestant("another", lambda: 2), contestant("rpg_fast.thing")]
    race = Race("a job", entrants, agree, full=True, seconds=0.0)
    right, wrong = Recorder(), Recorder()
    race.report("rpg_fast.thing", right)
    assert set(right.extra_info["times_faster_than"]) == {"a peer"}
    with pytest.raises(pytest.fail.Exception, match="another: off by half"):
        race.report("another", wrong)
    assert wrong.rounds == len(race.laps["another"]) > 0
    assert (wrong.extra_info["error"], wrong.extra_info["wrong"]) == (0.5, "off by half")
    entrants = [contestant("a peer"), contestant("rpg_fast.thing", lambda: 2)]
    race = Race("a job", entrants, agree, full=True, seconds=0.0)
    race.report("a peer", right)
    assert race.facts["rpg_fast.thing"]["times_faster_than"] == {}


def test_a_mean_of_contestants_over_a_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"step": 2.0, "update": 12.0, "rpg_fast: step": 1.0, "rpg_fast: update": 3.0, "dense": 0.5}
    monkeypatch.setattr(racing, "lap", lambda contestant, repeats=1: (times[contestant.name], None))
    entrants = [contestant(name) for name in times]
    entrants.append(Contestant("published", mean_of={"step": 9, "update": 1}))
    entrants.append(Contestant("rpg_fast", mean_of={"rpg_fast: step": 9, "rpg_fast: update": 1}))
    entrants.append(Contestant("never", mean_of={"step": 9, "nobody": 1}))
    race = ran(*entrants, seconds=0.0, baseline="dense")
    assert race.laps["published"] == [3.0]
    assert race.laps["rpg_fast"] == [1.2]
    assert race.facts["published"]["overhead"] == 5.0
    assert race.facts["rpg_fast"]["times_faster_than"]["published"] == 2.5
    assert race.missing == {"never": "nobody: has not run"}
    roles = {name: (facts["role"], facts["part"]) for name, facts in race.facts.items()}
    assert roles["published"] == ("peer", False)
    assert roles["rpg_fast: step"] == ("ours", True)
    assert roles["dense"] == ("bound", False)
    assert "overhead" not in race.facts["dense"]


def test_what_is_wrong_with_a_part_is_wrong_with_the_mean() -> None:
    def agree(outcomes: dict[str, int]) -> dict[str, dict[str, Any]]:
        return {"step": {"wrong": "off"}}

    entrants = [contestant("step"), contestant("update"), Contestant("all", mean_of={"step": 1, "update": 1})]
    race = Race("a job", entrants, agree, full=True, seconds=0.0)
    race._run(race.contestants)
    assert race.facts["all"]["wrong"] == "step: off"


def test_weighted_mean_round_by_round() -> None:
    assert weighted_mean([(3, [1.0, 2.0, 3.0]), (1, [5.0, 9.0])]) == [2.5, 3.25, 4.0]  # of the second, 7.0 each time


def test_overhead_is_that_of_the_rounds() -> None:
    assert overhead([1.1, 2.2, 5.0], [1.0, 2.0, 4.0]) == pytest.approx(0.1)
    assert overhead([1.1, 2.2, 5.0], [1.0, 2.0]) == pytest.approx(2.2 / 1.5 - 1)


def test_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(racing.time, "perf_counter", lambda: float(next(ticks)))
    assert racing.lap(contestant("a peer", calls=4))[0] == 0.25


def test_pace() -> None:
    race = ran(contestant("a peer"), seconds=0.0)
    race.laps["a peer"] = [3.0, 2.0]
    pace = Pace()
    assert pace.missing("a peer", 1e9, 1.0) == ""
    pace.learn(race, 10.0)
    assert pace.missing("a peer", 40.0, 9.0) == ""
    assert pace.missing("a peer", 50.0, 9.0) == "expected to take more than 10 s, by a job; a call has 9 s"


def test_work_is_a_share_of_the_ceilings() -> None:
    rates = Rates(copy=1e3, matrix={"fp16": 1e6, "fp32": 1e5})
    facts = Work({"fp16": 1e6, "fp32": 1e5}, 500.0).facts(4.0, rates)
    assert facts["of_matrix_rate"] == 0.5
    assert facts["of_copy_rate"] == 0.125
    assert (facts["bound_s"], facts["bound_by"], facts["arithmetic"]) == (2.0, "matrix rate", "fp16")
    assert Work({"fp16": 1.0}, 500.0).facts(1.0, rates)["bound_by"] == "copy bandwidth"


def test_work_of_the_methods() -> None:
    m, n = 128, 512
    direct = eigendecomposition([(m, n)], solver="fp64")
    assert direct.flops == {"fp64": m * m * n + 10 * m**3, "fp32": 2 * m * m * n}
    assert direct.bytes == 4 * 4 * m * n  # weights twice, gradients read and written
    filtered = power([(m, n)], [6])
    assert filtered.flops == {"fp16": 3 * (3 * m * m * n + 20 * m**3 + 4 * 2 * m * m * 32)}
    fast = power([(m, n)], [6], fast=True)
    assert filtered.flops["fp16"] - fast.flops["fp16"] == 2 * 2 * m * m * n
    assert power([(64, n)], [6]).flops == {"fp16": 3 * 3 * 64 * 64 * n}
    assert published([(m, n)]).flops["fp32"] > direct.flops["fp64"]
