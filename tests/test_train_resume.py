"""A run that is killed, stopped, or short of disk: what is left of it, and that it ends as if nothing had happened."""

from __future__ import annotations

import csv
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rpg_fast.train import checkpoint as files
from rpg_fast.train.checkpoint import RunFolder, load_checkpoint, random_states, restore_random_states
from rpg_fast.train.cli import main
from rpg_fast.train.loop import Trainer

TINY = (
    *("--data=digits", "--width=4", "--epochs=3", "--batch-size=128", "--update-every=4", "--sparsity=0.9"),
    *("--threads=1", "--checkpoint-every=3"),
)
VARIANTS = {
    "sgd": (),
    "all": ("--criterion=set", "--optimizer=adamw", "--ema-decay=0.9", "--mixup=0.2", "--accumulate=2"),
    "momentum": ("--criterion=momentum", "--autocast=fp16", "--rank-method=power", "--optimizer-impl=torch"),
}
TIMES = ("images_per_second",)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)


def train(folder: Path, *options: str) -> int:
    return main(["train", *TINY, *options, f"--out={folder}"])


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a checkpoint by their place; tensors as their bytes."""
    if isinstance(value, dict):
        value = [(key, item) for key, item in value.items() if key not in TIMES]
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    elif isinstance(value, Tensor):
        value = (str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist())
        yield name, value
        return
    else:
        yield name, repr(value)
        return
    for key, item in value:
        yield from flat(item, f"{name}.{key}")


def content(folder: Path) -> dict[str, Any]:
    """All that a finished run has come to, but times: both checkpoints and the table."""
    found: dict[str, Any] = {}
    for file in ("dense.pt", "checkpoint.pt"):
        if (folder / file).exists():
            found |= dict(flat(load_checkpoint(folder / file), file))
    with open(folder / "metrics.csv", newline="") as table:
        for number, row in enumerate(csv.DictReader(table)):
            found |= {f"{number} {key}": value for key, value in row.items() if key not in TIMES}
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def in_child(action: Callable[[], int]) -> int:
    """The exit status of `action` in a process of its own (minus the signal that ended it), quietly."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            status = action()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(moment: int) -> None:
    """From now on this process kills itself at that step, write or rename, counted from 1."""
    left = moment

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    Trainer.train_step = counted(Trainer.train_step)  # type: ignore[method-assign]
    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    files.tempfile.mkstemp = counted(files.tempfile.mkstemp)


def kill_and_resume(folder: Path, options: tuple[str, ...], moments: list[int]) -> None:
    """Trains into `folder`, killed at these moments one after the other, to the end."""

    def go(moment: int | None) -> int:
        if moment is not None:
            killed_at(moment)
        if (folder / "config.json").exists():
            return main(["train", f"--resume={folder}"])
        return train(folder, *options)

    for moment in moments:
        assert in_child(lambda moment=moment: go(moment)) in (-signal.SIGKILL, 0)
    assert in_child(lambda: go(None)) == 0


MOMENTS = 200  # steps, writes and renames in a whole run, about


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(variant: str, tmp_path: Path) -> None:
    options = VARIANTS[variant]
    assert in_child(lambda: train(tmp_path / "whole", *options)) == 0
    draw = random.Random(variant)
    kill_and_resume(tmp_path / "killed", options, [draw.randint(1, MOMENTS // 2) for _ in range(3)])
    assert differing(content(tmp_path / "whole"), content(tmp_path / "killed")) == []
    assert [file.name for file in (tmp_path / "killed").iterdir() if file.name.startswith(".")] == []


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_random_kills(variant: str, tmp_path: Path) -> None:
    options = VARIANTS[variant]
    assert in_child(lambda: train(tmp_path / "whole", *options)) == 0
    whole, draw = content(tmp_path / "whole"), random.Random(20)
    for number in range(20):
        folder = tmp_path / f"killed {number}"
        kill_and_resume(folder, options, [draw.randint(1, MOMENTS)])
        assert differing(whole, content(folder)) == []
