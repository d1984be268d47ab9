"""The whole of `rank_filter` by kernels against float64: on the GPU, or in the interpreter with blocks on the host."""

from __future__ import annotations

import re
from collections.abc import Sequence

import cases
import pytest
import torch
from aot import ROOT, KernelSpec, compile_kernels
from kernel_cases import DEVICE
from torch import Tensor

from rpg_fast import filtered, reference
from rpg_fast.kernels.rank_filter import rank_filter
from rpg_fast.ledger import COLUMNS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("loss", "tails", "ranks", "inv_norms", "shares", "projector", "windows", "lost")
GRADIENT, LOSS = 3e-4, 2e-5  # fp32 grade, relative; the loss 1e-7 beside


def run(
    weights: Sequence[Tensor],
    windows: Tensor | None = None,
    *,
    tail_energy: float = 0.1,
    min_sparsity: float = 0.0,
    rounds: int | None = None,
    by_eigen: Sequence[int] = (),
    seed: int = 5,
) -> dict[str, Tensor]:
    cold = windows is None
    if windows is None:
        windows = torch.zeros(len(weights), 2, dtype=torch.float64, device=DEVICE)
    rounds = rounds or (filtered.COLD_ROUNDS if cold else filtered.WARM_ROUNDS)
    target = torch.tensor(tail_energy, dtype=torch.float64, device=DEVICE)
    results = rank_filter(
        weights, target, min_sparsity, windows, torch.tensor(seed, device=DEVICE), rounds, tuple(by_eigen)
    )
    return dict(zip(NAMES, results, strict=True))


def check(
    weights: Sequence[Tensor], got: dict[str, Tensor], tail_energy: float = 0.1, min_sparsity: float = 0.0
) -> None:
    """All that is finite and resolved against the exact method in float64."""
    precise = [w.double().cpu() for w in weights]
    target = torch.tensor(tail_energy, dtype=torch.float64)
    loss, tails, ranks, inv_norms, shares, projector = reference.rank_project(precise, target, min_sparsity)
    wanted = reference.rank_apply(precise, projector, inv_norms, shares, torch.tensor(1.0))
    found = {name: tensor.cpu() for name, tensor in got.items()}
    assert not found["lost"].any()
    assert torch.equal(found["ranks"], ranks)
    torch.testing.assert_close(found["tails"], tails, rtol=LOSS, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(found["inv_norms"], inv_norms, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(found["shares"], shares)
    torch.testing.assert_close(found["loss"].double(), loss, rtol=LOSS, atol=1e-7)
    gradients = reference.rank_apply(
        precise, found["projector"].double(), found["inv_norms"], found["shares"], torch.tensor(1.0)
    )
    for b, (gradient, want) in enumerate(zip(gradients, wanted, strict=True)):
        assert cases.relative_error(gradient, want) < GRADIENT, b


SHAPES = [(72, 90), (96, 16, 3, 3), (200, 70), (48, 30), (64, 147), (130, 131)]


@pytest.mark.parametrize(
    ("family", "sparsity"),
    [
        ("power-0.5", 0.8),
        pytest.param("kaiming", 0.9, marks=pytest.mark.full),
        pytest.param("power-1.2", 0.0, marks=pytest.mark.full),
    ],
)
def test_a_cold_start_and_a_warm_call(family: str, sparsity: float) -> None:
    weights = [cases.make_weight(family, shape, sparsity).to(DEVICE) for shape in SHAPES]
    cold = run(weights)
    check(weights, cold)
    for w in weights:
        w += 2e-3 * w.norm() / w.numel() ** 0.5 * torch.randn(w.shape, generator=cases.seeded(1)).to(DEVICE)
    check(weights, run(weights, cold["windows"], rounds=2))


def test_hostile_weights_in_every_storage() -> None:
    """In one call what is zero, not finite, of rank one, of 16 bits, strided, small: nothing leaks to a neighbour."""
    good = cases.make_weight("power-0.5", (80, 9, 3, 3), 0.9)
    broken = good.clone()
    broken[3, 2] = torch.inf
    orthogonal = torch.linalg.qr(torch.randn(96, 96, generator=cases.seeded(4))).Q
    weights = {
        "good": good,
        "rank one": torch.outer(torch.randn(70, generator=cases.seeded(1)), torch.randn(90, generator=cases.seeded(2))),
        "zero": torch.zeros(66, 80),
        "zero, small": torch.zeros(5, 80),
        "broken": broken,
        "broken, small": torch.full((4, 8), torch.nan),
        "orthogonal": orthogonal,
        "orthogonal, by eigendecomposition": orthogonal,
        "huge": good * 1e30,
        "channels_last": good.contiguous(memory_format=torch.channels_last),
        "bfloat16": good.bfloat16(),
        "float16": good.half(),
        "one element": torch.tensor([[3.0]]),
    }
    names = list(weights)
    lying = [w.to(DEVICE) for w in weights.values()]
    got = {
        name: tensor.cpu() for name, tensor in run(lying, by_eigen=[names.index(n) for n in names if "by" in n]).items()
    }
    assert got["loss"].isnan()
    at = {name: index for index, name in enumerate(names)}
    N = got["projector"].split([min(w.shape[0], w[0].numel()) ** 2 for w in weights.values()])
    for name in names:
        b = at[name]
        if name.startswith("broken"):
            assert (int(got["ranks"][b]), bool(got["lost"][b])) == (-1, False)
            assert got["tails"][b].isnan()
            assert N[b].isnan().all()
        elif name.startswith("zero"):
            assert (int(got["ranks"][b]), float(got["tails"][b]), float(got["shares"][b])) == (0, 0.0, 0.0)
        elif name == "orthogonal":  # no window holds its boundary
            assert bool(got["lost"][b])
            assert (int(got["ranks"][b]), float(got["shares"][b])) == (-1, 0.0)
            assert not N[b].any()
        elif "orthogonal" in name:
            assert float(got["tails"][b]) == pytest.approx(0.1, abs=1 / 96)
            assert N[b].any()
        elif name != "rank one":
            alone = [weights[name]]
            target = torch.tensor(0.1, dtype=torch.float64)
            _, e, k, _, _, wanted = reference.rank_project([w.double() for w in alone], target, 0.0)
            assert int(got["ranks"][b]) == int(k), name
            assert float(got["tails"][b]) == pytest.approx(float(e), rel=LOSS, abs=1e-7)
            assert cases.relative_error(N[b], wanted) < GRADIENT
    assert float(got["tails"][at["rank one"]]) == pytest.approx(0, abs=1e-6)
    active = len(names) - 2
    assert float(got["shares"][at["good"]]) == pytest.approx(1 / active)


def test_few_zeros_and_another_tail_energy() -> None:
    weights = [cases.make_weight("kaiming", (70, 96), s).to(DEVICE) for s in (0.5, 0.7, 0.9)]
    sparsities = [float((w == 0).double().mean()) for w in weights]
    got = run(weights, tail_energy=0.2, min_sparsity=sparsities[1])
    check(weights, got, tail_energy=0.2, min_sparsity=sparsities[1])
    assert got["shares"].tolist() == [0.0, 0.5, 0.5]


def test_a_wrong_window_and_the_same_bits() -> None:
    weights = [cases.make_weight("power-0.5", (90, 128), 0.8).to(DEVICE)]
    cold = run(weights)
    check(weights, cold)
    wrong = cold["windows"] * torch.tensor([3.0, 1.0], dtype=torch.float64, device=DEVICE)
    first, second = run(weights, wrong), run(weights, wrong)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)
    if bool(first["lost"]):
        first = run(weights, first["windows"])
    check(weights, first)


def test_what_kernels_do_not_know_goes_to_plain_torch() -> None:
    weights = [cases.make_weight("kaiming", (70, 96)).double().to(DEVICE), torch.empty(0, 5, device=DEVICE)]
    check(weights, run(weights))


@pytest.mark.full
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.98])
def test_along_a_trajectory(family: str, sparsity: float) -> None:
    shapes = [(128, 1152), (256, 128), (130, 300), (64, 576)]
    weights = [cases.make_weight(family, shape, sparsity).to(DEVICE) for shape in shapes]
    windows = None
    for step in range(4):
        got = run(weights, windows, seed=step)
        check(weights, got)
        windows = got["windows"]
        for w in weights:
            drift = torch.randn(w.shape, generator=cases.seeded(step)).to(DEVICE) * (w != 0)
            w += 5e-3 * w.norm() / drift.norm() * drift
            if step == 1:  # a mask change
                w *= (torch.rand(w.shape, generator=cases.seeded(9)) > 0.3).to(DEVICE)


