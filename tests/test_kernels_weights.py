"""Where weights lie as matrices, and the classes of them that one launch reads."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, SMALL_SHAPES, make_weight
from kernel_cases import DEVICE
from torch import Tensor

from rpg_fast import grouping
from rpg_fast.kernels import weights as where


def read(tensor: Tensor, layout: where.MatrixLayout) -> Tensor:
    """X [m, n] at the addresses of the kernels."""
    strides = (layout.pitch, 1) if layout.rows else (1, layout.pitch)
    return tensor.as_strided((layout.m, layout.n), strides)


def layout_of(tensor: Tensor) -> where.MatrixLayout | None:
    return where.matrix_layout(where.storage_of(tensor), where.storage_of(tensor))


CASES = [(shape, name) for shape in [*SMALL_SHAPES, (12, 8, 3, 3), (40, 2, 3, 3)] for name in LAYOUTS]
CASES = [(shape, name) for shape, name in CASES if len(shape) == 4 or name != "channels_last"]


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_layout_is_where_the_matrix_lies(shape: tuple[int, ...], layout: str) -> None:
    W = LAYOUTS[layout](make_weight("kaiming", shape))
    found = layout_of(W)
    X = grouping.short_side_first(W)
    if found is not None:
        assert torch.equal(read(W, found), X)
    else:
        assert layout in ("sliced", "strided") or X.data_ptr() != W.data_ptr()
        copied = where.copied_layout(where.storage_of(W))
        assert torch.equal(read(X.contiguous(), copied), X)


@pytest.mark.parametrize(
    ("make", "rows", "aligned"),
    [
        (lambda: torch.empty(64, 256), True, True),
        (lambda: torch.empty(256, 64), False, True),
        (lambda: torch.empty(256, 64).mT, False, True),
        (lambda: torch.empty(64, 3, 7, 7), True, False),  # rows of 147 elements
        (lambda: torch.empty(128, 66), False, False),  # columns of 66 elements
        (lambda: torch.empty(64, 128)[:, 4:100], True, True),
        (lambda: torch.empty(64, 128)[:, 1:97], True, False),  # an odd address
        (lambda: torch.empty(64, 130)[:, :128], True, False),  # an odd pitch
        (lambda: torch.empty(64, 132)[:, :130], True, False),  # an odd end
        (lambda: torch.empty(64, 132, dtype=torch.bfloat16), True, False),  # 8 elements make 16 bytes
        (lambda: torch.empty(64, 136, dtype=torch.float16), True, True),
        (lambda: torch.empty(1, 64), True, True),
        (lambda: torch.empty(64, 3)[:, :1], False, False),  # one column of three
    ],
)
def test_classes(make, rows: bool, aligned: bool) -> None:
    found = layout_of(make())
    assert found is not None
    assert (found.rows, found.aligned) == (rows, aligned)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(8, 30)[:, ::2],
        torch.empty(1, 30).expand(8, 30),
        torch.empty(30).as_strided((4, 8), (2, 1)),
        torch.empty(8, 30, dtype=torch.float64),
    ],
    ids=["every second column", "expanded", "overlapping", "float64"],
)
def test_no_layout(tensor: Tensor) -> None:
    assert layout_of(tensor) is None


def test_gradient_in_the_order_of_its_weight() -> None:
    W = torch.empty(16, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    same, other = torch.empty_like(W), torch.empty(W.shape)
    assert where.matrix_layout(where.storage_of(same), where.storage_of(W)) == layout_of(W)
    assert where.matrix_layout(where.storage_of(other), where.storage_of(W)) is None


def test_grid_table() -> None:
    like = torch.empty(0, device=DEVICE)
    grids = [(5, 2, 3), (0, 1, 1), (2, 3, 1)]
    want = [(b, i, j) for b, rows, columns in grids for i in range(rows) for j in range(columns)]
    table = where.grid_table(like, grids)
    assert table.dtype == torch.int32
    assert table.tolist() == [list(row) for row in want]


def test_too_long_a_side_is_named() -> None:
    storage = where.Storage((2, 2**31), (2**31, 1), torch.float32, True)
    with pytest.raises(ValueError, match=r"must be below 2\^31, got shape \(2, 2147483648\)"):
        where.matrix_layout(storage, storage)
