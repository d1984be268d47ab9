#!/usr/bin/env bash
# What a machine with an NVIDIA GPU, and no network, can tell about this tree. From the repository root:
#
#   bash benchmarks/gpu.sh [--commit HASH] [--python PYTHON] [--pack] [stage ...]
#
#   probe     benchmarks/probe.py, five minutes at most; builds the library first if it does not load (the default)
#   build     the compiled library, in place; a failed build is an error
#   test      all tests
#   graph     steps that must not wait for the device, and 1000 replays of captured steps against eager ones
#   sanitize  compute-sanitizer's memcheck and racecheck over the device templates, in a program without torch
#   rank      the benchmark of the rank loss: every driver, compiled peers, exact and power
#   error     its error against time
#   growth    its growth with size and batch
#   svd       the benchmark of svd_lowrank
#   step      the benchmarks of the masked optimizers and of the topology update
#   train     a whole training step of ResNet-50, dense, pruned and pruned as published; a trace and a picture of one
#   memory    its peak memory, dense and pruned
#   bench     the last seven
#   all       all of these, in this order
#
# Every stage ends within eight minutes and leaves its log, whatever became of the others. Files go to $OUT, by default
# benchmarks/results/<device>: summary.json, probe.json, a JSON file for each benchmark, step_trace.json.gz and
# step_profile.png, and a log for each stage. Exits 0 if all stages passed.
# `python -m benchmarks.report benchmarks/results/<device>` makes tables and plots of them.
#
# With --pack, $OUT gets two files alone, summary.json and results.tgz, the archive of all of these. Both are written
# again after every stage, so what a finished stage found survives whatever ends the run; an archive that is there
# already is added to.
set -uo pipefail

readonly STAGE_SECONDS=470 LOG_BYTES=4000000
readonly BENCHMARKS=(rank error growth svd step train memory)
export LOAD_SECONDS=40 BUILD_SECONDS=130 SANITIZER_SECONDS=160 TEST_SECONDS=120 PROFILE_SECONDS=110

die() {
  echo "gpu.sh: $*" >&2
  exit 1
}

export python=python3 commit='' out
pack=''
stages=()
while (($#)); do
  case $1 in
    --commit | --python)
      (($# > 1)) || die "$1 wants a value"
      if [[ $1 == --commit ]]; then commit=$2; else python=$2; fi
      shift
      ;;
    --pack) pack=yes ;;
    probe | build | test | graph | sanitize | rank | error | growth | svd | step | train | memory) stages+=("$1") ;;
    bench) stages+=("${BENCHMARKS[@]}") ;;
    all) stages+=(probe build test graph sanitize "${BENCHMARKS[@]}") ;;
    *) die "unknown argument '$1': want --commit HASH, --python PYTHON, --pack or stages of probe build test graph" \
      "sanitize ${BENCHMARKS[*]} bench all" ;;
  esac
  shift
