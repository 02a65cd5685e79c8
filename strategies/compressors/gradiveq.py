"""GradiVeQ: principal components of earlier mean gradients as a common basis for the next ones."""

import torch
from torch import Tensor

from strategies import transport
from strategies.compressors.base import Compressor
from strategies.compressors.none_a2a import NoCompressionA2A
from strategies.units import Unit

_BASIS, _SCATTER = "gradiveq.basis", "gradiveq.scatter"


class GradiVeQ(Compressor):
    """Send d coordinates of every K-slice of a chunk in a basis that its owner learnt from exact steps.

    z = Uᵀg, mean ĝ = U·mean z (Yu et al., NeurIPS 2018, arXiv 1811.03617). In every cycle of ``refresh`` optimizer
    steps the first ``exact`` are uncompressed; each owner sums g·gᵀ over the K-slices of its *mean* shard, and its d
    leading eigenvectors U [K, d] go to all ranks. All ranks project with the same basis, so codes can be summed:
    linear. (The paper's centring is left out: it changes nothing when means are zero, and it makes the code affine.)
    Biased, a projection; run it as ``ErrorFeedback(inner=GradiVeQ())``.
    After a resume on another number of ranks, steps are exact until the next cycle. On CUDA, the eigenvectors make the
    host wait, once a cycle.
    Bytes sent: 4N·d/K·(n−1)/n; in exact steps 4N(n−1)/n, and once a cycle 4Kd(n−1) for the basis.

    Args:
        slice_size: Elements K of a slice.
        components: Coordinates d sent of each slice.
        exact: Uncompressed steps that the basis is learnt from.
        refresh: Steps of a cycle.
    """

    contractive = True
    linear = True
    stateful = True

    def __init__(self, slice_size: int = 512, components: int = 64, exact: int = 5, refresh: int = 100) -> None:
        if not 1 <= components <= slice_size:
            raise ValueError(f"GradiVeQ.components must be 1 to slice_size = {slice_size}, got {components}")
        if not 1 <= exact <= refresh:
            raise ValueError(f"GradiVeQ.exact must be 1 to refresh = {refresh}, got {exact}")
        self.slice_size, self.components, self.exact, self.refresh = slice_size, components, exact, refresh
        self._dense = NoCompressionA2A()

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        position = unit.step % self.refresh
        if position < self.exact or _BASIS not in unit.state:
            self._dense.reduce_scatter(grad, output, unit, sent)
            self._learn(output, position, unit)
        else:
            self._project(grad, output, unit, sent)

    def _learn(self, mean: Tensor, position: int, unit: Unit) -> None:
        """Add the mean shard to the scatter matrix; after the last exact step, make and share the basis."""
        if position == 0:
            unit.state[_SCATTER] = torch.zeros(
                self.slice_size, self.slice_size, device=mean.device, dtype=torch.float32
            )
        if position >= self.exact or _SCATTER not in unit.state:
            return
        with unit.traffic.timed(unit.name, "encode", mean.device):
            slices = self._slices(mean[None])[0]
            slices = torch.where(slices.isfinite(), slices, 0.0)
            # scaled to one: eigenvectors do not change, and squares of small gradients do not underflow
            slices = slices / slices.abs().max().clamp_min(1e-30)
            unit.state[_SCATTER] += slices.T @ slices
        if position == self.exact - 1:
            with unit.traffic.timed(unit.name, "encode", mean.device):
                own = torch.linalg.eigh(unit.state.pop(_SCATTER)).eigenvectors[:, -self.components :].contiguous()
            bases = torch.empty(unit.world_size, *own.shape, device=own.device, dtype=torch.float32)
            transport.all_gather(own.flatten(), bases.view(-1), unit, "tables")
            unit.state[_BASIS] = bases

    def _project(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None) -> None:
        traffic, bases = unit.traffic, unit.state[_BASIS]
        chunks = grad.view(unit.world_size, -1).float()
        size = chunks.shape[1]
        with traffic.timed(unit.name, "encode", grad.device):
            codes = self._slices(chunks) @ bases
            sampling = traffic.sampling and traffic.fidelity is not None
            own = (codes @ bases.mT).flatten(1)[:, :size] if sent is not None or sampling else None
            if sent is not None and own is not None:
                sent.view(chunks.shape).copy_(own)
                unit.clear_padding(sent, 0)
        received = transport.all_to_all({"values": codes}, unit)["values"]
        with traffic.timed(unit.name, "decode", grad.device):
            output.copy_((received.mean(0) @ bases[unit.rank].T).flatten()[:size])
            unit.clear_padding(output, unit.rank * size)
        if sampling and traffic.fidelity is not None and own is not None:
            traffic.fidelity.add(chunks, own)

    def _slices(self, chunks: Tensor) -> Tensor:
        """``[n, s]`` as ``float32 [n, ⌈s/K⌉, K]``, the last slice filled up with zeros."""
        padded = torch.nn.functional.pad(chunks.float(), (0, -chunks.shape[1] % self.slice_size))
        return padded.view(chunks.shape[0], -1, self.slice_size)
