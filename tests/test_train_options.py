"""Options of training beside the usual: compilation, mixed images, averaged weights, given weights, TensorBoard;
recipes and the published names."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rpg_fast.train.checkpoint import load_checkpoint, save_checkpoint
from rpg_fast.train.cli import build_parser, main
from rpg_fast.train.config import TrainConfig
from rpg_fast.train.data import load_digits
from rpg_fast.train.loop import Trainer
from rpg_fast.train.models import build_model
from rpg_fast.train.optimization import Average, MixUp
from rpg_fast.train.recipes import PUBLISHED_NAMES, RECIPES

TINY = (
    *("--data=digits", "--width=4", "--epochs=2", "--batch-size=128", "--update-every=4", "--sparsity=0.9"),
    *("--no-dense-baseline", "--threads=1"),
)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)


def small_trainer(config: TrainConfig) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return Trainer(model, load_digits(), config, name="sparse", sparse=True)


# ----------------------------------------------------------------------------------------------------------- network


def test_a_compiled_network_trains_the_same_weights() -> None:
    weights = []
    for compiled in (False, True):
        trainer = small_trainer(TrainConfig(epochs=1, batch_size=256, update_every=2, compile=compiled))
        if compiled:
            trainer.network.compile(backend="aot_eager")  # what is tested is the way through it, not the compiler
        trainer.run(lambda metrics: None)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert next(iter(trainer.model.state_dict())) == "0.weight"
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- mixup


def test_mixup_is_a_function_of_seed_and_step() -> None:
    shares = [MixUp(0.2, seed=3).share(step) for step in range(2000)]
    assert shares == [MixUp(0.2, seed=3).share(step) for step in range(2000)]
    assert shares != [MixUp(0.2, seed=4).share(step) for step in range(2000)]
    assert sum(shares) / 2000 == pytest.approx(0.5, abs=0.03)  # Beta(a, a): mean 1/2, variance 1 / (8 a + 4)
    assert torch.tensor(shares).var().item() == pytest.approx(1 / 5.6, abs=0.01)
    assert MixUp(0.0, seed=3).share(5) == 1


def test_mixup_mixes_images_and_losses_alike() -> None:
    x, y = torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 2, 0, 1])
    mixed = MixUp.images(x, 0.3)
    torch.testing.assert_close(mixed[0], 0.3 * x[0] + 0.7 * x[4])
    logits = torch.randn(5, 3)
    soft = 0.3 * nn.functional.one_hot(y, 3) + 0.7 * nn.functional.one_hot(y.roll(1), 3)
    loss = MixUp.loss(nn.CrossEntropyLoss(), logits, y, 0.3)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, soft))
    assert MixUp.images(x, 1.0) is x


# ------------------------------------------------------------------------------------------------------------ average


def test_the_average_is_exponential_and_as_sparse_as_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    average = Average(model, 0.9)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 4))
        average.update()
        for name, tensor in model.state_dict().items():
            real = tensor.is_floating_point()
            expected[name] = 0.9 * expected[name] + 0.1 * tensor if real else tensor.clone()
        assert int(average.model[1].num_batches_tracked) == step + 1
    for name, tensor in average.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    mask = torch.rand(3, 4) < 0.5
    average.mask({"0.weight": mask})
    assert (average.model[0].weight[~mask] == 0).all()


def test_the_average_is_what_is_tested_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--ema-decay=0.8", f"--out={tmp_path / 'run'}"]) == 0
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert not torch.equal(saved["state_dict"]["fc.bias"], saved["trainer"]["model"]["fc.bias"])
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert f"{saved['metrics'][-1]['test_accuracy']:.2%}" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- pretrained


def test_training_begins_with_given_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_model("resnet20", num_classes=10, in_channels=1, width=4)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    given = ("--start=pretrained", f"--pretrained={tmp_path / 'weights.pt'}")
    options = ("--epochs=1", "--lr=1e-12", "--sparsity=0", "--weight-decay=0", "--rank-weight=0")
    assert main(["train", *TINY, *options, *given, f"--out={tmp_path / 'run'}"]) == 0
    after = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["state_dict"]
    torch.testing.assert_close(after["fc.weight"], model.fc.weight.detach())
    capsys.readouterr()
    for options, text in (
        (("--start=pretrained",), "--start pretrained begins with trained weights: name their file with --pretrained"),
        ((*given, "--width=8"), "does not fit --arch resnet20 here: size mismatch for conv1.weight"),
        (("--start=pretrained", "--pretrained=none"), "there is no checkpoint at none"),
        ((*given[1:], "--start=random"), "but --start random does not take them"),
    ):
        assert main(["train", *TINY, *options, f"--out={tmp_path / 'other'}"]) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


# --------------------------------------------------------------------------------------------------------- keep dense


def test_layers_that_are_kept_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["train", *TINY, "--keep-dense=conv1, fc", f"--out={folder}"]) == 0
    saved = load_checkpoint(folder / "checkpoint.pt")
    names = saved["trainer"]["pruner"]["masks"]["names"]
    assert "layer1.0.conv1.weight" in names
    assert not {"conv1.weight", "fc.weight"} & set(names)
    assert (saved["state_dict"]["fc.weight"] != 0).all()
    weights = {name: tensor for name, tensor in saved["state_dict"].items() if tensor.dim() > 1}
    pruned = sum(int((weights[name] == 0).sum()) for name in names)
    assert pruned >= round(0.9 * sum(weights[name].numel() for name in names))
    size = sum(tensor.numel() for tensor in weights.values())
    assert saved["metrics"][-1]["sparsity"] == pytest.approx(pruned / size, abs=1e-3)
    capsys.readouterr()
    assert main(["evaluate", str(folder)]) == 0
    capsys.readouterr()
    assert main(["train", *TINY, "--keep-dense=conv1,layer9", f"--out={tmp_path / 'other'}"]) == 2
    told = capsys.readouterr().err
    assert "--keep-dense layer9: there is no such layer; known are conv1, layer1.0.conv1, " in told
    assert not (tmp_path / "other").exists()


# -------------------------------------------------------------------------------------------------------- TensorBoard


class Events:
    """In the place of TensorBoard's SummaryWriter: keeps what is told."""

    made: list[Events]

    def __init__(self, folder: str, purge_step: int):
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        Events.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str) -> None:
        assert "epochs = " in text

    def flush(self) -> None:
        pass


