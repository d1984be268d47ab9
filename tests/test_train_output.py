"""What a run tells and leaves beside its checkpoint, and outputs that stop taking it."""

from __future__ import annotations

import csv
import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rpg_fast._output import tell, with_output
from rpg_fast.train import events
from rpg_fast.train.checkpoint import RunFolder, load_checkpoint, write_file
from rpg_fast.train.cli import main
from rpg_fast.train.config import TrainConfig
from rpg_fast.train.layers import network_statistics
from rpg_fast.train.loop import EpochMetrics, Trainer
from rpg_fast.train.report import draw_report
from rpg_fast.train.result import bad_image_lines, throughput_of

TINY = (
    *("--data=digits", "--width=4", "--epochs=3", "--batch-size=256", "--update-every=2", "--sparsity=0.9"),
    *("--threads=1", "--no-dense-baseline"),
)
ROW = EpochMetrics("sparse", 1, 10, 0.1, 2.0, 0.3, 0.4, 0.5, -1.0, 0.7, 3.0, 0, 100.0, 0.2)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)


def program(*words: object, unbuffered: str = "", **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rpg_fast", *map(str, words)]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, env=env, **options)


# -------------------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize(
    ("data", "left"), [("digits", 0.0), ("folder:/$\\frac$/x", 0.5), ("folder:/\udcff", 1.0)], ids=ascii
)
def test_every_run_can_be_drawn(data: str, left: float, tmp_path: Path) -> None:
    """All weights pruned, too, and folders with names that are formulas or no text."""
    model = nn.Conv2d(3, 4, 3)
    before = network_statistics(model, 0.1)
    with torch.no_grad():
        model.weight.mul_(torch.rand_like(model.weight) < left)
    draw_report(tmp_path / "x.png", TrainConfig(data=data), [], [ROW], before, network_statistics(model, 0.1))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------- what no longer listens


