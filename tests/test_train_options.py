"""Options of training beside the usual: compilation, mixed images, averaged weights, given weights, figures sent
elsewhere; recipes, published names and published decisions."""

from __future__ import annotations

import argparse
import copy
import csv
import json
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.run import get_args_parser

import rpg_fast
from rpg_fast.train.checkpoint import load_checkpoint
from rpg_fast.train.cli import build_parser, main
from rpg_fast.train.config import Stopped, TrainConfig, UserError
from rpg_fast.train.data import load_digits
from rpg_fast.train.loop import EpochMetrics, Trainer
from rpg_fast.train.models import build_model
from rpg_fast.train.online import OnlineRun
from rpg_fast.train.optimization import Average, MixUp, make_optimizer
from rpg_fast.train.published import ALIASES, FLAGS, INSTEAD
from rpg_fast.train.recipes import RECIPES
from rpg_fast.train.run import Run

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


def first_batch(trainer: Trainer) -> tuple[Tensor, Tensor]:
    return next(iter(trainer.train_batches.iterate(0)))


def test_a_compiled_network_trains_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    by_torch = nn.Module.compile

    def compile_eagerly(module: nn.Module) -> None:  # what is tested is the way through it, not the compiler
        compiled.append(module)
        by_torch(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    weights = []
    for wanted in (False, True):
        trainer = small_trainer(TrainConfig(epochs=1, batch_size=256, update_every=2, compile=wanted))
        assert compiled == ([trainer.network] if wanted else [])
        trainer.run(lambda metrics: None)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert next(iter(trainer.model.state_dict())) == "0.weight"
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("autocast", "dtype"), [(None, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_passes_run_in_the_precision_that_is_asked_for(autocast: Any, dtype: torch.dtype) -> None:
    trainer = small_trainer(TrainConfig(epochs=1, batch_size=256, update_every=2, autocast=autocast))
    seen: set[tuple[bool, torch.dtype]] = set()
    trainer.model[0].register_forward_hook(lambda module, _, output: seen.add((module.training, output.dtype)))
    trainer.run(lambda metrics: None)
    assert seen == {(True, dtype), (False, dtype)}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.scaler.is_enabled() == (autocast == "fp16")


def test_a_gradient_beyond_fp16_is_left_out_and_the_scale_falls() -> None:
    trainer = small_trainer(TrainConfig(epochs=1, batch_size=256, update_every=3, autocast="fp16", rank_weight=0))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step(*first_batch(trainer))
    assert all(torch.equal(p, was) for p, was in zip(trainer.model.parameters(), before, strict=True))
    assert trainer.scaler.get_scale() == 2.0**39
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    trainer.train_step(*first_batch(trainer))
    assert not any(torch.equal(p, was) for p, was in zip(trainer.model.parameters(), before, strict=True))


def test_weights_and_images_lie_channels_last_to_the_same_end() -> None:
    ends = []
    for channels_last in (False, True):
        config = TrainConfig(
            data="synthetic", width=4, epochs=1, batch_size=64, train_images=256, update_every=2, sparsity=0.8,
            dense_baseline=False, channels_last=channels_last, threads=1, image_size=8,
        )  # fmt: skip
        run = Run(config)
        layouts: set[tuple[bool, bool]] = set()

        def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, seen: set[Any] = layouts) -> None:
            tensors = (inputs[0], output, module.weight)
            seen.add(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in tensors))

        run.sparse.model.layer1[0].conv1.register_forward_hook(look)
        run.sparse.run(lambda metrics: None)
        assert layouts == {(channels_last,) * 3}
        ends.append(torch.cat([p.detach().flatten() for p in run.sparse.model.parameters()]))
        masks = run.sparse.pruner.masks
        assert all((masks.weights[name][~mask] == 0).all() for name, mask in masks.unpack().items())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_decay_goes_by_the_type_of_a_layer() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, 4))
            self.conv_norm = nn.GroupNorm(2, 4)
            self.linear = nn.LayerNorm([4, 4])  # two dimensions, and the name of something else
            self.bn1 = nn.Linear(4, 4)
            self.norm_bias = nn.Conv1d(4, 4, 3)
            self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.attention = nn.MultiheadAttention(4, 2)
            self.weight = nn.Embedding(3, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.bn1.weight

    model = Mixed()
    decayed, rest = make_optimizer(model, TrainConfig(weight_decay=0.3, optimizer_impl="torch")).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in decayed["params"]] == [
        *("bn1.weight", "norm_bias.weight", "downsample.0.weight"),
        *("attention.in_proj_weight", "attention.out_proj.weight"),
    ]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(("smoothing", "alpha"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.4), (0.2, 0.4)])
