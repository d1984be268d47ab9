"""Five minutes on an NVIDIA GPU: the facts that the design of the kernels rests on, measured.

stream    does a CUDA kernel of the compiled library run on torch's current stream, and in a CUDA graph?
product   what rate does one grouped fp16x3 product (Triton) reach on the 53 Gram-sized matrices of ResNet-50?
eigh      how long does torch.linalg.eigh take on those matrices?
rates     copy bandwidth and matrix rates of the device
official  how long does the published loop, one SVD a convolution, take?

Every fact runs in a process of its own, with a time limit, and writes each figure as soon as it has it: a crash, a hang
or a failed build costs one fact. "predicted" is an estimate, or a datasheet's figure, from before the measurement.

    python benchmarks/probe.py --output probe.json [--commit HASH] [FACT ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import probe_facts
import torch
from environment import environment, write_json
from probe_facts import Report, Row

# name -> function, seconds until its process is killed; together five minutes
FACTS: dict[str, tuple[Callable[[Report], None], float]] = {
    "stream": (probe_facts.probe_stream, 45),
    "product": (probe_facts.probe_product, 85),
    "eigh": (probe_facts.probe_eigh, 60),
    "rates": (probe_facts.probe_rates, 30),
    "official": (probe_facts.probe_official, 75),
}
ROOT = Path(__file__).resolve().parent.parent
MARGIN = 8.0  # seconds between the deadline that a fact sees and its end


def run_fact(name: str) -> Row:
    """One fact in its own process. The rows that it wrote count, however it ended."""
    limit = FACTS[name][1]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--output", str(rows), "--alone", name]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # rpg_fast as it lies here
        fact: Row = {"status": "ok"}
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=limit,
                env=os.environ | {"PYTHONPATH": path},
            )
            if done.returncode:
                fact = {"status": "failed", "error": done.stdout.decode(errors="replace")[-3000:]}
        except subprocess.TimeoutExpired as expired:
            output = (expired.stdout or b"").decode(errors="replace")
            fact = {"status": "timed out", "error": f"killed after {limit:.0f} s\n{output[-3000:]}"}
        fact["seconds"] = round(time.monotonic() - begin, 1)
        fact["rows"] = json.loads(rows.read_text()) if rows.exists() else []
    return fact


def table(name: str, fact: Row) -> str:
    """The fact as text; all details are in the JSON."""
    lines = [f"{name}: {fact['status']}, {fact['seconds']} s"]
    for row in fact["rows"]:
        value = row["value"]
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        notes = [
            f"{word} {row[word]}"[:120] for word in ("predicted", "skipped", "failed") if row.get(word) is not None
        ]
        shown = ("useful_tflops", "eager_us", "error_worst", "loss_error")
        notes += [f"{key} {row[key]:.3g}" for key in shown if key in row]
        lines.append(f"  {row['quantity']:<40} {text:>10} {row['unit']:<8} {', '.join(notes)}".rstrip())
    lines += ["  | " + line for line in fact.get("error", "").splitlines()[-12:]]
    return "\n".join(lines)


def run_alone(name: str, output: Path) -> int:
    probe, limit = FACTS[name]
    try:
        probe(Report(output, time.monotonic() + limit - MARGIN))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what the kernels' design rests on.")
    parser.add_argument("facts", nargs="*", metavar="FACT", help=f"of {', '.join(FACTS)}; default: all")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--alone", action="store_true", help="one fact in this process, writing its rows only")
    arguments = parser.parse_args()
    if unknown := set(arguments.facts) - set(FACTS):
        parser.error(f"unknown facts {sorted(unknown)}: choose from {', '.join(FACTS)}")
    if not torch.cuda.is_available():
        print("probe: torch sees no CUDA device", file=sys.stderr)
        return 1
    if arguments.alone:
        (name,) = arguments.facts
        return run_alone(name, arguments.output)
    result: Row = {"environment": environment(arguments.commit), "facts": {}}
    for name in arguments.facts or FACTS:
        fact = result["facts"][name] = run_fact(name)
        write_json(arguments.output, result)
        print(table(name, fact), flush=True)
    return 0 if all(fact["status"] == "ok" for fact in result["facts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
