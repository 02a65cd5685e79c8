"""Stream documents from JSON arrays, JSON lines and plain text. Memory does not grow with the size of the file.

Every reader yields ``(record, where, bytes_read)``: a decoded record, how to call it in an error, and how far into the
file the reader is, for a progress bar. A document is the text of a record, below its title if it has one. Bad input
raises ValueError with the file, the place in it, and what to do.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ijson

Document = tuple[str, int]
Record = tuple[Any, str, int]

TEXT_DOCUMENT = 16_384
"""A plain text file longer than twice this many characters counts as several documents of about this length."""

_READ = 1 << 16
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


def corpus_files(path: Path) -> list[Path]:
    """The files of a corpus: the file itself, or all readable files below a folder, in a fixed order.

    Raises:
        ValueError: a folder without a readable file, a file with an unknown suffix, or an empty file.
    """
    known = ", ".join(READERS)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in READERS)
        if not files:
            raise ValueError(f"{path}: no file that can be read in this folder (known: {known})")
    elif path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: unknown kind of file '{path.suffix}' (known: {known}); rename or convert it")
    else:
        files = [path]
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty; give a file with text, or delete it from the corpus")
    return files


def read_documents(files: Sequence[Path]) -> Iterator[Document]:
    """Documents of several files in order; ``bytes_read`` counts on from file to file."""
    for record, where, position in read_records(files):
        yield document_text(record, where), position


def read_records(files: Sequence[Path]) -> Iterator[Record]:
    """Records of several files in order; ``bytes_read`` counts on from file to file."""
    before = 0
    for file in files:
        for record, where, position in READERS[file.suffix.lower()](file):
            yield record, where, before + position
        before += file.stat().st_size


def read_json_array(path: Path) -> Iterator[Record]:
    """Records of a JSON array, such as the ``{"id", "title", "text"}`` of Wikipedia dumps."""
    count = 0
    with path.open("rb") as file:
        _skip_byte_order_mark(file)
        _expect_array(path, file)
        try:
            for record in ijson.items(file, "item", use_float=True):
                count += 1
                yield record, f"{path}: record {count}", file.tell()
        except ijson.JSONError as error:
            _raise_if_not_utf8(path)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "broken JSON"
            raise ValueError(
                f"{path}: broken JSON after record {count}, before byte {file.tell()} ({reason}); "
                "is the file cut short? Export or copy it again"
            ) from error
    if count == 0:
        raise ValueError(f"{path}: the JSON array holds no records")


def read_json_lines(path: Path) -> Iterator[Record]:
    """Records of a file with one JSON record a line; blank lines are passed over."""
    position = count = 0
    with path.open("rb") as file:
        position = _skip_byte_order_mark(file)
        for number, line in enumerate(file, 1):
            position += len(line)
            if not line.strip():
                continue
            count += 1
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise _not_utf8(path, position - len(line) + error.start) from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not a JSON record ({error}); one record a line") from error
            yield record, f"{path}: record {count} (line {number})", position
    if count == 0:
        raise ValueError(f"{path}: the file holds no records")


def read_text(path: Path) -> Iterator[Record]:
    """A plain UTF-8 text file as records ``{"text"}``.

    A short file is one document. A long one is cut at blank lines (or line ends, or spaces) into documents of about
    ``TEXT_DOCUMENT`` characters, so that it can be streamed and divided into training and validation text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    waiting, count = "", 0
    with path.open("rb") as file:
        position = _skip_byte_order_mark(file)
        while chunk := file.read(_READ):
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
    text, title = check_text(record["text"], "text", where), record.get("title")
    return f"{check_text(title, 'title', where)}\n{text}" if title else text


def check_text(value: object, field: str, where: str) -> str:
    """A field's text.

    Raises:
        ValueError: it is no string, or none that UTF-8 can hold.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{field}' is {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: '{field}' has half a surrogate pair at character {error.start}; remove it"
        ) from error
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


def _skip_byte_order_mark(file: BinaryIO) -> int:
    start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    return file.seek(start)


def _expect_array(path: Path, file: BinaryIO) -> None:
    start = file.tell()
    first = b""
    while chunk := file.read(_READ):
        if first := chunk.lstrip()[:1]:
            break
    file.seek(start)
    if not first:
        raise ValueError(f"{path}: the file holds only white space; a JSON array of records is expected")
    if first != b"[":
        _raise_if_not_utf8(path)
        raise ValueError(
            f"{path}: starts with {first.decode('utf-8', 'replace')!r}, not with '['; a JSON array of records is "
            "expected (for one record a line, name the file .jsonl)"
        )


def _decode(path: Path, decoder: codecs.IncrementalDecoder, chunk: bytes, end: int) -> str:
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, end - len(error.object) + error.start) from error


def _raise_if_not_utf8(path: Path) -> None:
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            position += len(chunk)
            _decode(path, decoder, chunk, position)
    # A character cut off by the end of the file is a short file, not a wrong encoding: the caller says so.


def _not_utf8(path: Path, offset: int) -> ValueError:
    return ValueError(
        f"{path}: not UTF-8 at byte {offset}; convert it first, e.g. iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
    )


def _cut(text: str) -> int:
    """Where to cut a long text: after a blank line if there is one in reach, else a line, else a word."""
    reach = text[: 2 * TEXT_DOCUMENT]
    if blank := _BLANK_LINE.search(reach, TEXT_DOCUMENT):
        return blank.end()
    for mark in ("\n", " "):
        if (found := reach.rfind(mark, TEXT_DOCUMENT)) >= 0:
            return found + 1
    return len(reach)
