#!/usr/bin/env bash
# Everything a machine with a GPU should do, in at most 25 minutes and without a network.
#
#   benchmarks/gpu.sh OUTPUT [SECTION...]
#
# Sections, in this order: tests sanitizer bench tune profile. Without one, all; name those that are
# left to go on after an interruption. Each writes OUTPUT/SECTION.log; OUTPUT/summary.txt has a line
# for each. Exits with 1 if one failed, with 2 if nothing could begin.
#
# PYTHON   interpreter (python3)
# WHEELS   folder with wheels of vlmo (dist); if vlmo is not installed, the newest that fits the
#          interpreter is, without its dependencies
# COMMIT   what is being measured, where git cannot tell
# SANITIZE -k expression of the tests that run under compute-sanitizer
# MINUTES_OF_BENCH  whole ones; what would begin later is not measured (6)
#
# The section bench needs pytest-benchmark; if it is not installed, a wheel in WHEELS is.
#
# Limits in seconds: tests 40 + 300, sanitizer 4 * 80, bench 360 + 60, tune 300, profile 60: 1440.
set -uo pipefail

if [ $# -lt 1 ]; then
    sed '1d; /^set /,$d; s/^# \{0,1\}//' "$0" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
sections=("${@:-}")
[ -n "${sections[0]}" ] || sections=(tests sanitizer bench tune profile)
for section in "${sections[@]}"; do
    case $section in
        tests | sanitizer | bench | tune | profile) ;;
        *) echo "gpu.sh: no section $section" >&2 && exit 2 ;;
    esac
done

cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
# The tree's own options ask for plugins that need not be here.
pytest=("$python" -m pytest -q -p no:cacheprovider -o "addopts=--import-mode=importlib -ra")
COMMIT=${COMMIT:-$(git describe --always --dirty --exclude='*' 2>/dev/null)}
# The folder vlmo/ of the tree may have no _C in it: only the installed package is whole.
export PYTHONSAFEPATH=1 PYTHONPATH=$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export TRITON_INTERPRET=0
unset VLMO_KERNELS VLMO_VOLTA_ANYWHERE

if ! "$python" -c 'import vlmo.kernels, vlmo._C' 2>/dev/null; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "gpu.sh: with Python 3.10 an installed wheel is hidden by this tree; pip install -e ." >&2
        exit 2
    fi
    wheel=$("$python" benchmarks/wheel.py "${WHEELS:-dist}") || exit 2
    "$python" -m pip install --no-index --no-deps --force-reinstall "$wheel" || exit 2
fi
"$python" - >"$out/machine.txt" 2>&1 <<'EOF' || { cat "$out/machine.txt" >&2 && exit 2; }
import sys
from importlib.metadata import packages_distributions, requires

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from vlmo.kernels import why_not
from vlmo.kernels.target import describe
from vlmo.device import versions

if not torch.cuda.is_available():
    sys.exit("gpu.sh: torch finds no GPU")
print(describe("cuda"), versions(), "CUDA", torch.version.cuda)
if reason := why_not("moe_ffn", "triton", device="cuda", dtype=torch.bfloat16):
    sys.exit(f"gpu.sh: moe_ffn cannot run in Triton: {reason}")
here = {canonicalize_name(name) for names in packages_distributions().values() for name in names}
needs = [need for need in map(Requirement, requires("vlmo")) if "extra" not in str(need.marker)]
if missing := sorted({need.name for need in needs} - here):
    print("WARNING: packages that vlmo needs are missing:", *missing)
EOF
grep WARNING "$out/machine.txt" | tee -a "$out/summary.txt"
installed=$("$python" -c 'import vlmo.kernels as k; print(k.__path__[0])')
package=$("$python" -c 'import vlmo; print(vlmo.__path__[0])')
# What is measured is what is installed, which may be older than the tree.
if ! { diff -rq -x __pycache__ kernels "$installed" &&
    diff -rq -x __pycache__ -x kernels -x kernels.pyi -x '_C*' vlmo "$package"; } \
    >>"$out/machine.txt"; then
    echo "WARNING: the installed package is not this tree; see machine.txt" | tee -a "$out/summary.txt"
    COMMIT=${COMMIT:-unknown}-installed-differs
fi

# start LOG SECONDS COMMAND...: in the background, its output at the end of a log; sets $process.
start() {
    local log=$out/$1.log limit=$2
    shift 2
    printf '\n$ %s\n' "$*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 &
    process=$!
}

