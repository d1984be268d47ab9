"""The host/device templates of csrc on the host under the compilers' sanitizers: arithmetic and barriers of the CUDA
kernels, without a GPU."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("test_csrc_block.cpp", "test_csrc_spectrum.cpp", "test_csrc_select.cpp")
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler (CXX, g++, clang++)")


def run_under(
    directory: Path, source: str, sanitizer: str, *flags: str, arguments: Sequence[str] = (), options: str = ""
) -> subprocess.CompletedProcess[str]:
    """Compiles a test program with a sanitizer and runs it with the sanitizer's options."""
    assert CXX is not None
    program = directory / "program"
    compiler_options = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-fsanitize={sanitizer}"]
    command = [
        CXX,
        *compiler_options,
        "-fno-sanitize-recover=all",
        *flags,
        f"-I{ROOT / 'csrc'}",
        str(ROOT / "tests" / source),
        "-o",
        str(program),
    ]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in compiled.stderr:  # the linker, of the sanitizer's library
        pytest.skip(f"{CXX} comes without the {sanitizer} sanitizer")
    assert compiled.returncode == 0, compiled.stderr
    # ThreadSanitizer's shadow memory collides with some randomized layouts.
    fixed_layout = ["setarch", platform.machine(), "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    run = functools.partial(
        subprocess.run, capture_output=True, text=True, timeout=120, env=os.environ | {"TSAN_OPTIONS": options}
    )
    result = run([*fixed_layout, str(program), *arguments])
    if "setarch: failed" in result.stderr:
        result = run([str(program), *arguments])
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel's memory layout")
    return result


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_templates_are_right_and_clean(tmp_path: Path, source: str, sanitizer: str) -> None:
    result = run_under(tmp_path, source, sanitizer)
    assert (result.returncode, result.stdout) == (0, "0 failures\n"), result.stdout + result.stderr


def test_a_missing_barrier_is_reported(tmp_path: Path) -> None:
    result = run_under(tmp_path, SOURCES[0], "thread", "-DOMIT_SYNC")
    assert result.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in result.stderr


def test_every_barrier_is_needed(tmp_path: Path) -> None:
    """Left out one at a time, all but two are missed: one that a caller's own way of dealing out the work makes
    superfluous, and one of the test program's."""
    every_report = "suppress_equal_stacks=0 suppress_equal_addresses=0 symbolize=0 exitcode=0"
    result = run_under(tmp_path, SOURCES[1], "thread", arguments=["omit"], options=every_report)
    assert result.returncode == 0
    _, *runs = re.split(r"\nomitted (\w+ \d+)\n", result.stderr)
    unnoticed = [name for name, reports in zip(runs[::2], runs[1::2], strict=True) if "data race" not in reports]
    assert len(runs) > 2 * 100
    assert len(unnoticed) <= 2, unnoticed
