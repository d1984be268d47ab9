"""What the device can do at best, measured: bytes per second of a copy, and FLOP per second of one large product in
each arithmetic. The ceilings of every roofline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# arithmetic -> dtype of the operands, torch's float32 precision
ARITHMETIC: dict[str, tuple[torch.dtype, str]] = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "TF32": (torch.float32, "high"),
    "fp32": (torch.float32, "highest"),
    "fp64": (torch.float64, "highest"),
}
ON_CPU = ("fp32", "fp64")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run among several."""

    median: float
    best: float
    worst: float
    runs: int


@dataclass(frozen=True)
class Rates:
    """Measured ceilings: `copy` in bytes per second, read and written ones; `matrix` in FLOP per second."""

    copy: float
    matrix: dict[str, float]


def time_device(
    run: Callable[[], Any], *, device: str = "cuda", seconds: float = 1.0, most: int = 50, repeats: int = 1
) -> Timing:
    """Each of 3 to ``most`` runs after a warm-up, by CUDA events on a GPU; a run longer than ``seconds`` is timed once.

    ``repeats``: how many times ``run`` does the thing of which the time is wanted.
    """
    once = _host_ms(run, device)
    once = _host_ms(run, device)
    times = [once]
    if once <= seconds * 1e3:
        count = max(3, min(most, int(seconds * 1e3 / once)))
        times = _event_ms(run, count) if device == "cuda" else [_host_ms(run, device) for _ in range(count)]
    each = [t / repeats for t in times]
    return Timing(statistics.median(each), min(each), max(each), len(each))


def _host_ms(run: Callable[[], Any], device: str) -> float:
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def _event_ms(run: Callable[[], Any], count: int) -> list[float]:
    events = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of copying 4 GiB (on a CPU 256 MiB)."""
    source, target = (torch.rand(2**30 if device == "cuda" else 2**26, device=device) for _ in range(2))
    return 2 * source.nbytes / time_device(lambda: target.copy_(source), device=device).median * 1e3


def matrix_timing(arithmetic: str, device: str) -> tuple[float, Timing]:
    """FLOP of a square product of 8192 (on a CPU 1024) rows, and its time."""
    dtype, precision = ARITHMETIC[arithmetic]
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return 2.0 * n**3, time_device(lambda: torch.mm(a, b, out=out), device=device, most=20)
    finally:
        torch.set_float32_matmul_precision(before)


def measure_rates(device: str) -> Rates:
    """All ceilings of the device: about three seconds."""
    matrix = {}
    for arithmetic in ARITHMETIC if device == "cuda" else ON_CPU:
        flops, timing = matrix_timing(arithmetic, device)
        matrix[arithmetic] = flops / timing.median * 1e3
    return Rates(copy_rate(device), matrix)
