"""Training in several processes on gloo: the same network on any number of them, and what happens when one fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ddp_train
import pytest
import torch
from test_train_resume import differing, flat

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
        env=environment(),
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process comes to: after 60 steps with updates, in float64 and with GroupNorm, and in
    the middle of them."""
    folder = tmp_path_factory.mktemp("alone")
    ddp_train.whole(Team(), folder / "group", group_norm=True)
    ddp_train.stopped(Team(), folder / "state")
    ddp_train.resumed(Team(), folder / "resumed")
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def several(request: pytest.FixtureRequest, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A number of processes, and a folder with what they come to; they go on with the state of one."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copy(alone / "state", folder / "state")
    words = [word for task in ddp_train.TASKS if task != "stopped" for word in (task, folder / task)]
    done = torchrun(request.param, SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    return request.param, folder


def read(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def same_network(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, mask in one["masks"].items():
        assert torch.equal(mask, other["masks"][name]), name
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=1e-9, atol=1e-9)


def test_any_number_of_processes_train_the_same_network(alone: Path, several: tuple[int, Path]) -> None:
    processes, folder = several
    found = read(folder / "group")
    same_network(read(alone / "group"), found)
    assert len(found["digests"]) == processes
    assert all(found["same"])
    assert len(set(found["digests"])) == 1
    pruned = sum(int((~mask).sum()) for mask in found["masks"].values())
    assert pruned == round(0.8 * sum(mask.numel() for mask in found["masks"].values()))


def test_batch_norm_differs_by_rank_and_masks_do_not(several: tuple[int, Path]) -> None:
    processes, folder = several
    found = read(folder / "batch")
    assert len(found["digests"]) == processes
    assert len(set(found["digests"])) == 1
    assert all(found["same"])


def same_end(alone: Path, found: dict[str, Any]) -> None:
    """The network of one process that has never stopped, and its figures: the same images, each once."""
    same_network(read(alone / "group"), found)
    for (loss, hits), (expected, expected_hits) in zip(
        found["figures"], read(alone / "resumed")["figures"], strict=True
    ):
        assert loss == pytest.approx(expected, rel=1e-5)  # the sums are float32
        assert hits == expected_hits


def test_several_processes_go_on_where_one_stopped(alone: Path, several: tuple[int, Path]) -> None:
    same_end(alone, read(alone / "resumed"))
    same_end(alone, read(several[1] / "resumed"))


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), pytest.param(4, 2, marks=pytest.mark.full), pytest.param(2, 4, marks=pytest.mark.full)],
)
def test_another_number_of_processes_goes_on_with_the_same_state(
    before: int, after: int, alone: Path, tmp_path: Path
) -> None:
    done = torchrun(before, SCRIPT, "stopped", tmp_path / "state")
    assert done.returncode == 0, done.stderr
    saved, expected = read(tmp_path / "state"), read(alone / "state")
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-9, atol=1e-9)
    assert torch.equal(*(state["trainer"]["pruner"]["masks"]["bits"] for state in (saved, expected)))
    if after == 1:
        ddp_train.resumed(Team(), tmp_path / "resumed")
    else:
        done = torchrun(after, SCRIPT, "resumed", tmp_path / "resumed")
        assert done.returncode == 0, done.stderr
    same_end(alone, read(tmp_path / "resumed"))


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


def test_a_rank_that_goes_astray_is_named(several: tuple[int, Path]) -> None:
    processes, folder = several
    told = {(folder / f"astray.{rank}").read_text() for rank in range(processes)}
    assert len(told) == 1
    named = f"rank {processes - 1} differs in the weights of 3.weight"
    assert told.pop().startswith(f"20 the processes no longer agree at step 20: {named}")


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


@pytest.mark.parametrize(
    ("processes", "rank"),
    [(2, 1), pytest.param(2, 0, marks=pytest.mark.full), pytest.param(4, 2, marks=pytest.mark.full)],
)
def test_a_killed_rank_ends_the_run_in_one_line_and_the_restart_is_exact(
    processes: int, rank: int, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    killed = torchrun(processes, SCRIPT, "killed", rank, "train", *CLI, f"--out={folder}")
    assert killed.returncode != 0
    ours = [line for line in killed.stderr.splitlines() if "rpg-fast" in line]
    ended = f"rank {rank} of {processes} has ended at step {ddp_train.KILLED_STEP}, so the run ends"
    assert ours == [f"rpg-fast train: error: {ended}; `rpg-fast train --resume {folder}` goes on"]
    assert "rpg_fast/train" not in killed.stderr  # the launcher's own traceback apart, there is none
    assert load_checkpoint(folder / "checkpoint.pt")["trainer"]["step"] == 16
    resumed = torchrun(processes, "-m", "rpg_fast", "train", f"--resume={folder}")
    assert resumed.returncode == 0, resumed.stderr
    whole = torchrun(processes, "-m", "rpg_fast", "train", *CLI, f"--out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    same_run(folder, tmp_path / "whole")
    assert f"{processes} processes, each on CPU with 1 thread" in whole.stdout
    assert whole.stdout.count("sparse accuracy") == 1


def same_run(folder: Path, other: Path) -> None:
    """The checkpoints are equal bit for bit, but for times."""
    one, two = (load_checkpoint(path / "checkpoint.pt") for path in (folder, other))
    for saved in (one, two):
        for row in saved["metrics"]:
            row.update(images_per_second=0, waiting=0)
        saved["config"].pop("checkpoint_every")
    assert differing(dict(flat(one)), dict(flat(two))) == []


@pytest.mark.full
def test_sigterm_to_the_launcher_saves_and_the_restart_is_exact(tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    options = (*CLI, "--epochs=8", "--checkpoint-every=1000")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    running = subprocess.Popen(
        [*launcher, "-m", "rpg_fast", "train", *options, f"--out={folder}"], stderr=subprocess.PIPE, env=environment()
    )
    while not (folder / "checkpoint.pt").exists():
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    told = running.communicate(timeout=100)[1].decode()
    assert told.count("rpg-fast train: stopped after step ") == 1
    step = load_checkpoint(folder / "checkpoint.pt")["trainer"]["step"]
    assert f"stopped after step {step} of" in told
    assert step % 10 or step < 80
    for words in ((f"--resume={folder}",), (*options, f"--out={tmp_path / 'whole'}")):
        done = torchrun(2, "-m", "rpg_fast", "train", *words)
        assert done.returncode == 0, done.stderr
    same_run(folder, tmp_path / "whole")


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
