"""The command `rpg-fast`: its table says what the dispatcher does, and says so without kernels or extras too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rpg_fast
from rpg_fast import _extension, _info, _ops
from rpg_fast.__main__ import main


@pytest.fixture
def scratch_op() -> Iterator[torch.library.Library]:
    """A library in which the op `scratch` is defined, for as long as the test runs."""
    library = torch.library.Library(_ops.NAMESPACE, "FRAGMENT")
    library.define("scratch(Tensor x) -> Tensor")
    yield library
    library._destroy()


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def test_backend_of_each_kind_of_registration(scratch_op: torch.library.Library) -> None:
    assert [_info.backend("scratch", device) for device in _info.DEVICES] == ["none", "none"]
    scratch_op.impl("scratch", identity, "CompositeExplicitAutograd")
    assert [_info.backend("scratch", device) for device in _info.DEVICES] == ["reference", "reference"]
    scratch_op.impl("scratch", identity, "CUDA")
    assert [_info.backend("scratch", device) for device in _info.DEVICES] == ["reference", "Triton"]


def test_table_has_every_op_and_agrees_with_the_dispatcher() -> None:
    table = _info.backend_table()
    assert set(_ops.SCHEMAS) <= set(table)
    for op, row in table.items():
        for device, key in _info.DEVICES.items():
            own_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"rpg_fast::{op}", key)
            expected = {"C++", "CUDA", "Triton", "torch"} if own_kernel else {"reference"}
            assert row[device] in expected, (op, device)


def test_info_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ops"] == _info.backend_table()
    assert report["versions"]["torch"] == torch.__version__
    assert report["extension"]["loaded"] == _extension.load().loaded
    lines = [line.split() for line in text.splitlines()]
    for op, row in report["ops"].items():
        assert [op, *row.values()] in lines
    assert ["torch", torch.__version__] in lines
    assert (["kernels", "loaded"] in lines) == report["extension"]["loaded"]


@pytest.mark.parametrize(("status", "told"), [(0, "13.0"), (3, None)])
def test_version_of_the_driver(monkeypatch: pytest.MonkeyPatch, status: int, told: str | None) -> None:
    def get_version(number: Any) -> int:
        number._obj.value = 13000
        return status

    driver = types.SimpleNamespace(cuDriverGetVersion=get_version)
    monkeypatch.setattr(_info.ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    assert _info.collect()["versions"]["CUDA of the driver"] == told


def test_without_a_driver_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(_info.ctypes, "CDLL", fail)
    assert _info.collect()["versions"]["CUDA of the driver"] is None


def test_version_and_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"rpg_fast {rpg_fast.__version__}\n"
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["trian"])
    assert "invalid choice: 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
def test_training_commands_get_the_whole_command_line(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    cli = types.ModuleType("rpg_fast.train.cli")
    seen = []
    cli.main = lambda argv: seen.append(argv) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rpg_fast.train.cli", cli)
    assert main([command, "--help", "x"]) == 3
    assert seen == [[command, "--help", "x"]]


def test_a_missing_extra_is_one_line_and_other_errors_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = types.ModuleType("rpg_fast.train.cli")
    monkeypatch.setitem(sys.modules, "rpg_fast.train.cli", cli)

    def fail_to_import(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    cli.main = lambda argv: fail_to_import("matplotlib.pyplot")  # type: ignore[attr-defined]
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "rpg-fast train needs matplotlib: pip install -e '.[train]'\n"
    cli.main = lambda argv: fail_to_import("rpg_fast.train.loops")  # type: ignore[attr-defined]
    with pytest.raises(ModuleNotFoundError, match="loops"):
        main(["train"])


@pytest.mark.parametrize("damage", ["none built", "not loadable"])
def test_without_the_library_plain_torch_runs_and_info_says_why(tmp_path: Path, damage: str) -> None:
    package = tmp_path / "rpg_fast"
    shutil.copytree(Path(rpg_fast.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    if damage == "not loadable":
        (package / f"_C{_extension.EXT_SUFFIX}").write_bytes(b"no library")
    code = """
import json, sys
sys.modules["triton"] = None  # nothing here needs it
# An editable install would find the library where it was built.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import torch, rpg_fast
from rpg_fast.__main__ import main
main(["info", "--json"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["extension"]["loaded"]
    reason = "the library does not load: " if damage == "not loadable" else "not built: `pip install -e .`"
    assert report["extension"]["reason"].startswith(reason)
    assert {row["cpu"] for row in report["ops"].values()} == {"reference", "torch"}
