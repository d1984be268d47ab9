"""PEP 517/660 build backend: setuptools, which asks for torch only where the target environment has none.

With torch among the static requirements, an isolated build would fetch several gigabytes and build against another
torch than the one that will run. The headers of any torch >= 2.11 serve, so the one already installed is used.
"""

from __future__ import annotations

from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from _build.toolchain import MINIMUM_TORCH, find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What a build needs beyond `build-system.requires`: nothing where a torch is found, else a torch."""
    if find_torch():
        return []
    return ["torch>={}.{}".format(*MINIMUM_TORCH)]


get_requires_for_build_editable = get_requires_for_build_wheel
