"""The published program with the lines of docs/published_training.diff: the same loss and gradient from rpg_fast."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

DIFF = Path(__file__).parents[1] / "docs" / "published_training.diff"

RANK_KIT = """
from published_rules import published_rank_loss

def get_loss_para(model, tail_energy, errors, min_sparsity, pretrained, args):
    convolutions = [m.weight for m in model.modules() if hasattr(m, "weight") and m.weight.dim() == 4]
    return published_rank_loss(convolutions, tail_energy, min_sparsity), None, None
"""
IMPORT = "from .rank_kit import *"
CALL = """\
def task(model_and_loss, args, loss):
    for _ in range(1):
        if args.lamb != 0.0:
            rank_loss, _, _ = get_loss_para(model_and_loss.model, args.partial_k, None, args.sparsity_thres, None, args)
            loss += args.lamb * rank_loss
    return loss
"""


def test_the_diff_makes_the_published_program_call_rpg_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("before", "after"):
        package = tmp_path / name / "image_classification"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "rank_kit.py").write_text(RANK_KIT)
        (package / "training.py").write_text("\n" * 56 + IMPORT + "\n" * 268 + CALL)  # lines 57 and 328, as published
    git = shutil.which("git")
    assert git is not None, "git is needed to apply the diff"
    subprocess.run([git, "apply", "--unidiff-zero", str(DIFF)], cwd=tmp_path / "after", check=True)
    results = []
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, stride=2), nn.Flatten(), nn.Linear(48, 5)).double()
    with torch.no_grad():
        net[1].weight *= torch.rand_like(net[1].weight) > 0.6  # the only one that is sparse enough
    for name in ("before", "after"):
        monkeypatch.setattr(sys, "path", [str(tmp_path / name), *sys.path])
        for module in [m for m in sys.modules if m.startswith("image_classification")]:
            monkeypatch.delitem(sys.modules, module)
        training = importlib.import_module("image_classification.training")
        assert hasattr(training, "rpg_fast") == (name == "after")
        for min_sparsity in (0.0, 0.5):
            net.zero_grad()
            args = SimpleNamespace(lamb=0.5, partial_k=0.2, sparsity_thres=min_sparsity)
            loss = training.task(SimpleNamespace(model=net), args, net(torch.ones(2, 3, 7, 7).double()).square().mean())
            loss.backward()
            results.append([loss.detach(), *(w.grad.clone() for w in net.parameters())])
    half = len(results) // 2
    assert not torch.equal(results[0][0], results[1][0])
    for published, ours in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-10, atol=1e-13)
