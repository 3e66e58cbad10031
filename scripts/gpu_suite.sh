#!/usr/bin/env bash
# Measure and test on this machine's GPU, without a network, in eight minutes: the most valuable first.
#
#   [OUT=folder] [WHEELS=folder] [METRO_TESTDATA=folder] [PYTHON=python3] [TOTAL_SECONDS=480] \
#       scripts/gpu_suite.sh [PART ...]
#
# PART     check        every kernel beside its formula (until 9 % of the time have passed)
#          pretraining  METRO-base: fused, eager, compiled; with and without padding (47 %)
#          curves       losses of 20 steps, fused and not (59 %)
#          ops          attention and cross-entropy beside their rivals (75 %)
#          evaluation   T0's evaluation sets beside the published way (85 %)
#          tests        GPU tests, in parallel where pytest-xdist is there (100 %)
#          Default: all, in this order. What a part leaves of its time is for the next ones.
# WHEELS   wheels to use beside what PYTHON has, within 15 % of the time; the parts share the rest.
#          They go to a temporary folder: nothing is installed for good. PYTHON has torch, Triton and
#          NumPy; what else it lacks of
#            transformers tokenizers huggingface_hub safetensors regex pyyaml filelock packaging requests
#              httpx tqdm rich click jinja2 sentencepiece matplotlib; pytest and pytest-xdist execnet
#            for tests of fairseq-train: fairseq-fixed (built with READTHEDOCS=1) and what it requires
#            as rivals in ops: liger-kernel, cut-cross-entropy
# METRO_TESTDATA
#          for evaluation: the folder with data (rows of T0's sets), prompts and vocab/vocab_32k. Default:
#          shared, beside the project or in it.
# OUT      where results go: a JSON per benchmark, written row by row, gpu_suite.log with all output, and
#          gpu_suite.json with the result and seconds of every part that has ended, and which targets are
#          met. Default: benchmarks/results, in a dry run a new temporary folder.
# DRY_RUN  1: everything small, on the CPU, with Triton's interpreter.
#
# A part whose needs are missing is skipped, and the reason stands in the results. A part that fails or
# runs out of time does not stop the others; the exit status is then 1, as it is without a GPU. Kernels
# that failed the check are not used in what follows, and the results say so.
#
# What METRO pretraining buys at 21 M parameters takes longer than the suite and is a command of its own, on
# the same machine once the check has passed (English text, rows of the datasets and fairseq are needed):
#   scripts/gpu_suite.sh check && python scripts/evidence.py benchmarks/evidence/gpu.yaml \
#       --text english.txt.gz --data-dir ROWS --page runs/evidence/gpu.md
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
TOTAL_SECONDS=${TOTAL_SECONDS:-480}
DRY_RUN=${DRY_RUN:-}
[ -n "${OUT:-}" ] || OUT=$([ -n "$DRY_RUN" ] && mktemp -d || echo benchmarks/results)
export OUT
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu_suite.log
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
: >"$LOG"
: >"$SCRATCH/parts"
: >"$SCRATCH/begun"

# Write gpu_suite.json from what is known so far; its status is that of the suite.
report() {
    "$PYTHON" - "$SCRATCH" "$OUT/gpu_suite.json" "$DRY_RUN" <<'END'
import json
import os
import pathlib
import sys

scratch, path, is_dry = sys.argv[1:]
NAMES = {"0": "passed", "5": "failed: no test was found"}
NAMES |= {"124": "failed: out of time", "137": "failed: killed"}
try:
    machine = json.load(open(f"{scratch}/machine"))
except (OSError, ValueError):
    machine = {"gpu": None, "torch": "does not import", "missing": {}}
parts = {}
for line in open(f"{scratch}/parts"):
    name, status, limit, seconds, reason = line.rstrip("\n").split("\t")
    result = NAMES.get(status, f"failed: exit status {status}")
    result = f"skipped: needs {reason}" if status == "skipped" else result
    parts[name] = {"result": result, "seconds": int(seconds), "limit": int(limit)}
failed = any(part["result"].startswith("failed") for part in parts.values())
ok = bool(machine["gpu"] or is_dry) and not failed
targets = {}
for file in sorted(pathlib.Path(path).parent.glob("*.json")):
    if file.stat().st_mtime_ns >= os.stat(f"{scratch}/begun").st_mtime_ns:  # not of an earlier suite
        result = json.loads(file.read_text())
        if "subject" in result and result.get("targets"):
            targets[result["subject"]] = result["targets"]
summary = {"ok": ok, "gpu": machine["gpu"], "torch": machine["torch"], "parts": parts}
summary["targets"] = targets
with open(f"{path}.tmp", "w") as file:
    file.write(json.dumps(summary, indent=2) + "\n")
os.replace(f"{path}.tmp", path)
sys.exit(not ok)
END
}

