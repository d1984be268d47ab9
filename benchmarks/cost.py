"""What pruning costs, as a model fitted to measured times: the rank gradient by shapes, the masked step and the
topology update by weights, and what several processes add.

    python -m benchmarks.cost measure benchmarks/results/cost.json
    python -m benchmarks.cost report benchmarks/results/cpu.json benchmarks/results/cost.json [--page docs/cost.md]

`measure` times single matrices that are larger than those of the growth benchmark, and 1, 2 and 4 processes on gloo.
`report` fits, prints the tables (or puts them between ``<!-- bench:cost -->`` and ``<!-- /bench -->`` of the page), and
draws <images>/cost_cpu.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rpg_fast
from benchmarks import work
from benchmarks.environment import environment, write_json
from benchmarks.measured import Results, read, scaled, seconds
from benchmarks.report import BYTES, FLOPS, insert
from benchmarks.test_growth import EXACTLY, encoder, sparse_weights
from benchmarks.work import Side
from rpg_fast.grouping import CONVOLUTIONS
from rpg_fast.train.distributed import Team, join
from rpg_fast.train.models import Bottleneck, ResNet

TAIL_ENERGY = 0.1
THREADS = 2  # of the measurements of matrices, as in cpu.json
LARGE: tuple[Side, ...] = ((512, 1024), (512, 4608), (768, 768), (768, 3072), (1024, 2048), (1024, 4096))
PROCESSES = (1, 2, 4)
ROUNDS = 7
STAGES = 6  # quintics of a warm call, the median on ResNet-50
DEPTHS = {"ResNet-50": (3, 4, 6, 3), "ResNet-101": (3, 4, 23, 3), "ResNet-152": (3, 8, 36, 3)}
VIT = "ViT-B, linear layers of its blocks"
H200 = {"fp16": 989e12, "copy": 4.8e12}  # datasheet: FLOP/s, bytes/s


@dataclass(frozen=True)
class Point:
    """One measured call of the exact rank gradient on `batch` matrices [m, n], in seconds."""

    m: int
    n: int
    batch: int
    seconds: float

    @property
    def shapes(self) -> list[Side]:
        return [(self.m, self.n)] * self.batch


@dataclass(frozen=True)
class Model:
    """t = sum over the matrices of (matrix + products m^2 n + eigen m^3) / min(threads, matrices), in seconds;
    `products` covers Gram matrix and gradient, which grow alike and cannot be told apart by times."""

    matrix: float
    products: float
    eigen: float
    threads: int

    def __call__(self, shapes: Sequence[Side]) -> float:
        """Seconds of one call; a network whose matrices spread evenly over the threads."""
        return float(np.dot(_terms(shapes, self.threads), (self.matrix, self.products, self.eigen)))

    def misfits(self, points: Sequence[Point]) -> list[float]:
        """Predicted over measured, less one."""
        return [self(point.shapes) / point.seconds - 1 for point in points]


def _terms(shapes: Sequence[Side], threads: int) -> list[float]:
    at_once = min(threads, len(shapes))
    return [len(shapes) / at_once, sum(m * m * n for m, n in shapes) / at_once, sum(m**3 for m, _ in shapes) / at_once]


def fit(points: Sequence[Point], threads: int) -> Model:
    """The non-negative coefficients with the least squares of relative misfits.

    Raises:
        ValueError: fewer points than coefficients.
    """
    from scipy.optimize import nnls

    if len(points) < 3:
        raise ValueError(f"wanted three points or more for three coefficients, got {len(points)}")
    rows = np.array([_terms(point.shapes, threads) for point in points])
    size = rows.max(axis=0)  # columns of like size: they differ by ten orders of magnitude
    relative = rows / size / np.array([[point.seconds] for point in points])
    found, _ = nnls(relative, np.ones(len(points)))
    matrix, products, eigen = (float(value) for value in found / size)
    return Model(matrix, products, eigen, threads)


def growth_points(results: Results) -> list[Point]:
    """The rows of the growth benchmark whose matrices are of one shape."""
    rows = [row for title in results.titles("growth, ") for row in results.groups[title] if row.name == EXACTLY]
    return [
        Point(row.facts["m"], row.facts["n"], row.facts["batch"], row.median) for row in rows if row.facts["one_shape"]
    ]


# ------------------------------------------------------------------------------------------------------------- networks


def networks() -> dict[str, tuple[list[Side], int]]:
    """Matrices under the rank loss, and number of prunable weights: convolutions of ResNets, linear layers of ViT-B."""
    found = {}
    for name, depths in DEPTHS.items():
        with torch.device("meta"):
            model = ResNet(Bottleneck, depths, (64, 128, 256, 512), num_classes=1000)
        found[name] = (_convolutions(model), sum(w.numel() for w in rpg_fast.prunable_weights(model).values()))
    vit = [(min(shape), max(shape)) for shape in encoder(768, 12)]
    found[VIT] = (vit, sum(m * n for m, n in vit))
    return found


def _convolutions(model: nn.Module) -> list[Side]:
    return work.sides(rpg_fast.prunable_weights(model, include=CONVOLUTIONS).values())


# ------------------------------------------------------------------------------------------------------------- measure


def measure(path: Path) -> None:
    """Writes what `report` reads beside the benchmarks' results."""
    torch.set_num_threads(THREADS)
    facts: dict[str, Any] = {"environment": environment(_commit()), "threads": THREADS, "load": os.getloadavg()[0]}
    facts["matrices"] = [{"m": m, "n": n, "seconds": _time_matrix(m, n)} for m, n in LARGE]
    facts["processes"] = [_run_processes(count) for count in PROCESSES]
    write_json(path, facts)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _time_matrix(m: int, n: int) -> float:
    weights = sparse_weights(((m, n),), torch.device("cpu"))
    return _best(lambda: rpg_fast.add_rank_grad_(weights, 1.0, TAIL_ENERGY, method="exact"))


