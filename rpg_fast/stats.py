"""What a pruner's masks are now, and what the last topology update did to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PruneStats:
    """Counts per weight, int64 [B] on the device, in the order of `names`. They were counted when they were asked for;
    nothing waits for the device until the values of a tensor are read, or all at once by `read`.

    Attributes:
        total, active: size and ones of each mask.
        pruned, grown: weights that the last topology update switched off and on.
        regrown: those of `grown` that had been active before, at any time since the pruner was built (in a training
            that starts dense, all of them).
        restarted: weights that the update dropped and grew again at once: active as before, at zero.
        left_out: bool [layers with the rank loss], or None before the first rank loss: which weights `method="power"`
            has left out of its last call, see `RankPruner.settle`.
    """

    names: list[str]
    total: Tensor
    active: Tensor
    pruned: Tensor
    grown: Tensor
    regrown: Tensor
    restarted: Tensor
    left_out: Tensor | None

    @property
    def sparsity(self) -> Tensor:
        """A property: the fraction of zeros of each mask, float64 [B]."""
        return 1 - self.active.double() / self.total.clamp(min=1)

    def read(self) -> dict[str, dict[str, int]]:
        """``{name: {"total": ..., "active": ..., ...}}``, all counts on the host by one read."""
        fields = ("total", "active", "pruned", "grown", "regrown", "restarted")
        rows: list[list[int]] = torch.stack([getattr(self, name) for name in fields], 1).tolist()  # [B, fields]
        return {name: dict(zip(fields, row, strict=True)) for name, row in zip(self.names, rows, strict=True)}
