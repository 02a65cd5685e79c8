"""Stream documents from JSON arrays, JSON lines and plain text. Memory does not grow with the size of the file.

Every reader yields ``(record, where, bytes_read)``: a decoded record, how to call it in an error, and how far into the
file the reader is, for a progress bar. A document is the text of a record, below its title if it has one. Bad input
raises ValueError with the file, the place in it, and what to do.
"""

import codecs
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.data.encoding import has_nul, not_utf8, skip_byte_order_mark
from lightning_modules.data.json_records import Ambiguous, Record, read_json_array, read_json_lines

TEXT_DOCUMENT = 16_384
"""A plain text file longer than twice this many characters counts as several documents of about this length."""

_READ = 1 << 16
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


def read_records(files: Sequence[Path]) -> Iterator[Record]:
    """Records of several files in order; ``bytes_read`` counts on from file to file."""
    before = 0
    for file in files:
        for record, where, position in READERS[file.suffix.lower()](file):
            yield record, where, before + position
        before += file.stat().st_size


def read_text(path: Path) -> Iterator[Record]:
    """A plain UTF-8 text file as records ``{"text"}``.

    A short file is one document. A long one is cut at blank lines (or line ends, or spaces) into documents of about
    ``TEXT_DOCUMENT`` characters, so that it can be streamed and divided into training and validation text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    waiting, count = "", 0
    with path.open("rb") as file:
        position = skip_byte_order_mark(path, file)
        while chunk := file.read(_READ):
            if (place := chunk.find(b"\0")) >= 0:
                raise has_nul(path, position + place)
            position += len(chunk)
            waiting += _decode(path, decoder, chunk, position)
            while len(waiting) > 2 * TEXT_DOCUMENT:
                cut = _cut(waiting)
                piece, waiting = waiting[:cut], waiting[cut:]
                if piece.strip():
                    count += 1
                    yield {"text": piece.replace("\r\n", "\n")}, f"{path}: text {count}", position
        waiting += _decode(path, decoder, b"", position)
    if waiting.strip():
        count += 1
        yield {"text": waiting.replace("\r\n", "\n")}, f"{path}: text {count}", position
    if count == 0:
        raise ValueError(f"{path}: the file holds only white space")


READERS = {
    ".json": read_json_array,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".txt": read_text,
    ".md": read_text,
}
"""Reader of each file suffix."""


def document_text(record: object, where: str) -> str:
    """The text of one record, below its title if it has one.

    Args:
        record: A decoded JSON record.
        where: How to call the record in an error.

    Raises:
        ValueError: the record is no object, has no ``text``, or its text is not a string that UTF-8 can hold.
    """
    if not isinstance(record, dict):
        raise ValueError(f'{where} is a {type(record).__name__}; records look like {{"id", "title", "text"}}')
    if "text" not in record:
        raise ValueError(f"{where} has no field 'text' (its fields: {', '.join(map(str, record)) or 'none'})")
    text, title = read_field(record, "text", where), record.get("title")
    return f"{read_field(record, 'title', where)}\n{text}" if title else text


def read_field(record: dict[str, Any], field: str, where: str) -> str:
    """The text in a field of a record.

    Raises:
        ValueError: the field stands twice, or holds no string, or one that UTF-8 or a text file cannot hold.
    """
    if isinstance(record, Ambiguous) and field in record.names:
        raise ValueError(f"{where}: '{field}' stands more than once; leave one")
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{field}' is {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: '{field}' has half a surrogate pair at character {error.start}; remove it"
        ) from error
    if (place := value.find("\0")) >= 0:
        raise ValueError(f"{where}: '{field}' has a NUL at character {place}; remove it")
    return value


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text, to find equal documents without keeping them."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def in_validation(digest: bytes, val_percent: float) -> bool:
    """Whether the document with this digest belongs to the validation split.

    Depends on the text alone, so equal documents never land on both sides, and a grown corpus keeps its split.
    """
    return int.from_bytes(digest[:8], "big") / 2**64 < val_percent / 100


def check_percent(val_percent: float) -> None:
    """Raise ValueError unless ``val_percent`` leaves something on both sides."""
    if not 0 < val_percent < 100:
        raise ValueError(f"val_percent must be between 0 and 100, got {val_percent}")


def _decode(path: Path, decoder: codecs.IncrementalDecoder, chunk: bytes, end: int) -> str:
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        raise not_utf8(path, end - len(error.object) + error.start) from error


def _cut(text: str) -> int:
    """Where to cut a long text: after a blank line if there is one in reach, else a line, else a word."""
    reach = text[: 2 * TEXT_DOCUMENT]
    if blank := _BLANK_LINE.search(reach, TEXT_DOCUMENT):
        return blank.end()
    for mark in ("\n", " "):
        if (found := reach.rfind(mark, TEXT_DOCUMENT)) >= 0:
            return found + 1
    return len(reach) - reach.endswith("\r")  # a line end is not cut in two