# finish LOG PROCESS: wait for what was started; its status is the command's.
finish() {
    local status
    wait "$2"
    status=$?
    case $status in 124 | 137) echo "stopped at its limit" >>"$out/$1.log" ;; esac
    return $status
}

# Not in the foreground, as bash handles a signal only once a command there has ended.
run() {
    start "$@"
    finish "$1" "$process"
}

tests() {
    # Nearly all of the time goes into compiling, which one process does on one core.
    local shards=$(($(nproc) < 12 ? $(nproc) : 12)) status=0 shard processes=()
    # Other tests need no GPU, and may need packages that are not here: what cannot be collected is
    # in the log.
    run tests 40 "${pytest[@]}" tests -m gpu --collect-only --continue-on-collection-errors
    grep '^tests/.*::' "$out/tests.log" | sort -u >"$out/tests.txt"
    if [ ! -s "$out/tests.txt" ]; then
        echo "nothing was collected" >>"$out/tests.log"
        return 1
    fi
    for ((shard = 0; shard < shards; shard++)); do
        awk -v n="$shards" -v i="$shard" 'NR % n == i' "$out/tests.txt" >"$out/tests-$shard.txt"
        : >"$out/tests-$shard.log"
        # The V100's kernels too, if the wheel was built with VLMO_TEST_TARGETS.
        VLMO_VOLTA_ANYWHERE=1 start "tests-$shard" 300 xargs -r -d '\n' \
            -a "$out/tests-$shard.txt" "${pytest[@]}"
        processes+=("$process")
    done
    for shard in "${!processes[@]}"; do
        finish "tests-$shard" "${processes[$shard]}" || status=1
        cat "$out/tests-$shard.log" >>"$out/tests.log"
        rm "$out/tests-$shard.log" "$out/tests-$shard.txt"
    done
    rm "$out/tests.txt"
    return $status
}

sanitizer() {
    local status=0 tool
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on PATH" >"$out/sanitizer.log"
        return 3
    fi
    for tool in memcheck racecheck; do
        # An allocation of its own for each tensor, or memcheck would not see its end.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitizer 80 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "${pytest[@]}" tests/kernels/test_moe_ffn.py -m gpu -x \
            -k "${SANITIZE:-test_parity and cuda-triton and bfloat16 and (vlmo or ids)}" || status=1
        # The V100's kernels, if the wheel was built with VLMO_TEST_TARGETS; else their test skips.
        VLMO_VOLTA_ANYWHERE=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitizer 80 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "${pytest[@]}" tests/kernels/test_moe_ffn_cuda.py tests/kernels/test_attention_cuda.py -m gpu -x \
            -k "test_parity and cuda-cuda and (moe_ffn or 237 or positions)" || status=1
    done
    return $status
}

bench() {
    local minutes=${MINUTES_OF_BENCH:-6} status=0
    if ! "$python" -c 'import pytest_benchmark' 2>/dev/null; then
        "$python" -m pip install --no-index --find-links "${WHEELS:-dist}" pytest-benchmark \
            >/dev/null 2>&1 || { echo "no pytest-benchmark" >"$out/bench.log" && return 3; }
    fi
    run bench $((60 * minutes + 30)) "${pytest[@]}" benchmarks --benchmark-enable \
        --benchmark-json="$out/bench.json" --minutes "$minutes" ${COMMIT:+--commit "$COMMIT"} \
        || status=1
    run bench 30 "$python" benchmarks/report.py "$out/bench.json" || status=1
    return $status
}

tune() {
    run tune 300 "$python" benchmarks/tune.py --quick --dtype bfloat16 || return 1
}

profile() {
    run profile 60 "$python" benchmarks/profile_moe_ffn.py triton || return 1
}

interrupted() {
    trap - INT TERM
    echo "$section: interrupted ($((SECONDS - begun)) s)" | tee -a "$out/summary.txt"
    # What timeout runs has a process group of its own; timeout passes the signal on to it.
    kill $(jobs -p) 2>/dev/null
    wait
    exit 1
}

failed=0
trap interrupted INT TERM
for section in "${sections[@]}"; do
    : >"$out/$section.log"
    begun=$SECONDS
    "$section"
    status=$?
    case $status in
        0) verdict=passed ;;
        3) verdict="not run: $(head -n 1 "$out/$section.log")" ;;
        *) verdict="FAILED" && failed=1 ;;
    esac
    echo "$section: $verdict ($((SECONDS - begun)) s)" | tee -a "$out/summary.txt"
done
exit $failed
