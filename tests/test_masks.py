"""Packed masks, selections and distributions: exact counts and ties, against plain Python."""

from __future__ import annotations

import copy
import hashlib
import io
import math
import pickle

import pytest
import torch
from cases import DTYPES, LAYOUTS, Shape, make_weight, resnet50_convolutions, seeded
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import erk_densities, ranking, round_half_up
from oracles import prune_and_grow as prune_and_grow_oracle
from oracles import topk_mask as topk_mask_oracle
from torch import Tensor, nn

import rpg_fast
from rpg_fast import PackedMasks, erk, global_magnitude, mask_gradients_, prune_and_grow, topk_mask, uniform

NAN, INF = float("nan"), float("inf")
ODD = [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38, 0.5, 2.0]
SCORES = st.one_of(st.sampled_from(ODD), st.floats(width=32), st.integers(-2, 2).map(float))
SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 1023, 1024, 1025, 8191, 8192, 8193]


def random_mask(shape: Shape, density: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)) < density


def memory_flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie."""
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    return tensor.permute(order).reshape(-1)


# ------------------------------------------------------------------------------------------------------------ topk_mask


@given(scores=st.lists(SCORES, max_size=70), sparsity=st.floats(0, 1))
@example(scores=[0.0] * 20, sparsity=0.9)
@example(scores=[0.0, -0.0, 0.0, -0.0], sparsity=0.5)
@example(scores=[NAN, 1.0, NAN, INF, NAN], sparsity=0.5)
@example(scores=[-INF, -1.0, -3.4e38], sparsity=1 / 3)
@example(scores=[1e-45, 0.0, 2e-45, -1e-45], sparsity=0.5)
@example(scores=[], sparsity=0.5)
def test_topk_against_python(scores: list[float], sparsity: float) -> None:
    mask = topk_mask(torch.tensor(scores, dtype=torch.float32), sparsity)
    assert mask.dtype == torch.bool
    assert mask.tolist() == topk_mask_oracle(scores, sparsity)


@given(
    size=st.sampled_from(SIZES) | st.integers(0, 3000),
    distinct=st.sampled_from([1, 2, 5, 1000]),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.98, 0.999, 1.0]) | st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 5),
)
def test_topk_counts_and_ties_at_many_sizes(
    size: int, distinct: int, sparsity: float, dtype: torch.dtype, seed: int
) -> None:
    """Few distinct values: nearly everything is a tie."""
    scores = (torch.randint(0, distinct, (size,), generator=seeded(seed)) - distinct // 2).to(dtype) / 4
    mask = topk_mask(scores, sparsity)
    kept = size - round_half_up(sparsity, size)
    wanted = torch.zeros(size, dtype=torch.bool)
    wanted[scores.sort(descending=True, stable=True).indices[:kept]] = True
    assert torch.equal(mask, wanted)


def test_topk_of_a_million(device: torch.device) -> None:
    scores = torch.randn(1_000_003, generator=seeded(0))
    scores[::7] = 0.25  # one long tie across the threshold
    for sparsity in (0.3, 0.6, 0.98):
        mask = topk_mask(scores.to(device), sparsity).cpu()
        kept = len(scores) - round_half_up(sparsity, len(scores))
        wanted = torch.zeros(len(scores), dtype=torch.bool)
        wanted[scores.sort(descending=True, stable=True).indices[:kept]] = True
        assert torch.equal(mask, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_in_any_storage(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Without ties the storage makes no difference."""
    scores = torch.randperm(5 * 6 * 9, generator=seeded(0)).view(5, 6, 3, 3).to(device, dtype)
    wanted = scores >= 200
    mask = topk_mask(LAYOUTS[layout](scores), 200 / 270)
    assert mask.shape == scores.shape
    assert torch.equal(mask, wanted)


def test_topk_ties_follow_memory_order(device: torch.device) -> None:
    scores = torch.ones(2, 3, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    mask = topk_mask(scores, 0.5)
    assert mask.stride() == scores.stride()
    assert memory_flat(mask).tolist() == [True] * 12 + [False] * 12


def test_topk_takes_a_live_sparsity(device: torch.device) -> None:
    scores = torch.randn(1000, generator=seeded(0)).to(device)
    for sparsity in (0.0, 0.123, 0.5, 0.9985, 1.0):
        live = topk_mask(scores, torch.tensor(sparsity, dtype=torch.float64, device=device))
        assert torch.equal(live, topk_mask(scores, sparsity))
    leaf = scores.clone().requires_grad_()
    assert torch.equal(topk_mask(leaf, 0.5), topk_mask(scores, 0.5))


def test_topk_bad_input() -> None:
    for sparsity in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\]"):
            topk_mask(torch.ones(3), sparsity)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        topk_mask(torch.ones(3).long(), 0.5)
    with pytest.raises(TypeError, match="floating-point tensor, got list"):
        topk_mask([1.0], 0.5)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- prune_and_grow