# What of the modules of all parts cannot be imported, and why; looked up once. `cuda` is a GPU, `data` the
# folder of METRO_TESTDATA.
look() {
    "$PYTHON" - "$@" <<'END' >"$SCRATCH/machine" 2>/dev/null
import importlib
import importlib.util
import json
import sys

found = {"gpu": None, "torch": "does not import", "missing": {}}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        if name == "torch":
            found["torch"] = module.__version__
            if module.cuda.is_available():
                found["gpu"] = module.cuda.get_device_name()
    except BaseException as error:
        found["missing"][name] = str(error or type(error).__name__).splitlines()[0]
if found["gpu"] is None:
    found["missing"]["cuda"] = "torch sees no GPU"
from benchmarks.common import data_folder

if not (data_folder() / "data").is_dir():
    found["missing"]["data"] = "rows of T0's sets, see METRO_TESTDATA"
json.dump(found, sys.stdout)
END
}

BEGUN=0 # second at which the first part but the wheels began

# part NAME PERCENT "MODULE..." COMMAND...: run it until that share of the time has passed.
part() {
    local name=$1 needs=$3 start=$SECONDS status reason
    local limit=$((BEGUN + (TOTAL_SECONDS - BEGUN) * $2 / 100 - SECONDS))
    shift 3
    limit=$((limit < 1 ? 1 : limit))
    # shellcheck disable=SC2086
    reason=$("$PYTHON" - "$SCRATCH/machine" $needs <<'END' 2>/dev/null
import json
import sys

missing = json.load(open(sys.argv[1]))["missing"]
print(*(f"{name}: {missing[name]}" for name in sys.argv[2:] if name in missing), sep="; ")
END
    )
    if [ -n "$reason" ]; then
        echo "== $name: skipped, needs $reason" | tee -a "$LOG"
        status=skipped
    else
        echo "== $name, $limit s: $*" | tee -a "$LOG"
        timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
        status=${PIPESTATUS[0]}
    fi
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$limit" "$((SECONDS - start))" "$reason" >>"$SCRATCH/parts"
    report
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
if [ -n "${WHEELS:-}" ]; then
    part wheels 15 "" "$PYTHON" -m pip install --quiet --no-index --no-deps --no-warn-script-location \
        --target "$SCRATCH/site" "$WHEELS"/*.whl
    PYTHONPATH=$SCRATCH/site:$PYTHONPATH
    PATH=$SCRATCH/site/bin:$PATH
fi

METRO="torch numpy transformers sentencepiece safetensors jinja2 yaml matplotlib click rich"
# shellcheck disable=SC2086
look $METRO triton pytest xdist
BEGUN=$SECONDS
GPU="$METRO cuda"
check=(--device cuda) speed=(--batch-size 32 --rounds 1) ops=(relative_position linear_cross)
curves=(--device cuda) evaluation=(--device cuda --rounds 1) tests=(-m gpu -k "not kernels_compile")
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
grep -q '"xdist"' "$SCRATCH/machine" || tests+=(-n 8) # named there if it is missing
if [ -n "$DRY_RUN" ]; then
    export TRITON_INTERPRET=1
    GPU=$METRO
    check=(--device cpu)
    speed=(--device cpu --size small --batch-size 1 --rounds 1) ops=(packed_linear)
    curves=(--device cpu --size small) evaluation=(--device cpu --rows 2 --rounds 1 --layers 1 --width 64)
    tests=(-k "right_kernels_pass and dropout_add") files=(tests/ops/test_self_check.py)
fi
for name in ${*:-check pretraining curves ops evaluation tests}; do
    case $name in
    check) part check 9 "triton $GPU" "$PYTHON" -m benchmarks.self_check "${check[@]}" ;;
    pretraining)
        part pretraining 47 "$GPU" "$PYTHON" -m benchmarks.pretraining "${speed[@]}"
        ;;
    curves) part curves 59 "$GPU" "$PYTHON" -m benchmarks.pretraining_curves "${curves[@]}" ;;
    ops) part ops 75 "$GPU" "$PYTHON" -m benchmarks.ops --repeats 5 --only "${ops[@]}" ;;
    evaluation) part evaluation 85 "data $GPU" "$PYTHON" -m benchmarks.evaluation "${evaluation[@]}" ;;
    tests) part tests 100 "pytest $GPU" "$PYTHON" -m pytest -q -rs "${tests[@]}" "${files[@]}" ;;
    *)
        echo "unknown part $name; use check, pretraining, curves, ops, evaluation or tests" >&2
        exit 1
        ;;
    esac
done
echo
cat "$OUT/gpu_suite.json"
echo "results: $OUT"
report
