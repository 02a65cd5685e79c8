"""Load, train, compare and apply tokenizers. Nothing here is fetched from the network unless it is named."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_modules import loading

END_OF_TEXT = "<|endoftext|>"

SMALLEST_VOCAB = 257
"""All 256 bytes and the end of text: a byte-level vocabulary cannot be smaller."""


def load_tokenizer(path_or_name: str) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a folder, from a GGUF file or, if there is no such folder, by its name on the Hub.

    Args:
        path_or_name: A GGUF file, a folder with ``tokenizer.json``, or with the two files of the original GPT-2 release
            (``vocab.json`` and ``merges.txt``), or a Hub name such as ``openai-community/gpt2``.

    Returns:
        A tokenizer with an end-of-text token.

    Raises:
        FileNotFoundError: neither a folder nor a reachable Hub name.
        ValueError: a folder that holds no tokenizer, or a tokenizer that cannot be used here.
    """
    path = Path(path_or_name).expanduser()
    if path.suffix == ".gguf":
        tokenizer = loading.load_tokenizer(path_or_name)
    elif path.is_dir():
        tokenizer = _from_folder(path)
    elif path.exists() or not loading.may_be_on_hub(path_or_name):
        raise FileNotFoundError(f"tokenizer: no such folder: {path_or_name} (a folder with tokenizer.json is expected)")
    else:
        tokenizer = _from_hub(path_or_name)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"tokenizer: {path_or_name} is not a fast tokenizer; convert it to a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: {path_or_name} has no end-of-text token, which separates documents; "
            'add "eos_token" to its tokenizer_config.json'
        )
    return tokenizer


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if (folder / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if vocab.is_file() and merges.is_file():
            return _wrap(_byte_level(models.BPE.from_file(str(vocab), str(merges))))
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        raise ValueError(f"tokenizer: {folder} holds a tokenizer that cannot be read ({error})") from error
    raise ValueError(
        f"tokenizer: {folder} is not a tokenizer folder; it needs tokenizer.json, or vocab.json and merges.txt"
    )


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise FileNotFoundError(
            f"tokenizer: '{name}' is no folder here, and no such tokenizer could be had from the Hub{offline}; name a "
            "folder with tokenizer.json, or leave the tokenizer out to train one on the corpus"
        ) from error


def train_bpe(texts: Iterable[str] | Iterable[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, the kind GPT-2 uses. The same texts in the same order give the same tokenizer.

    Args:
        texts: Documents to learn from, or batches of documents.
        vocab_size: Upper limit of the vocabulary; a small corpus can yield fewer tokens.

    Returns:
        A tokenizer with ``<|endoftext|>`` (id 0) as end, beginning and padding token.

    Raises:
        ValueError: ``vocab_size`` is smaller than ``SMALLEST_VOCAB``.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCAB} (256 bytes and the end of text), got {vocab_size}"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with single_threaded():
        tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of vocabulary, merges and the end-of-text id: equal if and only if token ids mean the same.

    Does not change when the tokenizer is used, saved or loaded.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    content = [sorted(tokenizer.get_vocab().items()), merges, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerBase, special_as_text: bool = True) -> Tokenizer:
    """A copy of what encodes, without truncation and padding.

    Args:
        tokenizer: A fast tokenizer.
        special_as_text: "<|endoftext|>" written in a text is text about a token, and not the token itself.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = special_as_text
    return backend


class Encoder:
    """Turns documents into token ids, and can do so in several threads at once (the work is done outside Python).

    Args:
        tokenizer: A fast tokenizer with an end-of-text token. It is copied, later changes to it have no effect.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.eos = np.array([tokenizer.eos_token_id], np.int32)
        self._backend = plain_backend(tokenizer)

    def identity(self) -> str:
        """SHA-256 of everything that decides the ids (also normaliser and pre-tokeniser)."""
        return hashlib.sha256(f"{self._backend.to_str()}{self.eos}".encode()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Token ids of all ``texts`` end to end, each followed by the end-of-text id."""
        pieces = []
        for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False):
            pieces += [np.array(encoding.ids, np.int32), self.eos]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Keep the tokenizers library from starting threads of its own."""
    # Once the tokenizers library has used its own thread pool, every later fork (a loader worker) prints a warning.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
