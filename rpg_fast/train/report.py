"""The picture of a run: how accuracy and sparsity went, what each layer became, and what happened to its spectrum."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from .checkpoint import write_file
from .config import TrainConfig
from .layers import LayerStatistics, NetworkStatistics
from .loop import EpochMetrics

# Okabe and Ito's colours, which stay apart for colour-blind readers
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
SPECTRA = 4  # panels in the last row


def draw_report(
    path: Path,
    config: TrainConfig,
    dense: Sequence[EpochMetrics],
    sparse: Sequence[EpochMetrics],
    before: NetworkStatistics,
    after: NetworkStatistics,
) -> None:
    """Writes the picture to `path` (PNG), whole or not at all.

    Args:
        dense: epochs of the dense baseline, empty where there was none.
        before: the network that the sparse training began with.
        after: the network that it ended with.

    Raises:
        OSError: it could not be written.
    """
    figure = Figure(figsize=(13, 13.5), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=(1, 1.3, 0.95))
    rows = [figure.add_subfigure(grid[row]) for row in range(3)]
    title = f"{config.arch} on {config.data}: {after.sparsity:.2%} sparse, rank weight {config.rank_weight:g}"
    # names of folders are bytes, and may hold a dollar sign that is no formula
    shown = title.encode("utf-8", "backslashreplace").decode()
    figure.suptitle(shown, fontsize=15, fontweight="bold", parse_math=False)
    curves, ranks = rows[0].subplots(1, 2, gridspec_kw={"wspace": 0.08})
    _draw_accuracy(curves, dense, sparse)
    _draw_ranks(ranks, sparse, before)
    labels = ("dense" if config.starts_dense else "initial", "sparse")
    _draw_layers(rows[1].subplots(2, 1, sharex=True), before, after, labels)
    _draw_spectra(rows[2].subplots(1, SPECTRA, sharey=True), before, after, labels)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=140)
    write_file(path, picture.getbuffer())


def _draw_accuracy(axes: Axes, dense: Sequence[EpochMetrics], sparse: Sequence[EpochMetrics]) -> None:
    epochs = [row.epoch for row in sparse]
    right = axes.twinx()
    right.fill_between(epochs, [row.sparsity for row in sparse], color=GREY, alpha=0.12, linewidth=0)
    right.plot(epochs, [row.sparsity for row in sparse], color=GREY, linewidth=1)
    right.set(ylim=(0, 1), ylabel="sparsity")
    right.yaxis.label.set_color(GREY)
    right.tick_params(axis="y", colors=GREY)
    right.yaxis.set_major_formatter(PercentFormatter(1))

    axes.set_zorder(right.get_zorder() + 1)  # the curves in front of the grey area
    axes.patch.set_visible(False)
    if dense:
        last = dense[-1].test_accuracy
        axes.axhline(last, color=BLUE, linewidth=1, linestyle="--")
        curve = [row.test_accuracy for row in dense]
        axes.plot([row.epoch for row in dense], curve, color=BLUE, linewidth=1.2, label=f"dense, last {last:.2%}")
    last = sparse[-1].test_accuracy
    curve = [row.test_accuracy for row in sparse]
    axes.plot(epochs, curve, color=VERMILION, linewidth=1.8, label=f"sparse, last {last:.2%}")
    known = sorted(row.test_accuracy for row in (*dense, *sparse))
    # the first epochs of a run would squeeze what matters into the top edge
    axes.set(ylim=(max(0.0, known[len(known) // 10] - 0.03), min(1.0, known[-1] + 0.02)))
    axes.set_title("Accuracy", loc="left")
    axes.set(xlabel="epoch", ylabel="test accuracy", xlim=_span(epochs))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    _legend_above(axes)


def _draw_ranks(axes: Axes, sparse: Sequence[EpochMetrics], before: NetworkStatistics) -> None:
    epochs = [0, *(row.epoch for row in sparse)]
    ratio = [before.mean_rank_ratio, *(row.mean_rank_ratio for row in sparse)]
    scale = before.largest_effective_rank
    effective = [before.effective_rank / scale, *(row.effective_rank / scale for row in sparse)]
    dead = [before.dead_filters / before.filters, *(row.dead_filters / before.filters for row in sparse)]
    axes.plot(epochs, effective, color=GREEN, linewidth=1.8, label="effective rank / m")
    axes.plot(epochs, ratio, color=BLUE, linewidth=1.8, label="rank k / m")
    axes.plot(epochs, dead, color=ORANGE, linewidth=1.8, label="dead filters")
    axes.set_title("Ranks", loc="left")
    axes.set(xlabel="epoch", ylabel="mean over the convolutions", ylim=(0, 1), xlim=_span(epochs))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    _legend_above(axes)


def _draw_layers(
    panels: Sequence[Axes], before: NetworkStatistics, after: NetworkStatistics, labels: tuple[str, str]
) -> None:
    positions = np.arange(len(after.layers))
    left = np.array([1 - layer.sparsity for layer in after.layers])  # the fraction of weights that is not zero
    floor = 10 ** np.floor(np.log10(min(left[left > 0].min(initial=1.0), 0.1)))
    top, bottom = panels
    top.bar(positions, 1 / np.maximum(left, floor), color=[GREY if x > 0 else VERMILION for x in left], width=0.7)
    top.set_yscale("log")
    top.set(ylim=(1, 1 / floor), ylabel="sparsity")
    top.set_title("Sparsity of each layer", loc="left")
    top.yaxis.set_major_locator(LogLocator(10, numticks=8))
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 - 100 / value:.10g}%"))
    top.yaxis.set_minor_formatter(NullFormatter())
    top.axhline(1 / max(1 - after.sparsity, floor), color=VERMILION, linewidth=1.2, linestyle="--", label="all layers")
    _legend_above(top)

    for statistics, colour, label, offset in ((before, BLUE, labels[0], -0.2), (after, VERMILION, labels[1], 0.2)):
        ratios = [layer.rank / layer.m for layer in statistics.layers]
        bottom.bar(positions + offset, ratios, width=0.4, color=colour, label=label)
    bottom.set(ylim=(0, 1), ylabel="rank k / m")
    bottom.set_title("Rank of each layer", loc="left")
    bottom.yaxis.set_major_formatter(PercentFormatter(1))
    bottom.set_xticks(positions, [layer.name.removesuffix(".weight") for layer in after.layers], rotation=90)
    bottom.tick_params(axis="x", labelsize=8 if len(positions) <= 30 else 6)
    bottom.set_xlim(-0.7, len(positions) - 0.3)
    _legend_above(bottom)
    for axes in panels:
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)


def _draw_spectra(
    panels: Sequence[Axes], before: NetworkStatistics, after: NetworkStatistics, labels: tuple[str, str]
) -> None:
    pairs = list(zip(before.layers, after.layers, strict=True))
    convolutions = [pair for pair in pairs if pair[0].is_convolution]
    chosen = np.unique(np.linspace(1 if len(convolutions) > SPECTRA else 0, len(convolutions) - 1, SPECTRA).round())
    for axes, index in zip(panels, chosen.astype(int), strict=False):
        old, new = convolutions[index]
        _draw_spectrum(axes, old, BLUE, labels[0])
        _draw_spectrum(axes, new, VERMILION, labels[1])
        name = old.name.removesuffix(".weight")
        axes.set_title(f"{name}, {old.shape[0]} x {old.size // old.shape[0]}", loc="left")
        axes.set_xlabel("index")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.legend(loc="lower left", framealpha=0.9)
    panels[0].set_ylabel("singular value / largest one")
    panels[0].set_ylim(max(panels[0].get_ylim()[0] / 2, 1e-4), 1.3)
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()


def _draw_spectrum(axes: Axes, layer: LayerStatistics, colour: str, label: str) -> None:
    values = np.array(layer.spectrum)
    values = values[values > 0]
    if len(values) == 0:
        axes.plot([], [], color=colour, label=f"{label}: all zero")
        return
    zeros = len(layer.spectrum) - len(values)
    text = f"{label}: k = {layer.rank:.0f}" + (f", {zeros} are zero" if zeros else "")
    axes.plot(np.arange(1, len(values) + 1), values / values[0], color=colour, linewidth=1.6, label=text)
    if 1 <= layer.rank <= len(values):
        k = int(layer.rank)
        axes.plot(k, values[k - 1] / values[0], "o", color=colour, markersize=6)


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.1)


def _span(epochs: Sequence[int]) -> tuple[float, float]:
    """Limits of the axis; a single epoch still gets a width."""
    return min(epochs), max(epochs[-1], min(epochs) + 1)
