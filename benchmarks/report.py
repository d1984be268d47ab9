"""Tables and pictures from the JSON of ``pytest benchmarks --benchmark-only --benchmark-json=cpu.json``.

    python benchmarks/report.py benchmarks/results/cpu.json [--readme README.md] [--images docs/images]

For each file: the table of all contestants beside it (cpu.md); a summary, a line a job, on standard output or, with
--readme, between ``<!-- bench:cpu -->`` and ``<!-- /bench -->`` there; a picture, <images>/bench_cpu.png. The word is
the name of the file, or of its folder where the file is called bench.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = {"ours": "#c2410c", "peer": "#475569", "bound": "#94a3b8"}
ORDER = ("rank loss", "masked step", "topology", "svd_lowrank")  # how the titles of the jobs begin, in reading order


@dataclass(frozen=True)
class Row:
    """One contestant's times in seconds, and how much slower its peers were."""

    name: str
    role: str  # ours | peer | bound
    setting: str
    median: float
    least: float
    most: float
    rounds: int
    once: bool
    faster: dict[str, float]


def read(path: Path) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """What was measured on, and the rows of each race in the order in which they ran.

    Raises:
        ValueError: the file does not come from these benchmarks.
    """
    content = json.loads(path.read_text())
    groups: dict[str, list[Row]] = {}
    for entry in content.get("benchmarks", ()):
        facts, stats = entry["extra_info"], entry["stats"]
        if "contestant" not in facts:
            raise ValueError(f"{path}: {entry['name']} is none of these benchmarks: it names no contestant")
        groups.setdefault(entry["group"], []).append(
            Row(
                facts["contestant"],
                facts["role"],
                facts["setting"],
                stats["median"],
                stats["min"],
                stats["max"],
                stats["rounds"],
                facts["slow_ran_once"],
                facts.get("times_faster_than", {}),
            )
        )
    if not groups:
        raise ValueError(f"{path} holds no benchmarks")
    known = [[title for title in groups if title.startswith(job)] for job in ORDER]
    first = [title for titles in known for title in titles]
    groups = {title: groups[title] for title in [*first, *(t for t in groups if t not in first)]}
    commit = content.get("environment", content["machine_info"]).get("commit") or content["commit_info"]["id"]
    return content["machine_info"] | {"commit": commit}, groups


