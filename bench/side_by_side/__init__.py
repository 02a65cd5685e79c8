"""Every method on the same gradients, on real ranks: `torchrun --nproc-per-node 2 -m bench.side_by_side`."""
