"""The C++ kernels of masks, selection and optimizers against the meaning of their ops, called directly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import random_selection
from torch import Tensor

from rpg_fast import _extension, _ops, reference

OPS = ["pack", "unpack", "popcount", "mask_", "select_topk", "masked_sgd_", "masked_adamw_"]
MISSING = [name for name in OPS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rpg_fast::{name}", "CPU")]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no C++ kernels for {MISSING}: {_extension.load().reason}")

ops = getattr(torch.ops, _ops.NAMESPACE)
many_examples = settings(max_examples=200)

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 3e38]
LAYOUTS = ["contiguous", "unaligned", "transposed", "strided"]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of these values whose memory is laid out in another way."""
    if layout == "unaligned":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    if layout == "transposed":
        dims = list(reversed(range(values.dim())))
        return values.permute(dims).contiguous().permute(dims)
    if layout == "strided":
        memory = values.new_zeros([*values.shape[:-1], 2 * values.shape[-1] + 1]) if values.dim() else values.clone()
        return memory[..., 1::2].copy_(values) if values.dim() else memory
    return values.clone(memory_format=torch.contiguous_format)


def random_values(shape: Sequence[int], dtype: torch.dtype, special: float, generator: torch.Generator) -> Tensor:
    """Normal values, a fraction `special` of them replaced by values that are often forgotten."""
    values = torch.randn(shape, generator=generator)
    chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < special, chosen, values).to(dtype)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return draw(
        st.one_of(
            st.tuples(st.integers(0, 40)),
            st.tuples(st.integers(0, 2100)),
            st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 5)),
            st.tuples(st.integers(1, 8), st.integers(1, 8), st.just(3), st.just(3)),
            st.just(()),
        )
    )


