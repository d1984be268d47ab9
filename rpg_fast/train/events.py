"""Curves of a run for TensorBoard."""

from __future__ import annotations

import importlib
import io
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import TrainConfig, UserError
from .loop import EpochMetrics, Trainer


class EventWriter:
    """Writes the figures of each epoch to tensorboard/<run> in the run's folder, at the optimizer step where they were
    taken. A resumed run begins a file of its own, which hides what was written after the step where it goes on.

    Whole records are appended by the caller's own thread, so that a disk that refuses them shows here, and damages no
    file: `SummaryWriter` writes in a thread that ends then.

    Raises:
        UserError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path, trainer: Trainer, config: TrainConfig):
        self._protocol, self._summary, self._records = require_tensorboard()
        session = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
        self.folder = folder / "tensorboard" / trainer.name
        self._file: Path | None = None
        self._waiting: list[Any] = []  # events that are not on the disk yet
        self._add(0, file_version="brain.Event:2")
        self._add(trainer.step + 1, session_log=session)
        if trainer.step == 0:
            lines = "\n".join(f"    {name} = {value}" for name, value in config.to_dict().items())
            self._add(0, summary=self._summary.text("config", lines))

    def _add(self, step: int, **content: Any) -> None:
        self._waiting.append(self._protocol.Event(wall_time=time.time(), step=step, **content))

    def add_epoch(self, metrics: EpochMetrics) -> None:
        """Takes the figures of an epoch in, for `write`."""
        for name, value in asdict(metrics).items():
            if name not in ("run", "step"):
                self._add(metrics.step, summary=self._summary.scalar(name, value))

    def write(self) -> None:
        """Writes what has been taken in.

        Raises:
            OSError: it could not be written, and stays for the next time.
        """
        records = io.BytesIO()
        writer = self._records.RecordWriter(records)
        for event in self._waiting:
            writer.write(event.SerializeToString())
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = len(list(self.folder.glob("events.out.tfevents.*")))  # TensorBoard reads them in this order
            self._file = self.folder / f"events.out.tfevents.{number:010d}"
        with open(self._file, "ab", buffering=0) as file:
            append(file, records.getbuffer())
        self._waiting.clear()


def append(file: io.FileIO, content: memoryview) -> None:
    """Writes all of `content` at the end of a file, or nothing.

    Raises:
        OSError: the disk refuses it.
    """
    end = file.tell()
    try:
        while content:
            content = content[file.write(content) or 0 :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def require_tensorboard() -> tuple[Any, Any, Any]:
    """TensorBoard's protocol, PyTorch's summaries in it, and TensorBoard's records.

    Raises:
        UserError: the package is missing.
    """
    try:
        return (
            importlib.import_module("tensorboard.compat.proto.event_pb2"),
            importlib.import_module("torch.utils.tensorboard.summary"),
            importlib.import_module("tensorboard.summary.writer.record_writer"),
        )
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
