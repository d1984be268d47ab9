"""The host/device templates of csrc on the host under the compilers' sanitizers: arithmetic and barriers of the CUDA
kernels, without a GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "test_csrc_block.cpp"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler (CXX, g++, clang++)")


def run_under(directory: Path, sanitizer: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compiles the test program with a sanitizer and runs it."""
    assert CXX is not None
    program = directory / "test_csrc_block"
    options = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-fsanitize={sanitizer}"]
    command = [
        CXX,
        *options,
        "-fno-sanitize-recover=all",
        *flags,
        f"-I{ROOT / 'csrc'}",
        str(SOURCE),
        "-o",
        str(program),
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in compiled.stderr:  # the linker, of the sanitizer's library
        pytest.skip(f"{CXX} comes without the {sanitizer} sanitizer")
    assert compiled.returncode == 0, compiled.stderr
    # ThreadSanitizer's shadow memory collides with some randomized layouts.
    fixed_layout = ["setarch", platform.machine(), "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    result = subprocess.run([*fixed_layout, str(program)], capture_output=True, text=True, timeout=120)
    if "setarch: failed" in result.stderr:
        result = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel's memory layout")
    return result


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_templates_are_right_and_clean(tmp_path: Path, sanitizer: str) -> None:
    result = run_under(tmp_path, sanitizer)
    assert (result.returncode, result.stdout) == (0, "0 failures\n"), result.stdout + result.stderr


def test_a_missing_barrier_is_reported(tmp_path: Path) -> None:
    result = run_under(tmp_path, "thread", "-DOMIT_SYNC")
    assert result.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