def test_the_loss_is_smoothed_and_mixed(smoothing: float, alpha: float) -> None:
    config = TrainConfig(epochs=1, batch_size=64, label_smoothing=smoothing, mixup=alpha, update_every=5, seed=4)
    trainer = small_trainer(config)
    model = copy.deepcopy(trainer.model)
    x, y = first_batch(trainer)
    share = MixUp(alpha, 4).share(0)
    assert (share == 1) == (alpha == 0)
    logits = model(share * x + (1 - share) * x.roll(1, 0))
    soft = share * nn.functional.one_hot(y, 10) + (1 - share) * nn.functional.one_hot(y.roll(1), 10)
    soft = (1 - smoothing) * soft + smoothing / 10
    loss, _ = trainer.train_step(x, y)
    torch.testing.assert_close(loss / len(y), nn.functional.cross_entropy(logits, soft).detach())


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


OFFICIAL_PRUNING: dict[str, Any] = {"semantics": "official", "rank_every": "update", "drop_fraction": 0.0}


@pytest.mark.parametrize("options", [{}, OFFICIAL_PRUNING], ids=["updates rest", "updates train"])
def test_the_average_follows_every_step(options: dict[str, Any]) -> None:
    config = TrainConfig(epochs=1, batch_size=128, ema_decay=0.8, update_every=2, sparsity=0.5, **options)
    trainer = small_trainer(config)
    expected = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for images, labels in trainer.train_batches.iterate(0):
        trainer.train_step(images, labels)
        if trainer.step % 2 == 0:  # an update of the masks
            for name, mask in trainer.pruner.masks.unpack().items():
                expected[name] *= mask
        for name, parameter in trainer.model.named_parameters():
            expected[name] = 0.8 * expected[name] + 0.2 * parameter.detach()
    assert trainer.step == 10
    for name, parameter in trainer.average.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
    for name, mask in trainer.pruner.masks.unpack().items():
        assert (trainer.average.model.get_parameter(name)[~mask] == 0).all()


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
    given = ("--start-from=pretrained", f"--pretrained={tmp_path / 'weights.pt'}")
    options = ("--epochs=1", "--lr=1e-12", "--sparsity=0", "--weight-decay=0", "--rank-weight=0")
    assert main(["train", *TINY, *options, *given, f"--out={tmp_path / 'run'}"]) == 0
    after = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["state_dict"]
    torch.testing.assert_close(after["fc.weight"], model.fc.weight.detach())
    capsys.readouterr()
    for options, text in (
        (
            ("--start-from=pretrained",),
            "--start-from pretrained begins with trained weights: name their file with --pretrained",
        ),
        ((*given, "--width=8"), "does not fit --arch resnet20 here: size mismatch for conv1.weight"),
        (("--start-from=pretrained", "--pretrained=none"), "there is no checkpoint at none"),
        ((*given[1:], "--start-from=random"), "but --start-from random does not take them"),
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


def test_a_missing_tensorboard_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    assert main(["train", *TINY, "--tensorboard", f"--out={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.endswith("--tensorboard needs the package tensorboard: pip install tensorboard\n")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- Weights & Biases


class Online:
    """In the place of wandb: keeps what it is told, in `runs`."""

    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.summary: dict[str, Any] = {}

    def init(self, **options: Any) -> Any:
        run = types.SimpleNamespace(**options, logged=[], axes={}, ended=None, summary=self.summary)
        run.id = options["id"] or "abc123"
        run.log = lambda row: (run.logged.append(row), self.summary.update(row))
        run.define_metric = lambda name, step_metric: run.axes.update({name: step_metric})
        run.finish = lambda exit_code: setattr(run, "ended", exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Online:
    stand_in = Online()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_wandb_gets_what_the_table_gets(wandb: Online, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [option for option in TINY if option != "--no-dense-baseline"]
    assert main(["train", *options, "--wandb=pruning", f"--out={folder}"]) == 0
    (run,) = wandb.runs
    assert (run.project, run.name, run.dir, run.ended) == ("pruning", "run", str(folder), 0)
    assert run.config == json.loads((folder / "config.json").read_text())["config"]
    assert run.axes == {"dense/*": "dense/step", "sparse/*": "sparse/step"}
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4
    for row, sent in zip(table, run.logged, strict=True):
        name = row.pop("run")
        assert {f"{name}/{column}": value for column, value in row.items()} == {k: str(v) for k, v in sent.items()}


def test_a_resumed_run_goes_on_online_where_it_was(wandb: Online, tmp_path: Path) -> None:
    config = TrainConfig(wandb="pruning")
    rows = [
        EpochMetrics(
            run="sparse", epoch=epoch, step=10 * epoch,
            **{field.name: 0.0 for field in fields(EpochMetrics) if field.name not in ("run", "epoch", "step")},
        )
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    for begin, end in ((0, 2), (1, 3)):  # the second epoch again, as after a kill
        online = OnlineRun()
        online.start(tmp_path, config)
        with online:
            for row in rows[begin:end]:
                online.add(row)
    first, second = wandb.runs
    assert (first.id, first.resume) == ("abc123", None)
    assert (second.id, second.resume) == ("abc123", "allow")
    assert [row["sparse/step"] for row in first.logged + second.logged] == [10, 20, 30]


def test_online_runs_end_as_the_training_does(wandb: Online, tmp_path: Path) -> None:
    for error, code in ((UserError("diverged"), 1), (Stopped("by SIGTERM"), 0), (KeyboardInterrupt(), 1)):
        online = OnlineRun()
        online.start(tmp_path, TrainConfig(wandb="pruning"))
        with pytest.raises(type(error)), online:
            raise error
        assert wandb.runs[-1].ended == code
    with OnlineRun() as elsewhere:  # as on the other ranks
        elsewhere.add(None)  # type: ignore[arg-type]
    assert len(wandb.runs) == 3


def test_a_wandb_that_is_missing_or_refuses(
    wandb: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("api_key not configured\nmore")

    wandb.init = refuse  # type: ignore[method-assign]
    assert main(["train", *TINY, "--wandb=pruning", f"--out={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.endswith("--wandb pruning cannot begin: api_key not configured\n")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", *TINY, "--wandb=pruning", f"--out={tmp_path / 'other'}"]) == 2
    assert capsys.readouterr().err.endswith("--wandb needs the package wandb: pip install wandb\n")
    assert not (tmp_path / "other").exists()


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
    found = shown(capsys, f"--recipe={recipe}")
    expected = {
        **{"sparsity": sparsity, "rank-weight": rank_weight, "tail-energy": tail_energy, "start-from": start},
        **{"arch": "resnet50", "epochs": "100", "batch-size": "1024", "lr": "0.4", "warmup-epochs": "5.0"},
        **{"momentum": "0.9", "weight-decay": "0.0001", "label-smoothing": "0.1", "update-every": "100"},
        **{"prune-until": "0.9", "update-until": "0.901", "drop-fraction": "0.3", "rank-every": "update"},
        **{"min-sparsity": "0.0", "seed": "42", "distribution": "global_magnitude", "schedule": "exponential"},
    }
    assert {name: found[f"--{name}"] for name in expected} == {
        name: (value, f"recipe {recipe}") for name, value in expected.items()
    }
    assert set(found) == {f"--{name.replace('_', '-')}" for name in TrainConfig().to_dict()}


def test_a_recipe_is_overridden_and_stored_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys, "--recipe=rpg-95", "--rank-weight=1.5")
    assert found["--rank-weight"] == ("1.5", "given")
    assert found["--tail-energy"] == ("0.2", "recipe rpg-95")
    assert found["--width"] == ("-", "default")
    assert main(["train", "--recipe=rpg-95", f"--out={tmp_path / 'run'}"]) == 2
    assert "--recipe rpg-95 begins with trained weights: name their file" in capsys.readouterr().err
    tiny = ("--arch=resnet20", *TINY, "--warmup-epochs=0.5")
    assert main(["train", "--recipe=rpg-90-scratch", *tiny, f"--out={tmp_path / 'run'}"]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    recipe = {**RECIPES["rpg-90-scratch"], "arch": "resnet20", "epochs": 2, "batch_size": 128, "update_every": 4}
    assert {name: config[name] for name in recipe} == {**recipe, "warmup_epochs": 0.5}
    assert config["recipe"] == "rpg-90-scratch"


# ---------------------------------------------------------------------------------------------------- published names


def told(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(["train", *options, "--show-config"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("rpg-fast train: error: ")
    return line


def values(shown: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {name: value for name, (value, _) in shown.items()}


def test_published_names_mean_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    published = (
        *("--model", "resnet50", "--lamb", "3", "--partial_k", "0.2", "--sparsity_thres", "0.1", "--delta", "50"),
        *("--alpha", "0.2", "--iterative_T_end_percent", "0.8", "--T_end_percent", "0.85", "--wd", "1e-4"),
        *("--warmup", "3", "--label_smoothing", "0.2", "--learning-rate", "0.3", "--optim", "sgd", "--mixup", "0.1"),
        *("--sp-distribution", "magnitude-exponential", "--dense-allocation", "0.02", "--memory-format", "nhwc"),
        *("--amp", "--lr-schedule", "cosine2", "--grad-accumulation-n", "3", "--static-topo", "0"),
        *("--pretrained-weights", "weights.pth", "--model-config", "classic"),
    )
    ours = (
        *("--arch=resnet50", "--rank-weight=3", "--tail-energy=0.2", "--min-sparsity=0.1", "--update-every=50"),
        *("--drop-fraction=0.2", "--prune-until=0.8", "--update-until=0.85", "--weight-decay=1e-4"),
        *("--warmup-epochs=3", "--label-smoothing=0.2", "--lr=0.3", "--optimizer=sgd", "--mixup=0.1"),
        *("--distribution=global_magnitude", "--schedule=exponential", "--sparsity=0.98", "--channels-last"),
        *("--autocast=fp16", "--grow-steps=3", "--pretrained=weights.pth"),
    )
    assert values(shown(capsys, *published)) == values(shown(capsys, *ours))


@pytest.mark.parametrize(
    ("sparsity", "rank_weight", "tail_energy"),
    [(80, "0.5", "0.2"), (90, "0.5", "0.1"), (95, "3", "0.2"), (98, "4", "0.2")],
)
def test_the_published_commands_are_the_recipes(
    sparsity: int,
    rank_weight: str,
    tail_energy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "MASTER_ADDR": "", "MASTER_PORT": ""}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("rpg_fast.train.cli.end_process", lambda status: status)
    command = (
        f"--alpha 0.3 --batch_size 128 --delta 100 --distributed --distribution magnitude-exponential --epochs 100 "
        f"--eval_batch_size 25 --lr 0.4 --sparsity {sparsity / 100} --lamb {rank_weight} --partial_k {tail_energy} "
        "--iterative_T_end_percent 0.9 --T_end_percent 0.901"
    )
    recipe = f"--recipe=rpg-{sparsity}"
    assert main(["train", recipe, *command.split(), "--show-config"]) == 0
    said = capsys.readouterr()
    assert "note: --eval_batch_size has no effect here: accuracy does not depend on it\n" in said.err
    assert "note: --distributed has no effect here" in said.err
    found = shown(capsys, recipe, *command.split())
    assert values(found) == values(shown(capsys, recipe))
    assert found["--batch-size"] == ("1024", "given as --batch_size 128 x 8")


def test_the_configuration_names_the_name_that_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(
        capsys,
        *("--recipe=rpg-98", "--lamb=2", "--lr=0.2", "--dense-allocation=0.1", "--amp", "--no-dense-baseline"),
        *("--distribution=magnitude-exponential", "--delta", "7"),
    )
    assert found["--rank-weight"] == ("2.0", "given as --lamb")
    assert found["--lr"] == ("0.2", "given")
    assert found["--sparsity"] == ("0.9", "given as --dense-allocation")
    assert found["--autocast"] == ("fp16", "given as --amp")
    assert found["--schedule"] == ("exponential", "given as --distribution")
    assert found["--dense-baseline"] == ("false", "given")
    assert found["--update-every"] == ("7", "given as --delta")
    assert found["--seed"] == ("42", "recipe rpg-98")
    assert found["--channels-last"] == ("false", "default")


def test_published_allocations(capsys: pytest.CaptureFixture[str]) -> None:
    for name, distribution, kept in (
        ("uniform", "uniform", "conv1,fc"),
        ("alluniform", "uniform", "-"),
        ("erk", "erk", "-"),
    ):
        found = values(shown(capsys, "--sp-distribution", name))
        assert (found["--distribution"], found["--keep-dense"]) == (distribution, kept)


def test_published_batches_count_by_process(capsys: pytest.CaptureFixture[str]) -> None:
    found = values(shown(capsys, "-b", "32", "--optimizer-batch-size", "128"))
    assert (found["--batch-size"], found["--accumulate"]) == ("128", "4")
    assert values(shown(capsys, "-b", "32", "--optimizer-batch-size", "-1"))["--accumulate"] == "1"
    for options, text in (
        (["-b", "32", "--optimizer-batch-size", "100"], "100 is no multiple of 32 images for each of 1 processes"),
        (["--optimizer-batch-size", "100"], "--optimizer-batch-size goes with --batch_size"),
        (["-b", "3", "--batch-size", "3"], "-b is --batch-size times the processes: give one of them"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
    ):
        assert text in told(capsys, *options)


def test_published_options_that_cannot_be_honoured_say_what_to_use(capsys: pytest.CaptureFixture[str]) -> None:
    for options, text in (
        (["--lr-schedule=step"], "--lr-schedule step: here it is cosine2: the learning rate rises"),
        (["--static-topo=1"], "--static-topo 1: here it is 0: --criterion static --schedule constant keeps"),
        (["--grad-accumulation-n=0"], "--grow-steps must be at least 1, got 0"),
        (["--threads=100000"], "--threads must be from 1 to 1024, got 100000"),
        (["--memory-format=abc"], "invalid choice: 'abc' (choose from"),
        (["--sp-distribution=magnitude-exponential-warm-0.1"], "magnitude-exponential, whose schedule has no warm-up"),
        (["--dense-allocation=0"], "--sparsity must be at least 0 and below 1, got 1.0"),
        (["--dense-allocation=x"], "must be a number, got 'x'"),
        (["--evaluate"], "--evaluate is not an option here: `rpg-fast evaluate FILE` tests a network"),
        (["--num-classes=1000"], "the images tell their classes"),
        (["--data=/"], "for the image files in it, folder:/"),
    ):
        assert text in told(capsys, *options)


PUBLISHED_OPTIONS = (
    *("--data", "--data-backend", "--arch", "-a", "--model-config", "-c", "--num-classes", "-j", "--workers"),
    *("--epochs", "--run-epochs", "-b", "--batch-size", "--optimizer-batch-size", "--lr", "--learning-rate"),
    *("--lr-schedule", "--warmup", "--label-smoothing", "--mixup", "--optimizer", "--momentum", "--weight-decay"),
    *("--wd", "--bn-weight-decay", "--nesterov", "--print-freq", "-p", "--resume", "--pretrained-weights", "--fp16"),
    *("--static-loss-scale", "--dynamic-loss-scale", "--prof", "--amp", "--seed", "--gather-checkpoints"),
    *("--raport-file", "--evaluate", "--training-only", "--no-checkpoints", "--checkpoint-filename"),
    *("--checkpoint-dir", "--log-filename", "--workspace", "--memory-format", "--id", "--lr-decay-epochs"),
    *("--short-train", "--do-not-reset-epochs", "--restart-training", "--lr-file", "--dense-allocation", "--delta"),
    *("--grad-accumulation-n", "--alpha", "--static-topo", "--T-end-percent", "--T-end-epochs"),
    *("--sp-distribution", "--dataset", "--eval-batch-size", "--lrconfig", "--lamb", "--sparsity_thres"),
    *("--partial_k", "--bounded", "--iterative_T_end_percent", "--widths"),
    # of the script that starts it
    *("--model", "--optim", "--distribution", "--sparsity", "--save_inter", "--batch_size", "--eval_batch_size"),
    *("--distributed", "--pretrained", "--scheduler", "--label_smoothing", "--data_backend", "--allconfig"),
    *("--scheme", "--T_end_percent", "--init_method"),
)


def test_every_published_option_has_an_answer() -> None:
    parser: Any = build_parser()
    train = next(action for action in parser._actions if action.choices).choices["train"]
    known = set(train._option_string_actions)
    assert set(PUBLISHED_OPTIONS) <= known
    assert set(FLAGS) <= set(INSTEAD)
    assert {name for names in ALIASES.values() for name in names} <= known


def test_torchrun_leaves_every_option_to_the_command() -> None:
    """Before Python 3.12 it refuses those that begin like two of its own, as --start would --start-method."""
    command = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices["train"]
    words = ["train", *(option for action in command._actions for option in action.option_strings)]
    assert get_args_parser().parse_args(["--nproc-per-node=2", "-m", "rpg_fast", *words]).training_script_args == words
    torchruns = {word for action in get_args_parser()._actions for word in action.option_strings}
    assert [word for word in words[1:] for its in torchruns if its.startswith(word) and its != word] == []


def test_options_that_read_flags_take_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    for name in INSTEAD:
        assert f"{name} is not an option here: " in told(capsys, name, *([] if name in FLAGS else ["3"]))


def test_a_reader_that_stops_ends_the_command_quietly() -> None:
    command = f"{sys.executable} -m rpg_fast train --show-config | true"
    finished = subprocess.run(["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert finished.stderr == ""
    assert finished.stdout.strip() in ("0", "141")


# ---------------------------------------------------------------------------------------------------------- semantics

OFFICIAL = ("--semantics=official", "--rank-every=update")


def test_the_pruner_gets_the_semantics(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}
    pruner = rpg_fast.RankPruner

    def listening(*arguments: Any, **given: Any) -> rpg_fast.RankPruner:
        options.update(given)
        return pruner(*arguments, **given)

    monkeypatch.setattr("rpg_fast.RankPruner", listening)
    for semantics, steps in (("corrected", 1), ("corrected", 4), ("official", 1), ("official", 3)):
        config = TrainConfig(
            epochs=2, batch_size=128, update_every=4, rank_every="update", semantics=semantics, grow_steps=steps
        )
        small_trainer(config)
        assert (options["semantics"], options["grow_steps"]) == (semantics, steps)


def test_official_masks_are_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Short of its target, as the published schedule is; read back as such."""
    sparsities = {}
    for semantics in ("corrected", "official"):
        folder = tmp_path / semantics
        options = (f"--semantics={semantics}", "--rank-every=update", "--grow-steps=2")
        assert main(["train", *TINY, *options, f"--out={folder}"]) == 0
        saved = load_checkpoint(folder / "checkpoint.pt")
        assert saved["config"]["semantics"] == semantics
        assert saved["config"]["grow_steps"] == 2
        sparsities[semantics] = saved["metrics"][-1]["sparsity"]
        assert ("weights are pruned; 90% was asked for\n" in capsys.readouterr().out) == (semantics == "official")
        assert main(["evaluate", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sparsity"] == pytest.approx(sparsities[semantics])
    assert sparsities["corrected"] == pytest.approx(0.9, abs=1e-3)
    assert 0 < sparsities["official"] < 0.89


def test_semantics_that_do_not_go_with_other_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, text in (
        (
            OFFICIAL[:1],
            "--semantics official is defined for --distribution global_magnitude, --criterion rigl, "
            "--schedule exponential, --rank-every update, got --rank-every 1\n",
        ),
        ((*OFFICIAL, "--criterion=set", "--distribution=erk"), ", got --distribution erk, --criterion set\n"),
        ((*OFFICIAL, "--schedule=constant"), ", got --schedule constant\n"),
        (("--grow-steps=0",), "--grow-steps must be at least 1, got 0\n"),
        (
            (*OFFICIAL, "--grow-steps=4"),
            "--grow-steps must be below the 4 steps of --update-every with --semantics official, got 4\n",
        ),
        (("--grow-steps=5",), "--grow-steps must be at most the 4 steps of --update-every, got 5\n"),
    ):
        assert main(["train", *TINY, *options, f"--out={tmp_path / 'run'}"]) == 2
        assert capsys.readouterr().err.endswith(text)
        assert not (tmp_path / "run").exists()
    assert "--semantics: invalid choice: 'other'" in told(capsys, "--semantics=other")


def test_resume_takes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint.pth.tar").write_text("")
    assert main(["train", f"--resume={tmp_path / 'checkpoint.pth.tar'}"]) == 2
    said = capsys.readouterr().err
    assert "--resume takes the folder of a run, but" in said
    assert f"--pretrained {tmp_path / 'checkpoint.pth.tar'} begins with its weights" in said
