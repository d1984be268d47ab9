"""The CUDA kernels of the selection, run on the host: against the reference, and beyond 2^31."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from selection_cases import Selection, random_selection
from test_csrc_block import CXX, ROOT, run_under

from rpg_fast import reference

SOURCE = ROOT / "tests" / "test_csrc_select.cpp"
STORAGE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # csrc/tiles.h

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler (CXX, g++, clang++)")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    assert CXX is not None
    path = tmp_path_factory.mktemp("csrc") / "select.so"
    options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-shared", "-fPIC"]
    subprocess.run([CXX, *options, f"-I{ROOT / 'csrc'}", str(SOURCE), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def select_on_host(library: ctypes.CDLL, case: Selection, *, blocks: int, threads: int) -> torch.Tensor:
    """`select_topk` by the CUDA kernels, whose blocks run one after another; no threads: each block on this thread."""
    rows = [
        [score.data_ptr(), score.numel(), 0, offset, STORAGE[score.dtype]]
        for score, offset in zip(case.scores, case.offsets, strict=True)
    ]
    table = torch.tensor(rows)
    chosen = torch.zeros(case.nbytes, dtype=torch.uint8)
    eligible = None if case.eligible is None else ctypes.c_void_p(case.eligible.data_ptr())
    library.select_on_host(
        ctypes.c_void_p(table.data_ptr()),
        ctypes.c_int64(len(rows)),
        ctypes.c_void_p(case.counts.data_ptr()),
        eligible,
        ctypes.c_void_p(chosen.data_ptr()),
        ctypes.c_bool(case.absolute),
        ctypes.c_bool(case.per_tensor),
        ctypes.c_int64(blocks),
        ctypes.c_int(threads),
    )
    return chosen


def check(library: ctypes.CDLL, seeds: range) -> None:
    for seed in seeds:
        case = random_selection(seed)
        got = select_on_host(library, case, blocks=1 + seed % 7, threads=0)
        assert torch.equal(got, reference.select_topk(*case.arguments())), f"seed {seed}"


def test_counts_and_ties_are_exact(library: ctypes.CDLL) -> None:
    check(library, range(500))


@pytest.mark.full
def test_counts_and_ties_are_exact_in_ten_thousand_cases(library: ctypes.CDLL) -> None:
    check(library, range(500, 10_500))


def test_many_threads_and_blocks_change_no_bit(library: ctypes.CDLL) -> None:
    for seed in range(20):
        case = random_selection(seed)
        want = select_on_host(library, case, blocks=1, threads=0)
        for blocks, threads in ((2, 1), (5, 2), (1000, 5)):
            assert torch.equal(select_on_host(library, case, blocks=blocks, threads=threads), want), f"seed {seed}"


def test_elements_beyond_2_to_the_31(library: ctypes.CDLL) -> None:
    """Memory becomes real when it is touched, and only eligible scores are."""
    numel = 2**31 + 5000
    try:
        scores = torch.empty(numel, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for 2^31 scores: {error}")
    eligible = torch.zeros(numel // 8, dtype=torch.uint8)
    ties, best = [5, 2**31 - 1, 2**31, numel - 1], 2**31 + 4321
    for index in (*ties, best):
        eligible[index // 8] |= 1 << index % 8
        scores[index] = 1.0 if index in ties else 2.0
    case = Selection([scores], torch.tensor([4]), [0], numel // 8, eligible, True, False)
    chosen = select_on_host(library, case, blocks=3, threads=0)
    found = [8 * int(byte) + bit for byte in chosen.nonzero() for bit in range(8) if chosen[byte] >> bit & 1]
    assert found == [*ties[:3], best]


def test_every_barrier_is_needed(tmp_path: Path) -> None:
    """Left out one at a time, all are missed but those that end a kernel, those that end a tile where another one
    follows, and those before a total that a kernel does not ask for."""
    every_report = "suppress_equal_stacks=0 suppress_equal_addresses=0 symbolize=0 exitcode=0"
    result = run_under(tmp_path, SOURCE.name, "thread", arguments=["omit"], options=every_report)
    assert result.returncode == 0
    _, *runs = re.split(r"\nomitted (\w+ \d+)\n", result.stderr)
    unnoticed = [name for name, reports in zip(runs[::2], runs[1::2], strict=True) if "data race" not in reports]
    assert len(runs) > 2 * 70
    assert len(unnoticed) <= 14, unnoticed
