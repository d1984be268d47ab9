"""Pictures of the benchmarks' results: races, growth with size, error against time, roofline."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measured import FP32_GRADE, Results, Row, scaled, seconds, times

COLOURS = {"ours": "#c2410c", "peer": "#475569", "bound": "#94a3b8"}
# Okabe and Ito's colours, which colour-blind eyes tell apart; markers and labels do, too.
PALETTE = {"ours": ("#d55e00", "#e69f00", "#cc79a7", "#7a1f00"), "peer": ("#0072b2", "#009e73", "#56b4e9", "#333333")}
MARKERS = {"ours": "osD*", "peer": "^vPX"}
RATES = {"PFLOP/s": 1e15, "TFLOP/s": 1e12, "GFLOP/s": 1e9, "MFLOP/s": 1e6}
WIDTH = 9  # inches: README's width at 100 dots an inch


def draw(results: Results, folder: Path) -> None:
    """Every picture for which there are results, as <folder>/<kind>_<word>.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"bench": races, "growth": growth, "error": error_against_time, "roofline": roofline}
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white"}
    for kind, picture in pictures.items():
        with pyplot.rc_context(style):
            figure = picture(results, pyplot)
            if figure is not None:
                _footer(figure, results)
                figure.savefig(folder / f"{kind}_{results.word}.png", dpi=150)
                pyplot.close(figure)


def _footer(figure: Any, results: Results) -> None:
    figure.supxlabel(textwrap.fill(results.footer(), 110), fontsize=7.5, color=COLOURS["peer"])


class Looks:
    """A colour and a marker for each contestant, the same in every panel of a picture."""

    def __init__(self, rows: Iterable[Row]):
        self._given: dict[str, tuple[str, str]] = {}
        used = {"ours": 0, "peer": 0}
        for row in rows:
            if row.name not in self._given and row.role in used:
                place = used[row.role]
                used[row.role] += 1
                palette, markers = PALETTE[row.role], MARKERS[row.role]
                self._given[row.name] = (palette[place % len(palette)], markers[place % len(markers)])

    def __call__(self, row: Row) -> dict[str, Any]:
        colour, marker = self._given[row.name]
        return {"color": colour, "marker": marker, "linestyle": "-" if row.role == "ours" else "--"}


# --------------------------------------------------------------------------------------------------------------- races


