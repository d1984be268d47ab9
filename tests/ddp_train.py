"""What each process of test_train_ddp.py does: torchrun --nproc-per-node N ddp_train.py TASK OUT TASK OUT ..."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rpg_fast.train.cli import main
from rpg_fast.train.config import Stopped, TrainConfig, UserError
from rpg_fast.train.data import load_digits
from rpg_fast.train.distributed import Team, end_process, join
from rpg_fast.train.loop import EpochMetrics, Trainer

CONFIG = TrainConfig(
    batch_size=66,  # four processes get 17, 17, 16 and 16
    epochs=3,  # of 20 steps
    update_every=5,
    sparsity=0.8,
    rank_weight=1.0,
    lr=0.05,
    accumulate=2,
)
STOP_AT = 29
KILLED_STEP = 17


def make_trainer(team: Team, *, group_norm: bool, config: TrainConfig = CONFIG) -> Trainer:
    torch.manual_seed(0)

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(2, channels) if group_norm else nn.BatchNorm2d(channels)

    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, bias=False), norm(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 9, 10)),
    )
    return Trainer(model.double(), load_digits(), config, name="sparse", sparse=True, team=team)


def whole(team: Team, out: Path, *, group_norm: bool) -> None:
    """Trains to the end, and leaves the network, and the digests of masks and weights of all ranks."""
    config = CONFIG if group_norm else replace(CONFIG, rank_method="power")  # whose sketches are random
    trainer = make_trainer(team, group_norm=group_norm, config=config)
    trainer.run(lambda metrics: None)
    assert trainer.pruner is not None
    weights = [weight.detach().numpy().tobytes() for weight in trainer.model.parameters()]
    digests = team.gather(trainer.pruner.masks.digest())
    same = [other == weights for other in team.gather(weights)]
    if team.leads:
        masks = trainer.pruner.masks.unpack()
        torch.save({"state_dict": trainer.model.state_dict(), "masks": masks, "digests": digests, "same": same}, out)


def stopped(team: Team, out: Path) -> None:
    """Leaves the state in the middle of an epoch."""
    trainer = make_trainer(team, group_norm=True)

    def on_step() -> None:
        if trainer.step == STOP_AT:
            raise Stopped

    try:
        trainer.run(lambda metrics: None, on_step)
    except Stopped:
        state = {"state_dict": trainer.evaluated.state_dict(), "trainer": trainer.state_dict()}
        if team.leads:
            torch.save(state, out)


def resumed(team: Team, out: Path) -> None:
    """Goes on from what `stopped` has left in state, and leaves the network and the figures of the epochs."""
    saved = torch.load(out.with_name("state"), weights_only=True)
    trainer = make_trainer(team, group_norm=True)
    trainer.evaluated.load_state_dict(saved["state_dict"])
    trainer.load_state_dict(saved["trainer"])
    assert (trainer.epoch, trainer.position, trainer.step) == (1, 9, STOP_AT)
    rows: list[EpochMetrics] = []
    trainer.run(rows.append)
    assert trainer.pruner is not None
    masks, figures = trainer.pruner.masks.unpack(), [(row.train_loss, row.train_accuracy) for row in rows]
    if team.leads:
        torch.save({"state_dict": trainer.model.state_dict(), "masks": masks, "figures": figures}, out)


def astray(team: Team, out: Path) -> None:
    """The last rank changes one weight a little."""
    trainer = make_trainer(team, group_norm=True)

    def on_step() -> None:
        if trainer.step == 7 and team.rank == team.world - 1:
            with torch.no_grad():
                trainer.model[3].weight.view(-1)[5] += 1e-12

    try:
        trainer.run(lambda metrics: None, on_step)
    except UserError as error:
        out.with_name(f"{out.name}.{team.rank}").write_text(f"{trainer.step} {error}")


def killed(rank: int, arguments: list[str]) -> int:
    """`rpg-fast train`, in which that rank is killed in the middle of a step."""
    original = Trainer.train_step

    def train_step(trainer: Trainer, *batch: Tensor) -> tuple[Tensor, Tensor]:
        if trainer.step == KILLED_STEP and trainer.team.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer, *batch)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    return main(arguments)


TASKS = {
    "group": partial(whole, group_norm=True),
    "batch": partial(whole, group_norm=False),
    "stopped": stopped,
    "resumed": resumed,
    "astray": astray,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        sys.exit(killed(int(sys.argv[2]), sys.argv[3:]))
    with join() as everyone:
        for task, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            TASKS[task](everyone, Path(file))
    end_process(0)
