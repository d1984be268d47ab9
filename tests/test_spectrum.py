"""svd_lowrank and the rank rules: against the full SVD, and against every k."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import HOSTILE_FINITE, HOSTILE_NOT_FINITE, LAYOUTS, SUBNORMAL, relative_error, seeded
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import tail_energy_rank as every_k
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rpg_fast import spectrum, svd_lowrank, tail_energy_rank


def low_rank(*shape: int, rank: int = 5, tail: float = 1e-3, seed: int = 0) -> Tensor:
    """[..., m, n] float64: singular values 1, 1/2, ... 1/rank, then `tail` times noise of norm one."""
    *batch, m, n = shape
    left = torch.linalg.qr(torch.randn(*batch, m, rank, generator=seeded(seed), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(*batch, n, rank, generator=seeded(seed + 1), dtype=torch.float64)).Q
    noise = torch.randn(*batch, m, n, generator=seeded(seed + 2), dtype=torch.float64) / math.sqrt(m * n)
    return (left / torch.arange(1, rank + 1)) @ right.mT + tail * noise


def check(A: Tensor, q: int, U: Tensor, S: Tensor, V: Tensor, tolerance: float) -> None:
    """Shapes, dtypes, orthonormality, order, and values and reconstruction as of the full SVD."""
    *batch, m, n = A.shape
    assert (U.shape, S.shape, V.shape) == ((*batch, m, q), (*batch, q), (*batch, n, q))
    assert U.dtype == S.dtype == V.dtype == A.dtype
    assert U.device == S.device == V.device == A.device
    A, U, S, V = (x.double().cpu() for x in (A, U, S, V))
    eye = torch.eye(q, dtype=torch.float64).expand(*batch, q, q)
    torch.testing.assert_close(U.mT @ U, eye, atol=tolerance, rtol=0)
    torch.testing.assert_close(V.mT @ V, eye, atol=tolerance, rtol=0)
    assert (S[..., :-1] >= S[..., 1:]).all()
    full = torch.linalg.svd(A, full_matrices=False)
    scale = float(full.S.amax()) if full.S.numel() else 1.0
    torch.testing.assert_close(S, full.S[..., :q], atol=tolerance * scale, rtol=0)
    best = (full.U[..., :q] * full.S[..., None, :q]) @ full.Vh[..., :q, :]
    torch.testing.assert_close((U * S[..., None, :]) @ V.mT, best, atol=10 * tolerance * scale, rtol=0)


GRADE = {torch.float64: 1e-8, torch.float32: 2e-5}
METHODS = ["auto", "svd", "qr", "products"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of doing it on every device; "auto" is the device's own."""
    if request.param != "auto":
        monkeypatch.setattr(spectrum, "svd_method", lambda *_, **__: request.param)
    return request.param


# "products" keep the digits of float32, so float64 is never done by them.
WAYS = pytest.mark.parametrize(
    ("method", "dtype"),
    [(method, dtype) for method in METHODS for dtype in GRADE if (method, dtype) != ("products", torch.float64)],
    indirect=["method"],
    ids=str,
)


@WAYS
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (3, 20, 33), (2, 3, 33, 20), (7, 300)], ids=str)
def test_low_rank_matrices(shape: tuple[int, ...], method: str, dtype: torch.dtype, device: torch.device) -> None:
    A = low_rank(*shape).to(device, dtype)
    check(A, 5, *svd_lowrank(A, 5, niter=4), GRADE[dtype])


@WAYS
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (12, 12), (9, 21), (21, 9), (4, 6, 11)], ids=str)
@pytest.mark.parametrize("niter", [0, 2])
def test_full_width_is_the_full_svd(
    shape: tuple[int, ...], niter: int, method: str, dtype: torch.dtype, device: torch.device
) -> None:
    A = torch.randn(shape, generator=seeded(1), dtype=torch.float64).to(device, dtype)
    q = min(shape[-2:])
    check(A, q, *svd_lowrank(A, q, niter), GRADE[dtype])


