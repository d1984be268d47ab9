"""The gradient of the rank loss, from the weights to the gradients where they lie, on the GPU or in the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from aot import CompiledKernel, KernelSpec, compile_kernels
from cases import HOSTILE_FINITE, LAYOUTS, RESNET50, TOLERANCES, Shape, make_weight, relative_error
from kernel_cases import DEVICE, FP32_GRADE, symmetric
from torch import Tensor

from rpg_fast import grouping, reference
from rpg_fast.kernels import apply

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES: list[Shape] = [(64, 3, 7, 7), (130, 65), (65, 200), (1, 33), (33, 1), (128, 4, 3, 3), (72, 132)]
WEIGHT = torch.tensor(2.5)


@dataclass
class Problem:
    """Weights with any symmetric N and any shares: the kernel does not ask where they come from."""

    weights: list[Tensor]
    projector: Tensor
    inv_norms: Tensor
    shares: Tensor

    @property
    def arguments(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        return self.weights, self.projector, self.inv_norms, self.shares

    def wanted(self, weight: Tensor = WEIGHT) -> list[Tensor]:
        """In float64."""
        precise = [w.double() for w in self.weights]
        return reference.rank_apply(precise, self.projector.double(), self.inv_norms, self.shares, weight)

    def offsets(self) -> list[int]:
        return grouping.projector_offsets(self.weights)


def problem(weights: Sequence[Tensor]) -> Problem:
    weights = [w.to(DEVICE) for w in weights]
    blocks = [2 * symmetric(m, b).float().flatten() for b, w in enumerate(weights) if (m := grouping.short_side(w))]
    norms = torch.stack([w.double().norm() for w in weights])
    shares = torch.rand(len(weights), dtype=torch.float64).to(DEVICE) + 0.1
    return Problem(weights, torch.cat(blocks).to(DEVICE), torch.where(norms > 0, 1 / norms, 0.0), shares)


def gradients_like(weights: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the size of what is added, with the strides and dtypes of their weights."""
    filled = [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device) for w in weights]
    return [
        grad.copy_(torch.randn(grad.shape).to(DEVICE) * want.abs().mean())
        for grad, want in zip(filled, wanted, strict=True)
    ]


def check(p: Problem, tolerance: float = FP32_GRADE, fast: bool = False) -> None:
    wanted = p.wanted()
    written = apply.rank_apply(*p.arguments, WEIGHT, fast=fast)
    grads = gradients_like(p.weights, wanted)
    before = [grad.double() for grad in grads]
    apply.rank_apply_(grads, *p.arguments, WEIGHT, fast=fast)
    for w, got, added, want, old in zip(p.weights, written, grads, wanted, before, strict=True):
        assert (got.dtype, got.stride()) == (w.dtype, torch.empty_like(w).stride())
        assert relative_error(got, want) < tolerance
        assert relative_error(added, old + want) < tolerance


def test_shapes() -> None:
    check(problem([make_weight("power-0.8", shape, 0.5, seed=i) for i, shape in enumerate(SHAPES)]))


