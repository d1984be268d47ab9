"""The table of docs/inference.md from the JSON of ``pytest benchmarks/test_inference.py --benchmark-only``.

python -m benchmarks.inference benchmarks/results/inference_cpu.json [--page docs/inference.md]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.measured import Results, Row, read, seconds
from benchmarks.report import insert
from benchmarks.test_inference import CONVOLUTION, CSR, DENSE, SPARSITIES


def table(results: Results) -> str:
    """Markdown: a line a layer: the faster of the dense ways, and the CSR product at each sparsity with how many times
    as fast it is. Of best rounds, since whatever else a machine does only adds to the others."""
    layers: dict[str, dict[float, dict[str, Row]]] = {}
    for rows in (results.groups[title] for title in results.titles("inference, ")):
        for row in rows:
            by_sparsity = layers.setdefault(row.facts["layer"], {})
            by_sparsity.setdefault(row.facts["sparsity"], {})[row.name] = row
    heads = ["layer", "weight, positions", "dense", *(f"CSR, {s:.0%}" for s in SPARSITIES)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, by_sparsity in layers.items():
        facts: dict[str, Any] = by_sparsity[SPARSITIES[0]][DENSE].facts
        dense = min(rows[way].least for rows in by_sparsity.values() for way in (DENSE, CONVOLUTION))
        cells = [_cell(by_sparsity[sparsity][CSR].least, dense) for sparsity in SPARSITIES]
        shape = f"{facts['shape'][0]} x {facts['shape'][1]}, {facts['positions']:,}"
        lines.append(f"| {name} | {shape} | {seconds(dense)} | {' | '.join(cells)} |")
    machine = results.machine
    lines += [
        "",
        f"{machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}, torch "
        f"{machine['torch']}, Python {machine['python']}, commit {machine['commit'][:10]}; one image, the best of up "
        "to 15 rounds in which the ways take turns. Bold: faster than dense.",
    ]
    return "\n".join(lines)


def _cell(found: float, dense: float) -> str:
    ratio = f"{dense / found:.2g}x"
    return f"{seconds(found)}, {f'**{ratio}**' if found < dense else ratio}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The table of CSR against dense products.")
    parser.add_argument("json", type=Path)
    parser.add_argument("--page", type=Path, help="put the table between the markers of this file")
    options = parser.parse_args(arguments)
    text = table(read(options.json))
    if options.page:
        options.page.write_text(insert(options.page.read_text(), "inference", text))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
