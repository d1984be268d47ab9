"""Random selections: sizes, dtypes, ties, values that are often forgotten, eligible bits and counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg_fast import reference

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 1.0]


@dataclass(frozen=True)
class Selection:
    """The arguments of `select_topk`, in order."""

    scores: list[Tensor]
    counts: Tensor
    offsets: list[int]
    nbytes: int
    eligible: Tensor | None
    absolute: bool
    per_tensor: bool

    def arguments(self) -> tuple[list[Tensor], Tensor, list[int], int, Tensor | None, bool, bool]:
        return self.scores, self.counts, self.offsets, self.nbytes, self.eligible, self.absolute, self.per_tensor


def _scores(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    kind = draw(5)
    values = torch.randn(numel, generator=generator, dtype=torch.float64) * 10.0 ** (draw(9) - 4)
    if kind == 1:
        values = torch.randint(-3, 4, (numel,), generator=generator).double()  # ties
    elif kind == 2:
        values = torch.full_like(values, SPECIAL[draw(len(SPECIAL))])
    elif kind == 3:
        values = 1 + torch.randint(1000, (numel,), generator=generator) * 2.0 ** -draw(45)  # equal first digits
    elif kind == 4:
        values = torch.where(torch.rand(numel, generator=generator) < 0.9, 0.0, values)  # sparse
    special = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), (numel,), generator=generator)]
    share = [0.0, 0.02, 0.5][draw(3)]
    return torch.where(torch.rand(numel, generator=generator) < share, special, values).to(dtype)


def random_selection(seed: int) -> Selection:
    """One selection from up to four tensors; half of them have several tiles of 4096 scores."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    per_tensor, absolute, restricted = draw(2) == 1, draw(2) == 1, draw(2) == 1
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if draw(4) == 0:
        dtypes = [torch.float64]
    scores, offsets, end = [], [], 0
    for _ in range(1 + draw(4)):
        numel = [draw(20), draw(3000), draw(12000), 4096 * draw(3)][draw(4)]
        scores.append(_scores(numel, dtypes[draw(len(dtypes))], generator))
        offsets.append(end + draw(5))
        end = offsets[-1] + (numel + 7) // 8
    numels = [score.numel() for score in scores]
    eligible = None
    if restricted:
        density = torch.rand((), generator=generator)
        eligible = reference.pack([torch.rand(n, generator=generator) < density for n in numels], offsets, end)
    limits = numels if per_tensor else [sum(numels)]
    counts = torch.tensor([[draw(n + 3) - 1, round(n * 0.1), n // 2][draw(3)] for n in limits])
    return Selection(scores, counts, offsets, end, eligible, absolute, per_tensor)
