"""Launches that repeat themselves: Triton's search for a kernel's binary costs the host more than the launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Step = Callable[[], None]


class Launcher:
    """A kernel on one grid, for launches that differ in nothing on which Triton specialises: which arguments are None,
    dtypes, constants, whether addresses and integers are multiples of 16. The first one goes through Triton's search,
    the others reuse its binary. A grid without programs launches nothing.

    Args:
        kernel: a function under ``triton.jit``.
        grid: its programs along up to three axes.
        options: of the first launch, ``num_warps`` and the like. Constants go among the arguments, in their places.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], **options: Any) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._options = options
        self._again: Callable[..., Any] | None = None if all(grid) else _nothing

    def __call__(self, *arguments: Any) -> None:
        if self._again is not None:
            self._again(*arguments)
            return
        binary = self._kernel[self._grid](*arguments, **self._options)
        if binary is not None:  # as it is in the interpreter
            self._again = binary[self._grid]


def _nothing(*_arguments: Any) -> None:
    return None
