"""The picture of a training step: kernels go to the part of the step that launched them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import profile_step
from benchmarks.profile_step import STEP, Span, busy, spans_of
from benchmarks.training import STAGES


def event(cat: str, name: str, ts: float, dur: float, **rest: Any) -> dict[str, Any]:
    args = {"args": {"correlation": rest.pop("correlation")}} if "correlation" in rest else {}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1} | args | rest


def test_kernels_belong_to_where_they_were_launched() -> None:
    """They run when the host is already further on, and some are launched by another thread."""
    events = [
        event("user_annotation", STEP, 0, 100),
        event("user_annotation", STAGES[0], 10, 20),
        event("user_annotation", STAGES[1], 30, 40),
        event("cuda_runtime", "cudaLaunchKernel", 12, 2, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 35, 2, correlation=2, tid=9),
        event("cuda_runtime", "cudaLaunchKernel", 80, 2, correlation=3),  # in no part
        event("kernel", "product", 40, 50, correlation=1),
        event("kernel", "triton", 90, 500, correlation=2),
        event("kernel", "other", 600, 10, correlation=3),
        event("gpu_user_annotation", STAGES[0], 40, 50),
        event("cpu_op", "aten::mm", 11, 5),
        {"ph": "i", "name": "[memory]", "ts": 5},
    ]
    spans = spans_of(events)
    assert spans == [Span("product", STAGES[0], 0, 0.04, 0.05), Span("triton", STAGES[1], 0, 0.09, 0.5)]
    assert busy(spans) == {STAGES[0]: 0.05, STAGES[1]: 0.5, STAGES[2]: 0.0, STAGES[3]: 0.0}


def test_without_kernels_outermost_operators_count() -> None:
    events = [
        event("user_annotation", STEP, 0, 10),
        event("user_annotation", STEP, 20, 10),
        event("user_annotation", STAGES[3], 20, 10),
        event("cpu_op", "outer", 21, 5),
        event("cpu_op", "inner", 21, 4),
        event("cpu_op", "elsewhere", 22, 3, tid=2),
        event("cpu_op", "next", 26, 1),
    ]
    names = [(span.name, span.step) for span in spans_of(events)]
    assert names == [("outer", 1), ("elsewhere", 1), ("next", 1)]


def test_trace_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_step.main(["--output", str(tmp_path), "--small"]) == 0
    with gzip.open(tmp_path / "step_trace.json.gz", "rt") as file:
        spans = spans_of(json.load(file)["traceEvents"])
    assert {span.step for span in spans} == {0, 1, 2}
    assert {span.stage for span in spans} == set(STAGES)
    assert (tmp_path / "step_profile.png").stat().st_size > 20_000
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(STAGES)
