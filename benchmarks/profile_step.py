"""Where the time of a training step goes: a trace and a picture of steps with the rank gradient and masked SGD.

    python -m benchmarks.profile_step --output FOLDER [--small]

Writes FOLDER/step_trace.json.gz, for a viewer of Chrome traces, and FOLDER/step_profile.png: what the device did in the
middle one of three steps, coloured by the part of the step that launched it. ResNet-50 on a GPU, ResNet-20 on a CPU,
whose operators stand in for kernels; --small takes a small network, which tells nothing about time.
"""

from __future__ import annotations

import argparse
import bisect
import gzip
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.training import STAGES, Network, Pruned, Setup, fastest_convolutions

STEP = "training step"
STEPS = 3
COLOURS = dict(zip(STAGES, ("#56b4e9", "#0072b2", "#d55e00", "#e69f00"), strict=True))  # Okabe and Ito's
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
NAMED = 10  # names of kernels in the closer look
WIDTH = 9  # inches

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Span:
    """Something that the device did: name, the part of the step that launched it, the step's number, milliseconds since
    the trace began."""

    name: str
    stage: str
    step: int
    start: float
    length: float


class Ranges:
    """Intervals [start, end) in microseconds that do not overlap, each with a value."""

    def __init__(self, intervals: Sequence[tuple[float, float, Any]]):
        self._intervals = sorted(intervals, key=lambda interval: interval[0])
        self._starts = [start for start, _, _ in self._intervals]

    def at(self, when: float) -> Any:
        """The value of the interval that holds `when`, None if none does."""
        place = bisect.bisect_right(self._starts, when) - 1
        if place < 0 or when >= self._intervals[place][1]:
            return None
        return self._intervals[place][2]


def record(setup: Setup, device: torch.device, trace: Path) -> None:
    """Writes the trace of STEPS ordinary steps, after as many without it."""
    training = Pruned(Network(setup, device))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(STEPS):
        training.step()
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            with record_function(STEP):
                training.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))


def spans_of(events: Sequence[Event]) -> list[Span]:
    """What the device did in each step. A kernel belongs to the part of the step during which it was launched, on
    whichever thread; without kernels, operators that no other one has called stand in for them."""
    complete = [event for event in events if event.get("ph") == "X"]
    ranges = [event for event in complete if event.get("cat") == "user_annotation"]
    stages = Ranges([(e["ts"], e["ts"] + e["dur"], e["name"]) for e in ranges if e["name"] in STAGES])
    steps = sorted((e for e in ranges if e["name"] == STEP), key=lambda event: event["ts"])
    numbers = Ranges([(e["ts"], e["ts"] + e["dur"], number) for number, e in enumerate(steps)])
    kernels = [event for event in complete if event.get("cat") in ON_DEVICE]
    launched = {e["args"]["correlation"]: e["ts"] for e in complete if e.get("cat") in LAUNCHES and "args" in e}
    spans = []
    for event in kernels or _outermost([event for event in complete if event.get("cat") == "cpu_op"]):
        when = launched.get(event["args"].get("correlation")) if kernels else event["ts"]
        stage, step = (None, None) if when is None else (stages.at(when), numbers.at(when))
        if stage is not None and step is not None:
            spans.append(Span(event["name"], stage, step, event["ts"] / 1e3, event["dur"] / 1e3))
    return sorted(spans, key=lambda span: span.start)


def _outermost(operators: Sequence[Event]) -> list[Event]:
    """Those within no other one of their thread."""
    found, ends = [], defaultdict(float)
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= ends[event["tid"]]:
            found.append(event)
            ends[event["tid"]] = event["ts"] + event["dur"]
    return found


def busy(spans: Sequence[Span]) -> dict[str, float]:
    """Milliseconds of each stage."""
    return {stage: sum(span.length for span in spans if span.stage == stage) for stage in STAGES}


def draw(spans: Sequence[Span], title: str, path: Path) -> None:
    """The step as a whole, a lane for each stage; below, what follows the backward pass, a lane for each kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    begin, times = spans[0].start, busy(spans)
    late = [span for span in spans if span.stage in STAGES[2:]]
    total: dict[str, float] = defaultdict(float)
    for span in late:
        total[_short(span.name)] += span.length
    names = sorted(total, key=lambda name: -total[name])[:NAMED]
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white"}
    with pyplot.rc_context(style):
        figure, (whole, close) = pyplot.subplots(
            2,
            1,
            figsize=(WIDTH, 3.2 + 0.24 * (len(names) + 1)),
            height_ratios=[6, len(names) + 1],
            layout="constrained",
        )
        share = sum(times.values())
        lanes = [f"{stage}\n{times[stage]:.3g} ms, {times[stage] / share:.2%}" for stage in STAGES]
        _lanes(whole, spans, [STAGES.index(span.stage) for span in spans], lanes, begin)
        whole.set_title(f"one training step, {title}", fontsize=9.5, loc="left", fontweight="bold")
        rows = [*names, "all others"]
        places = [names.index(_short(span.name)) if _short(span.name) in names else len(names) for span in late]
        others = sum(total.values()) - sum(total[name] for name in names)
        labels = [f"{name}, {total.get(name, others):.2g} ms" for name in rows]
        _lanes(close, late, places, labels, min(span.start for span in late))
        close.set_title("what follows the backward pass, by kernel", fontsize=9.5, loc="left", fontweight="bold")
        close.set_xlabel("milliseconds")
        patches = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[stage]) for stage in STAGES]
        figure.legend(patches, STAGES, loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _lanes(axis: Any, spans: Sequence[Span], lanes: Sequence[int], labels: Sequence[str], begin: float) -> None:
    for lane in range(len(labels)):
        for stage in STAGES:
            bars = [
                (span.start - begin, span.length)
                for span, at in zip(spans, lanes, strict=True)
                if at == lane and span.stage == stage
            ]
            axis.broken_barh(bars, (lane - 0.38, 0.76), color=COLOURS[stage], linewidth=0.3)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)


def _short(name: str) -> str:
    """A kernel's name without what its template, its signature and its namespaces add."""
    name = name.removeprefix("void ").partition("<")[0].partition("(")[0]
    name = name.removeprefix("autograd::engine::evaluate_function: ")
    return name if len(name) <= 34 else f"{name[:33]}…"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A trace and a picture of a training step.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--small", action="store_true", help="a small network, to try this program")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setup = Setup.of(device, full=not options.small)
    trace = options.output / "step_trace.json.gz"
    with fastest_convolutions():
        record(setup, device, trace)
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    found = spans_of(events)
    spans = [span for span in found if span.step == STEPS // 2]
    if not spans:
        parser.error(f"the trace holds nothing that belongs to step {STEPS // 2} of {STEPS}: see {trace}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    draw(spans, f"{setup}, {where}", options.output / "step_profile.png")
    times = busy(spans)
    for stage, time in times.items():
        print(f"{stage:<28} {time:>9.3f} ms  {time / sum(times.values()):>7.2%}")
    if kernels := sum(event.get("cat") in ON_DEVICE for event in events):
        print(f"{len(found)} of the {kernels} kernels in the trace belong to these parts of a step")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