done
((${#stages[@]})) || stages=(probe)

[[ -f setup.py && -d rpg_fast ]] || die "run it from the repository root, not from $PWD"
gpu() { timeout 30 nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1; }
device=$(gpu name)
[[ -n $device ]] || die "no NVIDIA GPU here: nvidia-smi lists none"
driver=$(gpu driver_version)
[[ -n $commit ]] || commit=$(git rev-parse HEAD 2>/dev/null) || commit=unknown
out=${OUT:-benchmarks/results/$(tr -cs '[:alnum:]\n' - <<<"${device,,}")}
mkdir -p "$out" || die "cannot create $out"
out=$(cd "$out" && pwd)
delivered=$out
if [[ $pack ]]; then
  out=$(mktemp -d) || die "cannot create a folder for what is to be packed"
  trap 'rm -r "$out"' EXIT
  if [[ -f $delivered/results.tgz ]]; then
    tar -xzf "$delivered/results.tgz" -C "$out" || die "cannot unpack $delivered/results.tgz to add to it"
  fi
fi
arch=sm_$(gpu compute_cap | tr -d .)
export arch PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

# ---- what each stage runs; time limit and log are the caller's -------------------------------------------------------

build() { RPG_FAST_REQUIRE_EXT=1 timeout -k 5 "$BUILD_SECONDS" "$python" setup.py build_ext --inplace; }

library_loads() { # with its CUDA kernels
  timeout -k 5 "$LOAD_SECONDS" "$python" - <<'PYTHON'
import sys, torch
from rpg_fast import _extension, _ops
_extension.load()
sys.exit(not torch._C._dispatch_has_kernel_for_dispatch_key(f"{_ops.NAMESPACE}::popcount", "CUDA"))
PYTHON
}

stage_probe() {
  if ! library_loads; then
    echo "the library does not load: building it"
    build || echo "the build failed (status $?): the fact that needs it will say so"
  fi
  "$python" benchmarks/probe.py --output "$out/probe.json" --commit "$commit"
}

stage_build() {
  build && "$python" -m rpg_fast
}

stage_test() {
  local limit=(--timeout="$TEST_SECONDS")
  "$python" -c 'import pytest_timeout' 2>/dev/null || limit=(-o "faulthandler_timeout=$TEST_SECONDS")
  "$python" -m pytest tests "${limit[@]}" --durations=20 -p no:cacheprovider
}

stage_graph() { # without a GPU these tests are skipped: that is no success here
  "$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device")' &&
    "$python" -m pytest tests/test_gpu_step.py -m gpu -v --durations=0 -p no:cacheprovider
}

stage_sanitize() {
  local folder status=0 tool
  folder=$(mktemp -d)
  timeout -k 5 "$BUILD_SECONDS" \
    nvcc -std=c++20 -arch="$arch" -lineinfo -I csrc benchmarks/sanitize.cu -o "$folder/sanitize" || return
  "$folder/sanitize" || status=$?
  for tool in memcheck racecheck; do
    echo "compute-sanitizer --tool $tool"
    timeout -k 5 "$SANITIZER_SECONDS" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/sanitize" || status=$?
  done
  rm -r "$folder"
  return "$status"
}

benchmark() { # name of the JSON file, files of benchmarks
  local json=$out/$1.json status=0
  shift
  rm -f "$json"
  "$python" -m pytest "$@" --benchmark-only --benchmark-json="$json" -p no:cacheprovider || status=$?
  if [[ -s $json ]]; then
    "$python" benchmarks/environment.py --commit "$commit" --add-to "$json" || status=$?
  fi
  return "$status"
}

stage_rank() { benchmark rank benchmarks/test_rank_loss.py; }
stage_error() { benchmark error benchmarks/test_rank_error.py; }
stage_growth() { benchmark growth benchmarks/test_growth.py; }
stage_svd() { benchmark svd benchmarks/test_svd_lowrank.py; }
stage_step() { benchmark step benchmarks/test_masked_step.py benchmarks/test_topology.py; }

stage_train() { # the picture comes last: what was measured is written by then
  local status=0
  benchmark train benchmarks/test_train_step.py || status=$?
  timeout -k 5 "$PROFILE_SECONDS" "$python" -m benchmarks.profile_step --output "$out" || status=$?
  return "$status"
}

stage_memory() { benchmark memory benchmarks/test_memory.py; }

export -f build library_loads benchmark
export -f stage_probe stage_build stage_test stage_graph stage_sanitize
export -f stage_rank stage_error stage_growth stage_svd stage_step stage_train stage_memory

# ---- running them ----------------------------------------------------------------------------------------------------

environment=$(timeout -k 5 90 "$python" benchmarks/environment.py --commit "$commit" 2>/dev/null)
if [[ $environment != \{*\} ]]; then # python or torch does not work: what is known without them
  printf -v environment '{"device": "%s", "driver": "%s", "commit": "%s", "date": "%s"}' \
    "$device" "$driver" "${commit//[\"\\]/}" "$(date -u +%FT%TZ)"
fi

results=()
write_summary() {
  local IFS=,
  printf '{"environment": %s,\n "stages": [%s]}\n' "$environment" "${results[*]}" >"$out/summary.json"
}

deliver() { # a whole archive takes the place of the last one, or none does
  [[ $pack ]] || return 0
  local archive=$delivered/results.tgz
  tar -czf "$archive.new" -C "$out" . || die "cannot write $archive.new"
  mv "$archive.new" "$archive" || die "cannot write $archive"
  cp "$out/summary.json" "$delivered" || die "cannot write $delivered/summary.json"
}

failures=0
run_stage() {
  local stage=$1 status=0 begin=$SECONDS log=$out/$1.log outcome=passed
  echo "== $stage on $device"
  timeout -s KILL "$STAGE_SECONDS" bash -uo pipefail -c "stage_$stage" >"$log" 2>&1 </dev/null || status=$?
  if ((status)); then outcome=failed; fi
  if ((status && SECONDS - begin >= STAGE_SECONDS)); then outcome='timed out'; fi
  ((status == 0)) || failures=$((failures + 1))
  if (($(wc -c <"$log") > LOG_BYTES)); then
    tail -c "$LOG_BYTES" "$log" >"$log.tail" && mv "$log.tail" "$log"
  fi
  results+=("
  {\"stage\": \"$stage\", \"outcome\": \"$outcome\", \"exit_status\": $status, \"seconds\": $((SECONDS - begin))}")
  write_summary
  deliver
  tail -n 60 "$log"
  echo "== $stage $outcome (status $status, $((SECONDS - begin)) s)"
}

for stage in "${stages[@]}"; do run_stage "$stage"; done
cat "$out/summary.json"
((failures == 0))
