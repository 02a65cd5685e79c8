#!/usr/bin/env bash
# A run over several nodes under SLURM: one task a rank; Lightning recognises SLURM and takes ranks and addresses from it.
# run: sbatch configs/cluster/slurm.sh fit --config configs/pretraining/two_hosts.yaml
#   another shape: sbatch --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 configs/cluster/slurm.sh fit --config ...
# needs: Pare installed where the nodes find it; submit from the repository's root
# Lightning wants as many tasks a node as devices, which is why both come from SLURM here. --signal lets GracefulStop
# save a checkpoint two minutes before the time is up.
#SBATCH --job-name=pare
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.log
set -euo pipefail
: "${SLURM_JOB_ID:?submit with sbatch}" "${SLURM_NTASKS_PER_NODE:?give --ntasks-per-node}"
if [[ $# -eq 0 ]]; then
  echo "no arguments: give those of main.py, such as: fit --config configs/pretraining/two_hosts.yaml" >&2
  exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
srun python main.py "$@" --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
