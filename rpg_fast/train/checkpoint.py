"""The files of a run, each whole or absent whatever ends the process, and the checkpoint that a run goes on from."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rpg_fast._output import tell

from .config import UserError

FORMAT = "rpg_fast.train/1"
BAD_IMAGES = "bad_images.csv"
REQUIRED = {"state_dict": dict, "config": dict, "model": dict, "metrics": list, "trainer": dict}


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes `path` whole or not at all: an older file stays until the new one is on the disk, also if the power fails.

    Raises:
        OSError: it could not be written; nothing but the older file is left. The text tells the bytes wanted and free.
    """
    try:
        _replace(path, content)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        text = f"{error.strerror} ({len(content):,} bytes wanted, {free:,} free)"
        raise OSError(error.errno, text) from error


def _replace(path: Path, content: bytes | memoryview) -> None:
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
    """The files of one run: config.json, metrics.csv, dense.pt, checkpoint.pt, report.png, bad_images.csv,
    tensorboard/."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: dict[str, Callable[[], object]] = {}  # what could not be written the last time

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
                if out and path.is_dir() and all(file.match(".config.json.*") for file in path.iterdir()):
                    folder = cls(path)  # empty, or of a run that was killed before it began
                    folder.remove_remains()
                    return folder
            except OSError as error:
                raise UserError(f"cannot make the run's folder {path}: {error.strerror}") from error
        raise UserError(f"{candidates[0]} exists already; runs are never overwritten: choose another --out")

    def write_config(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Writes config.json. Raises UserError if it cannot, and then leaves the folder as empty as it was."""
        try:
            write_file(self.path / "config.json", json.dumps({"config": config, **facts}, indent=2).encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path / 'config.json'}: {error.strerror}") from error

    def read_config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The configuration and the facts that `write_config` wrote.

        Raises:
            UserError: there are none.
        """
        path = self.path / "config.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            config, data = facts.pop("config"), facts["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} holds no run that can be resumed: {path} is missing or damaged") from error
        if not isinstance(config, dict) or not isinstance(data, dict):
            raise UserError(f"{self.path} holds no run that can be resumed: {path} is damaged")
        return config, facts

    def write_metrics(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """The whole table anew, replaced in one go, so that a reader never sees half a line."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        self.attempt("metrics.csv", lambda: write_file(self.path / "metrics.csv", text.getvalue().encode()))

    def add_bad_images(self, found: Mapping[str, str]) -> dict[str, str]:
        """Adds images that could not be read, {file: reason}, to bad_images.csv, and returns all of them."""
        known = self.read_bad_images()
        bad = {**known, **found}
        if bad != known:
            text = io.StringIO(newline="")
            csv.writer(text).writerows([("file", "reason"), *sorted(bad.items())])
            content = text.getvalue().encode("utf-8", "surrogateescape")  # names of files are bytes
            self.attempt(BAD_IMAGES, lambda: write_file(self.path / BAD_IMAGES, content))
        return bad

    def read_bad_images(self) -> dict[str, str]:
        """What `add_bad_images` has written so far."""
        try:
            with open(self.path / BAD_IMAGES, newline="", encoding="utf-8", errors="surrogateescape") as file:
                return {row["file"]: row["reason"] for row in csv.DictReader(file)}
        except FileNotFoundError:
            return {}
        except (OSError, KeyError, csv.Error) as error:
            raise UserError(f"{self.path / BAD_IMAGES} is damaged: {error}") from error

    def save(self, file: str, content: dict[str, Any]) -> bool:
        """`save_checkpoint` where the disk allows it; returns whether it did."""
        return self.attempt(file, lambda: save_checkpoint(self.path / file, content))

    def attempt(self, file: str, write: Callable[[], object]) -> bool:
        """Does `write`; a disk that refuses is told once, until it accepts again. Returns whether it did."""
        try:
            write()
        except OSError as error:
            if file not in self._waiting:
                older = "the older one stays" if (self.path / file).exists() else "there is no older one"
                text = f"cannot write {self.path / file}: {error.strerror or error}; {older}, the training goes on"
                tell(f"warning: {text} and tries again", sys.stderr)
            self._waiting[file] = write
            return False
        if self._waiting.pop(file, None):
            tell(f"{self.path / file} could be written again", sys.stderr)
        return True

    def retry(self) -> tuple[str, ...]:
        """Attempts what could not be written once more. Returns the files that still cannot be."""
        for file, write in tuple(self._waiting.items()):
            self.attempt(file, write)
        return tuple(self._waiting)

    @contextmanager
    def held(self, patience: float = 15.0) -> Iterator[None]:
        """Keeps other programs from training into the folder meanwhile. The system lets go of the lock with the
        process, and with the workers of a killed run a few seconds later: `patience` in seconds.

        Raises:
            UserError: another program trains into it.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:  # Windows opens no folders
            yield
            return
        try:
            until = time.monotonic() + patience
            while not _lock(descriptor):
                if time.monotonic() >= until:
                    raise UserError(f"{self.path} is in use: another program trains into it")
                time.sleep(0.1)
            yield
        finally:
            os.close(descriptor)

    def remove_remains(self) -> None:
        """Deletes files that a process was writing when it was killed.

        Raises:
            UserError: it may not.
        """
        try:
            for name in ("config.json", "metrics.csv", "dense.pt", "checkpoint.pt", "report.png", BAD_IMAGES):
                for remains in self.path.glob(f".{name}.*"):
                    remains.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into {self.path}: {error.strerror}") from error


def _lock(descriptor: int) -> bool:
    """Whether nobody else holds this file; where a file system has no locks, nobody does."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


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
