"""Fixtures that tests of structured pruning share."""

from pathlib import Path

import pytest

from lightning_modules.data.tokenizer import train_bpe
from tests.lightning_modules.structured_pruning.toy import tiny


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter([["the quick brown fox jumps over the lazy dog " * 20]]), 300)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny(vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