def test_fast() -> None:
    check(problem([make_weight("power-0.8", shape) for shape in SHAPES]), tolerance=1e-3, fast=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """The interpreter cuts float32 off to bfloat16; a GPU rounds."""
    weights = [make_weight("power-0.8", shape).to(dtype) for shape in ((24, 10, 3, 3), (96, 2, 5, 5))]
    tolerance = FP32_GRADE if dtype == torch.float32 else TOLERANCES["exact", dtype].gradient
    check(problem([layout(W.to(DEVICE)) for layout in LAYOUTS.values() for W in weights]), tolerance)


def test_hostile_weights() -> None:
    """Subnormal results lose bits, as any float32 does."""
    hostile = [make() for name, make in HOSTILE_FINITE.items() if name != "largest float"]
    check(problem([make_weight("kaiming", (20, 30)), *hostile]))


@pytest.mark.parametrize("exponent", [100, -100])
def test_scale_does_not_matter(exponent: int) -> None:
    p = problem([make_weight("power-0.8", (40, 70)), make_weight("power-0.8", (70, 40))])
    scaled = Problem([w * 2.0**exponent for w in p.weights], p.projector, p.inv_norms * 2.0**-exponent, p.shares)
    for one, other in zip(
        apply.rank_apply(*p.arguments, WEIGHT), apply.rank_apply(*scaled.arguments, WEIGHT), strict=True
    ):
        assert torch.equal(one, other * 2.0**exponent)


def test_a_factor_below_float32_does_not_cost_accuracy() -> None:
    """weight * share / ||W||^2 over the power of two that the weights were multiplied with: 2^-132."""
    p, weight = problem([make_weight("kaiming", (20, 30))]), torch.tensor(2.0**-118)
    assert relative_error(apply.rank_apply(*p.arguments, weight)[0], p.wanted(weight)[0]) < FP32_GRADE


def test_weight_of_any_dtype_and_place() -> None:
    p = problem([make_weight("kaiming", (20, 30))])
    want = apply.rank_apply(*p.arguments, torch.tensor(0.5))[0]
    for weight in (torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float16, device=DEVICE)):
        assert torch.equal(apply.rank_apply(*p.arguments, weight)[0], want)
    assert not apply.rank_apply(*p.arguments, torch.tensor(0.0))[0].any()


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-300, float("inf")])
def test_a_number_of_the_host_reaches_the_device_as_it_is(value: float) -> None:
    assert apply._float64_table(torch.empty(0, device=DEVICE), value).tolist() == [value]


def test_a_share_of_zero_leaves_the_gradient_alone() -> None:
    p = problem([make_weight("kaiming", shape) for shape in ((20, 30), (30, 20), (12, 16), (16, 8, 3, 3))])
    p.shares[:3] = 0
    offsets = p.offsets()
    p.projector[: offsets[2]] = p.inv_norms[0] = torch.nan
    grads = [torch.full_like(w, -0.0) for w in p.weights]
    grads[0][3] = torch.nan
    grads[2] = torch.full((16, 12), -0.0, device=DEVICE).mT  # not as its weight
    bits = [grad.clone().view(torch.int32) for grad in grads]
    apply.rank_apply_(grads, *p.arguments, WEIGHT)
    assert all(torch.equal(grad.view(torch.int32), old) for grad, old in zip(grads[:3], bits[:3], strict=True))
    assert grads[3].any()
    written = apply.rank_apply(*p.arguments, WEIGHT)
    assert [bool(gradient.any()) for gradient in written] == [False, False, False, True]


def test_not_a_number_stays_in_its_matrix() -> None:
    p = problem([make_weight("kaiming", shape) for shape in ((20, 30), (30, 20), (12, 16))])
    clean = apply.rank_apply(*p.arguments, WEIGHT)
    offsets = p.offsets()
    p.projector[offsets[1] : offsets[2]] = p.inv_norms[1] = torch.nan
    p.weights[1][4, 4] = torch.nan
    dirty = apply.rank_apply(*p.arguments, WEIGHT)
    assert dirty[1].isnan().all()
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[2], clean[2])
    assert torch.equal(clean[0], apply.rank_apply(*p.arguments, WEIGHT)[0])


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("start", [0, 1])
def test_nothing_is_written_beside_a_slice(tall: bool, start: int) -> None:
    """Aligned and not: the neighbours keep their values, and NaN among the weight's neighbours is not read."""
    place = (slice(3, 71), slice(start, start + 40))
    larger = torch.full((80, 48), torch.nan, device=DEVICE)
    larger[place] = make_weight("kaiming", (68, 40)).to(DEVICE)
    p = problem([larger[place] if tall else larger[place].mT])
    guarded = torch.full((80, 48), 7.0, device=DEVICE)
    grad = guarded[place] if tall else guarded[place].mT
    apply.rank_apply_([grad], *p.arguments, WEIGHT)
    assert relative_error(grad, p.wanted()[0] + 7) < FP32_GRADE
    guarded[place] = 7
    assert bool((guarded == 7).all())


