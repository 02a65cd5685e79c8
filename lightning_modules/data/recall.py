"""Associative recall, made on the fly: facts among noise, then questions whose answers stand at known places.

A context of noise words holds facts at random places, each one token that ties a key to a value ("key3=value7"), each
key once; then come questions: a question mark, a key of the context, and the value to predict. Only values are
predicted. Which fact is asked for is not known while the context is read, so a method that drops tokens must keep what
may be asked, not what stands at a lucky place. A fact is one token, so that a small model learns to answer within
minutes: keys and values as neighbours need a circuit that takes far longer to form (arXiv 2209.11895).
"""

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

_START, _QUESTION, _FIRST = 0, 1, 2  # token ids; words of the three kinds follow
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
        words: Different keys, different values, and different noise words.
    """

    def __init__(self, size: int, seed: int, context: int, facts: int, questions: int, words: int) -> None:
        self.size, self.seed = size, seed
        self.context, self.facts, self.questions, self.words = context, facts, questions, words

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
        draw, words = np.random.default_rng((self.seed, index)), self.words
        keys, values = draw.permutation(words)[: self.facts], draw.integers(words, size=self.facts)
        body = _FIRST + 2 * words + draw.integers(words, size=self.context)
        body[0] = _START
        places = draw.permutation(self.context - 1)[: self.facts] + 1
        body[places] = _FIRST + 3 * words + keys * words + values
        asked = draw.permutation(self.facts)[: self.questions]
        marks = np.full_like(asked, _QUESTION)
        questions = np.stack([marks, _FIRST + keys[asked], _FIRST + words + values[asked]], 1)
        ids = np.concatenate([body, questions.reshape(-1)]).astype(np.int64)
        labels = np.full_like(ids, IGNORED)
        labels[self.context + 2 :: 3] = ids[self.context + 2 :: 3]
        return ids, labels, places[asked]


class Recall(L.LightningDataModule):
    """Associative recall with known answer positions; nothing is read or downloaded.

    Args:
        context: Tokens before the first question.
        facts: Facts in the context; the rest is noise.
        questions: Questions after the context, about different facts.
        words: Different keys, different values, and different noise words.
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
        facts: int = 8,
        questions: int = 8,
        words: int = 16,
        batch_size: int = 32,
        max_train_blocks: int = _EPOCH,
        max_val_blocks: int = 512,
    ) -> None:
        super().__init__()
        if not 0 < questions <= facts <= min(words, context - 1):
            raise ValueError(
                f"facts: {facts} must be at least questions ({questions}), at most words ({words}), and fit the "
                f"context ({context} tokens)"
            )
        if min(batch_size, max_train_blocks, max_val_blocks) < 1:
            raise ValueError("batch_size, max_train_blocks and max_val_blocks must be at least 1")
        self.shape = {"context": context, "facts": facts, "questions": questions, "words": words}
        self.block_size, self.batch_size = context + 3 * questions, batch_size
        self._sizes = {"train": max_train_blocks, "val": max_val_blocks}
        self.tokenizer: PreTrainedTokenizerBase = _tokenizer(words)

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


def _tokenizer(words: int) -> PreTrainedTokenizerFast:
    kinds = [f"{kind}{i}" for kind in ("key", "value", "noise") for i in range(words)]
    facts = [f"key{i}=value{j}" for i in range(words) for j in range(words)]
    vocabulary = {word: i for i, word in enumerate([END_OF_TEXT, "?", *kinds, *facts])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
