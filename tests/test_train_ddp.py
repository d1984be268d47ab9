"""Training in several processes on gloo: the same network on any number of them, and what happens when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_train
import pytest
import torch

from rpg_fast.train.checkpoint import load_checkpoint
from rpg_fast.train.config import TrainConfig, UserError
from rpg_fast.train.data import Batches, make_synthetic
from rpg_fast.train.distributed import Team, differences, fingerprints

SCRIPT = Path(ddp_train.__file__)


def torchrun(processes: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Runs a script, or `-m rpg_fast` with its arguments, in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def trained(processes: int, norm: str, out: Path) -> dict[str, Any]:
    if processes == 1:
        ddp_train.whole(Team(), out, group_norm=norm == "group")
    else:
        done = torchrun(processes, SCRIPT, norm, out)
        assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to after 60 steps with updates, in float64 and with GroupNorm."""
    return trained(1, "group", tmp_path_factory.mktemp("alone") / "out")


def same_network(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, mask in one["masks"].items():
        assert torch.equal(mask, other["masks"][name]), name
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.full)])
def test_any_number_of_processes_train_the_same_network(processes: int, alone: dict[str, Any], tmp_path: Path) -> None:
    several = trained(processes, "group", tmp_path / "out")
    same_network(alone, several)
    assert len(several["digests"]) == processes
    assert all(several["same"])
    assert len(set(several["digests"])) == 1
    pruned = sum(int((~mask).sum()) for mask in several["masks"].values())
    assert pruned == round(0.8 * sum(mask.numel() for mask in several["masks"].values()))


def test_batch_norm_differs_by_rank_and_masks_do_not(tmp_path: Path) -> None:
    result = trained(2, "batch", tmp_path / "out")
    assert len(set(result["digests"])) == 1
    assert all(result["same"])
    assert len(result["digests"]) == 2


def test_another_number_of_processes_goes_on_with_the_same_state(alone: dict[str, Any], tmp_path: Path) -> None:
    """Two processes stop in the middle of an epoch, one goes on, and ends where one alone would."""
    done = torchrun(2, SCRIPT, "stopped", tmp_path / "state")
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "state", weights_only=True)
    trainer = ddp_train.make_trainer(Team(), group_norm=True)
    trainer.evaluated.load_state_dict(saved["state_dict"])
    trainer.load_state_dict(saved["trainer"])
    assert (trainer.epoch, trainer.position, trainer.step) == (1, 9, ddp_train.STOP_AT)
    assert trainer.pruner is not None
    rows: list[Any] = []
    trainer.run(rows.append)
    masks = trainer.pruner.masks.unpack()
    same_network(alone, {"state_dict": trainer.model.state_dict(), "masks": masks})
    reference = ddp_train.make_trainer(Team(), group_norm=True)
    expected: list[Any] = []
    reference.run(expected.append)
    assert [row.train_loss for row in rows] == pytest.approx([row.train_loss for row in expected[1:]], rel=1e-5)
    assert [row.train_accuracy for row in rows] == [row.train_accuracy for row in expected[1:]]


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("first", [0, 2])
def test_the_parts_of_all_processes_are_the_batch(world: int, first: int) -> None:
    data = make_synthetic(train_images=50, test_images=23, num_classes=5)

    def batches(rank: int, world: int) -> list[torch.Tensor]:
        order = torch.Generator().manual_seed(0)
        some = Batches(data, data.train, 10, generator=order, rank=rank, world=world)
        return [images for images, _ in some.iterate(first)]

    parts = zip(*(batches(rank, world) for rank in range(world)), strict=True)
    for batch, part in zip(batches(0, 1), parts, strict=True):
        assert torch.equal(torch.cat(part), batch)
    labels = [torch.cat([y for _, y in Batches(data, data.test, 8, rank=r, world=world)]) for r in range(world)]
    assert sorted(torch.cat(labels).tolist()) == sorted(data.test.labels.tolist())


def test_a_rank_that_goes_astray_is_named(tmp_path: Path) -> None:
    done = torchrun(2, SCRIPT, "astray", tmp_path / "told")
    assert done.returncode == 0, done.stderr
    told = {(tmp_path / f"told.{rank}").read_text() for rank in range(2)}
    assert len(told) == 1
    text = told.pop()
    assert text.startswith("20 the processes no longer agree at step 20: rank 1 differs in the weights of 3.weight")


