"""`rpg-fast export`: a network from any file that `formats` reads, as a file for others or a small one."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import write_file
from .config import UserError
from .data import DATASETS
from .formats import CSR, PACKED, SavedNetwork, read_network
from .packed import pack, to_csr

TOLD = (
    *("arch", "width", "stem", "zero_init_residual", "image_size", "classes", "train_images", "test_images"),
    *("epochs", "batch_size", "optimizer", "lr", "momentum", "nesterov", "weight_decay", "warmup_epochs"),
    *("label_smoothing", "clip_grad_norm", "mixup", "ema_decay", "sparsity", "keep_dense", "distribution"),
    *("criterion", "schedule", "update_every", "prune_until", "update_until", "drop_fraction", "rank_weight"),
    *("rank_every", "tail_energy", "min_sparsity", "semantics", "grow_steps", "autocast", "channels_last", "seed"),
    "recipe",
)
"""Options of the training that exported files tell: none that names a place or a machine."""

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
        write_file(output, content)
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
            "config": _told(network.config),
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
    return {"model": json.dumps(network.arguments), "config": json.dumps(_told(network.config))}


def _told(config: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate` and a reader need of the configuration; the data only where they are built in."""
    told = {name: config[name] for name in TOLD if name in config}
    return {**told, "data": config["data"]} if config.get("data") in DATASETS else told


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
        help="architecture of a file that does not tell, torchvision:NAME and timm:NAME too (default: the one of ours "
        "whose names and shapes fit)",
    )
    parser.add_argument(
        "--weights",
        choices=("average", "last"),
        default=None,
        help="of a training with --ema-decay: the average, which it tested and reported (default), or the last weights",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        default=False,
        help="also unpickle objects of classes that torch.load refuses, which runs code of the file: only for files "
        "from a source that you trust",
    )


def read_source(arguments: argparse.Namespace) -> SavedNetwork:
    """The network that the options of `add_source` name."""
    return read_network(
        arguments.checkpoint,
        arch=arguments.arch,
        trust_pickle=arguments.trust_pickle,
        weights=arguments.weights,
    )


def which_weights(network: SavedNetwork) -> str:
    """Which weights were taken of a file that has two sets, to be put after its kind."""
    if network.averaged is None:
        return ""
    return ", averaged weights" if network.averaged else ", last weights, not their average"


def _run(arguments: argparse.Namespace) -> int:
    network = read_source(arguments)
    export(network, arguments.output, arguments.format, force=arguments.force)
    size = sum(mask.numel() for mask in network.masks.values())
    kept = sum(int(mask.sum()) for mask in network.masks.values())
    dense = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict.values())
    written = arguments.output.stat().st_size
    what = f"{arguments.format}, {network.arguments['arch']}{which_weights(network)}"
    size_told = f"{written:,} bytes (the tensors uncompressed: {dense:,})"
    print(f"{arguments.output}: {what}, {1 - kept / size:.4%} sparse, {size_told}")
    return 0
