"""Every method on the same gradients, on real ranks: `torchrun --nproc-per-node 2 -m strategies.side_by_side`."""
