"""Model cards: README.md of the folders that commands leave, with the metadata that the Hugging Face Hub reads."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from common.manifest import CARD
from lightning_modules.loading import may_be_on_hub

_HERE = "path/to/this/folder"


def write_card(folder: Path, text: str) -> None:
    """Write a card to a folder."""
    (folder / CARD).write_text(text, encoding="utf-8")


def card(
    title: str, text: str, base: str | None = None, tags: Iterable[str] = (), library: str = "transformers"
) -> str:
    """The card.

    Args:
        title: Its headline.
        text: What follows, in Markdown.
        base: What the model was made from. It is metadata where it is a name on the Hub, which refuses cards that name
            a folder for it; where such a folder lies is nobody else's business either.
        tags: Beside "pare".
        library: What loads the folder; "transformers" for a language model.
    """
    known = base is not None and may_be_on_hub(base) and not Path(base).expanduser().exists()
    data = ModelCardData(
        base_model=base if known else None,
        library_name=library,
        pipeline_tag="text-generation" if library == "transformers" else None,
        tags=["pare", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text.rstrip()}\n"


def short(base: str | Path) -> str:
    """The last part of a folder or name: what a card calls a model."""
    return str(base).rstrip("/").rpartition("/")[2]


def usage(config: Any) -> str:
    """How a model is loaded.

    Args:
        config: Its Hugging Face configuration; one that is not transformers' own comes with the folder.
    """
    remote = "" if type(config).__module__.startswith("transformers.") else ", trust_remote_code=True"
    return code(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{{here}}"{remote})',
        'tokenizer = AutoTokenizer.from_pretrained("{here}")',
    )


def code(imports: str, *lines: str) -> str:
    """Lines of Python; ``{here}`` in them stands for the folder."""
    return "\n".join(["```python", imports, "", *(line.replace("{here}", _HERE) for line in lines), "```\n"])


def table(rows: Mapping[str, Any], headers: tuple[str, str] = ("what", "value")) -> str:
    """What is known, a row each; without those that are None."""
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join([f"| {headers[0]} | {headers[1]} |", "|---|---|", *lines]) + "\n"
