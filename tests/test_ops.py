"""The whole table of ops on every device and dtype: schema, fake, autograd; equal to the reference; fully written
outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import DTYPES, LAYOUTS, make_weight, seeded
from torch import Tensor

from rpg_fast import _ops, filtered, ledger, reference
from rpg_fast.masks import MaskLayout, PackedMasks

# What one block does for one matrix in rank_filter: compared in test_spectrum_kernels.py, up to signs and rotations.
PIECES = {name for name in _ops.SCHEMAS if hasattr(ledger, name)} | {"device_table"}

Arguments = list[Any]
Sample = Callable[[torch.device, torch.dtype], Iterator[Arguments]]

MEANING: dict[str, Callable[..., Any]] = {
    name: getattr(reference, name) for name in _ops.SCHEMAS if hasattr(reference, name)
} | {"rank_filter": filtered.rank_filter, "rank_attach": lambda weights, loss, *spectra: loss.clone()}


# -------------------------------------------------------------------------------------------------------------- samples


def rank_weights(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Odd sizes, every storage, an all-zero weight, zero rows, an empty one, one row."""
    four = [
        LAYOUTS[layout](make_weight("power-0.8", (10, 5, 3, 3), 0.6, "rows", seed=i).to(device, dtype))
        for i, layout in enumerate(LAYOUTS)
    ]
    two = [make_weight("power-0.5", shape).to(device, dtype) for shape in ((33, 7), (1, 9), (70, 131))]
    return [*four, *two, torch.zeros(4, 6, device=device, dtype=dtype), torch.empty(0, 3, device=device, dtype=dtype)]


def double(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)


def project_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    for tail_energy, min_sparsity in ((0.1, 0.0), (0.3, 0.5)):
        yield [rank_weights(device, dtype), double(tail_energy, device), min_sparsity]


def filter_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    weights = rank_weights(device, dtype)
    windows = torch.zeros(len(weights), 2, dtype=torch.float64, device=device)
    yield [weights, double(0.1, device), 0.0, windows, torch.tensor(5, device=device), 8, []]


def spectra(weights: list[Tensor]) -> list[Tensor]:
    """projector, inv_norms, shares of the weights."""
    *_, inv_norms, shares, projector = reference.rank_project(weights, double(0.1, weights[0].device), 0.0)
    return [projector, inv_norms, shares]


def attach_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    weights = rank_weights(device, dtype)
    projector, inv_norms, shares = spectra(weights)
    loss = projector.new_full((), -0.1)
    yield [weights, loss, projector, inv_norms, shares, False]
    yield [
        [w.clone(memory_format=torch.preserve_format).requires_grad_() for w in weights],
        loss,
        projector,
        inv_norms,
        shares,
        True,
    ]


def apply_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    weights = rank_weights(device, dtype)
    yield [weights, *spectra(weights), double(-2.5, device)]
    yield [weights, *spectra(weights), double(-2.5, torch.device("cpu"))]


def apply_in_place_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    weights = rank_weights(device, dtype)
    grads = [torch.randn(w.shape, generator=seeded(i)).to(device, dtype) for i, w in enumerate(weights)]
    grads[3] = LAYOUTS["channels_last"](grads[3])
    yield [grads, weights, *spectra(weights), double(3.0, device)]


def mask_layout(device: torch.device, dtype: torch.dtype) -> tuple[MaskLayout, list[Tensor], Tensor]:
    """A layout of many sizes and storages, its tensors as views whose row-major order is that of the bits, and bits."""
    shapes = [(13,), (1024,), (1025,), (0,), (3, 5, 2), (7, 5, 3, 3), (6, 5, 3, 3)]
    tensors = [torch.randn(s, generator=seeded(i)).to(device, dtype) for i, s in enumerate(shapes)]
    tensors[5], tensors[6] = LAYOUTS["channels_last"](tensors[5]), LAYOUTS["sliced"](tensors[6])
    layout = MaskLayout.of(tensors)
    masks = [(torch.rand(t.shape, generator=seeded(9 + i)) < 0.5).to(device) for i, t in enumerate(tensors)]
    return layout, layout.views(tensors), reference.pack(layout.views(masks), layout.offsets, layout.nbytes)


