"""Triton kernels: on the GPU where there is one, in Triton's interpreter elsewhere; and what ptxas makes of them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from aot import ROOT, CompiledKernel, KernelSpec, compile_kernels
from kernel_cases import DEVICE, FP32_GRADE, SIZES, Storage, matrices, relative_error, symmetric, tiles

from rpg_fast.kernels import grouped_product as gp
from rpg_fast.kernels.launches import Launcher

both_storages = pytest.mark.parametrize("storage", [Storage(False), Storage(True)], ids=["fp32", "pairs"])
both_blocks = pytest.mark.parametrize("block", [64, 128])


@both_storages
@both_blocks
def test_square_matches_float64(storage: Storage, block: int) -> None:
    plan = tiles.plan_tiles(SIZES, block=block, device=DEVICE)
    stored = storage.store(matrices(), plan)
    out = torch.full_like(stored, torch.nan)
    assert gp.grouped_product(stored, stored, plan, out=out) is out
    assert not out.isnan().any(), "an element of the output was not written"
    for a, got in zip(matrices(), storage.load(out, plan), strict=True):
        assert relative_error(got, a @ a) < FP32_GRADE
        assert torch.equal(got, got.T)
    for start, p, m in zip(plan.starts, plan.padded, plan.sizes, strict=True):
        padded = out[..., start : start + p * p].unflatten(-1, (p, p))
        assert not padded[..., m:, :].any()
        assert not padded[..., :, m:].any()


@both_storages
def test_polynomial_step_matches_float64(storage: Storage) -> None:
    """X <- a X + (b A + c A A) X with A = X X, other coefficients for every matrix; the last addend is overwritten."""
    plan = tiles.plan_tiles(SIZES, device=DEVICE)
    coefficients = torch.rand(3, len(SIZES), generator=torch.Generator().manual_seed(7)) * 4 - 2
    a, b, c = coefficients.to(DEVICE)
    x = storage.store(matrices(), plan)
    square = gp.grouped_product(x, x, plan)
    inner = gp.grouped_product(square, square, plan, alpha=c, addend=square, beta=b)
    scratch = x.clone()
    got = gp.grouped_product(inner, x, plan, addend=scratch, beta=a, out=scratch)
    assert got is scratch
    for value, result, (ai, bi, ci) in zip(
        matrices(), storage.load(got, plan), coefficients.double().T.tolist(), strict=True
    ):
        power = value @ value
        assert relative_error(result, ai * value + (bi * power + ci * power @ power) @ value) < FP32_GRADE


@both_storages
def test_only_matrices_with_a_stage_left_take_part(storage: Storage) -> None:
    """Coefficients at any stride, as the columns of one table; the others keep their bits."""
    sizes, stages = (96, 147, 64, 33), (3, 2, 0, 4)
    plan = tiles.plan_tiles(sizes, device=DEVICE)
    table = torch.randn(len(sizes), 3, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    stored = storage.store(matrices(sizes), plan)
    out = torch.full_like(stored, torch.nan)
    gp.grouped_product(
        stored, stored, plan, alpha=table[:, 2], addend=stored, beta=table[:, 1], out=out,
        stages=torch.tensor(stages, dtype=torch.int32, device=DEVICE), stage=2,
    )  # fmt: skip
    for value, (_, beta, alpha), got, n in zip(
        matrices(sizes), table.double().tolist(), storage.load(out, plan), stages, strict=True
    ):
        if n > 2:
            assert relative_error(got, alpha * value @ value + beta * value) < FP32_GRADE
        else:
            assert got.isnan().all()


@both_storages
def test_same_bits_each_time(storage: Storage) -> None:
    sizes = (96, 147)
    plan = tiles.plan_tiles(sizes, device=DEVICE)
    stored = storage.store(matrices(sizes), plan)
    assert torch.equal(gp.grouped_product(stored, stored, plan), gp.grouped_product(stored, stored, plan))


def test_scales_and_zero_matrices_in_one_launch() -> None:
    factors = (1e12, 1e-12, 0.0, 1.0, 1e-6)
    sizes = (64, 147, 96, 128, 33)
    values = [(a * f).float().double() for a, f in zip(matrices(sizes), factors, strict=True)]
    plan = tiles.plan_tiles(sizes, device=DEVICE)
    flat = tiles.pack(values, plan)
    for value, got in zip(values, tiles.unpack(gp.grouped_product(flat, flat, plan), plan), strict=True):
        if value.any():
            assert relative_error(got, value @ value) < FP32_GRADE
        else:
            assert not got.any()


def test_pairs_hold_scaled_matrices() -> None:
    factors, sizes = (1e12, 1e-12, 0.0), (64, 147, 96)
    values = [(a * f).float().double() for a, f in zip(matrices(sizes), factors, strict=True)]
    plan = tiles.plan_tiles(sizes, device=DEVICE)
    flat = tiles.pack(values, plan)
    scales = gp.matrix_scales(flat, plan)
    joined = tiles.unpack(tiles.join_pairs(tiles.split_pairs(flat, scales, plan)), plan)
    for value, scale, got in zip(values, scales.tolist(), joined, strict=True):
        error = (got.cpu().double() - scale * value).abs()
        assert bool((error <= 2.0**-22 * (scale * value).abs() + 2.0**-35).all())


def test_scales_are_powers_of_two_for_any_magnitude() -> None:
    largest = torch.tensor([3.4e38, 1.0, 1.999, 1e-30, 1.2e-38, 1e-45, 0.0])
    plan = tiles.plan_tiles([1] * len(largest), block=16, device=DEVICE)
    scales = gp.matrix_scales(tiles.pack([-value.view(1, 1) for value in largest], plan), plan).cpu()
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    scaled = (scales * largest)[:5]
    assert bool(((scaled >= 1) & (scaled < 4)).all())
    assert torch.equal(scaled[1:4] < 2, torch.ones(3, dtype=torch.bool))


@both_storages
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_a_number_stays_in_its_matrix(storage: Storage, bad: float) -> None:
    sizes = (64, 147, 33)
    plan = tiles.plan_tiles(sizes, device=DEVICE)
    clean = storage.store(matrices(sizes), plan)
    want = storage.load(gp.grouped_product(clean, clean, plan), plan)
    values = matrices(sizes)
    values[1][70, 5] = values[1][5, 70] = bad
    dirty = storage.store(values, plan)
    got = storage.load(gp.grouped_product(dirty, dirty, plan), plan)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if index == 1:
            assert not one[70].isfinite().any()
            assert not one[5].isfinite().any()
            assert storage.pairs or not one.isfinite().any(), "finite elements that scaling made wrong"
        else:
            assert torch.equal(one, other)


def test_every_matrix_of_a_large_batch() -> None:
    sizes = [16 * (b % 3 + 1) for b in range(12)]
    plan = tiles.plan_tiles(sizes, block=16, device=DEVICE)
    flat = tiles.pack(matrices(sizes), plan)
    got = tiles.unpack(gp.grouped_product(flat, flat, plan, block_k=16), plan)
    assert all(relative_error(c, a @ a) < FP32_GRADE for a, c in zip(matrices(sizes), got, strict=True))


def test_tables_of_a_plan() -> None:
    sizes = (65, 200, 1, 64)
    plan = tiles.plan_tiles(sizes, device=DEVICE)
    assert plan.orders.tolist() == list(sizes)
    assert (plan.rows, plan.row_starts.tolist()) == (128 + 256 + 64 + 64, [0, 128, 384, 448])
    for b, (first, end) in enumerate(plan.tile_starts.tolist()):
        side = plan.padded[b] // 64
        want = [[plan.starts[b] // 64**2, side, i, j, b] for i in range(side) for j in range(i + 1)]
        assert plan.tiles[first:end].tolist() == want
        want = [[plan.starts[b] // 64**2, side, i, plan.row_starts[b] // 64, b] for i in range(side)]
        assert plan.row_blocks[plan.row_blocks[:, 4] == b].tolist() == want
    assert plan.tiles[0].tolist()[4] == 1, "the largest matrix first"
    assert {t.dtype for t in (plan.tiles, plan.tile_starts, plan.orders, plan.row_starts, plan.row_blocks)} == {
        torch.int32
    }


def test_no_matrices() -> None:
    plan = tiles.plan_tiles([], device=DEVICE)
    assert plan.tiles.shape == (0, 5)
    assert gp.grouped_product(tiles.pack([], plan), tiles.pack([], plan), plan).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs 20 GB on a GPU")
@both_storages
def test_offsets_past_two_to_the_31(storage: Storage) -> None:
    plan = tiles.plan_tiles((46_336, 1024, 64), device=DEVICE)
    plan = dataclasses.replace(plan, tiles=plan.tiles[plan.tiles[:, 4] == 2].contiguous())  # only the last matrix
    last = tiles.plan_tiles((64,), device=DEVICE)
    value = symmetric(64, 0)
    small = storage.store([value], last)
    stored = torch.zeros((*small.shape[:-1], plan.numel), dtype=small.dtype, device=DEVICE)
    stored[..., -last.numel :] = small
    scales = None if storage.pairs else torch.ones(3, device=DEVICE)
    out = gp.grouped_product(stored, stored, plan, left_scale=scales, right_scale=scales)
    assert relative_error(storage.load(out[..., -last.numel :].contiguous(), last)[0], value @ value) < FP32_GRADE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, v: {"left": v.double()}, "left must be contiguous .* got .*float64"),
        (lambda p, v: {"right": v[:-1]}, "right must be contiguous"),
        (lambda p, v: {"out": v}, "out shares memory"),
        (lambda p, v: {"beta": torch.ones(2, device=DEVICE)}, "beta is given without an addend"),
        (lambda p, v: {"alpha": torch.ones(3, device=DEVICE)}, r"alpha must be \(2,\)"),
        (
            lambda p, v: {
                "addend": v,
                "alpha": torch.ones(2, 3, device=DEVICE)[:, 0],
                "beta": torch.ones(2, device=DEVICE),
            },
            r"alpha and beta must have one stride, got \(3,\) and \(1,\)",
        ),
        (lambda p, v: {"stages": torch.ones(2, device=DEVICE)}, r"stages must be \(2,\) torch.int32"),
        (lambda p, v: {"block_k": 48}, "block_k must divide the plan's block 64, got 48"),
        (lambda p, v: {"addend": torch.zeros(2, p.numel, device=DEVICE).half()}, "addend must be contiguous"),
    ],
)
def test_bad_input_is_named(change, message: str) -> None:
    plan = tiles.plan_tiles([64, 65], device=DEVICE)
    flat = tiles.pack(matrices([64, 65]), plan)
    arguments = {"left": flat, "right": flat, "plan": plan} | change(plan, flat)
    with pytest.raises(ValueError, match=message):
        gp.grouped_product(**arguments)


def test_pairs_take_no_scales() -> None:
    plan = tiles.plan_tiles([64], device=DEVICE)
    pairs = Storage(True).store(matrices([64]), plan)
    with pytest.raises(ValueError, match="are for fp32 storage"):
        gp.grouped_product(pairs, pairs, plan, left_scale=torch.ones(1, device=DEVICE))


def test_bad_plans_are_named() -> None:
    with pytest.raises(ValueError, match="got 0 in"):
        tiles.plan_tiles([64, 0])
    with pytest.raises(ValueError, match="got 46337"):
        tiles.plan_tiles([46_337])
    with pytest.raises(ValueError, match="power of two of at least 16, got 48"):
        tiles.plan_tiles([64], block=48)
    with pytest.raises(ValueError, match=r"got shapes \[\(64, 63\)\]"):
        tiles.pack([torch.zeros(64, 63)], tiles.plan_tiles([64]))


def test_the_package_imports_no_triton() -> None:
    code = "import sys, rpg_fast.kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def product_spec(
    arch: int, *, pairs: bool, step: str = "full", block: int = 64, block_k: int = 32, num_warps: int = 4
) -> KernelSpec:
    """One of the products of a filter: all arguments (b A + c A A), no alpha (a Y + B Y) or none of them (Y Y)."""
    storage = "*fp16" if pairs else "*fp32"
    signature = dict.fromkeys(("left_ptr", "right_ptr", "out_ptr"), storage)
    signature |= {"tiles_ptr": "*i32", "stages_ptr": "*i32", "numel": "i32"}
    anywhere = {"factor_stride": "i32", "stage": "i32"}
    constants = {"PAIRS": pairs, "BLOCK": block, "BLOCK_K": block_k}
    for name in ("alpha_ptr", "beta_ptr", "addend_ptr"):
        if step == "square" or (step == "odd" and name == "alpha_ptr"):
            constants |= {name: None}
        elif name == "addend_ptr":
            signature |= {name: storage}
        else:
            anywhere |= {name: "*fp32"}
    scales = ("left_scale_ptr", "right_scale_ptr")
    if pairs:
        constants |= dict.fromkeys(scales)
    else:
        signature |= dict.fromkeys(scales, "*fp32")
    kernel = "rpg_fast.kernels.grouped_product:_grouped_product_kernel"
    return KernelSpec(kernel, arch, signature | anywhere, constants, tuple(signature), num_warps=num_warps)


class Launched:
    """In the place of a kernel and of its binary: notes the launches, answers with `returned`."""

    def __init__(self, returned: Launched | None) -> None:
        self.returned = returned
        self.launches: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Launched | None]:
        def launch(*arguments: int, **options: int) -> Launched | None:
            self.launches.append((grid, arguments, options))
            return self.returned

        return launch


def test_launcher_searches_for_the_binary_once() -> None:
    binary = Launched(None)
    kernel = Launched(binary)
    launcher = Launcher(kernel, (7, 2), num_warps=8)
    for draw in range(3):
        launcher(draw)
    assert kernel.launches == [((7, 2, 1), (0,), {"num_warps": 8})]
    assert binary.launches == [((7, 2, 1), (1,), {}), ((7, 2, 1), (2,), {})]


def test_launcher_without_binaries_or_programs() -> None:
    interpreted, idle = Launched(None), Launched(None)
    launcher, nothing = Launcher(interpreted, (7,)), Launcher(idle, (0, 2))
    for draw in range(2):
        launcher(draw)
        nothing(draw)
    assert [arguments for _, arguments, _ in interpreted.launches] == [(0,), (1,)]
    assert idle.launches == []


PRODUCT_SPECS = [product_spec(arch, pairs=pairs) for arch in (80, 90, 100) for pairs in (False, True)]
PRODUCT_SPECS += [product_spec(arch, pairs=True, step=step) for arch in (80, 90, 100) for step in ("odd", "square")]
PRODUCT_SPECS += [product_spec(90, pairs=pairs, block=128, num_warps=8) for pairs in (False, True)]


@pytest.fixture(scope="module")
def compiled_products() -> list[CompiledKernel]:
    return compile_kernels(PRODUCT_SPECS)


def test_ahead_of_time_without_spills_on_tensor_cores(compiled_products: list[CompiledKernel]) -> None:
    for kernel in compiled_products:
        print(kernel)
        if kernel.spec.constants["BLOCK"] == 64:  # larger tiles are for the benchmark to try
            assert (kernel.stack, kernel.local) == (0, 0), f"spills: {kernel}"
        assert kernel.instructions, f"no tensor-core instruction: {kernel}"
        if kernel.spec.arch == 90:
            assert kernel.instructions.get("HGMMA"), f"no wgmma: {kernel}"
