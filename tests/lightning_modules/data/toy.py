"""A DataModule over made-up text, whose preparation can be held up on the way."""

import random
import time
from pathlib import Path

from lightning_modules.data import blocks
from lightning_modules.data.base import TextDataModule

WORDS = ["the", "one", "red", "blue", "old", "house", "river", "stone", "light", "word", "reads", "holds", "and", "but"]


def sentences(seed: int, documents: int, words: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=words)) for i in range(documents)]


class Toy(TextDataModule):
    """Every tenth document validates. Notes in ``log`` (a file) each time the documents are read."""

    name = "toy"

    def __init__(self, documents: int = 200, log: str | None = None, **kwargs) -> None:
        super().__init__(**{"block_size": 16, "batch_size": 4, "vocab_size": 300, **kwargs})
        self.number, self.log = documents, log

    def source_key(self):
        return self.number

    def documents(self):
        if self.log:
            with Path(self.log).open("a") as file:
                file.write("read\n")
        for i, text in enumerate(sentences(0, self.number)):
            yield "train" if i % 10 else "val", text


def hold(marker: Path, release: Path) -> None:
    """Say "I am here" by a file, then wait for another file."""
    marker.touch()
    while not release.exists():
        time.sleep(0.02)


def hold_up(cache: Path, hold_at: str) -> Toy:
    """Data that stop at ``hold_at`` ("rows", "tokenizer", "blocks" or "nowhere") until ``cache/go`` exists.

    For a process of its own, whose modules this changes.
    """
    here, go = cache / "here", cache / "go"
    data = Toy(cache_dir=str(cache), log=str(cache / "log"), num_proc=1)
    if hold_at == "rows":
        original = data.documents

        def held():
            for i, document in enumerate(original()):
                yield document
                if i == 50:
                    hold(here, go)

        data.documents = held
    elif hold_at == "tokenizer":
        original = blocks.train_bpe

        def train(texts, vocab_size):
            hold(here, go)
            return original(texts, vocab_size)

        blocks.train_bpe = train
    elif hold_at == "blocks":
        original = blocks.pack_blocks

        def pack(pieces, block_size):
            hold(here, go)
            return original(pieces, block_size)

        blocks.pack_blocks = pack
    return data
