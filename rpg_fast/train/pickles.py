"""Files of `torch.save`, read without executing code from them, and what was refused named."""

from __future__ import annotations

import collections
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .config import UserError

ZIP_MAGIC = b"PK\x03\x04"
SHOWN = 4  # of the refused classes, and of the entries that hold them
PYTHON_2_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as pickles of protocol 2 have them


def load_pickle(path: Path, *, trust: bool = False) -> Any:
    """What `torch.save` wrote to `path`, on the CPU; files of torch before 1.6 too.

    Args:
        trust: unpickle objects of any kind, which runs whatever code the file names. Only where `torch.load` with
            ``weights_only=True`` has refused them.

    Raises:
        UserError: the file is truncated, no checkpoint, or holds objects that were not trusted; it names them and where
            they lie.
    """
    with open(path, "rb") as file:
        zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    if zipped and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is truncated or not a PyTorch checkpoint")
    try:
        return _load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _refused(path, str(error)) if zipped else _global_in(str(error))
        if not refused:
            raise UserError(f"{path} is truncated or not a PyTorch checkpoint") from error
    except Exception as error:  # torch.load raises whatever its parser stumbles upon
        raise UserError(f"{path} is truncated or not a PyTorch checkpoint") from error
    if not trust:
        raise UserError(
            f"{path} cannot be read as a checkpoint: it holds objects that only run as code, {refused}; "
            "if you trust where it comes from, `rpg-fast evaluate` and `export` load them with --trust-pickle"
        )
    try:
        return _load(path, weights_only=False)
    except Exception as error:  # unpickling runs code of the file, which may raise anything
        raise UserError(f"{path} cannot be unpickled: {type(error).__name__}: {first_line(error)}") from error


def _load(path: Path, *, weights_only: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how the file was made
        return torch.load(path, map_location="cpu", weights_only=weights_only)


def _refused(path: Path, message: str) -> str:
    """The refused classes, each with the top-level keys that hold it: "args (argparse.Namespace)"."""
    try:
        unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(member) as file:
                content = _Outline(file).load()
    except Exception:  # a hostile file may be anything; the message of torch.load is left
        return _global_in(message)
    keys: dict[Any, list[str]] = {}
    if isinstance(content, dict):
        keys = {key: sorted(unsafe & set(_globals_below(value))) for key, value in content.items()}
    return _listed([f"{key} ({_listed(names)})" for key, names in keys.items() if names] or sorted(unsafe))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _global_in(message: str) -> str:
    found = re.search(r"GLOBAL (\S+)", message)
    return found.group(1) if found else ""


def first_line(error: Exception) -> str:
    """The first line of the text of `error`."""
    return (str(error).strip().splitlines() or [""])[0]


class _Placeholder:
    """Stands for an object of a class that is not imported; keeps what it was made from."""

    qualified_name = ""
    parts: list[Any]

    def __new__(cls, *parts: Any) -> _Placeholder:  # pickles of objects do not call __init__
        made = super().__new__(cls)
        made.parts = list(parts)
        return made

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def append(self, item: Any) -> None:
        self.parts.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts += [key, value]


class _Outline(pickle.Unpickler):
    """The structure of a pickle: dictionaries and lists as they are, everything else as placeholders."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        module = PYTHON_2_NAMES.get(module, module)
        return type(name, (_Placeholder,), {"qualified_name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> None:
        return None


def _globals_below(value: Any) -> Iterator[str]:
    """The qualified names of all placeholders in `value`, classes and instances."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif isinstance(item, _Placeholder):
            waiting += item.parts
            yield item.qualified_name
        elif isinstance(item, type) and issubclass(item, _Placeholder):
            yield item.qualified_name
