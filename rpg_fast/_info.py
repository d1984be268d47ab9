"""What `rpg-fast info` tells: versions, devices, what the build did, and which kernel the dispatcher takes per op."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
from collections.abc import Iterable
from typing import Any

import torch

import rpg_fast
from rpg_fast import _extension, _ops
from rpg_fast.rank_loss import choose_method
from rpg_fast.spectrum import svd_method

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> dispatch key

# One line of the dispatcher's table, "CPU: registered at csrc/cpu/masks.cpp:40 [kernel]".
_REGISTRATION = re.compile(r"^(?P<key>\w+): .*?registered at (?P<file>.+?):\d+.* \[(?P<kind>[^\]]+)\]$", re.MULTILINE)


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def op_names() -> list[str]:
    """Every op of the namespace, "rank_project" for `torch.ops.rpg_fast.rank_project`."""
    prefix = f"{_ops.NAMESPACE}::"
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def backend(op: str, device: str) -> str:
    """What the dispatcher runs for an op on a device type: "reference" (plain torch), "torch" (plain torch,
    but another way than the reference), "C++", "CUDA", "Triton" or "none".

    Read from the dispatcher's own table, which has an entry for a device that this machine lacks, too.
    """
    table = torch._C._dispatch_dump_table(f"{_ops.NAMESPACE}::{op}")
    for entry in _REGISTRATION.finditer(table):
        if entry["key"] != DEVICES[device]:
            continue
        if entry["kind"] != "kernel":  # "default backend kernel": what was registered for all devices
            return "reference" if "fallback" not in entry["kind"] else "none"
        if entry["file"].endswith(".cu"):
            return "CUDA"
        if entry["file"].endswith(".cpp"):
            return "C++"
        return "Triton" if device == "cuda" else "torch"
    return "none"


def backend_table() -> dict[str, dict[str, str]]:
    """op -> device type -> backend."""
    return {op: {device: backend(op, device) for device in DEVICES} for op in op_names()}


def choices() -> dict[str, dict[str, str]]:
    """What the public functions take where they may choose: function -> device type -> the way, and why."""
    found: dict[str, dict[str, str]] = {"rank_loss": {}, "svd_lowrank": {}}
    for device in DEVICES:
        method, why = choose_method("auto", device)
        found["rank_loss"][device] = f"{method}: {why}"
        ways = {q: svd_method((1, 512, 4608), q, device=torch.device(device)) for q in (16, 256)}
        found["svd_lowrank"][device] = ", ".join(f"{way} for {q} of 512 x 4608" for q, way in ways.items())
    return found


def _cuda_devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _cuda_driver() -> str | None:
    """The newest CUDA that the driver supports, "13.0"; None without a driver. Asks no device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def collect() -> dict[str, Any]:
    """Everything that `info` prints, ready for JSON."""
    extension = _extension.load()
    return {
        "versions": {
            "rpg_fast": rpg_fast.__version__,
            "torch": torch.__version__,
            "triton": _version_of("triton"),
            "python": platform.python_version(),
            "CUDA of torch": torch.version.cuda,
            "CUDA of the kernels": extension.facts.get("cuda"),
            "CUDA of the driver": _cuda_driver(),
        },
        "devices": {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads", "cuda": _cuda_devices()},
        "extension": {"loaded": extension.loaded, "reason": extension.reason, "facts": extension.facts},
        "build": extension.record,
        "choices": choices(),
        "ops": backend_table(),
    }


def _columns(rows: Iterable[Iterable[str]]) -> list[str]:
    cells = [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    extension, devices = report["extension"], report["devices"]
    outcome = report["build"].get("outcome") or "no record of a build"
    facts = [
        *((name, value or "none") for name, value in report["versions"].items()),
        ("device cpu", devices["cpu"]),
        *(("device cuda", device) for device in devices["cuda"] or ["none"]),
        ("build", outcome),
        ("kernels", "loaded" if extension["loaded"] else f"not loaded: {extension['reason']}"),
        *((f"{name}, {device}", way) for name, row in report["choices"].items() for device, way in row.items()),
    ]
    ops = [("op", *DEVICES), *((op, *(row[device] for device in DEVICES)) for op, row in report["ops"].items())]
    return "\n".join([*_columns(facts), "", *_columns(ops)])
