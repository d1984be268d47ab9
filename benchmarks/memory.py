"""How much memory training takes, measured, and what of it lies there between two steps."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import rpg_fast

MEASURED = "measured part"


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of tensors: `held` before the measured part, `peak` the most that there were at once within it."""

    held: int
    peak: int


def footprint(build: Callable[[], Callable[[], None]], device: torch.device) -> Footprint:
    """Of everything that `build` makes and of the call that it returns, which is the measured part.

    On CUDA the caching allocator counts, on the CPU torch's profiler: both count tensors and what kernels allocate as
    such, and neither counts what libraries take for themselves.
    """
    gc.collect()
    measure = _on_cuda if device.type == "cuda" else _on_cpu
    found = measure(build)
    torch._dynamo.reset()  # its guards hold on to the model
    gc.collect()
    return found


def _on_cuda(build: Callable[[], Callable[[], None]]) -> Footprint:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run = build()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return Footprint(held, torch.cuda.max_memory_allocated() - before)


def _on_cpu(build: Callable[[], Callable[[], None]]) -> Footprint:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run = build()
        with record_function(MEASURED):
            run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return replayed(json.loads(trace.read_text())["traceEvents"])


def replayed(events: Sequence[Mapping[str, Any]]) -> Footprint:
    """From the allocations and releases in a trace of the profiler."""
    (start,) = (event["ts"] for event in events if event["name"] == MEASURED and event.get("ph") == "X")
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = sum(change for when, change in changes if when < start)
    peak = now = held
    for when, change in changes:
        if when >= start:
            now += change
            peak = max(peak, now)
    return Footprint(held, peak)


# ------------------------------------------------------------------------------------ what lies there between two steps


def tensors_in(thing: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds, by attribute, item and key, with its path; parameters, modules and optimizers
    are others' business. A tensor that is held twice comes twice."""
    if isinstance(thing, (nn.Parameter, nn.Module, torch.optim.Optimizer)):
        return
    if isinstance(thing, Tensor):
        yield path, thing
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from tensors_in(value, f"{path}[{key}]" if isinstance(key, str) else f"{path}[]")
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for i, value in enumerate(thing):
            yield from tensors_in(value, f"{path}[{i}]")
    elif hasattr(thing, "__dict__"):
        for name, value in vars(thing).items():
            yield from tensors_in(value, f"{path}.{name}".lstrip("."))


def nbytes(tensors: Iterator[tuple[str, Tensor]]) -> int:
    """Of their storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors}.values())


def kept(pruner: rpg_fast.RankPruner, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that stay between two steps beside weights and gradients: "optimizer" state; "masks", buffers of one bit a
    weight; "rank state", the last spectra; and "tables", all else."""
    masks, tables = [], []
    for path, tensor in tensors_in(pruner):
        if path.startswith("rank_state."):
            continue
        packed = tensor.dtype == torch.uint8 and tensor.numel() == pruner.masks.layout.nbytes
        (masks if packed else tables).append((path, tensor))
    return {
        "optimizer": nbytes(tensors_in(dict(optimizer.state))),
        "masks": nbytes(iter(masks)),
        "rank state": nbytes(tensors_in(pruner.rank_state)),
        "tables": nbytes(iter(tables)),
    }
