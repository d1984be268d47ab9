"""What the tests of Triton kernels share: a device or the interpreter, symmetric matrices, either storage."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
triton = pytest.importorskip("triton", reason="Triton is not installed")

from rpg_fast.kernels import tiles  # noqa: E402

# Triton 3.6's interpreter takes a loop bound as int(array of one element), which NumPy 2.4 refuses.
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
if DEVICE == "cpu" and OLD_TRITON:
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} needs numpy < 2.4, got {numpy.__version__}",
            allow_module_level=True,
        )

SIZES = (64, 96, 128, 147, 200, 1, 33)
FP32_GRADE = 2e-6  # relative Frobenius error; single TF32 products are at 3e-4, single fp16 products at 5e-4


def symmetric(m: int, seed: int) -> Tensor:
    """Symmetric with a spectrum in [-1, 1], float64 [m, m]."""
    a = torch.randn(m, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = a + a.T
    return (a / torch.linalg.matrix_norm(a, ord=2)).float().double()


def matrices(sizes: Sequence[int] = SIZES) -> list[Tensor]:
    return [symmetric(m, seed) for seed, m in enumerate(sizes)]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float(torch.linalg.norm(got.cpu().double() - want) / torch.linalg.norm(want))


@dataclasses.dataclass(frozen=True)
class Storage:
    """Either storage of the kernel behind one face; the scales of pairs are 1 here, as in the filter."""

    pairs: bool

    def store(self, values: list[Tensor], plan: tiles.TilePlan) -> Tensor:
        flat = tiles.pack(values, plan)
        return tiles.split_pairs(flat, torch.ones(len(values), device=DEVICE), plan) if self.pairs else flat

    def load(self, stored: Tensor, plan: tiles.TilePlan) -> list[Tensor]:
        return tiles.unpack(tiles.join_pairs(stored) if self.pairs else stored, plan)