@pytest.mark.parametrize("method", ["auto", "qr", "products"], indirect=True)
def test_more_iterations_come_closer(method: str, device: torch.device) -> None:
    A = low_rank(60, 200, tail=0.5).to(device)
    A = A.float() if method == "products" else A
    best = torch.linalg.svdvals(A)[:4]
    errors = []
    for niter in (0, 1, 4, 12):
        _, S, _ = svd_lowrank(A, 4, niter, generator=torch.Generator(device).manual_seed(0))
        assert (best * (1 + (1e-9 if A.dtype == torch.float64 else 1e-6)) >= S).all()  # a projection of A: never above
        errors.append(float((best - S).norm()))
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize("exponent", [-2, -4, -6, -8])
def test_steep_spectra(exponent: int, method: str, device: torch.device) -> None:
    """Singular values over `exponent` decades in float32: the first to float32's last digits, the others to its last
    digits of the first."""
    left = torch.linalg.qr(torch.randn(100, 100, generator=seeded(0), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(300, 100, generator=seeded(1), dtype=torch.float64)).Q
    values = torch.logspace(0, exponent, 100, dtype=torch.float64)
    A = ((left * values) @ right.mT).float().to(device)
    U, S, V = (part.double() for part in svd_lowrank(A, 40, niter=8))
    wanted = torch.linalg.svdvals(A.double())[:40]
    torch.testing.assert_close(S, wanted, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(S[:10], wanted[:10], rtol=3e-6, atol=0)
    eye = torch.eye(40, dtype=torch.float64, device=device)
    for basis in (U, V):
        torch.testing.assert_close(basis.mT @ basis, eye, atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "q", "niter", "device_type", "dtype", "wanted"),
    [
        ((64, 64), 24, 2, "cpu", torch.float32, "qr"),
        ((64, 64), 25, 2, "cpu", torch.float32, "svd"),
        ((64, 64), 24, 3, "cpu", torch.float32, "svd"),
        ((64, 64), 48, 0, "cpu", torch.float64, "qr"),
        ((64, 64), 56, 0, "cpu", torch.float64, "svd"),
        ((5, 4096, 32), 9, 2, "cpu", torch.bfloat16, "svd"),
        ((64, 64), 8, 2, "cuda", torch.float32, "products"),
        ((7, 64, 64), 64, 2, "cuda", torch.float16, "products"),
        ((64, 64), 8, 2, "cuda", torch.float64, "qr"),
        ((64, 64), 64, 2, "cuda", torch.float64, "svd"),
    ],
    ids=str,
)
def test_method_of_a_shape(
    shape: tuple[int, ...], q: int, niter: int, device_type: str, dtype: torch.dtype, wanted: str
) -> None:
    assert spectrum.svd_method(shape, q, niter, device=torch.device(device_type), dtype=dtype) == wanted


@pytest.mark.parametrize("method", METHODS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_nothing_on_the_host(method: str, dtype: torch.dtype) -> None:
    """Fake tensors have no values to read; what torch.linalg.eigh and svd check on CUDA is their own affair."""
    with FakeTensorMode():
        U, S, V = svd_lowrank(torch.empty(2, 50, 30, dtype=dtype), 4)
        Us, _, _ = svd_lowrank([torch.empty(50, 30), torch.empty(30, 50), torch.empty(9, 9)], 4)
    assert (U.shape, S.shape, V.shape) == ((2, 50, 4), (2, 4), (2, 30, 4))
    assert [tuple(u.shape) for u in Us] == [(50, 4), (30, 4), (9, 4)]


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 5, 7), (0, 7, 5)], ids=str)
def test_empty_batch(shape: tuple[int, ...], method: str, device: torch.device) -> None:
    U, S, V = svd_lowrank(torch.empty(shape, device=device), 2)
    assert (U.shape, S.shape, V.shape) == ((*shape[:-1], 2), (*shape[:-2], 2), (*shape[:-2], shape[-1], 2))


