"""What a task made of the user's own files is: items, and how lm-eval asks them."""

import functools
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from common.files import replacing
from common.variants import Variant
from lightning_modules.data.corpus import find_corpus
from lightning_modules.data.embedded import EmbeddedDocs
from lightning_modules.data.readers import document_text, read_records

_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’]))(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+")
_WORDS = range(3, 61)  # of a sentence that is used


class LocalTask(Variant, ABC):
    """Items from a file, so that tasks need no network; the same file, number and seed give the same items.

    Args:
        file: Where the items come from; None takes the documentation that is on every machine, the part of it that
            ``EmbeddedDocs`` keeps for validation.
        items: How many, at most.
        seed: Draws them.
        label: Name of the task in tables; by default what kind it is, and the file's name.
    """

    chance: float | None = None
    """Share of right answers of a model that knows nothing; None where answers are free."""

    def __init__(self, file: str | None = None, items: int = 500, seed: int = 0, label: str | None = None) -> None:
        if items < 1:
            raise ValueError(f"items must be at least 1, got {items}")
        self.file, self.items, self.seed, self.label = file, items, seed, label

    @classmethod
    def examples(cls) -> list[Self]:
        """See ``Variant.examples``."""
        return [cls("text.txt")]

    @property
    def task(self) -> str:
        """The task's name for lm-eval."""
        kind = type(self).__module__.rpartition(".")[2]
        of = "documentation" if self.file is None else re.sub(r"[^0-9a-zA-Z]+", "_", Path(self.file).stem)
        return self.label or f"{kind}_{of}"

    def check(self) -> None:
        """Refuse a file that is not there, or is none that can be read; reads nothing.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: See ``find_corpus``.
        """
        if self.file is None:
            return
        path = Path(self.file).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"local: {type(self).__name__}: no such file or folder: {self.file}")
        find_corpus(path)

    @abstractmethod
    def candidates(self) -> Iterator[dict[str, Any]]:
        """Every item that the file gives, in order; what to ask is decided by ``asks``."""

    @abstractmethod
    def asks(self) -> dict[str, Any]:
        """The part of lm-eval's task configuration that says how an item is asked and judged."""

    def drawn(self) -> list[dict[str, Any]]:
        """The items, in the file's order.

        Raises:
            ValueError: The file gives none.
        """
        found = list(self.candidates())
        if not found:
            source = self.file or "documentation"
            raise ValueError(f"local: {type(self).__name__}: {source} gives no item; {self._needs()}")
        if len(found) > self.items:
            chosen = sorted(random.Random(self.seed).sample(range(len(found)), self.items))
            found = [found[i] for i in chosen]
        return found

    def write(self, folder: Path) -> tuple[Path, int]:
        """Write the items and a task file that lm-eval reads.

        Args:
            folder: Of all local tasks; a folder of the task's name within it is written or replaced.

        Returns:
            The task file, and the number of items.

        Raises:
            ValueError: See ``drawn``; or the folder is not Pare's to write.
        """
        items = self.drawn()
        destination = folder.resolve() / self.task
        config = {
            "task": self.task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(destination / "items.jsonl")}},
            "test_split": "test",
            "metadata": {"version": 1.0, "made_by": self.describe()},
            **self.asks(),
        }
        with replacing(destination, "tasks") as beside:
            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (beside / "items.jsonl").write_text(lines, encoding="utf-8")
            # JSON is YAML
            (beside / f"{self.task}.yaml").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return destination / f"{self.task}.yaml", len(items)

    def _needs(self) -> str:
        return f"give prose: several sentences of {_WORDS[0]} to {_WORDS[-1]} words in a row, not tables or lists"

    # ---- what tasks from prose share ------------------------------------------------------------------------------

    def passages(self, context: int) -> Iterator[list[str]]:
        """Every run of ``context`` whole sentences and one more within a document; they overlap."""
        for text in self._texts():
            run: list[str] = []
            for paragraph in text.split("\n\n"):
                for sentence in _END.split(" ".join(paragraph.split())):
                    fits = len(sentence.split()) in _WORDS and "=" not in sentence
                    run = [*run[-context:], sentence] if fits else []
                    if len(run) == context + 1 and "<unk>" not in sentence:
                        yield run

    def _texts(self) -> Iterator[str]:
        if self.file is None:
            yield from documentation()
            return
        for record, where, _ in read_records(find_corpus(Path(self.file).expanduser()).files):
            yield document_text(record, where)


@functools.cache
def documentation() -> tuple[str, ...]:
    """See ``LocalTask``; read once for all tasks."""
    return tuple(text for split, text in EmbeddedDocs().documents() if split == "val")


def shuffled(right: str, wrong: list[str], key: str) -> dict[str, Any]:
    """Choices in an order that depends on the item alone, and the place of the right one."""
    choices = [right, *wrong]
    random.Random(key).shuffle(choices)
    return {"choices": choices, "label": choices.index(right)}


CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
"""How an item with ``context``, ``choices`` and ``label`` is asked: the choice that the model finds likeliest."""
