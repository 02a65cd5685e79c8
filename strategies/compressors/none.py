"""No compression, torch's own collective: the baseline every ratio is measured against."""

from torch import Tensor

from strategies import transport
from strategies.compressors.base import Compressor
from strategies.units import Unit


class NoCompression(Compressor):
    """Native reduce-scatter of the gradient as it is, counted and timed.

    Bytes sent: 4N(n−1)/n per fp32 unit on NCCL; twice that on gloo, whose reduce-scatter is an all-reduce.
    """

    unbiased = contractive = linear = True

    def reduce_scatter(self, grad: Tensor, output: Tensor, unit: Unit, sent: Tensor | None = None) -> None:
        """See ``Compressor.reduce_scatter``."""
        if sent is not None:
            sent.copy_(grad)
        transport.reduce_scatter_mean(grad, output, unit)

    def all_reduce(self, grad: Tensor, unit: Unit) -> None:
        """See ``Compressor.all_reduce``; one native all-reduce."""
        transport.all_reduce_mean(grad, unit)
