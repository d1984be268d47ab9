"""The training program's parts: networks, data, layer statistics, configuration, checkpoints."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rpg_fast.train.checkpoint import load_checkpoint, save_checkpoint
from rpg_fast.train.config import TrainConfig, UserError
from rpg_fast.train.data import Batches, load_digits, make_synthetic, shift_images
from rpg_fast.train.layers import layer_table, network_statistics, singular_values
from rpg_fast.train.loop import learning_rate, make_optimizer
from rpg_fast.train.models import ARCHITECTURES, build_model
from rpg_fast.train.run import choose_device


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arch", "count", "convolutions", "tensors"),
    [("resnet18", 11_689_512, 20, 62), ("resnet34", 21_797_672, 36, 110), ("resnet50", 25_557_032, 53, 161)],
)
def test_imagenet_networks_have_the_known_sizes(arch: str, count: int, convolutions: int, tensors: int) -> None:
    with torch.device("meta"):
        model = build_model(arch, num_classes=1000)
    assert parameters(model) == count
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    assert len(list(model.parameters())) == tensors


def test_names_and_shapes_follow_torchvision() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build_model("resnet50", num_classes=1000).state_dict().items()}
    assert len(shapes) == 320
    expected = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.0.conv3.weight": (256, 64, 1, 1),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.num_batches_tracked": (),
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "layer4.0.downsample.0.weight": (2048, 1024, 1, 1),
        "layer4.2.bn3.bias": (2048,),
        "fc.weight": (1000, 2048),
        "fc.bias": (1000,),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert "layer1.1.downsample.0.weight" not in shapes


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_equals_torchvision(arch: str) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=Exception)
    theirs = getattr(models, arch)(weights=None).eval()
    ours = build_model(arch, num_classes=1000).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize(("arch", "convolutions"), [("resnet20", 19 + 2), ("resnet32", 31 + 2), ("resnet56", 55 + 2)])
def test_cifar_networks(arch: str, convolutions: int) -> None:
    model = build_model(arch, num_classes=10)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    names = set(model.state_dict())
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "layer3.0.bn2.running_var", "fc.weight"} <= names
    assert not any(name.startswith("layer4") for name in names)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_every_network_takes_every_stem_and_channel_count(arch: str, stem: str) -> None:
    model = build_model(arch, num_classes=3, in_channels=1, stem=stem, width=4).eval()
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 3)


def test_zero_init_residual_makes_blocks_the_identity() -> None:
    model = build_model("resnet20", num_classes=10, zero_init_residual=True, width=4).eval()
    x = torch.randn(2, 4, 8, 8).relu()
    torch.testing.assert_close(model.layer1(x), x)


def test_build_model_refuses() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'resnet19'; known are resnet20"):
        build_model("resnet19", num_classes=10)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build_model("resnet20", num_classes=0)


def test_digits_split_is_fixed_disjoint_and_stratified() -> None:
    first, second = load_digits(), load_digits()
    assert (len(first.train), len(first.test)) == (1352, 445)
    assert torch.equal(first.test.images, second.test.images)
    assert first.test.labels.bincount().tolist() == [44, 45, 44, 45, 45, 45, 45, 44, 43, 45]
    assert first.train.images.mean().abs() < 1e-5
    assert (first.train.images.std() - 1).abs() < 1e-5

    from sklearn.datasets import load_digits as load

    # an image is known by its pixels: together the two splits are the set, each image once
    ours = torch.cat([first.train.images, first.test.images]).flatten(1)
    pixels = torch.from_numpy(load().images).flatten(1)
    scale = (ours.max() - ours.min()) / 16
    restored = ((ours - ours.min()) / scale).round()
    assert sorted(map(tuple, restored.tolist())) == sorted(map(tuple, pixels.tolist()))


def test_synthetic_data_is_seeded_balanced_and_of_any_size() -> None:
    data = make_synthetic(image_size=48, num_classes=7, train_images=70, test_images=14, seed=3)
    again = make_synthetic(image_size=48, num_classes=7, train_images=70, test_images=14, seed=3)
    other = make_synthetic(image_size=48, num_classes=7, train_images=70, test_images=14, seed=4)
    assert torch.equal(data.train.images, again.train.images)
    assert not torch.equal(data.train.images, other.train.images)
    assert data.train.labels.bincount().tolist() == [10] * 7
    images, labels = next(iter(Batches(data, data.test, 8)))
    assert images.shape == (8, 3, 48, 48)
    assert labels.shape == (8,)
    # learnable: the nearest class mean of the training images names most test images
    means = torch.stack([data.train.images[data.train.labels == c].mean(0) for c in range(7)]).flatten(1)
    nearest = torch.cdist(data.test.images.flatten(1), means).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.9


def test_batches_cover_the_split() -> None:
    data = make_synthetic(train_images=50, test_images=23, num_classes=5)
    train = Batches(data, data.train, 16, generator=torch.Generator().manual_seed(0))
    assert [len(labels) for _, labels in train] == [16, 16, 16]
    assert len(train) == 3
    test = Batches(data, data.test, 16)
    assert [len(labels) for _, labels in test] == [16, 7]
    assert torch.equal(torch.cat([labels for _, labels in test]), data.test.labels)


def test_batches_are_drawn_by_the_generator() -> None:
    data = load_digits()

    def epochs(seed: int) -> list[torch.Tensor]:
        batches = Batches(data, data.train, 64, generator=torch.Generator().manual_seed(seed))
        return [torch.cat([images for images, _ in batches]) for _ in range(2)]

    one, same, other = epochs(0), epochs(0), epochs(1)
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1], same[1])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_batches_in_channels_last() -> None:
    data = make_synthetic(train_images=16)
    images, _ = next(iter(Batches(data, data.train, 8, memory_format=torch.channels_last)))
    assert images.is_contiguous(memory_format=torch.channels_last)


class _Copies(TorchDispatchMode):
    """What is copied from the CPU to another device: whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and kwargs.get("device"):
            self.waits.append(not kwargs.get("non_blocking", False))
        return function(*args, **kwargs)


