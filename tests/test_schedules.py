"""Schedules: monotone, exact at the end, updates where they should be."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpg_fast import ConstantSparsity, CosineDrop, ExponentialSparsity, PolynomialSparsity

GROWING = (PolynomialSparsity, ExponentialSparsity)
Growing = PolynomialSparsity | ExponentialSparsity


@st.composite
def schedules(draw: st.DrawFn) -> Growing:
    every = draw(st.integers(1, 50))
    begin = draw(st.integers(0, 200))
    end = begin + every + draw(st.integers(0, 500))
    until = draw(st.none() | st.integers(0, 1000))
    sparsity = draw(st.floats(0, 0.9999))
    kind = draw(st.sampled_from(GROWING))
    return kind(sparsity=sparsity, every=every, begin=begin, end=end, until=until)


@given(schedules())
def test_growing_schedules(schedule: Growing) -> None:
    steps = range(schedule.end + 2 * schedule.every + 2)
    values = [schedule(step) for step in steps]
    assert values[0] == 0
    assert all(0 <= a <= b <= schedule.sparsity for a, b in itertools.pairwise(values))
    reached = schedule.begin + schedule.updates * schedule.every
    assert reached <= schedule.end < reached + schedule.every
    assert schedule(reached) == schedule.sparsity  # exactly, at the last pruning update
    assert schedule(10**9) == schedule.sparsity
    for a, b in itertools.pairwise(steps):
        if values[a] != values[b]:
            assert schedule.is_update_step(b)  # the sparsity changes at updates and nowhere else


@given(schedules())
def test_update_steps(schedule: Growing) -> None:
    horizon = max(schedule.end, schedule.until or 0) + 2 * schedule.every
    updates = [step for step in range(horizon) if schedule.is_update_step(step)]
    last = schedule.begin + schedule.updates * schedule.every
    until = max(last, schedule.until or 0)
    assert updates == list(range(schedule.begin + schedule.every, until + 1, schedule.every))
    assert schedule.last_update == updates[-1]
    assert last in updates


def test_exponential_values() -> None:
    """RPG's d^(n / U), of 10 updates at steps 100 to 1000."""
    schedule = ExponentialSparsity(sparsity=0.98, every=100, end=1000)
    for n in range(11):
        assert schedule(100 * n) == pytest.approx(1 - 0.02 ** (n / 10))
        assert schedule(100 * n + 99) == schedule(100 * n)


def test_polynomial_values() -> None:
    schedule = PolynomialSparsity(sparsity=0.8, every=10, begin=50, end=100)
    assert [schedule(50 + 10 * n) for n in range(6)] == pytest.approx([0.8 * (1 - (1 - n / 5) ** 3) for n in range(6)])
    linear = PolynomialSparsity(sparsity=0.8, every=10, end=100, power=1)
    assert linear(50) == pytest.approx(0.4)


def test_constant_is_there_from_the_start() -> None:
    schedule = ConstantSparsity(sparsity=0.9, every=10, end=100, until=150)
    assert {schedule(step) for step in range(200)} == {0.9}
    assert [step for step in range(200) if schedule.is_update_step(step)] == list(range(10, 151, 10))


@pytest.mark.parametrize("kind", [ConstantSparsity, PolynomialSparsity, ExponentialSparsity])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "sparsity must lie in"),
        ({"sparsity": float("nan")}, "sparsity must lie in"),
        ({"every": 0}, "every must be at least 1 step, got 0"),
        ({"begin": -1}, "no update fits"),
        ({"begin": 95}, "no update fits: begin=95, end=100, every=10"),
        ({"end": 9}, "no update fits"),
    ],
)
def test_bad_options(kind: type[Growing], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"sparsity": 0.9, "every": 10, "end": 100, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan")])
def test_bad_power(power: float) -> None:
    with pytest.raises(ValueError, match="power must be positive"):
        PolynomialSparsity(sparsity=0.9, every=10, end=100, power=power)


@given(st.floats(0, 1, allow_subnormal=False), st.integers(1, 500))
def test_cosine_drop(fraction: float, end: int) -> None:
    drop = CosineDrop(fraction, end)
    values = [drop(step) for step in range(end + 20)]
    assert values[0] == pytest.approx(fraction)
    assert all(0 <= b <= a <= fraction for a, b in itertools.pairwise(values))
    assert drop(end) == drop(end + 1000) == 0
    assert drop(end // 2) == pytest.approx(fraction / 2 * (1 + math.cos(math.pi * (end // 2) / end)))
    assert [drop.is_update_step(step) for step in (0, end - 1, end)] == [True, True, False]


def test_bad_drop() -> None:
    with pytest.raises(ValueError, match="drop_fraction must lie in"):
        CosineDrop(1.1, 10)
    with pytest.raises(ValueError, match="drop_fraction must lie in"):
        CosineDrop(float("nan"), 10)
    with pytest.raises(ValueError, match="end must be at least 1 step, got 0"):
        CosineDrop(0.3, 0)


def test_schedules_are_values() -> None:
    a = ExponentialSparsity(sparsity=0.9, every=10, end=100)
    assert a == ExponentialSparsity(sparsity=0.9, every=10, end=100)
    assert hash(a) == hash(dataclasses.replace(a))
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.sparsity = 0.5  # type: ignore[misc]
