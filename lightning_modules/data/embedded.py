"""Real English text that is on every machine that can run this: documentation inside installed packages."""

import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from common.progress import stage
from lightning_modules.data.base import TextDataModule
from lightning_modules.data.docstrings import parse_folders, source_files, topics_of
from lightning_modules.data.readers import check_percent, in_validation, text_digest

Source = Literal["topics", "stdlib", "torch", "transformers"]

_SHORTEST = 64  # characters: shorter docstrings say little more than the name they belong to


class EmbeddedDocs(TextDataModule):
    """The default data: Python's language reference topics and the docstrings of Python, torch and transformers.

    Nothing is downloaded and nothing is imported: source files are parsed. About 14 MB of text, without duplicates.

    Args:
        sources: Which texts to use.
        val_percent: Share of the documents used for validation, chosen by a hash of their text.
        **kwargs: See TextDataModule.

    Raises:
        ValueError: no sources, an unknown one, or a ``val_percent`` outside 0 to 100.
    """

    name = "embedded"

    def __init__(
        self,
        sources: list[Source] = ["topics", "stdlib", "torch", "transformers"],  # noqa: B006 (jsonargparse shows it)
        val_percent: float = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_percent(val_percent)
        unknown = set(sources) - set(get_args(Source))
        if unknown or not sources:
            raise ValueError(f"sources: {sorted(unknown) or 'empty'}; choose from {get_args(Source)}")
        self.sources, self.val_percent = sorted(set(sources)), val_percent

    def source_key(self) -> Any:
        """Sources with the versions of the packages they come from, and the split."""
        packages = [source for source in self.sources if source in ("torch", "transformers")]
        versions = {package: importlib.metadata.version(package) for package in packages}
        return {"python": platform.python_version(), **versions, "sources": self.sources, "val": self.val_percent}

    def documents(self) -> Iterator[tuple[str, str]]:
        """Texts of all sources without duplicates (texts that differ only in white space count as duplicates)."""
        seen = set()
        for text in self._texts():
            digest = text_digest(" ".join(text.split()))
            if len(text) >= _SHORTEST and digest not in seen:
                seen.add(digest)
                yield "val" if in_validation(digest, self.val_percent) else "train", text

    def _texts(self) -> Iterator[str]:
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        if "topics" in self.sources:
            yield from topics_of((stdlib / "pydoc_data" / "topics.py").read_bytes())
        folders = [stdlib if source == "stdlib" else _package(source) for source in self.sources if source != "topics"]
        if folders:
            with stage("Parsing docstrings", len(source_files(folders)), "files") as done:
                for number, texts in enumerate(parse_folders(folders, self._num_proc), 1):
                    yield from texts
                    done(number)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"sources: the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])
