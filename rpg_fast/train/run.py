"""One run from its configuration to its folder: dense baseline, sparse training, metrics, checkpoints, picture."""

from __future__ import annotations

import copy
import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import load_checkpoint, model_arguments, save_checkpoint
from .config import TrainConfig, UserError
from .data import Dataset, load_digits, make_synthetic
from .layers import NetworkStatistics, network_statistics
from .loop import EpochMetrics, Trainer, place
from .models import build_model
from .report import draw_report

TINY_IMAGE = 16  # pixels


@dataclass(frozen=True)
class RunResult:
    """What came out. `before` is the network that the sparse training began with, `after` the one that it ended with,
    `pruned` the number of weights that the masks exclude."""

    folder: Path
    dense: tuple[EpochMetrics, ...]
    sparse: tuple[EpochMetrics, ...]
    before: NetworkStatistics
    after: NetworkStatistics
    pruned: int

    @property
    def best_sparse(self) -> EpochMetrics:
        """The best epoch among those that are as sparse as the last: an earlier, denser one is no fair comparison."""
        as_sparse = [row for row in self.sparse if row.sparsity == self.sparse[-1].sparsity]
        return max(as_sparse, key=lambda row: row.test_accuracy)


class RunFolder:
    """The files of one run: config.json, metrics.csv, dense.pt, checkpoint.pt, report.png."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, out: Path | None, name: str) -> RunFolder:
        """A new folder: `out`, or the first free one of runs/<name>, runs/<name>-2, ...

        Raises:
            UserError: `out` exists and is not an empty folder, or cannot be made.
        """
        candidates = [out] if out else [Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000)]
        for path in candidates:
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError:
                if out and path.is_dir() and not any(path.iterdir()):
                    return cls(path)
            except OSError as error:
                raise UserError(f"cannot make the run's folder {path}: {error.strerror}") from error
        raise UserError(f"{candidates[0]} exists already; runs are never overwritten: choose another --out")

    def write_config(self, config: TrainConfig, facts: dict[str, Any]) -> None:
        text = json.dumps({"config": config.to_dict(), **facts}, indent=2)
        (self.path / "config.json").write_text(text + "\n")

    def read_config(self) -> dict[str, Any]:
        """The configuration that `write_config` wrote.

        Raises:
            UserError: there is none.
        """
        path = self.path / "config.json"
        try:
            config = json.loads(path.read_text())["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} holds no run that can be resumed: {path} is missing or damaged") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.path} holds no run that can be resumed: {path} is damaged")
        return config

    def write_metrics(self, rows: Sequence[EpochMetrics]) -> None:
        """The whole table anew, replaced in one go, so that a reader never sees half a line."""
        temporary = self.path / ".metrics.csv"
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(EpochMetrics)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        os.replace(temporary, self.path / "metrics.csv")


class Run:
    """A dense and a sparse trainer, which begin with the same weights, and the folder that they write to.

    Raises:
        UserError: an option does not fit. It is found here, before anything is written.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.device = choose_device(config)
        self.dataset = load_data(config).to(self.device)
        choose_threads(config, self.dataset)
        self.model_arguments = model_arguments(config, self.dataset)
        torch.manual_seed(config.seed)
        self.initial = place(build_model(**self.model_arguments), self.device, config)
        self.dense = self._trainer("dense", self.initial)
        self.sparse = self._trainer("sparse", self.initial)
        self.rows: dict[str, list[EpochMetrics]] = {"dense": [], "sparse": []}

    def _trainer(self, name: str, model: nn.Module) -> Trainer:
        return Trainer(copy.deepcopy(model), self.dataset, self.config, name=name, sparse=name == "sparse")

    def train(self, folder: RunFolder) -> RunResult:
        """Trains both, each from where its checkpoint in the folder left off, and draws the picture.

        Raises:
            UserError: a checkpoint in the folder is no good, or the training diverged.
        """
        config, begin = self.config, self.initial
        print(self.describe(folder), flush=True)
        if config.dense_baseline:
            self._fit(self.dense, folder, "dense.pt")
            if config.starts_dense:
                begin = self.dense.model
                self.sparse = self._trainer("sparse", begin)
        self._fit(self.sparse, folder, "checkpoint.pt")

        before = network_statistics(begin, config.tail_energy)
        after = network_statistics(self.sparse.model, config.tail_energy)
        assert self.sparse.pruner is not None
        pruned = after.size - int(self.sparse.pruner.masks.count().sum())
        rows = {name: tuple(found) for name, found in self.rows.items()}
        draw_report(folder.path / "report.png", config, rows["dense"], rows["sparse"], before, after)
        return RunResult(folder.path, rows["dense"], rows["sparse"], before, after, pruned)

    def describe(self, folder: RunFolder) -> str:
        """What is trained on what, where, into which folder: one line."""
        size = sum(parameter.numel() for parameter in self.initial.parameters())
        images = f"{len(self.dataset.train):,} training and {len(self.dataset.test):,} test images"
        return (
            f"{self.config.arch} ({size:,} parameters) on {self.dataset.name} ({images}), "
            f"{device_name(self.device)}, into {folder.path}"
        )

    def _fit(self, trainer: Trainer, folder: RunFolder, file: str) -> None:
        path, rows = folder.path / file, self.rows[trainer.name]
        if path.exists():
            checkpoint = load_checkpoint(path)
            try:
                trainer.model.load_state_dict(checkpoint["state_dict"])
                trainer.load_state_dict(checkpoint["trainer"])
                rows += [EpochMetrics(**row) for row in checkpoint["metrics"]]
            except (RuntimeError, TypeError, ValueError, KeyError) as error:
                raise UserError(f"{path} is not of this run: {str(error).splitlines()[0]}") from error

        def on_epoch(metrics: EpochMetrics) -> None:
            rows.append(metrics)
            folder.write_metrics(self.rows["dense"] + self.rows["sparse"])
            content = {
                "state_dict": trainer.model.state_dict(),
                "model": self.model_arguments,
                "config": self.config.to_dict(),
                "metrics": [asdict(row) for row in rows],
                "trainer": trainer.state_dict(),
            }
            save_checkpoint(path, content)

        trainer.run(on_epoch)


