"""Associative recall, made on the fly: facts among noise, then questions whose answers stand at known places.

A context of noise words holds facts at random places, each of two neighbouring tokens, a key and its value
("key3 value5"). Every key stands once. Then come questions: a key of the context again, and its value to predict. Only
these values are predicted. It is multi-query associative recall (arXiv 2312.04927) with noise between the facts.

Which fact is asked for is not known while the context is read, so a method that drops tokens must keep whatever may be
asked. And it cannot be looked up in the first layer, whose keys and values no pruning of a prompt removes: there, a
value does not yet know which key stands before it. A model needs two layers for it, one that tells every token what
stands before it and a later one that finds the value by its key (induction heads, arXiv 2209.11895).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from common.randomness import run_seed
from lightning_modules.data.loading import Batches
from lightning_modules.data.ordered import OrderedData
from lightning_modules.data.sampler import FixedOrderSampler
from lightning_modules.data.tokenizer import END_OF_TEXT
from lightning_modules.perplexity import IGNORED

_START, _FIRST = 0, 1  # token ids; keys, values and noise follow
_NOISE = 16  # different noise words
_EPOCH = 1_000_000  # training samples in an epoch; every one is different
_EVALUATION = 2**31  # seeds from here on are the validation's


class RecallSamples(Batches):
    """Samples as a function of their number.

    Args:
        size: Samples.
        seed: Seed of all samples.
        context: Tokens before the first question, start token included.
        facts: Facts in the context.
        questions: Questions after it.
        keys: Different keys.
        values: Different values.
    """

    def __init__(self, size: int, seed: int, context: int, facts: int, questions: int, keys: int, values: int) -> None:
        self.size, self.seed = size, seed
        self.context, self.facts, self.questions = context, facts, questions
        self.keys, self.values = keys, values

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch of samples.

        Returns:
            ``input_ids`` and ``labels`` int64 [B, T], ``attention_mask`` (all ones), ``sample_id`` int64 [B], and
            ``evidence`` int64 [B, Q]: where in the context the value of each question stands, its key one before.
            Rows that only fill up (``FixedOrderSampler.PADDING``) have no labels.
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
        key, value, noise = _starts(self.keys, self.values)
        keys = draw.permutation(self.keys)[: self.facts]
        values = draw.integers(self.values, size=self.facts)
        body = noise + draw.integers(_NOISE, size=self.context)
        body[0] = _START
        # places of facts as if each were one token, then spread to two
        slots = np.sort(draw.permutation(self.context - 1 - self.facts)[: self.facts])
        places = 1 + slots + np.arange(self.facts)
        body[places], body[places + 1] = key + keys, value + values
        asked = draw.permutation(self.facts)[: self.questions]
        questions = np.stack([key + keys[asked], value + values[asked]], 1)
        ids = np.concatenate([body, questions.reshape(-1)]).astype(np.int64)
        labels = np.full_like(ids, IGNORED)
        labels[self.context + 1 :: 2] = ids[self.context + 1 :: 2]
        return ids, labels, places[asked] + 1


class Recall(OrderedData):
    """Associative recall with known answer positions; nothing is read or downloaded.

    Args:
        context: Tokens before the first question.
        facts: Facts in the context, of two tokens each; the rest is noise.
        questions: Questions after the context, about different facts.
        keys: Different keys.
        values: Different values.
        batch_size: Samples in a batch of one rank.
        max_train_blocks: Use only so many different training samples.
        max_val_blocks: Validation samples.

    Raises:
        ValueError: more facts than fit the context or than there are keys, or more questions than facts.
    """

    name = "recall"
    rows_are = "samples"

    def __init__(
        self,
        context: int = 64,
        facts: int = 8,
        questions: int = 8,
        keys: int = 16,
        values: int = 16,
        batch_size: int = 64,
        max_train_blocks: int = _EPOCH,
        max_val_blocks: int = 512,
    ) -> None:
        super().__init__(context + 2 * questions, batch_size, num_workers=0)
        if not 0 < questions <= facts <= min(keys, (context - 1) // 2):
            raise ValueError(
                f"facts: {facts} must be at least questions ({questions}), at most keys ({keys}), and fit the context "
                f"of {context} tokens at two tokens each"
            )
        if min(values, batch_size, max_train_blocks, max_val_blocks) < 1:
            raise ValueError("values, batch_size, max_train_blocks and max_val_blocks must be at least 1")
        self.shape = {"context": context, "facts": facts, "questions": questions, "keys": keys, "values": values}
        self._sizes = {"train": max_train_blocks, "val": max_val_blocks}
        self.tokenizer = _tokenizer(keys, values)

    def setup(self, stage: str) -> None:
        """Fix the samples; the seed of the run decides the training samples, validation is always the same."""
        self.train = RecallSamples(self._sizes["train"], run_seed(), **self.shape)
        self.val = RecallSamples(self._sizes["val"], _EVALUATION, **self.shape)
        super().setup(stage)

    def _dataset(self, split: str) -> RecallSamples:
        return self.train if split == "train" else self.val

    @property
    def _identity(self) -> str:
        return f"{self.shape}, seed {self.train.seed}"

    @property
    def perplexity_on(self) -> str:
        """See ``OrderedData.perplexity_on``."""
        return f"values of questions in samples of {self.block_size} tokens, BOS"

    def describe(self) -> dict[str, Any]:
        """The data in numbers, for records."""
        return {
            "name": self.name,
            **self.shape,
            "blocks": self._sizes,
            "perplexity_on": self.perplexity_on,
            "vocab_size": len(self.tokenizer),
        }


def _starts(keys: int, values: int) -> list[int]:
    """First token id of keys, values and noise words."""
    return list(accumulate([keys, values], initial=_FIRST))


def _tokenizer(keys: int, values: int) -> PreTrainedTokenizerFast:
    kinds = {"key": keys, "value": values, "noise": _NOISE}
    words = [f"{kind}{i}" for kind, count in kinds.items() for i in range(count)]
    vocabulary = {word: i for i, word in enumerate([END_OF_TEXT, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
