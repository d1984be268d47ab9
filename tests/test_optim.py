"""MaskedSGD and MaskedAdamW: torch's own optimizers without masks, torch's between explicit maskings with them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LAYOUTS, seeded
from torch import Tensor, nn

from rpg_fast import MaskedAdamW, MaskedSGD, PackedMasks

Optimizer = torch.optim.Optimizer
TORCH = {MaskedSGD: torch.optim.SGD, MaskedAdamW: torch.optim.AdamW}
ULPS = {MaskedSGD: 2, MaskedAdamW: 4}

SGD_OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.05},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 1e-3},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 1e-2},
]
ADAMW_OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.2},
    {"lr": 0.01, "amsgrad": True},
    {"lr": 0.01, "maximize": True, "weight_decay": 0.0},
    {"lr": 0.01, "betas": (0.0, 0.5)},
]
CASES = [(MaskedSGD, o) for o in SGD_OPTIONS] + [(MaskedAdamW, o) for o in ADAMW_OPTIONS]
all_cases = pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=lambda v: str(v) if isinstance(v, dict) else v.__name__
)
both_kinds = pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
MOMENTS = {MaskedSGD: {"momentum": 0.9, "weight_decay": 0.01}, MaskedAdamW: {"amsgrad": True}}


def make_params(
    device: torch.device, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> list[nn.Parameter]:
    shapes = [(6, 5, 3, 3), (7, 13), (11,), (1, 3, 3, 3), (1031,)]
    values = [torch.randn(s, generator=seeded(i)).to(device, dtype) for i, s in enumerate(shapes)]
    return [nn.Parameter(LAYOUTS[layout](v) if v.dim() == 4 else v) for v in values]


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """The same for every copy of the parameters, of widely different sizes."""
    return [
        (torch.randn(p.shape, generator=seeded(100 * step + i)) * 10.0 ** (i - 2)).to(p.device, p.dtype)
        for i, p in enumerate(params)
    ]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for p, g in zip(params, gradients(params, step), strict=True):
        p.grad = g


def make_masks(params: list[nn.Parameter], density: float = 0.4) -> tuple[PackedMasks, dict[str, Tensor]]:
    """Of the first two parameters and the last; the others have none."""
    weights = {str(i): params[i] for i in (0, 1, len(params) - 1)}
    masks = {n: (torch.rand(w.shape, generator=seeded(50 + int(n))) < density).to(w.device) for n, w in weights.items()}
    return PackedMasks(weights).load_(masks), masks


def state_tensors(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape and v.dim()}


def assert_within_ulps(got: Tensor, wanted: Tensor, ulps: float, slack: Tensor | float = 0.0) -> None:
    """Within `ulps` units in the last place of the larger of `wanted` and `slack`, the terms whose sum it is."""
    magnitude = torch.maximum(wanted.abs(), torch.as_tensor(slack, device=wanted.device, dtype=wanted.dtype))
    unit = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)) - magnitude
    assert ((got.double() - wanted.double()).abs() <= ulps * unit.double()).all()


# -------------------------------------------------------------------------------------------------------- without masks


@all_cases
@pytest.mark.parametrize("masked", ["no masks", "all ones"])
def test_each_step_is_torchs(kind: Any, options: dict[str, Any], masked: str, device: torch.device) -> None:
    """Step by step from the same state, 25 times: no more than a few units in the last place."""
    ours, theirs = make_params(device), make_params(device)
    optimizer, reference = kind(ours, **options), TORCH[kind](theirs, **options, foreach=False)
    if masked == "all ones":
        optimizer.set_masks(PackedMasks({str(i): p for i, p in enumerate(ours)}))
    for step in range(25):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        before = [p.detach().clone() for p in theirs]
        states_before = [{k: v.clone() for k, v in state_tensors(reference, p).items()} for p in theirs]
        optimizer.step()
        reference.step()
        for p, q, old, old_state in zip(ours, theirs, before, states_before, strict=True):
            for name, value in state_tensors(reference, q).items():
                parts = [old_state.get(name, torch.zeros_like(value)).abs()]
                if name in ("momentum_buffer", "exp_avg"):
                    parts.append(q.grad.abs())
                assert_within_ulps(optimizer.state[p][name], value, 4, torch.stack(parts).amax(0))
            direction = torch.ones_like(q) if kind is MaskedAdamW else q.grad.abs()
            for buffers in (old_state, reference.state[q]):
                if "momentum_buffer" in buffers:
                    direction = direction + buffers["momentum_buffer"].abs()
            assert_within_ulps(p.detach(), q.detach(), ULPS[kind], torch.maximum(old.abs(), options["lr"] * direction))
            for name, value in state_tensors(reference, q).items():
                optimizer.state[p][name].copy_(value)
            p.data.copy_(q.data)


@all_cases
def test_many_steps_stay_with_torch(kind: Any, options: dict[str, Any], device: torch.device) -> None:
    ours, theirs = make_params(device), make_params(device)
    optimizer, reference = kind(ours, **options), TORCH[kind](theirs, **options)
    for step in range(40):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6 * float(q.detach().abs().max()))


@all_cases
def test_float64_is_torchs(kind: Any, options: dict[str, Any], device: torch.device) -> None:
    ours, theirs = make_params(device, torch.float64), make_params(device, torch.float64)
    optimizer, reference = kind(ours, **options), TORCH[kind](theirs, **options)
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13 * float(q.detach().abs().max()))


# ----------------------------------------------------------------------------------------------------------- with masks


def masked_reference_step(optimizer: Optimizer, params: list[nn.Parameter], masks: dict[str, Tensor]) -> None:
    """The definition: mask the gradient, step, mask weight and state."""
    for name, mask in masks.items():
        p = params[int(name)]
        assert p.grad is not None
        p.grad = torch.where(mask, p.grad, torch.zeros_like(p.grad))
    optimizer.step()
    with torch.no_grad():
        for name, mask in masks.items():
            p = params[int(name)]
            p[~mask] = 0
            for value in state_tensors(optimizer, p).values():
                value[~mask] = 0


@all_cases
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_steps_equal_explicit_masking(
    kind: Any, options: dict[str, Any], layout: str, device: torch.device
) -> None:
    """The masks change on the way: weights that are pruned, and weights that come back."""
    ours, theirs = make_params(device, layout=layout), make_params(device)
    held, masks = make_masks(ours)
    optimizer, reference = kind(ours, **options, masks=held), TORCH[kind](theirs, **options)
    for step in range(24):
        if step % 8 == 7:
            masks = {
                n: (torch.rand(m.shape, generator=seeded(step + int(n))) < 0.4).to(device) for n, m in masks.items()
            }
            held.load_(masks)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        ours[0].grad = ours[0].grad.contiguous(memory_format=torch.channels_last)  # not as the weight lies
        optimizer.step()
        masked_reference_step(reference, theirs, masks)
        for name, mask in masks.items():
            p = ours[int(name)]
            assert not p[~mask].any()
            assert not any(value[~mask].any() for value in state_tensors(optimizer, p).values())
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6 * float(q.detach().abs().max()))
        for name, value in state_tensors(reference, q).items():
            torch.testing.assert_close(optimizer.state[p][name], value, rtol=2e-5, atol=2e-6 * float(value.abs().max()))


@both_kinds
def test_masked_nan_does_not_get_through(kind: Any, device: torch.device) -> None:
    """NaN and inf in gradient, state and weight, where the mask is zero."""
    [p] = [nn.Parameter(torch.ones(1029, device=device))]
    mask = torch.rand(1029, generator=seeded(0)) < 0.5
    optimizer = kind([p], lr=0.1, **MOMENTS[kind], masks=PackedMasks({"p": p}).load_({"p": mask}))
    p.grad = torch.ones_like(p)
    optimizer.step()
    hole = (~mask).to(device)
    p.data[hole] = torch.nan
    for value in state_tensors(optimizer, p).values():
        value[hole] = torch.inf
    p.grad = torch.where(hole, torch.nan, torch.ones_like(p))
    optimizer.step()
    assert p.isfinite().all()
    assert not p[hole].any()
    assert all(v.isfinite().all() and not v[hole].any() for v in state_tensors(optimizer, p).values())


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_keep_float32_state(kind: Any, dtype: torch.dtype, device: torch.device) -> None:
    """One step is torch's float32 step of the same numbers, rounded once; the state is not rounded at all."""
    ours = make_params(device, dtype)
    held, masks = make_masks(ours)
    optimizer = kind(ours, lr=0.1, **MOMENTS[kind], masks=held)
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    reference = TORCH[kind](theirs, lr=0.1, **MOMENTS[kind])
    for step in range(20):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        masked_reference_step(reference, theirs, masks)
        for p, q in zip(ours, theirs, strict=True):
            assert p.dtype == dtype
            torch.testing.assert_close(p.float(), q, rtol=torch.finfo(dtype).eps, atol=1e-7)
            for name, value in state_tensors(reference, q).items():
                assert optimizer.state[p][name].dtype == torch.float32
                torch.testing.assert_close(
                    optimizer.state[p][name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max())
                )
            q.data.copy_(p.data)  # torch continues from what 16 bits could hold


