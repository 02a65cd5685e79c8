"""Top-k: the largest elements of every block, and where they are."""

from typing import Self

import torch
from torch import Tensor

from strategies.compressors.base import Codec, Compressor
from strategies.compressors.blocks import BlockCodec, Slab
from strategies.compressors.int8 import Int8
from strategies.compressors.packing import join_bytes, pack, split_bytes, unpack
from strategies.units import Unit


class TopK(BlockCodec):
    """Send the k elements of largest magnitude of each block, k = max(1, round(density·B)); the rest is zero.

    Aji and Heafield, arXiv 1704.05021; Stich et al., arXiv 1809.07599. Biased, contractive with δ = k/B: run it as
    ``ErrorFeedback(inner=TopK())``. Block-local selection loses little against global selection, needs no search over
    the whole gradient, and makes indices short.
    Wire: k values per block (fp32, or what ``values`` makes of them), in order of position, and their positions:
    8 bits each in blocks of up to 256 elements, 16 up to 65536, else 32, or a bitmap of B bits where that is smaller.
    Bytes sent: N/B·(4k + min(k·{1|2|4}, B/8))(n−1)/n.

    Args:
        density: Share of elements to send, in (0, 1].
        block_size: Elements among which the largest are chosen, a multiple of 8; 0 is a destination's whole chunk.
        values: A codec for the chosen values, e.g. ``Int8``; none sends fp32.
    """

    planes = 8
    sparsifier = True
    compilable = False  # made of selections, which torch.compile only calls

    def __init__(self, density: float = 0.01, block_size: int = 1024, values: Codec | None = None) -> None:
        check_density("TopK", density)
        super().__init__(block_size)
        check_values("TopK", values)
        self.density, self.values = density, values
        self.contractive = values is None or values.contractive
        self.fuses = values is None

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``: 16-bit indices, a bitmap, 8-bit indices, whole chunks, and a hybrid."""
        return [cls(), cls(0.1), cls(0.05, 256), cls(0.1, 0), cls(0.1, values=Int8())]

    def for_feedback(self) -> Compressor:
        """Itself, with values in their own form for feedback."""
        if self.values is None:
            return self
        return type(self)(**{**self.arguments(), "values": self.values.for_feedback()})

    def kept(self, block: int) -> int:
        """Elements sent of a block of ``block``."""
        return min(block, max(1, round(self.density * block)))

    def layout(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """See ``BlockCodec.layout``."""
        k = self.kept(block)
        return {"values": (k, torch.float32), "indices": (min(k * _index_bytes(block), block // 8), torch.uint8)}

    def encode(self, chunks: Tensor, unit: Unit, owed: Tensor | None = None) -> dict[str, Tensor]:
        """See ``BlockCodec.encode``."""
        payload = super().encode(chunks, unit, owed)
        if self.values is None:
            return payload
        chosen = payload.pop("values")
        return {**self.values.encode(chosen, unit.compact(chosen.numel(), "values")), **payload}

    def decode(self, payload: dict[str, Tensor], size: int, unit: Unit) -> Tensor:
        """See ``Codec.decode``."""
        if self.values is not None:
            count = self.entries(size)["values"]
            coded = {role: part for role, part in payload.items() if role != "indices"}
            chosen = self.values.decode(coded, count, unit.compact(count, "values"))
            payload = {"values": chosen, "indices": payload["indices"]}
        return super().decode(payload, size, unit)

    def quantise(self, blocks: Tensor, slab: Slab) -> dict[str, Tensor]:
        """See ``BlockCodec.quantise``; NaN and Inf count as largest, so they are sent."""
        positions = largest(blocks.abs(), self.kept(blocks.shape[1])).sort(1).values
        return {"values": self.select(blocks.gather(1, positions)), "indices": positions}

    def select(self, chosen: Tensor) -> Tensor:
        """What is sent of the chosen values ``[b, k]``; all of it here."""
        return chosen

    def reconstruct(self, symbols: dict[str, Tensor], block: int) -> Tensor:
        """See ``BlockCodec.reconstruct``."""
        values = symbols["values"]
        if "chosen" not in symbols:
            return values.new_zeros(values.shape[0], block).scatter_(1, symbols["indices"], values)
        place = symbols["chosen"].cumsum(1).sub_(1).clamp_min_(0)
        return torch.where(symbols["chosen"] > 0, values.gather(1, place), 0.0)

    def pack(self, symbols: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.pack``."""
        positions = symbols["indices"]
        if self._as_bitmap(block):
            chosen = torch.zeros(positions.shape[0], block, device=positions.device, dtype=torch.float32).scatter_(
                1, positions, 1.0
            )
            return {**symbols, "indices": pack(chosen, 1)}
        return {**symbols, "indices": split_bytes(positions, _index_bytes(block))}

    def unpack(self, codes: dict[str, Tensor], block: int) -> dict[str, Tensor]:
        """See ``BlockCodec.unpack``; a bitmap stays one: listing its positions would make the host wait."""
        values, indices = codes["values"], codes["indices"]
        if self._as_bitmap(block):
            return {"values": values, "chosen": unpack(indices, 1)}
        return {"values": values, "indices": join_bytes(indices, _index_bytes(block))}

    def _as_bitmap(self, block: int) -> bool:
        return block // 8 < self.kept(block) * _index_bytes(block)


def largest(magnitudes: Tensor, k: int) -> Tensor:
    """Positions ``int64 [b, k]`` of the k largest of ``magnitudes [b, B]``, in any order.

    The k largest lie in the k groups with the largest maxima, so all but k groups are ruled out by one look each:
    searching k groups is several times faster than searching all elements.
    """
    b, block = magnitudes.shape
    group = 16
    while group > 1 and (block % group or 2 * k * group > block):
        group //= 2
    if group == 1:
        return magnitudes.topk(k, 1, sorted=False).indices
    count = block // group  # element i is in group i % count
    groups = magnitudes.view(b, group, count).amax(1).topk(k, 1, sorted=False).indices
    candidates = (groups[:, None] + torch.arange(0, block, count, device=groups.device)[:, None]).view(b, -1)
    return candidates.gather(1, magnitudes.gather(1, candidates).topk(k, 1, sorted=False).indices)


def _index_bytes(block: int) -> int:
    return 1 if block <= 1 << 8 else 2 if block <= 1 << 16 else 4


def check_density(method: str, density: float) -> None:
    """Refuse a share of elements that is none.

    Raises:
        ValueError: ``density`` is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"{method}: a share of elements must be above 0 and at most 1, got {density}")


def check_values(method: str, values: Compressor | None) -> None:
    """Refuse a codec that cannot carry the chosen values.

    Raises:
        ValueError: ``values`` is a sparsifier, keeps state, or is no codec.
    """
    if values is None:
        return
    if values.sparsifier:
        raise ValueError(
            f"{method}(values={values!r}): two sparsifiers in one another send fewer elements at a worse choice. "
            f"Lower {method}'s density instead, or quantise the values (Int8, FP8, QSGD)."
        )
    if not isinstance(values, Codec) or values.stateful:
        raise ValueError(f"{method}(values={values!r}): values need a codec without state (Int8, FP8, QSGD, BF16)")
