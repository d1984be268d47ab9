"""The C++ kernels of the exact rank loss: every road inside them against an SVD in float64, called directly.

What holds for the ops on every device (opcheck, storages, hostile matrices, poisoned outputs) is in test_ops.py and
test_rank_loss.py; here are the choices that only these kernels make: nonzeros or dense products, live rows, blocks of
columns, the refined float32 split and its retreat to float64, threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from cases import LAYOUTS, RESNET50, TIE_MARGIN, Shape, make_weight, pruned, relative_error, seeded
from oracles import official_rank_loss
from torch import Tensor

from rpg_fast import _extension, _ops, reference

OPS = ["rank_project", "rank_apply", "rank_apply_"]
MISSING = [name for name in OPS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rpg_fast::{name}", "CPU")]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no C++ kernels for {MISSING}: {_extension.load().reason}")

ops = getattr(torch.ops, _ops.NAMESPACE)
DENSITIES = (0.0, 0.002, 0.05, 0.3, 0.39, 0.41, 1.0)  # on both sides of where the kernels turn to dense products


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def project(weights: Sequence[Tensor], tail_energy: float = 0.1, min_sparsity: float = 0.0) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = ops.rank_project(weights, torch.tensor(tail_energy), min_sparsity)
    return results


def gradients(weights: Sequence[Tensor], spectra: Sequence[Tensor], weight: float = 1.0) -> list[Tensor]:
    _loss, _tails, _ranks, inv_norms, shares, projector = spectra
    found: list[Tensor] = ops.rank_apply(weights, projector, inv_norms, shares, torch.tensor(weight))
    return found


def check_against_svd(
    weights: Sequence[Tensor], tail_energy: float = 0.1, loss: float = 1e-6, gradient: float = 2e-5
) -> None:
    spectra = project(weights, tail_energy)
    wanted_loss, wanted, svds = official_rank_loss(weights, tail_energy, ks=spectra[2].tolist())
    assert float(spectra[0]) == pytest.approx(float(wanted_loss), rel=loss, abs=1e-7)
    for W, k, svd, got, want in zip(
        weights, spectra[2].tolist(), svds, gradients(weights, spectra), wanted, strict=True
    ):
        assert svd is None or svd.allows(k, tail_energy, TIE_MARGIN), f"{tuple(W.shape)}: k {k}"
        norm = W.double().norm()
        scale = want.norm() + 1e-6 * 2 / norm if norm > 0 else torch.tensor(1.0)
        assert (got.double() - want).norm() <= gradient * scale, f"{tuple(W.shape)}: {relative_error(got, want)}"


def random_sparse(shape: Shape, density: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = seeded(seed)
    W = torch.randn(shape, generator=generator, dtype=dtype)
    return W * (torch.rand(shape, generator=generator) < density)


# ------------------------------------------------------------------------------------------- nonzeros or dense products


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(17, 150), (150, 17), (64, 64), (40, 9, 3, 3), (31, 33)], ids=str)
def test_every_density(shape: Shape, density: float) -> None:
    check_against_svd([random_sparse(shape, density)])
    check_against_svd([random_sparse(shape, density, dtype=torch.float64)], loss=1e-12, gradient=1e-9)


@pytest.mark.parametrize("m", [7, 8, 9, 15, 16, 17, 31, 32, 33, 127, 128, 129, 160])
@pytest.mark.parametrize("density", [0.1, 0.8])
def test_sizes_around_the_blocks(m: int, density: float) -> None:
    weights = [random_sparse((m, 2 * m + 1), density), random_sparse((2 * m + 1, m), density, seed=1)]
    check_against_svd(weights)


@pytest.mark.parametrize("density", [0.1, 0.8])
def test_more_columns_than_one_block_holds(density: float) -> None:
    check_against_svd([random_sparse((20, 9000), density), random_sparse((9000, 20), density, seed=1)])


def test_dense_rows_among_zero_rows_and_columns() -> None:
    """Whole filters pruned: what is left is dense, and only its rows are decomposed."""
    W = random_sparse((140, 300), 1.0)
    W[::2] = 0
    W[:, 100:180] = 0
    check_against_svd([W, W.mT.contiguous()])
    *_, projector = project([W])
    N = projector.view(140, 140)
    assert not N[::2, 1::2].any(), "zero rows are coupled to the others"


@pytest.mark.parametrize("how", ["magnitude", "random", "rows"])
@pytest.mark.parametrize("family", ["kaiming", "power-0.8"])
def test_shapes_of_resnet50(family: str, how: str) -> None:
    small = [shape for shape in RESNET50 if min(shape[0], torch.Size(shape[1:]).numel()) <= 128]
    check_against_svd([make_weight(family, shape, 0.9, how, seed=i) for i, shape in enumerate(small)])


# ------------------------------------------------------------------------------------------------------------ the split


def with_spectrum(energies: Tensor, n: int, seed: int = 3) -> Tensor:
    """float32 [m, n] whose squared singular values are `energies` [m] but for rounding."""
    generator = seeded(seed)
    m = len(energies)
    left = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64)).Q
    return ((left * energies.sqrt()) @ right.mT).float()


@pytest.mark.parametrize("k", [1, 20, 90, 138])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-5, 1e-6, 1e-7])
def test_small_gap_at_the_boundary(gap: float, k: int) -> None:
    """Two nearly equal singular values on either side of the boundary, where float32 alone would mix them."""
    m = 140
    energies = torch.linspace(2, 0.5, m, dtype=torch.float64)
    energies[k] = energies[k - 1] * (1 - gap)
    energies = energies.sort(descending=True).values
    W = with_spectrum(energies, 2 * m)
    check_against_svd([W], float(energies[k:].sum() / energies.sum()))


@pytest.mark.parametrize("tail_energy", [0.0, 1e-12, 0.02, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("family", ["kaiming", "power-1.2"])
def test_every_target(family: str, tail_energy: float) -> None:
    check_against_svd([make_weight(family, shape) for shape in ((130, 300), (300, 130), (12, 40))], tail_energy)


@pytest.mark.parametrize("offset", [-1e-6, -1e-8, 1e-8, 1e-6])
def test_target_near_the_middle_between_two_ranks(offset: float) -> None:
    W = make_weight("kaiming", (128, 256))
    energies = torch.linalg.svdvals(W.double()).square()
    tails = energies.flip(0).cumsum(0) / energies.sum()
    middle = float(tails[30] + tails[31]) / 2
    ranks = project([W], middle + offset)[2]
    assert ranks.item() == 128 - 1 - (30 if offset < 0 else 31)


@pytest.mark.parametrize("make", ["orthogonal", "rank one", "two clusters", "repeated rows"])
def test_spectra_without_a_gap(make: str) -> None:
    """Inside a cluster any subspace of the right size will do: a projector of rank k with the right energy."""
    Q = torch.linalg.qr(torch.randn(260, 130, dtype=torch.float64)).Q.mT  # [130, 260]
    W = {
        "orthogonal": Q,
        "rank one": torch.outer(torch.randn(130), torch.randn(260)),
        "two clusters": torch.cat([3 * Q[:30], Q[30:]]),
        "repeated rows": Q[:10].repeat(13, 1),
    }[make].float()
    _loss, tails, ranks, _inv_norms, _shares, projector = project([W], 0.3)
    _, wanted_tails, wanted_ranks, *_ = reference.rank_project([W], torch.tensor(0.3), 0.0)
    assert tails.item() == pytest.approx(wanted_tails.item(), abs=1e-6)
    if make != "repeated rows":  # equal tails up to rounding
        assert ranks.item() == wanted_ranks.item()
    P = projector.view(130, 130).double() / 2 + (1 - tails) * torch.eye(130)
    assert (P @ P - P).abs().max() < 1e-5
    assert float(P.trace()) == pytest.approx(ranks.item(), abs=1e-3)


# ----------------------------------------------------------------------------------------------- dtypes, storage, scale


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradients_of_other_strides_and_dtypes_grow(layout: str, dtype: torch.dtype) -> None:
    weights = [pruned(torch.randn(shape), 0.8).to(dtype) for shape in ((24, 5, 3, 3), (70, 4, 3, 2))]
    spectra = project(weights)
    addends = gradients([w.double() for w in weights], spectra, 3.0)
    for grad_dtype in (torch.float32, torch.float64, torch.bfloat16):
        grads = [LAYOUTS[layout](torch.randn(w.shape).to(grad_dtype)) for w in weights]
        wanted = [g.double() + a for g, a in zip(grads, addends, strict=True)]
        ops.rank_apply_(grads, weights, spectra[5], spectra[3], spectra[4], torch.tensor(3.0))
        for got, want in zip(grads, wanted, strict=True):
            assert relative_error(got, want) < (5e-3 if grad_dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("exponent", [-36, -30, 0, 30, 36])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_scales_in_float32(exponent: int, density: float) -> None:
    W = random_sparse((24, 60), density)
    scaled = (W.double() * 10.0**exponent).float()
    spectra, wanted = project([W]), project([scaled])
    assert spectra[2].item() == wanted[2].item()
    assert spectra[1].item() == pytest.approx(wanted[1].item(), rel=1e-6)
    unit = gradients([W], spectra)[0].double()
    assert relative_error(gradients([scaled], wanted)[0].double() * 10.0**exponent, unit) < 1e-5


@pytest.mark.parametrize("exponent", [-300, -150, 150, 300])
def test_scales_in_float64(exponent: int) -> None:
    W = random_sparse((24, 60), 0.3, dtype=torch.float64)
    spectra, wanted = project([W]), project([W * 10.0**exponent])
    assert spectra[2].item() == wanted[2].item()
    assert spectra[1].item() == pytest.approx(wanted[1].item(), rel=1e-12)


def test_mixed_dtypes_share_a_float64_projector() -> None:
    weights = [random_sparse((20, 50), 0.3), random_sparse((120, 150), 0.3, dtype=torch.float64)]
    weights += [random_sparse((30, 110), 0.3).bfloat16()]
    spectra = project(weights)
    assert spectra[5].dtype == spectra[0].dtype == torch.float64
    found = gradients(weights, spectra)
    wanted = reference.rank_apply(weights, spectra[5], spectra[3], spectra[4], torch.tensor(1.0))
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == want.dtype
        assert relative_error(got, want) < (1e-2 if got.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_stays_in_its_matrix(bad: float) -> None:
    weights = [random_sparse((130, 160), 0.1), random_sparse((130, 160), 0.1), torch.zeros(6, 4), torch.empty(0, 3)]
    weights[0][5, 7] = bad
    spectra = project(weights)
    assert spectra[0].isnan()
    assert spectra[1].isnan().tolist() == [True, False, False, False]
    assert spectra[2].tolist()[::2] == [-1, 0]
    assert spectra[4].tolist() == [0.5, 0.5, 0, 0]
    found = gradients(weights, spectra)
    assert found[0].isnan().all()
    assert all(g.isfinite().all() for g in found[1:])
    assert torch.equal(found[1], gradients(weights[1:2], project(weights[1:2]), 0.5)[0])


# -------------------------------------------------------------------------------------------------- threads and callers


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries round by the number of threads")
def test_same_bits_for_any_number_of_threads(threads: None) -> None:
    weights = [make_weight("power-0.8", shape, 0.9) for shape in ((64, 64), (256, 64), (128, 1152), (130, 1000))]
    weights += [make_weight("kaiming", (128, 600)), torch.randn(9, 7)]
    found = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        spectra = project(weights)
        found.append([*spectra, *gradients(weights, spectra)])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_one_gradient_for_two_weights() -> None:
    """A weight that is listed twice: both contributions arrive, whatever the number of threads."""
    W, grad = random_sparse((64, 5000), 0.2), torch.zeros(64, 5000)
    spectra = project([W, W])
    ops.rank_apply_([grad, grad], [W, W], spectra[5], spectra[3], spectra[4], torch.tensor(1.0))
    assert relative_error(grad, gradients([W], project([W]))[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_leaves(dtype: torch.dtype) -> None:
    weights = [random_sparse(shape, density) for shape in ((130, 300), (300, 130)) for density in (0.1, 1.0)]
    spectra = project(weights)
    wanted = gradients(weights, spectra)
    leaves = [w.clone().requires_grad_() for w in weights]
    with torch.autocast("cpu", dtype):
        again = project(leaves)
        with torch.no_grad():
            found = gradients(leaves, again)
    assert all(torch.equal(a, b) for a, b in zip(spectra, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scalars_of_any_dtype(dtype: torch.dtype) -> None:
    W = random_sparse((20, 30), 0.5)
    spectra = ops.rank_project([W], torch.tensor(0.25, dtype=dtype), 0.0)
    assert torch.equal(spectra[1], project([W], 0.25)[1])
    found = ops.rank_apply([W], spectra[5], spectra[3], spectra[4], torch.tensor(2.0, dtype=dtype))
    assert torch.equal(found[0], gradients([W], spectra, 2.0)[0])


def test_bad_arguments_are_named() -> None:
    W = torch.randn(4, 6)
    _loss, _tails, _ranks, inv_norms, shares, projector = project([W])
    one = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r"weights\[0\] must be .* got float32 \[4\] on cpu"):
        project([torch.randn(4)])
    with pytest.raises(RuntimeError, match=r"weights\[1\] must be .* got int64 \[2, 2\] on cpu"):
        project([W, torch.zeros(2, 2, dtype=torch.int64)])
    with pytest.raises(RuntimeError, match=r"tail_energy must hold one element on the CPU, got float32 \[3\]"):
        ops.rank_project([W], torch.zeros(3), 0.0)
    with pytest.raises(RuntimeError, match=r"projector must be .* \[16\] on cpu, got float32 \[15\]"):
        ops.rank_apply([W], projector[:15], inv_norms, shares, one)
    with pytest.raises(RuntimeError, match=r"shares must be a contiguous float64 \[1\] on cpu, got float32 \[1\]"):
        ops.rank_apply([W], projector, inv_norms, shares.float(), one)
    with pytest.raises(RuntimeError, match="grads must have 1 entries, got 2"):
        ops.rank_apply_([W, W], [W], projector, inv_norms, shares, one)
    with pytest.raises(RuntimeError, match=r"grads\[0\] must be .* got float32 \[4, 5\] on cpu for float32 \[4, 6\]"):
        ops.rank_apply_([torch.zeros(4, 5)], [W], projector, inv_norms, shares, one)


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_that_float32_cannot_tell_apart(seed: int) -> None:
    """Rows of disjoint support, in pairs whose energies differ by 1e-7: in float32 the two at k may be swapped."""
    generator = torch.Generator().manual_seed(seed)
    m, per = 128, 3
    base = torch.rand(m, per, generator=generator) + 0.5
    base[1::2] = base[::2]
    base[1::2, 0] *= 1 + 2.0**-22
    base[1::2, 1] *= 1 - 2.0**-22
    W = torch.zeros(m, m * per)
    for i, row in enumerate(torch.randperm(m, generator=generator).tolist()):
        W[row, i * per : (i + 1) * per] = base[i]
    energies = W.double().square().sum(1).sort().values
    energies /= energies.sum()
    gaps = energies.diff()
    for o in ((gaps > 1e-11) & (gaps < 1e-6 * energies[:-1])).nonzero().flatten().tolist():
        target = energies.cumsum(0)[o]
        got = torch.ops.rpg_fast.rank_project([W], target, 0.0)
        want = reference.rank_project([W], target, 0.0)
        assert torch.equal(got[2], want[2])
        assert (got[5] - want[5]).norm() < 1e-5 * want[5].norm()
