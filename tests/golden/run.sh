#!/usr/bin/env bash
# Compute both trees on this host and compare them: run.sh [--quick] [--assembly | --values] [compare.py's options]
#
# GOLDEN_HOME (build/golden) keeps the base's worktree `base`, made with an environment of its own where it is missing, and
# its results `golden-base`, which are used again while VERSION in compute.py or assembly.py is the same; PYTHON runs the
# tree under test.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/golden
commit=39992f6
home=${GOLDEN_HOME:-$root/build/golden}
python=${PYTHON:-$root/.venv/bin/python}
new=${GOLDEN_OUT:-$root/build/golden/new}
base=$home/base
size=full quick=() sides=(values assembly) options=()
while [ $# -gt 0 ]; do
    case $1 in
        --quick) size=quick quick=(--quick) ;;
        --values) sides=(values) ;;
        --assembly) sides=(assembly) ;;
        *) options+=("$1") ;;
    esac
    shift
done

mkdir -p "$home/golden-base" "$new"
if [ ! -e "$base/.git" ]; then
    git -C "$root" worktree add --detach "$base" "$commit"
fi
if [ ! -x "$base/.venv/bin/python" ]; then
    python3 -m venv "$base/.venv"
    "$base/.venv/bin/pip" install --quiet -e "$base[test]"
fi

status=0
for side in "${sides[@]}"; do
    case $side in
        values) program=compute.py kind=npz ;;
        assembly) program=assembly.py kind=json ;;
    esac
    version=$(sed -n 's/^VERSION = \([0-9]*\).*/\1/p' "$here/$program")
    known=$home/golden-base/$size-$side-$version.$kind
    if [ ! -e "$known" ]; then
        (cd "$base" && env -u PYTHONPATH GOLDEN_TREE="$base" .venv/bin/python "$here/$program" "$known" ${quick[@]+"${quick[@]}"})
    fi
    (cd "$root" && PYTHONPATH=$root GOLDEN_TREE=$root "$python" "$here/$program" "$new/$size-$side.$kind" ${quick[@]+"${quick[@]}"})
    echo "== $size $side"
    "$python" "$here/compare.py" "$known" "$new/$size-$side.$kind" ${options[@]+"${options[@]}"} || status=$?
done
exit $status
