"""The build: where it looks for torch and compilers, what it makes of what it finds, and what the library carries."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from rpg_fast import _extension, _info

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = _extension.load()
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")
needs_cuda_kernels = pytest.mark.skipif(not EXTENSION.facts.get("cuda"), reason="the library has no CUDA part")


class Project:
    """A project with this build, an environment of its own and sources of a few lines; its path has a space in it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "a project"
        self.home = directory / "home"
        shutil.copytree(ROOT / "_build", self.root / "_build", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.py", self.root)
        self.write(
            "pyproject.toml",
            '[project]\nname = "rpg_fast"\nversion = "0"\n[tool.setuptools]\npackages = ["rpg_fast"]\n',
        )
        self.write("rpg_fast/__init__.py", "")
        self.write("csrc/answer.h", "#define ANSWER 42\n")
        self.write("csrc/module.cpp", '#include "answer.h"\nextern "C" __attribute__((visibility("default")))\n')
        self.write("csrc/module.cpp", self.read("csrc/module.cpp") + "int answer() { return ANSWER; }\n")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.root / "env"], check=True)
        # Of this environment's packages only setuptools is visible, as in an isolated build.
        (directory / "visible").mkdir()
        for package in ("setuptools", "_distutils_hack"):
            (directory / "visible" / package).symlink_to(Path(setuptools.__file__).parent.with_name(package))
        self.env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "PYTHONPATH": str(directory / "visible")}

    def write(self, name: str, text: str, *, executable: bool = False) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if executable else 0o644)
        return path

    def read(self, name: str) -> str:
        return (self.root / name).read_text()

    def add_torch(self, version: str, site_packages: str) -> Path:
        self.write(f"{site_packages}/torch/version.py", f"__version__ = '{version}'\n")
        self.write(f"{site_packages}/torch/include/torch/csrc/stable/library.h", "")
        return self.root / site_packages

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.root / "env/bin/python"), *arguments]
        return subprocess.run(command, cwd=self.root, env=self.env | env, capture_output=True, text=True, timeout=120)

    def evaluate(self, code: str, **env: str) -> Any:
        """Runs code in the project's environment, as if that had no base interpreter; `result` comes back."""
        prologue = "import json, sys; sys.base_prefix = sys.prefix\n"
        done = self.run("-c", f"{prologue}{textwrap.dedent(code)}\nprint('\\n' + json.dumps(result))", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def build(self, **env: str) -> dict[str, Any]:
        """Builds and installs into the package with this machine's own torch and ninja."""
        code = """
            from pathlib import Path
            from _build import native
            outcome = native.build()
            native.install(outcome, Path("rpg_fast"))
            result = {"failed": outcome.failed, "library": native.LIBRARY_NAME, **outcome.record}
        """
        site_packages = str(Path(torch.__file__).parent.parent)
        path = os.pathsep.join([env.pop("PATH", self.env["PATH"]), str(self.ninja_directory())])
        result: dict[str, Any] = self.evaluate(code, RPG_FAST_TORCH=site_packages, **env, PATH=path)
        result["installed"] = (self.root / "rpg_fast" / result["library"]).is_file()
        return result

    def ninja_directory(self) -> Path:
        directory = self.root / "ninja"
        if not directory.exists():
            directory.mkdir()
            beside_python = Path(sys.executable).parent / "ninja"
            found = beside_python if beside_python.is_file() else shutil.which("ninja")
            assert found, "these tests need ninja"
            (directory / "ninja").symlink_to(found)
        return directory


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


# ------------------------------------------------------------------------------------------------------- finding torch

SITE_PACKAGES = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
REQUIRES = "from _build import backend; result = backend.get_requires_for_build_editable()"


@pytest.mark.parametrize(
    ("version", "place", "requires"),
    [
        (None, "", ["torch>=2.11"]),
        ("2.10.1", f"env/{SITE_PACKAGES}", ["torch>=2.11"]),
        ("2.11.0", f"env/{SITE_PACKAGES}", []),
        ("2.11.0", f".venv/{SITE_PACKAGES}", []),
        ("3.0.0a0+gitabc", f"env/{SITE_PACKAGES}", []),
    ],
)
def test_backend_asks_for_torch_only_where_there_is_none(
    project: Project, version: str | None, place: str, requires: list[str]
) -> None:
    if version:
        project.add_torch(version, place)
    assert project.evaluate(REQUIRES) == requires


def test_named_torch_is_taken_and_a_wrong_name_is_an_error(project: Project) -> None:
    named = project.add_torch("2.12.0", "elsewhere")
    project.add_torch("2.13.0", f"env/{SITE_PACKAGES}")
    code = "from _build.toolchain import find_torch; result = find_torch().version"
    assert project.evaluate(code) == "2.13.0"
    assert project.evaluate(code, RPG_FAST_TORCH=str(named)) == "2.12.0"
    done = project.run("-c", "from _build.toolchain import find_torch; find_torch()", RPG_FAST_TORCH="/nowhere")
    assert "RPG_FAST_TORCH=/nowhere holds no torch >= 2.11" in done.stderr


# ---------------------------------------------------------------------------------------------------- finding the CUDA

FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.1" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
  *) echo "kernels.cu(1): error: no such thing" >&2; exit 1 ;;
