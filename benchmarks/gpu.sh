#!/usr/bin/env bash
# Builds for the GPU of this machine, runs every CUDA test, checks memory accesses and races, and times the kernels.
# Writes logs, gpu.json, gpu_projector.json, gpu_probes.json and gpu_active_linear.json to $OUT (default out/gpu). Each
# phase has a limit of its own; all end within 9 minutes.
set -u
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-out/gpu}" && cd "${OUT:-out/gpu}" && pwd)
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
failed=0
summary=()

phase() {  # name, seconds, command
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  [ $code = 124 ] || [ $code = 137 ] && code="over ${limit}s"
  [ "$code" = 0 ] || failed=1
  summary+=("$(printf '%-12s %-10s %4ds  %s' "$name" "$([ "$code" = 0 ] && echo passed || echo "FAILED ($code)")" \
    $((SECONDS - start)) "$(grep -vE '^\s*$' "$OUT/$name.log" | tail -n 1 | cut -c1-100)")")
}

build() {
  export SPARSE_CL_CUDA=1 CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-native}
  nvidia-smi && nvcc --version &&
    "$PYTHON" -m pip install --no-deps --no-build-isolation -e . &&
    "$PYTHON" -c 'from sparse_cl import ops; print(ops.LOADED); assert all(ops.LOADED.values())'
}
export -f build
export PYTHON

# The tool sees each access only if every tensor is an allocation of its own.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_masked_adamw_cuda.py tests/test_gram_factor_cuda.py -k "${2}"
}
export -f sanitize

small='agrees and (fp32-plain or bf16-plain or bf16-misaligned or fp32-entry) or without_active'
small="$small or orthonormal and (odd or duplicates or past_shared)"
phase build 105 bash -c build
phase tests 90 "$PYTHON" -m pytest -q -rs -p no:cacheprovider tests -k "cuda and not emulated and not cuda_build"
phase benchmark 75 "$PYTHON" benchmarks/gpu_masked_adamw.py --out "$OUT/gpu.json"
phase projector 60 "$PYTHON" benchmarks/gpu_orthonormalize.py --out "$OUT/gpu_projector.json"
phase probes 45 "$PYTHON" benchmarks/gpu_probes.py --out "$OUT/gpu_probes.json"
phase active 65 "$PYTHON" benchmarks/gpu_active_linear.py --out "$OUT/gpu_active_linear.json"
phase memcheck 50 bash -c "sanitize memcheck '$small'"
phase racecheck 50 bash -c "sanitize racecheck '$small'"

sed -n '/^device:/,$p' "$OUT/benchmark.log" "$OUT/projector.log" "$OUT/probes.log" "$OUT/active.log"
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.txt"
exit $failed
