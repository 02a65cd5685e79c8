"""Samples of a prompt and a response on disk: tokens of both, where the response begins, and an id."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from common.files import replacing, write_text
from lightning_modules.data.instructions import Instruction, Prompt, Template, shorten, write_prompt
from lightning_modules.data.prepare import SPLITS
from lightning_modules.data.readers import in_validation, text_digest
from lightning_modules.data.tokenizer import single_threaded

FORMAT = 1
"""Part of every cache key: raise it when the meaning of a cache folder changes."""

_BATCH = 256  # samples tokenised and written at a time

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
        self._plain, self._special = (_backend(tokenizer, as_text) for as_text in (True, False))
        if max_length < len(self._begin) + 2:
            raise ValueError(f"max_length must be at least {len(self._begin) + 2}, got {max_length}")

    def identity(self) -> list[str]:
        """What decides the ids besides the text."""
        chat = str(self.tokenizer.chat_template) if self.template == "chat" else ""
        return [self._plain.to_str(), str(self._begin), str(self._end), self.template, chat]

    def __call__(self, samples: list[Instruction], counts: Counter[str]) -> Iterator[tuple[int, list[int], int]]:
        """Number of the sample, its ids, and how many of them are prompt; long plain texts are cut into several.

        Args:
            samples: What to encode.
            counts: Counts the samples that had to be shortened, by what was cut.
        """
        prompts = [write_prompt(sample, self.template, self.tokenizer) for sample in samples]
        for number, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
            if sample.instruction is None:
                ids = self._ids(self._plain, sample.response) + self._end
                step = self.max_length - len(self._begin)
                for start in range(0, len(ids), step):
                    # a piece of one token predicts nothing
                    if len(self._begin) + len(ids[start:]) > 1:
                        yield number, self._begin + ids[start : start + step], len(self._begin)
            else:
                yield number, *self._answered(prompt, sample.response, counts)

    def _answered(self, prompt: Prompt, response: str, counts: Counter[str]) -> tuple[list[int], int]:
        backend = self._special if prompt.special else self._plain
        begin = [] if prompt.special else self._begin
        encoded = backend.encode(prompt.text, add_special_tokens=False)
        inside = [i for i, (_, end) in enumerate(encoded.offsets) if prompt.context.start < end <= prompt.context.stop]
        context = slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)
        closing = self._ids(self._special, prompt.end) if prompt.special else self._end
        answer = self._ids(self._plain, response.strip() if prompt.special else response) + closing
        before, after = shorten(encoded.ids, context, answer, self.max_length - len(begin))
        counts["shortened_prompts"] += len(before) < len(encoded.ids)
        counts["shortened_responses"] += len(after) < len(answer)
        return begin + before + after, len(begin) + len(before)

    @staticmethod
    def _ids(backend: Tokenizer, text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids


def _backend(tokenizer: PreTrainedTokenizerBase, special_as_text: bool) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = special_as_text
    return backend


def prepare_samples(folder: Path, samples: Iterable[tuple[str, Instruction]], encoder: SampleEncoder) -> None:
    """Encode all samples and write the splits. The caller holds the lock of ``folder``.

    Left out and counted: samples without a response or instruction, repeated ones, and training samples whose prompt is
    also in the validation split (``samples`` gives that split first, or divides by the prompt).

    Raises:
        ValueError: a split without samples.
    """
    final = folder / "samples"
    if not final.exists():
        with replacing(final, "cache") as beside:
            counts = _write(beside, samples, encoder)
            (beside / "counts.json").write_text(json.dumps(counts))
        for split, found in counts.items():
            notes = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in found.items() if n and name != "samples")
            rank_zero_info(f"{split}: {found['samples']:,} samples ({notes})")
    write_text(folder / "summary.json", (final / "counts.json").read_text())


def _write(folder: Path, samples: Iterable[tuple[str, Instruction]], encoder: SampleEncoder) -> dict[str, Counter[str]]:
    counts = {split: Counter[str]() for split in SPLITS}
    writers = {split: _Writer(folder / f"{split}.arrow") for split in SPLITS}
    distinct = _distinct(samples, counts)
    with single_threaded():
        while batch := list(islice(distinct, _BATCH)):
            for split in SPLITS:
                writers[split].add([sample for name, sample in batch if name == split], encoder, counts[split])
    for split in SPLITS:
        writers[split].close()
        if not counts[split]["samples"]:
            raise ValueError(f"{split}: no usable sample (left out: {dict(counts[split]) or 'none'}); give more data")
    return counts


def open_samples(folder: Path, split: str) -> Dataset:
    """The samples of a split, memory-mapped: ``input_ids``, ``prompt`` and ``length`` in tokens, ``sample_id``."""
    return Dataset.from_file(str(folder / "samples" / f"{split}.arrow")).with_format("numpy")


def summary(folder: Path) -> dict[str, dict[str, int]]:
    """What was prepared and what was left out, by split."""
    return json.loads((folder / "summary.json").read_text())


def split_of(sample: Instruction, val_percent: float) -> str:
    """The split of a sample by a hash of its prompt, so that no question is both trained on and validated with."""
    return "val" if in_validation(_prompt_digest(sample), val_percent) else "train"


def _prompt_digest(sample: Instruction) -> bytes:
    text = sample.response if sample.instruction is None else f"{sample.instruction}\0{sample.context}"
    return text_digest(text)


def _distinct(
    samples: Iterable[tuple[str, Instruction]], counts: dict[str, Counter[str]]
) -> Iterator[tuple[str, Instruction]]:
    seen, validation = set[bytes](), set[bytes]()
    for split, sample in samples:
        prompt = _prompt_digest(sample)
        whole = text_digest("\0".join(part or "" for part in sample))
        if not sample.usable:
            counts[split]["without_response"] += 1
        elif split == "train" and prompt in validation:
            counts[split]["also_in_validation"] += 1
        elif whole in seen:
            counts[split]["repeated"] += 1
        else:
            seen.add(whole)
            if split == "val":
                validation.add(prompt)
            yield split, sample


class _Writer:
    """An Arrow stream of encoded samples."""

    def __init__(self, path: Path) -> None:
        self.file = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.file, _SCHEMA)

    def add(self, samples: list[Instruction], encoder: SampleEncoder, counts: Counter[str]) -> None:
        columns: tuple[list, ...] = ([], [], [], [])
        pieces = Counter[int]()
        for number, ids, prompt in encoder(samples, counts):
            # the piece's number tells apart the pieces of one text
            text = "\0".join([*(part or "" for part in samples[number]), str(pieces[number])])
            pieces[number] += 1
            sample_id = int.from_bytes(text_digest(text)[:8], "big") >> 1
            for column, value in zip(columns, (ids, prompt, len(ids), sample_id), strict=True):
                column.append(value)
            counts["tokens"] += len(ids)
            counts["response_tokens"] += len(ids) - prompt
        counts["samples"] += len(columns[0])
        if columns[0]:
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            self.stream.write_batch(pa.record_batch(arrays, schema=_SCHEMA))

    def close(self) -> None:
        self.stream.close()
        self.file.close()
