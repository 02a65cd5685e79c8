"""Samples of a prompt and a response on disk: tokens of both, where the response begins, and an id."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_modules.data.instructions import Instruction, Prompt, Template, shorten, write_prompt
from lightning_modules.data.prepare import Preparation
from lightning_modules.data.readers import in_validation, text_digest
from lightning_modules.data.rows import Row, Rows
from lightning_modules.data.shards import Recipe, State
from lightning_modules.data.tokenizer import plain_backend

_SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("prompt", pa.int32()), ("length", pa.int32()), ("sample_id", pa.int64())]
)


class SampleEncoder:
    """Turns instructions and responses into token ids.

    Args:
        tokenizer: A fast tokenizer with an end-of-text token.
        template: How the prompt is written.
        max_length: Most tokens of a sample.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template, max_length: int) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self._end = [tokenizer.eos_token_id]
        begins = tokenizer.bos_token_id in tokenizer("").input_ids[:1]
        self._begin = [tokenizer.bos_token_id] if begins else []
        # "</s>" written in a question is text about a token; only a chat template places tokens by their names.
        self._plain, self._special = (plain_backend(tokenizer, as_text) for as_text in (True, False))
        if template == "chat" and not tokenizer.chat_template:
            raise ValueError("template: this tokenizer has no chat template; use template: alpaca")
        if max_length < len(self._begin) + 2:
            raise ValueError(f"max_length must be at least {len(self._begin) + 2}, got {max_length}")

    @property
    def begins(self) -> bool:
        """Whether samples begin with the tokenizer's BOS; in chats that is for the template to say."""
        if self.template != "chat":
            return bool(self._begin)
        text = write_prompt(Instruction("?", "", "!"), "chat", self.tokenizer).text
        return bool(self.tokenizer.bos_token) and text.startswith(str(self.tokenizer.bos_token))

    def identity(self) -> list[str]:
        """What decides the ids besides the text."""
        chat = str(self.tokenizer.chat_template) if self.template == "chat" else ""
        return [self._plain.to_str(), str(self._begin), str(self._end), self.template, chat]

    def __call__(self, sample: Instruction, counts: Counter[str]) -> Iterator[tuple[list[int], int]]:
        """Ids of a sample, and how many of them are prompt; a long plain text is cut into several.

        Args:
            sample: What to encode.
            counts: Counts the samples that had to be shortened, by what was cut.

        Raises:
            ValueError: see ``write_prompt``.
        """
        if sample.instruction is not None:
            yield self._answered(write_prompt(sample, self.template, self.tokenizer), sample.response, counts)
            return
        ids = self._ids(self._plain, sample.response) + self._end
        step = self.max_length - len(self._begin)
        for start in range(0, len(ids), step):
            if len(self._begin) + len(ids[start:]) > 1:  # a piece of one token predicts nothing
                yield self._begin + ids[start : start + step], len(self._begin)

    def _answered(self, prompt: Prompt, response: str, counts: Counter[str]) -> tuple[list[int], int]:
        chat = prompt.response is not None
        encoded = (self._special if chat else self._plain).encode(prompt.text, add_special_tokens=False)
        begin = [] if chat else self._begin
        if prompt.response is not None:
            # A token that holds both the end of the prompt (a blank) and the beginning of the response is response.
            first = next(i for i, (_, end) in enumerate(encoded.offsets) if end > prompt.response)
            asked, answer = encoded.ids[:first], encoded.ids[first:]
        else:
            asked, answer = encoded.ids, self._ids(self._plain, response) + self._end
        inside = [i for i, (_, end) in enumerate(encoded.offsets) if prompt.context.start < end <= prompt.context.stop]
        context = slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)
        before, after = shorten(asked, context, answer, self.max_length - len(begin))
        counts["shortened_prompts"] += len(before) < len(asked)
        counts["shortened_responses"] += len(after) < len(answer)
        return begin + before + after, len(begin) + len(before)

    @staticmethod
    def _ids(backend: Tokenizer, text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids


class SampleRecipe(Recipe):
    """Instructions and responses as rows of ``input_ids``, ``prompt`` and ``length`` in tokens, ``sample_id``.

    Args:
        encoder: Makes token ids.
    """

    schema = _SCHEMA

    def __init__(self, encoder: SampleEncoder) -> None:
        self.encoder = encoder

    def encode(self, rows: list[Row]) -> tuple[list[tuple[list[int], int, int, int]], Counter[str]]:
        """See ``Recipe``."""
        found: list[tuple[list[int], int, int, int]] = []
        counts = Counter[str]()
        for where, instruction, context, response in rows:
            sample = Instruction(instruction, context or "", response or "")
            try:
                pieces = list(self.encoder(sample, counts))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            for number, (ids, prompt) in enumerate(pieces):
                # the piece's number tells apart the pieces of one text
                text = "\0".join([*(part or "" for part in sample), str(number)])
                found.append((ids, prompt, len(ids), int.from_bytes(text_digest(text)[:8], "big") >> 1))
                counts["tokens"] += len(ids)
                counts["response_tokens"] += len(ids) - prompt
        counts["samples"] += len(found)
        return found, counts

    def pack(self, encoded: Any, state: State) -> list[pa.Array]:
        """See ``Recipe``."""
        found, counts = encoded
        state.count(counts)
        columns = zip(*found, strict=True) if found else [()] * len(_SCHEMA)
        return [pa.array(list(column), kind.type) for column, kind in zip(columns, _SCHEMA, strict=True)]

    def too_little(self, state: State) -> str:
        """See ``Recipe``."""
        return "no sample has more than one token; give more data"


def sample_preparation(
    samples: Callable[[], Iterable[tuple[str, Instruction, str]]],
    encoder: SampleEncoder,
    limits: dict[str, int | None],
) -> Preparation:
    """How samples are prepared.

    Left out and counted: samples without a response or instruction, repeated ones, and training samples whose prompt is
    also in the validation split (``samples`` gives that split first, or divides by the prompt).

    Args:
        samples: Gives split, sample, and how to call it in an error.
        encoder: Makes token ids.
        limits: Samples that are wanted of each split; None for all.
    """

    def recipe(folder: Path, rows: Callable[[], Rows]) -> SampleRecipe:
        return SampleRecipe(encoder)

    columns = ("where", "instruction", "context", "sample")
    return Preparation(columns, lambda left_out: _distinct(samples(), left_out), recipe, limits)


def split_of(sample: Instruction, val_percent: float) -> str:
    """The split of a sample by a hash of its prompt, so that no question is both trained on and validated with."""
    return "val" if in_validation(_prompt_digest(sample), val_percent) else "train"


def _prompt_digest(sample: Instruction) -> bytes:
    text = sample.response if sample.instruction is None else f"{sample.instruction}\0{sample.context}"
    return text_digest(text)


def _distinct(
    samples: Iterable[tuple[str, Instruction, str]], left_out: dict[str, Counter[str]]
) -> Iterator[tuple[str, Row]]:
    seen, validation = set[bytes](), set[bytes]()
    for split, sample, where in samples:
        prompt = _prompt_digest(sample)
        whole = text_digest("\0".join(part or "" for part in sample))
        if not sample.usable:
            left_out[split]["without_response"] += 1
        elif split == "train" and prompt in validation:
            left_out[split]["also_in_validation"] += 1
        elif whole in seen:
            left_out[split]["repeated"] += 1
        else:
            seen.add(whole)
            if split == "val":
                validation.add(prompt)
            yield split, (where, *sample)