def test_gradients_that_lie_differently() -> None:
    weights = [make_weight("kaiming", (24, 10, 3, 3)).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    p = problem(weights)
    wanted = p.wanted()
    grads = [
        torch.ones(p.weights[0].shape, device=DEVICE).contiguous(memory_format=torch.channels_last),
        torch.ones(p.weights[1].shape, device=DEVICE, dtype=torch.float64),
    ]
    apply.rank_apply_(grads, *p.arguments, WEIGHT)
    assert all(relative_error(grad, want + 1) < FP32_GRADE for grad, want in zip(grads, wanted, strict=True))
    with pytest.raises(RuntimeError, match="must match the size"):
        apply.rank_apply_([torch.ones(3, 5, device=DEVICE)], *problem([torch.ones(4, 5)]).arguments, WEIGHT)


def test_empty_weights_and_float64() -> None:
    p = problem([torch.empty(0, 5), make_weight("kaiming", (20, 30)), torch.empty(5, 0, 3, 3)])
    got = apply.rank_apply(*p.arguments, WEIGHT)
    assert [g.shape for g in got] == [w.shape for w in p.weights]
    assert relative_error(got[1], p.wanted()[1]) < FP32_GRADE
    precise = Problem([w.double() for w in p.weights], p.projector.double(), p.inv_norms, p.shares)
    assert torch.equal(apply.rank_apply(*precise.arguments, WEIGHT)[1], p.wanted()[1])
    grads = [torch.zeros_like(w) for w in precise.weights]
    apply.rank_apply_(grads, *precise.arguments, WEIGHT)
    assert torch.equal(grads[1], p.wanted()[1])
    assert apply.rank_apply([], p.projector[:0], p.inv_norms[:0], p.shares[:0], WEIGHT) == []


@pytest.mark.full
@pytest.mark.parametrize("shape", RESNET50, ids=str)
def test_shapes_of_resnet50(shape: Shape) -> None:
    check(problem([make_weight("power-0.8", shape, 0.9)]))


# ------------------------------------------------------------------------------------------------------- ahead of time


def apply_spec(arch: int, dtype: str, rows: bool, aligned: bool, add: bool, pairs: bool) -> KernelSpec:
    signature = {"addresses_ptr": "*i64", "table_ptr": "*i64", "tiles_ptr": "*i32", "projector_ptr": "*fp32"}
    signature |= dict.fromkeys(("inv_norms_ptr", "shares_ptr", "weight_ptr"), "*fp64")
    tile = dict(apply.TILES[aligned])
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"TYPE": dtype, "ROWS": rows, "ALIGNED": aligned, "ADD": add, "PAIRS": pairs, **tile}
    return KernelSpec("rpg_fast.kernels.apply:_apply_kernel", arch, signature, constants, tuple(signature), **options)


def check_compiled(kernels: Sequence[CompiledKernel]) -> None:
    for kernel in kernels:
        arch, constants = kernel.spec.arch, kernel.spec.constants
        print(
            f"sm_{arch} {constants}: {kernel.registers} registers, {kernel.shared} B shared, "
            f"{kernel.wide_loads} wide loads, {kernel.instructions}"
        )
        if arch == 90 or constants["ALIGNED"]:
            assert (kernel.stack, kernel.local) == (0, 0), f"spills: {kernel}"
        assert kernel.instructions, f"no tensor-core instruction: {kernel}"
        assert kernel.instructions.get("HGMMA") or arch != 90, f"no wgmma: {kernel}"
        assert bool(kernel.wide_loads) == constants["ALIGNED"], f"hints: {kernel}"


def test_ahead_of_time() -> None:
    flags = itertools.product((True, False), repeat=3)
    specs = [apply_spec(90, "fp32", rows, aligned, True, pairs) for rows, aligned, pairs in flags]
    specs += [apply_spec(arch, "fp32", rows, True, True, True) for arch in (80, 100) for rows in (True, False)]
    check_compiled(compile_kernels(specs))


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_ahead_of_time_every_combination(arch: int) -> None:
    flags = itertools.product(("fp32", "bf16", "fp16"), *[(True, False)] * 4)
    check_compiled(compile_kernels([apply_spec(arch, *flag) for flag in flags]))
