"""Loads the compiled kernels if they are there. Where they are not, plain torch serves every op and `load` says why."""

from __future__ import annotations

import functools
import importlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: F401  the library finds libtorch_cpu among what torch has loaded

EXT_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
RECORD = Path(__file__).with_name("_C" + EXT_SUFFIX.removesuffix(".so") + ".json")


@dataclass(frozen=True)
class Extension:
    """`loaded`, or `reason` why not; `facts`: compilers, torch, CUDA targets and sources of the library; `record`: what
    the last build wrote beside it (its outcome in one line, registers and spills of each CUDA kernel, errors)."""

    loaded: bool
    reason: str | None
    facts: dict[str, Any]
    record: dict[str, Any]


def _read_record() -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(RECORD.read_text())
    except (OSError, ValueError):
        return {}
    return record


@functools.cache
def load() -> Extension:
    """Imports `rpg_fast._C`, which registers its kernels with the dispatcher. Never raises for a missing or unusable
    library; every call returns what the first one found."""
    record = _read_record()
    try:
        _C = importlib.import_module("rpg_fast._C")
    except ModuleNotFoundError:
        reason = "not built: `pip install -e .`, or `python setup.py build_ext --inplace`"
        if record and record["facts"] is None:
            reason = record["outcome"]
        return Extension(False, reason, {}, record)
    except ImportError as error:
        return Extension(False, f"the library does not load: {error}", {}, record)
    return Extension(True, None, _C.build_facts, record)