@both_kinds
def test_channels_last_state_and_copies_stay_as_they_lie(kind: Any, device: torch.device) -> None:
    ours = make_params(device, layout="channels_last")
    optimizer = kind(ours, lr=0.1, **MOMENTS[kind])
    set_gradients(ours, 0)
    optimizer.step()
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert all(v.stride() == ours[0].stride() for v in state_tensors(optimizer, ours[0]).values())


@both_kinds
def test_parameters_without_gradient_are_left_alone(kind: Any, device: torch.device) -> None:
    ours = make_params(device)
    held, _ = make_masks(ours)
    optimizer = kind(ours, lr=0.1, **MOMENTS[kind], masks=held)
    before = [p.detach().clone() for p in ours]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
    ours[1].grad = torch.ones_like(ours[1])
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(ours, before, strict=True)] == [True, False, True, True, True]
    set_gradients(ours, 1)  # fresh parameters and others in one group
    theirs = make_params(device)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@both_kinds
def test_late_gradients_start_their_own_state(kind: Any, device: torch.device) -> None:
    ours, theirs = make_params(device), make_params(device)
    optimizer, reference = kind(ours, lr=0.01, **MOMENTS[kind]), TORCH[kind](theirs, lr=0.01, **MOMENTS[kind])
    for step in range(12):
        for params in (ours, theirs):
            set_gradients(params, step)
            for i, p in enumerate(params):
                if step < 3 * i or (step + i) % 5 == 0:
                    p.grad = None
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6 * float(q.detach().abs().max()))


