"""The scripts in examples/: they run, differ in few lines, and the swapped-in loss gives the gradients of the SVD
loop."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import relative_error
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytest.importorskip("sklearn", reason="scikit-learn, of the extra [train], has the digits")

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 6


class EnoughError(Exception):
    """Ends a training after the steps that a test looks at."""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients_of(name: str, steps: int = STEPS) -> list[list[Tensor]]:
    """The gradients at each of the first optimizer steps of a script."""
    seen: list[list[Tensor]] = []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        if len(seen) == steps:
            raise EnoughError

    handle = register_optimizer_step_pre_hook(look)
    try:
        with pytest.raises(EnoughError):
            load(name).train(epochs=1)
    finally:
        handle.remove()
    return seen


def changed_lines(old: str, new: str) -> tuple[list[str], list[str]]:
    """(removed, added) without docstrings and blank lines."""
    before, after = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in (old, new))
    lines = [line for line in difflib.ndiff(before, after) if line[2:].strip() and not line[2:].startswith('"""')]
    return [line[2:] for line in lines if line[0] == "-"], [line[2:] for line in lines if line[0] == "+"]


def test_the_swapped_in_loss_gives_the_same_gradients() -> None:
    for step, (ours, theirs) in enumerate(
        zip(gradients_of("train_rpg_fast"), gradients_of("train_plain"), strict=True)
    ):
        errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True) if b.norm() > 1e-6]
        assert len(errors) >= 10
        assert max(errors) < 1e-5, f"step {step}"


def test_the_loss_takes_part_in_those_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    [[with_loss, *_]] = gradients_of("train_plain", steps=1)
    monkeypatch.setattr("rpg_fast.rank_loss", lambda model, tail_energy: 0.0)
    [[without, *_]] = gradients_of("train_rpg_fast", steps=1)
    assert relative_error(with_loss, without) > 1e-3


def test_the_swap_is_one_import_and_a_deleted_function() -> None:
    removed, added = changed_lines("train_plain", "train_rpg_fast")
    assert added == ["from torch import nn", "from rpg_fast import rank_loss"]
    assert len(removed) == 11
    assert removed[1].startswith("def rank_loss")


def test_pruning_is_three_more_lines() -> None:
    removed, added = changed_lines("train_rpg_fast", "train_pruned")
    assert len(removed) == 3  # the import, the loss, the step that moved under the if
    assert len(added) == 6
    assert sum("pruner" in line for line in added) == 3


def test_the_pruned_script_reaches_its_sparsity(capsys: pytest.CaptureFixture[str]) -> None:
    model = load("train_pruned").train(epochs=2)
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert zeros >= int(0.98 * total)
    assert "sparsity 0.9800" in capsys.readouterr().out