def races(results: Results, pyplot: Any) -> Any:
    """Times over the fastest of ours on one logarithmic axis, a panel a race: medians, ranges, and the time itself."""
    groups = {title: rows for title, rows in results.races().items() if any(row.role == "ours" for row in rows)}
    if not groups:
        return None
    heights = [len(rows) + 0.8 for rows in groups.values()]
    size = (WIDTH, 0.29 * sum(heights) + 1.1)
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[:, 0], groups.items(), strict=True):
        _race(axis, title, rows)
    ratios = [row.most / _unit(rows) for rows in groups.values() for row in rows]
    axis.set_xscale("log")
    axis.set_xlim(left=min(0.2, 0.5 * min(ratios)), right=3 * max(ratios))
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1e3, 1e4, 1e5) if tick < max(ratios) * 1.5]
    axis.set_xticks(ticks, [f"{tick:,g}x" for tick in ticks], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.spines["bottom"].set_visible(True)
    axis.tick_params(axis="x", length=3)
    axis.set_xlabel("time, as a multiple of rpg_fast's", fontsize=8.5)
    return figure


def _unit(rows: list[Row]) -> float:
    ours = [row for row in rows if row.role == "ours"]
    return min((row.median for row in ours if row.representative), default=ours[0].median)


def _race(axis: Any, title: str, rows: list[Row]) -> None:
    unit = _unit(rows)
    axis.axvline(1, color=COLOURS["ours"], alpha=0.25, linewidth=1)
    for y, row in enumerate(rows):
        colour = COLOURS[row.role]
        spread = [row.least / unit, row.most / unit]
        axis.plot(spread, [y, y], color=colour, alpha=0.35, linewidth=5, solid_capstyle="round")
        axis.plot(row.median / unit, y, "o", color=colour, markersize=6.5)
        label = seconds(row.median)
        if row.wrong:
            label += "   wrong"
        elif row.role != "ours":
            label += f"   {times(row.median / unit)}"
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


# -------------------------------------------------------------------------------------------------------------- growth


def growth(results: Results, pyplot: Any) -> Any:
    """Time of one call against m for single matrices, square and 1 : 4, and against the batch for the shape that has
    most batches."""
    points = [row for title in results.titles("growth, ") for row in results.groups[title] if row.facts["one_shape"]]
    if not points:
        return None
    single = [row for row in points if row.facts["batch"] == 1]
    square = [row for row in single if row.facts["m"] == row.facts["n"]]
    wide = [row for row in single if row.facts["n"] == 4 * row.facts["m"]]
    batches: dict[tuple[int, int], set[int]] = {}
    for row in points:
        batches.setdefault((row.facts["m"], row.facts["n"]), set()).add(row.facts["batch"])
    m, n = max(batches, key=lambda shape: (len(batches[shape]), shape))
    several = [row for row in points if (row.facts["m"], row.facts["n"]) == (m, n)]
    panels = [(f"one matrix, m x {aspect}", "m", "m", rows) for aspect, rows in (("m", square), ("4 m", wide))] + [
        (f"a batch of {m} x {n}", "batch", "matrices", several)
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(WIDTH, 4.2), sharey=True, layout="constrained")
    looks = Looks(points)
    for axis, (title, fact, label, rows) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row.name for row in rows):
            line = sorted((row for row in rows if row.name == name), key=lambda row: row.facts[fact])
            x, y = [row.facts[fact] for row in line], [row.median for row in line]
            axis.plot(x, y, label=name, markersize=5, linewidth=1.6, **looks(line[0]))
        ticks = sorted({row.facts[fact] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 4 else 0)
        axis.set_xlabel(label)
        axis.set_title(title, fontsize=9.5, loc="left", fontweight="bold")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("time of a call, value and gradient")
    axes[0].yaxis.set_major_formatter(lambda value, _: seconds(value))
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


# --------------------------------------------------------------------------------------------------------------- error


def error_against_time(results: Results, pyplot: Any) -> Any:
    """Worst relative error of a gradient against the time of a call."""
    titles = results.titles("rank loss, error")
    rows = [row for title in titles for row in results.groups[title] if "gradient_error" in row.facts]
    if not rows:
        return None
    figure, axis = pyplot.subplots(figsize=(WIDTH, 5), layout="constrained")
    floor = 1e-8  # where float64 itself is
    for row in rows:
        error = max(row.facts["gradient_error"], floor)
        colour, marker = PALETTE[row.role][0], MARKERS[row.role][0]
        axis.plot(row.median, error, marker=marker, color=colour, markersize=7, linestyle="")
    axis.axhline(FP32_GRADE, color=COLOURS["peer"], linewidth=1, linestyle=":")
    axis.annotate("fp32 grade", (1, FP32_GRADE), (-4, 3), xycoords=("axes fraction", "data"), fontsize=8, ha="right",
                  textcoords="offset points", color=COLOURS["peer"])  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(min(row.median for row in rows) / 1.6, max(row.median for row in rows) * 6)
    axis.set_ylim(top=10)
    axis.xaxis.set_major_formatter(lambda value, _: seconds(value))
    axis.set_xlabel("time of a call, value and gradient")
    axis.set_ylabel("relative error of the gradient, worst weight")
    axis.set_title(titles[0], fontsize=9.5, loc="left", fontweight="bold")
    axis.grid(alpha=0.25)
    _label(figure, axis, [(row.median, max(row.facts["gradient_error"], floor), row) for row in rows])
    return figure


def _label(figure: Any, axis: Any, points: list[tuple[float, float, Row]]) -> None:
    """Names beside the points, each as far up as it takes not to lie on another one or on a point."""
    figure.draw_without_rendering()  # settles the layout, and with it where points are
    dot = figure.dpi / 72
    where = [axis.transData.transform((x, y)) / dot for x, y, _ in points]
    boxes = [(x - 4, x + 4, y) for x, y in where]
    for (x, y), point in sorted(zip(where, points, strict=True), key=lambda pair: pair[1][1]):
        row = point[2]
        name = row.name.removeprefix("rpg_fast.").removeprefix("torch: ")
        left, right, shift = x + 8, x + 8 + 4.8 * len(name), 0.0
        while any(left < end and start < right and abs(y + shift - at) < 9 for start, end, at in boxes):
            shift += 1
        boxes.append((left, right, y + shift))
        weight = "bold" if row.role == "ours" else "normal"
        colour = PALETTE[row.role][0]
        axis.annotate(name, point[:2], (8, shift - 3), textcoords="offset points", fontsize=8, fontweight=weight,
                      color=colour)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ roofline


def roofline(results: Results, pyplot: Any) -> Any:
    """Achieved FLOP/s against FLOP per byte under the ceilings measured in the same run: small markers for the sizes of
    the growth, large ones for ResNet-50."""
    rates = results.machine["rates"]
    titles = [*results.titles("rank loss and gradient"), *results.titles("growth, ")]
    rows = [row for title in titles for row in results.groups[title] if "flops" in row.facts]
    grown = {row.name for row in rows if "batch" in row.facts}
    rows = [row for row in rows if not grown or row.name in grown]
    if not rows or not rates:
        return None
    figure, axis = pyplot.subplots(figsize=(WIDTH, 5), layout="constrained")
    intensities = [row.facts["flops"] / row.facts["bytes"] for row in rows]
    ceilings = {row.facts["arithmetic"]: rates["matrix"][row.facts["arithmetic"]] for row in rows}
    _ceilings(axis, ceilings, rates["copy"], min(intensities) / 2, max(intensities) * 3)
    looks = Looks(rows)
    named: set[str] = set()
    for row, intensity in zip(rows, intensities, strict=True):
        label = None if row.name in named else row.name
        named.add(row.name)
        look = looks(row) | {"linestyle": "", "markersize": 5 if "batch" in row.facts else 10}
        axis.plot(intensity, row.facts["flops_per_s"], label=label, alpha=0.85, **look)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte that has to be moved")
    axis.set_ylabel("FLOP/s achieved")
    axis.yaxis.set_major_formatter(lambda value, _: scaled(value, RATES))
    axis.set_title("roofline, rank loss and gradient: ResNet-50 (large), other sizes (small)", fontsize=9.5, loc="left")
    axis.grid(alpha=0.25, which="major")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _ceilings(axis: Any, matrix: dict[str, float], copy: float, left: float, right: float) -> None:
    """The roof of each arithmetic over the slope of the copy."""
    look = {"color": COLOURS["peer"], "linewidth": 1, "zorder": 1}
    text = {"textcoords": "offset points", "fontsize": 8, "color": COLOURS["peer"]}
    highest = max(matrix.values())
    left = min(left, 0.2 * min(matrix.values()) / copy)
    right = max(right, 3 * highest / copy)
    axis.plot([left, highest / copy], [left * copy, highest], **look)
    axis.annotate(f"copy, {scaled(copy, {'TB/s': 1e12, 'GB/s': 1e9})}", (left, left * copy), (10, 2), **text)
    before, place = 0.0, right
    for name, rate in sorted(matrix.items(), key=lambda item: item[1]):
        axis.plot([rate / copy, right], [rate, rate], **look)
        place = right if rate > 1.5 * before else place / 10  # beside the label of a roof that is as high
        axis.annotate(f"{name}, {scaled(rate, RATES)}", (place, rate), (0, 3), ha="right", **text)
        before = rate