@pytest.mark.parametrize("words", [(), ("info", "--json"), ("--help",), ("train", "--help")])
def test_a_reader_that_has_gone_is_no_error(words: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    running = program(*words, stdout=write)
    os.close(write)
    told = running.communicate(timeout=60)[1]
    assert (told, running.returncode) == ("", 0)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_on_a_full_disk_is_told_in_one_line(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        running = program("info", unbuffered=unbuffered, stdout=full)
    told = running.communicate(timeout=60)[1]
    assert told == "rpg-fast: error: cannot write the output: No space left on device\n"
    assert running.returncode == 1


def test_an_output_that_was_closed_before_the_program_began_is_no_error() -> None:
    closed = ["sh", "-c", '"$@" >&- <&-', "sh", sys.executable, "-m", "rpg_fast"]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.stderr, done.returncode) == ("", 0)


def test_an_output_shows_names_that_it_cannot_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    assert with_output(lambda: tell("n\xfc\udcff") or 0) == 0
    assert output.getvalue() == b"n\\xfc\\udcff\n"


def test_an_error_of_another_file_is_not_taken_for_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    from rpg_fast import __main__

    def fail() -> None:
        raise BrokenPipeError(errno.EPIPE, "another pipe")

    monkeypatch.setattr(__main__._info, "collect", fail)
    with pytest.raises(BrokenPipeError, match="another pipe"):
        __main__.main([])


@pytest.mark.parametrize("kind", ["disk full", pytest.param("reader gone", marks=pytest.mark.full)])
def test_a_run_survives_the_loss_of_its_log(kind: str, tmp_path: Path) -> None:
    if kind == "reader gone":
        read, log = os.pipe()
        os.close(read)
    else:
        log = os.open("/dev/full", os.O_WRONLY)
    running = program("train", *TINY, f"--out={tmp_path / 'run'}", stdout=log)
    os.close(log)
    told = running.communicate(timeout=100)[1]
    assert "Traceback" not in told
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["trainer"]["epoch"] == 3
    assert (tmp_path / "run" / "report.png").exists()


# -------------------------------------------------------------------------------------------------------- a real limit


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses to make any file of this process larger than that many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def test_a_file_that_the_kernel_cuts_short_leaves_the_older_one(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"older")
    with files_up_to(1000), pytest.raises(OSError, match=r"File too large \(5,000 bytes wanted, [\d,]+ free\)"):
        write_file(tmp_path / "file", b"n" * 5000)
    assert (tmp_path / "file").read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_dense_network_that_cannot_be_kept_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is written as soon as there is room again, as it was at the end of its training."""
    folder = tmp_path / "run"
    options = [word for word in TINY if word != "--no-dense-baseline"]
    steps: list[str] = []
    original = Trainer.train_step

    def train_step(trainer: Trainer, *batch: Any) -> Any:
        steps.append(trainer.name)
        if len(steps) == 11:  # the last epoch of the dense training
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        if steps.count("sparse") == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if steps.count("sparse") == 11:
            assert load_checkpoint(folder / "dense.pt")["trainer"]["step"] == 15
        return original(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with files_up_to(limits[0]):
        assert main(["train", *options, f"--out={folder}"]) == 0
    told = capsys.readouterr().err
    assert f"cannot write {folder / 'dense.pt'}: File too large" in told
    assert told.endswith(f"{folder / 'dense.pt'} could be written again\n")
    assert load_checkpoint(folder / "dense.pt")["trainer"]["step"] == 15
    assert [row["epoch"] for row in load_checkpoint(folder / "dense.pt")["metrics"]] == [1, 2, 3]


@pytest.mark.full
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """The first checkpoint fits on it, a second beside the first does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=400k tmpfs {disk}; "$@"; cp -r {disk} {tmp_path / "left"}'
    mount = ["unshare", "--mount", "sh", "-ec", script]
    if subprocess.run([*mount, "-", "true"], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    command = 'rm -rf "$0"; "$@" || echo status $?'
    train = [sys.executable, "-m", "rpg_fast", "train", *TINY, f"--out={disk / 'run'}"]
    words = ["sh", "-c", command, tmp_path / "left", *train]
    done = subprocess.run([*mount, "-", *words], capture_output=True, text=True, timeout=100)
    assert done.stdout.endswith("status 2\n")
    assert "sparse accuracy" in done.stdout
    told = done.stderr.splitlines()
    assert told[0].startswith(f"warning: cannot write {disk / 'run' / 'checkpoint.pt'}: No space left on device (")
    assert told[-1] == (
        f"rpg-fast train: error: could not write checkpoint.pt, report.png in {disk / 'run'}; "
        f"`rpg-fast train --resume {disk / 'run'}` does when there is room"
    )
    left = tmp_path / "left" / "run"
    assert load_checkpoint(left / "checkpoint.pt")["trainer"]["epoch"] == 1
    assert len((left / "metrics.csv").read_text().splitlines()) == 4
    assert {file.name for file in left.iterdir()} == {"config.json", "metrics.csv", "checkpoint.pt"}


def test_a_picture_that_cannot_be_kept_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rpg_fast.train.run.draw_report", refuse)
    assert main(["train", *TINY, f"--out={folder}"]) == 2
    captured = capsys.readouterr()
    assert "sparse accuracy" in captured.out
    assert captured.err.splitlines()[-1] == (
        f"rpg-fast train: error: could not write report.png in {folder}; "
        f"`rpg-fast train --resume {folder}` does when there is room"
    )
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda path, *rest: path.touch())
    assert main(["train", f"--resume={folder}"]) == 0
    assert (folder / "report.png").exists()


# -------------------------------------------------------------------------------------------------------- TensorBoard


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(folder))
    shown.Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_a_resumed_run_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after an epoch was shown and before its checkpoint was written: it comes again, and is shown once."""
    pytest.importorskip("tensorboard")
    assert main(["train", *TINY, "--tensorboard", f"--out={tmp_path / 'whole'}"]) == 0
    original = RunFolder.save

    def killed(folder: RunFolder, file: str, content: dict[str, Any]) -> bool:
        if content["trainer"]["epoch"] == 2:
            raise KeyboardInterrupt
        return original(folder, file, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", killed)
        assert main(["train", *TINY, "--tensorboard", f"--out={tmp_path / 'killed'}"]) == 130
    assert [step for step, _ in curves(tmp_path / "killed" / "tensorboard" / "sparse")["lr"]] == [5, 10]
    assert main(["train", f"--resume={tmp_path / 'killed'}"]) == 0
    one, other = (curves(tmp_path / name / "tensorboard" / "sparse") for name in ("whole", "killed"))
    assert {"test_accuracy", "sparsity", "rank_loss", "images_per_second"} < one.keys() == other.keys()
    assert [step for step, _ in other["lr"]] == [5, 10, 15]
    for tag in one.keys() - {"images_per_second", "waiting"}:
        assert one[tag] == other[tag], tag


def test_tensorboard_on_a_full_disk_shows_all_when_there_is_room(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Begun:
        name, step = "sparse", 0

    class Config:
        def to_dict(self) -> dict[str, object]:
            return {"epochs": 3}

    writer = events.EventWriter(tmp_path, Begun(), Config())  # type: ignore[arg-type]
    writer.add_epoch(ROW)
    writer.write()
    (file,) = (tmp_path / "tensorboard" / "sparse").iterdir()
    size = file.stat().st_size
    for epoch in (2, 3):
        writer.add_epoch(replace(ROW, epoch=epoch, step=10 * epoch))
        with files_up_to(size + 100), pytest.raises(OSError, match="File too large"):
            writer.write()
        assert file.stat().st_size == size
    writer.write()
    size = file.stat().st_size
    writer.write()
    assert file.stat().st_size == size
    assert [step for step, _ in curves(file.parent)["test_accuracy"]] == [10, 20, 30]


def test_what_is_appended_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"begin")
    for content, refused in ((b"x" * 100, True), (b"end", False)):
        with files_up_to(50), open(file, "ab", buffering=0) as stream:
            try:
                events.append(stream, memoryview(content))
                assert not refused
            except OSError:
                assert refused
                assert file.read_bytes() == b"begin"
    assert file.read_bytes() == b"beginend"


# ----------------------------------------------------------------------------------------------- throughput, bad images


def test_throughput_is_that_of_all_epochs() -> None:
    rows = [replace(ROW, images_per_second=speed, waiting=share) for speed, share in ((100.0, 0.2), (300.0, 0.0))]
    assert throughput_of(rows) == "150 images/s, 15.0% of the time waiting for data: data bound"
    nothing_left = replace(ROW, images_per_second=0.0, waiting=float("nan"))
    assert throughput_of([rows[1], nothing_left]) == "300 images/s, 0.0% of the time waiting for data: compute bound"
    assert throughput_of([nothing_left]) == "not measured"


def test_bad_images_are_kept_and_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_bad_images() == {}
    assert bad_image_lines({}, tmp_path) == []
    odd = os.fsdecode(b'/gr\xc3\xbcn, "\xff"\n.png')
    assert folder.add_bad_images({odd: "truncated"}) == {odd: "truncated"}
    many = {f"/{number}.png": "not an image" for number in range(10, 20)}
    assert RunFolder(tmp_path).add_bad_images(many) == {odd: "truncated", **many}
    with open(tmp_path / "bad_images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert len(list(csv.DictReader(file))) == 11
    lines = bad_image_lines(folder.read_bad_images(), tmp_path)
    assert lines[0] == f"bad images        11 could not be read, all of them in {tmp_path / 'bad_images.csv'}"
    assert lines[1].strip() == "/10.png: not an image"
    assert (len(lines), lines[-1].strip()) == (7, "and 6 more")
