"""What is prompt and what is response, for batches of every kind of data.

Shape legend: B sequences, N tokens.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.perplexity import IGNORED


class Samples(NamedTuple):
    """A batch of prompts with their responses.

    Attributes:
        input_ids: int64 [B, N].
        labels: int64 [B, N]; ``IGNORED`` except on response tokens.
        real: bool [B, N]; False on padding.
        prompt: bool [B, N]; the real tokens before the first response token. Only these can be pruned.
    """

    input_ids: Tensor
    labels: Tensor
    real: Tensor
    prompt: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """``real`` as models take it, int64 [B, N]."""
        return self.real.long()

    def keys(self) -> list[str]:
        """One name per sample that follows from its tokens and from where its response begins.

        Saliency is stored under it, so that it can only ever meet the text that it was computed on.
        """
        rows = zip(self.input_ids.cpu(), self.real.cpu(), self.prompt.sum(1).tolist(), strict=True)
        contents = [f"{length}:{row[real].tolist()}" for row, real, length in rows]
        return [hashlib.sha256(content.encode()).hexdigest()[:16] for content in contents]

    def pick(self, rows: Tensor) -> "Samples":
        """The samples at these places (bool or int64 [K])."""
        return Samples(*(part[rows] for part in self))


def split_batch(batch: dict[str, Tensor], response: int) -> Samples:
    """Divide a batch into prompts and responses, and leave out rows that have none.

    Batches with an ``attention_mask`` say by their labels what is response. In blocks of plain text the last
    ``response`` tokens are it.

    Args:
        batch: ``input_ids`` and ``labels`` int64 [B, N], perhaps ``attention_mask``.
        response: Tokens of a text block that count as response.

    Returns:
        At most B samples: rows without a label (padding of the last batch, responses cut off) are left out, and so are
        those whose response begins with the first token.

    Raises:
        ValueError: text blocks that are not longer than ``response``.
    """
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    length = ids.shape[1]
    if "attention_mask" in batch:
        real = batch["attention_mask"].bool()
    else:
        if response >= length:
            raise ValueError(f"response: {response} tokens leave no prompt in blocks of {length}; set a smaller one")
        labels[:, : length - response] = IGNORED
        real = torch.ones_like(ids, dtype=torch.bool)
    labels = labels.masked_fill(~real, IGNORED)
    answered = labels != IGNORED
    before = answered.cumsum(1) == 0
    samples = Samples(ids, labels, real, real & before)
    return samples.pick(answered.any(1) & samples.prompt.any(1))


def response_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every sample's response.

    Args:
        logits: [B, N, V]; position n predicts token n + 1.
        labels: int64 [B, N], ``IGNORED`` where nothing is to be predicted.

    Returns:
        Sums in nats, float32 [B], and numbers of predicted tokens, int64 [B].
    """
    targets = labels[:, 1:]
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none"
    )
    return nll.sum(1), (targets != IGNORED).sum(1)
