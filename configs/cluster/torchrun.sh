#!/usr/bin/env bash
# One node's share of a run over several nodes. Start it on every node, from the repository's root, with the same
# arguments; Lightning recognises torchrun and takes ranks and addresses from it.
# run: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 configs/cluster/torchrun.sh fit --config configs/pretraining/two_hosts.yaml
#   on the second node: NODE_RANK=1, the rest the same
# needs: Pare installed on every node; TCP port MASTER_PORT (29500 by default) of the first one open to the others
# RANKS_PER_NODE is by default the number of GPUs, or 1 without. Where nodes have several networks, name the one that
# carries the gradients: GLOO_SOCKET_IFNAME=eth1 (CPU) or NCCL_SOCKET_IFNAME=eth1 (GPU).
set -euo pipefail
: "${NNODES:?number of nodes}" "${NODE_RANK:?0 on the first node, 1 on the second, ...}" "${MASTER_ADDR:?address of the first node}"
if [[ $# -eq 0 ]]; then
  echo "no arguments: give those of main.py, such as: fit --config configs/pretraining/two_hosts.yaml" >&2
  exit 2
fi
if [[ -z ${RANKS_PER_NODE:-} ]]; then
  RANKS_PER_NODE=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
fi
exec python -m torch.distributed.run \
  --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$RANKS_PER_NODE" \
  --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
  main.py "$@" --trainer.num_nodes "$NNODES" --trainer.devices "$RANKS_PER_NODE"
