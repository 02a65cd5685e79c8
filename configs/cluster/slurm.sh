#!/usr/bin/env bash
# A run over several nodes under SLURM: one task a rank; Lightning recognises SLURM and takes ranks and addresses from it.
# run: sbatch configs/cluster/slurm.sh fit --config configs/pretraining/two_hosts.yaml
#   on GPUs: sbatch --gpus-per-node 1 configs/cluster/slurm.sh fit --config configs/pretraining/gpt2_62m.yaml
#   another shape: sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 configs/cluster/slurm.sh fit --config ...
# needs: Pare installed where the nodes find it; submit from the repository's root
# Lightning wants as many tasks a node as devices, which is why both come from SLURM here. --signal lets GracefulStop
# save a checkpoint two minutes before the time is up; the job then queues again, and a fit goes on from there. The ranks
# agree on a step, so that up to four more steps are made first: where these and saving take longer than two minutes, raise
# both --signal and the 300 s at the end.
#SBATCH --job-name=pare
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
: "${SLURM_JOB_ID:?submit with sbatch}" "${SLURM_NTASKS_PER_NODE:?give --ntasks-per-node}"
if [[ $# -eq 0 ]]; then
  echo "no arguments: give those of main.py, such as: fit --config configs/pretraining/two_hosts.yaml" >&2
  exit 2
fi
command=$1
set -- "$@" --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
if [[ $command == fit ]]; then
  # a restart goes on from what this job has saved, never from an earlier run's checkpoint in the same folder; when it
  # has saved nothing yet, from where it started (a --ckpt_path of the command line)
  noted=.slurm-$SLURM_JOB_ID.started
  previous=
  for argument in "$@"; do
    if [[ $previous == --ckpt_path ]]; then PARE_CKPT_PATH=$argument; fi
    if [[ $argument == --ckpt_path=* ]]; then PARE_CKPT_PATH=${argument#*=}; fi
    previous=$argument
  done
  if [[ ${SLURM_RESTART_COUNT:-0} -eq 0 ]]; then
    date +%s >"$noted"
  else
    set -- "$@" --ckpt_path auto
  fi
  PARE_STARTED=$(cat "$noted" || true)
  export PARE_STARTED PARE_CKPT_PATH=${PARE_CKPT_PATH:-}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# since SLURM 22.05 steps do not inherit the CPUs of a task; a rank that fails ends the others
status=0
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 python main.py "$@" || status=$?
# 143: stopped by SIGTERM with a checkpoint; near the end of the time it was SLURM's signal, before that somebody's
if [[ $command == fit && $status -eq 143 ]] && (($(date +%s) >= ${SLURM_JOB_END_TIME:-9999999999} - 300)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
if [[ $command == fit && $status -eq 0 ]]; then
  rm -f "$noted"
fi
exit "$status"
