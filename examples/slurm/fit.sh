#!/bin/bash
# Trains one run a seed on a cluster with SLURM; what is out of time is requeued and goes on:
#
#     sbatch fit.sh                                          # configs/quickstart.yaml, five seeds
#     CONFIG=mine.yaml sbatch --array=0-9 --time=12:00:00 fit.sh --trainer.max_steps 100000
#
# What comes after fit.sh is handed to `python -m dflows.fit`. Call it from the folder that runs/ is
# to be in, on a disk that all nodes share, with the environment of dflows active.

#SBATCH --job-name=dflows        # any but bash and interactive, which Lightning takes for no job
#SBATCH --array=0-4              # the seeds: one task of the array is one run
#SBATCH --nodes=1                # more nodes: the same script
#SBATCH --ntasks-per-node=1      # one task a GPU; say --ntasks-per-node, never --ntasks
##SBATCH --gpus-per-node=1       # on GPUs: as many as tasks
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300        # 300 seconds before the end: time for a step and a checkpoint
#SBATCH --requeue                # allows SLURM to start the job again, after failures of a node too
#SBATCH --open-mode=append       # a requeued job writes on in its log
#SBATCH --output=%x-%A_%a.log

set -euo pipefail

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# srun starts a process a task, and hands the signal to each. At SIGUSR1 the run ends after its step,
# writes last.ckpt, and asks SLURM to requeue the job. At SIGTERM (scancel, preemption) it writes the
# same, and asks for nothing. The requeued job calls this very command again (SLURM_RESTART_COUNT
# says so), and it goes on in the folder of its run, as if it had not been interrupted.
srun python -m dflows.fit \
    --config "${CONFIG:-quickstart.yaml}" \
    --seed_everything "${SLURM_ARRAY_TASK_ID:-0}" \
    --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}" \
    --trainer.num_nodes "${SLURM_NNODES:-1}" \
    "$@"
