"""A run that is killed, stopped, or short of disk: what is left of it, and that it ends as if nothing had happened."""

from __future__ import annotations

import csv
import errno
import multiprocessing
import os
import random
import re
import shutil
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
from rpg_fast.train import run
from rpg_fast.train.checkpoint import RunFolder, load_checkpoint, random_states, restore_random_states
from rpg_fast.train.cli import main
from rpg_fast.train.config import TrainConfig, UserError
from rpg_fast.train.loop import Trainer

TINY = (
    *("--data=digits", "--width=4", "--epochs=3", "--batch-size=128", "--update-every=4", "--sparsity=0.9"),
    *("--threads=1", "--checkpoint-every=3"),
)
VARIANTS = {
    "sgd": (),
    "all": ("--criterion=set", "--optimizer=adamw", "--ema-decay=0.9", "--mixup=0.2", "--accumulate=2"),
    "momentum": ("--criterion=momentum", "--autocast=fp16", "--rank-method=power", "--optimizer-impl=torch"),
    "official": ("--semantics=official", "--rank-every=update", "--grow-steps=3"),
}
TIMES = ("images_per_second", "waiting")


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


FORKS = multiprocessing.get_context("forkserver")  # of a process without threads, which a fork would lose
FORKS.set_forkserver_preload(["rpg_fast.train.run", "sklearn.datasets"])


def in_child(action: Callable[..., int], *arguments: Any) -> int:
    """The exit status of `action` in a process of its own (minus the signal that ended it), quietly."""
    child = FORKS.Process(target=_in_child, args=(action, *arguments))
    child.start()
    child.join(300)
    assert child.exitcode is not None
    return child.exitcode


def _in_child(action: Callable[..., int], *arguments: Any) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    run.draw_report = lambda *arguments: None
    sys.exit(action(*arguments))


