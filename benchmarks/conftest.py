"""Options, scale and device of the benchmarks. With ``--benchmark-only`` they run at full size and take times; without
it the same code runs on a small network, once, for the comparison of results."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import rpg_fast
from benchmarks.environment import environment
from benchmarks.peers import one_thread_each
from benchmarks.race import CLOCK
from benchmarks.rates import Rates, measure_rates
from rpg_fast import _info


@dataclass(frozen=True)
class Scale:
    """Where and how large: the whole ResNet-50, or (not `full`) one with an eighth of its channels."""

    device: torch.device
    full: bool

    def backend(self, op: str) -> str:
        """What the dispatcher runs for one of rpg_fast's ops: reference, C++, CUDA or Triton."""
        return _info.backend(op, self.device.type)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rpg_fast benchmarks")
    group.addoption("--commit", default=None, help="the commit to record, where there is no .git")


BEGAN: pytest.StashKey[float] = pytest.StashKey()  # of time.monotonic()
LOAD: pytest.StashKey[float] = pytest.StashKey()  # processes that wanted to run before these did
RATES: pytest.StashKey[Rates] = pytest.StashKey()
NOT_MEASURED: pytest.StashKey[dict[str, str]] = pytest.StashKey()  # title of a race -> why


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()
    config.stash[LOAD] = os.getloadavg()[0]
    config.stash[NOT_MEASURED] = {}
    if not config.getoption("benchmark_only"):
        config.option.benchmark_disable = True  # one small run each: there is nothing to tell about time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.now))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="package", autouse=True)
def _small_runs_on_one_thread(scale: Scale) -> Iterator[None]:
    with nullcontext() if scale.full else one_thread_each():
        yield


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest, device: torch.device) -> Scale:
    return Scale(device, full=request.config.getoption("benchmark_only"))


@pytest.fixture(scope="session")
def began(request: pytest.FixtureRequest, scale: Scale) -> float | None:
    """time.monotonic() when these tests began, where a stage of gpu.sh must end; None where there is no limit."""
    return request.config.stash[BEGAN] if scale.full and scale.device.type == "cuda" else None


@pytest.fixture(scope="session")
def rates(request: pytest.FixtureRequest, scale: Scale) -> Rates | None:
    """The device's ceilings, measured once a session; None in small runs."""
    if not scale.full:
        return None
    measured = request.config.stash[RATES] = measure_rates(scale.device.type)
    return measured


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    rates = config.stash.get(RATES, None)
    facts = environment(commit=config.getoption("commit") or "")
    facts["device"] = facts["device"] or _processor()
    del facts["commit"]  # commit_info has it
    return facts | {
        "kind": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "load_before": config.stash[LOAD],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "rpg_fast": rpg_fast.__version__,
        "rates": {"copy": rates.copy, "matrix": rates.matrix} if rates else None,
        "not_measured": config.stash[NOT_MEASURED],
        "ops": {op: row["cuda" if cuda else "cpu"] for op, row in _info.backend_table().items()},
    }


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    known = {key: commit_info.get(key) for key in ("id", "dirty", "time")}
    commit_info.clear()
    commit_info.update(known)
    if config.getoption("commit"):
        commit_info.update(id=config.getoption("commit"), dirty=None, time=None)


def _processor() -> str:
    """The model of the CPU, by its own word where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
