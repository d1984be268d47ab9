"""Networks in files: what is read, what `rpg-fast export` writes, what `rpg-fast evaluate` tells, what is refused."""

from __future__ import annotations

import argparse
import builtins
import copy
import json
import pickle
import resource
import signal
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpg_fast
from rpg_fast.mask_formats import to_backward_masks
from rpg_fast.train.checkpoint import load_checkpoint
from rpg_fast.train.cli import explain_memory, main
from rpg_fast.train.config import TrainConfig, UserError
from rpg_fast.train.export import FORMATS, export
from rpg_fast.train.formats import SavedNetwork, read_network, recognise
from rpg_fast.train.models import build_model
from rpg_fast.train.packed import from_csr, pack, to_csr, unpack
from rpg_fast.train.sparse_cost import network_cost

safetensors = pytest.importorskip("safetensors.torch")

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def sparse_model(sparsity: float = 0.9, **options: Any) -> tuple[nn.Module, rpg_fast.PackedMasks]:
    """A small network with trained-looking norms and random masks, one kept weight of each layer being zero."""
    model = build_model(**{"arch": "resnet20", "num_classes": 7, "width": 8, **options}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    masks = rpg_fast.PackedMasks(rpg_fast.prunable_weights(model))
    bools = {name: torch.rand(w.shape) >= sparsity for name, w in masks.weights.items()}
    for name, weight in masks.weights.items():
        bools[name].view(-1)[3] = True
        with torch.no_grad():
            weight.mul_(bools[name]).view(-1)[3] = 0
    return model, masks.load_(bools)


def logits(model: nn.Module) -> Tensor:
    return model.eval()(IMAGES)


def checkpoint_of(model: nn.Module, masks: rpg_fast.PackedMasks | None, **options: Any) -> dict[str, Any]:
    """As `rpg-fast train` writes them."""
    return {
        "format": "rpg_fast.train/1",
        "state_dict": model.state_dict(),
        "model": {"arch": "resnet20", "num_classes": 7, "in_channels": 3, "stem": "small", "width": 8, **options},
        "config": {"arch": "resnet20", "data": "synthetic", "classes": 7, "image_size": 16, "test_images": 32},
        "metrics": [],
        "trainer": {"pruner": None if masks is None else {"masks": masks.state_dict()}},
    }


def published(model: nn.Module, masks: rpg_fast.PackedMasks, **more: Any) -> dict[str, Any]:
    """The keys of a checkpoint of the published RPG code, which trains with DistributedDataParallel."""
    weights = masks.weights.values()
    pruner = {
        "dense_allocation": 0.1,
        "S": [0.9] * len(weights),
        "N": [w.numel() for w in weights],
        "hyperparams": {"delta_T": 100, "alpha": 0.3, "T_end": 112_715, "ignore_linear_layers": True},
        "step": 125_100,
        "rigl_steps": 1127,
        "backward_masks": to_backward_masks(masks),
        "_linear_layers_mask": [0] * (len(weights) - 1) + [1],
    }
    state_dict = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return {
        "epoch": 100,
        "arch": ("resnet20", "fanin", "classic"),
        "state_dict": state_dict,
        "best_prec1": 69.57,
        "optimizer": {"state": {}, "param_groups": []},
        "pruner": pruner,
        **more,
    }


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.fixture
def network(tmp_path: Path) -> SavedNetwork:
    return read_network(saved(tmp_path / "checkpoint.pt", checkpoint_of(*sparse_model())))


def refused(path: Path, **options: Any) -> str:
    """The text of the error, which names the file."""
    with pytest.raises(UserError) as error:
        read_network(path, **options)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- reading


def test_our_checkpoint(network: SavedNetwork) -> None:
    assert network.kind == "checkpoint of rpg-fast train"
    assert network.config["image_size"] == 16
    weights = rpg_fast.prunable_weights(network.model)
    assert list(network.masks) == list(weights)
    assert all(mask.view(-1)[3] and weights[name].view(-1)[3] == 0 for name, mask in network.masks.items())


def test_a_dense_checkpoint_and_its_folder(tmp_path: Path) -> None:
    model, _ = sparse_model(sparsity=0)
    saved(tmp_path / "checkpoint.pt", checkpoint_of(model, None))
    network = read_network(tmp_path)
    assert torch.equal(logits(network.model), logits(model))
    assert sum(int((~mask).sum()) for mask in network.masks.values()) == len(network.masks)  # one zero in each


def test_published_checkpoint(tmp_path: Path) -> None:
    model, masks = sparse_model()
    network = read_network(saved(tmp_path / "model_best.pth.tar", published(model, masks)))
    assert network.kind == "checkpoint of the published RPG code"
    assert network.arguments["arch"] == "resnet20"
    assert network.arguments["num_classes"] == 7
    assert torch.equal(logits(network.model), logits(model))
    assert all(torch.equal(network.masks[name], mask) for name, mask in masks.unpack().items())


def test_published_checkpoint_with_dense_layers(tmp_path: Path) -> None:
    model, masks = sparse_model()
    content = published(model, masks)
    content["pruner"]["backward_masks"][0] = None
    network = read_network(saved(tmp_path / "checkpoint.pth.tar", content))
    assert network.masks["conv1.weight"].all()
    content["pruner"]["backward_masks"].pop()
    assert "got 21 masks for 22 weights" in refused(saved(tmp_path / "short.pth.tar", content))


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_are_unpickled_only_when_told(zipped: bool, tmp_path: Path) -> None:
    model, masks = sparse_model()
    content = published(model, masks, args=argparse.Namespace(lr=0.4), note=[pytest.Item.__name__, {1: complex(0, 1)}])
    path = saved(tmp_path / "checkpoint.pth.tar", content, _use_new_zipfile_serialization=zipped)
    text = refused(path)
    assert ("args (argparse.Namespace)" if zipped else "argparse.Namespace") in text
    assert "--trust-pickle" in text
    assert torch.equal(logits(read_network(path, trust_pickle=True).model), logits(model))


def test_nothing_of_a_refused_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("executed",)

    path = saved(tmp_path / "evil.pt", {"state_dict": {"a": torch.ones(1)}, "nested": [{"deep": Evil()}]})
    calls: list[Any] = []
    monkeypatch.setattr(builtins, "print", lambda *words: calls.append(words))
    assert "nested (builtins.print)" in refused(path)
    assert calls == []


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "arch": "resnet20", "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {}},
    "compiled and distributed": lambda state: {f"module._orig_mod.{name}": t for name, t in state.items()},
    "before num_batches_tracked": lambda state: {n: t for n, t in state.items() if "num_batches" not in n},
}


