"""Masks and masked steps of many tensors in one launch, on the GPU or in the interpreter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from aot import CompiledKernel, KernelSpec, compile_kernels
from cases import seeded
from kernel_cases import DEVICE
from torch import Tensor

from rpg_fast import reference
from rpg_fast.kernels import optim, streams

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CHUNK = streams.CHUNK
SIZES = [1, 7, 8, 16, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 48, 33]
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 3e38]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {  # weight, gradient, state
    "float32": (FP32, FP32, FP32),
    "bfloat16": (BF16, BF16, FP32),
    "float16": (FP16, FP16, FP32),
    "bfloat16 throughout": (BF16, BF16, BF16),
    "float32 gradients": (BF16, FP32, FP32),
}
TOLERANCE = {torch.float64: 0.0, FP32: 0.0, BF16: 2**-7, FP16: 2**-10}  # the interpreter cuts off where a GPU rounds

Tensors = list[Tensor]


def values(size: int, dtype: torch.dtype, seed: int, special: float = 0.0) -> Tensor:
    x = torch.randn(size, generator=seeded(seed))
    chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (size,), generator=seeded(seed + 1))]
    return torch.where(torch.rand(size, generator=seeded(seed + 2)) < special, chosen, x).to(DEVICE, dtype)


class Problem:
    """Weights, gradients, three states and step counts, every third weight without a mask."""

    def __init__(
        self, dtypes: str = "float32", sizes: Sequence[int] = SIZES, special: float = 0.0, density: float = 0.4
    ):
        weight, gradient, state = DTYPES[dtypes]
        seeds = itertools.count(0, 3)
        self.params, self.grads = ([values(n, t, next(seeds), special) for n in sizes] for t in (weight, gradient))
        self.states = [[values(n, state, next(seeds), special).abs_() for n in sizes] for _ in range(3)]
        self.steps = [torch.tensor(float(7 * b), device=DEVICE) for b in range(len(sizes))]
        self.offsets, end = [], 3  # odd bytes
        for b, n in enumerate(sizes):
            self.offsets.append(-1 if b % 3 == 2 else end)
            end += -(-n // 8)
        self.bits = self.packed(density, end + 5)

    def packed(self, density: float, nbytes: int, seed: int = 1) -> Tensor:
        masked = [(p.numel(), offset) for p, offset in zip(self.params, self.offsets, strict=True) if offset >= 0]
        masks = [torch.rand(n, generator=seeded(seed + offset)) < density for n, offset in masked]
        return reference.pack(masks, [offset for _, offset in masked], nbytes).to(DEVICE)

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.grads, *itertools.chain(*self.states), *self.steps]


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], rtol: float | None = None, atol: float = 0.0) -> None:
    for a, b in zip(got, want, strict=True):
        tolerance = TOLERANCE[a.dtype] if rtol is None else max(rtol, TOLERANCE[a.dtype])
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol, equal_nan=True)


def sgd(module: Any, p: Problem, **changes: Any) -> None:
    options = {
        "bits": p.bits, "offsets": p.offsets, "lr": torch.tensor(0.1, dtype=torch.float64), "momentum": 0.9,
        "dampening": 0.0, "weight_decay": 1e-2, "nesterov": False, "maximize": False, "first_step": False,
        "grad_scale": None, "found_inf": None,
    } | changes  # fmt: skip
    module.masked_sgd_(p.params, p.grads, p.states[0] if options["momentum"] else [], **options)


def adamw(module: Any, p: Problem, **changes: Any) -> None:
    options = {
        "bits": p.bits, "offsets": p.offsets, "lr": torch.tensor(0.1, dtype=torch.float64), "beta1": 0.9,
        "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False, "maximize": False,
        "grad_scale": None, "found_inf": None,
    } | changes  # fmt: skip
    maxima = p.states[2] if options["amsgrad"] else []
    module.masked_adamw_(p.params, p.grads, p.states[0], p.states[1], maxima, p.steps, **options)


Step = Callable[..., None]
both_steps = pytest.mark.parametrize("step", [sgd, adamw], ids=["SGD", "AdamW"])


def check(step: Step, make: Callable[[], Problem], **changes: Any) -> Problem:
    """A step in one launch against the reference: SGD to the bit, AdamW's weights but for a vectorised square root,
    which torch does not round correctly on every CPU."""
    ours, theirs = make(), make()
    step(optim, ours, **changes)
    step(reference, theirs, **changes)
    loose = {"rtol": 4e-7, "atol": 1e-7} if step is adamw else {}
    assert_same(ours.params, theirs.params, **loose)
    assert_same(ours.tensors()[len(ours.params) :], theirs.tensors()[len(ours.params) :])
    return ours


SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.0},
    {"momentum": 0.0},
    {"dampening": 0.5},
    {"dampening": 0.5, "first_step": True},
    {"nesterov": True, "maximize": True},
    {"lr": torch.tensor(0.003)},
    {"bits": None},
]
ADAMW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"weight_decay": 0.0, "maximize": True},
    {"beta1": 0.0, "beta2": 0.5, "eps": 1e-3},
    {"lr": torch.tensor(0.003)},
    {"bits": None},
]
CASES = [(sgd, o) for o in SGD_OPTIONS] + [(adamw, o) for o in ADAMW_OPTIONS]


# --------------------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize(("step", "options"), CASES, ids=lambda v: str(v) if isinstance(v, dict) else v.__name__)
def test_options(step: Step, options: dict[str, Any]) -> None:
    check(step, Problem, **options)


@both_steps
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(step: Step, dtypes: str) -> None:
    for state in ({}, {"amsgrad": True} if step is adamw else {"nesterov": True}):
        check(step, lambda: Problem(dtypes, [1, 33, CHUNK + 16]), **state)


@both_steps
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_densities(step: Step, density: float) -> None:
    p = check(step, lambda: Problem(sizes=[40, CHUNK + 8], density=density))
    if density < 1:
        masks = reference.unpack(p.bits, p.offsets, [40, CHUNK + 8])
        assert not any(t[~mask].any() for ts in (p.params, p.states[0]) for t, mask in zip(ts, masks, strict=True))


@both_steps
def test_hostile_values(step: Step) -> None:
    check(step, lambda: Problem(sizes=[33, CHUNK], special=0.5))


def test_hostile_amsgrad() -> None:
    check(adamw, lambda: Problem(sizes=[33, CHUNK], special=0.5), amsgrad=True)


@both_steps
def test_scale_and_found_inf(step: Step) -> None:
    """As GradScaler sets them: float32 on the device. NaN is not 0 either."""
    sizes = [40, CHUNK, 9]
    for scale in (1024.0, 3.0):
        fine = {"grad_scale": torch.tensor(scale, device=DEVICE), "found_inf": torch.zeros(1, device=DEVICE)}
        check(step, lambda: Problem(sizes=sizes), **fine)
    for found in (1.0, math.nan):
        p, before = Problem(sizes=sizes), Problem(sizes=sizes)
        step(optim, p, grad_scale=torch.tensor(2.0, device=DEVICE), found_inf=torch.tensor(found, device=DEVICE))
        assert all(torch.equal(a, b) for a, b in zip(p.tensors(), before.tensors(), strict=True))


@both_steps
def test_two_runs_give_the_same_bits(step: Step) -> None:
    runs = [Problem("bfloat16"), Problem("bfloat16")]
    for p in runs:
        step(optim, p)
    assert all(torch.equal(a, b) for a, b in zip(*(p.tensors() for p in runs), strict=True))


@both_steps
def test_many_tensors(step: Step) -> None:
    """More than one program of the counting kernel takes, and the counts go up once a tensor."""
    sizes = [3] * (optim.COUNTS + 3) + [2 * CHUNK + 1]
    p = check(step, lambda: Problem(sizes=sizes))
    if step is adamw:
        assert [float(count) for count in p.steps] == [7.0 * b + 1 for b in range(len(sizes))]


@both_steps
def test_two_hundred_steps_while_the_masks_change(step: Step) -> None:
    ours, theirs = Problem(sizes=[70, 300, 33]), Problem(sizes=[70, 300, 33])
    for number in range(200):
        if number % 40 == 39:
            ours.bits = theirs.bits = ours.packed(0.3, ours.bits.numel(), seed=number)
        for p in (ours, theirs):
            p.grads = [values(g.numel(), FP32, 1000 * number + b) for b, g in enumerate(p.grads)]
        step(optim, ours)
        step(reference, theirs)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(a == 0, b == 0)


# ------------------------------------------------------------------------------------------------------------- torch


def ulps(got: Tensor, want: Tensor, *terms: Tensor) -> float:
    """The largest difference in units of the last place of the sum of the terms' magnitudes."""
    size = torch.stack([term.abs() for term in terms]).sum(0)
    return float(((got - want).abs() / (torch.nextafter(size, torch.full_like(size, math.inf)) - size)).max())


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_as_torch_does(nesterov: bool) -> None:
    """With a mask of ones, and within three units where torch fuses two roundings more into one."""
    p = values(3 * CHUNK, FP32, 0)
    ones = torch.full((p.numel() // 8,), 255, dtype=torch.uint8, device=DEVICE)
    peer = torch.nn.Parameter(p.clone())
    theirs = torch.optim.SGD([peer], lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
    buffer = torch.zeros_like(p)
    for number in range(3):
        before, velocity = p.clone(), buffer.clone()
        peer.data.copy_(p)
        peer.grad = values(p.numel(), FP32, 10 + number)
        if number:
            theirs.state[peer]["momentum_buffer"].copy_(buffer)
        theirs.step()
        hyper = (torch.tensor(0.1, dtype=torch.float64), 0.9, 0.0, 1e-2, nesterov, False, number == 0, None, None)
        optim.masked_sgd_([p], [peer.grad], [buffer], ones, [0], *hyper)
        direct, bound = (1.9, 3) if nesterov else (1.0, 2)
        assert ulps(p, peer.detach(), before, direct * 0.09 * velocity, direct * 0.1 * peer.grad) <= bound


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_steps_as_torch_does(amsgrad: bool) -> None:
    p = values(3 * CHUNK, FP32, 0)
    ones = torch.full((p.numel() // 8,), 255, dtype=torch.uint8, device=DEVICE)
    peer = torch.nn.Parameter(p.clone())
    theirs = torch.optim.AdamW([peer], lr=0.01, amsgrad=amsgrad)
    m, v, largest, count = *(torch.zeros_like(p) for _ in range(3)), torch.zeros((), device=DEVICE)
    maxima = [largest] if amsgrad else []
    for number in range(3):
        before, mean = p.clone(), m.clone()
        peer.data.copy_(p)
        peer.grad = values(p.numel(), FP32, 10 + number)
        if number:
            theirs.state[peer]["exp_avg"].copy_(m)
            theirs.state[peer]["exp_avg_sq"].copy_(v)
        theirs.step()
        hyper = (torch.tensor(0.01, dtype=torch.float64), 0.9, 0.999, 1e-8, 1e-2, amsgrad, False, None, None)
        optim.masked_adamw_([p], [peer.grad], [m], [v], maxima, [count], ones, [0], *hyper)
        denominator = ((largest if amsgrad else v) / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
        rate = 0.01 / (1 - 0.9 ** (number + 1)) / denominator
        assert ulps(p, peer.detach(), before, rate * mean, rate * 0.1 * peer.grad) <= 4


# ------------------------------------------------------------------------------------------------------------- memory


@both_steps
@pytest.mark.parametrize("start", [0, 1, 4])
def test_nothing_is_written_beside_a_slice(step: Step, start: int) -> None:
    """Aligned and not: the neighbours keep their values, and NaN among them is not read."""
    length, sizes = CHUNK + 40, [CHUNK + 40]
    want = check(step, lambda: Problem(sizes=sizes))
    p = Problem(sizes=sizes)
    guarded = []
    for tensors in (p.params, p.grads, *p.states[:2]):
        larger = torch.full((length + 32,), torch.nan, device=DEVICE)
        larger[start : start + length] = tensors[0]
        tensors[0] = larger[start : start + length]
        guarded.append(larger)
    step(optim, p)
    assert all(torch.equal(a, b) for a, b in zip(p.tensors(), want.tensors(), strict=True))
    for larger in guarded:
        assert torch.cat([larger[:start], larger[start + length :]]).isnan().all()


@both_steps
@pytest.mark.parametrize("chunks", [2**31 // CHUNK + 1, 2**33 // CHUNK + 5])
def test_elements_beyond_2_to_the_31(step: Step, chunks: int) -> None:
    """The last chunk of tensors that begin so far before it that only it is there; the mask's bits are."""
    if DEVICE != "cpu":
        pytest.skip("addresses before an allocation are no pointers on a GPU")
    p, want = Problem(sizes=[CHUNK], density=0.5), Problem(sizes=[CHUNK], density=0.5)
    begin = (chunks - 1) * CHUNK
    far = torch.zeros(begin // 8 + 1 + p.bits.numel(), dtype=torch.uint8)  # memory that is not touched takes no space
    far[begin // 8 :][: p.bits.numel()] = p.bits
    streams_ = [p.params, p.grads, p.states[0], p.states[1], p.states[2]][: 3 if step is sgd else 5]
    addresses = torch.tensor([tensors[0].data_ptr() - 4 * begin for tensors in streams_] + [0] * (step is adamw))
    table = torch.tensor([[begin + CHUNK, p.offsets[0], 1]])
    places = torch.tensor([[0, 0, chunks - 1]], dtype=torch.int32)
    shared = {"TYPE": "fp32", "GRAD": "fp32", "STATE": "fp32", "LANES": 4, "CHUNK": CHUNK}
    if step is sgd:
        numbers = (torch.tensor([0.1]), None, None, 1.0, 1e-2, 0.9, 1.0, 0)
        flags = {"DECAY": True, "MOMENTUM": True, "NESTEROV": False}
        optim._sgd_kernel[(1,)](addresses, table, places, far, *numbers, **flags, **shared)
    else:
        rates = torch.tensor([[0.1 / (1 - 0.9), math.sqrt(1 - 0.999), 0.1 * 1e-2, 0.0]])
        numbers = (rates, None, None, 1.0, 1 - 0.9, 0.999, 1 - 0.999, 1e-8)
        optim._adamw_kernel[(1,)](addresses, table, places, far, *numbers, AMSGRAD=False, **shared)
    step(optim, want)
    assert torch.equal(p.params[0], want.params[0])
    assert torch.equal(p.states[0][0], want.states[0][0])


@both_steps
def test_what_the_kernels_do_not_take(step: Step) -> None:
    """float64, a weight with gaps, states of two dtypes; beside it what they do, and nothing at all."""

    def make() -> Problem:
        p = Problem(sizes=[24, 24, 24, 24, 0])
        p.params = [p.params[0].double(), torch.zeros(24, 2, device=DEVICE)[:, 0].copy_(p.params[1]), *p.params[2:]]
        p.states = [[s.double() if b == 0 else s for b, s in enumerate(state)] for state in p.states]
        p.grads[0] = p.grads[0].double()
        p.params[3], p.states[0][3] = p.params[3].bfloat16(), p.states[0][3].bfloat16()
        return p

    check(step, make)


def test_a_gradient_that_lies_differently() -> None:
    def make() -> Problem:
        p = Problem(sizes=[24])
        p.params, p.states = [p.params[0].view(4, 6)], [[s.view(4, 6) for s in state] for state in p.states]
        p.grads = [p.grads[0].view(4, 6).T.contiguous().T]
        return p

    check(sgd, make)
    check(adamw, make)


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.37), torch.tensor(0.37, dtype=torch.float64)], ids=str)
def test_mask(dtype: torch.dtype, scale: Tensor | None) -> None:
    """NaN and inf are gone where the mask is zero; without a scale, what has no mask is not touched."""
    p = Problem()
    ours = [values(n, dtype, 3 * b, special=0.3) for b, n in enumerate(SIZES)]
    theirs = [x.clone() for x in ours]
    optim.mask_(ours, p.bits, p.offsets, scale)
    reference.mask_(theirs, p.bits, p.offsets, scale)
    if scale is None:
        assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(ours, theirs, strict=True))
    assert_same(ours, theirs)


def test_mask_of_what_the_kernels_do_not_take() -> None:
    p = Problem(sizes=[24, 24, 0])
    ours = [p.params[0].double(), torch.zeros(24, 2, device=DEVICE)[:, 0].copy_(p.params[1]), p.params[2]]
    theirs = [x.clone() for x in ours]
    optim.mask_(ours, p.bits, p.offsets, torch.tensor(2.0))
    reference.mask_(theirs, p.bits, p.offsets, torch.tensor(2.0))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    optim.mask_([], p.bits, [], None)
    optim.mask_([p.params[2]], p.bits, [-1], None)


# -------------------------------------------------------------------------------------------------------------- plans


def test_plans_are_made_once() -> None:
    p = Problem(sizes=[5, 9])
    sgd(optim, p)
    misses = streams.plan_streams.cache_info().misses
    p.grads = [g.clone() for g in p.grads]
    sgd(optim, p, lr=torch.tensor(0.5))
    assert streams.plan_streams.cache_info().misses == misses


def test_no_plan_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="the first call with these weights is captured in a CUDA graph"):
        streams.plan_streams(streams.Streams((3,), (-1,), ((FP32,),), ((True,),), ((0,),)), None, torch.device("cuda"))


ones = torch.ones(9, device=DEVICE)
octets = torch.zeros(4, dtype=torch.uint8, device=DEVICE)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"grads": []}, r"wanted one entry a parameter in each list, got .*'params': 1, 'grads': 0"),
    "momentum": ({"momentum_buffers": []}, r"'momentum_buffers': 0"),
    "shape": ({"grads": [ones.view(3, 3)]}, r"grads\[0\] must be \[9\] as params\[0\], on .*, got \[3, 3\] on"),
    "bits": ({"bits": octets.view(2, 2).T}, r"bits must be contiguous uint8 on .*, got torch.uint8 \[2, 2\]"),
    "segment": ({"offsets": [3]}, r"mask 0 of 9 bits at byte 3 is not within 4 bytes"),
    "offset": ({"offsets": [-2]}, r"mask 0 of 9 bits at byte -2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_got_and_wanted(case: str) -> None:
    changes, message = BAD[case]
    lists = {"params": [ones], "grads": [ones], "momentum_buffers": [ones], "bits": octets, "offsets": [0]} | changes
    with pytest.raises(ValueError, match=message):
        optim.masked_sgd_(*lists.values(), torch.tensor(0.1), 0.9, 0.0, 0.0, False, False, False, None, None)


def test_bad_steps() -> None:
    p = Problem(sizes=[3])
    p.steps = [torch.tensor(1, device=DEVICE)]
    with pytest.raises(ValueError, match=r"steps\[0\] must be one float32 on .*, got torch.int64 \[\]"):
        adamw(optim, p)
    p.steps = []
    with pytest.raises(ValueError, match="wanted 1 steps, got 0"):
        adamw(optim, p)


# ------------------------------------------------------------------------------------------------------- ahead of time

TABLES = {"addresses_ptr": "*i64", "table_ptr": "*i64", "chunks_ptr": "*i32", "bits_ptr": "*u8"}
TRIPLES = [("fp32", "fp32", "fp32"), ("bf16", "bf16", "fp32"), ("fp16", "fp16", "fp32"), ("bf16", "bf16", "bf16")]


def spec(kernel: str, arch: int, signature: dict[str, str], constants: dict[str, Any]) -> KernelSpec:
    signature = TABLES | signature
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") and name != "lr_ptr")
    name = f"rpg_fast.kernels.optim:{kernel}"
    options = {"num_warps": optim.OPTIONS["num_warps"], "fp_fusion": optim.OPTIONS["enable_fp_fusion"]}
    return KernelSpec(name, arch, signature, {"CHUNK": CHUNK, **constants}, aligned, **options)


def scaler(signature: dict[str, str], on: bool) -> tuple[dict[str, str], dict[str, Any]]:
    both = ("grad_scale_ptr", "found_inf_ptr")
    return (signature | dict.fromkeys(both, "*fp32"), {}) if on else (signature, dict.fromkeys(both))


def sgd_spec(
    arch: int, types: tuple[str, str, str], amp: bool, momentum: bool = True, nesterov: bool = True
) -> KernelSpec:
    floats = dict.fromkeys(("sign", "weight_decay", "momentum", "fresh"), "fp32")
    signature, constants = scaler({"lr_ptr": "*fp64", "first_step": "i32", **floats}, amp)
    flags = {"DECAY": True, "MOMENTUM": momentum, "NESTEROV": nesterov, "LANES": streams.lanes(types)}
    return spec("_sgd_kernel", arch, signature, constants | optim._types(types) | flags)


def adamw_spec(arch: int, types: tuple[str, str, str], amp: bool, amsgrad: bool = False) -> KernelSpec:
    floats = dict.fromkeys(("sign", "fresh1", "beta2", "fresh2", "eps"), "fp32")
    signature, constants = scaler({"rates_ptr": "*fp32", **floats}, amp)
    flags = {"AMSGRAD": amsgrad, "LANES": streams.lanes(types)}
    return spec("_adamw_kernel", arch, signature, constants | optim._types(types) | flags)


def mask_spec(arch: int, dtype: str) -> KernelSpec:
    return spec("_mask_kernel", arch, {"scale_ptr": "*fp64"}, {"TYPE": dtype, "LANES": streams.lanes([dtype])})


def count_spec(arch: int) -> KernelSpec:
    signature = {"addresses_ptr": "*i64", "rates_ptr": "*fp32", "head_ptr": "*fp64", "found_inf_ptr": "*fp32"}
    constants = {"COUNTS": optim.COUNTS}
    rest = {"lr_ptr": "*fp64", "B": "i32"}
    return KernelSpec(
        "rpg_fast.kernels.optim:_count_kernel", arch, signature | rest, constants, tuple(signature), num_warps=4
    )


def vectors(kernel: KernelSpec) -> tuple[int, int]:
    """Loads and stores of 16 bytes that a thread needs for its share of a chunk; those of 16-bit tensors beside float32
    ones are of 8 bytes."""
    constants = kernel.constants
    share = CHUNK // (32 * kernel.num_warps)
    state = constants.get("STATE", "")
    states = 1 if constants.get("MOMENTUM") else (2 + constants["AMSGRAD"]) if "AMSGRAD" in constants else 0
    read = [constants["TYPE"], *([constants["GRAD"]] if "GRAD" in constants else []), *[state] * states]
    written = [constants["TYPE"], *[state] * states]

    def count(types: list[str]) -> int:
        sizes = [4 if kind == "fp32" else 2 for kind in types]
        return sum(share // constants["LANES"] for size in sizes if size * constants["LANES"] == 16)

    return count(read), count(written)


def check_compiled(kernels: Sequence[CompiledKernel]) -> None:
    for kernel in kernels:
        print(f"{kernel}, {kernel.wide_loads} wide loads, {kernel.wide_stores} wide stores")
        assert (kernel.stack, kernel.local) == (0, 0), f"spills: {kernel}"
        if "count" in kernel.spec.kernel:
            continue
        assert kernel.shared == 0, f"elements change threads: {kernel}"
        assert (kernel.wide_loads, kernel.wide_stores) == vectors(kernel.spec), f"hints: {kernel}"
        if "sgd" in kernel.spec.kernel and kernel.spec.constants.get("grad_scale_ptr", 0) is None:
            assert kernel.multiply_adds == 0, f"a rounding is missing: {kernel}"


def test_ahead_of_time() -> None:
    specs = [sgd_spec(90, types, amp=False) for types in TRIPLES] + [adamw_spec(90, types, True) for types in TRIPLES]
    specs += [mask_spec(90, "fp32"), mask_spec(90, "bf16"), count_spec(90)]
    check_compiled(compile_kernels(specs))


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_ahead_of_time_every_combination(arch: int) -> None:
    pairs = list(itertools.product((False, True), repeat=2))
    specs = [sgd_spec(arch, types, amp, *flags) for types in TRIPLES for amp in (False, True) for flags in pairs]
    specs += [adamw_spec(arch, types, *flags) for types in TRIPLES for flags in pairs]
    specs += [mask_spec(arch, dtype) for dtype in ("fp32", "bf16", "fp16")] + [count_spec(arch)]
    check_compiled(compile_kernels(specs))
