#!/usr/bin/env bash
# Run the GPU tests and all benchmarks on this machine, without a network.
#
#   [OUT=folder] [WHEELS=folder] [PYTHON=python3] [PART_SECONDS=600] scripts/gpu_suite.sh [PART ...]
#
# WHEELS   wheels to use beside what PYTHON has. They go to a temporary folder: nothing is installed for
#          good. PYTHON has torch and NumPy; wheels are needed for what else it lacks of
#            device, tests, pretraining: transformers tokenizers huggingface_hub safetensors regex pyyaml
#              filelock packaging requests httpx tqdm rich click jinja2 sentencepiece matplotlib pytest
#            prepare_text, prompt_data and the tests of fairseq-train, in addition: fairseq-fixed (built with
#              READTHEDOCS=1) hydra-core omegaconf antlr4-python3-runtime bitarray sacrebleu portalocker
#              tabulate colorama lxml scikit-learn scipy joblib threadpoolctl tensorboard
#              and what these name as their requirements
#          triton is needed by the kernels and their tests (it comes with PyTorch for CUDA); the benchmark
#          ops compares with liger-kernel and cut-cross-entropy where they are there.
# OUT      where results go: one JSON per benchmark, gpu_suite.log with all output, gpu_suite.json with
#          the result and the seconds of every part. Default: benchmarks/results.
# PART     device, tests or the name of a benchmark; default: all of them.
#
# A part whose needs are missing is skipped, and the reason stands in the results. A part that fails or
# runs out of time does not stop the others; the exit status is then 1, as it is without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
PART_SECONDS=${PART_SECONDS:-600}
export OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu_suite.log
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
: >"$LOG"
: >"$SCRATCH/parts"

# missing MODULE...: print the first that cannot be imported, and why. `cuda` stands for a GPU.
missing() {
    "$PYTHON" - "$@" <<'END' 2>/dev/null
import importlib
import sys

for name in sys.argv[1:]:
    try:
        if name == "cuda":
            if not importlib.import_module("torch").cuda.is_available():
                raise RuntimeError("torch sees no GPU")
        else:
            importlib.import_module(name)
    except BaseException as error:
        print(f"{name}: {error or type(error).__name__}".splitlines()[0])
        break
END
}

# part NAME "MODULE..." COMMAND...: run it with a time limit and remember how it ended.
part() {
    local name=$1 needs=$2 start=$SECONDS status reason
    shift 2
    # shellcheck disable=SC2086
    reason=$(missing $needs)
    if [ -n "$reason" ]; then
        echo "== $name: skipped, needs $reason" | tee -a "$LOG"
        printf '%s\tskipped\t0\t%s\n' "$name" "$reason" >>"$SCRATCH/parts"
        return
    fi
    echo "== $name: $*" | tee -a "$LOG"
    timeout --kill-after=20 "$PART_SECONDS" "$@" 2>&1 | tee -a "$LOG"
    status=${PIPESTATUS[0]}
    printf '%s\t%s\t%s\t\n' "$name" "$status" "$((SECONDS - start))" >>"$SCRATCH/parts"
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
if [ -n "${WHEELS:-}" ]; then
    part wheels pip "$PYTHON" -m pip install --quiet --no-index --no-deps --no-warn-script-location \
        --target "$SCRATCH/site" "$WHEELS"/*.whl
    PYTHONPATH=$SCRATCH/site:$PYTHONPATH
    PATH=$SCRATCH/site/bin:$PATH
fi

METRO="torch numpy transformers sentencepiece safetensors jinja2 yaml matplotlib click rich"
benchmarks=$(for file in $(grep -l write_results benchmarks/*.py); do
    basename "$file" .py
done | grep -vx common)
gpu_tests=$(grep -rl --include='test_*.py' 'mark\.gpu' tests)
for name in ${*:-device tests $benchmarks}; do
    case $name in
    device) part device "$METRO" "$PYTHON" -m metro.cli.main doctor ;;
    # shellcheck disable=SC2086
    tests) part tests "pytest $METRO cuda" "$PYTHON" -m pytest -m gpu -rs $gpu_tests ;;
    pretraining)
        part pretraining "$METRO cuda" \
            "$PYTHON" -m benchmarks.pretraining --batch-size 32 --rounds 2
        ;;
    evaluation) part evaluation "$METRO cuda" "$PYTHON" -m benchmarks.evaluation --device cuda ;;
    prepare_text | prompt_data)
        part "$name" "$METRO fairseq_cli.preprocess" "$PYTHON" -m "benchmarks.$name"
        ;;
    *) part "$name" "$METRO" "$PYTHON" -m "benchmarks.$name" ;;
    esac
done

"$PYTHON" - "$SCRATCH/parts" "$OUT/gpu_suite.json" <<'END'
import json
import sys

try:
    import torch

    version = torch.__version__
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
except Exception as error:
    version, gpu = f"does not import: {error}", None
NAMES = {
    "0": "passed",
    "5": "failed: no test was found",
    "124": "failed: out of time",
    "137": "failed: killed",
}
parts = {}
for line in open(sys.argv[1]):
    name, status, seconds, reason = line.rstrip("\n").split("\t")
    if status == "skipped":
        result = f"skipped: needs {reason}"
    else:
        result = NAMES.get(status, f"failed: exit status {status}")
    parts[name] = {"result": result, "seconds": int(seconds)}
    print(f"{name:14} {result} ({seconds} s)")
if gpu is None:
    print("no GPU was found")
ok = gpu is not None and not any(part["result"].startswith("failed") for part in parts.values())
summary = {"ok": ok, "gpu": gpu, "torch": version, "parts": parts}
json.dump(summary, open(sys.argv[2], "w"), indent=2)
sys.exit(not ok)
END
status=$?
echo "results: $OUT"
exit "$status"