@both_kinds
def test_frozen_and_empty_parameters(kind: Any, device: torch.device) -> None:
    empty = nn.Parameter(torch.empty(0, 3, device=device))
    scalar = nn.Parameter(torch.tensor(2.0, device=device))
    frozen = nn.Parameter(torch.ones(3, device=device), requires_grad=False)
    optimizer = kind([empty, scalar, frozen], lr=0.1, masks=PackedMasks({"e": empty, "s": scalar}))
    empty.grad, scalar.grad = torch.empty_like(empty), torch.tensor(1.0, device=device)
    optimizer.step()
    assert scalar.item() < 2
    assert frozen.tolist() == [1, 1, 1]


# ----------------------------------------------------------------------------------------------- the optimizer protocol


@both_kinds
def test_param_groups_and_schedulers(kind: Any, device: torch.device) -> None:
    ours, theirs = make_params(device), make_params(device)
    moments = MOMENTS[kind]

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2], "lr": 0.05, "weight_decay": 0.1}, {"params": params[2:]}]

    optimizer, reference = kind(groups(ours), lr=0.01, **moments), TORCH[kind](groups(theirs), lr=0.01, **moments)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20) for o in (optimizer, reference)]
    for step in range(18):
        if step == 9:
            for o, params in ((optimizer, ours), (reference, theirs)):
                o.add_param_group({"params": [nn.Parameter(torch.ones(3, device=device))], "lr": 0.5})
                params.append(o.param_groups[-1]["params"][0])
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
        if step < 9:
            for scheduler in schedulers:
                scheduler.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=5e-5, atol=5e-6 * float(q.detach().abs().max()))


@both_kinds
def test_lr_as_tensor_is_live(kind: Any, device: torch.device) -> None:
    ours, theirs = make_params(device), make_params(device)
    lr = torch.tensor(0.1, device=device)
    optimizer, reference = kind(ours, lr=lr), TORCH[kind](theirs, lr=0.1)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
        lr.mul_(0.5)
        reference.param_groups[0]["lr"] *= 0.5
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6 * float(q.detach().abs().max()))


