"""What a result was measured on, printed as JSON or, with ``--add-to FILE``, written into a JSON file."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch


def environment(commit: str) -> dict[str, Any]:
    """Device, driver, versions, commit and date (UTC). Works without a GPU: the fields that need one are None."""
    cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": properties.name if properties else None,
        "compute_capability": f"{properties.major}.{properties.minor}" if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "memory_bytes": properties.total_memory if properties else None,
        "driver": _nvidia_smi("driver_version"),
        "sm_clock_max_mhz": _nvidia_smi("clocks.max.sm"),
        "cpu_cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "nvcc": _nvcc(),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one step: a reader, or a killed writer, never leaves half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(value, file, indent=1, default=str)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout if done.returncode == 0 else ""


def _nvidia_smi(field: str) -> str | None:
    lines = _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines else None


def _nvcc() -> str | None:
    releases = [line.split("release ")[1] for line in _output(["nvcc", "--version"]).splitlines() if "release " in line]
    return releases[0] if releases else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what this machine is, or add it to a JSON file.")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--add-to", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    facts = environment(arguments.commit)
    if arguments.add_to is None:
        print(json.dumps(facts))
    else:
        write_json(arguments.add_to, json.loads(arguments.add_to.read_text()) | {"environment": facts})


if __name__ == "__main__":
    main()
