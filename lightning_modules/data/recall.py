"""Associative recall, made on the fly: facts among noise, then questions whose answers stand at known places.

A context of noise words holds facts at random places, each one token that ties a key to a value. A key has two halves
("left3.right0=value5"), and each key stands once. Then come questions: a question mark, the halves of a key of the
context, and the value to predict. Only values are predicted.

Which fact is asked for is not known while the context is read, so a method that drops tokens must keep what may be
asked, not what stands at a lucky place. That holds for the layers above the first pruning stage only: a small model
learns to find facts, which are one token each, in its first layer already, although the halves of a key are apart.
Facts of neighbouring tokens need a circuit of two layers (arXiv 2209.11895), which takes far longer to form.
"""

from itertools import accumulate
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_modules.data.loading import ResumableLoader, as_is
from lightning_modules.data.sampler import FixedOrderSampler, Position, ResumableSampler
from lightning_modules.data.tokenizer import END_OF_TEXT
from lightning_modules.perplexity import IGNORED
from lightning_modules.randomness import run_seed

_START, _QUESTION, _FIRST = 0, 1, 2  # token ids; left and right halves, values, noise and facts follow
_NOISE = 16  # different noise words
_EPOCH = 100_000  # training samples in an epoch; every one is different
_EVALUATION = 2**31  # seeds from here on are the validation's


class RecallSamples(Dataset[dict[str, Tensor]]):
    """Samples as a function of their number.

    Args:
        size: Samples.
        seed: Seed of all samples.
        context: Tokens before the first question, start token included.
        facts: Facts in the context.
        questions: Questions after it.
        halves: Different left and different right halves of keys.
        values: Different values.
    """

    def __init__(
        self, size: int, seed: int, context: int, facts: int, questions: int, halves: int, values: int
    ) -> None:
        self.size, self.seed = size, seed
        self.context, self.facts, self.questions = context, facts, questions
        self.halves, self.values = halves, values

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch of samples.

        Returns:
            ``input_ids`` and ``labels`` int64 [B, T], ``attention_mask`` (all ones), ``sample_id`` int64 [B], and
            ``evidence`` int64 [B, Q]: where in the context the fact of each question stands. Rows that only fill up
            (``FixedOrderSampler.PADDING``) have no labels.
        """
        rows = [self._sample(max(index, 0)) for index in indices]
        ids, labels, evidence = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        sample_id = torch.tensor(indices)
        labels[sample_id == FixedOrderSampler.PADDING] = IGNORED
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
            "sample_id": sample_id,
            "evidence": evidence,
        }

    def _sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        draw = np.random.default_rng((self.seed, index))
        left, right, value, noise, fact = _starts(self.halves, self.values)
        keys = draw.permutation(self.halves**2)[: self.facts]
        values = draw.integers(self.values, size=self.facts)
        body = noise + draw.integers(_NOISE, size=self.context)
        body[0] = _START
        places = draw.permutation(self.context - 1)[: self.facts] + 1
        body[places] = fact + keys * self.values + values
        asked = draw.permutation(self.facts)[: self.questions]
        marks, (upper, lower) = np.full_like(asked, _QUESTION), np.divmod(keys[asked], self.halves)
        questions = np.stack([marks, left + upper, right + lower, value + values[asked]], 1)
        ids = np.concatenate([body, questions.reshape(-1)]).astype(np.int64)
        labels = np.full_like(ids, IGNORED)
        labels[self.context + 3 :: 4] = ids[self.context + 3 :: 4]
        return ids, labels, places[asked]


class Recall(L.LightningDataModule):
    """Associative recall with known answer positions; nothing is read or downloaded.

    Args:
        context: Tokens before the first question.
        facts: Facts in the context; the rest is noise.
        questions: Questions after the context, about different facts.
        halves: Different left and different right halves of keys; their square is the number of keys.
        values: Different values.
        batch_size: Samples in a batch of one rank.
        max_train_blocks: Use only so many different training samples.
        max_val_blocks: Validation samples.

    Raises:
        ValueError: more facts than fit the context or than there are keys, or more questions than facts.
    """

    name = "recall"

    def __init__(
        self,
        context: int = 64,
        facts: int = 12,
        questions: int = 8,
        halves: int = 4,
        values: int = 8,
        batch_size: int = 32,
        max_train_blocks: int = _EPOCH,
        max_val_blocks: int = 512,
    ) -> None:
        super().__init__()
        if not 0 < questions <= facts <= min(halves**2, context - 1):
            raise ValueError(
                f"facts: {facts} must be at least questions ({questions}), at most halves² ({halves**2}), and fit the "
                f"context ({context} tokens)"
            )
        if min(values, batch_size, max_train_blocks, max_val_blocks) < 1:
            raise ValueError("values, batch_size, max_train_blocks and max_val_blocks must be at least 1")
        self.shape = {"context": context, "facts": facts, "questions": questions, "halves": halves, "values": values}
        self.block_size, self.batch_size = context + 4 * questions, batch_size
        self._sizes = {"train": max_train_blocks, "val": max_val_blocks}
        self.tokenizer: PreTrainedTokenizerBase = _tokenizer(halves, values)

    def setup(self, stage: str) -> None:
        """Fix the samples; the seed of the run decides the training samples, validation is always the same."""
        self.train = RecallSamples(self._sizes["train"], run_seed(), **self.shape)
        self.val = RecallSamples(self._sizes["val"], _EVALUATION, **self.shape)

    def describe(self) -> dict[str, Any]:
        """The data in numbers, for records."""
        return {"name": self.name, **self.shape, "blocks": self._sizes, "vocab_size": len(self.tokenizer)}

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches from the present position on."""
        ranks = self._ranks()
        sampler = ResumableSampler(len(self.train), ranks["num_replicas"], ranks["rank"], self._position)
        return ResumableLoader(self.train, sampler=sampler, drop_last=True, **self._loading())

    def val_dataloader(self) -> DataLoader:
        """Validation samples in fixed order."""
        return self._in_order(self.val)

    def predict_dataloader(self) -> DataLoader:
        """Training samples in fixed order."""
        return self._in_order(self.train)

    def _in_order(self, samples: RecallSamples) -> DataLoader:
        sampler = FixedOrderSampler(len(samples), **self._ranks())
        return DataLoader(samples, sampler=sampler, **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "collate_fn": as_is}

    def _ranks(self) -> dict[str, int]:
        shared = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return shared or {"num_replicas": 1, "rank": 0}

    def _position(self) -> Position:
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0
        return Position(run_seed(), done * self.batch_size * self._ranks()["num_replicas"])


def _starts(halves: int, values: int) -> list[int]:
    """First token id of left halves, right halves, values, noise words and facts."""
    return list(accumulate([halves, halves, values, _NOISE], initial=_FIRST))


def _tokenizer(halves: int, values: int) -> PreTrainedTokenizerFast:
    kinds = {"left": halves, "right": halves, "value": values, "noise": _NOISE}
    words = [f"{kind}{i}" for kind, count in kinds.items() for i in range(count)]
    facts = [f"left{i}.right{j}=value{k}" for i in range(halves) for j in range(halves) for k in range(values)]
    vocabulary = {word: i for i, word in enumerate([END_OF_TEXT, "?", *words, *facts])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
