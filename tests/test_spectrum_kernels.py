"""The pieces of the power method that one block does for one matrix: the kernels against their meaning in plain torch,
and both, in rounds, against the whole spectrum."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from aot import ROOT
from cases import make_weight, seeded
from torch import Tensor

from rpg_fast import _extension, filtered, grouping, ledger, reference
from rpg_fast.ledger import COLUMNS, column

W = filtered.WIDTH
BLOCK = 64
ROUNDED = 2e-6  # thin matrices and the images are float32


def op(name: str) -> Callable[..., None]:
    return getattr(torch.ops.rpg_fast, name).default


def double(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)


@dataclass
class Call:
    """B Gram matrices [m, m] as the kernels hold them, and all that the pieces write. The square matrices' products are
    float64, rounded to float32 where they are handed over."""

    grams: list[Tensor]
    device: torch.device
    target: float = 0.1

    def __post_init__(self) -> None:
        sizes = [len(G) for G in self.grams]
        sides = [(m + BLOCK - 1) // BLOCK for m in sizes]
        tiles = [s * (s + 1) // 2 for s in sides]
        ends = torch.tensor(tiles).cumsum(0)
        firsts = torch.tensor([0, *(s * s for s in sides)]).cumsum(0)
        rows = torch.tensor([0, *(s * BLOCK for s in sides)]).cumsum(0)
        self.orders = self.int32(sizes)
        self.tile_starts = self.int32(torch.stack([ends - torch.tensor(tiles), ends], 1).tolist())
        self.tiles = self.int32(
            [[int(firsts[b]), sides[b], 0, 0, b] for b in range(len(sizes)) for _ in range(tiles[b])]
        )
        self.row_starts = self.int32(rows[:-1].tolist())
        self.starts, self.numel, self.rows = (
            (firsts[:-1] * BLOCK**2).tolist(),
            int(firsts[-1]) * BLOCK**2,
            int(rows[-1]),
        )
        largest = torch.stack([G.abs().amax() for G in self.grams])
        self.scales = torch.where(largest > 0, 2.0 ** (-largest.log2()).floor(), 1.0).float().to(self.device)
        self.norms = torch.where(largest > 0, 3.0, 0.0).double().to(self.device)
        self.goal = double(self.target, self.device)
        self.grid, self.table = filtered.step_table(self.device)
        batch, stages = len(sizes), self.table.shape[1]
        self.ledger = torch.full((batch, len(COLUMNS)), torch.nan, dtype=torch.float64, device=self.device)
        self.stages, self.settled = self.int32([1] * batch), self.int32([7] * batch)
        self.aims = torch.full((batch, 2), torch.nan, device=self.device)
        self.coefficients = torch.full((batch, stages, 3), torch.nan, device=self.device)
        self.Z, self.Q = torch.full((2, self.rows, W), torch.nan, device=self.device)
        self.windows = torch.zeros(batch, 2, dtype=torch.float64, device=self.device)

    def int32(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def scaled(self, b: int) -> Tensor:
        return self.grams[b].to(self.device) * self.scales[b].double()

    def rows_of(self, thin: Tensor, b: int) -> Tensor:
        return thin[..., int(self.row_starts[b]) :, :][..., : len(self.grams[b]), :]

    def over_tiles(self, sums: Sequence[Tensor]) -> Tensor:
        """float32 [T, 3]: the sums [3] of each matrix, spread over its tiles."""
        traces = torch.full((int(self.tile_starts[-1, 1]), 3), torch.nan, device=self.device)
        for (first, last), total in zip(self.tile_starts.tolist(), sums, strict=True):
            traces[first:last] = (total / (last - first)).float()
        return traces

    def opening(self) -> list[Any]:
        moments = []
        for b in range(len(self.grams)):
            G = self.scaled(b)
            moments.append(torch.stack([(G * G).sum(), (G * (G @ G)).sum(), (G @ G).square().sum()]))
        return [
            self.ledger, self.stages, self.settled, self.aims, self.coefficients, self.over_tiles(moments),
            self.tile_starts, self.orders, self.norms, self.scales, self.goal, self.windows, self.grid, self.table,
        ]  # fmt: skip

    def step(self, b: int) -> Tensor:
        """Y, with the last stage that squares its error, as the aims and coefficients say."""
        eye = torch.eye(len(self.grams[b]), dtype=torch.float64, device=self.device)
        Y = (self.scaled(b) - self.aims[b, 0].double() * eye) * self.aims[b, 1].double()
        for a, b_, c in self.coefficients[b, : int(self.stages[b])].double():
            A = Y @ Y
            Y = a * Y + (b_ * A + c * A @ A) @ Y
        return Y

    def thin(self) -> list[Tensor]:
        return [self.orders, self.row_starts, self.stages]

    def projector(self, b: int, Y: Tensor) -> Tensor:
        Q, Z = self.rows_of(self.Q, b).double(), self.rows_of(self.Z, b).double()
        return (torch.eye(len(Y), dtype=Y.dtype, device=Y.device) + Y) / 2 - Z @ Q.T - Q @ Z.T


def both(name: str, arguments: list[Any]) -> tuple[list[Any], list[Any]]:
    """Runs the op in place and its meaning on copies; returns the arguments of both."""
    wanted = copy.deepcopy(arguments)
    op(name)(*arguments)
    getattr(ledger, name)(*wanted)
    return arguments, wanted


def is_basis(Q: Tensor, found: int, digits: float = 1e-5) -> bool:
    """Orthonormal in its first columns, zero in the others."""
    want = torch.diag((torch.arange(Q.shape[-1], device=Q.device) < found).double())
    return bool((Q.double().T @ Q.double() - want).abs().max() < digits)


def spectrum_cases() -> list[Tensor]:
    weights = [
        make_weight("kaiming", (96, 128)), make_weight("power-0.5", (147, 200), 0.9),
        make_weight("power-1.2", (70, 33, 3, 3), 0.5), torch.zeros(65, 70),
    ]  # fmt: skip
    return [reference.normalised_gram(grouping.short_side_first(w))[0] for w in weights]


def compare_round(call: Call, generator: torch.Generator) -> list[Tensor]:
    """One round of all matrices by the ops, each of which is compared with its meaning; returns the steps Y."""
    steps = [call.step(b) for b in range(len(call.grams))]
    insides = [(torch.eye(len(Y), dtype=Y.dtype, device=Y.device) - Y @ Y) / 4 for Y in steps]
    taking_part = call.stages.nonzero()[:, 0].tolist()
    sketch, image = torch.full((2, call.rows, W), torch.nan, device=call.device)
    for b in taking_part:
        omega = torch.randn(len(steps[b]), W, generator=generator, dtype=torch.float64).to(call.device)
        call.rows_of(sketch, b).copy_(insides[b] @ omega)
    op("filter_range_")(call.Q, sketch, *call.thin(), filtered.NOISE)
    for b in taking_part:
        Z, Q = call.rows_of(sketch, b).double(), call.rows_of(call.Q, b).double()
        assert is_basis(Q, int(Q.any(0).sum()), 1e-3)  # of directions as weak as the floor, 1e-16 / 1e-11 is known
        assert (Z - Q @ (Q.T @ Z)).norm() < 2e-5 * Z.norm()
        call.rows_of(image, b).copy_(insides[b] @ Q)

    got, want = both("filter_principal_", [call.Q, call.ledger, image, *call.thin(), filtered.JUNK**2])
    for b in taking_part:
        Q, wanted = (call.rows_of(thin, b).double() for thin in (got[0], want[0]))
        assert is_basis(Q, int(column(got[1], "found")[b]))
        assert (Q @ Q.T - wanted @ wanted.T).norm() < 1e-5
    torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=0, equal_nan=True)

    images = torch.full((2, call.rows, W), torch.nan, device=call.device)
    traces = []
    for b, (Y, C) in enumerate(zip(steps, insides, strict=True)):
        G, Q = call.scaled(b), call.rows_of(call.Q, b).double()
        Y += 2 * C @ Y
        call.rows_of(images, b).copy_(torch.stack([G @ Q, Y @ Q]))
        traces.append(torch.stack([Y.trace(), (Y * G).sum(), C.square().sum()]))
    arguments = [
        call.ledger, call.stages, call.settled, call.aims, call.coefficients, call.Z, call.Q, images,
        call.over_tiles(traces), call.tile_starts, call.orders, call.row_starts, call.goal, call.grid, call.table,
    ]  # fmt: skip
    got, want = both("filter_conclude_", arguments)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-8, equal_nan=True)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])
    torch.testing.assert_close(got[3:5], want[3:5], rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(got[5], want[5], rtol=0, atol=ROUNDED, equal_nan=True)
    return steps


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_rounds_find_the_projector(target: float, device: torch.device) -> None:
    call = Call(spectrum_cases(), device, target)
    got, want = both("filter_open_", call.opening())
    torch.testing.assert_close(got[:5], want[:5], rtol=1e-6, atol=0, equal_nan=True)
    open_ones = set(call.stages.nonzero()[:, 0].tolist())
    assert open_ones == {0, 1, 2}
    generator = seeded(3)
    for _ in range(filtered.COLD_ROUNDS):
        steps = compare_round(call, generator)
        for b in sorted(open_ones - set(call.stages.nonzero()[:, 0].tolist())):
            open_ones.remove(b)
            assert call.settled[b] > 0
            P, k, e, _ = reference.spectral_projector(call.grams[b][None], torch.tensor(target, dtype=torch.float64))
            assert column(call.ledger, "k")[b] == int(k)
            assert abs(float(column(call.ledger, "e")[b]) - float(e)) < 1e-6
            assert (call.projector(b, steps[b]).cpu() - P[0]).norm() < 1e-4
    assert not open_ones
    assert column(call.ledger, "k")[3] == 0
    assert not call.Z[int(call.row_starts[3]) :].isfinite().any()  # it took no part


def test_a_window_of_the_last_call_is_taken_up(device: torch.device) -> None:
    call = Call(spectrum_cases(), device)
    call.windows[:] = torch.tensor([[0.01, 0.001], [0.02, 0.0], [0.005, 1.0], [0.1, 0.1]], dtype=torch.float64)
    call.norms[2] = torch.nan
    call.stages[0] = 0
    got, want = both("filter_open_", call.opening())
    torch.testing.assert_close(got[:5], want[:5], rtol=1e-6, atol=0, equal_nan=True)
    assert call.stages.tolist()[::2] == [0, 0]
    assert column(call.ledger, "k").tolist() == [-1, -1, -1, 0]
    assert column(call.ledger, "e").isnan().tolist() == [False, False, True, False]


def thin_cases() -> dict[str, Tensor]:
    gaussian = torch.randn(90, W, generator=seeded(1), dtype=torch.float64)
    U, _, V = torch.linalg.svd(gaussian, full_matrices=False)
    return {
        "gaussian": gaussian,
        "graded": U * 10 ** -torch.linspace(0, 4, W, dtype=torch.float64) @ V,
        "rank one": gaussian[:, :1] * gaussian[:1],
        "rank nine": gaussian[:, :9] @ torch.randn(9, W, generator=seeded(2), dtype=torch.float64),
        "equal": U @ V,
        "repeated columns": gaussian[:, :4].repeat(1, W // 4),
        "few rows": gaussian[:5],
        "one row": gaussian[:1],
        "zero": torch.zeros(90, W, dtype=torch.float64),
        "tiny": 1e-30 * gaussian,
        "huge": 1e30 * gaussian,
    }


@pytest.mark.parametrize("name", thin_cases())
@pytest.mark.parametrize("width", [4, 20, W])
def test_bases_of_hostile_matrices(name: str, width: int, device: torch.device) -> None:
    thin = thin_cases()[name][:, :width].float().contiguous().to(device)
    Z = torch.cat([thin, torch.full((3, width), torch.nan, device=device)])  # padding is not read
    tables = [torch.tensor([n], dtype=torch.int32, device=device) for n in (len(thin), 0, 1)]
    Q = torch.full_like(Z, torch.nan)
    op("filter_range_")(Q, Z, *tables, filtered.NOISE)
    basis = Q[: len(thin)].double()
    rank = torch.linalg.matrix_rank(thin.double(), rtol=3e-6)
    assert int(basis.any(0).sum()) == rank
    assert is_basis(basis, rank)
    assert (thin - basis @ (basis.T @ thin.double())).norm() <= 2e-5 * thin.double().norm()
    assert Q[len(thin) :].isnan().all()

    state = torch.zeros(1, len(COLUMNS), dtype=torch.float64, device=device)
    floor = 1e-6 * float(thin.double().square().amax())
    got, want = both("filter_principal_", [Q, state, Z, *tables, floor])
    found = int(column(got[1], "found")[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=0)
    assert is_basis(Q[: len(thin)], found)
    projectors = [(q[: len(thin)] @ q[: len(thin)].T).double() for q in (got[0], want[0])]
    assert (projectors[0] - projectors[1]).abs().max() < 1e-5
    images = (Q[: len(thin)].double().T @ thin.double()).norm(dim=1)  # the singular values, descending
    assert (images[1:] <= images[:-1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_has_no_basis_and_leaves_the_others_alone(bad: float, device: torch.device) -> None:
    Z = torch.randn(192, W, generator=seeded(5)).to(device)
    orders, starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([50, 50, 50], [0, 64, 128]))
    stages = torch.tensor([1, 1, 0], dtype=torch.int32, device=device)
    clean, dirty = torch.full((2, 192, W), 7.0, device=device)
    op("filter_range_")(clean, Z, orders, starts, stages, filtered.NOISE)
    Z[3, 5] = bad
    op("filter_range_")(dirty, Z, orders, starts, stages, filtered.NOISE)
    assert not dirty[:50].any()
    assert torch.equal(dirty[50:], clean[50:])
    assert (dirty[128:] == 7).all()
    state = torch.ones(3, len(COLUMNS), dtype=torch.float64, device=device)
    got, want = both("filter_principal_", [dirty, state, Z, orders, starts, stages, 1e-6])
    torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=0)
    assert column(state, "found").tolist() == [0, W, 1]


def small_call(device: torch.device, target: float) -> tuple[Call, list[Any]]:
    shapes = [(64, 100), (1, 9), (2, 5), (33, 50), (64, 20, 3, 3), (17, 17), (63, 640), (40, 60)]
    families = ["power-0.5", "kaiming", "kaiming", "power-1.2", "kaiming", "power-0.8", "power-0.5", "kaiming"]
    weights = [make_weight(f, s, seed=i) for i, (f, s) in enumerate(zip(families, shapes, strict=True))]
    weights[3][5:15] = 0  # zero rows
    weights[5] = torch.eye(17)
    weights[6] = torch.zeros(63, 640)
    call = Call([reference.normalised_gram(grouping.short_side_first(w))[0] for w in weights], device, target)
    call.norms[7] = torch.nan
    flat = torch.zeros(call.numel, dtype=torch.float64, device=device)
    for b, start in enumerate(call.starts):
        m = len(call.grams[b])
        flat[start : start + BLOCK**2].view(BLOCK, BLOCK)[:m, :m] = call.scaled(b)
    hi = flat.half()
    pairs = torch.stack([hi, ((flat - hi.double()) * 2048).half()])
    sizes = [len(G) for G in call.grams]
    offsets = torch.tensor([0, *(m * m for m in sizes)], device=device).cumsum(0)
    projector = torch.full((int(offsets[-1]),), 5.0, device=device)
    members = call.int32([7, 0, 1, 2, 3, 4, 5, 6])
    return call, [
        call.ledger, projector, members, pairs, call.tiles, call.tile_starts, call.orders, offsets[:-1].contiguous(),
        call.norms, call.scales, call.goal,
    ]  # fmt: skip


@pytest.mark.parametrize("target", [0.0, 0.1, 0.6, 1.0])
def test_small_spectra(target: float, device: torch.device) -> None:
    call, arguments = small_call(device, target)
    got, want = both("small_spectrum_", arguments)
    exact = [b for b in range(8) if not (target == 0 and b in (3, 4))]  # there the rank hangs on rounding errors
    exact.remove(5)  # equal eigenvalues: any of them will do
    for name, digits in (("k", 0.0), ("e", 1e-6)):
        a, b = column(got[0], name)[exact], column(want[0], name)[exact]
        torch.testing.assert_close(a, b, rtol=0, atol=digits, equal_nan=True)
    for b, start in enumerate(arguments[7].tolist()):
        m = len(call.grams[b])
        N, wanted = (x[1][start : start + m * m].view(m, m).double() for x in (got, want))
        if b in exact:
            torch.testing.assert_close(N, wanted, rtol=0, atol=2e-5, equal_nan=True)
        elif b == 5:
            P = N / 2 + (1 - column(got[0], "e")[b]) * torch.eye(m, device=device)
            assert (P @ P - P).norm() < 1e-5


def eigenproblems(w: int) -> Tensor:
    """[B, w, w]: random, positive, rank one, equal eigenvalues, steep, zero, with NaN or an infinity, huge, tiny."""
    X = torch.randn(w, w, generator=seeded(w), dtype=torch.float64)
    Q = torch.linalg.qr(X).Q
    steep = Q * torch.logspace(0, -30, w, dtype=torch.float64) @ Q.mT
    twice = Q * torch.arange(w, dtype=torch.float64).div(2, rounding_mode="floor") @ Q.mT
    matrices = [X + X.mT, X @ X.mT, X[:, :1] @ X[:, :1].mT, torch.eye(w).double(), steep, twice, torch.zeros(w, w)]
    matrices += [X + torch.nan, torch.where(torch.eye(w) > 0, torch.inf, X), 1e300 * (X + X.mT), 1e-300 * (X + X.mT)]
    return torch.stack([m.double() for m in matrices])


@pytest.mark.parametrize("w", [1, 2, 3, 8, 15, 31, 32, 33, 40, 64])
def test_small_eigenproblems(w: int, device: torch.device) -> None:
    """Eigenvalues as LAPACK's, eigenvectors orthonormal, and each of them one: no two programs agree on their signs, or
    where eigenvalues are equal on more."""
    matrices = eigenproblems(w).to(device)
    only_lower = matrices.tril() + torch.ones_like(matrices).triu(1)
    values, vectors = matrices.new_empty(len(matrices), w), torch.empty_like(matrices)
    op("small_eigh_")(values, vectors, only_lower)
    want = torch.empty_like(values), torch.empty_like(vectors)
    ledger.small_eigh_(*want, matrices)
    finite = matrices.isfinite().all(-1).all(-1)
    assert values[~finite].isnan().all()
    assert vectors[~finite].isnan().all()
    scale = matrices[finite].abs().amax((-2, -1)).clamp(min=1e-320)[:, None]
    difference = (values - want[0])[finite] / scale
    assert difference.abs().max() < 1e-13 * w
    V = vectors[finite]
    assert (V @ V.mT - torch.eye(w, device=device, dtype=torch.float64)).abs().max() < 1e-13 * w
    residual = V @ (matrices[finite] / scale[..., None]) - (values[finite] / scale)[..., None] * V
    assert residual.abs().max() < 1e-13 * w


def test_small_eigenproblems_take_any_batch_and_refuse_the_rest(device: torch.device) -> None:
    one = torch.ones(3, 5, 5, dtype=torch.float64, device=device)
    empty = one[:0]
    op("small_eigh_")(empty.new_empty(0, 5), torch.empty_like(empty), empty)
    torch.library.opcheck(op("small_eigh_"), (one.new_empty(3, 5), torch.empty_like(one), one))
    if not _extension.load().loaded:  # plain torch checks less
        return
    large = torch.ones(1, 65, 65, dtype=torch.float64, device=device)
    for matrices, text in ((large, "with w from 1 to 64, got"), (one.float(), "contiguous float64"), (one[0], "w, w")):
        with pytest.raises(RuntimeError, match=text):
            op("small_eigh_")(matrices.new_empty(matrices.shape[:-1]), torch.empty_like(matrices), matrices)


def test_same_bits_every_time_and_opcheck(device: torch.device) -> None:
    call = Call(spectrum_cases()[:2], device)
    opening = call.opening()
    torch.library.opcheck(op("filter_open_"), copy.deepcopy(opening))
    op("filter_open_")(*opening)
    Z = torch.randn(call.rows, W, generator=seeded(8)).to(device)
    thin = [Z, *call.thin()]
    torch.library.opcheck(op("filter_range_"), (call.Q.clone(), *thin, 1e-11))
    torch.library.opcheck(op("filter_principal_"), (call.Q.clone(), call.ledger.clone(), *thin, 1e-6))
    images = torch.randn(2, call.rows, W, generator=seeded(9)).to(device)
    traces = call.over_tiles([torch.ones(3)] * 2)
    concluding = [
        call.ledger, call.stages, call.settled, call.aims, call.coefficients, call.Z, Z, images, traces,
        call.tile_starts, call.orders, call.row_starts, call.goal, call.grid, call.table,
    ]  # fmt: skip
    torch.library.opcheck(op("filter_conclude_"), copy.deepcopy(concluding))
    torch.library.opcheck(op("small_spectrum_"), tuple(small_call(device, 0.1)[1]))
    runs = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        mine = copy.deepcopy(concluding)
        mine[5].zero_()
        op("filter_principal_")(mine[6], mine[0], *copy.deepcopy(thin), 1e-6)
        op("filter_conclude_")(*mine)
        runs.append(mine[:7])
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not _extension.load().loaded, reason="plain torch checks less")
def test_wrong_arguments_are_named(device: torch.device) -> None:
    Z, Q = torch.zeros(2, 64, W, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"filter_range_: Z must be a contiguous float32 \[64, 32\].*got float64"):
        op("filter_range_")(Q, Z.double(), one, one, one, 1e-11)
    with pytest.raises(RuntimeError, match=r"stages must be a contiguous int32 \[1\].*got int64 \[1\]"):
        op("filter_range_")(Q, Z, one, one, one.long(), 1e-11)
    with pytest.raises(RuntimeError, match=r"w a multiple of 4 up to 32, got float32 \[64, 48\]"):
        op("filter_range_")(Q.new_zeros(64, 48), Q.new_zeros(64, 48), one, one, one, 1e-11)
    with pytest.raises(
        RuntimeError, match=rf"filter_principal_: ledger must .* \[1, {len(COLUMNS)}\].*got float64 \[1, 3\]"
    ):
        op("filter_principal_")(Q, Q.new_zeros(1, 3, dtype=torch.float64), Z, one, one, one, 1e-6)
    call = Call(spectrum_cases()[:1], device)
    opening = call.opening()
    opening[10] = torch.zeros(1, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=r"filter_open_: target must be a contiguous float64 \[\]"):
        op("filter_open_")(*opening)


@pytest.mark.parametrize("length", [0, 1, 479, 480, 481, 1500])
def test_device_table(length: int, device: torch.device) -> None:
    values = [(-1) ** i * (1 << (i % 63)) + i for i in range(length)]
    like = torch.empty(3, device=device)
    table = torch.ops.rpg_fast.device_table(like, values)
    assert table.tolist() == values
    assert (table.dtype, table.device) == (torch.int64, like.device)
    torch.library.opcheck(op("device_table"), (like, values))


def test_constants_are_those_of_the_plain_torch_method() -> None:
    """csrc keeps its own copies."""
    source = "".join((ROOT / "csrc" / name).read_text() for name in ("window.h", "spectrum.h", "basis.h"))
    found = {name: float(value) for name, value in re.findall(r"\bk(\w+) = ([\d.e-]+)[,;]", source)}
    shared = {name: value for name, value in found.items() if hasattr(filtered, name.upper())}
    assert len(shared) == 14
    assert shared == {name: getattr(filtered, name.upper()) for name in shared}