def killed_at(moment: int) -> None:
    """From now on this process kills itself at that step, write or rename, counted from 1; in a write in the middle."""
    left = moment

    def due() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if due():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    def half_written(handle: int, mode: str) -> Any:
        if due():
            os.write(handle, b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return fdopen(handle, mode)

    fdopen = os.fdopen
    Trainer.train_step = counted(Trainer.train_step)  # type: ignore[method-assign]
    os.replace, os.fsync, os.fdopen = counted(os.replace), counted(os.fsync), half_written  # type: ignore[assignment]
    files.tempfile.mkstemp = counted(files.tempfile.mkstemp)


def go(folder: Path, options: tuple[str, ...], moment: int | None) -> int:
    """Begins or resumes the run in `folder`, killed at that moment if one is given."""
    if moment is not None:
        killed_at(moment)
    if (folder / "config.json").exists():
        return main(["train", f"--resume={folder}"])
    return train(folder, *options)


def kill_and_resume(folder: Path, options: tuple[str, ...], moments: list[int]) -> None:
    """Trains into `folder`, killed at these moments one after the other, to the end."""
    ends = [in_child(go, folder, options, moment) for moment in moments]
    assert ends[0] == -signal.SIGKILL
    assert set(ends) <= {-signal.SIGKILL, 0}
    assert in_child(go, folder, options, None) == 0


MOMENTS = 200  # steps, writes and renames in a whole run, at least


@pytest.mark.parametrize(
    "variant", ["sgd", *(pytest.param(name, marks=pytest.mark.full) for name in list(VARIANTS)[1:])]
)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(variant: str, tmp_path: Path) -> None:
    options = VARIANTS[variant]
    assert in_child(train, tmp_path / "whole", *options) == 0
    draw = random.Random(variant)
    kill_and_resume(tmp_path / "killed", options, [draw.randint(1, MOMENTS // 2) for _ in range(3)])
    assert differing(content(tmp_path / "whole"), content(tmp_path / "killed")) == []
    assert [file.name for file in (tmp_path / "killed").iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("moment", [2, 5, *(pytest.param(moment, marks=pytest.mark.full) for moment in (1, 3, 4))])
def test_a_run_killed_before_its_first_step_can_be_begun_or_resumed(moment: int, tmp_path: Path) -> None:
    """In the first writes, of the configuration; the last of these is in the first step."""
    assert in_child(go, tmp_path / "run", SPARSE, moment) == -signal.SIGKILL
    assert (tmp_path / "run" / "config.json").exists() == (moment > 4)
    assert in_child(go, tmp_path / "run", (*SPARSE, "--epochs=1", "--update-every=2"), None) == 0
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"config.json", "metrics.csv", "checkpoint.pt"}


KILLS = 20


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_random_kills(variant: str, tmp_path: Path) -> None:
    """By turns from outside after a random time, and from inside at a random step, write or rename. A run that has
    come to its end is compared with one that was left alone, and another one begun."""
    options, draw = VARIANTS[variant], random.Random(variant)
    start = time.monotonic()
    assert in_child(train, tmp_path / "whole", *options) == 0
    seconds, whole = time.monotonic() - start, content(tmp_path / "whole")
    kills = ends = 0
    while kills < KILLS or ends == 0:
        folder = tmp_path / f"killed {ends}"
        last = kills >= KILLS
        moment = draw.randint(1, MOMENTS) if kills % 2 and not last else None
        child = FORKS.Process(target=_in_child, args=(go, folder, options, moment))
        child.start()
        child.join(300 if moment or last else draw.uniform(0, seconds))
        if child.is_alive():
            child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        kills += child.exitcode != 0
        if child.exitcode == 0:
            ends += 1
            assert differing(whole, content(folder)) == []
            assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []


def test_sigterm_saves_and_exits_0(tmp_path: Path) -> None:
    """In a process as a user starts it, stopped in the middle of an epoch."""
    program = [sys.executable, "-m", "rpg_fast", "train"]
    running = subprocess.Popen(
        [*program, *TINY, "--epochs=200", f"--out={tmp_path / 'run'}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (tmp_path / "run" / "dense.pt").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 0
    line = told.decode()
    assert line.startswith("rpg-fast train: stopped after step ")
    assert line.endswith(f"`rpg-fast train --resume {tmp_path / 'run'}` goes on\n")
    assert line.count("\n") == 1
    saved = load_checkpoint(tmp_path / "run" / "dense.pt")["trainer"]
    assert f"step {saved['step']} " in line
    assert saved["step"] == 10 * saved["epoch"] + saved["position"]


def stop_in(folder: Path, step: int) -> int:
    """Trains into `folder` and gets SIGTERM in that step."""
    original = Trainer.train_step

    def train_step(trainer: Trainer, *batch: Tensor) -> Any:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *batch)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    return train(folder, *SPARSE)


SPARSE = ("--no-dense-baseline", "--checkpoint-every=1000", "--criterion=set")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nothing interrupts comes to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert in_child(train, folder, *SPARSE) == 0
    return content(folder)


@pytest.mark.parametrize("step", [0, 9, 14, 29])  # the first and the last of an epoch, one between, the last of all
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(step: int, whole: dict[str, Any], tmp_path: Path) -> None:
    assert in_child(stop_in, tmp_path / "run", step) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["trainer"]["step"] == step + 1
    assert in_child(main, ["train", f"--resume={tmp_path / 'run'}"]) == 0
    assert differing(whole, content(tmp_path / "run")) == []


def fill_disk(monkeypatch: pytest.MonkeyPatch, full: Callable[[], bool]) -> None:
    original = os.fsync

    def fsync(handle: int) -> None:
        if full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_costs_neither_the_old_checkpoint_nor_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    steps: list[int] = []
    original = Trainer.train_step

    def train_step(trainer: Trainer, *batch: Tensor) -> Any:
        steps.append(trainer.step)
        return original(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    fill_disk(monkeypatch, lambda: 12 <= len(steps) < 28)
    assert train(folder, "--no-dense-baseline") == 0
    no_space = r"No space left on device \([\d,]+ bytes wanted, [\d,]+ free\); the older one stays, the training"
    warnings = capsys.readouterr().err.splitlines()
    for line, file in zip(warnings[:2], ("checkpoint.pt", "metrics.csv"), strict=True):
        assert re.fullmatch(f"warning: cannot write {folder / file}: {no_space} goes on and tries again", line)
    assert warnings[2:] == [f"{folder / file} could be written again" for file in ("checkpoint.pt", "metrics.csv")]
    assert load_checkpoint(folder / "checkpoint.pt")["trainer"]["step"] == 30
    assert {file.name for file in folder.iterdir()} == {"config.json", "metrics.csv", "checkpoint.pt"}
    assert len((folder / "metrics.csv").read_text().splitlines()) == 4


def test_a_disk_that_stays_full_ends_in_an_error_with_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill_disk(patch, lambda: (folder / "checkpoint.pt").exists())
        assert train(folder, "--no-dense-baseline", "--checkpoint-every=14") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"rpg-fast train: error: could not write checkpoint.pt, metrics.csv in {folder}; "
        f"`rpg-fast train --resume {folder}` does when there is room"
    )
    assert load_checkpoint(folder / "checkpoint.pt")["trainer"]["step"] == 10
    assert train(tmp_path / "whole", "--no-dense-baseline") == main(["train", f"--resume={folder}"]) == 0
    one, other = content(tmp_path / "whole"), content(folder)
    assert [name for name in differing(one, other) if "checkpoint_every" not in name] == []


def test_nothing_is_left_where_the_configuration_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        fill_disk(patch, lambda: True)
        assert train(tmp_path / "run") == 2
    assert f"cannot write {tmp_path / 'run' / 'config.json'}: No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []
    assert RunFolder.create(tmp_path / "run", "").path == tmp_path / "run"


def test_checkpoints_hold_plain_values_and_packed_masks(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--no-dense-baseline") == 0
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    trainer = saved["trainer"]
    assert trainer["pruner"]["masks"]["bits"].dtype == torch.uint8
    weights = sum(tensor.numel() for tensor in saved["state_dict"].values() if tensor.dim() > 1)
    assert trainer["pruner"]["masks"]["bits"].numel() < weights / 8 + 128 * len(saved["state_dict"])
    assert (trainer["epoch"], trainer["position"], trainer["step"]) == (3, 0, 30)
    assert len(trainer["ranks"]) == 1


def test_random_states_are_those_of_all_generators() -> None:
    import numpy as np

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(())), float(np.random.randn())]  # noqa: NPY002

    draw()  # leaves half of a pair of normal numbers in NumPy's state
    states = random_states(torch.device("cpu"))
    drawn = draw()
    restore_random_states(states, torch.device("cpu"))
    assert draw() == drawn


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path, saved: path.write_bytes(path.read_bytes()[:-1000]), "is truncated or not a PyTorch checkpoint"),
        (lambda path, saved: path.write_bytes(b""), "is truncated or not a PyTorch checkpoint"),
        (lambda path, saved: torch.save({"state_dict": {}}, path), "was not written by this `rpg-fast train`"),
        (lambda path, saved: torch.save({**saved, "trainer": None}, path), "is incomplete: no trainer"),
        (
            lambda path, saved: torch.save({**saved, "state_dict": {"w": torch.ones(2)}}, path),
            'is not of this run: Missing key(s) in state_dict: "conv1.weight"',
        ),
        (lambda path, saved: torch.save({**saved, "trainer": {"epoch": 1}}, path), "is not of this run: no model"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_left_alone(
    damage: Callable[[Path, Any], object],
    text: str,
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    path = folder / "checkpoint.pt"
    damage(path, load_checkpoint(path))
    before = {file: file.read_bytes() for file in folder.iterdir()}
    capsys.readouterr()
    assert main(["train", f"--resume={folder}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"rpg-fast train: error: {path} ")
    assert text in told
    assert told.count("\n") == 1
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert in_child(stop_in, folder, 14) == 0
    return folder


def test_resume_keeps_to_the_architecture(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"resnet20"', '"resnet32"'))
    capsys.readouterr()
    assert main(["train", f"--resume={folder}"]) == 2
    assert "checkpoint.pt is not of this run: it is of arch resnet20, wanted resnet32" in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_others_out_of_its_folder(tmp_path: Path) -> None:
    """The lock goes with whoever holds it, so nothing remains of one."""
    folder = RunFolder(tmp_path)
    for _ in range(2):
        other = RunFolder(tmp_path).held(patience=0.2)
        with folder.held(), pytest.raises(UserError, match="is in use: another program trains into it"), other:
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("begins", [True, False])
def test_both_ways_into_a_folder_hold_it(begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def trained(self: run.Run, folder: RunFolder) -> None:
        with pytest.raises(UserError, match="is in use"), RunFolder(folder.path).held(patience=0):
            pass
        held.append(folder.path)

    monkeypatch.setattr(run.Run, "train", trained)
    config = TrainConfig(data="synthetic", image_size=8, width=4, epochs=8, train_images=64, test_images=8)
    run.train(config, tmp_path / "run")
    if not begins:
        run.resume(tmp_path / "run", {})
    assert len(held) == (1 if begins else 2)
