#!/usr/bin/env bash
# Two machines of eight GPUs:  sbatch recipes/launch/slurm.sh qwen2.5-7b --full --out /shared/out
# Five minutes before the time is over Slurm sends SIGTERM: the run saves, which may take all of them, and ends
# with 130 on every machine; then the job is put back into the queue, and the same command goes on from the
# checkpoint. Any other code stays in the log and is not tried again.
#SBATCH --job-name=dllm-convert
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -uo pipefail

config="${LAUNCH_CONFIG:-recipes/launch/multi-node.yaml}"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

# exec: what Slurm sends to the task reaches the launcher itself.
srun bash -c 'exec dllm-convert run "${@:3}" \
  --launch-config "$1" \
  --num-machines "$SLURM_NNODES" \
  --num-processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
  --machine-rank "$SLURM_NODEID" \
  --main-address "$2:29500"' run "$config" "$first" "$@"
code=$?

if [ "$code" -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
