"""The program for compute-sanitizer: it holds every device template and compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "sanitize.cu"


def included(source: Path) -> set[Path]:
    """The headers of csrc that a file includes, directly or through others."""
    names = re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
    places = [(source.parent / name, ROOT / "csrc" / name) for name in names]
    headers = {(beside if beside.exists() else ours).resolve() for beside, ours in places}
    return headers.union(*map(included, headers))


def test_every_device_template_is_in_the_program() -> None:
    of_kernels = set().union(*(included(source) for source in (ROOT / "csrc" / "cuda").glob("*.cu")))
    with_torch = {h for h in of_kernels if any("<torch/" in part.read_text() for part in (h, *included(h)))}
    missing = of_kernels - with_torch - included(PROGRAM)
    assert not missing, f"compute-sanitizer would not see {sorted(header.name for header in missing)}"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_program_compiles(tmp_path: Path) -> None:
    options = ["-std=c++20", "-arch=sm_90", f"-I{ROOT / 'csrc'}", "-o", str(tmp_path / "program")]
    command = ["nvcc", *options, str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
