"""rank_loss and add_rank_grad_: against the official formula in float64, on real shapes and on hostile matrices."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from cases import (
    DTYPES,
    FAMILIES,
    HOSTILE_FINITE,
    HOSTILE_NOT_FINITE,
    LAYOUTS,
    RESNET50,
    SMALL_SHAPES,
    SPARSITIES,
    SUBNORMAL,
    TIE_MARGIN,
    TOLERANCES,
    Shape,
    make_weight,
    relative_error,
    seeded,
)
from oracles import Spectrum, official_rank_loss, official_spectrum
from torch import Tensor, nn

import rpg_fast
from rpg_fast import RankState, add_rank_grad_, rank_loss


def loss_and_gradients(weights: Sequence[Tensor], tail_energy: float, **options: object) -> tuple[Tensor, list[Tensor]]:
    """Through autograd, for leaves in the storage of `weights`; the exact method on every device."""
    leaves = [w.detach().requires_grad_() for w in weights]
    loss = rank_loss(leaves, tail_energy, **({"method": "exact"} | options))  # type: ignore[arg-type]
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def check(
    weights: Sequence[Tensor],
    tail_energy: float,
    min_sparsity: float = 0.0,
    spectra: Sequence[Spectrum | None] | None = None,
) -> tuple[float, float]:
    """Ranks first, then loss and gradients against float64. Returns their worst relative errors."""
    state = RankState()
    loss, gradients = loss_and_gradients(weights, tail_energy, state=state, min_sparsity=min_sparsity)
    assert state.ranks is not None
    ranks = state.ranks.tolist()
    wanted_loss, wanted, spectra = official_rank_loss(weights, tail_energy, ranks, min_sparsity, spectra)
    for index, (k, spectrum) in enumerate(zip(ranks, spectra, strict=True)):
        assert spectrum is None or spectrum.allows(k, tail_energy, TIE_MARGIN), (
            f"weight {index}: k = {k}, wanted {spectrum.k(tail_energy)}"
        )

    tolerance = TOLERANCES["exact", weights[0].dtype]
    loss_error = abs(float(loss) - float(wanted_loss))
    assert loss_error <= tolerance.loss * abs(float(wanted_loss)) + tolerance.loss_absolute
    worst = 0.0
    for gradient, right, weight in zip(gradients, wanted, weights, strict=True):
        assert gradient.dtype == weight.dtype
        assert gradient.shape == weight.shape
        error = float((gradient.double().cpu() - right).norm())
        scale = 2 / float(weight.double().norm()) if right.any() else 0.0
        assert error <= tolerance.gradient * float(right.norm()) + tolerance.gradient_absolute * scale
        worst = max(worst, error / float(right.norm()) if error else 0.0)
    return loss_error / max(abs(float(wanted_loss)), 1e-30), worst


# ------------------------------------------------------------------------------------------------------ against float64


def rotated_cases() -> list[tuple[Shape, str, float, str, float]]:
    """Every distinct shape of ResNet-50 once or twice, with the families, sparsities, prunings and targets taking
    turns."""
    families, sparsities = itertools.cycle(FAMILIES), itertools.cycle(SPARSITIES)
    hows, targets = itertools.cycle(("magnitude", "random", "rows")), itertools.cycle((0.1, 0.2))
    cases = []
    for shape in RESNET50:
        small = min(shape[0], math.prod(shape[1:])) <= 128
        for _ in range(4 if small else 1):
            cases.append((shape, next(families), next(sparsities), next(hows), next(targets)))
        next(families)  # so that the cycles drift against each other
    return cases


@pytest.mark.parametrize(("shape", "family", "sparsity", "how", "tail_energy"), rotated_cases())
def test_distinct_shapes_of_resnet50(
    shape: Shape, family: str, sparsity: float, how: str, tail_energy: float, device: torch.device
) -> None:
    check([make_weight(family, shape, sparsity, how).to(device)], tail_energy)


@pytest.mark.full
@pytest.mark.parametrize("shape", RESNET50, ids=str)
def test_all_of_resnet50(shape: Shape, device: torch.device, record_property: Callable[[str, object], None]) -> None:
    worst = (0.0, 0.0)
    for family, (sparsity, how) in itertools.product(
        FAMILIES, [*((s, "magnitude") for s in SPARSITIES), (0.9, "random"), (0.9, "rows")]
    ):
        weights = [make_weight(family, shape, sparsity, how).to(device)]
        _, _, spectra = official_rank_loss(weights, 0.1)
        for tail_energy in (0.1, 0.2):
            errors = check(weights, tail_energy, spectra=spectra)
            worst = max(worst[0], errors[0]), max(worst[1], errors[1])
    record_property("worst_loss_error", worst[0])
    record_property("worst_gradient_error", worst[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail_energy", [0.0, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0])
def test_mixed_shapes_in_one_call(dtype: torch.dtype, tail_energy: float, device: torch.device) -> None:
    weights = [make_weight("power-0.5", shape, seed=i).to(device, dtype) for i, shape in enumerate(SMALL_SHAPES)]
    check(weights, tail_energy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(12, 5, 3, 3), (40, 3, 3, 2), (8, 12, 1, 1), (1, 6, 3, 3)], ids=str)
def test_storage_does_not_matter(shape: Shape, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    plain = make_weight("power-0.5", shape, 0.5).to(device, dtype)
    weight = LAYOUTS[layout](plain)
    check([weight], 0.1)
    _, [gradient] = loss_and_gradients([weight], 0.1)
    if weight.is_contiguous() or layout in ("channels_last", "transposed"):
        assert gradient.stride() == weight.stride()  # the gradient lies as the weight does


def test_gradcheck_in_float64(device: torch.device) -> None:
    """Finite differences see the singular vectors move, the formula does not differentiate them: both agree, because
    the projector maximises <P, G> among those of its rank."""
    weights = [make_weight("power-0.8", shape).to(device, torch.float64) for shape in ((5, 7), (9, 4), (3, 2, 2, 2))]

    def loss(*leaves: Tensor) -> Tensor:
        return rank_loss(leaves, 0.15)

    assert torch.autograd.gradcheck(loss, [w.requires_grad_() for w in weights])


@pytest.mark.parametrize("name", HOSTILE_FINITE)
@pytest.mark.parametrize("tail_energy", [0.1, 0.5])
def test_gradient_identities_on_hostile_matrices(name: str, tail_energy: float, device: torch.device) -> None:
    """What holds even where the projector is not unique: the value, ||gradient|| = 2 sqrt(e - e^2) / ||W||, and a
    gradient orthogonal to the weight."""
    W = HOSTILE_FINITE[name]().to(device)
    state = RankState()
    loss, [gradient] = loss_and_gradients([W], tail_energy, state=state)
    assert state.ranks is not None
    assert state.tail_energies is not None
    assert state.flags is not None
    assert gradient.isfinite().all()
    [k], [e], [flag] = state.ranks.tolist(), state.tail_energies.tolist(), state.flags.tolist()
    assert flag == 0
    assert float(loss) == pytest.approx(-e, abs=1e-7)
    if W.numel() == 0 or not W.any():
        assert (k, e, float(loss)) == (0, 0, 0)
        assert not gradient.any()
        return
    X = W.double().flatten(1).cpu()
    spectrum = official_spectrum(X / X.norm())
    assert spectrum.allows(k, tail_energy, TIE_MARGIN)
    assert e == pytest.approx(float(spectrum.S[k:].square().sum()), rel=1e-6, abs=1e-9)
    norm = X.norm()
    scaled = gradient.double().cpu().flatten(1) * norm / 2  # R - e Wn
    assert float(scaled.norm()) == pytest.approx(math.sqrt(max(0.0, e - e * e)), rel=2e-5, abs=1e-6)
    assert float((scaled * X / norm).sum()) == pytest.approx(0, abs=1e-6)


# Where the projector is unique the gradient must also be the official one.
UNIQUE = [
    "all zero",
    "rank one",
    "one element",
    "one nonzero",
    "one row",
    "one column",
    "huge",
    "largest float",
    "tiny",
]
UNIQUE += ["wide range", "zero rows and columns", "no rows", "no columns", "negative zero"]


@pytest.mark.parametrize("name", UNIQUE)
def test_official_gradient_on_hostile_matrices(name: str, device: torch.device) -> None:
    check([HOSTILE_FINITE[name]().to(device)], 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*HOSTILE_FINITE, *HOSTILE_NOT_FINITE, *SUBNORMAL])
def test_hostile_matrices_in_other_dtypes(name: str, dtype: torch.dtype, device: torch.device) -> None:
    W = {**HOSTILE_FINITE, **HOSTILE_NOT_FINITE, **SUBNORMAL}[name]().to(device, dtype)
    loss, [gradient] = loss_and_gradients([W], 0.1)
    assert loss.isnan() == (not bool(W.isfinite().all()))
    assert gradient.shape == W.shape


@pytest.mark.parametrize("name", SUBNORMAL)
def test_subnormal_weights(name: str, device: torch.device) -> None:
    """The loss is as of any other weight (the true gradient, about 1 / ||W||, is beyond float32)."""
    W = SUBNORMAL[name]().to(device)
    loss, _ = loss_and_gradients([W], 0.1)
    wanted, _, _ = official_rank_loss([W], 0.1)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)


def test_exact_ties_take_the_larger_k(device: torch.device) -> None:
    """diag(1, 1, 1, 1): tails 3/4, 1/2, 1/4 for k = 1, 2, 3; the target 3/8 is as near to 1/2 as to 1/4."""
    state = RankState()
    loss = rank_loss([torch.eye(4, device=device) * 3], 0.375, method="exact", state=state)
    assert state.ranks is not None
    assert state.ranks.tolist() == [3]
    assert float(loss) == -0.25


def test_target_zero_keeps_the_last_singular_value(device: torch.device) -> None:
    """The tail never becomes empty: k <= m - 1."""
    state = RankState()
    W = torch.diag(torch.tensor([2.0, 1.0, 1.0])).to(device)
    loss = rank_loss([W], 0.0, method="exact", state=state)
    assert state.ranks is not None
    assert state.ranks.tolist() == [2]
    assert float(loss) == pytest.approx(-1 / 6)


def test_scale_does_not_matter(device: torch.device) -> None:
    W = make_weight("power-0.8", (20, 30)).to(device)
    loss, [gradient] = loss_and_gradients([W], 0.1)
    for scale in (2.0**-60, 2.0**60):
        scaled_loss, [scaled_gradient] = loss_and_gradients([W * scale], 0.1)
        assert scaled_loss == loss
        assert relative_error(scaled_gradient * scale, gradient) < 1e-6


# ---------------------------------------------------------------------------------------------------------- one for all


@pytest.mark.parametrize("name", [*HOSTILE_FINITE, *HOSTILE_NOT_FINITE, *SUBNORMAL])
def test_a_hostile_matrix_does_not_harm_its_neighbours(name: str, device: torch.device) -> None:
    """Among weights of its own short side and others, in front of them and behind."""
    W = {**HOSTILE_FINITE, **HOSTILE_NOT_FINITE, **SUBNORMAL}[name]().to(device)
    rows = max(1, W.shape[0])
    good = [make_weight("power-0.5", shape, seed=3).to(device) for shape in ((rows, 41), (10, 6, 3, 3), (rows, 29))]
    state = RankState()
    loss, gradients = loss_and_gradients([good[0], W, good[1], good[2]], 0.1, state=state)
    active = 3 + bool(W.numel() and (W != 0).any())
    assert state.ranks is not None
    assert state.flags is not None
    assert state.flags.tolist() == [0, int(name in HOSTILE_NOT_FINITE), 0, 0]
    assert loss.isnan() == (name in HOSTILE_NOT_FINITE)
    if name in HOSTILE_NOT_FINITE:
        assert state.ranks.tolist()[1] == -1
        assert gradients[1].isnan().all()
    for i, weight in ((0, good[0]), (2, good[1]), (3, good[2])):
        _, [alone] = loss_and_gradients([weight], 0.1)
        assert relative_error(gradients[i] * active, alone) < 1e-6


def test_mean_is_over_active_weights_only(device: torch.device) -> None:
    weights = [make_weight("kaiming", (8, 12), seed=1), torch.zeros(5, 6), make_weight("kaiming", (6, 6), seed=2)]
    weights = [w.to(device) for w in weights]
    loss, gradients = loss_and_gradients(weights, 0.1)
    singles = [loss_and_gradients([w], 0.1) for w in weights]
    assert float(loss) == pytest.approx((float(singles[0][0]) + float(singles[2][0])) / 2, rel=1e-6)
    assert relative_error(gradients[0] * 2, singles[0][1][0]) < 1e-6
    assert not gradients[1].any()


def test_min_sparsity_gate(device: torch.device) -> None:
    """A weight takes part from exactly its own fraction of zeros on."""
    sparse = make_weight("kaiming", (10, 30), 0.7).to(device)  # 210 of 300
    dense = make_weight("kaiming", (9, 30), 0.1).to(device)
    at, above = 210 / 300, math.nextafter(210 / 300, 1)
    check([sparse, dense], 0.1, min_sparsity=0.5)
    check([sparse, dense], 0.1, min_sparsity=at)
    loss, gradients = loss_and_gradients([sparse, dense], 0.1, min_sparsity=at)
    assert loss == rank_loss([sparse], 0.1)
    assert not gradients[1].any()
    loss, gradients = loss_and_gradients([sparse, dense], 0.1, min_sparsity=above)
    assert loss == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("numel", [7, 10, 49, 100, 1000])
def test_min_sparsity_gate_is_exact_at_every_fraction(numel: int, device: torch.device) -> None:
    for zeros in range(1, numel, max(1, numel // 25)):
        W = torch.ones(1, numel, device=device)
        W[0, :zeros] = 0
        assert rank_loss([W], min_sparsity=zeros / numel) == -1
        assert rank_loss([W], min_sparsity=math.nextafter(zeros / numel, 1)) == 0


def test_inactive_nan_has_no_say(device: torch.device) -> None:
    bad = torch.full((4, 6), float("nan"), device=device)
    sparse = make_weight("kaiming", (8, 8), 0.75).to(device)
    loss, gradients = loss_and_gradients([bad, sparse], 0.1, min_sparsity=0.5)
    assert loss == rank_loss([sparse], 0.1)
    assert not gradients[0].any()


def test_only_zero_weights_give_zero(device: torch.device) -> None:
    loss, gradients = loss_and_gradients([torch.zeros(3, 4, device=device), torch.zeros(2, 2, device=device)], 0.1)
    assert loss == 0
    assert not any(g.any() for g in gradients)


# ----------------------------------------------------------------------------------------------------- what is accepted


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Sequential(nn.Conv1d(8, 6, 5), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 4)


def test_module_mapping_iterable_and_generator_agree(device: torch.device) -> None:
    model = TwoConvolutions().to(device)
    weights = [model.a.weight, model.b[0].weight]
    wanted = rank_loss(weights, 0.2)
    assert rank_loss(model, 0.2) == wanted  # a module: its convolutions, without the linear layer
    assert rank_loss(rpg_fast.prunable_weights(model, include=(nn.Conv1d, nn.Conv2d)), 0.2) == wanted
    assert rank_loss(tuple(weights), 0.2) == wanted
    assert rank_loss((w for w in weights), 0.2) == wanted
    assert rank_loss(dict(enumerate(weights)).values(), 0.2) == wanted
    with_linear = rank_loss(rpg_fast.prunable_weights(model), 0.2)
    assert with_linear != wanted


def test_tail_energy_as_tensor(device: torch.device) -> None:
    W = make_weight("power-0.5", (12, 20)).to(device)
    wanted = loss_and_gradients([W], 0.2)
    for target in (torch.tensor(0.2, dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64, device=device)):
        loss, [gradient] = loss_and_gradients([W], target)  # type: ignore[arg-type]
        assert loss == wanted[0]
        assert torch.equal(gradient, wanted[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, device: torch.device) -> None:
    weights = [
        make_weight("power-0.5", (24, 6, 3, 3)).to(device, dtype),
        make_weight("kaiming", (9, 5)).to(device, dtype),
    ]
    plain = loss_and_gradients(weights, 0.1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under = loss_and_gradients(weights, 0.1)
        leaf = weights[0].clone().requires_grad_()
        add_rank_grad_([leaf], 1.0)
    assert under[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(under[1], plain[1], strict=True))
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, loss_and_gradients(weights[:1], 0.1)[1][0])


def test_loss_dtype_and_gradient_scale(device: torch.device) -> None:
    single, double = make_weight("kaiming", (5, 8)).to(device), make_weight("kaiming", (5, 8)).to(device).double()
    assert rank_loss([single]).dtype == torch.float32
    assert rank_loss([single.bfloat16()]).dtype == torch.float32
    assert rank_loss([single, double]).dtype == torch.float64
    leaf = single.requires_grad_()
    (rank_loss([leaf]) * 3.5 + leaf.sum()).backward()
    _, [gradient] = loss_and_gradients([single], 0.1)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, gradient * 3.5 + 1)


def test_mixed_dtypes_in_one_call(device: torch.device) -> None:
    weights = [make_weight("power-0.5", (9, 14), seed=i).to(device, dtype) for i, dtype in enumerate(DTYPES)]
    loss, gradients = loss_and_gradients(weights, 0.1)
    wanted_loss, wanted, _ = official_rank_loss(weights, 0.1)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    for weight, gradient, right in zip(weights, gradients, wanted, strict=True):
        assert gradient.dtype == weight.dtype
        assert relative_error(gradient, right) < TOLERANCES["exact", weight.dtype].gradient


def test_leaves_without_gradient_and_intermediate_tensors(device: torch.device) -> None:
    frozen = make_weight("kaiming", (6, 9)).to(device)
    base = make_weight("kaiming", (9, 6), seed=1).to(device).requires_grad_()
    loss = rank_loss([frozen, base.mT * 2.0], 0.1)  # a view and a product: the gradient flows on
    loss.backward()
    _, gradients = loss_and_gradients([frozen, base.detach().mT.contiguous() * 2], 0.1)
    assert frozen.grad is None
    assert base.grad is not None
    assert relative_error(base.grad, 2 * gradients[1].mT) < 1e-6
    assert not rank_loss([frozen]).requires_grad


def test_one_weight_used_twice(device: torch.device) -> None:
    leaf = make_weight("kaiming", (6, 9)).to(device).requires_grad_()
    rank_loss([leaf, leaf], 0.1).backward()
    assert leaf.grad is not None
    assert relative_error(leaf.grad, loss_and_gradients([leaf], 0.1)[1][0]) < 1e-6


# ------------------------------------------------------------------------------------------------------------- autograd


def test_double_backward_raises(device: torch.device) -> None:
    leaf = make_weight("kaiming", (6, 9)).to(device).requires_grad_()
    [gradient] = torch.autograd.grad(rank_loss([leaf]), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_in_place_modification_is_detected(device: torch.device) -> None:
    leaf = make_weight("kaiming", (6, 9)).to(device).requires_grad_()
    loss = rank_loss([leaf])
    with torch.no_grad():
        leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice_needs_retain_graph(device: torch.device) -> None:
    leaf = make_weight("kaiming", (6, 9)).to(device).requires_grad_()
    loss = rank_loss([leaf])
    loss.backward(retain_graph=True)
    loss.backward()
    assert leaf.grad is not None
    assert relative_error(leaf.grad, 2 * loss_and_gradients([leaf], 0.1)[1][0]) < 1e-6
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_no_grad_and_inference_mode(device: torch.device) -> None:
    leaf = make_weight("kaiming", (6, 9)).to(device).requires_grad_()
    wanted = rank_loss([leaf]).detach()
    with torch.no_grad():
        assert rank_loss([leaf]) == wanted
    with torch.inference_mode():
        assert rank_loss([leaf]) == wanted


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend: str, device: torch.device) -> None:
    weights = [make_weight("power-0.5", shape).to(device).requires_grad_() for shape in ((8, 4, 3, 3), (20, 7))]

    def objective(a: Tensor, b: Tensor) -> Tensor:
        return 2 * rank_loss([a, b], 0.2) + (a * a).sum()

    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    loss, wanted = compiled(*weights), objective(*weights)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights))


# ------------------------------------------------------------------------------------------------------- add_rank_grad_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("existing", ["none", "same strides", "other strides"])
def test_add_rank_grad_equals_backward(dtype: torch.dtype, existing: str, device: torch.device) -> None:
    shapes: list[Shape] = [(8, 4, 3, 3), (6, 16), (16, 6), (12, 5, 1, 1)]
    ours, theirs = (
        [
            LAYOUTS["channels_last" if len(s) == 4 else "contiguous"](make_weight("power-0.5", s).to(device, dtype))
            for s in shapes
        ]
        for _ in range(2)
    )
    for a, b in zip(ours, theirs, strict=True):
        a.requires_grad_()
        b.requires_grad_()
        if existing != "none":
            grad = torch.randn(a.shape, generator=seeded(5)).to(device, dtype) * 0.01
            if existing == "same strides":
                grad = torch.empty_like(a).copy_(grad)
            a.grad, b.grad = (
                grad.clone(memory_format=torch.preserve_format),
                grad.clone(memory_format=torch.preserve_format),
            )
    loss = add_rank_grad_(ours, 2.5, 0.2)
    wanted = rank_loss(theirs, 0.2)
    (2.5 * wanted).backward()
    assert loss == wanted
    assert not loss.requires_grad
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == dtype
        assert relative_error(a.grad, b.grad) <= TOLERANCES["exact", dtype].gradient


def test_add_rank_grad_takes_a_live_weight_and_every_option(device: torch.device) -> None:
    leaf = make_weight("kaiming", (10, 30), 0.7).to(device).requires_grad_()
    dense = make_weight("kaiming", (10, 30)).to(device).requires_grad_()
    state = RankState()
    options = {"method": "exact", "min_sparsity": 0.5, "state": state}
    add_rank_grad_({"a": leaf, "b": dense}, torch.tensor(-3.0, device=device), 0.2, **options)
    assert leaf.grad is not None
    assert relative_error(leaf.grad, -3 * loss_and_gradients([leaf], 0.2)[1][0]) < 1e-6
    assert dense.grad is None or not dense.grad.any()
    assert state.calls == 1


def test_add_rank_grad_leaves_frozen_weights_alone(device: torch.device) -> None:
    """As backward does: no `.grad` appears on a weight that requires none, whichever its place."""
    for frozen in range(3):
        weights = [make_weight("kaiming", s, seed=i).to(device) for i, s in enumerate([(6, 9), (5, 7), (8, 4)])]
        for i, w in enumerate(weights):
            w.requires_grad_(i != frozen)
        loss = add_rank_grad_(weights, 2.0)
        wanted_loss, wanted, _ = official_rank_loss(weights, 0.1)
        assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)  # it still counts in the mean
        for i, w in enumerate(weights):
            if i == frozen:
                assert w.grad is None
            else:
                assert w.grad is not None
                assert relative_error(w.grad, 2 * wanted[i]) < 2e-5


def test_add_rank_grad_keeps_the_gradients_of_inactive_weights(device: torch.device) -> None:
    zero = torch.zeros(4, 6, device=device).requires_grad_()
    zero.grad = torch.randn(4, 6, generator=seeded(1)).to(device)
    before = zero.grad.clone()
    add_rank_grad_([zero, make_weight("kaiming", (4, 6)).to(device).requires_grad_()], 1.0)
    assert torch.equal(zero.grad, before)


def test_add_rank_grad_of_a_weight_listed_twice(device: torch.device) -> None:
    leaf = make_weight("kaiming", (300, 200)).to(device).requires_grad_()
    leaf.grad = torch.zeros_like(leaf)
    add_rank_grad_([leaf, leaf], 1.0)
    assert relative_error(leaf.grad, loss_and_gradients([leaf], 0.1)[1][0]) < 1e-6


def test_add_rank_grad_contains_nan(device: torch.device) -> None:
    bad = torch.full((4, 6), float("nan"), device=device).requires_grad_()
    good = make_weight("kaiming", (4, 6)).to(device).requires_grad_()
    assert add_rank_grad_([bad, good], 1.0).isnan()
    assert good.grad is not None
    assert bad.grad is not None
    assert bad.grad.isnan().all()
    assert relative_error(2 * good.grad, loss_and_gradients([good], 0.1)[1][0]) < 1e-6


# ------------------------------------------------------------------------------------------------------------ the state


def test_state_reports_ranks_and_tail_energies(device: torch.device) -> None:
    weights = [make_weight("power-0.8", s).to(device) for s in ((16, 30), (9, 3, 3, 3))] + [
        torch.zeros(3, 3, device=device)
    ]
    state = RankState()
    assert state.ranks is state.tail_energies is state.flags is None
    rank_loss(weights, 0.1, method="exact", state=state)
    _, _, spectra = official_rank_loss(weights, 0.1)
    assert state.ranks is not None
    assert state.tail_energies is not None
    assert state.flags is not None
    assert state.ranks.device == state.tail_energies.device == state.flags.device == weights[0].device
    assert (state.ranks.dtype, state.tail_energies.dtype, state.flags.dtype) == (
        torch.int64,
        torch.float64,
        torch.int32,
    )
    assert state.ranks.tolist() == [s.k(0.1) if s else 0 for s in spectra]
    wanted = [float(s.S[s.k(0.1) :].square().sum()) if s else 0 for s in spectra]
    assert state.tail_energies.tolist() == pytest.approx(wanted, rel=1e-6)


def test_refresh_every_reuses_the_projectors(device: torch.device) -> None:
    """Of the N calls between two refreshes all see the first one's projectors and value, and the current weights."""
    state = RankState()
    first = make_weight("power-0.5", (8, 12), seed=1).to(device)
    second = make_weight("power-0.5", (8, 12), seed=2).to(device)
    loss, [gradient] = loss_and_gradients([first], 0.1, state=state, refresh_every=3)
    for _ in range(2):
        stale_loss, [stale] = loss_and_gradients([second], 0.1, state=state, refresh_every=3)
        assert stale_loss == loss
        # gradient = N W / ||first||^2, linear in W for a fixed projector
        _, [both] = loss_and_gradients([first + second], 0.1, state=copy.deepcopy(state), refresh_every=10)
        assert relative_error(both, gradient + stale) < 1e-5
    fresh_loss, [fresh] = loss_and_gradients([second], 0.1, state=state, refresh_every=3)
    wanted_loss, [wanted] = loss_and_gradients([second], 0.1)
    assert fresh_loss == wanted_loss
    assert torch.equal(fresh, wanted)


