"""The files of a run, each whole or absent whatever ends the process, and the checkpoint that a run goes on from."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import UserError

FORMAT = "rpg_fast.train/1"
REQUIRED = {"state_dict": dict, "config": dict, "model": dict, "metrics": list, "trainer": dict}


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes `path` whole or not at all: an older file stays until the new one is on the disk, also if the power fails.

    Raises:
        OSError: it could not be written; nothing but the older file is left.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` and the format's name by `write_file`. It is encoded before a file is touched.

    Raises:
        OSError: it could not be written; the older checkpoint is as it was.
    """
    encoded = io.BytesIO()
    torch.save({"format": FORMAT, **content}, encoded)
    write_file(path, encoded.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, onto the CPU and without executing any code from the file.

    Raises:
        UserError: there is no such file, it is damaged, or another program wrote it.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not a PyTorch checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this `rpg-fast train`: it lacks the mark {FORMAT!r}")
    for key, kind in REQUIRED.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} is incomplete: no {key}")
    return content


def reason(error: Exception) -> str:
    """What was wrong, in one line, of an error of `load_state_dict`."""
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]


class RunFolder:
    """The files of one run: config.json, metrics.csv, dense.pt, checkpoint.pt, report.png, tensorboard/."""

    def __init__(self, path: Path):
        self.path = path
        self._failing: set[str] = set()  # files that could not be written the last time

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

    def write_config(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Writes config.json. Raises UserError if it cannot, and then leaves the folder as empty as it was."""
        try:
            write_file(self.path / "config.json", json.dumps({"config": config, **facts}, indent=2).encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path / 'config.json'}: {error.strerror}") from error

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

    def write_metrics(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """The whole table anew, replaced in one go, so that a reader never sees half a line."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        self.attempt("metrics.csv", lambda: write_file(self.path / "metrics.csv", text.getvalue().encode()))

    def save(self, file: str, content: dict[str, Any]) -> bool:
        """`save_checkpoint` where the disk allows it; returns whether it did."""
        return self.attempt(file, lambda: save_checkpoint(self.path / file, content))

    def attempt(self, file: str, write: Callable[[], object]) -> bool:
        """Does `write`; a disk that refuses is told once, until it accepts again. Returns whether it did."""
        try:
            write()
        except OSError as error:
            if file not in self._failing:
                older = "the older one stays" if (self.path / file).exists() else "there is no older one"
                reason = error.strerror or error
                print(
                    f"warning: cannot write {self.path / file}: {reason}; {older}, the training goes on",
                    file=sys.stderr,
                    flush=True,
                )
            self._failing.add(file)
            return False
        self._failing.discard(file)
        return True

    def remove_remains(self) -> None:
        """Deletes files that a process was writing when it was killed."""
        for name in ("config.json", "metrics.csv", "dense.pt", "checkpoint.pt", "report.png"):
            for remains in self.path.glob(f".{name}.*"):
                remains.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- randomness


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and torch, that of `device` among them, as plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (what models use)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Sets what `random_states` returned."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def to_device(value: Any, device: torch.device) -> Any:
    """The same nest of dictionaries, lists and tuples with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
