"""The kernels of a round of the filter against float64, on the GPU where there is one, in the interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from aot import CompiledKernel, KernelSpec, compile_kernels
from kernel_cases import DEVICE, FP32_GRADE, Storage, matrices, relative_error, symmetric, tiles
from torch import Tensor

from rpg_fast import filtered, reference
from rpg_fast.kernels import filter as steps
from rpg_fast.kernels import grouped_product as gp
from rpg_fast.kernels import thin

SIZES = (96, 128, 147, 200, 65)
STAGES = (1, 4, 0, 3, 2)  # the third matrix takes no part
IDLE = 2
WIDTH = 32
PAIRS = Storage(True)


def stored(values: list[Tensor], plan: tiles.TilePlan) -> tuple[Tensor, list[Tensor]]:
    """Pairs [2, numel], and what they hold in float64."""
    pairs = PAIRS.store(values, plan)
    return pairs, exact(pairs, plan)


def exact(pairs: Tensor, plan: tiles.TilePlan) -> list[Tensor]:
    joined = pairs[0].double() + pairs[1].double() / 2048
    return [view.cpu() for view in tiles.unpack(joined, plan)]


def gram_matrices(sizes: Sequence[int]) -> list[Tensor]:
    """Positive, of norm 1, spectrum falling like a power law."""
    grams = []
    for seed, m in enumerate(sizes):
        U = torch.linalg.qr(symmetric(m, seed))[0]
        grams.append((U * torch.arange(1, m + 1).double() ** -1.0) @ U.T)
    return grams


def padding_is_zero(pairs: Tensor, plan: tiles.TilePlan, members: Sequence[int]) -> bool:
    for b in members:
        start, p, m = plan.starts[b], plan.padded[b], plan.sizes[b]
        padded = pairs[:, start : start + p * p].view(2, p, p)
        if padded[:, m:].any() or padded[:, :, m:].any():
            return False
    return True


def untouched(pairs: Tensor, plan: tiles.TilePlan, b: int) -> bool:
    """Still NaN everywhere."""
    return bool(pairs[..., plan.starts[b] : plan.starts[b] + plan.padded[b] ** 2].isnan().all())


@dataclass
class Round:
    """The inputs of the kernels; every buffer that a kernel writes is full of NaN."""

    plan: tiles.TilePlan
    stages: Tensor  # int32 [B]
    ring: Tensor  # fp16 [3, 2, numel]

    @property
    def active(self) -> list[int]:
        return [b for b, n in enumerate(self.stages.tolist()) if n]

    def sums(self) -> Tensor:
        return torch.full((len(self.plan.tiles), 3), torch.nan, device=DEVICE)

    def thin(self, *leading: int) -> Tensor:
        return torch.full((*leading, self.plan.rows, WIDTH), torch.nan, device=DEVICE)

    def put(self, values: list[Tensor], parts: Sequence[int]) -> list[Tensor]:
        """Stores matrix b in part `parts[b]` of the ring, NaN in the others; what the pairs hold, in float64."""
        pairs, held = stored(values, self.plan)
        for part, start, p in zip(parts, self.plan.starts, self.plan.padded, strict=True):
            self.ring[part, :, start : start + p * p] = pairs[:, start : start + p * p]
        return held

    def rows_of(self, thin_matrix: Tensor, b: int) -> Tensor:
        """[..., m, w] of matrix b, in float64."""
        first = int(self.plan.row_starts[b])
        return thin_matrix[..., first : first + self.plan.sizes[b], :].double().cpu()

    def padding_of(self, thin_matrix: Tensor, b: int) -> Tensor:
        first = int(self.plan.row_starts[b])
        return thin_matrix[..., first + self.plan.sizes[b] : first + self.plan.padded[b], :]

    def total(self, sums: Tensor, b: int) -> Tensor:
        first, end = self.plan.tile_starts[b].tolist()
        return sums[first:end].double().sum(0).cpu()


def new_round(sizes: Sequence[int] = SIZES, stages: Sequence[int] = STAGES) -> Round:
    plan = tiles.plan_tiles(sizes, device=DEVICE)
    ring = torch.full((3, 2, plan.numel), torch.nan, dtype=torch.float16, device=DEVICE)
    return Round(plan, torch.tensor(stages, dtype=torch.int32, device=DEVICE), ring)


def random_thin(plan: tiles.TilePlan, seed: int) -> Tensor:
    """Float32 [rows, w] in [-1, 1], NaN in the padding."""
    values = torch.rand(plan.rows, WIDTH, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    for first, m, p in zip(plan.row_starts.tolist(), plan.sizes, plan.padded, strict=True):
        values[first + m : first + p] = torch.nan
    return values.to(DEVICE)


def test_square_with_moments() -> None:
    r = new_round()
    G, held = stored(gram_matrices(SIZES), r.plan)
    out, moments = torch.full_like(G, torch.nan), r.sums()
    steps.square_with_moments(G, r.plan, out=out, moments=moments)
    assert padding_is_zero(out, r.plan, range(len(SIZES)))
    for b, (value, got) in enumerate(zip(held, exact(out, r.plan), strict=True)):
        square = value @ value
        assert relative_error(got, square) < FP32_GRADE
        assert torch.equal(got, got.T)
        want = torch.stack([(value * value).sum(), (value * square).sum(), (square * square).sum()])
        torch.testing.assert_close(r.total(moments, b), want, rtol=1e-6, atol=0)


def test_shift() -> None:
    r = new_round()
    G, held = stored(gram_matrices(SIZES), r.plan)
    G2, squares = stored([value @ value for value in held], r.plan)
    aims = torch.stack([torch.linspace(0.05, 0.4, len(SIZES)), torch.linspace(1.0, 3.0, len(SIZES))], 1).to(DEVICE)
    steps.shift(G, G2, aims, r.stages, r.plan, ring=r.ring)()
    for b in r.active:
        tau, inverse = aims[b].double().tolist()
        eye = torch.eye(SIZES[b], dtype=torch.float64)
        Y, A = exact(r.ring[0], r.plan)[b], exact(r.ring[1], r.plan)[b]
        assert (Y - (held[b] - tau * eye) * inverse).abs().max() < 5e-7
        assert (A - (squares[b] - 2 * tau * held[b] + tau**2 * eye) * inverse**2).abs().max() < 2e-6
        assert torch.equal(Y, Y.T)
        assert torch.equal(A, A.T)
    assert padding_is_zero(r.ring[0], r.plan, r.active)
    assert padding_is_zero(r.ring[1], r.plan, r.active)
    assert untouched(r.ring, r.plan, IDLE)
    assert r.ring[2].isnan().all()


def aim(r: Round, held: list[Tensor], windows: Sequence[filtered.Window | None]) -> tuple[Tensor, Tensor]:
    """aims [B, 2] and coefficients [B, S, 3] of the soft steps at these windows; sets ``r.stages``, 0 without one."""
    grid, table = filtered.step_table(torch.device("cpu"))
    aims, coefficients = torch.zeros(len(held), 2), torch.zeros(len(held), filtered.STAGES, 3)
    for b, (value, window) in enumerate(zip(held, windows, strict=True)):
        r.stages[b] = 0
        if window is not None:
            bound = filtered.bound_on_shifted(filtered.Spectrum.of(value[None]).moments, len(value), window.tau)
            row = int(torch.searchsorted(grid, window.half / bound, right=True)) - 1
            aims[b] = torch.cat([window.tau, 1 / bound])
            coefficients[b] = table[row]
            r.stages[b] = int((table[row] != torch.tensor([1.0, 0, 0])).any(-1).sum())
    return aims.to(DEVICE), coefficients.to(DEVICE)


def compare_with_soft_step(sizes: Sequence[int], halves: Sequence[float]) -> None:
    """shift and all stages, as many as each matrix needs, against `filtered.soft_step` in float64; a negative
    half-width: the matrix takes no part."""
    r = new_round(sizes, [0] * len(sizes))
    G, held = stored(gram_matrices(sizes), r.plan)
    G2 = gp.grouped_product(G, G, r.plan)
    windows = [
        filtered.Window(torch.linalg.eigvalsh(value)[-5:-4] * 0.9, torch.tensor([half]).double()) if half > 0 else None
        for value, half in zip(held, halves, strict=True)
    ]
    aims, coefficients = aim(r, held, windows)
    steps.shift(G, G2, aims, r.stages, r.plan, ring=r.ring)()
    steps.compose(coefficients, r.stages, r.plan, ring=r.ring)()
    counts = r.stages.tolist()
    assert len(set(counts)) >= 3, f"the same number of stages everywhere: {counts}"
    for b, (n, window) in enumerate(zip(counts, windows, strict=True)):
        if window is None:
            assert untouched(r.ring, r.plan, b)
            continue
        Y = exact(r.ring[n % 2], r.plan)[b]
        error = relative_error(Y, filtered.soft_step(filtered.Spectrum.of(held[b][None]), window)[0][0])
        print(f"m = {sizes[b]}, {n} stages: relative error {error:.1e}")
        assert error < 5e-6
        assert torch.equal(Y, Y.T)
        assert padding_is_zero(r.ring[n % 2], r.plan, [b])


def test_all_stages_are_the_soft_step() -> None:
    compare_with_soft_step((96, 128, 147, 65), (0.02, 3e-4, -1.0, 5e-3))


@pytest.mark.full
def test_all_stages_are_the_soft_step_for_large_matrices() -> None:
    compare_with_soft_step((512, 300, 256, 1024), (1e-3, 2e-4, 0.02, 5e-4))


def bits_of(r: Round, b: int) -> Tensor:
    """All that the ring holds of a matrix, comparable where it is NaN."""
    return r.ring[..., r.plan.starts[b] : r.plan.starts[b] + r.plan.padded[b] ** 2].view(torch.int16).clone()


def test_inside() -> None:
    r = new_round()
    Ys = r.put(matrices(SIZES), [n % 2 for n in STAGES])
    idle, traces = bits_of(r, IDLE), r.sums()
    steps.inside(r.stages, r.plan, ring=r.ring, traces=traces)()
    for b in r.active:
        C = (torch.eye(SIZES[b]) - Ys[b] @ Ys[b]) / 4
        got = exact(r.ring[2], r.plan)[b]
        assert relative_error(got, C) < FP32_GRADE
        assert torch.equal(got, got.T)
        assert float(r.total(traces, b)[2]) == pytest.approx(float((C * C).sum()), rel=1e-6)
    assert padding_is_zero(r.ring[2], r.plan, r.active)
    assert torch.equal(bits_of(r, IDLE), idle)
    first, end = r.plan.tile_starts[IDLE].tolist()
    assert traces[first:end].isnan().all()
    assert traces[:, :2].isnan().all(), "the columns of sharpen were written"


@pytest.mark.parametrize("sizes", [SIZES, (64, 1, 33, 192, 130)])
@pytest.mark.parametrize("stages", [STAGES, (2, 3, 0, 4, 1)])
def test_sharpen(sizes: Sequence[int], stages: Sequence[int]) -> None:
    r = new_round(sizes, stages)
    G, held = stored(gram_matrices(sizes), r.plan)
    Ys = r.put(matrices(sizes), [n % 2 for n in stages])
    Cs = r.put([(torch.eye(len(Y)) - Y @ Y) / 4 for Y in Ys], [2] * len(sizes))
    idle, traces = bits_of(r, IDLE), r.sums()
    steps.sharpen(G, r.stages, r.plan, ring=r.ring, traces=traces)()
    for b in r.active:
        sharp, P = Ys[b] + 2 * Cs[b] @ Ys[b], (torch.eye(sizes[b]) + Ys[b]) / 2
        assert relative_error(sharp, 2 * (3 * P @ P - 2 * P @ P @ P) - torch.eye(sizes[b])) < FP32_GRADE  # as McWeeny
        part = r.ring[1 - stages[b] % 2]
        got = exact(part, r.plan)[b]
        assert relative_error(got, sharp) < FP32_GRADE
        assert torch.equal(got, got.T)
        assert padding_is_zero(part, r.plan, [b])
        assert torch.equal(exact(r.ring[stages[b] % 2], r.plan)[b], Ys[b]), "Y was written"
        assert torch.equal(exact(r.ring[2], r.plan)[b], Cs[b]), "C was written"
        trace, overlap, _ = r.total(traces, b).tolist()
        assert trace == pytest.approx(float(sharp.trace()), rel=1e-6, abs=1e-6)
        assert overlap == pytest.approx(float((sharp * held[b]).sum()), rel=1e-6, abs=1e-6)
    assert torch.equal(bits_of(r, IDLE), idle)
    first, end = r.plan.tile_starts[IDLE].tolist()
    assert traces[first:end].isnan().all()
    assert traces[:, 2].isnan().all(), "the column of inside was written"


def gaussians(sizes: Sequence[int], seed: int, draw: int = 0) -> list[Tensor]:
    """Omega of each matrix, as the product with the identity."""
    r = new_round(sizes, [1] * len(sizes))
    r.put([torch.eye(m, dtype=torch.float64) for m in sizes], [2] * len(sizes))
    out = r.thin()
    thin.sketch(torch.tensor(seed, device=DEVICE), r.stages, r.plan, ring=r.ring, out=out)(draw)
    return [r.rows_of(out, b) for b in range(len(sizes))]


def test_sketch_is_a_product_with_gaussian_numbers() -> None:
    r = new_round()
    held = r.put(matrices(SIZES), [2] * len(SIZES))
    out = r.thin()
    thin.sketch(torch.tensor(2**40 + 5, device=DEVICE), r.stages, r.plan, ring=r.ring, out=out)(3)
    omegas = gaussians(SIZES, 2**40 + 5, 3)
    for b in r.active:
        assert relative_error(r.rows_of(out, b), held[b] @ omegas[b]) < FP32_GRADE
        assert not r.padding_of(out, b).any()
    assert r.rows_of(out, IDLE).isnan().all()
    assert r.padding_of(out, IDLE).isnan().all()
    values = torch.cat(omegas).flatten()  # 20,352 of them
    assert values.unique().numel() > 0.99 * values.numel(), "numbers drawn twice"
    assert abs(float(values.mean())) < 0.03
    assert float(values.var()) == pytest.approx(1, abs=0.04)
    assert float((values**4).mean()) == pytest.approx(3, abs=0.3)
    correlations = torch.corrcoef(torch.cat(omegas).T) - torch.eye(WIDTH)  # 636 samples
    assert correlations.abs().max() < 0.2


def test_gaussian_numbers_depend_on_seed_draw_matrix_row_and_column_alone() -> None:
    small, large = gaussians((65, 96), 7), gaussians((70, 40), 7)
    assert torch.equal(small[0], large[0][:65])
    assert torch.equal(small[1][:40], large[1])
    assert not torch.equal(small[0][:40], small[1][:40])
    for other in (gaussians((65, 96), 8), gaussians((65, 96), 7, 1), gaussians((65, 96), 7 + 2**32)):
        assert (other[0] == small[0]).double().mean() < 0.01


def test_image() -> None:
    r = new_round()
    held = r.put(matrices(SIZES), [2] * len(SIZES))
    Q, out = random_thin(r.plan, 1), r.thin()
    thin.image(Q, r.stages, r.plan, ring=r.ring, out=out)()
    for b in r.active:
        assert relative_error(r.rows_of(out, b), held[b] @ r.rows_of(Q, b)) < FP32_GRADE
        assert not r.padding_of(out, b).any()
    assert r.rows_of(out, IDLE).isnan().all()


def test_images() -> None:
    r = new_round()
    G, held = stored(gram_matrices(SIZES), r.plan)
    Ys = r.put(matrices(SIZES), [1 - n % 2 for n in STAGES])  # sharpened
    Q, out = random_thin(r.plan, 1), r.thin(2)
    thin.images(G, Q, r.stages, r.plan, ring=r.ring, out=out)()
    for b in r.active:
        assert relative_error(r.rows_of(out[0], b), held[b] @ r.rows_of(Q, b)) < FP32_GRADE
        assert relative_error(r.rows_of(out[1], b), Ys[b] @ r.rows_of(Q, b)) < FP32_GRADE
        assert not r.padding_of(out, b).any()
    assert r.rows_of(out, IDLE).isnan().all()


@pytest.mark.parametrize("fills", [(0, 0, 0, 1, 2), (3, 2, 1, 0, 3)])
def test_finish(fills: Sequence[int]) -> None:
    """Without padding, at any offset, and nothing between the matrices is touched."""
    r = new_round()
    Ys = r.put(matrices(SIZES), [1 - n % 2 for n in STAGES])  # sharpened
    Z, Q = random_thin(r.plan, 1), random_thin(r.plan, 2)
    tails = (0.1, 0.2, 0.9, 0.3, 0.4)
    ends = torch.tensor([[1 - e, fill] for e, fill in zip(tails, fills, strict=True)], device=DEVICE)
    offsets = [3]
    for m in SIZES:
        offsets.append(offsets[-1] + m * m + 7)
    table = torch.tensor(offsets[:-1], device=DEVICE)
    out = torch.full((offsets[-1],), 5.0, device=DEVICE)
    thin.finish(Z, Q, ends, r.stages, table, r.plan, ring=r.ring, out=out)
    for b, (m, e, fill) in enumerate(zip(SIZES, tails, fills, strict=True)):
        got = out[offsets[b] : offsets[b] + m * m].view(m, m).cpu().double()
        eye = torch.eye(m, dtype=torch.float64)
        update = r.rows_of(Z, b) @ r.rows_of(Q, b).T
        if fill == 0:
            P = (eye + Ys[b]) / 2 - update - update.T
            assert relative_error(got, 2 * P - 2 * (1 - e) * eye) < FP32_GRADE
            assert torch.equal(got, got.T)
        else:
            assert [not got.any(), got.isnan().all(), (got == 5).all()][fill - 1], f"not filled as {fill} says"
        out[offsets[b] : offsets[b] + m * m] = 5.0
    assert (out == 5).all(), "elements between the matrices were written"


def spread_gram(m: int, seed: int, exponent: float) -> Tensor:
    """Positive, of trace 1, lambda_i ~ i^-exponent."""
    energies = torch.arange(1, m + 1).double() ** -exponent
    U = torch.linalg.qr(symmetric(m, seed))[0]
    return (U * (energies / energies.sum())) @ U.T


def window_around(energies: Tensor, k: int, count: int) -> filtered.Window:
    """Around the boundary between rank k and k + 1 of a descending spectrum [m], over `count` eigenvalues."""
    tau = energies[k - 1 : k + 1].mean()[None]
    half = (energies - tau).abs().sort().values[count - 1 : count + 1].mean()[None]
    return filtered.Window(tau, half)


def whitened(r: Round, Z: Tensor, floor: float, *, relative: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`filtered.whiten` of every matrix: the thin buffer, the numbers found and their sums."""
    Q, found, seen = torch.full_like(Z, torch.nan), [], []
    for b, m in enumerate(r.plan.sizes):
        basis, count, total = filtered.whiten(r.rows_of(Z, b)[None], floor, relative=relative)
        first = int(r.plan.row_starts[b])
        Q[first : first + m] = basis[0].float().to(DEVICE)
        found.append(count)
        seen.append(total)
    return Q, found, seen


