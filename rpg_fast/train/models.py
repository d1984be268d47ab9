"""Residual networks whose parameters carry torchvision's names, so that weights move freely between the two; and the
networks of torchvision and timm."""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Stem = Literal["imagenet", "small"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, width, H / stride, W / stride]
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride sits in the 3x3 (torchvision's "V1.5")."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, 4 width, H / stride, W / stride]
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.relu(out)


class ResNet(nn.Module):
    """A residual network of three (CIFAR) or four (ImageNet) stages; each stage after the first halves the image.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks per stage, three or four numbers.
        widths: width per stage, as many numbers as `depths`.
        stem: "imagenet" (7x7 stride 2, then max-pooling: the image shrinks to a quarter) or "small" (3x3, stride 1).
        zero_init_residual: start the last norm of every block at 0, so that each block begins as the identity.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int,
        in_channels: int = 3,
        stem: Stem = "imagenet",
        zero_init_residual: bool = False,
    ):
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)

        stages: list[nn.Module] = []
        channels = widths[0]
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stages.append(_stage(block, channels, width, depth, stride=1 if index == 0 else 2))
            channels = width * block.expansion
        self.layer1, self.layer2, self.layer3 = stages[:3]
        self.layer4 = stages[3] if len(stages) == 4 else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self._initialise(zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            if zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    first = block(in_channels, width, stride, downsample)
    return nn.Sequential(first, *(block(out_channels, width, 1, None) for _ in range(depth - 1)))


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one residual network from another."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    base_width: int
    imagenet: bool


ARCHITECTURES = {
    "resnet20": Architecture(BasicBlock, (3, 3, 3), 16, imagenet=False),
    "resnet32": Architecture(BasicBlock, (5, 5, 5), 16, imagenet=False),
    "resnet56": Architecture(BasicBlock, (9, 9, 9), 16, imagenet=False),
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2), 64, imagenet=True),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3), 64, imagenet=True),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3), 64, imagenet=True),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3), 64, imagenet=True),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3), 64, imagenet=True),
}

LIBRARIES = ("torchvision", "timm")


def build_model(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    stem: Stem | None = None,
    width: int | None = None,
    zero_init_residual: bool = False,
) -> nn.Module:
    """Builds a network by name, with random weights.

    `resnet18` to `resnet152` equal torchvision's: same state_dict names and shapes, same output for the same weights.
    `resnet20`, `resnet32` and `resnet56` are the CIFAR networks of He et al. 2015 (section 4.2) under the same naming
    scheme, with 1x1 convolutions in the two shortcuts that change shape (their option B). `torchvision:NAME` and
    `timm:NAME` are those of these packages.

    Args:
        stem: default "imagenet" for the former, "small" for the latter. Not of a package, as the next two.
        width: channels of the first stage; default 64 and 16. The later stages double it.

    Raises:
        ValueError: `arch` is unknown, its package is missing or refuses the arguments, or a number is below 1.
    """
    if is_library(arch):
        if stem or width or zero_init_residual:
            raise ValueError(f"stem, width and zero_init_residual are for other networks than {arch}")
        return _from_library(arch, num_classes, in_channels)
    if arch not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *(f"{library}:NAME" for library in LIBRARIES)))
        raise ValueError(f"unknown architecture {arch!r}; known are {known}")
    spec = ARCHITECTURES[arch]
    base = spec.base_width if width is None else width
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", base)):
        if not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if stem not in (None, "imagenet", "small"):
        raise ValueError(f'stem must be "imagenet" or "small", got {stem!r}')
    return ResNet(
        spec.block,
        spec.depths,
        [base * 2**stage for stage in range(len(spec.depths))],
        num_classes=num_classes,
        in_channels=in_channels,
        stem=stem or ("imagenet" if spec.imagenet else "small"),
        zero_init_residual=zero_init_residual,
    )


# ------------------------------------------------------------------------------------------------------ other packages


def is_library(arch: str) -> bool:
    """Whether `arch` has the form of a network of another package, as timm:resnet50."""
    library, _, name = str(arch).partition(":")
    return library in LIBRARIES and bool(name)


def _from_library(arch: str, num_classes: int, in_channels: int) -> nn.Module:
    library, _, name = arch.partition(":")
    package = _import(library, arch)
    models = package.models if library == "torchvision" else package
    known = models.list_models(module=models) if library == "torchvision" else models.list_models()
    if name.partition(".")[0] not in known:  # timm's names may have the training of weights behind a dot
        close = difflib.get_close_matches(name, known, 3)
        hint = f"; close are {', '.join(close)}" if close else ""
        raise ValueError(f"{arch} is unknown: {library} {package.__version__} has no network {name!r}{hint}")
    if library == "torchvision" and in_channels != 3:
        raise ValueError(f"{arch} takes images of 3 channels, got {in_channels}")
    try:
        if library == "torchvision":
            return models.get_model(name, weights=None, num_classes=num_classes)
        return models.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    except Exception as error:  # what a package's builder stumbles upon
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{arch} cannot be built for {num_classes} classes: {reason}") from error


def _import(library: str, arch: str) -> Any:
    """The package. A version of torch that pip is told to keep is not replaced by one that the package would like."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{arch} needs the package {error.name}, which is not installed: pip install {error.name} "
            f"torch=={torch.__version__} (the version that is there, so that pip leaves it alone)"
        ) from error
    except Exception as error:  # a binary made for another torch raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{arch} needs the package {library}, which cannot be imported: {reason}; "
            f"is it made for PyTorch {torch.__version__}?"
        ) from error


def check_network(model: nn.Module, arguments: Mapping[str, Any], image_size: int) -> None:
    """Follows the shapes of two images through a model in training, without arithmetic.

    Args:
        arguments: of `build_model`.

    Raises:
        ValueError: it does not take images [2, in_channels, image_size, image_size], or does not give logits
            [2, num_classes].
    """
    arch, channels, wanted = arguments["arch"], arguments["in_channels"], (2, arguments["num_classes"])
    shapes = copy.deepcopy(model).to("meta").train()
    try:
        with torch.no_grad():
            logits = shapes(torch.empty(2, channels, image_size, image_size, device="meta"))
    except NotImplementedError:  # it looks at values, which only training can show
        return
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        size = f"{image_size} x {image_size} pixels with {channels} channels"
        raise ValueError(f"{arch} takes no images of {size} (--image-size changes it): {reason}") from error
    if not isinstance(logits, Tensor):
        raise ValueError(f"{arch} gives a {type(logits).__name__} in training, wanted one tensor of logits")
    if logits.shape != wanted:
        raise ValueError(f"{arch} gives {tuple(logits.shape)} for 2 images, wanted logits of shape {wanted}")
