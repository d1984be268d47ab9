"""One file per run that holds the weights, how they were made, and what is needed to go on."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig, UserError
from .data import Dataset

SMALL_IMAGE = 64  # pixels; up to here the 7x7 stem and the max-pooling would throw too much away
FORMAT = "rpg_fast.train/1"
REQUIRED = {"state_dict": dict, "config": dict, "model": dict, "metrics": list, "trainer": dict}


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` and the format's name to `path`, whole or not at all; an older file stays until then."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
        raise UserError(f"{path} was not written by `rpg-fast train`: it lacks the mark {FORMAT!r}")
    for key, kind in REQUIRED.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} is incomplete: no {key}")
    return content


def model_arguments(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """The arguments of `build_model` for this data; stored in the checkpoint so that the model needs no data set."""
    return {
        "arch": config.arch,
        "num_classes": dataset.num_classes,
        "in_channels": dataset.in_channels,
        "stem": config.stem or ("small" if dataset.image_size <= SMALL_IMAGE else None),
        "width": config.width,
        "zero_init_residual": config.zero_init_residual,
    }