@given(st.data())
def test_prune_and_grow_against_python(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 50))
    mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    drop, grow = (data.draw(st.lists(SCORES, min_size=size, max_size=size)) for _ in range(2))
    fraction = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]) | st.floats(0, 1))
    tensors = [torch.tensor(mask, dtype=torch.bool), torch.tensor(drop), torch.tensor(grow)]
    new = prune_and_grow(*tensors, drop_fraction=fraction)
    assert new.tolist() == prune_and_grow_oracle(mask, drop, grow, fraction)
    assert int(new.sum()) == sum(mask)  # the count is preserved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_prune_and_grow_is_rigl(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """The smallest active weights go, the largest gradients of the others come, regrowth of a dropped one included."""
    numel = 6 * 5 * 9
    weights = (torch.randperm(numel, generator=seeded(0)) + 1).view(6, 5, 3, 3).to(device, dtype)
    gradients = (torch.randperm(numel, generator=seeded(1)) + 1).view(6, 5, 3, 3).to(device, dtype)
    mask = random_mask((6, 5, 3, 3), 0.4).to(device)
    new = prune_and_grow(mask, LAYOUTS[layout](weights), LAYOUTS[layout](gradients), drop_fraction=0.3)
    active = int(mask.sum())
    n_grow = math.floor(0.3 * active)
    smallest_staying = weights[mask].sort().values[n_grow]
    stay = mask & (weights >= smallest_staying)
    largest = gradients[~stay].sort(descending=True).values[n_grow - 1]
    assert torch.equal(new, stay | (~stay & (gradients >= largest)))
    assert (new & mask & ~stay).any()  # some were dropped and grown again


def test_prune_and_grow_bad_input() -> None:
    mask, scores = torch.ones(4, dtype=torch.bool), torch.ones(4)
    with pytest.raises(TypeError, match=r"mask must be bool, got torch\.float32"):
        prune_and_grow(scores, scores, scores, drop_fraction=0.3)
    with pytest.raises(TypeError, match=r"grow_scores must be a real floating-point tensor, got torch\.bool"):
        prune_and_grow(mask, scores, mask, drop_fraction=0.3)
    with pytest.raises(ValueError, match=r"drop_scores has shape \(2, 2\), wanted the mask's \(4,\)"):
        prune_and_grow(mask, scores.view(2, 2), scores, drop_fraction=0.3)
    with pytest.raises(ValueError, match="drop_fraction must lie in"):
        prune_and_grow(mask, scores, scores, drop_fraction=1.5)


# ---------------------------------------------------------------------------------------------------------- PackedMasks


def packed(
    shapes: list[Shape], device: torch.device, layout: str = "contiguous"
) -> tuple[PackedMasks, dict[str, Tensor]]:
    """Random masks of weights of these shapes: packed, and as bools."""
    weights = {f"w{i}": torch.zeros(shape, device=device) for i, shape in enumerate(shapes)}
    weights = {name: LAYOUTS[layout](w) if w.dim() == 4 else w for name, w in weights.items()}
    masks = {name: random_mask(tuple(w.shape), seed=i).to(device) for i, (name, w) in enumerate(weights.items())}
    return PackedMasks(weights).load_(masks), masks


