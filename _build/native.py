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

from _build.toolchain import ROOT, Cxx, Nvcc, ToolMissingError, Torch, find_cxx, find_ninja, find_nvcc, find_torch

EXT_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")
LIBRARY_NAME = f"_C{EXT_SUFFIX}"
RECORD_NAME = f"_C{EXT_SUFFIX}".removesuffix(".so") + ".json"
BUILD_DIR = Path("build") / f"native{EXT_SUFFIX.removesuffix('.so')}"

MODULE = "csrc/module.cpp"
# The stable ABI as of torch 2.11. module.cpp goes without: the pybind11 in some torches' headers refuses it.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # as torch itself: square roots and selects vectorise
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "--threads=4"]
NVCC_FLAGS += ["--expt-relaxed-constexpr", "--extended-lambda"]


class BuildError(Exception):
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
    cxx: Cxx
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
            "cxx_flags": " ".join([*CXX_FLAGS, STABLE_ABI]),
            "cuda": self.nvcc.version if self.nvcc else None,
            "cuda_targets": list(self.nvcc.targets) if self.nvcc else [],
            "cuda_flags": " ".join([*NVCC_FLAGS, STABLE_ABI]) if self.nvcc else None,
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
    patterns = [MODULE, "csrc/cpu/*.cpp"] + (["csrc/cuda/*.cu"] if with_cuda else [])
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def _ninja_path(path: str | Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _shell(arguments: list[str]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _rule(name: str, command: list[str], *, log: bool = False) -> list[str]:
    """A ninja rule that compiles one source; the compiler's own depfile tells ninja the headers."""
    line = f"  command = {_shell(command)} -MD -MF $out.d -c $in -o $out"
    if log:
        line += " 2> $out.log || { cat $out.log >&2; exit 1; }"
    return [f"rule {name}", line, "  depfile = $out.d", "  deps = gcc"]


def ninja_file(tools: Toolchain) -> str:
    """build.ninja: one object per source, one shared library."""
    includes = ["-I" + str(BUILD_DIR), "-Icsrc", "-isystem", str(tools.torch.directory / "include")]
    cxx = [*tools.cxx.command, *CXX_FLAGS, *includes, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    rules = _rule("cxx", [*cxx, STABLE_ABI]) + _rule("module", [*cxx, "-isystem", sysconfig.get_path("include")])
    # --exclude-libs keeps the static CUDA runtime's symbols from meeting those of the runtime that torch brings.
    libraries = ["-L" + str(tools.torch.directory / "lib"), "-ltorch_cpu", "-Wl,--exclude-libs=ALL"]
    if tools.nvcc:
        codes = [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in tools.nvcc.targets]
        nvcc = [tools.nvcc.path, "-ccbin", tools.cxx.command[-1], *NVCC_FLAGS, *codes, *includes, STABLE_ABI]
        rules += _rule("cuda", nvcc, log=True)
        libraries += [tools.nvcc.runtime, "-ldl", "-lrt", "-lpthread"]
    libraries += shlex.split(os.environ.get("LDFLAGS", ""))
    link = f"{_shell([*tools.cxx.command, '-shared'])} $in {_shell(libraries)} -o $out"
    rules += ["rule link", f"  command = {link}"]

    edges, objects = [], []
    for source in tools.sources:
        rule = "cuda" if source.endswith(".cu") else "module" if source == MODULE else "cxx"
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
        raise BuildError(done.stdout)


def _kernel_resources(tools: Toolchain) -> list[dict[str, Any]]:
    """What ptxas reported: per kernel and target its registers, stack and spills in bytes."""
    if tools.nvcc is None:
        return []
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, "
        r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads.*?"
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
        raise ToolMissingError("no torch >= 2.11 to take the headers from (RPG_FAST_TORCH may name its site-packages)")
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
            except BuildError as error:
                if tools.nvcc is None:
                    raise
                failed, log, without_cuda = True, error.output, f"they did not compile: {error}"
                tools = Toolchain(tools.torch, tools.ninja, tools.cxx, None)
                _compile(tools, jobs)
        except (ToolMissingError, BuildError) as error:
            log = error.output if isinstance(error, BuildError) else log
            return Outcome(None, _record(f"built no kernels, plain torch runs: {error}", None, log), failed=True)
        return Outcome(directory / LIBRARY_NAME, _record(_describe(tools, without_cuda), tools, log), failed)


def _record(outcome: str, tools: Toolchain | None, log: str) -> dict[str, Any]:
    facts, kernels = (tools.facts(), _kernel_resources(tools)) if tools else (None, [])
    return {"outcome": outcome, "facts": facts, "kernels": kernels, "log": log}


def _toolchain() -> tuple[Toolchain, str | None]:
    if not sys.platform.startswith("linux"):
        raise ToolMissingError(f"the kernels are built on Linux only, this is {sys.platform}")
    torch, ninja, cxx = _find_torch_or_raise(), find_ninja(), find_cxx()
    if not any(source.endswith(".cu") for source in source_files(with_cuda=True)):
        return Toolchain(torch, ninja, cxx, None), "there are none in csrc/cuda"
    try:
        return Toolchain(torch, ninja, cxx, find_nvcc()), None
    except ToolMissingError as error:
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