def test_list_of_different_shapes(method: str, device: torch.device) -> None:
    """In the order of the list, equal shapes and dtypes mixed with others, batches too."""
    shapes: list[tuple[int, ...]] = [(20, 30), (30, 20), (2, 20, 30), (20, 30), (12, 12), (30, 20)]
    matrices = [low_rank(*shape, seed=7 * i).to(device) for i, shape in enumerate(shapes)]
    matrices[1] = matrices[1].float()
    matrices[3] = matrices[3].mT.contiguous().mT
    Us, Ss, Vs = svd_lowrank(matrices, 4, niter=4)
    assert len(Us) == len(Ss) == len(Vs) == len(matrices)
    for A, U, S, V in zip(matrices, Us, Ss, Vs, strict=True):
        check(A, 4, U, S, V, GRADE[A.dtype])
    assert svd_lowrank([], 3) == ([], [], [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype, method: str, device: torch.device) -> None:
    A = low_rank(20, 30).to(device, dtype)
    check(A, 4, *svd_lowrank(A, 4, niter=4), 2e-2)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_strided_matrices(layout: str, method: str, device: torch.device) -> None:
    A = low_rank(20, 30).to(device)
    B = LAYOUTS[layout](A)
    assert not B.is_contiguous()
    for ours, theirs in zip(svd_lowrank(B, 3, niter=4), svd_lowrank(A, 3, niter=4), strict=True):
        assert relative_error(ours.abs(), theirs.abs()) < 1e-6


def test_generator_decides_and_the_global_one_is_left_alone(device: torch.device) -> None:
    A = torch.randn(30, 50, generator=seeded(0)).to(device)  # a flat spectrum: the sketch shows

    def run(seed: int) -> Tensor:
        return svd_lowrank(A, 3, 0, generator=torch.Generator(device).manual_seed(seed))[1]

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = run(1), run(1), run(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    listed = [svd_lowrank([A, A.mT], 3, 0, generator=torch.Generator(device).manual_seed(1))[1] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*listed, strict=True))


def test_a_matrix_and_its_transpose_are_one_batch(method: str, device: torch.device) -> None:
    A = torch.randn(30, 50, generator=seeded(0)).to(device)
    Us, Ss, Vs = svd_lowrank([A, A.mT], 3, generator=torch.Generator(device).manual_seed(1))
    assert relative_error(Us[0], Vs[1]) < 1e-5  # this flat spectrum would show another sketch
    assert relative_error(Ss[0], Ss[1]) < 1e-5
    assert relative_error(Vs[0], Us[1]) < 1e-5


@pytest.mark.parametrize("name", HOSTILE_NOT_FINITE)
def test_nan_and_inf_stay_where_they_are(name: str, method: str, device: torch.device) -> None:
    bad = HOSTILE_NOT_FINITE[name]().to(device)
    good = low_rank(*bad.shape).to(bad)
    U, S, V = svd_lowrank(torch.stack([good, bad, good]), 4, niter=4)
    assert U[1].isnan().all()
    assert S[1].isnan().all()
    assert V[1].isnan().all()
    for i in (0, 2):
        check(good, 4, U[i], S[i], V[i], GRADE[torch.float32])
    Us, _, _ = svd_lowrank([bad.mT, good.mT], 4, niter=4)
    assert Us[0].isnan().all()
    assert Us[1].isfinite().all()


@pytest.mark.parametrize("name", {**HOSTILE_FINITE, **SUBNORMAL})
def test_hostile_matrices(name: str, method: str, device: torch.device) -> None:
    A = {**HOSTILE_FINITE, **SUBNORMAL}[name]().to(device).flatten(1)
    q = min(4, *A.shape)
    if q == 0:
        with pytest.raises(ValueError, match="q must lie in"):
            svd_lowrank(A, 1)
        return
    U, S, V = svd_lowrank(A, q, niter=6)
    assert U.isfinite().all()
    assert V.isfinite().all()
    wanted = torch.linalg.svdvals(A.double())[:q]
    torch.testing.assert_close(S, wanted.float(), rtol=2e-2, atol=float(wanted[0]) * 1e-5 + 2e-45)
    eye = torch.eye(q, device=device)
    torch.testing.assert_close(U.mT @ U, eye, atol=2e-5, rtol=0)
    torch.testing.assert_close(V.mT @ V, eye, atol=2e-5, rtol=0)


def test_autocast_changes_nothing(method: str, device: torch.device) -> None:
    A = low_rank(20, 30).to(device, torch.float32)
    plain = svd_lowrank(A, 3, generator=torch.Generator(device).manual_seed(0))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under = svd_lowrank(A, 3, generator=torch.Generator(device).manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_requires_grad_raises() -> None:
    A = torch.eye(4).requires_grad_()
    with pytest.raises(RuntimeError, match=r"pass A\.detach\(\)"):
        svd_lowrank(A, 2)
    with pytest.raises(RuntimeError, match=r"pass A\[1\]\.detach\(\)"):
        svd_lowrank([torch.eye(4), A], 2)
    with torch.no_grad():
        assert not svd_lowrank(A, 2)[1].requires_grad


@pytest.mark.parametrize(
    ("A", "q", "niter", "error", "message"),
    [
        (torch.eye(4), 0, 2, ValueError, r"q must lie in 1..min\(m, n\) = 4 .* got 0"),
        (torch.eye(4), 5, 2, ValueError, "q must lie in"),
        ([torch.eye(4), torch.ones(3, 2)], 3, 2, ValueError, r"A\[1\] of shape \(3, 2\), got 3"),
        (torch.eye(4), 2, -1, ValueError, "niter must not be negative, got -1"),
        (torch.ones(4), 1, 2, ValueError, r"got shape \(4,\)"),
        (torch.eye(4).int(), 1, 2, TypeError, "got torch.int32"),
        ([[1.0]], 1, 2, TypeError, "got list"),
    ],
    ids=str,
)
def test_bad_input(A: object, q: int, niter: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        svd_lowrank(A, q, niter)  # type: ignore[call-overload]


# ----------------------------------------------------------------------------------------------------------- rank rules


@given(
    S=st.lists(st.integers(0, 6).map(lambda i: i / 2), min_size=1, max_size=8),
    target=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]),
    rule=st.sampled_from(["nearest", "at_most"]),
)
@example(S=[2.0, 2.0, 2.0, 2.0], target=0.25, rule="nearest")
@example(S=[0.0], target=0.5, rule="nearest")
def test_rules_try_every_k(S: list[float], target: float, rule: str) -> None:
    """Small numbers, so that sums are exact wherever the normalisation is; elsewhere either side of a tie is right."""
    spectrum = torch.tensor(sorted(S, reverse=True), dtype=torch.float64)
    k = int(tail_energy_rank(spectrum, target, rule))  # type: ignore[arg-type]
    wanted = every_k(spectrum.tolist(), target, rule)
    if k == wanted:
        return
    squares = spectrum.square() / spectrum.square().sum()
    tails = [float(squares[i:].sum()) for i in range(len(S) + 1)]
    if rule == "nearest":
        assert abs(abs(tails[k] - target) - abs(tails[wanted] - target)) < 1e-14
    else:
        assert abs(k - wanted) == 1
        assert abs(tails[min(k, wanted)] - target) < 1e-14


@pytest.mark.parametrize("r", range(1, 12))
@pytest.mark.parametrize("rule", ["nearest", "at_most"])
def test_the_whole_energy_may_go(r: int, rule: str) -> None:
    """A target of one keeps nothing, however the normalised energies round."""
    for seed in range(20):
        S = torch.rand(r, generator=seeded(seed)).sort(descending=True).values
        assert int(tail_energy_rank(S, 1.0, rule)) == 0  # type: ignore[arg-type]


def test_batch_and_special_spectra(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    S = torch.tensor(
        [[3.0, 2, 1], [0, 0, 0], [nan, 1, 1], [inf, 1, 0], [1e30, 1e30, 1e30], [1e-42, 0, 0]], device=device
    )
    nearest, at_most = tail_energy_rank(S, 0.3), tail_energy_rank(S, 0.3, "at_most")
    assert nearest.dtype == torch.int64
    assert nearest.device.type == device.type
    assert nearest.tolist() == [1, 0, -1, -1, 2, 2]
    assert at_most.tolist() == [2, 0, -1, -1, 3, 1]
    assert tail_energy_rank(S[None], torch.tensor(0.3, device=device)).tolist() == [nearest.tolist()]
    assert tail_energy_rank(S[0], 0.3).shape == ()
    assert tail_energy_rank(S[:0], 0.3).shape == (0,)


def test_nearest_is_the_rule_of_the_rank_loss(device: torch.device) -> None:
    from rpg_fast import RankState, rank_loss

    for seed, target in itertools.product(range(5), (0.05, 0.1, 0.4)):
        W = low_rank(12, 20, tail=0.5, seed=seed).to(device)
        state = RankState()
        rank_loss([W], target, state=state)
        assert state.ranks is not None
        assert int(tail_energy_rank(torch.linalg.svdvals(W), target)) == int(state.ranks)


@pytest.mark.parametrize(
    ("S", "target", "rule", "message"),
    [
        (torch.ones(3), 0.1, "best", 'rule must be "nearest" or "at_most"'),
        (torch.ones(3, 0), 0.1, "nearest", r"at least one singular value .* got shape \(3, 0\)"),
        (torch.tensor(1.0), 0.1, "nearest", "at least one singular value"),
        (torch.ones(3), -0.1, "nearest", "tail_energy must lie in"),
        (torch.ones(3), float("nan"), "at_most", "tail_energy must lie in"),
    ],
)
def test_bad_spectra(S: Tensor, target: float, rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tail_energy_rank(S, target, rule)  # type: ignore[arg-type]