@pytest.mark.parametrize(
    ("wrapping", "container"),
    [
        (wrapping, container)
        for wrapping in WRAPPINGS
        for container in ("zip", "legacy", "safetensors")
        if container != "safetensors" or wrapping not in ("state_dict", "model")  # safetensors holds tensors alone
    ],
)
def test_state_dicts_of_others(wrapping: str, container: str, tmp_path: Path) -> None:
    model, _ = sparse_model()
    content = WRAPPINGS[wrapping](model.state_dict())
    path = tmp_path / "weights"
    if container == "safetensors":
        safetensors.save_file(content, path)
    else:
        saved(path, content, _use_new_zipfile_serialization=container == "zip")
    network = read_network(path)
    assert torch.equal(logits(network.model), logits(model))
    assert all(torch.equal(mask, network.state_dict[name] != 0) for name, mask in network.masks.items())


@pytest.mark.parametrize(
    "options",
    [
        {"arch": "resnet18", "num_classes": 1000},
        {"arch": "resnet50", "num_classes": 10},
        {"arch": "resnet34", "num_classes": 3, "stem": "small", "width": 16, "in_channels": 1},
        {"arch": "resnet56", "num_classes": 100},
    ],
)
def test_recognise_reads_the_architecture_off_the_shapes(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        state_dict = build_model(**options).state_dict()
    found = recognise(dict(sorted(state_dict.items())))  # safetensors keep no order
    assert found.items() >= options.items()


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    model, _ = sparse_model()
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    network = read_network(saved(tmp_path / "half.pt", state))
    assert network.model.state_dict()["conv1.weight"].dtype == torch.float32
    for format in FORMATS:
        export(network, tmp_path / format, format)
        again = read_network(tmp_path / format)
        assert all(
            torch.equal(t, again.state_dict[n]) and t.dtype == again.state_dict[n].dtype for n, t in state.items()
        )
        assert torch.equal(logits(again.model), logits(network.model))


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("arch", ["resnet20", "resnet50"])
def test_exports_give_the_same_logits_bit_by_bit(format: str, arch: str, tmp_path: Path) -> None:
    model, masks = sparse_model(arch=arch, stem="small")
    source = saved(tmp_path / "checkpoint.pt", checkpoint_of(model, masks, arch=arch))
    assert main(["export", str(source), "--format", format, "--output", str(tmp_path / "out")]) == 0
    again = read_network(tmp_path / "out")
    assert torch.equal(logits(again.model), logits(model))
    assert again.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict[name]) for name, tensor in model.state_dict().items())
    for name, mask in masks.unpack().items():
        assert torch.equal(again.masks[name], mask if format in ("packed", "csr") else masks.weights[name] != 0)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_exports_of_exports(network: SavedNetwork, tmp_path: Path) -> None:
    previous = network
    for number, format in enumerate(("csr", "packed", "csr", "packed", "safetensors", "dense")):
        export(previous, tmp_path / str(number), format)
        previous = read_network(tmp_path / str(number))
    assert torch.equal(logits(previous.model), logits(network.model))


def test_a_channels_last_checkpoint(tmp_path: Path) -> None:
    model, masks = sparse_model()
    content = checkpoint_of(model.to(memory_format=torch.channels_last), rpg_fast.PackedMasks(masks.weights))
    content["trainer"]["pruner"]["masks"] = rpg_fast.PackedMasks(masks.weights).load_(masks.unpack()).state_dict()
    network = read_network(saved(tmp_path / "checkpoint.pt", content))
    for format in ("packed", "csr"):
        export(network, tmp_path / format, format)
        again = read_network(tmp_path / format)
        assert all(torch.equal(again.masks[name], mask) for name, mask in masks.unpack().items())
        assert all(torch.equal(again.state_dict[name], tensor) for name, tensor in model.state_dict().items())


def test_dense_exports_need_nothing_of_ours(network: SavedNetwork, tmp_path: Path) -> None:
    plain = build_model(**network.arguments)
    export(network, tmp_path / "dense.pt", "dense")
    plain.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True), strict=True)
    assert torch.equal(logits(plain), logits(network.model))
    export(network, tmp_path / "dense.safetensors", "safetensors")
    plain.load_state_dict(safetensors.load_file(tmp_path / "dense.safetensors"), strict=True)
    assert torch.equal(logits(plain), logits(network.model))


