#!/usr/bin/env bash
# Installs the project in every way that is supported, each from a fresh copy of the sources, and checks what came of it.
#
#   tests/install_matrix.sh [-k PATTERN] [PYTHON]
#
# PYTHON (default python3) makes the environments. Takes about six minutes and the network; one line for each trial.
set -uo pipefail

only=""
if [[ "${1:-}" == "-k" ]]; then only="$2"; shift 2; fi
python="$(realpath -s "$(command -v "${1:-python3}")")"
root="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PIP_CONSTRAINT="$root/constraints-cpu.txt" UV_CONSTRAINT="$root/constraints-cpu.txt"
export TORCH_CUDA_ARCH_LIST=9.0 # one target: the trials are about installing
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH RPG_FAST_REQUIRE_EXT RPG_FAST_TORCH RPG_FAST_CUDA VIRTUAL_ENV

# fresh_tree: a copy of the sources, without anything built, in $tree
fresh_tree() {
  tree="$work/tree-$trial"
  rm -rf "$tree" && mkdir "$tree"
  (cd "$root" && git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$tree" 2>/dev/null)
  cd "$tree" || exit 1
}

# with_torch: $venv is an environment with CPU torch and the build tools, made once, and without rpg_fast
with_torch() {
  venv="$work/with-torch"
  if [[ ! -d "$venv" ]]; then
    "$python" -m venv "$venv" && "$venv/bin/pip" install -q torch numpy "setuptools>=77" ninja || return 1
  fi
  "$venv/bin/pip" uninstall -q -y rpg_fast 2>/dev/null
}

# with_uv: $work/uv/bin/uv is there
with_uv() {
  [[ -x "$work/uv/bin/uv" ]] || { "$python" -m venv "$work/uv" && "$work/uv/bin/pip" install -q uv; }
}

# check EXPRESSION...: Python expressions about the JSON of `rpg-fast info`, here `r`; and an op runs
check() {
  (cd / && "$venv/bin/rpg-fast" info --json >"$work/info.json") || return 1
  "$venv/bin/python" - "$work/info.json" "$@" <<'CHECK'
import json, sys
r = json.load(open(sys.argv[1]))
backends = {device: {row[device] for row in r["ops"].values()} for device in ("cpu", "cuda")}
has_cuda_sources = any(s.endswith(".cu") for s in (r["extension"]["facts"] or {}).get("sources", []))
print("   ", r["build"].get("outcome"))
wrong = [e for e in sys.argv[2:] if not eval(e)]
sys.exit(f"does not hold: {wrong}" if wrong else 0)
CHECK
}

built=("r['extension']['loaded']" "'C++' in backends['cpu']" "r['versions']['torch'].startswith('2.13.0')")
plain=("not r['extension']['loaded']" "backends['cpu'] == {'reference'}" "'built no kernels' in r['extension']['reason']")

cpu_torch_pip_23_2_1() {
  fresh_tree && with_torch && "$venv/bin/pip" install -q "pip==23.2.1" && "$venv/bin/pip" install -v -e . >log 2>&1 &&
    grep -q "rpg_fast: built" log && ! grep -q "Collecting torch" log && check "${built[@]}"
}

cpu_torch_newest_pip() {
  fresh_tree && with_torch && "$venv/bin/pip" install -q -U pip && "$venv/bin/pip" install -v -e . >log 2>&1 &&
    grep -q "rpg_fast: built" log && ! grep -q "Collecting torch" log && check "${built[@]}"
}

no_torch() {
  fresh_tree && venv="$work/no-torch" && "$python" -m venv "$venv" && "$venv/bin/pip" install -q -e . && check "${built[@]}"
}

offline() {
  fresh_tree && with_torch && env -u PIP_FIND_LINKS -u PIP_CONSTRAINT PIP_NO_INDEX=1 PIP_CONFIG_FILE=/dev/null \
    "$venv/bin/pip" install -q --no-build-isolation --no-deps -e . && check "${built[@]}"
}

setup_py_inplace() {
  fresh_tree && with_torch && "$venv/bin/python" setup.py -q build_ext --inplace >log 2>&1 &&
    grep -q "rpg_fast: built" log && [[ "$("$venv/bin/python" -m rpg_fast)" == *"C++"* ]]
}

# The toolkit is hidden by an empty file system over /usr/local, where that is allowed, and else by the variable.
no_nvcc() {
  fresh_tree && with_torch || return 1
  local install=("$venv/bin/pip" install -q -e .)
  local path=/usr/bin:/bin
  if [[ "$work" != /usr/local/* && "$python" != /usr/local/* ]] && unshare -rm mount -t tmpfs none /usr/local 2>/dev/null; then
    PATH=$path unshare -rm sh -c 'mount -t tmpfs none /usr/local && exec "$@"' sh "${install[@]}" || return 1
  else
    RPG_FAST_CUDA=0 "${install[@]}" || return 1
  fi
  check "${built[@]}" "'CUDA' not in backends['cuda']" "'no CUDA kernels' in r['build']['outcome']"
}

no_compiler() {
  fresh_tree && with_torch && mkdir empty || return 1
  PATH="$tree/empty" "$venv/bin/pip" install -q -e . && check "${plain[@]}" "'no working C++ compiler' in r['build']['outcome']"
}

no_compiler_but_required() {
  fresh_tree && with_torch && mkdir empty || return 1
  ! RPG_FAST_REQUIRE_EXT=1 PATH="$tree/empty" "$venv/bin/pip" install -q -e . >log 2>&1 && grep -q "built no kernels" log
}

cpp_does_not_compile() {
  fresh_tree && with_torch && echo "int broken = ;" >>csrc/module.cpp && "$venv/bin/pip" install -q -e . &&
    check "${plain[@]}" "'module.cpp' in r['build']['outcome']" "'broken' in r['build']['log']"
}

cuda_does_not_compile() {
  [[ -n "$(ls "$root"/csrc/cuda/*.cu 2>/dev/null)" ]] && command -v nvcc >/dev/null || { echo "    no .cu or no nvcc"; return 0; }
  fresh_tree && with_torch && echo "int broken = ;" >csrc/cuda/broken.cu && "$venv/bin/pip" install -q -e . &&
    check "${built[@]}" "'did not compile' in r['build']['outcome']" "'CUDA' not in backends['cuda']"
}

# uv builds in an environment with another prefix; the torch of the project's own .venv is found all the same.
uv_isolated() {
  fresh_tree && with_uv && venv="$tree/.venv" && "$python" -m venv "$venv" && "$venv/bin/pip" install -q torch || return 1
  "$work/uv/bin/uv" pip install -v --python "$venv/bin/python" -e . >log 2>&1 && grep -q "rpg_fast: built" log &&
    check "${built[@]}"
}

uv_no_build_isolation() {
  fresh_tree && with_torch && with_uv && "$work/uv/bin/uv" pip install -q --python "$venv/bin/python" --no-build-isolation -e . &&
    check "${built[@]}"
}

sdist_wheel() {
  fresh_tree && with_torch && "$venv/bin/pip" install -q build && "$venv/bin/python" -m build -q . &&
    "$venv/bin/pip" install -q dist/*.whl && rm -rf "$tree/rpg_fast" && check "${built[@]}"
}

incremental() {
  local build=(env "RPG_FAST_REQUIRE_EXT=1" python setup.py -q build_ext --inplace) output
  fresh_tree && with_torch && build[2]="$venv/bin/python" && "${build[@]}" >/dev/null 2>&1 || return 1
  output="$("${build[@]}" 2>&1)" && [[ "$output" == *"no work to do"* ]] || return 1
  echo "// changed" >>csrc/common.h
  output="$("${build[@]}" 2>&1)" && [[ "$output" == *"[1/"* ]]
}

# The headers of the oldest torch, the library loaded in the pinned one. Downloads a wheel of half a gigabyte, installs none of it.
oldest_torch_headers() {
  fresh_tree && with_torch && mkdir oldest || return 1
  env -u PIP_CONSTRAINT "$venv/bin/pip" download -q --no-deps -d oldest torch==2.11.0 &&
    (cd oldest && "$python" -m zipfile -e torch-*.whl . && rm torch-*.whl) &&
    RPG_FAST_TORCH="$tree/oldest" "$venv/bin/pip" install -q -e . && check "${built[@]}" "'torch 2.11.0' in r['build']['outcome']"
}

trials=(cpu_torch_pip_23_2_1 cpu_torch_newest_pip no_torch offline setup_py_inplace incremental no_nvcc no_compiler
  no_compiler_but_required cpp_does_not_compile cuda_does_not_compile uv_isolated uv_no_build_isolation sdist_wheel
  oldest_torch_headers)

failures=0
for trial in "${trials[@]}"; do
  [[ -z "$only" || "$trial" == $only ]] || continue
  start=$SECONDS
  if "$trial"; then verdict="ok"; else verdict="FAILED"; failures=$((failures + 1)); fi
  printf '%-26s %s (%d s)\n' "$trial" "$verdict" $((SECONDS - start))
  rm -rf "$work/tree-$trial"
done
exit $((failures > 0))
