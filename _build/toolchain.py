"""What a build needs and where it is found: torch's headers, compilers, ninja. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)
DEFAULT_CUDA_ARCHS = ("8.0", "9.0", "10.0")
ROOT = Path(__file__).resolve().parent.parent


class ToolMissingError(Exception):
    """Something the build needs is not there; the message says what was looked for, and where."""


@dataclass(frozen=True)
class Torch:
    """A torch package on disk: its directory and version."""

    directory: Path
    version: str


@dataclass(frozen=True)
class Cxx:
    """A C++ compiler: the command that runs it (`CXX="ccache g++"` makes two words) and the version it reports."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its path and version, the static CUDA runtime of its toolkit, and the `-gencode` targets that it
    is asked for, for example ("sm_80", "sm_90", "compute_90")."""

    path: str
    version: str
    runtime: str
    targets: tuple[str, ...]


def _torch_directories() -> Iterator[Path]:
    """Where a torch may lie, in order: this process, the target environment (hidden by pip's isolation), its base
    interpreter, and the project's own `.venv` (uv builds in an environment with another prefix)."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent
    prefixes = [sys.prefix, sys.base_prefix, str(ROOT / ".venv")]
    python = "python{}.{}".format(*sys.version_info)
    # Debian's site names dist-packages alone, which is not where its virtual environments keep their packages.
    environments = [str(Path(prefix) / "lib" / python / "site-packages") for prefix in prefixes]
    for directory in [*site.getsitepackages(prefixes), *environments, site.getusersitepackages()]:
        yield Path(directory) / "torch"


def _read_torch(directory: Path) -> Torch | None:
    version_file = directory / "version.py"
    if not version_file.is_file() or not (directory / "include/torch/csrc/stable/library.h").is_file():
        return None
    match = re.search(r"^__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", version_file.read_text(), re.MULTILINE)
    if match is None or (int(match[2]), int(match[3])) < MINIMUM_TORCH:
        return None
    return Torch(directory, match[1])


def find_torch() -> Torch | None:
    """The torch to build against, or None. Any torch >= 2.11 will do: the stable ABI makes the library load in all.

    `RPG_FAST_TORCH` names a directory that holds the package `torch` (a site-packages) and then nothing else is tried.
    """
    named = os.environ.get("RPG_FAST_TORCH")
    if named:
        torch = _read_torch(Path(named) / "torch")
        if torch is None:
            raise ToolMissingError(f"RPG_FAST_TORCH={named} holds no torch >= 2.11 with its headers")
        return torch
    found = (_read_torch(directory) for directory in _torch_directories())
    return next((torch for torch in found if torch), None)


def _run(*command: str) -> str:
    """stdout and stderr of a command, or an empty string if it cannot be run or fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def find_cxx() -> Cxx:
    """`$CXX`, else c++, g++ or clang++ on PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = tuple(shlex.split(candidate))
        if banner := _run(*command, "--version"):
            return Cxx(command, banner.splitlines()[0])
    raise ToolMissingError(f"no working C++ compiler (looked for {', '.join(candidates)})")


def find_ninja() -> str:
    """ninja on PATH, else among the scripts of this interpreter (an environment that is not activated)."""
    path = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if path is None:
        raise ToolMissingError("no ninja (`pip install ninja`)")
    return path


def _toolkit_roots() -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        yield Path(home)
    if on_path := shutil.which("nvcc"):
        # An nvcc on PATH is often a wrapper script; what it runs tells where the toolkit is.
        top = re.search(r"^#\$ TOP=(.+)$", _run(on_path, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
        if top:
            yield Path(top[1].strip())
    yield Path("/usr/local/cuda")


def find_nvcc() -> Nvcc:
    """nvcc of `$CUDA_HOME`, of the toolkit behind nvcc on PATH, or of /usr/local/cuda.

    Compiles for sm_80, sm_90 and sm_100, as far as this nvcc knows them, with PTX of the last for newer devices;
    `TORCH_CUDA_ARCH_LIST` ("9.0" or "8.0;9.0+PTX") says otherwise. `RPG_FAST_CUDA=0` leaves CUDA out.
    """
    if os.environ.get("RPG_FAST_CUDA") == "0":
        raise ToolMissingError("RPG_FAST_CUDA=0")
    for root in _toolkit_roots():
        nvcc = root / "bin" / "nvcc"
        release = re.search(r"release (\d+\.\d+)", _run(str(nvcc), "--version"))
        header = _first(root, "include/cuda_runtime.h", "targets/*/include/cuda_runtime.h")
        runtime = _first(root, *(f"{lib}/libcudart_static.a" for lib in ("lib64", "lib", "targets/*/lib")))
        if release and header and runtime:
            return Nvcc(str(nvcc.resolve()), release[1], str(runtime.resolve()), _cuda_targets(str(nvcc)))
    raise ToolMissingError("no working nvcc (looked in $CUDA_HOME, on PATH and in /usr/local/cuda)")


def _first(root: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in sorted(root.glob(pattern))), None)


def _cuda_targets(nvcc: str) -> tuple[str, ...]:
    known = set(re.findall(r"compute_(\w+)", _run(nvcc, "--list-gpu-arch")))
    asked = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked == [""]:
        archs = [arch.replace(".", "") for arch in DEFAULT_CUDA_ARCHS]
        archs = [arch for arch in archs if arch in known]
        return (*(f"sm_{arch}" for arch in archs), *(f"compute_{arch}" for arch in archs[-1:]))
    targets: list[str] = []
    for arch in asked:
        number = arch.removesuffix("+PTX").replace(".", "")
        if number.rstrip("af") not in known:
            raise ToolMissingError(f"TORCH_CUDA_ARCH_LIST asks for {arch!r}, which {nvcc} does not know")
        targets.append(f"sm_{number}")
        if arch.endswith("+PTX"):
            targets.append(f"compute_{number}")
    return tuple(targets)