def _best(run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Seconds of the best round: what else the machine does only adds to the others."""
    times = []
    for _ in range(ROUNDS):
        before()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _run_processes(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [*launcher, "-m", "benchmarks.cost", "process", str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        times: dict[str, Any] = json.loads(out.read_text())
        return times


def process(path: Path) -> None:
    """What each process of `measure` does: ResNet-50 on one thread, times of the slowest process."""
    torch.set_num_threads(1)
    with join() as team:
        job = _Job(team)
        times = {"processes": team.world, **{name: _slowest(team, run) for name, run in job.parts().items()}}
        if team.leads:
            write_json(path, times | {"mask_bytes": job.bits.numel()})


def _slowest(team: Team, run: Callable[[], Any]) -> float:
    barrier: Callable[[], Any] = dist.barrier if team.world > 1 else lambda: None
    return max(team.gather(_best(run, before=barrier)))


class _Job:
    """A 90 % sparse ResNet-50 with gradients, the same in every process."""

    def __init__(self, team: Team):
        from benchmarks.workload import prune, resnet50

        self.team, self.model = team, resnet50(torch.device("cpu"), full=True)
        self.masks = rpg_fast.PackedMasks(rpg_fast.prunable_weights(self.model)).load_(prune(self.model))
        self.bits = torch.stack([self.masks.bits, self.masks.bits]).view(torch.uint8)  # what an update broadcasts
        self.layers = list(rpg_fast.prunable_weights(self.model, include=CONVOLUTIONS).values())

    def parts(self) -> dict[str, Callable[[], Any]]:
        return {
            "rank": lambda: rpg_fast.add_rank_grad_(self.layers, 1.0, TAIL_ENERGY, method="exact"),
            "broadcast": self.broadcast,
            "check": lambda: self.team.check_agreement(self.compared(), "cost"),
        }

    def broadcast(self) -> None:
        if self.team.world > 1:
            dist.broadcast(self.bits, src=0)

    def compared(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()} | {"masks": self.masks.bits}


# -------------------------------------------------------------------------------------------------------------- report


def report(results: Results, facts: dict[str, Any]) -> str:
    """The tables in Markdown."""
    threads = results.machine["threads"]
    grown = growth_points(results)
    large = [Point(row["m"], row["n"], 1, row["seconds"]) for row in facts["matrices"]]
    model = fit([*grown, *large], threads)
    parts = [_fit_table(model, grown, large), _network_table(model, results), results.footer()]
    return "\n\n".join([*parts, _process_table(facts), _bound_table()])


def _fit_table(model: Model, grown: Sequence[Point], large: Sequence[Point]) -> str:
    points = [*grown, *large]
    worst = max(points, key=lambda point: abs(model.misfits([point])[0]))
    lines = [
        "| matrices | measured | model | misfit |",
        "|---|---|---|---|",
        *(
            f"| {p.batch} of {p.m} x {p.n} | {seconds(p.seconds)} | {seconds(model(p.shapes))} "
            f"| {_signed(model.misfits([p])[0])} |"
            for p in points
        ),
        "",
        f"Fitted: {seconds(model.matrix)} a matrix, {model.products * 1e12:.3g} ps times m^2 n, "
        f"{model.eigen * 1e12:.3g} ps times m^3, on one of {model.threads} threads. The worst misfit is "
        f"{_signed(model.misfits([worst])[0])}, at {worst.batch} of {worst.m} x {worst.n}.",
    ]
    return "\n".join(lines)


def _signed(share: float) -> str:
    return f"{share:+.0%}".replace("-0%", "+0%")


def _network_table(model: Model, results: Results) -> str:
    sgd = _ours(results, "masked step, SGD")
    update = _ours(results, "topology update")
    measured = _ours(results, "rank loss and gradient")
    weights = networks()["ResNet-50"][1]
    lines = [
        "| network | weights | rank gradient | masked SGD step | topology update | masks |",
        "|---|---|---|---|---|---|",
    ]
    for name, (shapes, count) in networks().items():
        share = count / weights
        rank = seconds(model(shapes))
        step, moves = seconds(sgd * share), seconds(update * share)
        if name == "ResNet-50":
            rank, step, moves = f"{rank} (measured: {seconds(measured)})", f"{step} (measured)", f"{moves} (measured)"
        lines.append(f"| {name} | {count / 1e6:.1f} M | {rank} | {step} | {moves} | {scaled(count / 8, BYTES)} |")
    return "\n".join(lines)


def _ours(results: Results, start: str) -> float:
    """The least median of ours in the race whose title begins so."""
    titles = results.titles(start)
    if len(titles) != 1:
        raise ValueError(f"wanted one race {start!r} in {results.word}, found {len(titles)}")
    return min(row.median for row in results.groups[titles[0]] if row.role == "ours")


def _process_table(facts: dict[str, Any]) -> str:
    lines = [
        "| processes | rank gradient | broadcast after an update | comparison of weights and masks |",
        "|---" * 4 + "|",
    ]
    for row in facts["processes"]:
        alone = row["processes"] == 1
        sent = "none" if alone else f"{seconds(row['broadcast'])} for {scaled(row['mask_bytes'], BYTES)}"
        check = "none" if alone else seconds(row["check"])
        lines.append(f"| {row['processes']} | {seconds(row['rank'])} | {sent} | {check} |")
    machine = facts["environment"]
    lines += [
        "",
        f"{machine['cpu_cores']} CPU cores, one thread a process, gloo, torch {machine['torch']}, "
        f"Python {machine['python']}, commit {machine['commit'][:10]}; best of {ROUNDS} rounds, the slowest process.",
    ]
    return "\n".join(lines)


def _bound_table() -> str:
    lines = ["| network | fp16 products | bytes | bound by products | bound by bytes |", "|---" * 5 + "|"]
    for name, (shapes, _) in networks().items():
        needed = work.power(shapes, [STAGES] * len(shapes))
        flops = sum(needed.flops.values())
        lines.append(
            f"| {name} | {scaled(flops, FLOPS)} | {scaled(needed.bytes, BYTES)} "
            f"| {seconds(flops / H200['fp16'])} | {seconds(needed.bytes / H200['copy'])} |"
        )
    return "\n".join(lines)


def draw(results: Results, facts: dict[str, Any], path: Path) -> None:
    """Measured times and the model against the number of operations; and the parts of the model by m."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grown = growth_points(results)
    large = [Point(row["m"], row["n"], 1, row["seconds"]) for row in facts["matrices"]]
    model = fit([*grown, *large], results.machine["threads"])
    resnet = networks()["ResNet-50"][0]
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
        for points, label, marker in ((grown, "growth benchmark", "o"), (large, "larger matrices", "s")):
            x, y = [model(p.shapes) for p in points], [p.seconds for p in points]
            left.plot(x, y, marker, label=label, color="#0072b2" if marker == "o" else "#009e73")
        left.plot(model(resnet), _ours(results, "rank loss and gradient"), "*", markersize=13, color="#d55e00",
                  label="ResNet-50, not in the fit")  # fmt: skip
        ends = [1e-4, 1.0]
        left.plot(ends, ends, color="#475569", linewidth=1)
        left.fill_between(ends, [e / 1.5 for e in ends], [e * 1.5 for e in ends], color="#475569", alpha=0.12,
                          label="within a factor of 1.5")  # fmt: skip
        left.set(xscale="log", yscale="log", xlabel="time by the model", ylabel="time measured")
        left.set_title("rank gradient, value included", fontsize=9.5, loc="left", fontweight="bold")
        _parts(right, model)
        for axis in (left.xaxis, left.yaxis, right.yaxis):
            axis.set_major_formatter(lambda value, _: seconds(value))
        for axis in (left, right):
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _parts(axis: Any, model: Model) -> None:
    m = np.geomspace(64, 2048, 50)
    axis.plot(m, model.matrix + 0 * m, label="every matrix", color="#333333", linestyle=":")
    axis.plot(m, model.products * 4.5 * m**3, label="Gram matrix and gradient, n = 4.5 m", color="#0072b2")
    axis.plot(m, model.eigen * m**3, label="eigendecomposition", color="#d55e00")
    axis.set(xscale="log", yscale="log", xlabel="short side m of one matrix", ylabel="time of the part")
    ticks = [64, 128, 256, 512, 1024, 2048]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_title("parts of the model", fontsize=9.5, loc="left", fontweight="bold")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What pruning costs, measured and as a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure").add_argument("json", type=Path)
    commands.add_parser("process").add_argument("json", type=Path)
    fitted = commands.add_parser("report")
    fitted.add_argument("results", type=Path, help="of the benchmarks, cpu.json")
    fitted.add_argument("json", type=Path, help="of `measure`")
    fitted.add_argument("--page", type=Path, help="put the tables between the markers of this file")
    fitted.add_argument("--images", type=Path, default=Path("docs/images"), help="folder of the picture")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        measure(options.json)
    elif options.command == "process":
        process(options.json)
    else:
        results, facts = read(options.results), json.loads(options.json.read_text())
        text = report(results, facts)
        if options.page:
            options.page.write_text(insert(options.page.read_text(), "cost", text))
        else:
            print(text)
        draw(results, facts, options.images / "cost_cpu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
