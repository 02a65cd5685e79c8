"""Which prompt token was dropped at which stage, for records and for reading."""

from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lightning_modules.token_pruning.prefill import Prefill

# dropped early (red) to dropped late (blue); what stays is plain
_COLOURS = ("red", "dark_orange", "yellow", "green", "cyan", "blue", "magenta", "bright_black")


def survival(run: Prefill, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fate of the first row of the latest prompt.

    Returns:
        `tokens`: text of each token; `dropped_at`: index of the stage that dropped it, None where it stayed; `layers`:
        the layer after which each stage dropped.

    Raises:
        ValueError: No prompt was read, or it was given as embeddings.
    """
    if run.input_ids is None:
        raise ValueError("no prompt to show: nothing was read, or it was given as embeddings")
    ids = run.input_ids[0].tolist()
    fate: list[int | None] = [None] * len(ids)
    if run.stages:
        gone = ~run.kept()[:, 0]
        for place in gone[-1].nonzero().flatten().tolist():
            fate[place] = int(gone[:, place].int().argmax())
    return {
        "tokens": [tokenizer.decode([token]) for token in ids],
        "dropped_at": fate,
        "layers": [stage.after for stage in run.stages],
    }


def show(fields: dict[str, Any], console: Console | None = None) -> None:
    """Print the prompt, dropped tokens coloured by stage; without colours, as `[stage:token]`."""
    console = console or Console()
    text = Text()
    for token, stage in zip(fields["tokens"], fields["dropped_at"], strict=True):
        if stage is None:
            text.append(token)
        elif console.is_terminal:
            text.append(token, style=f"{_COLOURS[stage % len(_COLOURS)]} strike")
        else:
            text.append(f"[{stage}:{token}]")
    console.print(text, soft_wrap=True)
    for stage, layer in enumerate(fields["layers"]):
        count = fields["dropped_at"].count(stage)
        style = f"{_COLOURS[stage % len(_COLOURS)]} strike" if console.is_terminal else ""
        console.print(Text(f"stage {stage}, after layer {layer}: {count} tokens dropped", style=style))
    console.print(f"{fields['dropped_at'].count(None)} of {len(fields['tokens'])} tokens stayed")
