"""The report's table, picture and refusals; and that the benchmarks import without a warning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measured, report

HERE = Path(__file__).parent


def entry(contestant: str, role: str, median: float, **facts: Any) -> dict[str, Any]:
    stats = {"median": median, "min": 0.9 * median, "max": 1.2 * median, "rounds": 5}
    facts = {"contestant": contestant, "role": role, "setting": "", "slow_ran_once": False} | facts
    return {"name": contestant, "group": "a job", "stats": stats, "extra_info": facts}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A small file like those of the benchmarks."""
    ratios = {"a loop": 40.0, "a copy": 0.5}
    benchmarks = [
        entry("a loop", "peer", 2.0, slow_ran_once=True),
        entry("rpg_fast.thing", "ours", 0.05, setting="C++", times_faster_than=ratios),
        entry("a copy", "bound", 0.025),
    ]
    machine = {
        "device": "a CPU",
        "kind": "cpu",
        "threads": 2,
        "torch": "2.13.0",
        "python": "3.11.7",
        "torch_cuda": None,
        "cpu_cores": 2,
        "load_before": 0.1,
    }
    content = {"machine_info": machine, "commit_info": {"id": "0123456789abcdef"}, "benchmarks": benchmarks}
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(content))
    return path


def test_table_between_the_markers(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nafter <!-- /bench -->\n")
    for _ in range(2):  # a second run changes nothing
        assert report.main([str(results), "--readme", str(readme), "--images", str(tmp_path / "images")]) == 0
        text = readme.read_text()
        assert text.startswith("before\n<!-- bench:cpu -->\n| |")
        assert text.endswith("\n<!-- /bench -->\nafter <!-- /bench -->\n")
        assert "old" not in text
        assert "| a job | a loop: 2 s | a loop: 2 s | `rpg_fast.thing`: **50 ms** | **40x**, 40x |" in text
        assert "a CPU, 2 threads, torch 2.13.0, Python 3.11.7, commit 0123456789." in text
    assert (tmp_path / "images" / "bench_cpu.png").stat().st_size > 5000
    complete = results.with_suffix(".md").read_text()
    assert "| a loop | 2 s | ran once | 40x |" in complete
    assert "| `rpg_fast.thing` (C++) | **50 ms** | 45 ms to 60 ms | |" in complete
    assert "| a copy | 25 ms | 22.5 ms to 30 ms | 0.5x |" in complete


@pytest.mark.parametrize("wrong", [False, True])
def test_many_shapes_of_one_job_share_a_line(wrong: bool, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(results.read_text())
    jobs = []
    for shape, faster in (("2 x 2", 3.0), ("4 x 4", 0.5), ("8 x 8", 20.0)):
        loop, ours, _ = json.loads(json.dumps(content["benchmarks"]))
        ours["extra_info"]["times_faster_than"] = {"a loop": faster}
        if wrong and shape == "4 x 4":
            ours["extra_info"] |= {"wrong": "a NaN", "times_faster_than": {}}
        jobs += [{**row, "group": f"a job, {shape}"} for row in (loop, ours)]
    content["benchmarks"] = jobs
    results.write_text(json.dumps(content))
    assert report.main([str(results), "--images", str(results.parent)]) == 0
    ratios = "**wrong**, wrong" if wrong else "**0.5x to 20x**, 0.5x to 20x"
    assert f"| a job, 3 shapes | a loop | a loop | `rpg_fast.thing` | {ratios} |\n" in capsys.readouterr().out


def test_who_is_wrong_has_no_ratio(results: Path, tmp_path: Path) -> None:
    content = json.loads(results.read_text())
    loop, ours, _ = content["benchmarks"]
    loop["extra_info"]["wrong"] = "off by half"
    del ours["extra_info"]["times_faster_than"]["a loop"]
    results.write_text(json.dumps(content))
    assert report.main([str(results), "--images", str(tmp_path)]) == 0
    assert "| a loop | 2 s | ran once | **wrong**: off by half |" in results.with_suffix(".md").read_text()
    ours["extra_info"] |= {"wrong": "a NaN", "times_faster_than": {}}
    results.write_text(json.dumps(content))
    assert report.main([str(results), "--images", str(tmp_path)]) == 0
    text = results.with_suffix(".md").read_text()
    assert "| `rpg_fast.thing` (C++) | **50 ms** | 45 ms to 60 ms | **wrong**: a NaN |" in text
    assert "| a copy | 25 ms | 22.5 ms to 30 ms | wrong |" in text
    assert "**wrong**, wrong |" in report.summary(measured.read(results))


def test_training_steps_and_memory(results: Path, tmp_path: Path) -> None:
    content = json.loads(results.read_text())
    mean = {"mean_of": {"rpg_fast: step": 99, "rpg_fast: update": 1}, "images": 256}
    steps = [
        entry("as published", "peer", 0.4, overhead=3.0, **mean),
        entry(
            "rpg_fast", "ours", 0.101, overhead=0.01, times_faster_than={"as published": 3.96, "dense": 0.99}, **mean
        ),
        entry("rpg_fast: step", "ours", 0.1, overhead=0.0, part=True, images=256, times_faster_than={}),
        entry("dense", "bound", 0.1, images=256),
    ]
    kept = {"optimizer": 102_000_000, "masks": 12_800_000}
    ours = {"added_bytes": 33_400_000, "kept_bytes": kept, "bound_bytes": 30_000_000}
    footprints = [
        entry("dense", "bound", 1.0, held_bytes=4e8, step_peak_bytes=2e10),
        entry("rpg_fast", "ours", 1.0, held_bytes=4.3e8, step_peak_bytes=2.1e10, times_faster_than={}, **ours),
    ]
    content["benchmarks"] = [e | {"group": "training step, a network"} for e in steps]
    content["benchmarks"] += [e | {"group": "memory of training, a network"} for e in footprints]
    results.write_text(json.dumps(content))
    assert report.main([str(results), "--images", str(tmp_path)]) == 0
    text = results.with_suffix(".md").read_text()
    assert "| rpg_fast | 101 ms | 2,535 | +1.00% |" in text
    assert "| dense | 100 ms | 2,560 |  |" in text
    assert "| rpg_fast | 430 MB | 21 GB | 33.4 MB | optimizer 102 MB, masks 12.8 MB | 30 MB |" in text
    assert "| rpg_fast: step | 100 ms | 2,560 | +0.00% |" in text
    assert "`rpg_fast: step`" not in text  # no contestant for the whole job
    short = report.summary(measured.read(results))
    assert "| `rpg_fast`: **101 ms** | **4x**, 4x |" in short
    assert "Beside a training step of 100 ms (dense): +300.0% as published; +1.0% rpg_fast." in short
    assert "memory" not in short


def growth_entry(m: int, n: int, batch: int, contestant: str, median: float) -> dict[str, Any]:
    role = "ours" if contestant.startswith("rpg_fast") else "peer"
    work = {"flops": 1e9, "bytes": 1e7, "flops_per_s": 1e9 / median, "arithmetic": "fp32", "bound_s": 0.01}
    work |= {"of_matrix_rate": 0.5, "of_copy_rate": 0.1, "bound_by": "matrix rate"}
    missing = {"a slow one": "would take an hour"}
    shape = {"m": m, "n": n, "batch": batch, "one_shape": True, "missing": missing}
    return entry(contestant, role, median, **shape, **work) | {"group": f"growth, {batch} of {m} x {n}"}


def test_a_folder_with_growth_errors_and_work(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    content = json.loads(results.read_text())
    (folder / "rank.json").write_text(json.dumps(content))
    (folder / "summary.json").write_text('{"stages": []}')
    names = ("a loop", "a slow one", "rpg_fast.thing")
    points = [(64, 64, 1), (128, 128, 1), (64, 256, 1), (128, 512, 1), (128, 512, 8)]
    grown = [growth_entry(*p, name, 1e-3 * p[0] * p[2]) for p in points for name in names]
    grown = [e for e in grown if e["name"] != "a slow one" or e["extra_info"]["m"] == 64]
    errors = {"loss_error": 1e-6, "gradient_error": 2e-5}
    compared = [entry(name, "peer", 0.1 * i, **errors) for i, name in enumerate(("one", "two"), 1)]
    compared = [e | {"group": "rank loss, error against time, a job"} for e in compared]
    content["machine_info"] |= {
        "rates": {"copy": 5e10, "matrix": {"fp32": 1e11}},
        "not_measured": {"growth, 512 of 4096 x 4096": "needs 300 GiB"},
    }
    content["benchmarks"] = [*grown, *compared]
    (folder / "growth.json").write_text(json.dumps(content))

    assert report.main([str(folder), "--images", str(tmp_path / "images")]) == 0
    text = (folder / "gpu.md").read_text()
    assert "| 8 of 128 x 512 | 1.02 s | [1] | 1.02 s |" in text
    assert "| 512 of 4096 x 4096 | [2] | [2] | [2] |" in text
    assert "[1] would take an hour" in text
    assert "needs 300 GiB" in text
    assert "| one | 100 ms | 1.0e-06 | 2.0e-05 |" in text
    assert "copy 50 GB/s, read and written; products fp32 100 GFLOP/s" in text
    pictures = {path.name for path in (tmp_path / "images").iterdir()}
    assert pictures == {"bench_gpu.png", "growth_gpu.png", "error_gpu.png", "roofline_gpu.png"}


def test_missing_markers_and_foreign_files(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    assert report.main([str(results), "--readme", str(readme)]) == 1
    assert "wanted one pair of markers <!-- bench:cpu -->" in capsys.readouterr().err
    assert readme.read_text() == "nothing here\n"
    (tmp_path / "other.json").write_text('{"benchmarks": []}')
    assert report.main([str(tmp_path / "other.json")]) == 1
    assert "holds no benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(4321.0, "4321 s"), (12.34, "12.3 s"), (0.9996, "1 s"), (0.99, "990 ms"), (0.0123, "12.3 ms"), (4.5e-5, "45 us")],
)
def test_seconds(value: float, text: str) -> None:
    assert measured.seconds(value) == text


def test_benchmarks_import_without_a_warning() -> None:
    modules = [f"benchmarks.{path.stem}" for path in sorted(HERE.glob("test_*.py"))]
    command = [sys.executable, "-W", "error", "-c", f"import {', '.join(modules)}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, timeout=120)
    assert done.returncode == 0, done.stderr