def pack_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    layout, views, _ = mask_layout(device, dtype)
    yield [[v > 0 for v in views], layout.offsets, layout.nbytes]
    strided = [torch.stack([v > 0, v <= 0], -1)[..., 0] for v in views]
    yield [strided, layout.offsets, layout.nbytes + 128]  # more bytes than segments


def unpack_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    layout, _, bits = mask_layout(device, dtype)
    yield [bits, layout.offsets, layout.numels]
    yield [bits, layout.offsets[1:3], layout.numels[1:3]]
    yield [bits, [], []]


def mask_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    layout, views, bits = mask_layout(device, dtype)
    offsets = [*layout.offsets[:5], -1, layout.offsets[6]]
    views[0][0], views[2][3] = torch.nan, torch.inf
    for scale in (None, double(0.3, device), torch.tensor(0.5, device=device), double(0.25, torch.device("cpu"))):
        yield [[v.clone(memory_format=torch.preserve_format) for v in views], bits, offsets, scale]
    yield [[], bits, [], None]


def select_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    layout, views, bits = mask_layout(device, dtype)
    tied = [(4 * v).round() / 4 for v in views]
    tied[1][:5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], device=device, dtype=dtype)
    per_tensor = torch.tensor([5, 0, 1025, 3, -2, 100, 10_000], device=device)
    everything = torch.tensor([900], device=device)
    for scores in (views, tied):
        for eligible in (None, bits, ~bits):
            for absolute in (False, True):
                yield [scores, per_tensor, layout.offsets, layout.nbytes, eligible, absolute, True]
                yield [scores, everything, layout.offsets, layout.nbytes, eligible, absolute, False]


def optimizer_tensors(
    device: torch.device, dtype: torch.dtype, states: int
) -> tuple[list[list[Tensor]], Tensor, list[int]]:
    """[params, grads, state, ...] as views in the order of the bits, the bits, and offsets of which one is "no
    mask"."""
    layout, params, bits = mask_layout(device, dtype)
    grads = [torch.randn(p.shape, generator=seeded(40 + i)).to(device, dtype) for i, p in enumerate(params)]
    wide = reference.accumulation_dtype(params)
    state = [
        [torch.rand(p.shape, generator=seeded(60 + 10 * s + i)).to(device, wide) for i, p in enumerate(params)]
        for s in range(states)
    ]
    return [params, grads, *state], bits, [*layout.offsets[:2], -1, *layout.offsets[3:]]


def sgd_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    found = torch.zeros(1, device=device)
    for momentum, dampening, decay, nesterov, maximize, first, masked, scale, inf in (
        (0.0, 0.0, 0.0, False, False, False, False, None, None),
        (0.0, 0.0, 0.1, False, True, True, True, None, None),
        (0.9, 0.5, 0.1, False, False, False, True, None, None),
        (0.9, 0.0, 0.1, True, True, True, True, torch.tensor(8.0, device=device), found),
        (0.9, 0.0, 0.0, True, False, False, True, None, found + 1),
    ):
        (params, grads, buffers), bits, offsets = optimizer_tensors(device, dtype, 1)
        yield [
            params, grads, buffers if momentum else [], bits if masked else None,
            offsets if masked else [-1] * len(params), double(0.1, device), momentum, dampening, decay, nesterov,
            maximize, first, scale, inf,
        ]  # fmt: skip


def adamw_samples(device: torch.device, dtype: torch.dtype) -> Iterator[Arguments]:
    found = torch.zeros(1, device=device)
    for amsgrad, maximize, masked, scale, inf in (
        (False, False, False, None, None),
        (True, True, True, torch.tensor(8.0, device=device), found),
        (True, False, True, None, found + 1),
    ):
        (params, grads, means, squares, maxima), bits, offsets = optimizer_tensors(device, dtype, 3)
        steps = [torch.full((), float(i), device=device) for i in range(len(params))]
        yield [
            params, grads, means, squares, maxima if amsgrad else [], steps, bits if masked else None,
            offsets if masked else [-1] * len(params), double(0.1, device), 0.9, 0.99, 1e-6, 0.1, amsgrad, maximize,
            scale, inf,
        ]  # fmt: skip


