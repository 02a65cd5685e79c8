"""What is prompt and what is response, for batches of every kind of data.

Shape legend: B sequences, N tokens.
"""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.processes import warn_on_node
from lightning_modules.batches import logits as logits_of
from lightning_modules.perplexity import IGNORED
from lightning_modules.token_pruning.schedule import Schedule


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

    def inputs(self) -> dict[str, Tensor]:
        """What a model takes: ids, padding mask, and positions that begin at the first real token."""
        positions = (self.real.cumsum(1) - 1).clamp_min(0)
        return {"input_ids": self.input_ids, "attention_mask": self.real.long(), "position_ids": positions}

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
    """Divide a batch into prompts and responses, and leave out rows that have not both.

    Labels say what is response, except in rows without a prompt, which are plain text: there it is the last
    ``response`` tokens.

    Args:
        batch: ``input_ids`` and ``labels`` int64 [B, N], and where rows are padded ``attention_mask``.
        response: Tokens of a plain text that count as response.

    Returns:
        At most B samples. Left out are rows without a label (those that fill up the last batch, responses cut off) and
        plain texts of no more than ``response`` tokens.
    """
    # clones: Lightning predicts and validates in inference mode, whose tensors cannot take part in a backward pass
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    real = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch:
        real = batch["attention_mask"].bool().clone()
    labels = labels.masked_fill(~real, IGNORED)
    usable = (labels != IGNORED).any(1)
    # a text's labels begin with its first or (after a start token) second token
    text = _before(labels, real).sum(1) <= 1
    from_end = real.flip(1).cumsum(1).flip(1)
    labels = torch.where(text[:, None] & (from_end > response), IGNORED, labels)
    samples = Samples(ids, labels, real, _before(labels, real))
    return samples.pick(usable & (samples.prompt.sum(1) > 1))


def _before(labels: Tensor, real: Tensor) -> Tensor:
    return real & ((labels != IGNORED).cumsum(1) == 0)


def response_logits(model: Any, samples: Samples) -> Tensor:
    """Logits from the token before the first response on: at 8,192 tokens those of the prompts would be gigabytes.

    Returns:
        [B, M, V], of the last M tokens.
    """
    begin = int((samples.labels != IGNORED).any(0).float().argmax()) - 1
    return logits_of(model, samples.inputs(), logits_to_keep=samples.labels.shape[1] - begin)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first.

    Args:
        logits: [B, N, V]; position n predicts token n + 1.
        labels: int64 [B, N], ``IGNORED`` where nothing is to be predicted.

    Returns:
        Nats, float32 [B, N - 1]; 0 where nothing is to be predicted.
    """
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )


def response_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every sample's response.

    Args:
        logits: [B, M, V], of the last M tokens at least from the one before the first response on; position n predicts
            token n + 1.
        labels: int64 [B, N], ``IGNORED`` where nothing is to be predicted.

    Returns:
        Sums in nats, float32 [B], and numbers of predicted tokens, int64 [B].
    """
    labels = labels[:, -logits.shape[1] :]
    return token_nll(logits, labels).sum(1), (labels[:, 1:] != IGNORED).sum(1)


def check_data(data: Any, config: Any) -> None:
    """Refuse data that a model with this configuration cannot be pruned on.

    Raises:
        ValueError: several samples in one row, or rows longer than the model has positions.
    """
    if getattr(data, "packing", False):
        raise ValueError("data.packing: token pruning needs one sample a row; set it to false")
    positions = getattr(config, "max_position_embeddings", data.block_size)
    if data.block_size > positions:
        raise ValueError(f"data.block_size {data.block_size} exceeds the {positions} positions of the base model")


def check_choice(schedule: Schedule, data: Any, config: Any) -> None:
    """Refuse a schedule that has nothing to choose from in the longest of the data's rows.

    Of single stages that have not, as published schedules' last ones in short rows, a warning tells.

    Raises:
        ValueError: All stages keep only what is protected.
    """
    layers: int = config.num_hidden_layers
    said = schedule.starvation(data.block_size, layers)
    if said is None:
        return
    if schedule.starved(data.block_size, layers) == schedule.resolve(layers):
        raise ValueError(f"schedule: {said}")
    warn_on_node(f"schedule: {said}")
