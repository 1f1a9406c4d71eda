#!/usr/bin/env bash
# Two machines of eight GPUs:  sbatch recipes/launch/slurm.sh qwen2.5-7b --full --out /shared/out
# Slurm sends SIGTERM before it takes the machines away: the run saves and ends with 130, and is put
# back into the queue; the same command goes on from the checkpoint.
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

srun bash -c 'exec accelerate launch \
  --config_file "$0" \
  --num_machines "$SLURM_NNODES" \
  --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
  --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$1" \
  --main_process_port 29500 \
  -m dllm_convert run "${@:2}"' "$config" "$first" "$@"
code=$?

if [ "$code" -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
