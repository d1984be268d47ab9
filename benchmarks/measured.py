"""The JSON of ``pytest benchmarks --benchmark-only --benchmark-json=...``, read for tables and pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# How titles begin, in reading order.
ORDER = ("rank loss", "masked step", "topology", "training step", "memory", "svd_lowrank", "growth")
FP32_GRADE = 3e-4  # relative error of a gradient


@dataclass(frozen=True)
class Row:
    """One contestant's times in seconds, and what else is known about it."""

    name: str
    role: str  # ours | peer | bound
    setting: str
    median: float
    least: float
    most: float
    rounds: int
    once: bool
    faster: dict[str, float]  # how much slower its peers were
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def wrong(self) -> str:
        """What is wrong with its result; empty if nothing is."""
        return str(self.facts.get("wrong", ""))

    @property
    def representative(self) -> bool:
        """Whether it does the whole job, as well as others do."""
        good = not (self.facts.get("inaccurate", False) or self.wrong)
        if self.role == "ours":
            good = good and self.facts.get("gradient_error", 0.0) <= FP32_GRADE
        return good and self.facts.get("calls", 1) == 1


@dataclass(frozen=True)
class Results:
    """What was measured, and on what."""

    word: str  # the name of the file, or of its folder
    machine: dict[str, Any]
    groups: dict[str, list[Row]]  # title of a race -> its rows, in the order in which they ran
    missing: dict[str, dict[str, str]]  # title -> contestant -> why it has no time

    def titles(self, start: str) -> list[str]:
        return [title for title in self.groups if title.startswith(start)]

    def races(self) -> dict[str, list[Row]]:
        """The groups that compare the speed of ways to do one job, without those that do a part of it; growth, errors
        and memory have tables and pictures of their own."""
        others = {*self.titles("growth, "), *self.titles("rank loss, error"), *self.titles("memory")}
        whole = {title: [r for r in rows if not r.facts.get("part")] for title, rows in self.groups.items()}
        return {title: rows for title, rows in whole.items() if title not in others}

    def footer(self) -> str:
        rounds = sorted({row.rounds for rows in self.groups.values() for row in rows if not row.once})
        times = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else str(rounds[0] if rounds else 1)
        load, machine = self.machine["load_before"], self.machine
        busy = f", on a machine busy with other work (load {load:.0f})" if load > 0.5 * machine["cpu_cores"] else ""
        cuda = f", CUDA {machine['torch_cuda']}" if machine["kind"] == "cuda" else f", {machine['threads']} threads"
        return (
            f"{machine['device']}{cuda}, torch {machine['torch']}, Python {machine['python']}, "
            f"commit {machine['commit'][:10]}. Medians of {times} rounds in which the contestants take turns{busy}."
        )


def read(path: Path) -> Results:
    """One file, or all JSON files of benchmarks in a folder.

    Raises:
        ValueError: a file does not come from these benchmarks, or there is none.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    contents = {file: json.loads(file.read_text()) for file in files}
    if path.is_dir():  # beside them lie other results
        contents = {file: content for file, content in contents.items() if "benchmarks" in content}
    groups: dict[str, list[Row]] = {}
    missing: dict[str, dict[str, str]] = {}
    for file, content in contents.items():
        for entry in content.get("benchmarks", ()):
            facts = entry["extra_info"]
            if "contestant" not in facts:
                raise ValueError(f"{file}: {entry['name']} is none of these benchmarks: it names no contestant")
            groups.setdefault(entry["group"], []).append(_row(entry["stats"], facts))
            missing.setdefault(entry["group"], {}).update(facts.get("missing", {}))
        for title, reason in content.get("machine_info", {}).get("not_measured", {}).items():
            missing.setdefault(title, {})["everyone"] = reason
    if not groups:
        raise ValueError(f"{path} holds no benchmarks")
    known = [title for start in ORDER for title in groups if title.startswith(start)]
    ordered = {title: groups[title] for title in [*known, *(t for t in groups if t not in known)]}
    return Results(path.stem, _machine(list(contents.values())), ordered, missing)


def _row(stats: dict[str, Any], facts: dict[str, Any]) -> Row:
    return Row(
        facts["contestant"],
        facts["role"],
        facts["setting"],
        stats["median"],
        stats["min"],
        stats["max"],
        stats["rounds"],
        facts["slow_ran_once"],
        facts.get("times_faster_than", {}),
        facts,
    )


def _machine(contents: list[dict[str, Any]]) -> dict[str, Any]:
    first = contents[0]
    machine = dict(first["machine_info"])
    commit = first.get("environment", machine).get("commit") or first["commit_info"]["id"]
    rates = [content["machine_info"]["rates"] for content in contents if content["machine_info"].get("rates")]
    return machine | {"commit": commit, "rates": rates[0] if rates else None}


def seconds(value: float) -> str:
    """Two to three digits with a unit that suits."""
    return scaled(value, {"s": 1.0, "ms": 1e-3, "us": 1e-6})


def scaled(value: float, units: dict[str, float]) -> str:
    """Two to three digits with the first unit that the value reaches, or the last."""
    for unit, size in units.items():
        if value >= 0.9995 * size or unit == [*units][-1]:
            break
    number = value / size
    return f"{number:.0f} {unit}" if number >= 99.5 else f"{number:.3g} {unit}"


def times(ratio: float) -> str:
    """Two digits: 0.91x, 8.7x, 9,800x."""
    return f"{float(f'{ratio:.2g}'):,.15g}x"
