#!/bin/bash
# Slurm with NVIDIA GPUs, one process a GPU:
#
#   sbatch launch/slurm_gpu.sh --config configs/navit_l16.py --workdir /shared/navit_l16
#
# The processes find each other, and their GPU, by Slurm's variables. One process a node works, too
# (--ntasks-per-node=1): it takes all GPUs of its node. --workdir, code and data must be on a shared file system.
#SBATCH --job-name=navit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# This script gets SIGTERM 120 s before the time is over (B:) and passes it on: all processes save and stop. On
# preemption Slurm sends it to them itself; --requeue then puts the job back into the queue.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -uo pipefail

again=no
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM

# When one is lost the others say so and stop by themselves, within seconds; Slurm must not kill them before that.
srun --kill-on-bad-exit=0 --wait=60 python train.py "$@" &
wait $!; status=$?
if [ $again = yes ]; then # that ended with the signal, this ends with the processes
  wait $!; status=$?
fi

# 75: a process was lost. srun reports the highest status: 137 is the killed one's own, 143 a SIGTERM before the first
# step. The same job again resumes from the last checkpoint; 20 times at most, as some losses come back.
case $status in 75 | 137 | 143) again=yes ;; esac
if [ $again = yes ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