def test_ahead_of_time() -> None:
    doubles = ("ledger_ptr", "norms_ptr", "tails_ptr", "inv_norms_ptr", "shares_ptr", "windows_ptr")
    signature = dict.fromkeys(doubles, "*fp64") | dict.fromkeys(("zeros_ptr", "least_zeros_ptr", "ranks_ptr"), "*i64")
    signature |= {"filtered_ptr": "*i32", "loss_ptr": "*fp32", "lost_ptr": "*i1", "ends_ptr": "*fp32"}
    constants = {"COLUMNS": len(COLUMNS), "BLOCK": 64}
    kernel = "rpg_fast.kernels.rank_filter:_conclude_kernel"
    specs = [
        KernelSpec(kernel, arch, signature | {"batch": "i32"}, constants, tuple(signature)) for arch in (80, 90, 100)
    ]
    largest = {"values_ptr": "*fp32", "tiles_ptr": "*i32", "bits_ptr": "*i32"}
    absmax = "rpg_fast.kernels.grouped_product:_absmax_kernel"
    specs += [KernelSpec(absmax, arch, largest, {"BLOCK": 64}, tuple(largest)) for arch in (80, 90, 100)]
    for compiled in compile_kernels(specs):
        print(compiled)
        assert (compiled.stack, compiled.local) == (0, 0), compiled


def test_every_kernel_is_compiled_ahead_of_time_by_a_test() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_kernels*.py"))
    kernels = [
        name
        for path in (ROOT / "rpg_fast" / "kernels").glob("*.py")
        for name in re.findall(r"^def _(\w+)_kernel\(", path.read_text(), re.MULTILINE)
    ]
    assert len(kernels) > 10
    ways = (":_{}_kernel", '"_{}_kernel"', '("{}", [')  # how a test names the kernel of a spec
    assert [name for name in kernels if not any(way.format(name) in tests for way in ways)] == []


@pytest.mark.full
@pytest.mark.parametrize("shape", cases.RESNET50, ids=str)
def test_every_convolution_of_resnet50(shape: cases.Shape) -> None:
    """Warm calls, from windows that the plain-torch method has found; families and sparsities in turn."""
    number = list(cases.RESNET50).index(shape)
    family = list(cases.FAMILIES)[number % len(cases.FAMILIES)]
    sparsity = cases.SPARSITIES[number % len(cases.SPARSITIES)]
    weights = [cases.make_weight(family, shape, sparsity).to(DEVICE)]
    cold = torch.zeros(1, 2, dtype=torch.float64, device=DEVICE)
    target, seed = torch.tensor(0.1, dtype=torch.float64, device=DEVICE), torch.tensor(1, device=DEVICE)
    *_, windows, _ = filtered.rank_filter(weights, target, 0.0, cold, seed, filtered.COLD_ROUNDS, ())
    check(weights, run(weights, windows, rounds=2))
