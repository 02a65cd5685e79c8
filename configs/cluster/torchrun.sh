#!/usr/bin/env bash
# One node's share of a run over several nodes. Start it on every node, from the repository's root, with the same
# arguments; Lightning recognises torchrun and takes ranks and addresses from it.
# run: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 configs/cluster/torchrun.sh fit --config configs/pretraining/two_hosts.yaml
#   on the second node: NODE_RANK=1, the rest the same
# needs: Pare installed on every node; TCP port MASTER_PORT (29500 by default) of the first one open to the others
# RANKS_PER_NODE is by default the number of GPUs, or 1 without. Gradients travel over the network that leads to
# MASTER_ADDR; name another with GLOO_SOCKET_IFNAME=eth1 (CPU) or NCCL_SOCKET_IFNAME=eth1 (GPU).
# When a rank dies, all start again up to MAX_RESTARTS times (3), a fit from its last complete checkpoint.
set -euo pipefail
if [[ -n ${PARE_RANK:-} ]]; then # started below, as a rank
  if [[ $1 == fit && ${TORCHELASTIC_RESTART_COUNT:-0} -gt 0 ]]; then
    set -- "$@" --ckpt_path auto
  fi
  exec python main.py "$@"
fi
: "${NNODES:?number of nodes}" "${NODE_RANK:?0 on the first node, 1 on the second, ...}" "${MASTER_ADDR:?address of the first node}"
if [[ $# -eq 0 ]]; then
  echo "no arguments: give those of main.py, such as: fit --config configs/pretraining/two_hosts.yaml" >&2
  exit 2
fi
MASTER_PORT=${MASTER_PORT:-29500}
if [[ -z ${RANKS_PER_NODE:-} ]]; then
  RANKS_PER_NODE=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
fi
# this node's address and interface towards the first node; gloo would go by the host's name, which may lead elsewhere
read -r address interface < <(python - "$MASTER_ADDR" "$MASTER_PORT" <<'PYTHON'
import ipaddress, socket, sys
import psutil

host, port = sys.argv[1:]
try:
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        own = probe.getsockname()[0]
except OSError as error:
    sys.exit(f"{host}, port {port}: {error}")
if ipaddress.ip_address(own.partition("%")[0]).is_loopback and not host.startswith(("127.", "::1", "localhost")):
    sys.exit(f"{host} stands for {target[0]} here, which no other node reaches: give the address that they reach")
known = {a.address.partition("%")[0]: name for name, addresses in psutil.net_if_addrs().items() for a in addresses}
print(own, known.get(own, ""))
PYTHON
) || true # nothing to read: said below
if [[ -z ${interface:-} ]]; then
  echo "no network leads to MASTER_ADDR=$MASTER_ADDR from this node" >&2
  exit 2
fi
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
# a restart goes on from what was saved since this start, never from an earlier run's checkpoint in the same folder; when
# nothing was saved yet, from where it started (a --ckpt_path of the command line)
previous=
for argument in "$@"; do
  if [[ $previous == --ckpt_path ]]; then PARE_CKPT_PATH=$argument; fi
  if [[ $argument == --ckpt_path=* ]]; then PARE_CKPT_PATH=${argument#*=}; fi
  previous=$argument
done
PARE_STARTED=$(date +%s)
export PARE_RANK=1 PARE_STARTED PARE_CKPT_PATH=${PARE_CKPT_PATH:-}
exec python -m torch.distributed.run \
  --nnodes "$NNODES" --nproc-per-node "$RANKS_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RUN_ID:-pare}" \
  --rdzv-conf "is_host=$((NODE_RANK == 0))" --local-addr "$address" \
  --no-python "$0" "$@" --trainer.num_nodes "$NNODES" --trainer.devices "$RANKS_PER_NODE"
