"""Compiles csrc/ into one library with ninja, as far as the machine allows, and says what came of it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _build.toolchain import ROOT, Nvcc, Tool, ToolMissing, Torch, find_cxx, find_ninja, find_nvcc, find_torch

EXT_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
LIBRARY_NAME = f"_C{EXT_SUFFIX}"
RECORD_NAME = f"_C{EXT_SUFFIX}".removesuffix(".so") + ".json"
BUILD_DIR = Path("build") / f"native{EXT_SUFFIX.removesuffix('.so')}"

DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI as of torch 2.11
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *DEFINES]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "--threads=4"]
NVCC_FLAGS += ["--expt-relaxed-constexpr", "--extended-lambda", *DEFINES]


class BuildFailed(Exception):
    """A compiler or the linker failed; `output` is all that ninja printed."""

    def __init__(self, output: str) -> None:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
        super().__init__((errors or lines[-1:] or ["ninja failed and printed nothing"])[0])
        self.output = output


@dataclass(frozen=True)
class Toolchain:
    """Everything that one build uses; `nvcc` is None for the CPU part alone."""

    torch: Torch
    ninja: str
    cxx: Tool
    nvcc: Nvcc | None

    @property
    def sources(self) -> list[str]:
        return source_files(with_cuda=self.nvcc is not None)

    def facts(self) -> dict[str, Any]:
        """What the library carries as `_C.build_facts`."""
        return {
            "python": sys.version.split()[0],
            "torch": self.torch.version,
            "cxx": self.cxx.version,
            "cxx_flags": " ".join(CXX_FLAGS),
            "cuda": self.nvcc.version if self.nvcc else None,
            "cuda_targets": list(self.nvcc.targets) if self.nvcc else [],
            "cuda_flags": " ".join(NVCC_FLAGS) if self.nvcc else None,
            "sources": self.sources,
        }


@dataclass(frozen=True)
class Outcome:
    """What a build came to: the library, if there is one, and the record that goes beside it."""

    library: Path | None
    record: dict[str, Any]
    failed: bool

    @property
    def line(self) -> str:
        return str(self.record["outcome"])


def source_files(*, with_cuda: bool) -> list[str]:
    """Sources relative to the project's root; the file names end up in the dispatcher's table."""
    patterns = ["csrc/module.cpp", "csrc/cpu/*.cpp"] + (["csrc/cuda/*.cu"] if with_cuda else [])
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def _ninja_path(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _shell(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def ninja_file(tools: Toolchain) -> str:
    """build.ninja: one object per source, compilers' own depfiles for the headers, one shared library."""
    torch_include = str(tools.torch.directory / "include")
    includes = ["-I" + str(BUILD_DIR), "-Icsrc", "-isystem", torch_include]
    python_include = ["-isystem", sysconfig.get_path("include")]
    cxx_flags = [*CXX_FLAGS, *includes, *python_include, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    cxx = _shell([tools.cxx.path, *cxx_flags])
    # --exclude-libs keeps the static CUDA runtime's symbols from meeting those of the runtime that torch brings.
    link_flags = ["-shared", "-L" + str(tools.torch.directory / "lib"), "-ltorch_cpu"]
    link = [tools.cxx.path]
    rules = []
    if tools.nvcc:
        host = ["-ccbin", tools.cxx.path]
        codes = [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in tools.nvcc.targets]
        nvcc = _shell([tools.nvcc.path, *host, *NVCC_FLAGS, *codes, *includes])
        rules += [
            "rule cuda",
            f"  command = {nvcc} -MD -MF $out.d -c $in -o $out 2> $out.log || {{ cat $out.log >&2; exit 1; }}",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        link = [tools.nvcc.path, *host]
        link_flags += ["-cudart=static", "-Xlinker=--exclude-libs=ALL"]
    rules += ["rule cxx", f"  command = {cxx} -MD -MF $out.d -c $in -o $out", "  depfile = $out.d", "  deps = gcc"]
    link_flags += shlex.split(os.environ.get("LDFLAGS", ""))
    rules += ["rule link", f"  command = {_shell(link)} $in {_shell(link_flags)} -o $out"]

    edges = []
    objects = []
    for source in tools.sources:
        rule = "cuda" if source.endswith(".cu") else "cxx"
        objects.append(_ninja_path(BUILD_DIR / f"{source}.o"))
        edges.append(f"build {objects[-1]}: {rule} {_ninja_path(source)}")
    edges.append(f"build {_ninja_path(BUILD_DIR / LIBRARY_NAME)}: link {' '.join(objects)}")
    return "\n".join([f"builddir = {_ninja_path(BUILD_DIR)}", *rules, *edges, ""])


def _write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _compile(tools: Toolchain, jobs: int | None) -> None:
    directory = ROOT / BUILD_DIR
    facts = json.dumps(tools.facts(), indent=1)
    _write_if_changed(directory / "build_facts.h", f'constexpr char kBuildFacts[] = R"json({facts})json";\n')
    _write_if_changed(directory / "build.ninja", ninja_file(tools))
    command = [tools.ninja, "-f", str(BUILD_DIR / "build.ninja"), "-k", "0"]
    jobs = jobs or int(os.environ.get("MAX_JOBS") or 0)
    done = subprocess.run(
        command + (["-j", str(jobs)] if jobs else []),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise BuildFailed(done.stdout)


def _kernel_resources(tools: Toolchain) -> list[dict[str, Any]]:
    """What ptxas reported: per kernel and target its registers, stack and spills in bytes."""
    if tools.nvcc is None:
        return []
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    resources = []
    for source in tools.sources:
        log = ROOT / BUILD_DIR / f"{source}.o.log"
        for match in entry.finditer(log.read_text()) if log.is_file() else ():
            row = {key: int(value) if value.isdigit() else value for key, value in match.groupdict().items()}
            resources.append({"source": source, **row})
    return resources


def _describe(tools: Toolchain, without_cuda: str | None) -> str:
    against = f"against torch {tools.torch.version} with {tools.cxx.version}"
    if tools.nvcc:
        targets = ", ".join(tools.nvcc.targets)
        return f"built the C++ and CUDA kernels ({targets}) {against} and nvcc {tools.nvcc.version}"
    return f"built the C++ kernels {against}; no CUDA kernels: {without_cuda}"


def _find_torch_or_raise() -> Torch:
    torch = find_torch()
    if torch is None:
        raise ToolMissing("no torch >= 2.11 to take the headers from (RPG_FAST_TORCH may name its site-packages)")
    return torch


def build(jobs: int | None = None) -> Outcome:
    """Builds all that can be built: C++ and CUDA, else C++ alone, else nothing. Never raises for a missing or failing
    compiler: the outcome says so, and `failed` is true if something was tried and went wrong or nothing was built."""
    directory = ROOT / BUILD_DIR
    directory.mkdir(parents=True, exist_ok=True)
    log = ""
    failed = False
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two installs of one tree at the same time wait for each other
        try:
            tools, without_cuda = _toolchain()
            try:
                _compile(tools, jobs)
            except BuildFailed as error:
                if tools.nvcc is None:
                    raise
                failed, log, without_cuda = True, error.output, f"they did not compile: {error}"
                tools = Toolchain(tools.torch, tools.ninja, tools.cxx, None)
                _compile(tools, jobs)
        except (ToolMissing, BuildFailed) as error:
            log = error.output if isinstance(error, BuildFailed) else log
            record = {"outcome": f"built no kernels, plain torch runs: {error}", "facts": None, "log": log}
            return Outcome(None, record, failed=True)
        record = {
            "outcome": _describe(tools, without_cuda),
            "facts": tools.facts(),
            "kernels": _kernel_resources(tools),
            "log": log,
        }
        return Outcome(directory / LIBRARY_NAME, record, failed)


def _toolchain() -> tuple[Toolchain, str | None]:
    if not sys.platform.startswith("linux"):
        raise ToolMissing(f"the kernels are built on Linux only, this is {sys.platform}")
    torch, ninja, cxx = _find_torch_or_raise(), find_ninja(), find_cxx()
    if not any(source.endswith(".cu") for source in source_files(with_cuda=True)):
        return Toolchain(torch, ninja, cxx, None), "there are none in csrc/cuda"
    try:
        return Toolchain(torch, ninja, cxx, find_nvcc()), None
    except ToolMissing as error:
        return Toolchain(torch, ninja, cxx, None), str(error)


def install(outcome: Outcome, package_dir: Path) -> None:
    """Puts library and record into the package, atomically, or removes a library that is no longer true."""
    package_dir.mkdir(parents=True, exist_ok=True)
    library = package_dir / LIBRARY_NAME
    if outcome.library is None:
        library.unlink(missing_ok=True)
    else:
        partial = library.with_suffix(".partial")
        shutil.copy2(outcome.library, partial)
        partial.replace(library)
    (package_dir / RECORD_NAME).write_text(json.dumps(outcome.record, indent=1) + "\n")
