"""Curves of a run for TensorBoard."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import TrainConfig, UserError
from .loop import EpochMetrics, Trainer


class EventWriter:
    """Writes the figures of each epoch to tensorboard/<run> in the run's folder, at the optimizer step where they were
    taken. A resumed run hides what was written after the step where it goes on.

    Raises:
        UserError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path, trainer: Trainer, config: TrainConfig):
        self.writer = summary_writer()(str(folder / "tensorboard" / trainer.name), purge_step=trainer.step + 1)
        if trainer.step == 0:
            lines = "\n".join(f"    {name} = {value}" for name, value in config.to_dict().items())
            self.writer.add_text("config", lines)

    def add_epoch(self, metrics: EpochMetrics) -> None:
        for name, value in asdict(metrics).items():
            if name not in ("run", "step"):
                self.writer.add_scalar(name, value, metrics.step)
        self.writer.flush()


def summary_writer() -> Any:
    """TensorBoard's `SummaryWriter`.

    Raises:
        UserError: the package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter
