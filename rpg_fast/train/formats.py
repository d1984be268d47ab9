"""Networks from files: our checkpoints and exports, checkpoints of the published RPG code, and the state_dicts of
torchvision, timm and others."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import rpg_fast
from rpg_fast.mask_formats import from_backward_masks
from rpg_fast.masks import MaskLayout

from .checkpoint import FORMAT as CHECKPOINT
from .config import UserError
from .models import ARCHITECTURES, build_model, is_library
from .packed import from_csr, unpack
from .pickles import first_line, load_pickle

PACKED, CSR = "rpg_fast.packed/1", "rpg_fast.csr/1"
KNOWN = (CHECKPOINT, PACKED, CSR)
WEIGHTS_KEYS = ("state_dict", "model", "model_state_dict")
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROBE_CLASSES = 1021  # no other layer has as many outputs, so this finds the classifier
PROBE_CHANNELS = 1019  # and this the first layer
SHOWN = 3  # differences that an error lists

Weights = Literal["average", "last"]


@dataclass(frozen=True)
class SavedNetwork:
    """A network as it was read from a file.

    Attributes:
        path, kind: the file, and what it is, in words.
        model: in float32 on the CPU, with the weights of the file.
        arguments: of `build_model`.
        state_dict: the tensors of the file under the model's names, in the file's dtypes.
        masks: {name: bool} of all prunable weights: the file's masks, or else where weights are not zero.
        config: the options of its training; empty where the file does not tell.
        averaged: whether the weights are the moving average of those in training; None where the file has one set.
    """

    path: Path
    kind: str
    model: nn.Module
    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]
    masks: dict[str, Tensor]
    config: dict[str, Any]
    averaged: bool | None = None


@dataclass(frozen=True)
class _Content:
    """What a reader found. `backward_masks` are the published code's: a list in the order of the weights; `last` are
    the weights in training, where `state_dict` is their average."""

    kind: str
    state_dict: Mapping[str, Tensor]
    arguments: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    backward_masks: Any = None
    last: Mapping[str, Tensor] | None = None


def read_network(
    path: Path, *, arch: str | None = None, trust_pickle: bool = False, weights: Weights | None = None
) -> SavedNetwork:
    """Reads a network from any file that this program or its neighbours write, told apart by content: a checkpoint or
    an export of rpg-fast, a checkpoint of the published RPG code, a state_dict (bare, or under "state_dict" or "model")
    of torch.save or safetensors. Prefixes of wrappers ("module.") are taken off the names.

    Args:
        arch: the architecture where the file does not tell; by default the one of `models` that fits the shapes.
        trust_pickle: see `pickles.load_pickle`.
        weights: of a training with averaged weights: "average", those that it tested and reported (default), or "last",
            those that it trained.

    Raises:
        UserError: no such file, a truncated or foreign one, names or shapes that fit no architecture, masks that do not
            fit the weights. It names the file and the thing. ModuleNotFoundError: safetensors is needed.
    """
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        if not path.is_file():
            raise UserError(f"there is no checkpoint at {path}")
        content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path, trust_pickle)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RuntimeError) as error:  # the latter: sizes beyond the memory
        raise UserError(f"{path}: {first_line(error)}") from error
    try:
        chosen, averaged = _chosen(content, weights)
        state_dict = _plain_names(chosen)
        model, arguments = _restore(state_dict, content.arguments, arch)
        masks = _masks(content, model, state_dict)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    return SavedNetwork(path, content.kind, model, arguments, state_dict, masks, content.config, averaged)


def _chosen(content: _Content, weights: Weights | None) -> tuple[Mapping[str, Tensor], bool | None]:
    """One of the sets of weights in a file, and whether it is an average, if there are two."""
    if content.last is None:
        if weights == "average":
            raise ValueError("has no averaged weights, only the last: it was trained without --ema-decay")
        return content.state_dict, None
    return (content.last, False) if weights == "last" else (content.state_dict, True)


# ----------------------------------------------------------------------------------------------------------- containers


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < 2**32


def _read_safetensors(path: Path) -> _Content:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"truncated or no safetensors file: {error}") from error
    try:
        told = {key: json.loads(metadata[key]) for key in ("model", "config", "shapes") if key in metadata}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata are damaged: {error}") from error
    _check_mark(metadata.get("format"))
    if metadata.get("format") == PACKED:
        state_dict, masks = unpack(tensors, _shapes(told))
        return _Content("packed export", state_dict, _entry(told, "model", dict), _entry(told, "config", dict), masks)
    arguments, config = (_entry(told, key, dict) if key in told else None for key in ("model", "config"))
    return _Content("safetensors state_dict", tensors, arguments, config or {})


def _read_torch(path: Path, trust_pickle: bool) -> _Content:
    content = load_pickle(path, trust=trust_pickle)
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, wanted a checkpoint or a state_dict")
    mark = content.get("format")
    _check_mark(mark)
    if mark == CHECKPOINT:
        return _read_checkpoint(content)
    if mark == CSR:
        state_dict, masks = from_csr(_weights(content), _shapes(content))
        return _Content(
            "CSR export", state_dict, _entry(content, "model", dict), _entry(content, "config", dict), masks
        )
    pruner = content.get("pruner")
    if isinstance(pruner, Mapping) and "backward_masks" in pruner:
        masks = pruner["backward_masks"]
        return _Content("checkpoint of the published RPG code", _weights(content), backward_masks=masks)
    return _Content("state_dict", _weights(content))


def _read_checkpoint(content: Mapping[str, Any]) -> _Content:
    """One of `rpg-fast train`, of a sparse or of a dense network."""
    holder = _entry(content, "trainer", dict) if "trainer" in content else content
    masks = {}
    if holder.get("pruner") is not None:
        masks = _from_packed_state(_entry(_entry(holder, "pruner", dict), "masks", dict))
    config, arguments = _entry(content, "config", dict), _entry(content, "model", dict)
    last = None if holder.get("model") is None or holder is content else _tensors(_entry(holder, "model", dict))
    return _Content("checkpoint of rpg-fast train", _weights(content), arguments, config, masks, last=last)


def _entry(content: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(content.get(key), kind):
        raise ValueError(f"is incomplete: no {key}")
    return content[key]


def _check_mark(mark: Any) -> None:
    if isinstance(mark, str) and mark.startswith("rpg_fast.") and mark not in KNOWN:
        raise ValueError(f"is in the format {mark}, which another version wrote; this one reads {', '.join(KNOWN)}")


def _shapes(content: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes of the sparse weights, which have to be those of the model: so much is about to be allocated."""
    shapes = _entry(content, "shapes", dict)
    for name, shape in shapes.items():
        _check_shape(name, shape)
    try:
        model = _skeleton(_entry(content, "model", dict))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"its model cannot be built: {first_line(error)}") from error
    for name, shape in shapes.items():
        if name in model and tuple(shape) != tuple(model[name].shape):
            raise ValueError(f"{name} has the shape {tuple(shape)}, its model's is {tuple(model[name].shape)}")
    return shapes