esac
"""


def add_cuda(project: Project) -> Path:
    project.write("cuda/include/cuda_runtime.h", "")
    project.write("cuda/lib64/libcudart_static.a", "")
    return project.write("cuda/bin/nvcc", FAKE_NVCC, executable=True).parent.parent


@pytest.mark.parametrize(
    ("asked", "targets"),
    [("", ["sm_80", "sm_90", "compute_90"]), ("9.0", ["sm_90"]), ("8.0;9.0a+PTX", ["sm_80", "sm_90a", "compute_90a"])],
)
def test_cuda_targets(project: Project, asked: str, targets: list[str]) -> None:
    home = add_cuda(project)
    code = (
        "from _build.toolchain import find_nvcc; nvcc = find_nvcc(); result = [nvcc.version, nvcc.path, nvcc.targets]"
    )
    found = project.evaluate(code, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=asked)
    assert found == ["12.4", str(home / "bin/nvcc"), targets]


@pytest.mark.parametrize(
    ("env", "message"), [({"TORCH_CUDA_ARCH_LIST": "7.0"}, "'7.0', which"), ({"RPG_FAST_CUDA": "0"}, "RPG_FAST_CUDA=0")]
)
def test_cuda_refused(project: Project, env: dict[str, str], message: str) -> None:
    done = project.run("-c", "from _build.toolchain import *; find_nvcc()", CUDA_HOME=str(add_cuda(project)), **env)
    assert "ToolMissingError" in done.stderr
    assert message in done.stderr


# ------------------------------------------------------------------------------------------------------------ building


@needs_extension  # where the kernels were built, there is a compiler
class TestBuilding:
    def answer(self, project: Project, library: str) -> int:
        code = f"import ctypes; result = ctypes.CDLL('./rpg_fast/{library}').answer()"
        # The library is linked against libtorch_cpu, which must have been loaded.
        done = subprocess.run(
            [sys.executable, "-c", f"import torch; {code}; print(result)"],
            cwd=project.root,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def test_a_changed_header_is_noticed_and_nothing_else_rebuilds(self, project: Project) -> None:
        first = project.build()
        assert first["outcome"].startswith(f"built the C++ kernels against torch {torch.__version__}")
        assert not first["failed"]
        library = project.root / "build" / f"native{_extension.EXT_SUFFIX.removesuffix('.so')}" / first["library"]
        built = library.stat().st_mtime_ns
        project.build()
        assert library.stat().st_mtime_ns == built
        project.write("csrc/answer.h", "#define ANSWER 43\n")
        again = project.build()
        assert library.stat().st_mtime_ns > built
        assert self.answer(project, again["library"]) == 43

    def test_no_compiler_leaves_plain_torch(self, project: Project) -> None:
        project.build()
        without = project.build(PATH="/nonexistent")
        assert without["outcome"].startswith("built no kernels, plain torch runs: no working C++ compiler")
        assert without["failed"]
        assert not without["installed"], "the library of an earlier build must not outlive its record"

    def test_a_failing_compiler_leaves_plain_torch_and_its_message(self, project: Project) -> None:
        project.write("csrc/cpu/broken.cpp", "int broken = ;\n")
        outcome = project.build()
        assert outcome["failed"]
        assert not outcome["installed"]
        assert re.match(r"built no kernels, plain torch runs: csrc/cpu/broken.cpp:1:\d+: error", outcome["outcome"])
        assert "int broken = ;" in outcome["log"]

    def test_a_failing_nvcc_leaves_the_cpp_kernels(self, project: Project) -> None:
        project.write("csrc/cuda/kernels.cu", "")
        outcome = project.build(CUDA_HOME=str(add_cuda(project)))
        assert outcome["failed"]
        assert outcome["installed"]
        assert "no CUDA kernels: they did not compile: kernels.cu(1): error: no such thing" in outcome["outcome"]
        assert outcome["facts"]["cuda"] is None
        assert outcome["facts"]["sources"] == ["csrc/module.cpp"]

    def test_no_nvcc_builds_the_rest(self, project: Project) -> None:
        project.write("csrc/cuda/kernels.cu", "")
        outcome = project.build(RPG_FAST_CUDA="0")
        assert not outcome["failed"], "a machine without nvcc is nothing wrong"
        assert outcome["installed"]
        assert outcome["outcome"].endswith("no CUDA kernels: RPG_FAST_CUDA=0")

    def test_a_required_extension_makes_a_failure_fatal(self, project: Project) -> None:
        project.write("csrc/cpu/broken.cpp", "int broken = ;\n")
        torch_site = {"RPG_FAST_TORCH": str(Path(torch.__file__).parent.parent)}
        path = {"PATH": f"{project.env['PATH']}{os.pathsep}{project.ninja_directory()}"}
        command = ("setup.py", "-q", "build_ext", "--inplace")
        tolerant = project.run(*command, **torch_site, **path)
        required = project.run(*command, **torch_site, **path, RPG_FAST_REQUIRE_EXT="1")
        assert tolerant.returncode == 0
        assert "rpg_fast: built no kernels, plain torch runs: csrc/cpu/broken.cpp" in tolerant.stderr
        assert required.returncode != 0
        assert "(RPG_FAST_REQUIRE_EXT=1)" in required.stderr


# -------------------------------------------------------------------------------------------- the library of this build


def registered_in(pattern: str) -> set[str]:
    """The ops that the sources register, by their text."""
    sources = [path.read_text() for path in ROOT.glob(pattern)]
    return {name for source in sources for name in re.findall(r'\bm\.impl\(\s*"(\w+)"', source)}


@pytest.mark.skipif(os.environ.get("RPG_FAST_REQUIRE_EXT") != "1", reason="asked for by RPG_FAST_REQUIRE_EXT=1")
def test_required_extension_is_loaded() -> None:
    assert EXTENSION.loaded, EXTENSION.reason


@needs_extension
def test_every_cpp_kernel_is_what_the_dispatcher_takes() -> None:
    ops = registered_in("csrc/cpu/*.cpp")
    assert ops
    assert {op: _info.backend(op, "cpu") for op in ops} == dict.fromkeys(ops, "C++")


@needs_cuda_kernels
def test_every_cuda_kernel_is_what_the_dispatcher_takes() -> None:
    ops = registered_in("csrc/cuda/*.cu")
    assert ops
    assert {op: _info.backend(op, "cuda") for op in ops} == dict.fromkeys(ops, "CUDA")


@needs_extension
def test_record_and_library_are_of_the_same_build() -> None:
    assert EXTENSION.record["facts"] == EXTENSION.facts
    with_cuda = {".cu"} if EXTENSION.facts["cuda"] else set()
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.suffix in {".cpp", *with_cuda}}
    assert set(EXTENSION.facts["sources"]) == sources


@needs_cuda_kernels
def test_no_cuda_kernel_spills() -> None:
    kernels = EXTENSION.record["kernels"]
    targets = {target for target in EXTENSION.facts["cuda_targets"] if target.startswith("sm_")}
    sources = {source for source in EXTENSION.facts["sources"] if source.endswith(".cu")}
    assert {(k["source"], k["target"]) for k in kernels} == {(s, t) for s in sources for t in targets}
    spilling = [k for k in kernels if k["spill_stores"] or k["spill_loads"]]
    assert not spilling


@needs_extension
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_library_needs_no_cuda_and_shows_only_its_entry() -> None:
    library = next((ROOT / "rpg_fast").glob("_C*.so"))
    headers = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED\s+(\S+)", headers))
    assert not {name for name in needed if "cuda" in name or "c10" in name}, "it must load beside a CPU torch"
    symbols = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True).stdout
    shown = {line.split()[-1] for line in symbols.splitlines() if " g " in line and "*UND*" not in line}
    assert "PyInit__C" in shown
    assert not {name for name in shown if "cuda" in name.lower()}, "these could meet the runtime that torch brings"
