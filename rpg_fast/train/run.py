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

from .checkpoint import load_checkpoint, model_arguments, restore_model, save_checkpoint
from .config import TrainConfig, UserError
from .data import Dataset, load_digits, make_synthetic
from .layers import NetworkStatistics, network_statistics
from .loop import EpochMetrics, Trainer, accuracy, evaluation_batches, memory_format
from .models import build_model
from .report import draw_report


@dataclass(frozen=True)
class RunResult:
    """What came out; `before` is the network that the sparse training began with, `after` the one it ended with."""

    folder: Path
    dense: tuple[EpochMetrics, ...]
    sparse: tuple[EpochMetrics, ...]
    before: NetworkStatistics
    after: NetworkStatistics
    pruned: int

    @property
    def best_sparse(self) -> EpochMetrics:
        """The best epoch among those that are as sparse as the last: an earlier, denser one is no fair comparison."""
        return max(
            (row for row in self.sparse if row.sparsity >= self.pruned / self.after.size),
            key=lambda row: row.test_accuracy,
            default=self.sparse[-1],
        )


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

    def write_metrics(self, rows: Sequence[EpochMetrics]) -> None:
        """The whole table anew, replaced in one go, so that a reader never sees half a line."""
        temporary = self.path / ".metrics.csv"
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(EpochMetrics)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        os.replace(temporary, self.path / "metrics.csv")


def train(config: TrainConfig, out: Path | None = None) -> RunResult:
    """Trains as configured into a new folder.

    Raises:
        UserError: an option does not fit, the folder exists, or the training diverged. What does not fit is found
            before anything is written.
    """
    device = choose_device(config)
    dataset = load_data(config).to(device)
    arguments = model_arguments(config, dataset)
    torch.manual_seed(config.seed)
    initial = build_model(**arguments).to(device=device, memory_format=memory_format(config))
    dense = Trainer(copy.deepcopy(initial), dataset, config, name="dense", sparse=False)
    sparse = Trainer(copy.deepcopy(initial), dataset, config, name="sparse", sparse=True)

    folder = RunFolder.create(out, config.name)
    folder.write_config(config, {"model": arguments, "device": device_name(device), "torch": torch.__version__})
    rows: dict[str, list[EpochMetrics]] = {"dense": [], "sparse": []}
    after = before = network_statistics(initial, config.tail_energy)

    def fit(trainer: Trainer, file: str) -> NetworkStatistics:
        last = before

        def on_epoch(metrics: EpochMetrics, statistics: NetworkStatistics) -> None:
            nonlocal last
            last = statistics
            rows[trainer.name].append(metrics)
            folder.write_metrics(rows["dense"] + rows["sparse"])
            content = {
                "state_dict": trainer.model.state_dict(),
                "model": arguments,
                "config": config.to_dict(),
                "metrics": [asdict(row) for row in rows[trainer.name]],
                "trainer": trainer.state_dict(),
            }
            save_checkpoint(folder.path / file, content)

        trainer.run(on_epoch)
        return last

    if config.dense_baseline:
        trained = fit(dense, "dense.pt")
        if config.start == "dense":
            before = trained
            sparse = Trainer(copy.deepcopy(dense.model), dataset, config, name="sparse", sparse=True)
    after = fit(sparse, "checkpoint.pt")

    pruned = after.size - int(sum(sparse.pruner.masks.count()))
    result = RunResult(folder.path, tuple(rows["dense"]), tuple(rows["sparse"]), before, after, pruned)
    draw_report(folder.path / "report.png", config, result.dense, result.sparse, before, after)
    return result


def summary(config: TrainConfig, result: RunResult) -> str:
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
        f"mean rank k/m     {after.mean_rank_ratio:.3f} at tail energy {config.tail_energy:g} "
        f"(before: {before.mean_rank_ratio:.3f})",
        f"effective rank    {after.effective_rank:.1f} of {after.largest_effective_rank:.1f} possible "
        f"(before: {before.effective_rank:.1f})",
        f"dead filters      {after.dead_filters} of {after.filters}",
        f"checkpoint        {result.folder / 'checkpoint.pt'}",
        f"picture           {result.folder / 'report.png'}",
    ]
    return "\n".join(lines)


def evaluate(path: Path, *, overrides: dict[str, Any]) -> tuple[TrainConfig, float, NetworkStatistics]:
    """Test accuracy and layer statistics of a checkpoint, on the data that it was trained on or as `overrides` say.

    Raises:
        UserError: the file is no good, or its model does not fit the data.
    """
    checkpoint = load_checkpoint(path)
    config = TrainConfig.from_dict({**checkpoint["config"], **overrides})
    device = choose_device(config)
    model = restore_model(checkpoint).to(device=device, memory_format=memory_format(config))
    dataset = load_data(config).to(device)
    for what, have, want in (
        ("channels", dataset.in_channels, checkpoint["model"]["in_channels"]),
        ("classes", dataset.num_classes, checkpoint["model"]["num_classes"]),
    ):
        if have != want:
            raise UserError(f"{path} is a model for {want} {what}, but {dataset.name} has {have}")
    value = accuracy(model, evaluation_batches(dataset, config), config)
    return config, value, network_statistics(model, config.tail_energy)


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
    """The device to train on ("auto": CUDA where there is one), with the number of threads set.

    Raises:
        UserError: there is no such device.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
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


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