def test_differences_name_ranks_and_tensors() -> None:
    names = ["the weights of a", "the weights of b", "the mask of b"]
    assert differences(names, [[1, 2, 3]] * 4) == ""
    assert differences(names, [[1, 2, 3], [1, 2, 3], [1, 9, 3], [1, 2, 3]]) == "rank 2 differs in the weights of b"
    assert differences(names, [[9, 9, 3], [1, 2, 3], [1, 2, 3], [1, 2, 8]]) == (
        "rank 0 differs in the weights of a and 1 more; rank 3 differs in the mask of b"
    )


def test_fingerprints_see_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.int64):
        tensor = (torch.rand(7, 5, generator=generator) * 100).to(dtype)
        same, swapped = tensor.clone(), tensor.flip(0).contiguous()
        assert torch.equal(fingerprints([tensor, same])[0], fingerprints([tensor, same])[1])
        raw = same.view(-1).view(torch.uint8)
        found = {int(fingerprints([tensor])), int(fingerprints([swapped]))}
        for byte in range(0, raw.numel(), 3):
            raw[byte] ^= 1
            found.add(int(fingerprints([same])))
            raw[byte] ^= 1
        assert len(found) == (1 if torch.equal(tensor, swapped) else 2) + len(range(0, raw.numel(), 3))
    scalar = torch.tensor(3.0)
    assert int(fingerprints([scalar])) != int(fingerprints([-scalar]))
    assert int(fingerprints([torch.zeros(3)])) != int(fingerprints([torch.zeros(4)]))


CLI = (
    *("--data=digits", "--width=4", "--epochs=2", "--batch-size=128", "--update-every=4", "--sparsity=0.9"),
    *("--threads=1", "--no-dense-baseline", "--checkpoint-every=4"),
)


def test_a_killed_rank_ends_the_run_in_one_line_and_the_restart_is_exact(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    killed = torchrun(2, SCRIPT, "killed", "train", *CLI, f"--out={folder}")
    assert killed.returncode != 0
    ours = [line for line in killed.stderr.splitlines() if "rpg-fast" in line]
    assert ours == [
        f"rpg-fast train: error: rank 1 of 2 has ended at step {ddp_train.KILLED_STEP}, so the run ends; "
        f"`rpg-fast train --resume {folder}` goes on"
    ]
    assert "rpg_fast/train" not in killed.stderr  # the launcher's own traceback apart, there is none
    assert load_checkpoint(folder / "checkpoint.pt")["trainer"]["step"] == 16
    resumed = torchrun(2, "-m", "rpg_fast", "train", f"--resume={folder}")
    assert resumed.returncode == 0, resumed.stderr
    whole = torchrun(2, "-m", "rpg_fast", "train", *CLI, f"--out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    one, other = (load_checkpoint(path / "checkpoint.pt") for path in (folder, tmp_path / "whole"))
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name]), name
    assert torch.equal(*(saved["trainer"]["pruner"]["masks"]["bits"] for saved in (one, other)))
    for row, expected in zip(one["metrics"], other["metrics"], strict=True):
        times = {"images_per_second": 0, "waiting": 0}
        assert {**row, **times} == {**expected, **times}
    assert "2 processes, each on CPU with 1 thread" in whole.stdout
    assert whole.stdout.count("sparse accuracy") == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--batch-size=1",), "--batch-size 1 cannot be shared among 2 processes"),
        (("--device=cuda:0",), "--device cuda:0 names one GPU for 2 processes"),
    ],
)
def test_bad_input_is_told_once(options: tuple[str, ...], text: str, tmp_path: Path) -> None:
    done = torchrun(2, "-m", "rpg_fast", "train", *CLI, *options, f"--out={tmp_path / 'run'}")
    assert done.returncode != 0
    assert done.stderr.count("rpg-fast train: error:") == 1
    assert text in done.stderr
    assert not (tmp_path / "run").exists()


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="--batch-size 66 cannot be shared among 67 processes with --accumulate 1"):
        ddp_train.make_trainer(
            Team(rank=3, world=67), group_norm=True, config=TrainConfig(batch_size=66, update_every=5)
        )