def train(config: TrainConfig, out: Path | None = None) -> RunResult:
    """Trains as configured into a new folder: `out`, or the next free one below runs/.

    Raises:
        UserError: an option does not fit or the folder is taken (then nothing is written), or the training diverged.
    """
    run = Run(config)
    folder = RunFolder.create(out, config.name)
    folder.write_config(config, {"device": device_name(run.device), "torch": torch.__version__})
    return run.train(folder)


def resume(path: Path, overrides: dict[str, Any]) -> RunResult:
    """Goes on with an interrupted run, from the last whole epoch to the same end.

    Raises:
        UserError: there is no run in `path`, or one of its files is damaged.
    """
    folder = RunFolder(path)
    return Run(TrainConfig.from_dict({**folder.read_config(), **overrides})).train(folder)


def summary(result: RunResult) -> str:
    """What the run came to, in a few lines."""
    before, after = result.before, result.after
    lines = []
    if result.dense:
        best = max(row.test_accuracy for row in result.dense)
        lines.append(f"dense accuracy    {result.dense[-1].test_accuracy:.2%} last, {best:.2%} best")
    lines += [
        f"sparse accuracy   {result.sparse[-1].test_accuracy:.2%} last, {result.best_sparse.test_accuracy:.2%} best "
        "at the final sparsity",
        f"sparsity          {result.pruned / after.size:.4%}: {result.pruned:,} of {after.size:,} weights are pruned",
        f"mean rank k/m     {after.mean_rank_ratio:.3f} (before: {before.mean_rank_ratio:.3f})",
        f"effective rank    {after.effective_rank:.1f} of {after.largest_effective_rank:.1f} possible "
        f"(before: {before.effective_rank:.1f})",
        f"dead filters      {after.dead_filters} of {after.filters}",
        f"checkpoint        {result.folder / 'checkpoint.pt'}",
        f"picture           {result.folder / 'report.png'}",
    ]
    return "\n".join(lines)


def load_data(config: TrainConfig) -> Dataset:
    """The data set that the configuration names."""
    if config.data == "digits":
        return load_digits(config.image_size)
    return make_synthetic(
        image_size=config.image_size,
        num_classes=config.classes,
        train_images=config.train_images,
        test_images=config.test_images,
        seed=config.seed,
    )


def choose_device(config: TrainConfig) -> torch.device:
    """The device to train on ("auto": CUDA where there is one).

    Raises:
        UserError: there is no such device.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is unknown; known are auto, cpu, cuda, cuda:0, ...") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not supported; known are auto, cpu, cuda, cuda:0, ...")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name} is not there: PyTorch {torch.__version__} sees {count} CUDA devices")
    return device


def choose_threads(config: TrainConfig, dataset: Dataset) -> None:
    """Sets the number of CPU threads. On tiny images one is fastest: the others would mostly wait for each other."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif dataset.image_size <= TINY_IMAGE:
        torch.set_num_threads(1)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}"
