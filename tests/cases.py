"""The one table of cases that every test and benchmark uses: shapes, weight families, hostile matrices, tolerances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


# --------------------------------------------------------------------------------------------------------------- shapes


def resnet50_convolutions() -> list[Shape]:
    """The weights [out, in, kh, kw] of ResNet-50's 53 convolutions in the order of their modules: a stem and four
    stages of bottlenecks 1x1 -> 3x3 -> 1x1, each stage's first one with a projection on its shortcut."""
    shapes: list[Shape] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return shapes


RESNET50: dict[Shape, int] = dict(Counter(resnet50_convolutions()))  # distinct shape -> how often it occurs

# One of each kind: square, wide, tall, one row, one column, odd sizes, none to three spatial dimensions.
SMALL_SHAPES: list[Shape] = [
    (16, 16),
    (7, 33),
    (33, 7),
    (1, 19),
    (19, 1),
    (1, 1),
    (5, 3, 3),
    (8, 4, 3, 3),
    (24, 2, 1, 1),
    (3, 2, 2, 2, 2),
]


# ------------------------------------------------------------------------------------------------------------- families


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kaiming(shape: Shape, generator: torch.Generator) -> Tensor:
    """float32, N(0, 2 / (out * kh * kw)), as torchvision initialises its convolutions."""
    fan_out = shape[0] * torch.Size(shape[2:]).numel()
    return torch.randn(shape, generator=generator) * (2 / fan_out) ** 0.5


def power_law(exponent: float, noise: float = 0.25) -> Callable[[Shape, torch.Generator], Tensor]:
    """Singular values i^-exponent, plus `noise` of the norm in white noise: like the spectra of trained networks."""

    def make(shape: Shape, generator: torch.Generator) -> Tensor:
        m, n = shape[0], torch.Size(shape[1:]).numel()
        r = min(m, n)
        left = torch.linalg.qr(torch.randn(m, r, generator=generator)).Q  # [m, r]
        right = torch.linalg.qr(torch.randn(n, r, generator=generator)).Q  # [n, r]
        values = torch.arange(1, r + 1).float().pow(-exponent)
        white = torch.randn(m, n, generator=generator)
        W = (left * values) @ right.mT + white * (noise * values.norm() / white.norm())  # [m, n]
        return W.view(shape)

    return make


FAMILIES: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "kaiming": kaiming,
    "power-0.5": power_law(0.5),
    "power-0.8": power_law(0.8),
    "power-1.2": power_law(1.2),
}

SPARSITIES = (0.0, 0.8, 0.9, 0.95, 0.98)


def pruned(W: Tensor, sparsity: float, how: str = "magnitude", generator: torch.Generator | None = None) -> Tensor:
    """A copy of `W` with round(sparsity * n) zeros: by "magnitude", at "random" places, or in whole "rows"."""
    zeros = round(sparsity * W.numel())
    if how == "rows":
        scores = torch.rand(W.shape[0], generator=generator)[:, None].expand(W.shape[0], W[0].numel()).reshape(-1)
        scores = scores + 1e-3 * W.abs().flatten() / W.abs().max()
    elif how == "random":
        scores = torch.rand(W.numel(), generator=generator)
    else:
        scores = W.abs().flatten()
    result = W.clone()
    result.view(-1)[scores.argsort()[:zeros]] = 0
    return result


def make_weight(family: str, shape: Shape, sparsity: float = 0.0, how: str = "magnitude", seed: int = 0) -> Tensor:
    """A float32 weight of the table."""
    generator = seeded(seed)
    return pruned(FAMILIES[family](shape, generator), sparsity, how, generator)


# -------------------------------------------------------------------------------------------------------------- hostile


def _randn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def _with(value: float, *places: tuple[int, ...]) -> Tensor:
    W = _randn(12, 20)
    for place in places:
        W[place] = value
    return W


def _zero_rows_and_columns() -> Tensor:
    W = _randn(24, 40)
    W[::3] = 0
    W[:, 5:17] = 0
    return W