@pytest.mark.parametrize("how", ["state_dict", "torch.save", "deepcopy", "pickle"])
def test_state_survives(how: str, device: torch.device) -> None:
    """In the middle of a refresh period, bit by bit."""
    first, second = (make_weight("power-0.5", (8, 12), seed=i).to(device) for i in (1, 2))
    state = RankState()
    for _ in range(2):
        rank_loss([first], 0.1, method="exact", state=state, refresh_every=4)
    if how == "deepcopy":
        other = copy.deepcopy(state)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(state))
    else:
        other, saved = RankState(), state.state_dict()
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other.load_state_dict(saved)
    for weight in (second, second, first):  # reuse, reuse, refresh
        wanted = loss_and_gradients([weight], 0.1, state=state, refresh_every=4)
        got = loss_and_gradients([weight], 0.1, state=other, refresh_every=4)
        assert got[0] == wanted[0]
        assert torch.equal(got[1][0], wanted[1][0])


def test_a_saved_state_is_a_snapshot(device: torch.device) -> None:
    W = make_weight("power-0.5", (8, 12)).to(device)
    state = RankState()
    rank_loss([W], 0.1, method="exact", state=state)
    saved = copy.deepcopy(state.state_dict())
    snapshot = state.state_dict()
    rank_loss([W + 1], 0.1, method="exact", state=state)
    assert snapshot["calls"] == 1
    assert torch.equal(snapshot["tail_energies"], saved["tail_energies"])


