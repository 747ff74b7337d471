#!/usr/bin/env bash
# Everything about a CUDA device in one command, at most 8 minutes: bench/gpu.sh [--only STAGE] [--out FOLDER]
# It needs Python with CuPy, Numba, NumPy and pytest; PyTorch, JAX, mpi4py and matplotlib are used where they are.
# Nothing is installed: the package is laid out in a temporary folder, as an installation would do it.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=$root/bench/out/gpu
only=

usage() {
    echo "usage: bench/gpu.sh [--only smoke|tests|sanitizer|grid|ranks] [--out FOLDER]"
    exit "$1"
}
while [ $# -gt 0 ]; do
    case $1 in
        --only) only=${2:-}; case $only in smoke | tests | sanitizer | grid | ranks) ;; *) usage 2 ;; esac; shift 2 ;;
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        -h | --help) usage 0 ;;
        *) usage 2 ;;
    esac
done

package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
cp -r "$root/fastnewton" "$root/bench" "$root/tests" "$root/pyproject.toml" "$package"
cp -r "$root/kernels" "$package"
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$package" || exit 1
export PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH} XLA_PYTHON_CLIENT_PREALLOCATE=false

if ! "$python" -c 'import sys, cupy; sys.exit(not cupy.cuda.is_available())' 2>"$out/cupy.txt"; then
    echo "no CUDA device, or no CuPy ($(tail -n 1 "$out/cupy.txt")): nothing to measure"
    exit 0
fi

# stage NAME SECONDS COMMAND…: its failure does not stop the next; what it has written so far stays.
stage() {
    local name=$1 seconds=$2 start=$SECONDS code
    shift 2
    [ -z "$only" ] || [ "$only" = "$name" ] || return 0
    echo "== $name (at most $seconds s)"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    code=${PIPESTATUS[0]}
    printf '{"stage": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" $((SECONDS - start)) >>"$out/results.jsonl"
    [ "$code" -eq 0 ] || echo "== $name ended with $code"
}

sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer not found: left out"; return 0; }
    timeout 25 compute-sanitizer --error-exitcode 9 "$python" -m bench.gpu check --shapes 1 --out "$out" ||
        { echo "compute-sanitizer fails on one kernel: left out"; return 1; }
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.gpu check --out "$out" || return 1
    done
}

ranks() {
    local mpiexec
    mpiexec=$(dirname "$(command -v "$python")")/mpiexec
    [ -x "$mpiexec" ] || mpiexec=$(command -v mpiexec) || { echo "mpiexec not found: left out"; return 0; }
    "$python" -c 'import mpi4py' 2>/dev/null || { echo "mpi4py not found: left out"; return 0; }
    local ways=0
    "$python" -c 'import sys; from fastnewton.mpi import gpu_aware; sys.exit(not gpu_aware.verdict()[0])' && ways="0 1"
    for direct in $ways; do
        for count in 1 2 4; do
            FASTNEWTON_GPU_MPI=$direct "$mpiexec" -n "$count" "$python" -m bench.gpu rank --out "$out" || return 1
        done
    done
}
export -f sanitize ranks
export python out

[ -n "$only" ] || : >"$out/results.jsonl"
stage smoke 90 "$python" -m bench.gpu smoke --out "$out"
stage tests 120 "$python" -m pytest -m gpu -q -p no:cacheprovider -o filterwarnings=default \
    tests/kernels/test_gpu.py tests/arrays/test_dlpack_matrix.py
stage sanitizer 70 bash -c sanitize
stage grid 100 "$python" -m bench.gpu grid --out "$out" --seconds 85
stage ranks 55 bash -c ranks
timeout 20 "$python" -m bench.gpu report --out "$out"
