#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command without network, within 9 minutes:
#
#     bash bench/gpu.sh FOLDER
#
# builds in place, runs the tests on the GPU, compute-sanitizer over the CUDA C++ kernels, then the report. FOLDER gets
# the output of each stage as STAGE.log, report.json, report.md, report.png and summary.txt. A failed stage does not stop
# the later ones; the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 1 ] || { echo "usage: bash bench/gpu.sh FOLDER" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-python}
failed=0
printf '%-10s %-8s %8s  %s\n' stage result seconds 'last line' >"$out/summary.txt"

# stage NAME SECONDS COMMAND...: runs it, at most so long, and notes how it went
stage() {
  local name=$1 limit=$2 start=$SECONDS code result=ok
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  if [ $code -ne 0 ]; then
    failed=1
    result="FAIL $code"
    [ $code -ne 124 ] && [ $code -ne 137 ] || result=TIMEOUT
  fi
  printf '%-10s %-8s %8d  %s\n' "$name" "$result" $((SECONDS - start)) "$(tail -n 1 "$out/$name.log" | cut -c1-100)" |
    tee -a "$out/summary.txt"
}

# needs_gpu COMMAND...: the command, or one clear line where there is no GPU
needs_gpu() {
  "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { echo "no NVIDIA GPU"; return 1; }
  "$@"
}

build() {
  # code for the GPU at hand alone: a build for all architectures takes minutes
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; c = torch.cuda.get_device_capability(); print("%d.%d%s" % (*c, "a" * (c == (9, 0))))') \
    FLEXKERNELS_BUILD=cuda "$python" setup.py build_ext --inplace
}

tests() {
  # whatever has a place on the GPU, and the tests that were written for one
  "$python" -m pytest -q -p no:cacheprovider tests --ignore tests/kernels/test_triton_compile.py \
    -k 'triton-cuda or cuda-cuda or cuda_graph or gpu or offsets_beyond_31_bits or graph'
}

sanitizer() {
  local tool
  tool=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
  [ -x "$tool" ] || { echo "compute-sanitizer not found: put it on PATH or set CUDA_HOME"; return 1; }
  # each tensor an allocation of its own, so that a step over its end is seen
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 1 \
    "$python" bench/sanitize.py --backend cuda
}

report() {
  "$python" bench/report.py --device cuda --seconds 0.2 --json "$out/report.json" || return
  "$python" bench/report.py --load "$out/report.json" --markdown >"$out/report.md" || return
  "$python" -c 'import matplotlib' || { echo "no plot: matplotlib is not installed"; return 0; }
  "$python" bench/report.py --load "$out/report.json" --plot "$out/report.png"
}

export -f needs_gpu build tests sanitizer report
export out python
stage build 150 bash -c 'needs_gpu build'
stage tests 150 bash -c 'needs_gpu tests'
stage memcheck 60 bash -c 'needs_gpu sanitizer memcheck'
stage racecheck 60 bash -c 'needs_gpu sanitizer racecheck'
stage report 110 bash -c 'needs_gpu report'
echo
cat "$out/summary.txt"
exit $failed
