#!/usr/bin/env bash
# Pretrain under Slurm: one torchrun per node, which starts one process per GPU.
#
#   WITH=metro sbatch --nodes 8 --gpus-per-node 8 scripts/pretrain_slurm.sh \
#     metro_t5_base_64gpus /data/bin --output-dir /runs/base
#   sbatch --nodes 8 --gpus-per-node 8 scripts/pretrain_slurm.sh \
#     metro_t5_base_64gpus /data/bin checkpoint.save_dir=/runs/base    # with fairseq
#
# Submit from the repository root, with the environment activated. Five minutes before the time limit
# Slurm sends SIGTERM: the processes save and stop, and the job queues itself again. A job that fails
# is not queued again. An update and a save must take less than the 270 seconds that
# pretrain_torchrun.sh leaves them; for more, raise both: sbatch --signal=TERM@SECONDS and
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT (somewhat less).
#SBATCH --job-name=metro
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=metro-%j.log
set -euo pipefail

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export HEAD NNODES=$SLURM_JOB_NUM_NODES RUN_ID=$SLURM_JOB_ID PORT=$((29400 + SLURM_JOB_ID % 1000))

log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
count_stops() { cat "$log" 2> /dev/null | grep -c "the same command resumes here" || true; }

stops=$(count_stops)
status=0
srun --kill-on-bad-exit=1 scripts/pretrain_torchrun.sh "$@" || status=$?
if [ "$(count_stops)" -gt "$stops" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