def test_round_trip_at_every_size(device: torch.device) -> None:
    shapes: list[Shape] = [(size,) for size in SIZES] + [(), (0, 3), (3, 5, 2), (16, 3, 3, 3)]
    held, masks = packed(shapes, device)
    for name, mask in held.unpack().items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, masks[name])
    assert held.count().tolist() == [int(m.sum()) for m in masks.values()]
    assert held.count().device.type == device.type
    assert held.names == list(masks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_in_any_storage(layout: str, device: torch.device) -> None:
    held, masks = packed([(7, 5, 3, 3), (1, 5, 3, 3), (6, 1, 3, 3), (4, 9, 1, 1)], device, layout)
    for name, mask in held.unpack().items():
        assert torch.equal(mask, masks[name])
        weight = held.weights[name]
        if layout in ("channels_last", "transposed"):
            assert torch.equal(memory_flat(torch.empty_like(weight).copy_(mask)), memory_flat(weight * 0 + mask))
    assert held.count().tolist() == [int(m.sum()) for m in masks.values()]


def test_bits_are_little_endian_in_memory_order_and_padding_is_zero(device: torch.device) -> None:
    """The format that kernels and saved files share."""
    shapes: list[Shape] = [(13,), (2, 3, 2, 2), (1024,), (1025,), (0,)]
    held, masks = packed(shapes, device, "channels_last")
    layout, bits = held.layout, held.bits.cpu()
    assert bits.dtype == torch.uint8
    end = 0
    for name, offset, numel in zip(held.names, layout.offsets, layout.numels, strict=True):
        assert offset == end
        assert offset % 128 == 0
        end = offset + math.ceil(numel / 1024) * 128
        segment = bits[offset:end]
        expanded = ((segment[:, None] >> torch.arange(8)) & 1).flatten().bool()
        in_memory = memory_flat(torch.empty_like(held.weights[name], dtype=torch.bool).copy_(masks[name])).cpu()
        assert torch.equal(expanded[:numel], in_memory)
        assert not expanded[numel:].any()
    assert len(bits) == layout.nbytes == end


def test_padding_stays_zero_after_every_operation(device: torch.device) -> None:
    weights = {
        "a": torch.randn(13, generator=seeded(0)).to(device),
        "b": torch.randn(1027, generator=seeded(1)).to(device),
    }
    held = PackedMasks(weights)
    assert held.count().tolist() == [13, 1027]  # all ones at first, and only within the segments

    def padding(bits: Tensor) -> int:
        ones = sum(bin(byte).count("1") for byte in bits.cpu().tolist())
        return ones - int(held.layout.popcount(bits).sum())

    assert padding(held.bits) == 0
    counts = torch.tensor([5, 700], device=device)
    selected = held.layout.select(weights.values(), counts)
    assert held.layout.popcount(selected).tolist() == [5, 700]
    everything = held.layout.select(weights.values(), counts * 10)
    nothing = held.layout.select(weights.values(), -counts)
    rest = held.layout.select(weights.values(), counts, eligible=~selected)  # padding bits of ~selected are ones
    assert [padding(bits) for bits in (selected, everything, nothing, rest)] == [0, 0, 0, 0]
    assert held.layout.popcount(everything).tolist() == [13, 1027]
    assert held.layout.popcount(nothing).tolist() == [0, 0]
    assert held.layout.popcount(rest).tolist() == [5, 327]
    assert not (rest & selected).any()


def test_state_dict_across_memory_formats(device: torch.device) -> None:
    shapes: list[Shape] = [(7, 5, 3, 3), (12, 4), (6, 3, 3, 3)]
    held, masks = packed(shapes, device, "channels_last")
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for layout in ("contiguous", "channels_last", "transposed"):
        other, _ = packed(shapes, device, layout)
        other.load_state_dict(state)
        assert all(torch.equal(mask, masks[name]) for name, mask in other.unpack().items())


def test_state_dict_is_a_snapshot_and_names_may_come_in_any_order(device: torch.device) -> None:
    weights = {"a": torch.zeros(9, device=device), "b": torch.zeros(9, device=device)}
    held = PackedMasks(weights).load_({"b": random_mask((9,), seed=1), "a": random_mask((9,), seed=0)})
    state = held.state_dict()
    held.load_({name: torch.zeros(9, dtype=torch.bool) for name in weights})
    assert held.count().tolist() == [0, 0]
    other = PackedMasks({"b": weights["b"], "a": weights["a"]})
    other.load_state_dict(state)
    assert torch.equal(other.unpack()["a"].cpu(), random_mask((9,), seed=0))
    assert torch.equal(other.unpack()["b"].cpu(), random_mask((9,), seed=1))


def test_bad_states() -> None:
    held = PackedMasks({"a": torch.zeros(9), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"not the state of PackedMasks: \['orders', 'shapes'\] missing"):
        held.load_state_dict({"bits": held.bits, "names": ["a", "b"]})
    with pytest.raises(ValueError, match="belong to other weights: 1 differ"):
        held.load_state_dict(PackedMasks({"a": torch.zeros(9), "b": torch.zeros(4)}).state_dict())
    state = held.state_dict()
    with pytest.raises(ValueError, match="hold 3 bytes, wanted 256"):
        held.load_state_dict({**state, "bits": state["bits"][:3]})


def test_bad_masks() -> None:
    held = PackedMasks({"a": torch.zeros(9), "b": torch.zeros(3)})
    ones = {"a": torch.ones(9, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \['c'\]"):
        held.load_({"a": ones["a"], "c": ones["b"]})
    with pytest.raises(TypeError, match=r"mask of b must be bool, got torch\.float32"):
        held.load_({**ones, "b": torch.ones(3)})
    with pytest.raises(ValueError, match=r"mask of b has shape \(1, 3\), wanted \(3,\)"):
        held.load_({**ones, "b": ones["b"][None]})
    assert held.count().tolist() == [9, 3]
    with pytest.raises(ValueError, match="got no weights"):
        PackedMasks({})
    with pytest.raises(ValueError, match="on one device"):
        PackedMasks({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")})
    shared = torch.zeros(4)
    with pytest.raises(ValueError, match=r"the same tensor under several names: \['a', 'c'\]"):
        PackedMasks({"a": shared, "b": torch.zeros(4), "c": shared})


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_find_the_masks_of_the_copied_weights(how: object) -> None:
    model = nn.Linear(5, 3)
    held = PackedMasks({"weight": model.weight})
    held.load_({"weight": random_mask((3, 5))})
    new_model, new_held = how((model, held))  # type: ignore[operator]
    assert new_held.index_of(new_model.weight) == 0
    assert new_held.index_of(model.weight) is None
    assert torch.equal(new_held.unpack()["weight"], held.unpack()["weight"])
    new_held.load_({"weight": torch.ones(3, 5, dtype=torch.bool)})
    assert int(held.count()) == int(random_mask((3, 5)).sum())


def test_equality_is_of_content_and_decided_on_the_device(device: torch.device) -> None:
    shapes: list[Shape] = [(7, 5, 3, 3), (12, 4), (13,)]
    held, masks = packed(shapes, device)
    for layout in LAYOUTS:
        other, _ = packed(shapes, device, layout)
        same = held == other
        assert (same.dtype, same.shape, same.device.type) == (torch.bool, (), device.type)
        assert same
        assert (held != other) is False
        assert held.digest() == other.digest()
    last = {**masks, "w2": masks["w2"].clone().logical_xor_(torch.arange(13, device=device) == 12)}
    differing = [
        PackedMasks(held.weights).load_(last),
        PackedMasks({f"v{i}": w for i, w in enumerate(held.weights.values())}).load_(
            {f"v{i}": m for i, m in enumerate(masks.values())}
        ),
        PackedMasks({"w0": held.weights["w0"]}).load_({"w0": masks["w0"]}),
        PackedMasks({**held.weights, "w1": torch.zeros(4, 12, device=device)}).load_({**masks, "w1": masks["w1"].mT}),
    ]
    for other in differing:
        assert not bool(held == other)
        assert held.digest() != other.digest()
    assert held != "masks"
    with pytest.raises(TypeError, match="unhashable"):
        hash(held)


def test_digest_never_changes() -> None:
    """Saved digests stay valid: the format is part of the interface."""
    held = PackedMasks({"a": torch.zeros(9), "b.weight": torch.zeros(2, 2)})
    held.load_({"a": torch.arange(9) % 3 == 0, "b.weight": torch.eye(2).bool()})
    content = b'[["a", "b.weight"], [[9], [2, 2]]]' + bytes([0b01001001, 0]).ljust(128, b"\0")
    content += bytes([0b1001]).ljust(128, b"\0")
    assert held.digest() == hashlib.sha256(content).hexdigest()


def test_weights_that_change_their_memory_format_keep_their_masks(device: torch.device) -> None:
    """A channels_last model whose masks were made before gives the steps and updates of one whose masks came after."""
    results = []
    for early in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(5, 7, 3).to(device)
        model = model if early else model.to(memory_format=torch.channels_last)
        optimizer = rpg_fast.MaskedSGD(model.parameters(), 0.1, momentum=0.9)
        pruner = rpg_fast.RankPruner(model, optimizer, sparsity=0.8, total_steps=20, update_every=4)
        model.to(memory_format=torch.channels_last)
        for step in range(20):
            model.weight.grad = torch.randn(7, 5, 3, 3, generator=seeded(step)).to(device)
            if pruner.step():
                optimizer.step()
        assert not model.weight.detach()[~pruner.masks.unpack()["weight"]].any()
        results.append((pruner.masks, model.weight.detach()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_masks_follow_their_weights(device: torch.device) -> None:
    model = nn.Linear(5, 3)
    held = PackedMasks({"weight": model.weight}).load_({"weight": random_mask((3, 5))})
    assert held.to("cpu") is held
    model.to(device)
    assert held.to(device).bits.device == model.weight.device
    assert torch.equal(held.unpack()["weight"].cpu(), random_mask((3, 5)))
    with pytest.raises(ValueError, match=r"weight is on .*, wanted meta; move it first"):
        held.to("meta")
    assert held.bits.device == model.weight.device
    with pytest.raises(RuntimeError, match=r"broadcast_ needs torch\.distributed"):
        held.broadcast_()


# ------------------------------------------------------------------------------------------------------ mask_gradients_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.25, "tensor"])
@pytest.mark.parametrize(
    "layouts", [("contiguous", "contiguous"), ("channels_last", "contiguous"), ("contiguous", "channels_last")]
)
def test_mask_gradients(
    dtype: torch.dtype, scale: float | str | None, layouts: tuple[str, str], device: torch.device
) -> None:
    """Where the mask is zero the gradient becomes zero, NaN and inf too; elsewhere it is scaled, or untouched."""
    params = [nn.Parameter(LAYOUTS[layouts[0]](torch.zeros(7, 5, 3, 3, device=device, dtype=dtype))) for _ in range(3)]
    params.append(nn.Parameter(torch.zeros(4, device=device)))
    held = PackedMasks({"0": params[0], "1": params[1]})
    masks = {name: random_mask((7, 5, 3, 3), seed=int(name)).to(device) for name in held.names}
    held.load_(masks)
    grads = [torch.randn(p.shape, generator=seeded(i)).to(device, dtype) for i, p in enumerate(params)]
    grads[0][~masks["0"]] = torch.tensor([NAN, INF, -INF, 5.0], device=device, dtype=dtype)[
        torch.arange(int((~masks["0"]).sum()), device=device) % 4
    ]
    for p, g in zip(params[:3], grads, strict=False):
        p.grad = LAYOUTS[layouts[1]](g.clone())  # in a storage of its own, maybe not the parameter's
    live = torch.tensor(0.25, device=device) if scale == "tensor" else scale
    mask_gradients_(params, held, scale=live)  # type: ignore[arg-type]
    factor = 1 if scale is None else 0.25
    for i, p in enumerate(params[:3]):
        wanted = grads[i] * factor
        if i < 2:
            wanted = torch.where(masks[str(i)], wanted, torch.zeros_like(wanted))
        assert torch.equal(p.grad, wanted)
    assert params[3].grad is None


def test_mask_gradients_keeps_nan_that_is_not_masked(device: torch.device) -> None:
    p = nn.Parameter(torch.zeros(10, device=device))
    held = PackedMasks({"p": p}).load_({"p": torch.arange(10) % 2 == 0})
    p.grad = torch.full((10,), NAN, device=device)
    mask_gradients_([p], held)
    assert p.grad.isnan().tolist() == [True, False] * 5


def test_mask_gradients_without_anything_to_do(device: torch.device) -> None:
    p, q = nn.Parameter(torch.ones(3, device=device)), nn.Parameter(torch.ones(3, device=device))
    held = PackedMasks({"p": p})
    mask_gradients_([p, q], held, scale=0.5)
    mask_gradients_([], held)
    q.grad = torch.full((3,), 2.0, device=device)
    mask_gradients_([q], held)
    assert q.grad.tolist() == [2, 2, 2]
    p.grad = torch.ones(3, device=device).to_sparse()
    with pytest.raises(TypeError, match=r"gradients must be dense, got torch.sparse_coo .* shape \(3,\)"):
        mask_gradients_([p], held)


# -------------------------------------------------------------------------------------------------------- distributions


def shapes_strategy() -> st.SearchStrategy[list[Shape]]:
    return st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6)


def zeros_of(sparsity: dict[str, float], weights: dict[str, Tensor]) -> list[int]:
    counts = [sparsity[name] * w.numel() for name, w in weights.items()]
    assert all(count == pytest.approx(round(count), abs=1e-6) for count in counts)  # whole weights
    return [round(count) for count in counts]


@given(shapes_strategy(), st.floats(0, 1))
@example([(64, 3, 7, 7), (64, 64, 3, 3), (10, 64)], 0.98)
@example([(3, 3)], 1.0)
def test_erk(shapes: list[Shape], sparsity: float) -> None:
    """Exact in sum, and no weight more than one element away from the real-valued solution."""
    weights = {str(i): torch.zeros(shape) for i, shape in enumerate(shapes)}
    result = erk(weights, sparsity)
    assert list(result) == list(weights)
    assert all(0 <= s <= 1 for s in result.values())
    total = sum(w.numel() for w in weights.values())
    zeros = zeros_of(result, weights)
    assert sum(zeros) == round_half_up(sparsity, total)
    kept = total - round_half_up(sparsity, total)
    for shape, z, density in zip(shapes, zeros, erk_densities(shapes, kept / total), strict=True):
        assert abs((1 - density) * math.prod(shape) - z) < 1 + 1e-6


def test_erk_of_resnet50() -> None:
    shapes = resnet50_convolutions()
    weights = {str(i): torch.empty(shape, device="meta") for i, shape in enumerate(shapes)}
    result = erk(weights, 0.8)
    assert sum(zeros_of(result, weights)) == round_half_up(0.8, 23_454_912)
    assert [1 - s for s in result.values()] == pytest.approx(erk_densities(shapes, 0.2), abs=1e-3)
    assert result["1"] == 0  # 64 x 64 x 1 x 1 stays dense


def test_uniform() -> None:
    weights = {"a": torch.zeros(3), "b": torch.zeros(4, 4)}
    assert uniform(weights, 0.9) == {"a": 0.9, "b": 0.9}
    for distribution in (uniform, erk, global_magnitude):
        with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], got 1.5"):
            distribution(weights, 1.5)


@given(shapes_strategy(), st.floats(0, 1), st.integers(0, 3))
def test_global_magnitude(shapes: list[Shape], sparsity: float, seed: int) -> None:
    """One ranking of all magnitudes; few distinct ones, so that ties go to the earlier weight and the lower index."""
    weights = {
        str(i): torch.randint(-3, 4, shape, generator=seeded(seed + i)).float() / 2 for i, shape in enumerate(shapes)
    }
    result = global_magnitude(weights, sparsity)
    everything = torch.cat([w.flatten() for w in weights.values()]).abs().tolist()
    kept = set(ranking(everything)[: len(everything) - round_half_up(sparsity, len(everything))])
    start = 0
    for name, w in weights.items():
        wanted = 1 - sum(i in kept for i in range(start, start + w.numel())) / w.numel()
        assert result[name].dtype == torch.float64
        assert float(result[name]) == pytest.approx(wanted, abs=1e-12)
        start += w.numel()


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.float64, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_global_magnitude_compares_values_across_dtypes(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    small = torch.full((8,), 0.5, device=device, dtype=dtypes[0])
    large = torch.full((8,), 2.0, device=device, dtype=dtypes[1])
    result = global_magnitude({"small": small, "large": large}, 0.5)
    assert (float(result["small"]), float(result["large"])) == (1, 0)
    result = global_magnitude({"large": large, "small": small}, 0.5)
    assert (float(result["small"]), float(result["large"])) == (1, 0)


def test_global_magnitude_of_hostile_values(device: torch.device) -> None:
    weights = {"a": torch.tensor([NAN, 0.0, -0.0, -5.0]), "b": torch.tensor([-INF, 1e-45, 0.0, 0.0])}
    result = global_magnitude({name: w.to(device) for name, w in weights.items()}, 0.5)
    assert [float(s) for s in result.values()] == [0.5, 0.5]  # NaN, -5, -inf, 1e-45 stay


def test_distributions_read_channels_last_as_it_lies(device: torch.device) -> None:
    w = make_weight("kaiming", (8, 6, 3, 3)).to(device)
    plain = global_magnitude({"a": w, "b": w * 2}, 0.7)
    other = global_magnitude({"a": LAYOUTS["channels_last"](w), "b": LAYOUTS["sliced"](w * 2)}, 0.7)
    assert {n: float(s) for n, s in plain.items()} == {n: float(s) for n, s in other.items()}


def test_public_names() -> None:
    assert all(hasattr(rpg_fast, name) for name in rpg_fast.__all__)