def test_state_belongs_to_one_list(device: torch.device) -> None:
    state = RankState()
    rank_loss([torch.eye(3, device=device)], state=state)
    with pytest.raises(ValueError, match=r"one state per list"):
        rank_loss([torch.eye(4, device=device)], state=state)
    with pytest.raises(ValueError, match=r"not the state of a RankState"):
        RankState().load_state_dict({"ranks": None})


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.eye(3), TypeError, "wrap it in a list"),
        ([], ValueError, "no weights"),
        ({}, ValueError, "no weights"),
        (nn.Linear(3, 3), ValueError, "no convolution"),
        ([torch.ones(3)], ValueError, r"weights\[0\] must have at least two dimensions .* got shape \(3,\)"),
        ([torch.eye(2), torch.tensor(1.0)], ValueError, r"weights\[1\] must have at least two dimensions"),
        ([torch.eye(3).long()], TypeError, r"floating-point tensor, got torch.int64"),
        ([torch.eye(3).to(torch.complex64)], TypeError, r"floating-point tensor, got torch.complex64"),
        ([[1.0, 2.0]], TypeError, r"floating-point tensor, got list"),
        ({"conv": None}, TypeError, r"conv must be a real floating-point tensor, got NoneType"),
        ([torch.eye(3), torch.empty(3, 3, device="meta")], ValueError, "on one device"),
    ],
    ids=str,
)
def test_bad_weights(weights: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rank_loss(weights)  # type: ignore[arg-type]
    if isinstance(weights, list):
        weights = [w.requires_grad_() if isinstance(w, Tensor) and w.is_floating_point() else w for w in weights]
    with pytest.raises(error, match=message):
        add_rank_grad_(weights, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail_energy": -0.1}, r"tail_energy must lie in \[0, 1\], got -0.1"),
        ({"tail_energy": 1.5}, "tail_energy must lie in"),
        ({"tail_energy": float("nan")}, "tail_energy must lie in"),
        ({"tail_energy": torch.tensor([0.1, 0.2])}, "one element"),
        ({"method": "svd"}, r"method must be .*, got .svd."),
        ({"precision": "fp8"}, "precision must be"),
        ({"refresh_every": 0, "state": RankState()}, "refresh_every must be at least 1 and whole, got 0"),
        ({"refresh_every": 2}, "needs state"),
        ({"min_sparsity": 1.1}, "min_sparsity must lie in"),
        ({"min_sparsity": -0.1}, "min_sparsity must lie in"),
        ({"min_sparsity": float("nan")}, "min_sparsity must lie in"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    leaf = torch.eye(3).requires_grad_()
    with pytest.raises(ValueError, match=message):
        rank_loss([leaf], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        add_rank_grad_([leaf], 1.0, **options)  # type: ignore[arg-type]
    assert leaf.grad is None  # a refused call changes nothing


def test_add_rank_grad_refuses_what_keeps_no_gradient() -> None:
    leaf = torch.eye(3).requires_grad_()
    with pytest.raises(ValueError, match="not a leaf"):
        add_rank_grad_([leaf * 2], 1.0)
    with pytest.raises(ValueError, match="one element"):
        add_rank_grad_([leaf], torch.ones(2))
    with pytest.raises(ValueError, match="no weight requires a gradient"):
        add_rank_grad_([torch.eye(3)], 1.0)
    assert leaf.grad is None


def test_a_refused_call_leaves_the_state_alone() -> None:
    state = RankState()
    with pytest.raises(ValueError, match="tail_energy"):
        rank_loss([torch.eye(3)], 2.0, state=state)
    assert state.calls == 0
    assert state.shapes is None