@both_kinds
def test_closure(kind: Any, device: torch.device) -> None:
    p = nn.Parameter(torch.ones(5, device=device))
    optimizer = kind([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 5
    assert (p < 1).all()
    assert optimizer.step() is None


@both_kinds
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(kind: Any, unscale: bool, device: torch.device) -> None:
    """With and without unscale_; a step with inf is skipped, wherever the inf is, and changes nothing."""
    ours, theirs = make_params(device), make_params(device)
    (held, masks), (_, _) = make_masks(ours), make_masks(theirs)
    optimizer, reference = kind(ours, lr=0.1, **MOMENTS[kind], masks=held), TORCH[kind](theirs, lr=0.1, **MOMENTS[kind])
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=5)
    taken = 0
    for step in range(16):
        scale = scaler.get_scale()
        set_gradients(ours, step)
        for p in ours:
            p.grad.mul_(scale)
        overflow = step in (3, 9)
        if overflow:
            ours[step % 2].grad.view(-1)[5] = torch.inf
        before = [p.detach().clone() for p in ours]
        scaler.scale(torch.zeros((), device=device))  # creates the scale, as scaler.scale(loss) would
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
            assert scaler.get_scale() == scale / 2
            continue
        set_gradients(theirs, step)
        masked_reference_step(reference, theirs, masks)
        taken += 1
    assert taken == 14
    assert not hasattr(optimizer, "grad_scale")
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6 * float(q.detach().abs().max()))
    if kind is MaskedAdamW:
        assert {float(optimizer.state[p]["step"]) for p in ours} == {14}


@both_kinds
def test_first_step_that_overflows(kind: Any, device: torch.device) -> None:
    p = nn.Parameter(torch.ones(5, device=device))
    optimizer = kind([p], lr=0.1, **MOMENTS[kind])
    scaler = torch.amp.GradScaler(device.type, init_scale=4.0)
    scaler.scale(torch.zeros((), device=device))
    p.grad = torch.full_like(p, torch.inf)
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [1] * 5
    assert all(not v.any() for v in state_tensors(optimizer, p).values())
    p.grad = torch.ones_like(p)
    scaler.step(optimizer)
    assert (p < 1).all()


@both_kinds
@pytest.mark.parametrize("source", ["its own", "torch's"])
def test_state_dict_continues_bit_by_bit(kind: Any, source: str, device: torch.device) -> None:
    ours = make_params(device)
    make = kind if source == "its own" else TORCH[kind]
    first = make(ours, lr=0.05, **MOMENTS[kind])
    for step in range(5):
        set_gradients(ours, step)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    copies = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours]
    second = kind(copies, lr=123.0)
    second.load_state_dict(state)
    assert second.param_groups[0]["lr"] == 0.05
    for step in range(5, 10):
        set_gradients(ours, step)
        set_gradients(copies, step)
        first.step()
        second.step()
    for p, q in zip(ours, copies, strict=True):
        if source == "its own":
            assert torch.equal(p, q)
        torch.testing.assert_close(q, p, rtol=2e-5, atol=2e-6 * float(p.detach().abs().max()))


@both_kinds
def test_torch_loads_our_state(kind: Any, device: torch.device) -> None:
    ours = make_params(device)
    first = kind(ours, lr=0.05, **MOMENTS[kind])
    set_gradients(ours, 0)
    first.step()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    second = TORCH[kind](theirs, lr=0.05, **MOMENTS[kind])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    set_gradients(ours, 1)
    set_gradients(theirs, 1)
    first.step()
    second.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6 * float(q.detach().abs().max()))


@both_kinds
def test_16_bit_state_dict_keeps_float32(kind: Any, device: torch.device) -> None:
    ours = make_params(device, torch.bfloat16, "channels_last")
    first = kind(ours, lr=0.05, **MOMENTS[kind])
    for step in range(3):
        set_gradients(ours, step)
        first.step()
    copies = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in ours]
    second = kind(copies, lr=0.05, **MOMENTS[kind])
    second.load_state_dict(first.state_dict())
    for p, q in zip(ours, copies, strict=True):
        for name, value in state_tensors(first, p).items():
            assert second.state[q][name].dtype == torch.float32
            assert torch.equal(second.state[q][name], value)
            assert second.state[q][name].data_ptr() != value.data_ptr()
    set_gradients(ours, 9)
    set_gradients(copies, 9)
    first.step()
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, copies, strict=True))


