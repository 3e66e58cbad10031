#!/usr/bin/env bash
# Pretrain under Slurm: one torchrun per node, which starts one process per GPU.
#
#   sbatch --nodes 8 --gpus-per-node 8 scripts/pretrain_slurm.sh \
#     metro_t5_base_64gpus /data/bin checkpoint.save_dir=/runs/base
#
# Submit from the repository root, with the environment activated. Two minutes before the time limit
# Slurm sends SIGTERM: the processes save and stop, and the job queues itself again. A job that fails
# is not queued again.
#SBATCH --job-name=metro
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=metro-%j.log
set -euo pipefail

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD NNODES=$SLURM_JOB_NUM_NODES RUN_ID=$SLURM_JOB_ID PORT=$((29400 + SLURM_JOB_ID % 1000))

log=metro-$SLURM_JOB_ID.log
count_stops() { grep -c "the same command resumes here" "$log" || true; }

stops=$(count_stops)
status=0
srun --kill-on-bad-exit=1 scripts/pretrain_torchrun.sh "$@" || status=$?
if [ "$(count_stops)" -gt "$stops" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
