#!/usr/bin/env bash
# Run the GPU tests and all benchmarks on this machine, without a network.
#
#   [OUT=folder] [WHEELS=folder] [PYTHON=python3] [PART_SECONDS=300] scripts/gpu_suite.sh [PART ...]
#
# WHEELS   wheels to use beside what PYTHON has (put fairseq-fixed and what it needs there; torch is
#          taken from PYTHON). They go to a temporary folder: nothing is installed for good.
# OUT      where results go: one JSON per benchmark, gpu_suite.log with all output, gpu_suite.json with
#          the status and the seconds of every part. Default: benchmarks/results.
# PART     device, tests or the name of a benchmark; default: all of them.
#
# A part that fails or runs out of time does not stop the others; the exit status is then 1.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
PART_SECONDS=${PART_SECONDS:-300}
export OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu_suite.log
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
: >"$LOG"
: >"$SCRATCH/parts"

# part NAME COMMAND...: run it with a time limit and remember how it ended.
part() {
    local name=$1 start=$SECONDS status
    shift
    echo "== $name: $*" | tee -a "$LOG"
    timeout --kill-after=20 "$PART_SECONDS" "$@" 2>&1 | tee -a "$LOG"
    status=${PIPESTATUS[0]}
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$SCRATCH/parts"
    return "$status"
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "${WHEELS:-}" ]; then
    part wheels "$PYTHON" -m pip install --quiet --no-index --no-deps --no-warn-script-location \
        --target "$SCRATCH/site" "$WHEELS"/*.whl
    PYTHONPATH=$SCRATCH/site:$PYTHONPATH
    PATH=$SCRATCH/site/bin:$PATH
fi

benchmarks=$(for file in $(grep -l write_results benchmarks/*.py); do
    basename "$file" .py
done | grep -vx common)
for name in ${*:-device tests $benchmarks}; do
    case $name in
    device) part device "$PYTHON" -m metro.cli.main doctor ;;
    tests) part tests "$PYTHON" -m pytest -m gpu -rs ;;
    *) part "$name" "$PYTHON" -m "benchmarks.$name" ;;
    esac
done

"$PYTHON" - "$SCRATCH/parts" "$OUT/gpu_suite.json" <<'END'
import json
import sys

import torch

NAMES = {0: "passed", 5: "failed: no test was found", 124: "failed: out of time", 137: "failed: killed"}
parts = {}
for line in open(sys.argv[1]):
    name, status, seconds = line.rstrip("\n").split("\t")
    status = int(status)
    result = NAMES.get(status, f"failed: exit status {status}")
    parts[name] = {"result": result, "status": status, "seconds": int(seconds)}
    print(f"{name:20} {result} ({seconds} s)")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
if gpu is None:
    print("no GPU was found: tests that need one were skipped")
ok = gpu is not None and all(part["status"] == 0 for part in parts.values())
summary = {"ok": ok, "gpu": gpu, "torch": torch.__version__, "parts": parts}
json.dump(summary, open(sys.argv[2], "w"), indent=2)
sys.exit(not ok)
END
status=$?
echo "results: $OUT"
exit "$status"
