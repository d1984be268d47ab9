"""Which weights are pruned, and how weights of any storage are seen as matrices and as flat memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS, SMALL_SHAPES, Shape, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rpg_fast import grouping, prunable_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU()))
        self.one_d = nn.Conv1d(4, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.embedding = nn.Embedding(5, 4)
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, 10)
        self.tied = nn.Linear(6, 10)
        self.tied.weight = self.head.weight


NAMES = ["stem.weight", "blocks.0.weight", "blocks.2.0.weight", "fc.weight", "head.weight"]


def test_names_and_order() -> None:
    model = Model()
    weights = prunable_weights(model)
    assert list(weights) == NAMES  # biases, norms, embeddings are none of it; a shared weight appears once
    assert all(weights[name] is model.get_parameter(name) for name in NAMES)
    assert list(prunable_weights(nn.Linear(2, 3))) == ["weight"]
    assert prunable_weights(nn.ReLU()) == {}


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("^fc", [n for n in NAMES if n != "fc.weight"]),
        (r"blocks\.\d+\.weight$", [n for n in NAMES if n != "blocks.0.weight"]),
        (["stem", "head"], NAMES[1:4]),
        (nn.Linear, NAMES[:3]),
        ([nn.Linear, "stem"], NAMES[1:3]),
        (lambda name, module: getattr(module, "kernel_size", None) == (1, 1), [n for n in NAMES if "2.0" not in n]),
        ("tied", NAMES[:4]),  # of a shared weight any name will do
        ((), NAMES),
    ],
)
def test_exclude(exclude: object, left: list[str]) -> None:
    assert list(prunable_weights(Model(), exclude=exclude)) == left  # type: ignore[arg-type]


def test_include() -> None:
    assert list(prunable_weights(Model(), include=(nn.Conv1d, nn.ConvTranspose2d))) == ["one_d.weight", "up.weight"]


def test_misspelt_and_wrong_exclude() -> None:
    with pytest.raises(ValueError, match=r"exclude matched no prunable weight: \['haed'\]; there are \['stem.weight'"):
        prunable_weights(Model(), exclude=["fc", "haed"])
    with pytest.raises(ValueError, match="exclude matched no prunable weight"):
        prunable_weights(Model(), exclude=nn.LSTM)
    with pytest.raises(TypeError, match="regular expressions, module types or predicates, got 3"):
        prunable_weights(Model(), exclude=[3])  # type: ignore[list-item]


@st.composite
def stored_tensors(draw: st.DrawFn) -> Tensor:
    """Any permutation of the dimensions in memory, sizes of one and zero, slices with gaps."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    tensor = torch.randn([shape[d] for d in order], generator=seeded(0))
    tensor = tensor.permute(sorted(range(len(order)), key=order.__getitem__))
    if draw(st.booleans()):
        dim = draw(st.integers(0, len(shape) - 1))
        tensor = tensor.repeat_interleave(2, dim).narrow(dim, 0, 2 * shape[dim])[
            tuple(slice(None, None, 2) if d == dim else slice(None) for d in range(len(shape)))
        ]
    assert list(tensor.shape) == shape
    return tensor


@given(stored_tensors())
def test_matrix_view_is_a_view_and_has_an_inverse(weight: Tensor) -> None:
    X = grouping.matrix_view(weight)  # [out, rest]
    assert X.shape == (weight.shape[0], weight[0].numel())
    assert torch.equal(
        X.sort(1).values, weight.flatten(1).sort(1).values
    )  # a permutation of the columns, the same in all rows
    torch.testing.assert_close(X @ X.mT, weight.flatten(1) @ weight.flatten(1).mT)
    assert torch.equal(grouping.from_matrix(X, weight), weight)
    m = min(X.shape)
    assert grouping.short_side(weight) == m
    assert grouping.short_side_first(weight).shape == (m, X.numel() // m)


@given(stored_tensors())
def test_memory_order_makes_dense_tensors_contiguous(tensor: Tensor) -> None:
    order = grouping.memory_order(tensor)
    assert sorted(order) == list(range(tensor.dim()))
    view = grouping.as_it_lies(tensor, order)
    assert view.data_ptr() == tensor.data_ptr()
    strides = [s for s, size in zip(view.stride(), view.shape, strict=True) if size > 1]
    assert strides == sorted(strides, reverse=True)
    if tensor.is_contiguous():
        assert order == tuple(range(tensor.dim()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (8, 1, 3, 3), (1, 6, 3, 3), (8, 6, 1, 1), (1, 1, 1, 1)], ids=str)
def test_dense_storage_is_never_copied(shape: Shape, layout: str) -> None:
    weight = LAYOUTS[layout](torch.randn(shape))
    assert grouping.as_it_lies(weight, grouping.memory_order(weight)).is_contiguous()
    if layout != "transposed":
        assert grouping.matrix_view(weight).data_ptr() == weight.data_ptr()
        assert grouping.short_side_first(weight).data_ptr() == weight.data_ptr()


def test_groups_and_offsets() -> None:
    weights = [torch.empty(s) for s in [*SMALL_SHAPES, (0, 4), (4, 0, 3, 3)]]
    groups = grouping.groups_of_equal_m(weights)
    assert list(groups) == sorted(groups)
    assert sorted(itertools.chain(*groups.values())) == list(range(len(SMALL_SHAPES)))  # empty ones belong to none
    for m, members in groups.items():
        assert all(min(weights[i].shape[0], weights[i][0].numel()) == m for i in members)
    offsets = grouping.projector_offsets(weights)
    assert [b - a for a, b in itertools.pairwise(offsets)] == [grouping.short_side(w) ** 2 for w in weights]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_pass(dtype: torch.dtype) -> None:
    assert grouping.matrix_view(torch.zeros(2, 3, 1, 1, dtype=dtype)).dtype == dtype
