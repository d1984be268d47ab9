"""The Gram matrices of weights where they lie against float64, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from aot import CompiledKernel, KernelSpec, compile_kernels
from cases import (
    FAMILIES,
    HOSTILE_FINITE,
    HOSTILE_NOT_FINITE,
    LAYOUTS,
    RESNET50,
    SUBNORMAL,
    Shape,
    make_weight,
    relative_error,
)
from kernel_cases import DEVICE, FP32_GRADE, tiles
from torch import Tensor

from rpg_fast import grouping, reference
from rpg_fast.kernels import gram

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES: list[Shape] = [(64, 3, 7, 7), (130, 65), (65, 1100), (1, 33), (33, 1), (128, 12, 3, 3)]
CPU = torch.device("cpu")
FINITE = {**HOSTILE_FINITE, **SUBNORMAL}


def on_device(weights: Sequence[Tensor]) -> list[Tensor]:
    """Copies that keep their strides."""
    return [w.to(DEVICE) for w in weights]


def check(weights: Sequence[Tensor]) -> gram.Grams:
    grams = gram.normalised_grams(weights)
    assert torch.equal(torch.frexp(grams.scales).mantissa, torch.full_like(grams.scales, 0.5)), "no power of two"
    for b, (W, got) in enumerate(zip(weights, tiles.unpack(tiles.join_pairs(grams.pairs), grams.plan), strict=True)):
        G, norm = reference.normalised_gram(grouping.short_side_first(W))
        scale, largest = float(grams.scales[b]), float(got.abs().max())
        assert relative_error(got / scale, G) < FP32_GRADE
        assert torch.equal(got, got.T)
        assert float(grams.norms[b]) == pytest.approx(float(norm), rel=1e-6, abs=0)
        assert int(grams.zeros[b]) == int((W == 0).sum())
        assert (0.5 < largest < 1 + 1e-6) if bool(W.any()) else (scale, largest) == (1, 0)
    return grams


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    grams = check(on_device([make_weight(family, shape, 0.5, seed=i) for i, shape in enumerate(SHAPES)]))
    for start, p, m in zip(grams.plan.starts, grams.plan.padded, grams.plan.sizes, strict=True):
        padded = grams.pairs[:, start : start + p * p].view(2, p, p)
        assert not padded[:, m:].any()
        assert not padded[:, :, m:].any()


def test_hostile_matrices_in_one_launch() -> None:
    check(on_device([W for make in FINITE.values() if (W := make()).numel()]))


def test_not_finite_matrices_are_zero_and_alone() -> None:
    good = make_weight("kaiming", (20, 70))
    weights = on_device([good, *(make() for make in HOSTILE_NOT_FINITE.values()), good])
    grams = gram.normalised_grams(weights)
    matrices = tiles.unpack(tiles.join_pairs(grams.pairs), grams.plan)
    alone = gram.normalised_grams(weights[:1])
    for b in (0, -1):
        assert torch.equal(matrices[b], tiles.unpack(tiles.join_pairs(alone.pairs), alone.plan)[0])
        assert grams.norms[b] == alone.norms[0]
    assert grams.norms[1:-1].isnan().all()
    assert not any(matrix.any() for matrix in matrices[1:-1])
    assert grams.scales[1:-1].tolist() == [1.0] * len(HOSTILE_NOT_FINITE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    weights = [make_weight("power-0.8", shape).to(dtype) for shape in ((24, 10, 3, 3), (96, 2, 5, 5))]
    check([layout(W.to(DEVICE)) for layout in LAYOUTS.values() for W in weights])


def test_slices_are_read_where_they_lie() -> None:
    larger = torch.full((90, 120), torch.nan, device=DEVICE)
    larger[4:80, 8:52] = make_weight("kaiming", (76, 44)).to(DEVICE)
    weights = [larger[4:80, 8:52], larger[4:80, 8:52].mT, larger[5:38, 9:52], larger[5:6, 8:52], larger[4:80, 9:10]]
    check(weights)
    plan = gram.plan_grams(tuple(gram.storage_of(w) for w in weights), weights[0].device)
    assert not any(plan.copied)
    assert {(c.rows, c.aligned) for c in plan.classes} == {(False, True), (True, False), (True, True), (False, False)}


def test_same_bits_each_time_at_any_scale() -> None:
    weights = on_device([make_weight("power-0.5", shape) for shape in ((40, 2500), (70, 65))])
    grams = gram.normalised_grams(weights)
    for exponent in (0, 100, -80):
        scaled = gram.normalised_grams([w * 2.0**exponent for w in weights])
        assert torch.equal(scaled.pairs, grams.pairs)
        assert torch.equal(scaled.norms, grams.norms * 2.0**exponent)


@pytest.mark.parametrize("shape", [(1, 1), (64, 147), (512, 4608), (1024, 2048), (4096, 16384), (40, 10**6)], ids=str)
def test_partial_tiles_take_little_memory(shape: Shape) -> None:
    plan = gram.plan_grams((gram.storage_of(torch.empty(1, 1).expand(shape))._replace(strides=(shape[1], 1)),), CPU)
    chunks, length = plan.table[0, 4:].tolist()
    assert (chunks - 1) * length < shape[1] <= chunks * length
    assert plan.partials <= max(gram.BUSY, len(plan.square.tiles))


def test_bad_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"weights must be float32, bfloat16 or float16, got torch\.float64"):
        gram.normalised_grams([torch.ones(3, 4, dtype=torch.float64, device=DEVICE)])
    with pytest.raises(ValueError, match=r"every matrix size must be in 1\.\.46336, got 0"):
        gram.normalised_grams([torch.ones(3, 4, device=DEVICE), torch.ones(0, 4, device=DEVICE)])


@pytest.mark.full
@pytest.mark.parametrize("shape", RESNET50, ids=str)
def test_shapes_of_resnet50(shape: Shape) -> None:
    check(on_device([make_weight("power-0.8", shape, 0.9)]))


# ------------------------------------------------------------------------------------------------------- ahead of time


def gram_spec(arch: int, dtype: str, rows: bool, aligned: bool) -> KernelSpec:
    signature = dict.fromkeys(("addresses_ptr", "table_ptr"), "*i64") | dict.fromkeys(("tiles_ptr", "bits_ptr"), "*i32")
    signature |= {"partials_ptr": "*fp32"}
    tile = dict(gram.GRAM_TILE)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"TYPE": dtype, "ROWS": rows, "ALIGNED": aligned, "BLOCK": gram.BLOCK, "RUN": gram.RUN, **tile}
    return KernelSpec("rpg_fast.kernels.gram:_gram_kernel", arch, signature, constants, tuple(signature), **options)


def helper_specs(arch: int) -> list[KernelSpec]:
    types = {"partials_ptr": "*fp32", "table_ptr": "*i64", "bits_ptr": "*i32", "norms_ptr": "*fp64"}
    types |= dict.fromkeys(("scales_ptr", "factors_ptr"), "*fp32") | {"pairs_ptr": "*fp16", "numel": "i32"}
    types |= {"addresses_ptr": "*i64", "elements_ptr": "*i32", "zeros_ptr": "*i64", "tiles_ptr": "*i32"}
    block = {"BLOCK": gram.BLOCK}
    found: list[tuple[str, list[str], dict]] = [
        ("norms", ["partials_ptr", "table_ptr", "bits_ptr", "norms_ptr", "scales_ptr", "factors_ptr"], {"BATCH": 8}),
        ("gather", ["partials_ptr", "table_ptr", "tiles_ptr", "factors_ptr", "pairs_ptr", "numel"], {}),
    ]
    for rows, aligned in itertools.product((True, False), repeat=2):
        constants = {"TYPE": "fp32", "ROWS": rows, "ALIGNED": aligned}
        names = ["addresses_ptr", "table_ptr", "elements_ptr", "bits_ptr", "zeros_ptr"]
        found.append(("statistics", [*names], constants))
    return [
        KernelSpec(
            f"rpg_fast.kernels.gram:_{name}_kernel", arch, {n: types[n] for n in names}, block | more, tuple(names)
        )
        for name, names, more in found
    ]


def check_compiled(kernels: Sequence[CompiledKernel]) -> None:
    for kernel in kernels:
        constants, name = kernel.spec.constants, kernel.spec.kernel.partition(":")[2]
        print(
            f"sm_{kernel.spec.arch} {name} {constants}: {kernel.registers} registers, {kernel.shared} B shared, "
            f"{kernel.wide_loads} wide loads, {kernel.instructions}"
        )
        if kernel.spec.arch == 90 or constants.get("ALIGNED", True):
            assert (kernel.stack, kernel.local) == (0, 0), f"spills: {kernel}"
        if name == "_gram_kernel":
            assert kernel.instructions.get("HGMMA") or kernel.spec.arch != 90, f"no wgmma: {kernel}"
            assert kernel.instructions, f"no tensor-core instruction: {kernel}"
        if "ALIGNED" in constants:
            assert bool(kernel.wide_loads) == constants["ALIGNED"], f"hints: {kernel}"


def test_ahead_of_time() -> None:
    specs = [gram_spec(90, "fp32", rows, aligned) for rows in (True, False) for aligned in (True, False)]
    specs += [gram_spec(arch, "fp32", rows, True) for arch in (80, 100) for rows in (True, False)]
    check_compiled(compile_kernels([*specs, gram_spec(90, "bf16", True, True), *helper_specs(90)]))


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_ahead_of_time_every_combination(arch: int) -> None:
    flags = itertools.product(("fp32", "bf16", "fp16"), (True, False), (True, False))
    check_compiled(compile_kernels([*(gram_spec(arch, *flag) for flag in flags), *helper_specs(arch)]))