def test_a_round_at_the_boundary_gives_the_spectral_projector() -> None:
    """All kernels of a round, with the small spectra in float64 between them: k, e and N of an eigendecomposition."""
    sizes, target = (96, 150, 200), torch.tensor(0.1).double()
    r = new_round(sizes, [0] * len(sizes))
    G, held = stored([spread_gram(m, m, x) for m, x in zip(sizes, (1.0, 0.6, 1.4), strict=True)], r.plan)
    wanted = [reference.spectral_projector(value[None], target) for value in held]
    windows = [window_around(energies[0], int(k), 24) for _, k, _, energies in wanted]
    G2, traces, Z, GQ_YQ = torch.full_like(G, torch.nan), r.sums(), r.thin(), r.thin(2)
    steps.square_with_moments(G, r.plan, out=G2, moments=r.sums())
    aims, coefficients = aim(r, held, windows)
    steps.shift(G, G2, aims, r.stages, r.plan, ring=r.ring)()
    steps.compose(coefficients, r.stages, r.plan, ring=r.ring)()
    steps.inside(r.stages, r.plan, ring=r.ring, traces=traces)()
    steps.sharpen(G, r.stages, r.plan, ring=r.ring, traces=traces)()
    thin.sketch(torch.tensor(2, device=DEVICE), r.stages, r.plan, ring=r.ring, out=Z)(0)
    Q, _, _ = whitened(r, Z, filtered.NOISE, relative=True)
    thin.image(Q, r.stages, r.plan, ring=r.ring, out=Z)()
    Q, found, seen = whitened(r, Z, filtered.JUNK**2, relative=False)
    thin.images(G, Q, r.stages, r.plan, ring=r.ring, out=GQ_YQ)()

    ends = torch.zeros(len(sizes), 2, device=DEVICE)
    for b, m in enumerate(sizes):
        sums = torch.cat([r.total(traces, b), seen[b]])[None]
        GQ, YQ = r.rows_of(GQ_YQ, b)[:, None]  # [1, m, w] each
        end = filtered.conclude_round(windows[b], target, sums, r.rows_of(Q, b)[None], found[b], GQ, YQ)
        assert bool(end.resolved), f"m = {m} is not resolved, {int(found[b])} directions found"
        assert int(end.k) == int(wanted[b][1])
        assert float(end.e) == pytest.approx(float(wanted[b][2]), abs=2e-6)
        ends[b, 0] = 1 - float(end.e)
        rows = slice(int(r.plan.row_starts[b]), int(r.plan.row_starts[b]) + m)
        Z[rows], Q[rows] = end.Z[0].float().to(DEVICE), end.Q[0].float().to(DEVICE)
    offsets = torch.tensor([0, 96**2, 96**2 + 150**2], device=DEVICE)
    out = torch.full((sum(m * m for m in sizes),), torch.nan, device=DEVICE)
    thin.finish(Z, Q, ends, r.stages, offsets, r.plan, ring=r.ring, out=out)
    for b, (m, first) in enumerate(zip(sizes, offsets.tolist(), strict=True)):
        P, k, e, _ = wanted[b]
        error = relative_error(out[first : first + m * m].view(m, m), 2 * P[0] - 2 * (1 - e) * torch.eye(m).double())
        print(
            f"m = {m}, k = {int(k)}, {int(found[b])} found, {int(r.stages[b])} stages: relative error of N {error:.1e}"
        )
        assert error < 1e-5