def seconds(value: float) -> str:
    """Two to three digits with a unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= 0.9995 * size or unit == "us":
            break
    number = value / size
    return f"{number:.0f} {unit}" if number >= 99.5 else f"{number:.3g} {unit}"


def summary(machine: dict[str, Any], groups: dict[str, list[Row]]) -> str:
    """Markdown, a line a job: the usual way (the first peer), the fastest peer, the fastest of ours."""
    lines = ["| | usual way | best plain torch | rpg_fast | faster by |", "|---|---|---|---|---|"]
    for title, rows in groups.items():
        peers = [row for row in rows if row.role == "peer"]
        usual, best = peers[0], min(peers, key=lambda row: row.median)
        ours = min((row for row in rows if row.role == "ours"), key=lambda row: row.median)
        cells = [f"{row.name}: {seconds(row.median)}" for row in (usual, best)]
        ratios = f"**{ours.faster[usual.name]:.2g}x**, {ours.faster[best.name]:.2g}x"
        lines.append(f"| {title} | {' | '.join(cells)} | `{ours.name}`: **{seconds(ours.median)}** | {ratios} |")
    return "\n".join([*lines, "", footer(machine, groups)])


def table(machine: dict[str, Any], groups: dict[str, list[Row]]) -> str:
    """Markdown, a line a contestant: the median, the range, and how many times faster ours are, in their order."""
    lines = ["| | median | min to max | rpg_fast is faster by |", "|---|---|---|---|"]
    for title, rows in groups.items():
        ours = [row for row in rows if row.role == "ours"]
        lines.append(f"| **{title}** | | | |")
        for row in rows:
            detail = f" ({row.setting})" if row.setting else ""
            spread = "ran once" if row.once else f"{seconds(row.least)} to {seconds(row.most)}"
            if row.role == "ours":
                lines.append(f"| `{row.name}`{detail} | **{seconds(row.median)}** | {spread} | |")
            else:
                ratios = " / ".join(f"{mine.faster[row.name]:.2g}x" for mine in ours)
                lines.append(f"| {row.name}{detail} | {seconds(row.median)} | {spread} | {ratios} |")
    return "\n".join([*lines, "", footer(machine, groups)])


def footer(machine: dict[str, Any], groups: dict[str, list[Row]]) -> str:
    rounds = sorted({row.rounds for rows in groups.values() for row in rows if not row.once})
    times = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else str(rounds[0])
    load = machine["load_before"]
    busy = f", on a machine busy with other work (load {load:.0f})" if load > 0.5 * machine["cpu_cores"] else ""
    cuda = f", CUDA {machine['torch_cuda']}" if machine["kind"] == "cuda" else f", {machine['threads']} threads"
    return (
        f"{machine['device']}{cuda}, torch {machine['torch']}, Python {machine['python']}, "
        f"commit {machine['commit'][:10]}. Medians of {times} rounds in which the contestants take turns{busy}."
    )


def plot(machine: dict[str, Any], groups: dict[str, list[Row]], path: Path) -> None:
    """Times over the fastest of ours on one logarithmic axis, a panel a race: medians, ranges, and the time itself."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [len(rows) + 0.8 for rows in groups.values()]
    size = (9, 0.29 * sum(heights) + 1.1)
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[:, 0], groups.items(), strict=True):
        _panel(axis, title, rows)
    slowest = max(
        row.most / min(mine.median for mine in rows if mine.role == "ours") for rows in groups.values() for row in rows
    )
    axis.set_xscale("log")
    axis.set_xlim(right=3 * slowest)
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick < slowest * 1.5]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.spines["bottom"].set_visible(True)
    axis.tick_params(axis="x", length=3)
    axis.set_xlabel("time, as a multiple of rpg_fast's", fontsize=8.5)
    figure.suptitle(textwrap.fill(footer(machine, groups), 125), fontsize=7.5, color=COLOURS["peer"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axis: Any, title: str, rows: list[Row]) -> None:
    unit = min(row.median for row in rows if row.role == "ours")
    axis.axvline(1, color=COLOURS["ours"], alpha=0.25, linewidth=1)
    for y, row in enumerate(rows):
        colour = COLOURS[row.role]
        spread = [row.least / unit, row.most / unit]
        axis.plot(spread, [y, y], color=colour, alpha=0.35, linewidth=5, solid_capstyle="round")
        axis.plot(row.median / unit, y, "o", color=colour, markersize=6.5)
        label = seconds(row.median)
        if row.role != "ours":
            label += f"   {row.median / unit:.2g}x"
        axis.annotate(label, (spread[1], y), (9, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_color(COLOURS[row.role])
        tick.set_fontweight("bold" if row.role == "ours" else "normal")
    axis.set_ylim(len(rows) - 0.5, -0.6)
    axis.set_title(title, fontsize=9.5, loc="left", fontweight="bold", pad=3)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)


def insert(readme: str, word: str, text: str) -> str:
    """`readme` with `text` between the markers of `word`.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    between = re.compile(rf"(<!-- bench:{re.escape(word)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    replaced, count = between.subn(lambda match: f"{match[1]}{text}\n{match[2]}", readme)
    if count != 1:
        raise ValueError(f"wanted one pair of markers <!-- bench:{word} --> ... <!-- /bench -->, found {count}")
    return replaced


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and pictures from the benchmarks' JSON.")
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path, help="put the tables between the markers of this file")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder of the pictures")
    options = parser.parse_args(arguments)
    for path in options.json:
        try:
            machine, groups = read(path)
            word = path.parent.name if path.stem == "bench" else path.stem
            text = summary(machine, groups)
            if options.readme:
                options.readme.write_text(insert(options.readme.read_text(), word, text))
            else:
                print(text)
            path.with_suffix(".md").write_text(table(machine, groups) + "\n")
        except (OSError, ValueError) as error:
            print(f"report.py: {error}", file=sys.stderr)
            return 1
        plot(machine, groups, options.images / f"bench_{word}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
