#!/usr/bin/env bash
# Pretrain on one or several nodes with torchrun; rerun the command to resume.
#
#   WITH=metro scripts/pretrain_torchrun.sh CONFIG DATA --output-dir OUT [--OPTION VALUE ...]
#   scripts/pretrain_torchrun.sh CONFIG DATA [OPTION=VALUE ...]    # with fairseq
#
# One node: run it there. Several nodes: run it on every node with
#   NNODES=4 HEAD=node0 [PORT=29400] scripts/pretrain_torchrun.sh metro_t5_base_64gpus /data/bin
# PROCESSES is the number of processes per node (default: its GPUs, or 1). Options are those of
# metro pretrain, or of fairseq-hydra-train, e.g. checkpoint.save_dir=runs/base common.fp16=false; of
# that do not set distributed_training.distributed_world_size: torchrun's number of processes is used.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  exit 2
fi
config=$1 data=$2
shift 2

plugins=$(cd "$(dirname "$0")/../fairseq_plugins" && pwd)
if [ "${WITH:-fairseq}" = metro ]; then
  program=("$(command -v metro)" pretrain --config "$config" --data "$data")
else
  program=("$(command -v fairseq-hydra-train)" --config-dir "$plugins/configs/pretraining"
    --config-name "$config" "common.user_dir=$plugins" "task.data=$data")
fi
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
nodes=${NNODES:-1}
port=${PORT:-29400}
if [ "$nodes" = 1 ]; then port=${PORT:-0}; fi # 0: any free one
# A store of its own for every restart: workers must not find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# After SIGTERM the processes finish their update and save. torchrun kills what is left after this
# many seconds: 30 by default, too few for a large model on a slow disk. Versions of torch before
# about 2.12 do not know the variable and keep their 30 seconds: save often there, with
# checkpoint.save_interval_updates.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((gpus > 0 ? 8 : 1))}

exec torchrun \
  --nnodes "$nodes" --nproc_per_node "${PROCESSES:-$((gpus > 0 ? gpus : 1))}" \
  --max-restarts "${RESTARTS:-3}" --rdzv_id "${RUN_ID:-metro}" \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost}:$port" \
  "${program[@]}" "$@"