def one_round(grams: list[Tensor]) -> tuple[Round, list[Tensor]]:
    """All kernels one after another with two stages; everything that they write."""
    r = new_round([len(G) for G in grams], [2] * len(grams))
    batch = len(grams)
    G, _ = stored(grams, r.plan)
    G2, moments, traces, Z, Q, both = torch.full_like(G, torch.nan), r.sums(), r.sums(), r.thin(), r.thin(), r.thin(2)
    out = torch.full((sum(m * m for m in r.plan.sizes),), torch.nan, device=DEVICE)
    squares = torch.tensor(r.plan.sizes, dtype=torch.int64, device=DEVICE) ** 2
    offsets = squares.cumsum(0) - squares
    aims = torch.tensor([0.2, 1.0], device=DEVICE).repeat(batch, 1)
    coefficients = torch.tensor([1.5, -0.6, 0.1], device=DEVICE).repeat(batch, 2, 1)
    ends = torch.tensor([0.9, 0.0], device=DEVICE).repeat(batch, 1)
    steps.square_with_moments(G, r.plan, out=G2, moments=moments)
    steps.shift(G, G2, aims, r.stages, r.plan, ring=r.ring)()
    steps.compose(coefficients, r.stages, r.plan, ring=r.ring)()
    steps.inside(r.stages, r.plan, ring=r.ring, traces=traces)()
    steps.sharpen(G, r.stages, r.plan, ring=r.ring, traces=traces)()
    thin.sketch(torch.tensor(1, device=DEVICE), r.stages, r.plan, ring=r.ring, out=Z)(0)
    thin.image(Z, r.stages, r.plan, ring=r.ring, out=Q)()
    thin.images(G, Q, r.stages, r.plan, ring=r.ring, out=both)()
    thin.finish(Z, Q, ends, r.stages, offsets, r.plan, ring=r.ring, out=out)
    results = []
    for b, (start, p, m) in enumerate(zip(r.plan.starts, r.plan.padded, r.plan.sizes, strict=True)):
        span, rows = slice(start, start + p * p), slice(int(r.plan.row_starts[b]), int(r.plan.row_starts[b]) + p)
        first, end = r.plan.tile_starts[b].tolist()
        N = out[int(offsets[b]) : int(offsets[b]) + m * m]
        thins = [Z[rows], Q[rows], both[:, rows]]
        everything = [G2[:, span], r.ring[..., span], moments[first:end], traces[first:end], *thins, N]
        results.append(torch.cat([part.flatten().cpu().double() for part in everything]))
    return r, results