def test_batches_of_sets_in_memory_do_not_wait_for_the_device() -> None:
    dataset = load_digits().to(torch.device("meta"))
    batches = iter(Batches(dataset, dataset.train, 128, generator=torch.Generator()))
    next(batches)
    with _Copies() as copies:
        assert len(list(batches)) == 9
    assert copies.waits == [False] * 9


def test_a_gpu_is_the_current_one_as_soon_as_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert choose_device(TrainConfig(device="cuda:1")) == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    assert choose_device(TrainConfig(device="cuda")) == torch.device("cuda")
    assert choose_device(TrainConfig(device="cpu")) == torch.device("cpu")
    assert len(current) == 1


def test_batches_refuse_a_batch_larger_than_the_training_set() -> None:
    data = make_synthetic(train_images=10)
    with pytest.raises(ValueError, match="the batch size, 11, is larger than the training set of synthetic: 10 images"):
        Batches(data, data.train, 11, generator=torch.Generator())


def test_shift_images() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3)
    shifts = torch.tensor([[0, 0], [1, 0], [0, -1]])
    moved = shift_images(image.expand(3, 1, 3, 3), shifts)
    assert torch.equal(moved[0], image[0])
    assert moved[1, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert moved[2, 0].tolist() == [[1, 2, 2], [4, 5, 5], [7, 8, 8]]


def test_singular_values_agree_with_the_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (16, 8, 1, 1), (4, 32), (27, 5)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[1][3:] = 0  # rank 3
    for weight, values in zip(weights, singular_values(weights), strict=True):
        exact = torch.linalg.svdvals(weight.double().flatten(1))
        torch.testing.assert_close(values, exact, rtol=1e-6, atol=1e-7 * exact.max().item())


def test_network_statistics() -> None:
    model = build_model("resnet20", num_classes=10, width=4)
    with torch.no_grad():
        model.conv1.weight[1:] = 0  # rank one
        model.layer1[0].conv1.weight.zero_()
        model.layer1[0].conv2.weight[0, 0, 0, 0] = math.nan
        torch.nn.init.orthogonal_(model.layer2[0].downsample[0].weight)
    statistics = network_statistics(model, tail_energy=0.1)
    layers = {layer.name: layer for layer in statistics.layers}
    assert layers["conv1.weight"].dead_filters == 3
    assert layers["conv1.weight"].sparsity == 0.75
    assert layers["conv1.weight"].effective_rank == pytest.approx(1)
    dead = layers["layer1.0.conv1.weight"]
    assert (dead.sparsity, dead.rank, dead.effective_rank, dead.dead_filters) == (1.0, 0.0, 0.0, 4)
    assert math.isnan(layers["layer1.0.conv2.weight"].rank)
    assert layers["layer2.0.downsample.0.weight"].effective_rank == pytest.approx(4)
    assert statistics.zeros == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    assert len(layer_table(statistics).splitlines()) == len(layers) + 2


def test_weight_decay_goes_by_type_not_by_name() -> None:
    model = build_model("resnet18", num_classes=10, width=4)
    decayed, rest = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert rest["weight_decay"] == 0
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    spared = {id(p) for module in norms for p in module.parameters()} | {id(model.fc.bias)}
    assert {id(p) for p in rest["params"]} == spared
    assert len(decayed["params"]) == 20 + 1


def test_learning_rate_rises_then_falls_at_every_step() -> None:
    config = TrainConfig(epochs=10, warmup_epochs=2, lr=0.5)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:21] == sorted(rates[:21])
    assert rates[20] == 0.5
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[0] < 0.03
    assert 0 < rates[99] < 1e-3