# Matrices whose loss and gradient are defined and finite, though much goes wrong on the way to them.
HOSTILE_FINITE: dict[str, Callable[[], Tensor]] = {
    "all zero": lambda: torch.zeros(9, 14),
    "negative zero": lambda: -torch.zeros(9, 14),
    "rank one": lambda: _randn(16, 1) @ _randn(1, 30, seed=8),
    "rank two, square": lambda: _randn(16, 2) @ _randn(2, 16, seed=8),
    "orthogonal": lambda: torch.linalg.qr(_randn(20, 20)).Q,
    "identity": lambda: torch.eye(16),
    "identity beside zeros": lambda: torch.cat([torch.eye(16), torch.zeros(16, 9)], 1),
    "constant": lambda: torch.full((10, 15), 0.125),
    "one element": lambda: torch.tensor([[3.0]]),
    "one nonzero": lambda: torch.zeros(13, 17).index_put_((torch.tensor(4), torch.tensor(6)), torch.tensor(2.0)),
    "one row": lambda: _randn(1, 31),
    "one column": lambda: _randn(31, 1),
    "no rows": lambda: torch.empty(0, 5),
    "no columns": lambda: torch.empty(5, 0, 3, 3),
    "huge": lambda: _randn(12, 20) * 1e30,
    "largest float": lambda: torch.full((6, 8), torch.finfo(torch.float32).max) * _randn(6, 8).sign(),
    "tiny": lambda: _randn(12, 20) * 1e-30,
    "wide range": lambda: _randn(12, 20) * torch.logspace(-15, 15, 12)[:, None],
    "zero rows and columns": _zero_rows_and_columns,
    "nearly one": lambda: torch.eye(32) * (1 + 1e-6 * _randn(32)),
    "two clusters": lambda: torch.diag(torch.cat([torch.full((8,), 3.0), torch.full((16,), 1.0)])),
    "repeated rows": lambda: _randn(3, 20).repeat(5, 1),
}

# Smaller than the smallest normal float32: the loss is defined, the gradient overflows float32.
SUBNORMAL: dict[str, Callable[[], Tensor]] = {
    "subnormal": lambda: _randn(12, 20) * 1e-42,
    "smallest subnormal": lambda: torch.eye(6) * 1e-45,
}

# Not a number somewhere: NaN in the loss and in this weight's gradient, nowhere else.
HOSTILE_NOT_FINITE: dict[str, Callable[[], Tensor]] = {
    "one NaN": lambda: _with(float("nan"), (3, 4)),
    "all NaN": lambda: torch.full((8, 8), float("nan")),
    "one inf": lambda: _with(float("inf"), (0, 0)),
    "inf and -inf": lambda: _with(float("-inf"), (11, 19)) + _with(float("inf"), (2, 2)),
    "NaN in one row": lambda: _with(float("nan"), (5,)),
}


# -------------------------------------------------------------------------------------------------------------- layouts

# A weight [out, in, kh, kw] in every storage that a caller may have: the same values, another place in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda W: W.contiguous(),
    "channels_last": lambda W: W.contiguous(memory_format=torch.channels_last),
    "transposed": lambda W: W.permute(*reversed(range(W.dim()))).contiguous().permute(*reversed(range(W.dim()))),
    "sliced": lambda W: _slice_of_larger(W),
    "strided": lambda W: torch.stack([W, torch.full_like(W, float("nan"))], -1)[..., 0],
}


def _slice_of_larger(W: Tensor) -> Tensor:
    """`W` in the middle of a tensor full of NaN: whoever reads past an edge shows it."""
    larger = torch.full([size + 3 for size in W.shape], float("nan"), dtype=W.dtype, device=W.device)
    view = larger[tuple(slice(1, 1 + size) for size in W.shape)]
    view.copy_(W)
    return view


# ----------------------------------------------------------------------------------------------------------- tolerances

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tolerance:
    """|loss - wanted| <= loss |wanted| + loss_absolute and
    ||gradient - wanted||_F <= gradient ||wanted||_F + gradient_absolute * 2 / ||W||_F: 2 / ||W|| is the scale of the
    parts of a gradient, which cancel where all energy is above k or all is below."""

    loss: float
    gradient: float
    loss_absolute: float = 1e-7
    gradient_absolute: float = 1e-6


# Against float64 at the same k. 16-bit weights: what rounding the gradient to them costs.
TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("exact", torch.float64): Tolerance(1e-12, 1e-9, 1e-14, 1e-14),
    ("exact", torch.float32): Tolerance(1e-6, 2e-5),
    ("exact", torch.bfloat16): Tolerance(1e-6, 4e-3),
    ("exact", torch.float16): Tolerance(1e-6, 1e-3),
}

TIE_MARGIN = 1e-9  # below this difference of two tail energies' distances from the target, either k is right


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted||_F / ||wanted||_F in float64, with 0 / 0 = 0."""
    difference = (got.double().cpu() - wanted.double().cpu()).norm()
    return float(difference / wanted.double().cpu().norm()) if difference != 0 else 0.0
