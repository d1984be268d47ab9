"""The figures of a run, sent to Weights & Biases."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from .config import Stopped, TrainConfig, UserError
from .loop import EpochMetrics

ID_FILE = "wandb-id.txt"  # in the run's folder: which run a resumed one goes on with


class OnlineRun:
    """One run there for the dense and the sparse training of one folder. Until `start` has been called, and on every
    rank but that which called it, nothing is sent. As a context manager it marks the run as finished or failed."""

    def __init__(self) -> None:
        self.run: Any = None
        self._sent: dict[str, int] = {}  # the last step of each training, also before a resume

    def start(self, folder: Path, config: TrainConfig) -> None:
        """Begins the run in the project `config.wandb`, or goes on with that of `folder`.

        Raises:
            UserError: the package is missing or refuses.
        """
        wandb = import_wandb()
        file = folder / ID_FILE
        known = file.read_text().strip() if file.exists() else None
        try:
            self.run = wandb.init(
                project=config.wandb,
                name=folder.name,
                dir=str(folder),
                config=config.to_dict(),
                id=known,
                resume=None if known is None else "allow",
            )
            file.write_text(f"{self.run.id}\n")
        except Exception as error:  # not logged in, no such project, no connection: errors of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--wandb {config.wandb} cannot begin: {reason}") from error
        for name in ("dense", "sparse"):
            self.run.define_metric(f"{name}/*", step_metric=f"{name}/step")
            self._sent[name] = int(self.run.summary.get(f"{name}/step") or 0)

    def add(self, metrics: EpochMetrics) -> None:
        """Sends what metrics.csv gets, unless a run that was resumed has sent it before."""
        if self.run is not None and metrics.step > self._sent[metrics.run]:
            row = {f"{metrics.run}/{key}": value for key, value in asdict(metrics).items() if key != "run"}
            self.run.log(row)
            self._sent[metrics.run] = metrics.step

    def __enter__(self) -> OnlineRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if error is None or isinstance(error, Stopped) else 1)


def import_wandb() -> Any:
    """The package.

    Raises:
        UserError: it is missing.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError("--wandb needs the package wandb: pip install wandb") from error
