"""What a run came to, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import BAD_IMAGES
from .layers import NetworkStatistics
from .loop import EpochMetrics
from .throughput import bound

BAD_IMAGES_SHOWN = 5


@dataclass(frozen=True)
class RunResult:
    """What came out. `before` is the network that the sparse training began with, `after` the one that it ended with,
    `pruned` the number of weights that the masks exclude, `bad_images` {file: reason} what was skipped, `unwritten` the
    files that the disk refused to the end, `missed` the sparsity that was asked for, if the masks have another."""

    folder: Path
    dense: tuple[EpochMetrics, ...]
    sparse: tuple[EpochMetrics, ...]
    before: NetworkStatistics
    after: NetworkStatistics
    pruned: int
    bad_images: Mapping[str, str] = field(default_factory=dict)
    unwritten: tuple[str, ...] = ()
    missed: float | None = None

    @property
    def best_sparse(self) -> EpochMetrics:
        """The best epoch among those that are as sparse as the last: an earlier, denser one is no fair comparison."""
        as_sparse = [row for row in self.sparse if row.sparsity == self.sparse[-1].sparsity]
        return max(as_sparse, key=lambda row: row.test_accuracy)

    @property
    def problem(self) -> str | None:
        """What the disk refused, in one line."""
        if not self.unwritten:
            return None
        files = ", ".join(self.unwritten)
        again = f"`rpg-fast train --resume {self.folder}` does when there is room"
        return f"could not write {files} in {self.folder}; {again}"


def summary(result: RunResult) -> str:
    """What the run came to, in a few lines."""
    before, after = result.before, result.after
    lines = []
    if result.dense:
        best = max(row.test_accuracy for row in result.dense)
        lines.append(f"dense accuracy    {result.dense[-1].test_accuracy:.2%} last, {best:.2%} best")
    wanted = "" if result.missed is None else f"; {100 * result.missed:g}% was asked for"
    lines += [
        f"sparse accuracy   {result.sparse[-1].test_accuracy:.2%} last, {result.best_sparse.test_accuracy:.2%} best "
        "at the final sparsity",
        f"sparsity          {result.pruned / after.size:.4%}: {result.pruned:,} of {after.size:,} weights are pruned"
        f"{wanted}",
        f"mean rank k/m     {after.mean_rank_ratio:.3f} (before: {before.mean_rank_ratio:.3f})",
        f"effective rank    {after.effective_rank:.1f} of {after.largest_effective_rank:.1f} possible "
        f"(before: {before.effective_rank:.1f})",
        f"dead filters      {after.dead_filters} of {after.filters}",
        f"throughput        {throughput_of(result.dense + result.sparse)}",
        *bad_image_lines(result.bad_images, result.folder),
        f"checkpoint        {result.folder / 'checkpoint.pt'}",
        f"picture           {result.folder / 'report.png'}",
    ]
    return "\n".join(lines)


def throughput_of(epochs: Sequence[EpochMetrics]) -> str:
    """The speed of all epochs together, which have as many images each, and what bounds it. An epoch of which nothing
    was left when the run was resumed has none."""
    measured = [row for row in epochs if row.images_per_second > 0 and math.isfinite(row.waiting)]
    if not measured:
        return "not measured"
    seconds = [1 / row.images_per_second for row in measured]  # of one image
    waiting = sum(row.waiting * time for row, time in zip(measured, seconds, strict=True)) / sum(seconds)
    return f"{len(seconds) / sum(seconds):,.0f} images/s, {waiting:.1%} of the time waiting for data: {bound(waiting)}"


def bad_image_lines(bad: Mapping[str, str], folder: Path) -> list[str]:
    """How many files could not be read, the first of them, and where all are named."""
    if not bad:
        return []
    shown = [f"{'':18}{name}: {reason}" for name, reason in sorted(bad.items())[:BAD_IMAGES_SHOWN]]
    more = [f"{'':18}and {len(bad) - len(shown):,} more"] if len(bad) > len(shown) else []
    return [f"bad images        {len(bad):,} could not be read, all of them in {folder / BAD_IMAGES}", *shown, *more]