def test_config_survives_its_dictionary() -> None:
    config = TrainConfig(sparsity=0.9, rank_every="update", width=8)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="unknown entries: colour"):
        TrainConfig.from_dict({"colour": 1})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.0}, "--sparsity must be at least 0 and below 1, got 1.0"),
        ({"sparsity": -0.1}, "--sparsity must be at least 0 and below 1, got -0.1"),
        ({"sparsity": math.nan}, "--sparsity must be"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "--lr must be above 0, got 0.0"),
        ({"lr": math.inf}, "--lr must be a finite number, got inf"),
        ({"arch": "vgg"}, "--arch 'vgg' is unknown; known are resnet20"),
        ({"data": "imagenet"}, "--data 'imagenet' is unknown; known are digits, synthetic"),
        ({"epochs": 3, "warmup_epochs": 3.0}, "--warmup-epochs must be at least 0 and below --epochs 3, got 3.0"),
        ({"batch_size": 4, "accumulate": 8}, "--accumulate 8 splits a batch"),
        ({"rank_every": 0}, '--rank-every must be "update" or at least 1, got 0'),
        ({"epochs": 1.5}, "--epochs must be a whole number, got 1.5"),
        ({"seed": True}, "--seed must be a whole number, got True"),
        ({"keep_dense": 5}, "--keep-dense must be text or none, got 5"),
        ({"update_every": 2.5}, "--update-every must be a whole number or none, got 2.5"),
        ({"lr": "0.1"}, "--lr must be a number or none, got '0.1'"),
        ({"channels_last": "false"}, "--channels-last must be true or false, got 'false'"),
        ({"rank_every": 2.0}, "--rank-every must be a whole number or text, got 2.0"),
        (
            {"start_from": "dense", "dense_baseline": False},
            "--start-from dense begins with the dense baseline's weights",
        ),
    ],
)
def test_config_refuses(options: dict[str, object], text: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(**options)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_checkpoint_is_whole_or_absent(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    content = {"state_dict": {"w": torch.ones(3)}, "config": {}, "model": {}, "metrics": [], "trainer": {}}
    save_checkpoint(path, content)
    assert torch.equal(load_checkpoint(path)["state_dict"]["w"], torch.ones(3))
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {"state_dict": lambda: None})  # cannot be written
    assert torch.equal(load_checkpoint(path)["state_dict"]["w"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
