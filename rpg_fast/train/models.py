"""Residual networks whose parameters carry torchvision's names, so that weights move freely between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
}


def build_model(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    stem: Stem | None = None,
    width: int | None = None,
    zero_init_residual: bool = False,
) -> ResNet:
    """Builds a network by name.

    `resnet18`, `resnet34` and `resnet50` equal torchvision's: same state_dict names and shapes, same output for the
    same weights. `resnet20`, `resnet32` and `resnet56` are the CIFAR networks of He et al. 2015 (section 4.2) under the
    same naming scheme, with 1x1 convolutions in the two shortcuts that change shape (their option B).

    Args:
        stem: default "imagenet" for the former, "small" for the latter.
        width: channels of the first stage; default 64 and 16. The later stages double it.

    Raises:
        ValueError: `arch` is unknown, or a number is below 1.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(ARCHITECTURES)}")
    spec = ARCHITECTURES[arch]
    base = spec.base_width if width is None else width
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", base)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return ResNet(
        spec.block,
        spec.depths,
        [base * 2**stage for stage in range(len(spec.depths))],
        num_classes=num_classes,
        in_channels=in_channels,
        stem=stem or ("imagenet" if spec.imagenet else "small"),
        zero_init_residual=zero_init_residual,
    )
