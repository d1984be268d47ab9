"""The training program end to end: `rpg-fast train` and `rpg-fast evaluate` on small runs."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import rpg_fast
from rpg_fast.train.checkpoint import load_checkpoint
from rpg_fast.train.cli import main
from rpg_fast.train.config import TrainConfig
from rpg_fast.train.data import Batches, load_digits, make_synthetic
from rpg_fast.train.loop import Trainer
from rpg_fast.train.models import build_model
from rpg_fast.train.run import Run

TINY = ("--data=digits", "--width=4", "--epochs=2", "--batch-size=128", "--update-every=4", "--sparsity=0.9")


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs; only `finished`, which is set up before this, draws."""
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(folder: Path, *options: str) -> dict[str, object]:
    assert main(["train", *TINY, *options, f"--out={folder}"]) == 0
    return load_checkpoint(folder / "checkpoint.pt")


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


VARIANTS = {
    "sgd": (),
    "sgd-torch": ("--optimizer-impl=torch", "--clip-grad-norm=1"),
    "adamw": ("--optimizer=adamw", "--clip-grad-norm=1", "--accumulate=3"),
    "adamw-torch": ("--optimizer=adamw", "--optimizer-impl=torch", "--accumulate=3"),
    "channels-last": ("--channels-last", "--nesterov"),
    "bf16": ("--autocast=bf16",),
    "fp16": ("--autocast=fp16", "--channels-last"),
    "mixup-ema": ("--mixup=0.2", "--ema-decay=0.9", "--label-smoothing=0"),
    "deterministic": ("--deterministic", "--ema-decay=0.5", "--accumulate=2", "--checkpoint-every=7"),
    "constant-erk-set": ("--schedule=constant", "--distribution=erk", "--criterion=set", "--rank-every=update"),
    "resnet50-synthetic": (
        "--data=synthetic",
        "--arch=resnet50",
        "--train-images=256",
        "--batch-size=32",
        "--image-size=8",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_train_reaches_the_sparsity_exactly(variant: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoint = train(folder, "--no-dense-baseline", *VARIANTS[variant])
    model = build_model(**checkpoint["model"])
    model.load_state_dict(checkpoint["state_dict"], strict=True)
    weights = rpg_fast.prunable_weights(model)
    size = sum(weight.numel() for weight in weights.values())
    masks = rpg_fast.PackedMasks(weights)
    masks.load_state_dict(checkpoint["trainer"]["pruner"]["masks"])
    pruned = size - int(masks.count().sum())
    if "erk" in variant:
        assert abs(pruned - 0.9 * size) <= len(weights)  # rounded weight by weight
    else:
        assert pruned == math.floor(0.9 * size + 0.5)
    for name, mask in masks.unpack().items():
        assert (weights[name][~mask] == 0).all(), name
    last = rows(folder)[-1]
    assert float(last["sparsity"]) >= pruned / size
    assert all(math.isfinite(float(last[key])) for key in ("train_loss", "rank_loss", "mean_rank_ratio", "lr"))
    assert not (folder / "dense.pt").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of one run with its dense baseline."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        train(folder, "--epochs=4", "--sparsity=0.5", "--tail-energy=0.2")
    return folder, "\n".join(printed)


def test_a_run_leaves_its_folder(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "metrics.csv",
        "dense.pt",
        "checkpoint.pt",
        "report.png",
    }
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())["config"]
    assert TrainConfig.from_dict(config).tail_energy == 0.2
    table = rows(folder)
    assert [(row["run"], row["epoch"]) for row in table] == [
        (run, str(e)) for run in ("dense", "sparse") for e in range(1, 5)
    ]
    assert float(table[0]["train_loss"]) > float(table[3]["train_loss"])
    for expected in (
        "dense accuracy",
        "sparse accuracy",
        "mean rank k/m",
        "effective rank",
        str(folder / "report.png"),
    ):
        assert expected in printed
    assert re.search(r"sparsity +50\.\d+%: [\d,]+ of [\d,]+ weights are pruned", printed)
    assert len(re.findall(r"^sparse  epoch +\d/4  loss .* accuracy .* sparsity .* k/m .* images/s", printed, re.M)) == 4


def test_start_dense_begins_with_the_dense_weights(finished: tuple[Path, str]) -> None:
    table = rows(finished[0])
    assert float(table[4]["train_loss"]) < float(table[0]["train_loss"])


@pytest.mark.parametrize("file", ["checkpoint.pt", "dense.pt"])
def test_evaluate_repeats_the_last_accuracy(
    finished: tuple[Path, str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    table = {row["run"]: row for row in rows(folder)}
    assert main(["evaluate", str(folder / file)]) == 0
    printed = capsys.readouterr().out
    row = table["dense" if file == "dense.pt" else "sparse"]
    assert f"accuracy   {float(row['test_accuracy']):.2%}" in printed
    assert f"{float(row['mean_rank_ratio']):.3f}  " in next(
        line for line in printed.splitlines() if line.startswith("all ")
    )
    assert "tail energy 0.2" in printed
    assert all(name in printed for name in ("conv1.weight", "layer3.2.conv2.weight", "fc.weight"))


def test_evaluate_takes_the_folder(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished[0]), "--batch-size=32", "--tail-energy=0.1"]) == 0
    assert "tail energy 0.1" in capsys.readouterr().out


def test_the_unmodified_model_gives_the_same_logits() -> None:
    run = Run(TrainConfig(width=4, epochs=1, batch_size=256, update_every=2))
    x = run.dataset.test.images[:64]
    run.sparse.run(lambda metrics: None)
    plain = build_model("resnet20", num_classes=10, in_channels=1, width=4)
    plain.load_state_dict(run.sparse.model.state_dict(), strict=True)
    assert torch.equal(plain.eval()(x), run.sparse.model.eval()(x))


def test_the_loss_falls_and_the_dense_network_learns() -> None:
    data = make_synthetic(image_size=8, num_classes=4, train_images=256, test_images=64)
    config = TrainConfig(data="synthetic", epochs=6, batch_size=32, label_smoothing=0.0, warmup_epochs=1)
    model = build_model("resnet20", num_classes=4, width=4)
    metrics = []
    Trainer(model, data, config, name="dense", sparse=False).run(metrics.append)
    assert metrics[-1].train_loss < 0.5 * metrics[0].train_loss
    assert metrics[-1].test_accuracy > 0.85


def test_micro_batches_add_up_to_the_batch() -> None:
    data = load_digits()
    trained = []
    for accumulate in (1, 3):  # 64 images as 22 + 21 + 21
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
        config = TrainConfig(accumulate=accumulate, batch_size=64, epochs=5)
        trainer = Trainer(model.double(), data, config, name="sparse", sparse=True)
        for images, labels in Batches(data, data.train, 64):
            trainer.train_step(images.double(), labels)
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*trained, rtol=1e-9, atol=1e-12)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    options = ("--no-dense-baseline", "--epochs=1", "--criterion=set", "--seed=5")
    one, two = train(tmp_path / "one", *options), train(tmp_path / "two", *options)
    assert all(torch.equal(one["state_dict"][name], two["state_dict"][name]) for name in one["state_dict"])


@pytest.mark.parametrize("interrupted", ["dense", "sparse"])
def test_resume_ends_where_the_whole_run_would(
    interrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--epochs=3", "--criterion=set")
    whole = train(tmp_path / "whole", *options)

    original = Trainer.train_epoch

    def interrupt(trainer: Trainer, *arguments: object) -> object:
        if trainer.name == interrupted and trainer.epoch == 2:
            raise KeyboardInterrupt
        return original(trainer, *arguments)

    halves = tmp_path / "halves"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", interrupt)
        assert main(["train", *TINY, *options, f"--out={halves}"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert main(["train", f"--resume={halves}", "--threads=1"]) == 0
    resumed = load_checkpoint(halves / "checkpoint.pt")
    assert all(torch.equal(whole["state_dict"][name], resumed["state_dict"][name]) for name in whole["state_dict"])
    columns = ("run", "epoch", "step", "train_loss", "test_accuracy", "sparsity")
    assert [[row[c] for c in columns] for row in rows(tmp_path / "whole")] == [
        [row[c] for c in columns] for row in rows(halves)
    ]


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Runs a command that must fail with status 2 and one line on stderr, and returns that line."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--sparsity=1.0",), "--sparsity must be at least 0 and below 1, got 1.0"),
        (("--sparsity=-0.5",), "--sparsity must be at least 0 and below 1, got -0.5"),
        (("--sparsity=much",), "invalid float value: 'much'"),
        (("--arch=resnet19",), "invalid choice: 'resnet19'"),
        (("--data=imagenet",), "invalid choice: 'imagenet'"),
        (("--batch-size=1353",), "the batch size, 1353, is larger than the training set of digits: 1352 images"),
        (("--device=tpu",), "--device 'tpu' is unknown; known are auto, cpu, cuda"),
        (("--device=cuda:99",), "--device cuda:99 is not there"),
        (("--epochs=1", "--batch-size=1352", "--update-every=5"), "too short"),
        (("--prune-until=1.5",), "prune_until"),
        (("--drop-fraction=2",), "drop_fraction"),
        (("--momentum=0", "--nesterov"), "esterov"),
        (("--resume=x",), "--resume keeps the run's own options: leave out --epochs"),
        (("--epoch=1",), "unrecognized arguments: --epoch=1"),
        (("--seed=-1", "--mixup=0.2"), "--seed must be at least 0 and below 2^63, got -1"),
        ((f"--seed={2**63}",), "--seed must be at least 0 and below 2^63"),
    ],
)
def test_train_refuses_in_one_line_and_writes_nothing(
    options: tuple[str, ...],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in fails(capsys, "train", "--epochs=2", *options)
    assert list(tmp_path.iterdir()) == []


def test_train_never_overwrites(
    finished: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = finished
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert f"{folder} exists already" in fails(capsys, "train", *TINY, "--out", folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    monkeypatch.chdir(tmp_path)
    quick = ("train", "--no-dense-baseline", *TINY, "--epochs=1")
    assert main([*quick]) == main([*quick]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits-resnet20-90", "digits-resnet20-90-2"]
    assert main([*quick, f"--out={tmp_path / 'runs'}"]) == 2
    (tmp_path / "file").touch()
    assert "cannot make" in fails(capsys, *quick, "--out", tmp_path / "file" / "run")


def test_diverging_training_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--lr=1e30", "--epochs=1", "--no-dense-baseline")
    assert main(["train", *TINY, *options, f"--out={tmp_path / 'run'}"]) == 2
    assert "the sparse training diverged" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.csv").exists()


def test_evaluate_refuses_in_one_line(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    whole = (folder / "checkpoint.pt").read_bytes()
    truncated, noise, foreign = tmp_path / "truncated.pt", tmp_path / "noise.pt", tmp_path / "foreign.pt"
    truncated.write_bytes(whole[: len(whole) // 2])
    noise.write_bytes(b"\x00\x01" * 5000)
    torch.save({"state_dict": {}}, foreign)
    assert "there is no checkpoint at" in fails(capsys, "evaluate", tmp_path / "missing.pt")
    assert "there is no checkpoint at" in fails(capsys, "evaluate", tmp_path)
    assert "is truncated or not a PyTorch checkpoint" in fails(capsys, "evaluate", truncated)
    assert "is truncated or not a PyTorch checkpoint" in fails(capsys, "evaluate", noise)
    assert f"{foreign}: holds no weights" in fails(capsys, "evaluate", foreign)
    assert "is a model for 1 channels, but synthetic has 3" in fails(capsys, "evaluate", folder, "--data=synthetic")

    damaged = torch.load(folder / "checkpoint.pt", weights_only=True)
    for change, text in (
        ({"model": {**damaged["model"], "width": 8}}, "weights do not fit its model"),
        ({"model": {**damaged["model"], "arch": "vgg"}}, "unknown architecture 'vgg'"),
        ({"config": {**damaged["config"], "arch": "vgg"}}, "--arch 'vgg' is unknown"),
        ({"config": {**damaged["config"], "epochs": "many"}}, "--epochs must be a whole number, got 'many'"),
        ({"state_dict": None}, "is incomplete: no state_dict"),
    ):
        torch.save({**damaged, **change}, tmp_path / "damaged.pt")
        assert text in fails(capsys, "evaluate", tmp_path / "damaged.pt")

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return print, ("executed",)

    torch.save({"format": "rpg_fast.train/1", "config": Evil()}, tmp_path / "evil.pt")
    assert "objects that only run as code, config (builtins.print)" in fails(capsys, "evaluate", tmp_path / "evil.pt")


def test_resume_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run that can be resumed" in fails(capsys, "train", "--resume", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no run that can be resumed" in fails(capsys, "train", "--resume", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    missing = [name for name in TrainConfig().to_dict() if f"--{name.replace('_', '-')}" not in printed]
    assert missing == []
    assert main([]) == 2
