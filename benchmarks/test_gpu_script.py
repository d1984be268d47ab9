"""gpu.sh without a GPU: its stages, what it packs, what it refuses; with stand-ins for nvidia-smi and Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STAGES = ["probe", "build", "test", "graph", "sanitize", "rank", "error", "growth", "svd", "step", "train", "memory"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

NVIDIA_SMI = """#!/usr/bin/env bash
case $* in *compute_cap*) echo 9.0 ;; *driver*) echo 580.1 ;; *) echo "NVIDIA H200" ;; esac
"""
# Writes what each program that it is asked to run would write; fails on a benchmark of whose name it is told.
PYTHON = """#!/usr/bin/env bash
echo "python $*"
for argument in "$@"; do
  case $argument in
    --benchmark-json=*) echo '{"benchmarks": []}' >"${argument#*=}" ;;
    */environment.py) [[ $* == *--add-to* ]] || echo '{"device": "a stand-in"}' ;;
  esac
done
if [[ $* == *profile_step* ]]; then echo picture >"${*: -1}/step_profile.png"; fi
if [[ $FAILING && $* == *"$FAILING"* ]]; then exit 3; fi
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    for name, text in (("nvidia-smi", NVIDIA_SMI), ("stand-in", PYTHON)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path / "bin"


def gpu_sh(tools: Path, *arguments: str, failing: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "OUT": str(tools.parent / "out"),
        "FAILING": failing,
    }
    command = ["bash", str(SCRIPT), "--commit", "0123", "--python", str(tools / "stand-in"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)


def test_the_script_parses() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_stage_is_described_runs_and_has_a_limit() -> None:
    text = SCRIPT.read_text()
    described = re.findall(r"^#   (\w+) {2,}\S", text, re.MULTILINE)
    assert described == [*STAGES, "bench", "all"]
    for stage in STAGES:
        assert re.search(rf"^stage_{stage}\(\)", text, re.MULTILINE), stage
        assert re.search(rf"^export -f .*\bstage_{stage}\b", text, re.MULTILINE), stage
    (limit,) = re.findall(r"STAGE_SECONDS=(\d+)", text)
    assert int(limit) < 8 * 60


def test_packed_results_of_two_calls(tools: Path) -> None:
    done = gpu_sh(tools, "--pack", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    done = gpu_sh(tools, "--pack", "memory")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tools.parent / "out"
    assert {path.name for path in out.iterdir()} == {"summary.json", "results.tgz"}
    summary = json.loads((out / "summary.json").read_text())
    assert [(stage["stage"], stage["outcome"]) for stage in summary["stages"]] == [("memory", "passed")]
    with tarfile.open(out / "results.tgz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"train.json", "train.log", "step_profile.png", "memory.json", "memory.log"} <= names


def test_a_failed_benchmark_leaves_the_picture_and_is_told(tools: Path) -> None:
    done = gpu_sh(tools, "train", failing="test_train_step")
    assert done.returncode == 1
    out = tools.parent / "out"
    (stage,) = json.loads((out / "summary.json").read_text())["stages"]
    assert (stage["outcome"], stage["exit_status"]) == ("failed", 3)
    assert (out / "step_profile.png").exists()
    assert "--benchmark-only" in (out / "train.log").read_text()


def test_an_unknown_stage_is_refused_with_those_there_are(tools: Path) -> None:
    done = gpu_sh(tools, "trian")
    assert done.returncode == 1
    assert "unknown argument 'trian'" in done.stderr
    assert all(stage in done.stderr for stage in STAGES)