@both_kinds
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_masks(kind: Any, how: Callable[[Any], Any], device: torch.device) -> None:
    """A copy of model and optimizer together goes on as the original does, and apart from it."""
    ours = make_params(device)
    held, masks = make_masks(ours)
    optimizer = kind(ours, lr=0.05, **MOMENTS[kind], masks=held)
    set_gradients(ours, 0)
    optimizer.step()
    copies, other = how((ours, optimizer))
    for params, o in ((ours, optimizer), (copies, other)):
        set_gradients(params, 1)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, copies, strict=True))
    for name, mask in masks.items():
        assert not copies[int(name)][~mask].any()
    held.load_({n: torch.ones_like(m) for n, m in masks.items()})
    set_gradients(copies, 2)
    other.step()
    assert all(not copies[int(name)][~mask].any() for name, mask in masks.items())


class _OnCuda(nn.Parameter):
    """A parameter that says that it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


@both_kinds
def test_state_is_not_made_while_a_graph_is_captured(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    p = _OnCuda(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    optimizer = kind([p], lr=0.1, **MOMENTS[kind])
    for _ in range(2):  # the failure leaves nothing behind
        with pytest.raises(
            RuntimeError, match=r"first step of a parameter of shape \(3, 2\) is captured in a CUDA graph"
        ):
            optimizer.step()
    assert not state_tensors(optimizer, p)
    assert p.tolist() == [[1, 1]] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@both_kinds
def test_grad_scaler_waits_for_nothing(kind: Any) -> None:
    """With and without `unscale_`, with and without inf."""
    ours = make_params(torch.device("cuda"))
    held, _ = make_masks(ours)
    optimizer = kind(ours, lr=0.1, **MOMENTS[kind], masks=held)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**6)
    scaler.scale(torch.zeros((), device="cuda"))
    for step in range(6):
        set_gradients(ours, step)
        if step == 4:
            ours[0].grad.view(-1)[5] = torch.inf
        before = [p.detach().clone() for p in ours]
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first two compile
        try:
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True)) == (step == 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@both_kinds
def test_one_step_before_a_capture_is_enough(kind: Any) -> None:
    """Replays then give the bits of eager steps, with the learning rate of the moment."""
    device = torch.device("cuda")
    ours, theirs, lr = make_params(device), make_params(device), torch.tensor(0.1, device=device)
    optimizers = [kind(params, lr=lr, **MOMENTS[kind], masks=make_masks(params)[0]) for params in (ours, theirs)]
    for params, optimizer in zip((ours, theirs), optimizers, strict=True):
        set_gradients(params, 0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for step in range(1, 6):
        for params in (ours, theirs):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad.copy_(g)
        lr.mul_(0.7)
        graph.replay()
        optimizers[1].step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_foreign_masks_and_no_masks(device: torch.device) -> None:
    p, q = nn.Parameter(torch.ones(3, device=device)), nn.Parameter(torch.ones(3, device=device))
    foreign = PackedMasks({"q": q})
    for kind in (MaskedSGD, MaskedAdamW):
        with pytest.raises(ValueError, match=r"does not hold the masked weights \['q'\] \(1 in all\)"):
            kind([p], lr=0.1, masks=foreign)
        optimizer = kind([p], lr=0.1)
        with pytest.raises(ValueError, match="does not hold the masked weights"):
            optimizer.set_masks(foreign)
        optimizer.set_masks(PackedMasks({"p": p}).load_({"p": torch.tensor([True, False, True])}))
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert (p != 0).tolist() == [True, False, True]
        optimizer.set_masks(None)
        optimizer.step()
        assert (p != 0).all()
        p.data.fill_(1)


@both_kinds
def test_sparse_gradients_raise(kind: Any) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(TypeError, match=r"gradients must be dense, got torch\.sparse_coo .* shape \(3, 2\)"):
        kind([p], lr=0.1).step()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (MaskedSGD, {"lr": -0.1}, "lr must not be negative, got -0.1"),
        (MaskedSGD, {"lr": float("nan")}, "lr must not be negative, got nan"),
        (MaskedSGD, {"momentum": -1}, "momentum must not be negative"),
        (MaskedSGD, {"weight_decay": -1}, "weight_decay must not be negative"),
        (MaskedSGD, {"nesterov": True}, "nesterov needs momentum > 0 and dampening = 0, got 0 and 0"),
        (MaskedSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs"),
        (MaskedAdamW, {"lr": -1}, "lr must not be negative"),
        (MaskedAdamW, {"eps": -1e-8}, "eps must not be negative"),
        (MaskedAdamW, {"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        (MaskedAdamW, {"weight_decay": -1}, "weight_decay must not be negative"),
    ],
)
def test_bad_options(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([nn.Parameter(torch.ones(2))], **options)
