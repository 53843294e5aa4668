#!/usr/bin/env bash
# Builds for the GPU of this machine unless the libraries in the tree load, runs every CUDA test, checks memory accesses
# and races, and times the kernels and whole steps. Two files come of it in $OUT (default out/gpu): gpu.log and gpu.json.
#
#   benchmarks/gpu.sh [--dry-run] [--resume gpu.json]
#
# --dry-run   every phase on the CPU at tiny sizes.
# --resume    goes on from this earlier gpu.json: what passed is not run again.
# SECONDS_LIMIT (default 230): nothing starts later than this. PHASES: names of some phases. COMMIT: where .git is not.
# Exits with 0 if all passed, 1 if anything failed, 3 if nothing failed but time did not reach for all.
set -u -o pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-$root/out/gpu}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit
export OUT PYTHONUNBUFFERED=1 PYTHONPATH=$root:$root/tests:$root/benchmarks PATH=$PATH:/usr/local/cuda/bin
# Threads that wait for one another on a busy machine take longer than all the tiny work.
[[ " $* " = *" --dry-run "* ]] && export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
"${PYTHON:-python3}" "$root/benchmarks/gpu/phases.py" "$@" 2>&1 | tee "$OUT/gpu.log"