SAMPLES: dict[str, Sample] = {
    "rank_project": project_samples,
    "rank_filter": filter_samples,
    "rank_attach": attach_samples,
    "rank_apply": apply_samples,
    "rank_apply_": apply_in_place_samples,
    "pack": pack_samples,
    "unpack": unpack_samples,
    "popcount": unpack_samples,
    "mask_": mask_samples,
    "select_topk": select_samples,
    "masked_sgd_": sgd_samples,
    "masked_adamw_": adamw_samples,
}

every_op = pytest.mark.parametrize("name", SAMPLES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _several_threads(_one_thread: None) -> None:
    torch.set_num_threads(3)


def op(name: str) -> Any:
    return getattr(torch.ops.rpg_fast, name).default


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach()]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def run(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """Everything that a call returns or changes: its results, and its arguments afterwards."""
    arguments = copy.deepcopy(arguments)
    return tensors_in(function(*arguments)) + tensors_in(arguments)


def assert_agree(got: list[Tensor], wanted: list[Tensor], exact: bool) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if exact or not a.is_floating_point():
            assert torch.equal(a, b) or torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
            continue
        digits = {torch.float64: 1e-9, torch.float32: 2e-5}.get(a.dtype, 2 * torch.finfo(a.dtype).eps)
        scale = float(b.nan_to_num().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=digits, atol=0.1 * digits * scale, equal_nan=True)


# ------------------------------------------------------------------------------------------------------------ the tests


def test_every_op_has_samples_and_a_meaning() -> None:
    assert set(SAMPLES) | PIECES == set(_ops.SCHEMAS) == set(MEANING) | PIECES


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Aliases and mutations as the schema says, the fake's shapes, strides and dtypes, autograd's and AOT's
    registration."""
    samples = list(SAMPLES[name](device, dtype))
    for arguments in samples if dtype == torch.float32 and len(samples) < 6 else samples[:2]:
        torch.library.opcheck(op(name), tuple(arguments))


@every_op
@every_dtype
def test_kernels_mean_what_the_reference_says(name: str, dtype: torch.dtype, device: torch.device) -> None:
    exact = name in ("pack", "unpack", "popcount", "mask_", "select_topk", "rank_attach")
    for arguments in SAMPLES[name](device, dtype):
        assert_agree(run(op(name), arguments), run(MEANING[name], arguments), exact)


@every_op
@every_dtype
@pytest.mark.usefixtures("poisoned_memory")
def test_outputs_are_fully_written(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Fresh memory holds NaN and the largest integers here; results are as in clean memory, and the same every time."""
    for arguments in SAMPLES[name](device, dtype):
        torch.utils.deterministic.fill_uninitialized_memory = False
        clean = run(op(name), arguments)
        torch.utils.deterministic.fill_uninitialized_memory = True
        for _ in range(2):
            assert_agree(run(op(name), arguments), clean, exact=True)


@pytest.mark.usefixtures("poisoned_memory")
def test_poison_works(device: torch.device) -> None:
    assert torch.empty(3, device=device).isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_gradients_lie_as_the_weights(layout: str, device: torch.device) -> None:
    weight = LAYOUTS[layout](make_weight("kaiming", (6, 4, 3, 3)).to(device))
    [gradient] = torch.ops.rpg_fast.rank_apply([weight], *spectra([weight]), double(1.0, device))
    assert gradient.stride() == weight.stride()


def test_ops_compile_into_one_graph(device: torch.device) -> None:
    """A masked step on fixed buffers, compiled whole: what a captured training step would hold."""
    [(params, grads, buffers), bits, offsets] = optimizer_tensors(device, torch.float32, 1)
    lr = double(0.1, device)

    def step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], bits: Tensor) -> Tensor:
        torch.ops.rpg_fast.masked_sgd_(
            params, grads, buffers, bits, offsets, lr, 0.9, 0.0, 1e-4, True, False, False, None, None
        )
        return sum((p.sum() for p in params), torch.zeros((), device=device))

    arguments = [params, grads, buffers, bits]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_agree(run(compiled, arguments), run(step, arguments), exact=False)


def test_writing_ops_count_versions(device: torch.device) -> None:
    weight = torch.ones(8, device=device, requires_grad=True)
    masks = PackedMasks({"weight": weight})
    loss = weight.square().sum()  # backward needs the weight as it is now
    with torch.no_grad():
        torch.ops.rpg_fast.mask_([weight], masks.bits, masks.layout.offsets, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
