"""Sparse weights at inference on the CPU: layers of ResNet-50 on one image, dense and as torch's CSR matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, unfold

from benchmarks.conftest import Scale
from benchmarks.race import Contestant, Race
from rpg_fast import topk_mask
from rpg_fast.train.packed import to_csr
from tests.cases import relative_error

CONVOLUTION, DENSE, CSR = "torch conv2d, dense", "torch mm, dense", "torch mm, CSR"
SPARSITIES = (0.80, 0.90, 0.95, 0.98)
RACE_S = 1.5


@dataclass(frozen=True)
class Layer:
    """A convolution with stride 1 of kernel x kernel weights on images of side x side; 1 and 1: a linear layer."""

    name: str
    out: int
    channels: int
    kernel: int
    side: int

    def __str__(self) -> str:
        return self.name


LAYERS = (
    Layer("layer1.0.conv2", 64, 64, 3, 56),
    Layer("layer2.1.conv3", 512, 128, 1, 28),
    Layer("layer3.1.conv2", 256, 256, 3, 14),
    Layer("layer4.1.conv1", 512, 2048, 1, 7),
    Layer("layer4.1.conv2", 512, 512, 3, 7),
    Layer("fc", 1000, 2048, 1, 1),
)


def contestants(layer: Layer, sparsity: float) -> list[Contestant]:
    """All do the whole job, from the image on: a product needs the image's patches first, but with 1 x 1 weights."""
    generator = torch.Generator().manual_seed(0)
    shape = (layer.out, layer.channels, layer.kernel, layer.kernel)
    weight = torch.randn(shape, generator=generator)
    mask = topk_mask(weight.abs(), sparsity)
    weight *= mask
    image = torch.randn(1, layer.channels, layer.side, layer.side, generator=generator)
    padding = layer.kernel // 2
    rows = weight.flatten(1)  # [out, rest]
    matrix = to_csr({"weight": weight}, {"weight": mask})["weight"]

    def patches() -> Tensor:  # [rest, positions]
        return image[0].flatten(1) if layer.kernel == 1 else unfold(image, layer.kernel, padding=padding)[0]

    def flat(result: Tensor) -> Tensor:
        return result.reshape(layer.out, -1)

    return [
        Contestant(CONVOLUTION, lambda: conv2d(image, weight, padding=padding), flat),
        Contestant(DENSE, lambda: rows @ patches(), flat),
        Contestant(CSR, lambda: matrix @ patches(), flat),
    ]


def agree(outcomes: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    measures = {}
    for name, got in outcomes.items():
        error = relative_error(got, outcomes[DENSE])
        assert error <= 1e-5, f"{name}: differs by {error}"
        measures[name] = {"error": error}
    return measures


@pytest.fixture(scope="module")
def race(request: pytest.FixtureRequest, scale: Scale) -> Iterator[Race]:
    layer, sparsity = request.param
    title = f"inference, {layer} at {sparsity:.0%}"
    details = {
        "layer": layer.name,
        "shape": [layer.out, layer.channels * layer.kernel**2],
        "positions": layer.side**2,
        "sparsity": sparsity,
    }
    with torch.inference_mode():
        yield Race(title, contestants(layer, sparsity), agree, full=scale.full, seconds=RACE_S, details=details)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU")
@pytest.mark.parametrize("name", [CONVOLUTION, DENSE, CSR])
@pytest.mark.parametrize("race", [(layer, s) for layer in LAYERS for s in SPARSITIES], ids=str, indirect=True)
def test_inference(race: Race, name: str, benchmark: Any) -> None:
    race.report(name, benchmark)