def test_tensorboard_goes_on_at_the_resumed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Events.made = []
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Events  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    folder = tmp_path / "run"
    assert main(["train", *TINY, "--tensorboard", f"--out={folder}"]) == 0
    saved = load_checkpoint(folder / "checkpoint.pt")
    saved["trainer"]["epoch"], saved["metrics"] = 1, saved["metrics"][:1]  # as if the second epoch had to come again
    saved["trainer"]["step"] = saved["trainer"]["pruner"]["step_count"] = 10
    save_checkpoint(folder / "checkpoint.pt", saved)
    assert main(["train", f"--resume={folder}"]) == 0
    first, second = Events.made
    assert [step for name, _, step in first.scalars if name == "test_accuracy"] == [10, 20]
    assert [step for name, _, step in second.scalars if name == "test_accuracy"] == [20]
    assert (first.purge_step, second.purge_step) == (1, 11)
    assert first.folder == second.folder == str(folder / "tensorboard" / "sparse")


def test_tensorboard_writes_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main(["train", *TINY, "--tensorboard", f"--out={tmp_path / 'run'}"]) == 0
    assert list((tmp_path / "run" / "tensorboard" / "sparse").glob("events.out.tfevents.*"))


def test_a_missing_tensorboard_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", *TINY, "--tensorboard", f"--out={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.endswith("--tensorboard needs the package tensorboard: pip install tensorboard\n")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ recipes


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, tuple[str, str]]:
    """{option: (value, origin)} of --show-config."""
    capsys.readouterr()
    assert main(["train", *options, "--show-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: (line.split()[1], " ".join(line.split()[2:])) for line in lines}


@pytest.mark.parametrize(
    ("recipe", "sparsity", "rank_weight", "tail_energy", "start"),
    [
        ("rpg-80", "0.8", "0.5", "0.2", "pretrained"),
        ("rpg-90", "0.9", "0.5", "0.1", "pretrained"),
        ("rpg-95", "0.95", "3.0", "0.2", "pretrained"),
        ("rpg-98", "0.98", "4.0", "0.2", "pretrained"),
        ("rpg-90-scratch", "0.9", "0.5", "0.1", "random"),
        ("rpg-95-scratch", "0.95", "3.0", "0.2", "random"),
    ],
)
def test_recipes_are_the_published_ones(
    recipe: str, sparsity: str, rank_weight: str, tail_energy: str, start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = shown(capsys, f"--recipe={recipe}")
    expected = {
        **{"sparsity": sparsity, "rank-weight": rank_weight, "tail-energy": tail_energy, "start": start},
        **{"arch": "resnet50", "epochs": "100", "batch-size": "1024", "lr": "0.4", "warmup-epochs": "5.0"},
        **{"momentum": "0.9", "weight-decay": "0.0001", "label-smoothing": "0.1", "update-every": "100"},
        **{"prune-until": "0.9", "update-until": "0.901", "drop-fraction": "0.3", "rank-every": "update"},
        **{"min-sparsity": "0.0", "seed": "42", "distribution": "global_magnitude", "schedule": "exponential"},
    }
    assert {name: values[f"--{name}"] for name in expected} == {
        name: (value, f"recipe {recipe}") for name, value in expected.items()
    }
    assert set(values) == {f"--{name.replace('_', '-')}" for name in TrainConfig().to_dict()}


def test_a_recipe_is_overridden_and_stored_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = shown(capsys, "--recipe=rpg-95", "--rank-weight=1.5")
    assert values["--rank-weight"] == ("1.5", "given")
    assert values["--tail-energy"] == ("0.2", "recipe rpg-95")
    assert values["--width"] == ("-", "default")
    assert main(["train", "--recipe=rpg-95", f"--out={tmp_path / 'run'}"]) == 2
    assert "--recipe rpg-95 begins with trained weights: name their file" in capsys.readouterr().err
    tiny = ("--arch=resnet20", *TINY, "--warmup-epochs=0.5")
    assert main(["train", "--recipe=rpg-90-scratch", *tiny, f"--out={tmp_path / 'run'}"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    recipe = {**RECIPES["rpg-90-scratch"], "arch": "resnet20", "epochs": 2, "batch_size": 128, "update_every": 4}
    assert {name: config[name] for name in recipe} == {**recipe, "warmup_epochs": 0.5}
    assert config["recipe"] == "rpg-90-scratch"


# ---------------------------------------------------------------------------------------------------- published names


def test_published_names_mean_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    published = (
        *("--model", "resnet50", "--lamb", "3", "--partial_k", "0.2", "--sparsity_thres", "0.1", "--delta", "50"),
        *("--alpha", "0.2", "--iterative_T_end_percent", "0.8", "--T_end_percent", "0.85", "--wd", "1e-4"),
        *("--warmup", "3", "--label_smoothing", "0.2", "--learning-rate", "0.3", "--optim", "sgd", "--mixup", "0.1"),
        *("--sp-distribution", "magnitude-exponential", "--dense-allocation", "0.02", "--memory-format", "nhwc"),
        *("--amp", "--lr-schedule", "cosine2", "--grad-accumulation-n", "1", "--static-topo", "0"),
    )
    ours = (
        *("--arch=resnet50", "--rank-weight=3", "--tail-energy=0.2", "--min-sparsity=0.1", "--update-every=50"),
        *("--drop-fraction=0.2", "--prune-until=0.8", "--update-until=0.85", "--weight-decay=1e-4"),
        *("--warmup-epochs=3", "--label-smoothing=0.2", "--lr=0.3", "--optimizer=sgd", "--mixup=0.1"),
        *("--distribution=global_magnitude", "--schedule=exponential", "--sparsity=0.98", "--channels-last"),
        "--autocast=fp16",
    )
    assert shown(capsys, *published) == shown(capsys, *ours)


def test_published_names_that_mean_nothing_here_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, text in (
        (["--lr-schedule=step"], "invalid choice: 'step' (choose from"),
        (["--grad-accumulation-n=2"], "invalid choice: '2'"),
        (["--memory-format=abc"], "must be nchw or nhwc, got 'abc'"),
        (["--sp-distribution=alluniform"], "invalid choice: 'alluniform'"),
        (["--dense-allocation=0"], "--sparsity must be at least 0 and below 1, got 1.0"),
    ):
        assert main(["train", *options, "--show-config"]) == 2
        assert text in capsys.readouterr().err


def test_every_published_name_is_an_option() -> None:
    parser: Any = build_parser()
    train = next(action for action in parser._actions if action.choices).choices["train"]
    for names in PUBLISHED_NAMES.values():
        assert set(names) <= set(train._option_string_actions)