def test_same_bits_each_time_and_not_a_number_stays_in_its_matrix() -> None:
    sizes = (65, 96, 130)
    _, want = one_round(gram_matrices(sizes))
    assert all(values.isfinite().all() for values in want), "something was not written"
    dirty = gram_matrices(sizes)
    dirty[1][70, 5] = dirty[1][5, 70] = torch.nan
    _, got = one_round(dirty)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[2], want[2])
    assert got[1][-(96**2) :].isnan().any()


def test_no_matrices() -> None:
    assert one_round([])[1] == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, G: steps.square_with_moments(G, r.plan, out=G.float(), moments=r.sums()), "out must be contiguous"),
        (lambda r, G: steps.square_with_moments(G, r.plan, out=G, moments=r.sums()), "out shares memory with G"),
        (lambda r, G: steps.square_with_moments(G, r.plan, out=G.clone(), moments=r.sums()[:1]), r"moments .*\(4, 3\)"),
        (lambda r, G: steps.shift(G, G, r.stages, r.stages, r.plan, ring=r.ring), r"aims must be contiguous \(2, 2\)"),
        (lambda r, G: steps.compose(torch.ones(2, 10), r.stages, r.plan, ring=r.ring), r"coefficients .*\(2, 10\)"),
        (lambda r, G: steps.inside(r.stages.long(), r.plan, ring=r.ring, traces=r.sums()), "stages .*int64"),
        (lambda r, G: steps.inside(r.stages, r.plan, ring=r.ring[:2], traces=r.sums()), "ring must be contiguous"),
        (lambda r, G: steps.sharpen(G[0], r.stages, r.plan, ring=r.ring, traces=r.sums()), "G must be contiguous"),
        (lambda r, G: steps.sharpen(G, r.stages, r.plan, ring=r.ring, traces=r.sums()[:, :2]), r"traces .*\(4, 3\)"),
        (lambda r, G: thin.sketch(r.stages[0], r.stages, r.plan, ring=r.ring, out=r.thin())(0), "seed .*int64"),
        (
            lambda r, G: thin.sketch(r.stages[0].long(), r.stages, r.plan, ring=r.ring, out=r.thin())(128),
            r"draw must be in 0\.\.127, got 128",
        ),
        (lambda r, G: thin.image(r.thin()[:, :24], r.stages, r.plan, ring=r.ring, out=r.thin()), "columns, got 24"),
        (lambda r, G: thin.images(G, r.thin(), r.stages, r.plan, ring=r.ring, out=r.thin()), r"out .*\(2, 192, 32\)"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    r = new_round((64, 65), (1, 1))
    with pytest.raises(ValueError, match=message):
        call(r, PAIRS.store(matrices((64, 65)), r.plan))


def specs(arch: int, width: int) -> list[KernelSpec]:
    """All kernels with all their combinations of arguments."""
    pairs, fp32, int32 = "*fp16", "*fp32", "*i32"
    per_matrix = {"stages_ptr": int32, "orders_ptr": int32}
    square = {"tiles_ptr": int32, "numel": "i32"}
    product, alone = {"BLOCK": 64, "BLOCK_K": steps.BLOCK_K}, {"BLOCK": 64}
    strip = {"matrices_ptr": pairs, "out_ptr": fp32, "row_blocks_ptr": int32, "numel": "i32", "rows_total": "i32"}
    wide = {"BLOCK": 64, "W": width}

    def spec(kernel: str, aligned: dict[str, str], constants: dict[str, object], **anywhere: str) -> KernelSpec:
        name = f"rpg_fast.kernels.{kernel}"
        return KernelSpec(name, arch, aligned | anywhere, constants, tuple(aligned))

    moments = {"G_ptr": pairs, "out_ptr": pairs, "moments_ptr": fp32} | square
    shift = {"G_ptr": pairs, "G2_ptr": pairs, "aims_ptr": fp32, "ring_ptr": pairs} | per_matrix | square
    inside = {"ring_ptr": pairs, "traces_ptr": fp32} | per_matrix | square
    sharpen = {"G_ptr": pairs, "ring_ptr": pairs, "traces_ptr": fp32, "stages_ptr": int32} | square
    strip |= per_matrix
    ends = {"ends_ptr": fp32, "offsets_ptr": "*i64", "row_starts_ptr": int32}
    finish = {"Z_ptr": fp32, "Q_ptr": fp32, "ring_ptr": pairs, "out_ptr": fp32} | ends | per_matrix | square
    return [
        spec("filter:_square_kernel", moments, product),
        spec("filter:_shift_kernel", shift, alone),
        spec("filter:_inside_kernel", inside, product),
        spec("filter:_sharpen_kernel", sharpen, product),
        spec("thin:_thin_kernel", strip | {"seed_ptr": "*i64"}, wide | {"ring_ptr": None, "Q_ptr": None}, draw="i32"),
        spec("thin:_thin_kernel", strip | {"Q_ptr": fp32}, wide | {"ring_ptr": None, "seed_ptr": None}, draw="i32"),
        spec("thin:_thin_kernel", strip | {"Q_ptr": fp32, "ring_ptr": pairs}, wide | {"seed_ptr": None}, draw="i32"),
        spec("thin:_finish_kernel", finish, wide),
    ]


SPECS = [spec for arch in (80, 90, 100) for spec in specs(arch, 32)]
SPECS += [spec for spec in specs(90, 64) if "W" in spec.constants]
SINE_STACK = 32  # bytes, for the reduction of large arguments, which 2 pi u never is


@pytest.fixture(scope="module")
def compiled() -> list[CompiledKernel]:
    return compile_kernels(SPECS)


def test_ahead_of_time_without_spills_on_tensor_cores(compiled: list[CompiledKernel]) -> None:
    for kernel in compiled:
        print(kernel)
        spec = kernel.spec
        draws = spec.signature.get("seed_ptr") is not None
        if spec.arch == 90:
            assert kernel.stack <= SINE_STACK * draws, f"spills: {kernel}"
            assert kernel.local == 0, f"spills: {kernel}"
        if "shift" not in spec.kernel:
            assert kernel.instructions, f"no tensor-core instruction: {kernel}"
            assert spec.arch != 90 or kernel.instructions.get("HGMMA"), f"no wgmma: {kernel}"
