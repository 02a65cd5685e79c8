"""Rows of a payload cut into regions of equally long blocks.

Shape legend: s elements of a row, b blocks, B elements of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.units import Unit


@dataclass(frozen=True)
class Region:
    """Part of a row whose blocks are equally long: all whole blocks, or the shorter one that ends the row."""

    span: slice
    block: int
    codes: list[slice]  # of the row's payload, by role

    def elements(self, row: Tensor) -> Tensor:
        """This region of a row ``[s]`` as ``[b, B]``; the last block is a copy, filled up with zeros."""
        values = row[self.span]
        if values.numel() % self.block:
            values = torch.nn.functional.pad(values, (0, -values.numel() % self.block))
        return values.view(-1, self.block)

    def put(self, row: Tensor, blocks: Tensor) -> None:
        """Undo ``elements``: needed where ``blocks`` is a copy."""
        values = row[self.span]
        if values.numel() != blocks.numel():
            values.copy_(blocks.view(-1)[: values.numel()])

    def parts(self, payload: dict[str, Tensor], row: int, blocks: int) -> list[Tensor]:
        """Views ``[b, entries]`` of a row's codes, by role."""
        return [codes[row, span].view(blocks, -1) for codes, span in zip(payload.values(), self.codes, strict=True)]


def real_elements(unit: Unit, first: int, count: int, blocks: Tensor) -> Tensor:
    """Elements of each block that are no padding ``[b, 1]``; the first ``count`` lie at ``first`` in the gradient."""
    b, block = blocks.shape
    real = torch.full((b, 1), float(block), dtype=torch.float32, device=blocks.device)
    holes = unit.padding_within(first, first + count)
    for start, stop in [*holes, *([(count, b * block)] if count < b * block else [])]:
        head, last = start // block, (stop - 1) // block
        real[head : last + 1] -= block
        real[head] += start - head * block
        real[last] += (last + 1) * block - stop
    return real
