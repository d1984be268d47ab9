"""`rpg-fast export`: a network from any file that `formats` reads, as a file for others or a small one."""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import UserError
from .formats import CSR, PACKED, SavedNetwork, read_network
from .packed import pack, to_csr

FORMATS = {
    "dense": "a state_dict for torch.load(weights_only=True), nothing else in it",
    "safetensors": "the same as safetensors, with architecture and configuration as metadata",
    "packed": "safetensors with the kept values and a bit mask of each weight: small",
    "csr": "torch.save with each weight [out, ...] as a torch.sparse_csr matrix [out, rest]",
}


def export(network: SavedNetwork, output: Path, format: str, *, force: bool = False) -> None:
    """Writes `network` to `output`, whole or not at all. `read_network` gives it back bit by bit: "packed" and "csr"
    with the masks, "dense" and "safetensors" with masks of the weights that are not zero.

    Args:
        format: one of `FORMATS`.
        force: replace a file that is there.

    Raises:
        UserError: the file exists, cannot be written, or the format is unknown.
        ModuleNotFoundError: safetensors is needed.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is unknown; known are {', '.join(FORMATS)}")
    if output.exists() and not force:
        raise UserError(f"{output} exists already: --force replaces it")
    content = {"dense": _dense, "safetensors": _safetensors, "packed": _packed, "csr": _csr}[format](network)
    try:
        handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, output)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _dense(network: SavedNetwork) -> bytes | memoryview:
    return _torch_bytes({name: _owned(tensor) for name, tensor in network.state_dict.items()})


def _safetensors(network: SavedNetwork) -> bytes | memoryview:
    content = {name: _owned(tensor) for name, tensor in network.state_dict.items()}
    return _safetensors_bytes(content, {"format": "pt", **_facts(network)})


def _packed(network: SavedNetwork) -> bytes | memoryview:
    shapes = json.dumps({name: list(mask.shape) for name, mask in network.masks.items()})
    metadata = {"format": PACKED, **_facts(network), "shapes": shapes}
    return _safetensors_bytes(pack(network.state_dict, network.masks), metadata)


def _csr(network: SavedNetwork) -> bytes | memoryview:
    return _torch_bytes(
        {
            "format": CSR,
            "state_dict": to_csr(network.state_dict, network.masks),
            "shapes": {name: list(mask.shape) for name, mask in network.masks.items()},
            "model": network.arguments,
            "config": network.config,
        }
    )


def _torch_bytes(content: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def _safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save(tensors, metadata)


def _facts(network: SavedNetwork) -> dict[str, str]:
    return {"model": json.dumps(network.arguments), "config": json.dumps(network.config)}


def _owned(tensor: Tensor) -> Tensor:
    """A contiguous copy: a view would save the whole storage behind it."""
    return tensor.clone(memory_format=torch.contiguous_format)


# -------------------------------------------------------------------------------------------------------------- command


def add_export(commands: Any) -> None:
    """Adds `export` to the subparsers of `rpg-fast`."""
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser = commands.add_parser(
        "export",
        help="write a checkpoint's network to a file for others, or to a small one",
        description="Reads the network of a checkpoint or an export, of rpg-fast or of others (see `rpg-fast evaluate "
        "--help`), and writes it to another file with every value as it was.",
        allow_abbrev=False,
    )
    parser.set_defaults(command=_run, name="export")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help=formats)
    parser.add_argument("--output", required=True, type=Path, metavar="PATH", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    add_source(parser)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The options of `read_network`."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, an export, a state_dict, or the folder of a run")
    parser.add_argument(
        "--arch",
        metavar="NAME",
        default=None,
        help="architecture of a file that does not tell (default: the one whose names and shapes fit)",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        default=False,
        help="also unpickle objects of classes that torch.load refuses, which runs code of the file: only for files "
        "from a source that you trust",
    )


def _run(arguments: argparse.Namespace) -> int:
    network = read_network(arguments.checkpoint, arch=arguments.arch, trust_pickle=arguments.trust_pickle)
    export(network, arguments.output, arguments.format, force=arguments.force)
    size = sum(mask.numel() for mask in network.masks.values())
    kept = sum(int(mask.sum()) for mask in network.masks.values())
    dense = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict.values())
    written = arguments.output.stat().st_size
    print(
        f"{arguments.output}: {arguments.format}, {network.arguments['arch']}, {1 - kept / size:.4%} sparse, "
        f"{written:,} bytes (the tensors uncompressed: {dense:,})"
    )
    return 0
