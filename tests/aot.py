"""Compile Triton kernels ahead of time, without a GPU, and read what ptxas made of them.

The interpreter, which the tests run kernels with, and ``triton.compile`` do not work in one process; so
``compile_kernels`` starts another one for a list of specs. By hand: ``python tests/aot.py < specs.json``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MATRIX_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "DMMA")  # SASS: wgmma (sm_90), mma.sync, tcgen05 (sm_100), fp64


@dataclass(frozen=True)
class KernelSpec:
    """One specialisation of a kernel, "module:function"; ``signature``: Triton types of its run-time arguments."""

    kernel: str
    arch: int
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]  # arguments divisible by 16, as the launcher finds pointers and such integers to be
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True


@dataclass(frozen=True)
class CompiledKernel:
    """What one spec compiled to; sizes in bytes, ``shared`` includes the dynamic part; ``wide_loads``,
    ``wide_stores``: instructions that move 16 bytes a thread from and to global memory; ``multiply_adds``: fused ones,
    in float32."""

    spec: KernelSpec
    registers: int
    stack: int
    local: int
    shared: int
    wide_loads: int = 0
    wide_stores: int = 0
    multiply_adds: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        flags = {name: value for name, value in self.spec.constants.items() if value is not None}
        return (
            f"sm_{self.spec.arch} {self.spec.kernel.rpartition(':')[2]} {flags} warps {self.spec.num_warps}: "
            f"{self.registers} registers, {self.stack} + {self.local} B stack and local, {self.shared} B shared, "
            f"{self.instructions}"
        )


def compile_kernels(specs: Sequence[KernelSpec], *, timeout: float = 300.0) -> list[CompiledKernel]:
    """Compile all specs in one process without the interpreter. Raises RuntimeError, with its output, if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(spec) for spec in specs]),
        capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stdout}\n{done.stderr}")
    results = json.loads(done.stdout.splitlines()[-1])
    return [CompiledKernel(spec=spec, **result) for spec, result in zip(specs, results, strict=True)]


def _compile(spec: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = spec["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), function)
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: spec["signature"].get(name, "constexpr") for name in names},
        constexprs=spec["constants"],
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec["aligned"]},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", spec["arch"], 32),
        options={name: spec[name] for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": spec["fp_fusion"]},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = _cuobjdump("--dump-resource-usage", cubin.name), _cuobjdump("--dump-sass", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources of {spec['kernel']}: {usage}")
    registers, stack, local = map(int, found.groups())
    instructions = {name: len(re.findall(rf"\b{name}\b", sass)) for name in MATRIX_INSTRUCTIONS}
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E[\w.]*\.128", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E[\w.]*\.128", sass)),
        "multiply_adds": len(re.findall(r"\bFFMA\b", sass)),
        "instructions": {name: count for name, count in instructions.items() if count},
    }


def _cuobjdump(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, path], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps([_compile(spec) for spec in json.load(sys.stdin)]))
