"""Questions about the user's own text, as data to train scorers on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.data.loading import Batches
from lightning_modules.data.ordered import OrderedData
from lightning_modules.data.readers import document_text, read_records
from lightning_modules.data.sampler import FixedOrderSampler
from lightning_modules.data.tokenizer import load_tokenizer
from lightning_modules.perplexity import IGNORED
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.planted import plant

_ANSWER = 16  # most tokens of an answer


class AskedText(OrderedData):
    """Passages of a text with a planted fact each, asked for at the end; the answer is the response.

    Facts are synthetic, of several kinds, at all depths (see ``quality.planted``); values are of the half that is for
    calibration, so that quality tasks ask for others. Every passage is used once, so the text limits the prompts.

    Batches hold ``input_ids``, ``labels`` (-100 but on answers) and ``attention_mask``, int64[batch, T], padded on the
    right.

    Args:
        train: File of text (.json, .jsonl, .txt).
        tokenizer: Folder or Hub name of the model's tokenizer.
        val: File of text for validation; None takes the last tenth of ``train``.
        lengths: Most tokens of a prompt, in turn.
        train_prompts: Prompts to train on.
        val_prompts: Prompts to validate on.
        prefix: Begin the answer in words, so that its value comes next.
        distractors: Facts of the same kind about others that are planted beside each.
        batch_size: Prompts in a batch of one rank.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No lengths or prompts; and from ``setup``, a text too short, see ``quality.planted.plant``.
    """

    name = "asked"
    length_field = "lengths"
    rows_are = "prompts"

    def __init__(
        self,
        train: str,
        tokenizer: str,
        val: str | None = None,
        lengths: list[int] = [512, 1024],  # noqa: B006 (jsonargparse shows it)
        train_prompts: int = 1000,
        val_prompts: int = 64,
        prefix: bool = False,
        distractors: int = 0,
        batch_size: int = 4,
    ) -> None:
        if not lengths or min(*lengths, train_prompts, val_prompts, batch_size) < 1:
            raise ValueError("lengths, train_prompts, val_prompts and batch_size must be at least 1")
        super().__init__(max(lengths) + _ANSWER, batch_size, num_workers=0)
        self.lengths, self.prefix, self.distractors = lengths, prefix, distractors
        self._tokenizer_source = tokenizer
        self._files = {"train": Path(train).expanduser(), "val": None if val is None else Path(val).expanduser()}
        for field, file in self._files.items():
            if file is not None and not file.is_file():
                raise FileNotFoundError(f"{field}: no such file: {file}")
        self._counts = {"train": train_prompts, "val": val_prompts}

    def inputs(self) -> list[Path]:
        """See ``OrderedData.inputs``."""
        folder = Path(self._tokenizer_source).expanduser()
        return [file for file in (*self._files.values(), folder) if file is not None and file.exists()]

    def setup(self, stage: str) -> None:
        """Plant the facts, the same on every rank and in every run."""
        self.tokenizer = load_tokenizer(self._tokenizer_source)
        texts = {split: _texts(file) for split, file in self._files.items() if file is not None}
        if "val" not in texts:
            whole = "\n\n".join(texts["train"])
            cut = len(whole) * 9 // 10
            texts = {"train": [whole[:cut]], "val": [whole[cut:]]}
        self._rows: dict[str, AskedRows] = {}
        for split, count in self._counts.items():
            seed = int(split == "val")
            asked = plant(
                texts[split], self.tokenizer, self.lengths, count, self.prefix, seed, distractors=self.distractors
            )
            self._rows[split] = AskedRows(asked, self.tokenizer)
        super().setup(stage)

    def _dataset(self, split: str) -> "AskedRows":
        return self._rows[split]

    def _row_lengths(self) -> NDArray[np.int64]:
        return np.array([len(ids) for ids, _ in self._rows["train"].rows], np.int64)

    @property
    def _identity(self) -> str:
        ids = torch.cat([ids for ids, _ in self._rows["train"].rows])
        return f"asked {hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]}"

    @property
    def perplexity_on(self) -> str:
        """See ``OrderedData.perplexity_on``."""
        return f"answers after prompts of at most {max(self.lengths)} tokens"

    def describe(self) -> dict[str, Any]:
        """The data in numbers, for records."""
        return {
            "name": self.name,
            "lengths": self.lengths,
            "prompts": self._counts,
            "prefix": self.prefix,
            "distractors": self.distractors,
            "perplexity_on": self.perplexity_on,
            "vocab_size": len(self.tokenizer),
        }


class AskedRows(Batches):
    """Prompts and their answers, read a batch at a time.

    Args:
        asked: The prompts.
        tokenizer: Of the answers.
    """

    def __init__(self, asked: Sequence[Asked], tokenizer: Any) -> None:
        self.rows: list[tuple[Tensor, int]] = []
        for one in asked:
            gap = "" if _begins_anew(one.ids, tokenizer) else " "
            answer = tokenizer(f"{gap}{one.answer}", add_special_tokens=False).input_ids[:_ANSWER]
            self.rows.append((torch.cat([one.ids, torch.tensor(answer)]), len(one.ids)))
        self.pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch, see ``AskedText``; a row that only fills up has no labels."""
        rows = [self.rows[max(index, 0)] for index in indices]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), self.pad)
        labels, mask = torch.full_like(input_ids, IGNORED), torch.zeros_like(input_ids)
        for row, (ids, prompt) in enumerate(rows):
            input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
            if indices[row] != FixedOrderSampler.PADDING:
                labels[row, prompt : len(ids)] = ids[prompt:]
        return {"input_ids": input_ids, "labels": labels, "attention_mask": mask}


def _begins_anew(ids: Tensor, tokenizer: Any) -> bool:
    """Whether what follows a prompt needs no space: after one, after a line break, or a chat template's own token."""
    last = int(ids[-1])
    return last in tokenizer.all_special_ids or tokenizer.decode([last])[-1:].isspace()


def _texts(file: Path) -> list[str]:
    return [document_text(record, where) for record, where, _ in read_records([file])]