def test_csr_matrices_are_torchs(network: SavedNetwork, tmp_path: Path) -> None:
    export(network, tmp_path / "csr.pt", "csr")
    matrix = torch.load(tmp_path / "csr.pt", weights_only=True)["state_dict"]["fc.weight"]
    assert matrix.layout == torch.sparse_csr
    weight = network.state_dict["fc.weight"]
    x = torch.randn(weight.shape[1], 5)
    torch.testing.assert_close(matrix @ x, weight @ x)


def test_the_bits_are_numpys(network: SavedNetwork, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    export(network, tmp_path / "packed", "packed")
    tensors = safetensors.load_file(tmp_path / "packed")
    for name, mask in network.masks.items():
        bits = tensors[f"{name}.mask"].numpy()
        assert (numpy.unpackbits(bits, bitorder="little", count=mask.numel()) == mask.flatten().numpy()).all()


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_sizes_follow_density(sparsity: float, tmp_path: Path) -> None:
    """Four bytes a kept weight and a bit a weight; CSR takes another four for each column."""
    model, masks = sparse_model(sparsity, width=32)
    network = read_network(saved(tmp_path / "checkpoint.pt", checkpoint_of(model, masks, width=32)))
    size = {}
    for format in FORMATS:
        export(network, tmp_path / format, format)
        size[format] = (tmp_path / format).stat().st_size
    weights = sum(mask.numel() for mask in network.masks.values())
    kept = sum(int(mask.sum()) for mask in network.masks.values())
    others = sum(t.numel() * t.element_size() for n, t in network.state_dict.items() if n not in network.masks)
    header = 20_000  # names, shapes, configuration
    assert size["dense"] == pytest.approx(4 * weights + others, abs=3 * header)
    assert size["safetensors"] == pytest.approx(4 * weights + others, abs=header)
    assert size["packed"] == pytest.approx(4 * kept + weights / 8 + others, abs=header)
    assert size["csr"] == pytest.approx(8 * kept + others, abs=6 * header)


def test_export_overwrites_only_by_force(
    network: SavedNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    target.write_text("mine")
    command = ["export", str(network.path), "--format=packed", f"--output={target}"]
    assert main(command) == 2
    assert capsys.readouterr().err == f"rpg-fast export: error: {target} exists already: --force replaces it\n"
    assert target.read_text() == "mine"
    assert main([*command, "--force"]) == 0
    assert f"{target}: packed, resnet20, " in capsys.readouterr().out
    assert read_network(target).kind == "packed export"


def test_export_to_nowhere(network: SavedNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "no" / "folder"
    for format in FORMATS:
        assert main(["export", str(network.path), f"--format={format}", f"--output={target}"]) == 2
        assert f"cannot write {target}: No such file or directory" in capsys.readouterr().err
    with pytest.raises(UserError, match="--format 'onnx' is unknown"):
        export(network, target, "onnx")


@pytest.mark.parametrize("format", FORMATS)
def test_a_failed_write_leaves_what_was_there(format: str, network: SavedNetwork, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("mine")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(UserError, match=f"cannot write {target}: File too large"):
            export(network, target, format, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "checkpoint.pt"}


def test_without_safetensors_the_command_names_the_extra(
    network: SavedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rpg_fast.__main__ import main as command

    export(network, tmp_path / "packed", "packed")
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for arguments in (
        ["evaluate", str(tmp_path / "packed")],
        ["export", str(network.path), "--format=safetensors", f"--output={tmp_path / 'out'}"],
    ):
        assert command(arguments) == 1
        needed = f"rpg-fast {arguments[0]} needs safetensors: pip install -e '.[train]'\n"
        assert capsys.readouterr().err == needed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (8, 3, 3, 3), (2, 0), (4, 257)])
def test_packing_one_weight(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    weight = torch.randn(shape) * mask
    for encode, decode in ((pack, unpack), (to_csr, from_csr)):
        state, masks = decode(encode({"w": weight, "b": torch.ones(3)}, {"w": mask}), {"w": list(shape)})
        assert torch.equal(state["w"], weight)
        assert torch.equal(masks["w"], mask)
        assert torch.equal(state["b"], torch.ones(3))


# ------------------------------------------------------------------------------------------------------------ evaluate


def published_file(model: nn.Module, masks: rpg_fast.PackedMasks, folder: Path) -> Path:
    return saved(folder / "published", published(model, masks))


@pytest.mark.parametrize("kind", ["checkpoint", "published", *FORMATS])
def test_evaluate_tells_the_same_of_every_format(
    kind: str, network: SavedNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = network.path
    if kind == "published":
        masks = rpg_fast.PackedMasks(rpg_fast.prunable_weights(network.model)).load_(network.masks)
        path = published_file(network.model, masks, tmp_path)
    elif kind != "checkpoint":
        export(network, path := tmp_path / kind, kind)

    def figures(file: Path, *options: str) -> dict[str, Any]:
        capsys.readouterr()
        data = ("--data=synthetic", "--image-size=16") if kind in ("published", "dense") else ()
        assert main(["evaluate", str(file), "--json", *data, *options]) == 0
        return json.loads(capsys.readouterr().out)

    if kind in ("published", "dense"):  # the options are not in the file, and synthetic data have ten classes
        capsys.readouterr()
        assert main(["evaluate", str(path), "--data=synthetic"]) == 2
        assert "is a model for 7 classes, but synthetic has 10" in capsys.readouterr().err
        found = figures(path, "--data=none")
        assert found["accuracy"] is None
    else:
        found = figures(path)
        assert found["accuracy"] == figures(network.path)["accuracy"]
        assert found["images"] == 32
    kept = sum(int(mask.sum()) for mask in network.masks.values())
    zeros = 0 if kind in ("checkpoint", "published", "packed", "csr") else len(network.masks)
    assert found["weights"] - found["pruned"] == kept - zeros
    assert found["sparse_parameters"] == found["parameters"] - found["pruned"]
    for layer in found["layers"]:
        assert layer["sparsity"] == layer["pruned"] / torch.Size(layer["shape"]).numel()
        assert 0 < layer["rank"] <= layer["largest_rank"]
        assert layer["sparse_multiply_adds"] / layer["multiply_adds"] == pytest.approx(1 - layer["sparsity"])


def test_evaluate_prints(network: SavedNetwork, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(network.path)]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "resnet20 on synthetic, checkpoint of rpg-fast train, k at tail energy 0.1",
        "layer3.2.conv2.weight",
        "effective rank",
        " with images of 16 pixels\n",
        "FLOPs      ",
        "multiply-adds for an image of 16 pixels",
        " parameters",
    ):
        assert expected in printed
    assert main(["evaluate", str(network.path), "--data=none"]) == 0
    assert "accuracy   not measured: no --data\n" in capsys.readouterr().out


def test_multiply_adds_of_resnet50_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = build_model("resnet50", num_classes=1000)
    cost = network_cost(model, {}, in_channels=3, image_size=224)
    assert cost.multiply_adds == cost.sparse_multiply_adds == 4_089_184_256
    assert cost.parameters == cost.sparse_parameters == 25_557_032
    assert len(cost.layers) == 54


def test_multiply_adds_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(6 * 9, 5))
    mask = torch.zeros(6, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[5, 1] = True  # ten weights
    cost = network_cost(model, {"0.weight": mask}, in_channels=4, image_size=7)  # 3 x 3 outputs
    assert [layer.multiply_adds for layer in cost.layers] == [108 * 9, 270]
    assert [layer.sparse_multiply_adds for layer in cost.layers] == [10 * 9, 270]
    assert (cost.parameters, cost.sparse_parameters) == (108 + 6 + 270 + 5, 10 + 6 + 270 + 5)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_layers_that_no_forward_pass_calls_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    model[0].register_module("auxiliary", nn.Linear(4, 4))
    cost = network_cost(model, {}, in_channels=1, image_size=2)
    assert cost.uncounted == ("0.auxiliary.weight",)
    assert cost.multiply_adds == 2 * 4 + 24


def test_a_training_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = (
        "--width=4",
        "--epochs=1",
        "--batch-size=256",
        "--update-every=2",
        "--sparsity=0.9",
        "--no-dense-baseline",
    )
    assert main(["train", *options, f"--out={run}"]) == 0
    shown = []
    for format in ("csr", "packed"):
        assert main(["export", str(run), f"--format={format}", f"--output={tmp_path / format}"]) == 0
    for path in (run, tmp_path / "csr", tmp_path / "packed"):
        capsys.readouterr()
        assert main(["evaluate", str(path)]) == 0
        shown.append(capsys.readouterr().out.splitlines()[1:])
    assert shown[0] == shown[1] == shown[2]


# ----------------------------------------------------------------------------------------------------- averaged weights


def averaged_checkpoint(path: Path) -> tuple[Path, nn.Module, nn.Module]:
    """A checkpoint of a run with --ema-decay, the averaged and the last network."""
    model, masks = sparse_model()
    last = copy.deepcopy(model)
    for parameter in last.parameters():
        parameter.data *= 1.5
    content = checkpoint_of(model, masks)
    content["trainer"]["model"] = last.state_dict()
    return saved(path, content), model, last


def test_averaged_weights_unless_the_last_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, average, last = averaged_checkpoint(tmp_path / "checkpoint.pt")
    for weights, model, text in (
        ((), average, ", averaged weights"),
        (("--weights=average",), average, ", averaged weights"),
        (("--weights=last",), last, ", last weights, not their average"),
    ):
        target = tmp_path / "out"
        assert main(["export", str(path), "--format=packed", "--force", f"--output={target}", *weights]) == 0
        assert f"packed, resnet20{text}, " in capsys.readouterr().out
        assert torch.equal(logits(read_network(target).model), logits(model))
        assert main(["evaluate", str(path), *weights]) == 0
        assert f"checkpoint of rpg-fast train{text}, k at" in capsys.readouterr().out
        assert main(["evaluate", str(path), "--json", *weights]) == 0
        assert json.loads(capsys.readouterr().out)["averaged"] is (model is average)


def test_files_with_one_set_of_weights(network: SavedNetwork, capsys: pytest.CaptureFixture[str]) -> None:
    assert network.averaged is None
    assert torch.equal(logits(read_network(network.path, weights="last").model), logits(network.model))
    assert main(["evaluate", str(network.path), "--weights=average"]) == 2
    assert "has no averaged weights, only the last: it was trained without --ema-decay" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what is told


@pytest.mark.parametrize("format", FORMATS)
def test_exports_tell_the_training_but_no_place(format: str, tmp_path: Path) -> None:
    content = checkpoint_of(*sparse_model())
    secret = ("folder:/secret/images", "/secret/weights.pth", "secret-project", "cuda:7")
    config = TrainConfig(
        data=secret[0], pretrained=secret[1], wandb=secret[2], device=secret[3], workers=77, recipe="rpg-98", width=8
    )
    content["config"] = config.to_dict()
    network = read_network(saved(tmp_path / "secret.pt", content))
    export(network, tmp_path / "out", format)
    written = (tmp_path / "out").read_bytes()
    for word in (b"secret", b"cuda", str(tmp_path).encode()):
        assert word not in written
    again = read_network(tmp_path / "out")
    if format == "dense":
        assert again.config == {}
        return
    assert again.config.items() >= {"recipe": "rpg-98", "sparsity": 0.98, "tail_energy": 0.1, "width": 8}.items()
    for name in ("data", "pretrained", "wandb", "device", "workers", "threads"):
        assert name not in again.config
    assert TrainConfig.from_dict(again.config).sparsity == 0.98


def test_evaluation_on_other_data_and_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, masks = sparse_model(num_classes=10, in_channels=1)
    content = checkpoint_of(model, masks, num_classes=10, in_channels=1)
    content["config"] = TrainConfig(data="folder:/gone", workers=7, device="cuda:5", bad_images="skip").to_dict()
    path = saved(tmp_path / "checkpoint.pt", content)
    assert main(["evaluate", str(path), "--data=digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 445
    assert main(["evaluate", str(path), "--data=none"]) == 0
    assert "accuracy   not measured" in capsys.readouterr().out
    assert main(["evaluate", str(path)]) == 2
    assert "/gone" in capsys.readouterr().err
    for change, text in (
        ({"colour": 1}, "the configuration has unknown entries: colour"),
        ({"epochs": "many"}, "--epochs must be a whole number, got 'many'"),
        ({"tail_energy": 3.0}, "--tail-energy must be between 0 and 1, got 3.0"),
        ({3: 4}, "the configuration has unknown entries: 3"),
        ({"tail_energy": torch.ones(3)}, "--tail-energy must be a number, got Tensor"),
    ):
        damaged = saved(tmp_path / "damaged.pt", {**content, "config": {**content["config"], **change}})
        assert main(["evaluate", str(damaged), "--data=none"]) == 2
        assert f"{damaged}: {text}" in capsys.readouterr().err


def test_evaluation_of_a_folder_names_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 1), ("val", 5)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                image.new("RGB", (40, 40), (50 * number, 9, 9)).save(tmp_path / part / name / f"{number}.jpg")
    bad = tmp_path / "val" / "dog" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    model, masks = sparse_model(num_classes=2)
    path = saved(tmp_path / "checkpoint.pt", checkpoint_of(model, masks, num_classes=2))
    command = ["evaluate", str(path), f"--data=folder:{tmp_path}", "--image-size=32", "--workers=0"]
    assert main(command) == 2
    assert f"cannot read the image {bad}" in capsys.readouterr().err
    assert main([*command, "--bad-images=skip", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], list(found["bad_images"])) == (9, [str(bad)])
    assert found["accuracy"] * 9 == pytest.approx(round(found["accuracy"] * 9))
    assert main([*command, "--bad-images=skip"]) == 0
    assert f"not in the accuracy: {bad}: " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ other packages


class Tokens(nn.Module):
    """Patches, one attention, one token: what the networks of packages are made of, beside convolutions."""

    def __init__(self, num_classes: int, in_channels: int = 3):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.patches = nn.Conv2d(in_channels, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT  # [B, 4, 8]
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x[:, 0])


class Pair(nn.Module):
    """A network with two outputs, as detectors and those with auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv1(x), x


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for torchvision and timm."""
    vision, models, timm = (types.ModuleType(name) for name in ("torchvision", "torchvision.models", "timm"))

    def get_model(name: str, weights: None, num_classes: int) -> nn.Module:
        if name == "pair":
            return Pair()
        return Tokens(num_classes) if name == "tokens" else build_model("resnet18", num_classes=num_classes)

    def create_model(name: str, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
        assert pretrained is False
        if name == "picky":
            raise RuntimeError("no classes today\nor tomorrow")
        model = Tokens(num_classes, in_chans)
        if name == "looks" and model.token.sum() == 0:  # as some that compute their depths, not on meta
            model.norm = nn.LayerNorm(8)
        return model

    vars(vision).update(__version__="0.28.0", models=models)
    vars(models).update(list_models=lambda module: ["tokens", "resnet18", "pair"], get_model=get_model)
    vars(timm).update(__version__="1.0.0", list_models=lambda: ["tokens", "picky", "looks"], create_model=create_model)
    for module in (vision, models, timm):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("rpg_fast.train.run.draw_report", lambda *arguments: None)


LIBRARY_RUN = (
    *("--data=synthetic", "--image-size=8", "--train-images=64", "--test-images=32", "--batch-size=16"),
    *("--epochs=1", "--update-every=2", "--sparsity=0.5", "--no-dense-baseline", "--threads=1"),
)


@pytest.mark.parametrize("arch", ["torchvision:tokens", "timm:tokens", "timm:looks", "timm:tokens.in1k"])
def test_networks_of_other_packages_are_trained_evaluated_and_exported(
    arch: str, packages: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *LIBRARY_RUN, f"--arch={arch}", "--ema-decay=0.5", f"--out={run}"]) == 0
    weights = read_network(run)
    assert weights.arguments["arch"] == arch
    assert type(weights.model) is Tokens
    accuracy = load_checkpoint(run / "checkpoint.pt")["metrics"][-1]["test_accuracy"]
    for format in FORMATS:
        assert main(["export", str(run), f"--format={format}", f"--output={tmp_path / format}"]) == 0
        options = [f"--arch={arch}", "--data=synthetic", "--image-size=8"] if format == "dense" else []
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / format), "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["model"]["arch"] == arch
        assert format == "dense" or found["accuracy"] == accuracy
        again = read_network(tmp_path / format, arch=arch)
        x = torch.randn(3, 3, 8, 8)
        assert torch.equal(again.model(x), weights.model(x))
        assert again.arguments["num_classes"] == 10
    given = (f"--pretrained={tmp_path / 'dense'}", "--start-from=pretrained")
    assert main(["train", *LIBRARY_RUN, f"--arch={arch}", *given, f"--out={tmp_path / 'again'}"]) == 0


def test_the_channels_of_a_package_s_network(packages: None, tmp_path: Path) -> None:
    path = saved(tmp_path / "weights.pt", Tokens(6, in_channels=2).state_dict())
    assert read_network(path, arch="timm:tokens").arguments["in_channels"] == 2
    assert "patches.weight has shape (8, 2, 4, 4), wanted (8, 3, 4, 4)" in refused(path, arch="torchvision:tokens")
    assert "(for another one, --arch torchvision:NAME or timm:NAME)" in refused(path)


def test_names_and_images_that_a_package_does_not_take(
    packages: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arch, options, text in (
        ("torchvision:token", (), "torchvision 0.28.0 has no network 'token'; close are tokens\n"),
        ("timm:x", (), "--arch timm:x is unknown: timm 1.0.0 has no network 'x'\n"),
        ("timm:picky", (), "--arch timm:picky cannot be built for 10 classes: no classes today\n"),
        ("torchvision:pair", (), "--arch torchvision:pair gives a tuple in training, wanted one tensor of logits\n"),
        ("torchvision:tokens", ("--image-size=12",), "takes no images of 12 x 12 pixels with 3 channels (--image-size"),
        ("torchvision:tokens", ("--width=4",), "--width is for the networks of rpg-fast, not for torchvision:tokens\n"),
        ("timm:tokens", ("--stem=small",), "--stem is for the networks of rpg-fast"),
    ):
        assert main(["train", *LIBRARY_RUN, f"--arch={arch}", *options, f"--out={tmp_path / 'run'}"]) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert main(["train", "--arch=torchvision:resnet18", f"--out={tmp_path / 'run'}"]) == 2  # digits are grey
    assert "--arch torchvision:resnet18 takes images of 3 channels, got 1" in capsys.readouterr().err


def test_packages_that_are_not_there(
    network: SavedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    run = ["train", *LIBRARY_RUN, "--arch=timm:resnet50", f"--out={tmp_path / 'run'}"]
    needed = (
        "timm:resnet50 needs the package timm, which is not installed: "
        f"pip install timm torch=={torch.__version__} (the version that is there, so that pip leaves it alone)\n"
    )
    assert main(run) == 2
    assert capsys.readouterr().err == f"rpg-fast train: error: --arch {needed}"
    assert not (tmp_path / "run").exists()
    weights = saved(tmp_path / "weights.pt", network.state_dict)
    for command in (["evaluate"], ["export", "--format=dense", f"--output={tmp_path / 'out'}"]):
        assert main([*command, str(weights), "--arch=timm:resnet50"]) == 2
        assert capsys.readouterr().err.endswith(needed)

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(
        ValueError, match="cannot be imported: operator torchvision::nms does not exist; is it made for"
    ):
        build_model("torchvision:resnet50", num_classes=3)


def test_resnets_of_torchvision_with_its_package() -> None:
    """The real one, where it is installed."""
    pytest.importorskip("torchvision.models")
    ours, theirs = (build_model(f"{prefix}resnet50", num_classes=7) for prefix in ("", "torchvision:"))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


# ----------------------------------------------------------------------------------------------------------- bad input


def test_truncated_files(network: SavedNetwork, tmp_path: Path) -> None:
    for format in FORMATS:
        export(network, tmp_path / "whole", format, force=True)
        whole = (tmp_path / "whole").read_bytes()
        for length in (0, 3, 12, 300, len(whole) // 2, len(whole) - 5):
            (tmp_path / "part").write_bytes(whole[:length])
            assert "truncated" in refused(tmp_path / "part")
    saved(tmp_path / "legacy", network.state_dict, _use_new_zipfile_serialization=False)
    whole = (tmp_path / "legacy").read_bytes()
    for length in (30, 3000, len(whole) // 2, len(whole) - 5):
        (tmp_path / "part").write_bytes(whole[:length])
        assert "truncated" in refused(tmp_path / "part")


FOREIGN: dict[str, tuple[Any, str]] = {
    "list": ([torch.ones(2)], "holds a list, wanted a checkpoint"),
    "number": (3, "holds a int, wanted a checkpoint"),
    "empty": ({}, "holds no weights"),
    "text": ({"state_dict": {"a": "b"}}, "its entry 'a' is a str, wanted a tensor"),
    "no state_dict": ({"epoch": 3, "lr": 0.1}, "its entry 'epoch' is a int"),
    "another network": ({"vision.weight": torch.ones(3)}, "the weights fit none of resnet20, "),
    "a later version": (
        {"format": "rpg_fast.train/9"},
        "is in the format rpg_fast.train/9, which another version wrote",
    ),
    "a whole module": (nn.Sequential(nn.Conv2d(1, 1, 1)), "torch.nn.modules.conv.Conv2d"),
    "convolutions": (
        {"conv1.weight": torch.ones(3), "fc.weight": torch.ones(())},
        "closest is resnet18: bn1.weight is missing; ",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files(case: str, tmp_path: Path) -> None:
    content, text = FOREIGN[case]
    assert text in refused(saved(tmp_path / "foreign.pt", content))


def test_no_file(tmp_path: Path) -> None:
    assert "there is no checkpoint at" in refused(tmp_path / "missing.pt")


def test_names_and_shapes_that_fit_nothing(tmp_path: Path) -> None:
    state = sparse_model()[0].state_dict()

    def text(change: dict[str, Tensor], *without: str, **options: Any) -> str:
        content = {name: tensor for name, tensor in {**state, **change}.items() if name not in without}
        return refused(saved(tmp_path / "weights.pt", content), **options)

    assert "closest is resnet20: fc.bias is missing" in text({}, "fc.bias")
    assert "closest is resnet20: head.weight is unknown" in text({"head.weight": torch.ones(2)})
    wrong = {"layer2.0.conv1.weight": torch.ones(16, 8, 5, 5)}
    assert "layer2.0.conv1.weight has shape (16, 8, 5, 5), wanted (16, 8, 3, 3)" in text(wrong)
    assert "the weights do not fit resnet18: layer1.2.conv1.weight is unknown" not in text({}, arch="resnet18")
    assert "the weights do not fit resnet18: layer4.0.conv1.weight is missing" in text({}, arch="resnet18")
    assert "unknown architecture 'vgg'" in text({}, arch="vgg")
    assert "fc.bias is torch.float64, wanted one of torch.float32" in text({"fc.bias": torch.ones(7).double()})
    assert "fc.weight is torch.sparse_csr" in text({"fc.weight": state["fc.weight"].to_sparse_csr()})


def test_weights_of_kinds_that_cannot_be_loaded(tmp_path: Path) -> None:
    state = sparse_model()[0].state_dict()

    def text(tensor: Tensor) -> str:
        return refused(saved(tmp_path / "weights.pt", {**state, "fc.weight": tensor}))

    weight = state["fc.weight"]
    assert "fc.weight has no values" in text(weight.to("meta"))
    assert "fc.weight is torch.complex64, wanted one of" in text(weight.to(torch.complex64))
    assert "fc.weight is torch.int32, wanted one of" in text(weight.int())
    assert "fc.weight is torch.sparse_coo, wanted a dense tensor" in text(weight.to_sparse())


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle(protocol: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"weights": [1, 2]}, protocol))
    assert "is truncated or not a PyTorch checkpoint" in refused(tmp_path / "x.pkl")
    assert capfd.readouterr().err == ""


def test_sizes_beyond_the_memory(network: SavedNetwork, tmp_path: Path) -> None:
    """A few bytes that stand for terabytes are refused before they are allocated, or as soon as they are not."""
    content = checkpoint_of(*sparse_model())
    with torch.device("meta"):
        wide = build_model("resnet20", num_classes=7, width=10**6).state_dict()
    content["model"]["width"] = 10**6
    content["state_dict"] = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in wide.items()}
    assert "allocate" in refused(saved(tmp_path / "wide.pt", {**content, "trainer": {"pruner": None}}))
    export(network, tmp_path / "csr", "csr")
    csr = torch.load(tmp_path / "csr", weights_only=True)
    row = (torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1))
    csr["state_dict"]["fc.weight"] = torch.sparse_csr_tensor(*row, (1, 2**41), check_invariants=True)
    csr["shapes"]["fc.weight"] = [1, 2**41]
    assert "fc.weight has the shape (1, 2199023255552), its model's is (7, 32)" in refused(saved(tmp_path / "c", csr))


def test_memory_that_runs_out_is_told_in_one_line(
    network: SavedNetwork, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("rpg_fast.train.loop.accuracy", full)
    assert main(["evaluate", str(network.path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(
        "rpg-fast evaluate: error: out of memory, 4611686018427387904 bytes more were wanted: a smaller"
    )
    assert told.count("\n") == 1
    gpu = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...\nmore"
    )
    assert "out of memory, 2.00 GiB more were wanted" in str(explain_memory(gpu))
    assert explain_memory(RuntimeError("another")) is None


def test_an_architecture_that_the_file_contradicts(network: SavedNetwork) -> None:
    assert "is a resnet20, not a resnet50" in refused(network.path, arch="resnet50")
    assert read_network(network.path, arch="resnet20").arguments == network.arguments


def test_damaged_checkpoints(tmp_path: Path) -> None:
    model, masks = sparse_model()
    content = checkpoint_of(model, masks)
    state = content["trainer"]["pruner"]["masks"]
    other = rpg_fast.PackedMasks({"head.weight": torch.ones(2, 2)}).state_dict()
    for change, expected in (
        ({"trainer": {"pruner": None}}, ""),
        ({"trainer": 3}, "is incomplete: no trainer"),
        ({"trainer": {"pruner": {}}}, "is incomplete: no masks"),
        ({"trainer": {"pruner": [1]}}, "is incomplete: no pruner"),
        ({"trainer": {"pruner": {"masks": {**state, "bits": 3}}}}, "its masks are incomplete: no bits"),
        ({"trainer": {"pruner": {"masks": {**state, "names": ["a"]}}}}, "its masks have 1 names for 22 shapes"),
        ({"trainer": {"pruner": {"masks": {**state, "shapes": [3] * 22}}}}, "conv1.weight has the shape 3, wanted"),
        ({"trainer": {"pruner": {"masks": {**state, "orders": [[0]] * 22}}}}, "conv1.weight has the memory order [0]"),
        ({"model": {**content["model"], "width": 2**62}}, "its model cannot be built: "),
        ({"model": {**content["model"], "depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"trainer": {"pruner": {"step": 1}}}, "is incomplete: no masks"),
        ({"trainer": {"pruner": {"masks": {"bits": state["bits"]}}}}, "its masks are incomplete: no names"),
        ({"trainer": {"pruner": {"masks": {**state, "bits": state["bits"][:9]}}}}, "its masks hold 9 bytes"),
        ({"trainer": {"pruner": {"masks": other}}}, "has a mask for head.weight, which is no convolution"),
        ({"config": 3}, "is incomplete: no config"),
        ({"model": None}, "is incomplete: no model"),
        ({"model": {"arch": "resnet20"}}, "num_classes"),
        ({"model": {**content["model"], "width": "8"}}, "width must be a whole number, got '8'"),
        ({"model": {**content["model"], "stem": "x"}}, 'stem must be "imagenet" or "small", got \'x\''),
        ({"trainer": {"pruner": None, "model": 3}}, "is incomplete: no model"),
        ({"trainer": {"pruner": None, "model": {"a": 1}}}, "its entry 'a' is a int, wanted a tensor"),
    ):
        path = saved(tmp_path / "damaged.pt", {**content, **change})
        if expected:
            assert expected in refused(path)
        else:
            assert read_network(path).masks["fc.weight"].sum() < masks.unpack()["fc.weight"].sum()


def test_weights_that_their_mask_prunes(tmp_path: Path) -> None:
    model, masks = sparse_model()
    with torch.no_grad():
        model.conv1.weight.fill_(1)
    pruned = int((~masks.unpack()["conv1.weight"]).sum())
    text = refused(saved(tmp_path / "checkpoint.pt", checkpoint_of(model, masks)))
    assert f"{pruned} weights of conv1.weight are not zero, although its mask prunes them" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fc.weight.mask": None}, "fc.weight.mask is missing"),
        ({"fc.weight.values": torch.ones(3)}, "ones in its mask, but values of shape (3,)"),
        (
            {"fc.weight.mask": torch.zeros(5, dtype=torch.uint8)},
            "fc.weight.mask is torch.uint8 of shape (5,), wanted 28",
        ),
        ({"conv1.weight.mask": torch.zeros(27)}, "conv1.weight.mask is torch.float32 of shape (27,), wanted 27 bytes"),
        ({"bn1.weight": None}, "bn1.weight is missing"),
    ],
)
def test_damaged_packed_exports(change: dict[str, Any], text: str, network: SavedNetwork, tmp_path: Path) -> None:
    export(network, tmp_path / "packed", "packed")
    with safetensors.safe_open(tmp_path / "packed", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    safetensors.save_file(tensors, tmp_path / "damaged", metadata)
    assert text in refused(tmp_path / "damaged")
    safetensors.save_file(tensors, tmp_path / "damaged", {**metadata, "shapes": "{"})
    assert "its metadata are damaged" in refused(tmp_path / "damaged")
    safetensors.save_file(tensors, tmp_path / "damaged", {**metadata, "shapes": '{"fc.weight": [7, -1]}'})
    assert "fc.weight has the shape [7, -1], wanted a list of sizes" in refused(tmp_path / "damaged")
    safetensors.save_file(tensors, tmp_path / "damaged", {"format": metadata["format"]})
    assert "is incomplete: no shapes" in refused(tmp_path / "damaged")
    safetensors.save_file(tensors, tmp_path / "damaged", {"config": "[1]"})
    assert "is incomplete: no config" in refused(tmp_path / "damaged")
    for metadata, expected in (
        ({"model": "[" * 100_000}, "its metadata are damaged: maximum recursion depth"),
        ({"format": "rpg_fast.packed/2"}, "is in the format rpg_fast.packed/2, which another version wrote"),
    ):
        safetensors.save_file(tensors, tmp_path / "damaged", metadata)
        assert expected in refused(tmp_path / "damaged")


def test_damaged_csr_exports(network: SavedNetwork, tmp_path: Path) -> None:
    export(network, tmp_path / "csr", "csr")
    content = torch.load(tmp_path / "csr", weights_only=True)
    state: dict[str, Tensor] = content["state_dict"]

    def text(change: dict[str, Tensor], shapes: dict[str, Sequence[int]] | None = None) -> str:
        changed = {**content, "state_dict": {**state, **change}, "shapes": {**content["shapes"], **(shapes or {})}}
        return refused(saved(tmp_path / "damaged", changed))

    assert "fc.weight is torch.strided of shape (7, 32), wanted CSR (7, 32)" in text({"fc.weight": torch.ones(7, 32)})
    assert "fc.weight has the shape (7, 9), its model's is (7, 32)" in text({}, {"fc.weight": (7, 9)})
    narrow = state["fc.weight"].to_dense()[:, :9].to_sparse_csr()
    assert "fc.weight is torch.sparse_csr of shape (7, 9), wanted CSR (7, 32)" in text({"fc.weight": narrow})
    assert "other.weight is missing" in text({}, {"other.weight": (7, 9)})
