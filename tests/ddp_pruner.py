"""What one of two processes does in test_pruner.py: a few updates whose scores differ between the ranks."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from rpg_fast import MaskedSGD, PackedMasks, RankPruner


def main(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    results = {}
    for criterion, masked in (("rigl", False), ("set", True)):
        make = MaskedSGD if masked else torch.optim.SGD
        optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
        pruner = RankPruner(
            model,
            optimizer,
            sparsity=0.8,
            total_steps=20,
            update_every=4,
            criterion=criterion,
            generator=torch.Generator().manual_seed(rank),
        )
        for step in range(20):
            generator = torch.Generator().manual_seed(1000 * rank + step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)  # of its own: nothing was reduced
            if pruner.step():
                optimizer.step()
        results[criterion] = pruner.masks.state_dict()["bits"]
        results[f"{criterion} zeros"] = [w.detach() == 0 for w in pruner.weights.values()]
        results[f"{criterion} masks"] = pruner.masks.unpack()
    weight = torch.zeros(2000)
    masks = PackedMasks({"w": weight}).load_({"w": torch.arange(2000) % (rank + 2) == 0})
    results["digests"] = [masks.digest(), masks.broadcast_(src=1).digest()]
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