@st.composite
def segments(draw: st.DrawFn, may_lack: bool = False) -> tuple[list[tuple[int, ...]], list[int], int]:
    """Shapes, the first byte of each one's bits (with gaps between them; -1 here and there if one `may_lack` a mask)
    and the size of the buffer."""
    tensors = draw(st.lists(shapes(), min_size=1, max_size=4))
    offsets, end = [], 0
    for shape in tensors:
        if may_lack and draw(st.booleans()):
            offsets.append(-1)
            continue
        offsets.append(end + draw(st.integers(0, 9)))
        end = offsets[-1] + -(-math.prod(shape) // 8)
    return tensors, offsets, end + draw(st.integers(0, 9))


def random_bits(shapes: Sequence[Sequence[int]], offsets: Sequence[int], nbytes: int, density: float) -> Tensor:
    """Packed by the reference, so that padding is zero."""
    masked = [(torch.rand(tuple(s)) < density, o) for s, o in zip(shapes, offsets, strict=True) if o >= 0]
    if not masked:
        return torch.zeros(nbytes, dtype=torch.uint8)
    masks, starts = zip(*masked, strict=True)
    return reference.pack(masks, starts, nbytes)


def demoted(scalar: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor:
    """float32 where a 0-d tensor is among the others: torch, so the reference, would promote that one to float64."""
    return scalar.float() if () in shapes else scalar


def assert_same(got: Any, want: Any, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got, want, equal_nan=True, **tolerance)


# ---------------------------------------------------------------------------------------------------------------- masks


@many_examples
@given(segments(), st.sampled_from(LAYOUTS), st.floats(0, 1), st.integers(0, 2**32))
def test_pack_unpack_popcount(
    layout: tuple[list[tuple[int, ...]], list[int], int], memory: str, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    shapes_, offsets, nbytes = layout
    masks = [laid_out(torch.rand(shape) < density, memory) for shape in shapes_]
    numels = [mask.numel() for mask in masks]
    bits = ops.pack(masks, offsets, nbytes)
    assert_same(bits, reference.pack(masks, offsets, nbytes))
    assert_same(ops.unpack(bits, offsets, numels), [mask.flatten() for mask in masks])
    assert ops.popcount(bits, offsets, numels).tolist() == [int(mask.sum()) for mask in masks]


def test_popcount_ignores_what_lies_behind_the_segment() -> None:
    ones = torch.full((40,), 255, dtype=torch.uint8)
    assert ops.popcount(ones, [0, 3, 39], [13, 0, 1]).tolist() == [13, 0, 1]
    assert ops.unpack(ones, [1], [3])[0].tolist() == [True] * 3


def on_cuda(*names: str) -> Callable[[Callable[..., None]], Any]:
    """A test of these ops' CUDA kernels."""
    missing = [
        name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rpg_fast::{name}", "CUDA")
    ]
    unfit = missing or not torch.cuda.is_available()
    reason = f"needs an NVIDIA GPU and an extension built with CUDA; kernels missing: {missing}"
    return lambda test: pytest.mark.gpu(pytest.mark.skipif(bool(unfit), reason=reason)(test))


@on_cuda("pack", "unpack")
@pytest.mark.parametrize("memory", LAYOUTS)
def test_pack_and_unpack_on_cuda(memory: str) -> None:
    numels = [*range(0, 300), 4095, 4096, 4097, 1_000_003]
    masks = [laid_out((torch.rand(2, n) < 0.5).cuda(), memory) for n in numels]
    numels = [2 * n for n in numels]
    offsets = [sum((n + 7) // 8 + 1 for n in numels[:i]) + 1 for i in range(len(numels))]
    nbytes = offsets[-1] + numels[-1] // 8 + 5
    bits = ops.pack(masks, offsets, nbytes)
    assert_same(bits.cpu(), reference.pack([mask.cpu() for mask in masks], offsets, nbytes))
    assert_same(ops.unpack(bits, offsets, numels), [mask.flatten() for mask in masks])


@on_cuda("popcount")
def test_popcount_on_cuda() -> None:
    numels = [*range(300), 1_000_003]  # more segments than one launch takes, at odd bytes
    offsets = [i * 41 + 1 for i in range(len(numels))]
    bits = torch.randint(256, (offsets[-1] + 125_001,), dtype=torch.uint8)
    on_device, want = bits.cuda(), reference.popcount(bits, offsets, numels)
    assert_same(ops.popcount(on_device, offsets, numels).cpu(), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = ops.popcount(on_device, offsets, numels)
    on_device.zero_()
    graph.replay()
    assert not counts.any()
    assert ops.popcount(on_device, [], []).shape == (0,)


@many_examples
@given(
    segments(may_lack=True),
    st.sampled_from(FLOATING),
    st.sampled_from(LAYOUTS),
    st.sampled_from([None, torch.float32, torch.float64]),
    st.integers(0, 2**32),
)
def test_mask(
    layout: tuple[list[tuple[int, ...]], list[int], int],
    dtype: torch.dtype,
    memory: str,
    scale_dtype: torch.dtype | None,
    seed: int,
) -> None:
    generator = torch.manual_seed(seed)
    shapes_, offsets, nbytes = layout
    tensors = [laid_out(random_values(shape, dtype, 0.3, generator), memory) for shape in shapes_]
    wanted = [tensor.clone() for tensor in tensors]
    bits = random_bits(shapes_, offsets, nbytes, 0.5)
    scale = None if scale_dtype is None else demoted(torch.tensor(0.37, dtype=scale_dtype), shapes_)
    reference.mask_(wanted, bits, offsets, scale)
    ops.mask_(tensors, bits, offsets, scale)
    assert_same(tensors, wanted)


# ------------------------------------------------------------------------------------------------------------ selection


@many_examples
@given(
    layout=segments(),
    dtype=st.sampled_from(FLOATING),
    memory=st.sampled_from(LAYOUTS),
    special=st.sampled_from([0.0, 0.3, 1.0]),
    restricted=st.booleans(),
    absolute=st.booleans(),
    per_tensor=st.booleans(),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_select_topk(
    layout: tuple[list[tuple[int, ...]], list[int], int],
    dtype: torch.dtype,
    memory: str,
    special: float,
    restricted: bool,
    absolute: bool,
    per_tensor: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    generator = torch.manual_seed(seed)
    shapes_, offsets, nbytes = layout
    scores = [laid_out(random_values(shape, dtype, special, generator), memory) for shape in shapes_]
    numels = [score.numel() for score in scores]
    limits = numels if per_tensor else [sum(numels)]
    counts = torch.tensor([data.draw(st.integers(-1, limit + 2)) for limit in limits])
    eligible = random_bits(shapes_, offsets, nbytes, 0.4) if restricted else None
    got = ops.select_topk(scores, counts, offsets, nbytes, eligible, absolute, per_tensor)
    assert_same(got, reference.select_topk(scores, counts, offsets, nbytes, eligible, absolute, per_tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("values", ["normal", "few", "equal", "narrow"])
def test_select_topk_over_many_chunks(dtype: torch.dtype, per_tensor: bool, values: str) -> None:
    sizes = [150_001, 32_768, 7]
    make: dict[str, Callable[[int], Tensor]] = {
        "normal": torch.randn,
        "few": lambda n: torch.randint(-2, 3, (n,)).double(),
        "equal": torch.ones,
        "narrow": lambda n: 1 + torch.randint(0, 1000, (n,)).double() * 2.0**-40,  # equal but for the last digits
    }
    scores = [make[values](n).to(dtype) for n in sizes]
    offsets, nbytes = [0, 18_816, 23_040], 23_168
    bits = random_bits([(n,) for n in sizes], offsets, nbytes, 0.7)
    for fraction in (0.001, 0.6):
        for eligible in (None, bits):
            totals = sizes if per_tensor else [sum(sizes)]
            counts = torch.tensor([round(fraction * n) for n in totals])
            got = ops.select_topk(scores, counts, offsets, nbytes, eligible, True, per_tensor)
            want = reference.select_topk(scores, counts, offsets, nbytes, eligible, True, per_tensor)
            assert torch.equal(got, want)


def check_selections(seeds: range) -> None:
    for seed in seeds:
        case = random_selection(seed)
        got = ops.select_topk(*case.arguments())
        assert torch.equal(got, reference.select_topk(*case.arguments())), f"seed {seed}"


def test_counts_and_ties_are_exact() -> None:
    check_selections(range(500))


@pytest.mark.full
def test_counts_and_ties_are_exact_in_ten_thousand_cases() -> None:
    check_selections(range(500, 10_500))


@on_cuda("select_topk")
@pytest.mark.parametrize("memory", LAYOUTS)
def test_selection_on_cuda(memory: str) -> None:
    for seed in range(500):
        case = random_selection(seed)
        want = reference.select_topk(*case.arguments())
        eligible = None if case.eligible is None else case.eligible.cuda()
        scores = [laid_out(score.cuda(), memory) for score in case.scores]
        got = ops.select_topk(scores, case.counts.cuda(), *case.arguments()[2:4], eligible, *case.arguments()[5:])
        assert torch.equal(got.cpu(), want), f"seed {seed}"


@on_cuda("select_topk")
@pytest.mark.parametrize("per_tensor", [False, True])
def test_captured_selection_on_cuda(per_tensor: bool) -> None:
    scores = [torch.randn(n, device="cuda") for n in (3_000_000, 5, 70_000)]
    layout = ([0, 375_040, 375_168], 384_000)
    counts = torch.tensor([30_000, 2, 7_000][: 3 if per_tensor else 1], device="cuda")
    ops.select_topk(scores, counts, *layout, None, True, per_tensor)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = ops.select_topk(scores, counts, *layout, None, True, per_tensor)
    for make in (torch.randn, torch.ones):
        for score in scores:
            score.copy_(make(score.shape))
        graph.replay()
        first = chosen.clone()
        graph.replay()
        assert torch.equal(chosen, first)
        on_host = [score.cpu() for score in scores]
        assert_same(chosen.cpu(), reference.select_topk(on_host, counts.cpu(), *layout, None, True, per_tensor))


def test_elements_beyond_2_to_the_31() -> None:
    """Scores that share one element, so that only the bits take memory."""
    numel = 2**31 + 5000
    scores = torch.ones(1, dtype=torch.bfloat16).expand(numel)
    eligible = torch.zeros(numel // 8, dtype=torch.uint8)
    for index in (5, 2**31 - 1, 2**31, numel - 1):
        eligible[index // 8] |= 1 << index % 8
    assert ops.popcount(eligible, [0], [numel]).tolist() == [4]
    chosen = ops.select_topk([scores], torch.tensor([3]), [0], numel // 8, eligible, True, False)
    eligible[-1] = 0
    assert torch.equal(chosen, eligible)


# ----------------------------------------------------------------------------------------------------------- optimizers


class Parameters:
    """Parameters, gradients and states of one step, twice over: for the kernel and for the reference."""

    def __init__(
        self,
        layout: tuple[list[tuple[int, ...]], list[int], int],
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        memories: Sequence[str],
        special: float,
        seed: int,
    ):
        generator = torch.manual_seed(seed)
        self.shapes, self.offsets, nbytes = layout
        self.bits = random_bits(self.shapes, self.offsets, nbytes, 0.5)

        def tensors(memory: str, dtype: torch.dtype) -> list[Tensor]:
            return [laid_out(random_values(shape, dtype, special, generator), memory) for shape in self.shapes]

        self.params = tensors(memories[0], dtype)
        self.grads = tensors(memories[1], dtype)
        self.states = [[s.abs_() for s in tensors(memories[2], state_dtype)] for _ in range(3)]
        self.steps = [torch.tensor(float(i)) for i in range(len(self.shapes))]

    def copies(self) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor]]:
        def twin(tensors: list[Tensor]) -> list[Tensor]:
            return [t.clone() for t in tensors]

        return twin(self.params), twin(self.grads), [twin(s) for s in self.states], twin(self.steps)


@st.composite
def parameters(draw: st.DrawFn) -> Parameters:
    dtype = draw(st.sampled_from(FLOATING))
    return Parameters(
        draw(segments(may_lack=True)),
        dtype,
        torch.float64 if dtype == torch.float64 else torch.float32,
        draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        draw(st.sampled_from([0.0, 0.1])),
        draw(st.integers(0, 2**32)),
    )


lrs = st.builds(torch.tensor, st.sampled_from([0.1, 0.003]), dtype=st.sampled_from([torch.float32, torch.float64]))


def optional_tensor(value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor(value)


@many_examples
@given(
    parameters(),
    lrs,
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 1e-2]),
    st.tuples(*[st.booleans()] * 4),
    st.sampled_from([None, 1024.0, 3.0]),
    st.sampled_from([None, 0.0, 1.0]),
)
def test_masked_sgd(
    case: Parameters,
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    flags: tuple[bool, bool, bool, bool],
    grad_scale: float | None,
    found_inf: float | None,
) -> None:
    params, grads, (buffers, *_), _ = case.copies()
    masked, *switches = flags
    rest = (
        case.bits if masked else None,
        case.offsets,
        demoted(lr, case.shapes),
        momentum,
        dampening,
        weight_decay,
        *switches,
    )
    rest = (*rest, optional_tensor(grad_scale), optional_tensor(found_inf))
    ops.masked_sgd_(params, grads, buffers if momentum else [], *rest)
    reference.masked_sgd_(case.params, case.grads, case.states[0] if momentum else [], *rest)
    assert_same(params, case.params)
    assert_same(buffers, case.states[0])
    assert_same(grads, case.grads)


@many_examples
@given(
    parameters(),
    lrs,
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.9, 0.999]),
    st.sampled_from([0.0, 1e-2]),
    st.tuples(*[st.booleans()] * 3),
    st.sampled_from([None, 1024.0, 3.0]),
    st.sampled_from([None, 0.0, 1.0]),
)
def test_masked_adamw(
    case: Parameters,
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    flags: tuple[bool, bool, bool],
    grad_scale: float | None,
    found_inf: float | None,
) -> None:
    params, grads, states, steps = case.copies()
    masked, amsgrad, maximize = flags
    rest = (
        case.bits if masked else None,
        case.offsets,
        demoted(lr, case.shapes),
        beta1,
        beta2,
        1e-8,
        weight_decay,
        amsgrad,
        maximize,
    )
    rest = (*rest, optional_tensor(grad_scale), optional_tensor(found_inf))
    ops.masked_adamw_(params, grads, *states[:2], states[2] if amsgrad else [], steps, *rest)
    reference.masked_adamw_(
        case.params, case.grads, *case.states[:2], case.states[2] if amsgrad else [], case.steps, *rest
    )
    assert_same(steps, case.steps)
    assert_same(states, case.states)
    for got, want in zip(params, case.params, strict=True):
        assert_same(got, want, rtol=4 * torch.finfo(want.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_in_the_parameters_own_16_bits(dtype: torch.dtype) -> None:
    layout = [(40, 30)], [0], 150
    case = Parameters(layout, dtype, dtype, ["contiguous"] * 3, 0.0, 0)
    precise = [s.float() for s in case.states[0]], [s.float() for s in case.states[1]]
    params, grads, states, steps = case.copies()
    rest = (case.bits, [0], torch.tensor(0.1))
    ops.masked_adamw_(params, grads, *states[:2], [], steps, *rest, 0.9, 0.99, 1e-8, 0.01, False, False, None, None)
    reference.masked_adamw_(
        case.params, case.grads, *precise, [], case.steps, *rest, 0.9, 0.99, 1e-8, 0.01, False, False, None, None
    )
    tolerance = torch.finfo(dtype).eps
    assert_same(params, case.params, rtol=tolerance, atol=0.0)
    assert_same(states[:2], [[s.to(dtype) for s in state] for state in precise], rtol=tolerance, atol=0.0)


def ulps(got: Tensor, want: Tensor, *terms: Tensor) -> float:
    """The largest difference in units of the last place of the sum of the terms' magnitudes: where they cancel, torch's
    own float32 step is several units of the result's last place off the exact one."""
    size = torch.stack([term.abs() for term in terms]).sum(0)
    return float(((got - want).abs() / (torch.nextafter(size, torch.tensor(math.inf)) - size)).max())


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_steps_as_torch_does(nesterov: bool) -> None:
    p = torch.randn(100_003)
    peer = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.SGD([peer], lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
    buffer = torch.zeros_like(p)
    for step in range(3):
        before, velocity = p.clone(), buffer.clone()
        peer.data.copy_(p)
        peer.grad = torch.randn_like(p)
        if step:
            optimizer.state[peer]["momentum_buffer"].copy_(buffer)
        optimizer.step()
        hyper = (torch.tensor(0.1), 0.9, 0.0, 1e-2, nesterov, False, step == 0)
        ops.masked_sgd_([p], [peer.grad], [buffer], None, [-1], *hyper, None, None)
        direct, bound = (1.9, 3) if nesterov else (1.0, 2)  # two roundings more where torch fuses them into one
        assert ulps(p, peer.detach(), before, direct * 0.09 * velocity, direct * 0.1 * peer.grad) <= bound


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_steps_as_torch_does(amsgrad: bool) -> None:
    p = torch.randn(100_003)
    peer = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([peer], lr=0.01, amsgrad=amsgrad)
    m, v, v_max, count = *(torch.zeros_like(p) for _ in range(3)), torch.zeros(())
    for step in range(3):
        before, mean = p.clone(), m.clone()
        peer.data.copy_(p)
        peer.grad = torch.randn_like(p)
        if step:
            optimizer.state[peer]["exp_avg"].copy_(m)
            optimizer.state[peer]["exp_avg_sq"].copy_(v)
        optimizer.step()
        hyper = (torch.tensor(0.01, dtype=torch.float64), 0.9, 0.999, 1e-8, 1e-2, amsgrad, False)
        maxima = [v_max] if amsgrad else []
        ops.masked_adamw_([p], [peer.grad], [m], [v], maxima, [count], None, [-1], *hyper, None, None)
        denominator = ((v_max if amsgrad else v) / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        rate = 0.01 / (1 - 0.9 ** (step + 1)) / denominator
        assert ulps(p, peer.detach(), before, rate * mean, rate * 0.1 * peer.grad) <= 4


# ---------------------------------------------------------------------------------------------------------- all of them


def calls() -> dict[str, tuple[Any, ...]]:
    """One call of each op, large enough for many chunks, with everything on."""
    torch.manual_seed(0)
    sizes, offsets, nbytes = [200_001, 5_000, 33], [0, 25_088, -1], 25_728
    where = [o for o in offsets if o >= 0]
    tensors = [torch.randn(n) for n in sizes]
    bits = random_bits([(n,) for n in sizes], offsets, nbytes, 0.5)
    lr, scale, fine = torch.tensor(0.1), torch.tensor(2.0), torch.tensor(0.0)

    def fresh() -> list[Tensor]:
        return [torch.rand_like(t) for t in tensors]

    counts = torch.tensor([20_000, 1_000])
    steps = [torch.tensor(3.0) for _ in sizes]
    return {
        "pack": ([t > 0 for t in tensors[:2]], where, nbytes),
        "unpack": (bits, where, sizes[:2]),
        "popcount": (bits, where, sizes[:2]),
        "mask_": (fresh(), bits, offsets, scale),
        "select_topk": ([t.round() for t in tensors[:2]], counts, where, nbytes, bits, True, True),
        "masked_sgd_": (
            *(fresh(), fresh(), fresh(), bits, offsets, lr),
            *(0.9, 0.0, 1e-4, True, False, False, scale, fine),
        ),
        "masked_adamw_": (
            *(fresh(), fresh(), fresh(), fresh(), fresh(), steps, bits, offsets, lr),
            *(0.9, 0.999, 1e-8, 1e-2, True, False, scale, fine),
        ),
    }


@pytest.mark.parametrize("name", OPS)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            arguments = calls()[name]
            results.append((getattr(ops, name)(*arguments), arguments))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, calls()[name])


def test_empty_lists() -> None:
    bits, lr = torch.zeros(8, dtype=torch.uint8), torch.tensor(0.1)
    assert ops.unpack(bits, [], []) == []
    assert_same(ops.popcount(bits, [], []), torch.zeros(0, dtype=torch.int64))
    ops.mask_([], bits, [], None)
    ops.masked_sgd_([], [], [], None, [], lr, 0.9, 0.0, 0.0, False, False, False, None, None)
    ops.masked_adamw_([], [], [], [], [], [], bits, [], lr, 0.9, 0.99, 1e-8, 0.0, False, False, None, None)


def sgd(**changes: Any) -> tuple[Any, ...]:
    arguments = {
        "params": [torch.ones(9)],
        "grads": [torch.ones(9)],
        "momentum_buffers": [torch.ones(9)],
        "bits": torch.zeros(2, dtype=torch.uint8),
        "offsets": [0],
        "lr": torch.tensor(0.1),
        **changes,
    }
    return (*arguments.values(), 0.9, 0.0, 0.0, False, False, False, None, None)


octets = torch.zeros(4, dtype=torch.uint8)
ones = torch.ones(9)
BAD_CALLS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "mask dtype": ("pack", ([ones], [0], 4), r"masks\[0\] must be bool on the CPU, got float32 \[9\] on cpu"),
    "segment": ("unpack", (octets, [3], [9]), r"segment 0 of 9 bits at byte 3 does not fit into 4 bytes"),
    "no mask": ("popcount", (octets, [-1], [9]), r"segment 0 of 9 bits at byte -1 does not fit"),
    "lengths": ("popcount", (octets, [0], [9, 1]), r"offsets must have 2 entries, got 1"),
    "bits": ("mask_", ([ones], octets.view(2, 2), [0], None), r"bits must be a contiguous uint8 .* got uint8 \[2, 2\]"),
    "offset": ("mask_", ([ones], octets, [-2], None), r"offsets\[0\] must be a byte or -1 for no mask, got -2"),
    "integers": ("mask_", ([ones.long()], octets, [0], None), r"tensors\[0\] must be floating .* got int64 \[9\]"),
    "counts": (
        "select_topk",
        ([ones], torch.tensor([1, 2]), [0], 4, None, True, True),
        r"int64 \[1\] .*got int64 \[2\]",
    ),
    "eligible": ("select_topk", ([ones], torch.tensor([1]), [0], 4, octets[:3], True, True), r"at least 4 bytes"),
    "mixed": (
        "select_topk",
        ([ones, ones.double()], torch.tensor([1]), [0, 2], 4, None, True, False),
        r"scores\[0\] is float32 \[9\] on cpu, scores\[1\] is float64",
    ),
    "grads": ("masked_sgd_", sgd(grads=[]), r"grads must have 1 entries, got 0"),
    "shape": ("masked_sgd_", sgd(grads=[ones.view(3, 3)]), r"grads\[0\] .*float32 \[9\] on cpu; got float32 \[3, 3\]"),
    "state": (
        "masked_sgd_",
        sgd(momentum_buffers=[ones.double()]),
        r"momentum_buffers\[0\] must be float32 .*64",
    ),
    "lr": ("masked_sgd_", sgd(lr=torch.ones(2)), r"lr must hold one element on the CPU, got float32 \[2\]"),
    "small": ("masked_sgd_", sgd(bits=octets[:1]), r"segment 0 of 9 bits at byte 0 does not fit into 1 bytes"),
    "steps": (
        "masked_adamw_",
        (
            *([ones], [ones], [ones], [ones], [], [torch.tensor(1)], None, [-1], torch.tensor(0.1)),
            *(0.9, 0.99, 1e-8, 0.0, False, False, None, None),
        ),
        r"steps\[0\] must be one float32 on the CPU, got int64",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_says_what_was_got_and_wanted(case: str) -> None:
    name, arguments, message = BAD_CALLS[case]
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, name)(*arguments)
