"""The cost model finds the coefficients that times were made with, and the pages hold what the results give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cost, inference
from benchmarks.cost import Model, Point
from benchmarks.measured import read
from benchmarks.report import insert

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRUE = Model(matrix=2e-4, products=1e-11, eigen=2e-10, threads=2)
SHAPES = ((64, 64, 1), (64, 576, 8), (256, 256, 1), (256, 2304, 3), (1024, 1024, 1), (1024, 4096, 1))


def test_the_fit_finds_the_coefficients() -> None:
    points = [Point(m, n, batch, TRUE([(m, n)] * batch)) for m, n, batch in SHAPES]
    found = cost.fit(points, TRUE.threads)
    assert (found.matrix, found.products, found.eigen) == pytest.approx((TRUE.matrix, TRUE.products, TRUE.eigen))
    assert max(map(abs, found.misfits(points))) < 1e-9


def test_no_coefficient_is_negative() -> None:
    falling = [Point(m, n, 1, 1 / m) for m, n, _ in SHAPES]
    found = cost.fit(falling, 2)
    assert min(found.matrix, found.products, found.eigen) >= 0


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="three points or more"):
        cost.fit([Point(64, 64, 1, 1.0)] * 2, 2)


def test_one_thread_a_matrix() -> None:
    one, four = TRUE([(256, 1024)]), TRUE([(256, 1024)] * 4)
    assert four == pytest.approx(2 * one)  # two rounds of two threads


def test_networks_have_their_known_sizes() -> None:
    found = cost.networks()
    assert [len(shapes) for shapes, _ in found.values()] == [53, 104, 155, 48]
    assert found["ResNet-50"][1] == 25_502_912
    assert found[cost.VIT][1] == 12 * 12 * 768**2


def test_the_page_of_costs_is_that_of_the_results(tmp_path: Path) -> None:
    results, facts = read(RESULTS / "cpu.json"), json.loads((RESULTS / "cost.json").read_text())
    page = (ROOT / "docs" / "cost.md").read_text()
    assert insert(page, "cost", cost.report(results, facts)) == page, "python -m benchmarks.cost report --page is due"
    pytest.importorskip("matplotlib")
    cost.draw(results, facts, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 5000


def test_the_page_of_inference_is_that_of_the_results() -> None:
    page = (ROOT / "docs" / "inference.md").read_text()
    text = inference.table(read(RESULTS / "inference_cpu.json"))
    assert insert(page, "inference", text) == page, "python -m benchmarks.inference --page is due"


@pytest.mark.full
def test_a_process_measures_its_parts(tmp_path: Path) -> None:
    cost.process(tmp_path / "times.json")
    times = json.loads((tmp_path / "times.json").read_text())
    assert times["processes"] == 1
    assert times["mask_bytes"] >= 2 * 25_502_912 / 8
    assert times["rank"] > 0
