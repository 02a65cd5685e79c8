"""Instructions and their responses: recognise a record's format, and write the prompt around it."""

from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_modules.data.readers import document_text, read_field

Template = Literal["alpaca", "chat"]


class Instruction(NamedTuple):
    """One sample; plain text is a sample without an instruction, and is all response."""

    instruction: str | None
    context: str
    response: str

    @property
    def usable(self) -> bool:
        """Whether there is a response, and (unless it is plain text) something that it responds to."""
        return bool(self.response.strip()) and (self.instruction is None or bool(self.instruction.strip()))


class _Format(NamedTuple):
    name: str
    instruction: str
    context: str | None
    response: str


_FORMATS = (
    _Format("Dolly", "instruction", "context", "response"),
    _Format("Alpaca", "instruction", "input", "output"),
    _Format("GSM8K", "question", None, "answer"),
)
_KNOWN = "; ".join(
    f"{f.name}: {', '.join(field for field in (f.instruction, f.context, f.response) if field)}" for f in _FORMATS
)


class Prompt(NamedTuple):
    """The text before the response; of a chat, the whole conversation."""

    text: str
    context: slice
    """Characters of ``text`` that may be shortened: the input that the instruction is about."""
    response: int | None = None
    """Where in ``text`` the response begins, if it is there; it and what ends its turn are to be learnt."""


def recognise(record: Any, where: str) -> Instruction:
    """Read a record of Dolly, Alpaca or GSM8K, or plain text, by the fields that it has.

    A field that is null counts as empty; ``context`` and ``input`` may be missing.

    Args:
        record: A decoded JSON record.
        where: How to call the record in an error.

    Raises:
        ValueError: the record has the fields of no known format, or a field that is not text.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}; a record with named fields is expected")
    for form in _FORMATS:
        if form.instruction in record and form.response in record:
            return Instruction(*(_field(record, field, where) for field in form[1:]))
    if "text" in record:
        return Instruction(None, "", document_text(record, where))
    fields = ", ".join(map(str, record)) or "none"
    raise ValueError(
        f"{where} has the fields of no known format (its fields: {fields}; known are {_KNOWN}; text: text)"
    )


def plain_text(record: Any, where: str) -> str:
    """The text of a record; of an instruction, its parts below each other.

    Raises:
        ValueError: The record has neither a text nor the fields of a known format, or a field that is not text.
    """
    known = isinstance(record, dict) and any(f.instruction in record and f.response in record for f in _FORMATS)
    if not known or "text" in record:
        return document_text(record, where)
    return "\n\n".join(part for part in recognise(record, where) if part and part.strip())


def _field(record: dict[str, Any], field: str | None, where: str) -> str:
    return "" if field is None or record.get(field) is None else read_field(record, field, where)


def write_prompt(sample: Instruction, template: Template, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """What precedes a response.

    ``alpaca`` is the template that Stanford Alpaca was trained with, in the form of alpaca-lora and LLM-Pruner (a line
    break after "### Response:"). ``chat`` is the tokenizer's own chat template, with instruction and context as the
    user's message.

    Raises:
        ValueError: ``chat`` with a template that cannot write the sample, that writes the response in other words, or
            that begins a question with its answer otherwise than the question alone.
    """
    if sample.instruction is None:
        return Prompt("", slice(0, 0))
    if template == "chat":
        return _chat(sample, tokenizer)
    given = ", paired with an input that provides further context" if sample.context else ""
    head = (
        f"Below is an instruction that describes a task{given}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{sample.instruction}\n\n"
    )
    tail = "### Response:\n"
    if not sample.context:
        return Prompt(head + tail, slice(0, 0))
    head += "### Input:\n"
    return Prompt(f"{head}{sample.context}\n\n{tail}", slice(len(head), len(head) + len(sample.context)))


def _chat(sample: Instruction, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    message = f"{sample.instruction}\n\n{sample.context}" if sample.context else str(sample.instruction)
    prompt = _rendered(tokenizer, message, None)
    # It shows where the template puts a response, whatever stands before that (an empty <think> block, a blank).
    stand_in = "RESPONSE"
    while stand_in in prompt:
        stand_in += "E"
    before, found, end = _rendered(tokenizer, message, stand_in).partition(stand_in)
    whole = _rendered(tokenizer, message, sample.response)
    forms = (sample.response, sample.response.strip(), sample.response.lstrip(), sample.response.rstrip())
    if not found or stand_in in end or not any(whole == before + form + end for form in forms):
        raise ValueError("the chat template changes the response; change one of them, or use template: alpaca")
    if not before.startswith(prompt):
        raise ValueError(
            "what the chat template writes for a question is not how it begins a question with its answer, so what is "
            "learnt would not be what is asked; use template: alpaca"
        )
    start = prompt.rfind(sample.context) if sample.context else -1
    context = slice(start, start + len(sample.context)) if start >= 0 else slice(0, 0)
    return Prompt(whole, context, len(before))


def _rendered(tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None) -> str:
    turns = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
    except Exception as error:  # a template is a program, which can fail in any way
        raise ValueError(f"the chat template cannot write it ({error}); change it, or use template: alpaca") from error


def shorten(prompt: list[int], context: slice, response: list[int], room: int) -> tuple[list[int], list[int]]:
    """Cut a sample that is too long; the response is never emptied.

    The context loses its beginning first. If that is not enough, the response loses its end, but keeps at least half of
    the room; and last, the prompt loses its beginning.

    Args:
        prompt: Tokens of the prompt.
        context: Which of them are context.
        response: Tokens of the response.
        room: Tokens there may be in all, at least 2.

    Returns:
        What is left of the prompt and of the response.
    """
    before, middle, after = prompt[: context.start], prompt[context], prompt[context.stop :]
    bare = len(before) + len(after)
    response = response[: max(room - bare, room - room // 2)]
    spare = room - bare - len(response)
    if spare < 0:
        return (before + after)[-spare:], response
    return before + middle[max(len(middle) - spare, 0) :] + after, response