def _check_shape(name: str, shape: Any) -> None:
    if not isinstance(shape, (list, tuple)) or not shape or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"{name} has the shape {shape!r}, wanted a list of sizes")


def _weights(content: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state_dict in `content`, or `content` itself."""
    for key in WEIGHTS_KEYS:
        if key in content and isinstance(content[key], Mapping):
            return _tensors(content[key])
        if key in content and not isinstance(content[key], Tensor):
            raise ValueError(f"is incomplete: no {key}, but a {type(content[key]).__name__}")
    return _tensors(content)


def _tensors(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if not state_dict:
        raise ValueError("holds no weights")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"holds no state_dict: its entry {name!r} is a {type(value).__name__}, wanted a tensor")
    return state_dict


def _plain_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = dict(state_dict)
    while prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in plain)), None):
        plain = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    return plain


# ---------------------------------------------------------------------------------------------------------------- model


def _restore(
    state_dict: Mapping[str, Tensor], arguments: dict[str, Any] | None, arch: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    if arguments is None:
        arguments = recognise(state_dict, ARCHITECTURES if arch is None else (arch,))
    elif arch not in (None, arguments.get("arch")):
        raise ValueError(f"is a {arguments.get('arch')}, not a {arch}")
    try:
        skeleton = _skeleton(arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"its model cannot be built: {first_line(error)}") from error
    differences = _differences(skeleton, state_dict)
    if differences:
        raise ValueError(f"the weights do not fit its model, {arguments['arch']}: {_listed(differences)}")
    model = build_model(**arguments)
    wanted = model.state_dict()
    for name, tensor in state_dict.items():
        if tensor.is_meta:
            raise ValueError(f"{name} has no values")
        if wanted[name].is_floating_point() and tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, wanted one of {', '.join(map(str, WEIGHT_DTYPES))}")
    model.load_state_dict(state_dict, strict=True)
    return model.eval(), arguments


def recognise(state_dict: Mapping[str, Tensor], architectures: Iterable[str] = ARCHITECTURES) -> dict[str, Any]:
    """The arguments of `build_model` for the architecture whose names and shapes are those of `state_dict`; width,
    stem, classes and channels are read off the shapes.

    Raises:
        ValueError: none fits; it says in what the closest one differs.
    """
    attempts = []
    for arch in architectures:
        arguments = _arguments(arch, state_dict)
        differences = _differences(_skeleton(arguments), state_dict)
        if not differences:
            return arguments
        attempts.append((differences, arch))
    differences, closest = min(attempts, key=lambda attempt: len(attempt[0]))
    if len(attempts) == 1:
        raise ValueError(f"the weights do not fit {closest}: {_listed(differences)}")
    known = ", ".join(arch for _, arch in attempts)
    raise ValueError(
        f"the weights fit none of {known} (for another one, --arch torchvision:NAME or timm:NAME); "
        f"closest is {closest}: {_listed(differences)}"
    )


def _arguments(arch: str, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a network of `arch` with these weights is built with, as far as its first and last layer tell."""
    first, last = _ends(arch)
    arguments: dict[str, Any] = {"arch": arch, "num_classes": 1, "in_channels": 3}
    head, stem = (state_dict.get(name) for name in (last, first))
    if head is not None and head.dim() > 0:
        arguments["num_classes"] = max(1, len(head))
    if stem is not None and stem.dim() == 4:
        arguments["in_channels"] = max(1, stem.shape[1])
        if arch in ARCHITECTURES:
            arguments["width"] = max(1, len(stem))
            arguments["stem"] = "imagenet" if stem.shape[-1] == 7 else "small"
    return arguments


def _ends(arch: str) -> tuple[str, str]:
    """The names of the weights that take the channels in and give the classes out; empty where there is none."""
    if arch in ARCHITECTURES:
        return "conv1.weight", "fc.weight"
    channels = 3 if arch.startswith("torchvision:") else PROBE_CHANNELS  # the former takes no other number
    probe = _skeleton({"arch": arch, "num_classes": PROBE_CLASSES, "in_channels": channels})
    first = (name for name, tensor in probe.items() if tensor.shape[1:2] == (PROBE_CHANNELS,))
    last = (name for name, tensor in probe.items() if tensor.shape[:1] == (PROBE_CLASSES,))
    return next(first, ""), next(last, "")


def _skeleton(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of a network, without memory for its weights where its code allows that."""
    try:
        with torch.device("meta"):
            return build_model(**arguments).state_dict()
    except ValueError:
        if not is_library(str(arguments.get("arch"))):
            raise
        return build_model(**arguments).state_dict()  # code that looks at values


def _differences(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """In words, weights that are missing first. torch itself fills in counters of batches that old files lack."""
    missing = [name for name in wanted if name not in got and not name.endswith("num_batches_tracked")]
    differences = [f"{name} is missing" for name in missing]
    for name, tensor in got.items():
        if name not in wanted:
            differences.append(f"{name} is unknown")
        elif tensor.shape != wanted[name].shape:
            differences.append(f"{name} has shape {tuple(tensor.shape)}, wanted {tuple(wanted[name].shape)}")
        elif tensor.layout != torch.strided:
            differences.append(f"{name} is {tensor.layout}, wanted a dense tensor")
    return differences


def _listed(differences: list[str]) -> str:
    more = len(differences) - SHOWN
    return "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


# ---------------------------------------------------------------------------------------------------------------- masks


def _from_packed_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """{name: bool} of what `PackedMasks.state_dict` returned."""
    for key, kind in (("bits", Tensor), ("names", list), ("shapes", list), ("orders", list)):
        if not isinstance(state.get(key), kind):
            raise ValueError(f"its masks are incomplete: no {key}")
    if not len(state["names"]) == len(state["shapes"]) == len(state["orders"]):
        raise ValueError(f"its masks have {len(state['names'])} names for {len(state['shapes'])} shapes")
    for name, shape, order in zip(state["names"], state["shapes"], state["orders"], strict=True):
        _check_shape(name, shape)
        if not isinstance(order, (list, tuple)) or sorted(order) != list(range(len(shape))):
            raise ValueError(f"{name} has the memory order {order!r} for the shape {tuple(shape)}")
    layout = MaskLayout(tuple(map(tuple, state["shapes"])), tuple(map(tuple, state["orders"])))
    if state["bits"].numel() != layout.nbytes:
        raise ValueError(f"its masks hold {state['bits'].numel()} bytes, wanted {layout.nbytes}")
    return dict(zip(state["names"], layout.unpack(state["bits"]), strict=True))


def _masks(content: _Content, model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One mask for each prunable weight, checked against the weights."""
    weights = rpg_fast.prunable_weights(model)
    told = content.masks
    if content.backward_masks is not None:
        told = from_backward_masks(content.backward_masks, weights).unpack()
    unknown = [name for name in told if name not in weights]
    if unknown:
        raise ValueError(f"has a mask for {unknown[0]}, which is no convolution or linear layer of its model")
    masks = {}
    for name in weights:
        weight = state_dict[name]
        masks[name] = told.get(name, weight != 0)
        if masks[name].shape != weight.shape:
            shapes = f"{tuple(masks[name].shape)}, wanted {tuple(weight.shape)}"
            raise ValueError(f"the mask of {name} has shape {shapes}")
        outside = int(((weight != 0) & ~masks[name]).sum())
        if outside:
            raise ValueError(f"{outside} weights of {name} are not zero, although its mask prunes them")
    return masks
