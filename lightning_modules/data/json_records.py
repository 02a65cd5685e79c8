"""Records of JSON arrays and of JSON lines, decoded alike. Memory does not grow with the size of the file.

An array is cut into its records by looking at quotes and brackets alone; what a record says is for one decoder, that
of Python, to judge. So both kinds of file accept the same records and refuse the same ones.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightning_modules.data.encoding import character, has_nul, not_utf8, skip_byte_order_mark

Record = tuple[Any, str, int]

_READ = 1 << 16
_DIGITS = 4000  # Python refuses to read longer integers, for the time it would take

# Runs are possessive (++): they never go back, so that a long string costs its length and little memory. Groups are
# not: Python 3.11.2 takes what the last, failed try of a possessive group has passed for a part of the match.
_BODY = rb'(?:[^"\\\x00-\x1f]++|\\.)*'  # of a string
_PLAIN = rb"\s:0-9+.\-EINaefilnrstuy"  # what numbers, true, false, null, NaN and Infinity consist of, and white space
_IN_STRING = re.compile(_BODY, re.DOTALL)
_IN_ARRAY = re.compile(rb'(?:[%b]++|"%b")*' % (_PLAIN, _BODY), re.DOTALL)
_IN_RECORD = re.compile(rb'(?:[%b,]++|"%b")*' % (_PLAIN, _BODY), re.DOTALL)


class Ambiguous(dict[str, Any]):
    """A record in which names stand more than once. The last value counts, as usual in JSON, if nobody reads it."""

    names: frozenset[str]


def read_json_array(path: Path) -> Iterator[Record]:
    """Records of a JSON array, such as the ``{"id", "title", "text"}`` of Wikipedia dumps."""
    count = 0
    with path.open("rb") as file:
        begin = skip_byte_order_mark(path, file)
        begin += _enter_array(path, file)
        for raw, offset in _elements(path, file, begin):
            count += 1
            where = f"{path}: record {count}"
            yield decode(raw, path, where, offset), where, offset + len(raw) + 1
    if count == 0:
        raise ValueError(f"{path}: the JSON array holds no records")


def read_json_lines(path: Path) -> Iterator[Record]:
    """Records of a file with one JSON record a line; blank lines are passed over."""
    count = 0
    with path.open("rb") as file:
        position = skip_byte_order_mark(path, file)
        for number, line in enumerate(file, 1):
            position += len(line)
            if not line.strip():
                continue
            count += 1
            where = f"{path}: record {count} (line {number})"
            record = decode(line, path, where, position - len(line), "; one record a line is expected")
            if isinstance(record, list):
                raise ValueError(f"{where} is a list; name a file that is one JSON array .json")
            yield record, where, position
    if count == 0:
        raise ValueError(f"{path}: the file holds no records")


def decode(raw: bytes, path: Path, where: str, offset: int, advice: str = "") -> Any:
    """One JSON value.

    Args:
        raw: Its bytes, with white space around it.
        path: File it is from.
        where: How to call it in an error.
        offset: Where in the file it begins.
        advice: What to add when it is no JSON.

    Raises:
        ValueError: it is not UTF-8, no JSON, or nested more deeply than Python can read.
    """
    if (place := raw.find(b"\0")) >= 0:
        raise has_nul(path, offset + place)
    try:
        text = raw.decode("utf-8")
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start) from error
    except json.JSONDecodeError as error:
        place = offset + len(text[: error.pos].encode())
        raise ValueError(f"{where} is not JSON ({error.msg.removesuffix(' at')} at byte {place}){advice}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read; flatten it, or leave it out") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    found = Ambiguous(record)
    found.names = frozenset(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return found


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < _DIGITS else float(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_integer)


def _enter_array(path: Path, file: BinaryIO) -> int:
    """Go behind the bracket that opens the array; returns how many bytes that was."""
    start, passed = file.tell(), 0
    while chunk := file.read(_READ):
        rest = chunk.lstrip()
        passed += len(chunk) - len(rest)
        if not rest:
            continue
        if rest[:1] == b"[":
            file.seek(start + passed + 1)
            return passed + 1
        sign = character(path, rest + file.read(3), start + passed)
        raise ValueError(
            f"{path}: starts with {sign!r}, not with '['; a JSON array of records is expected (for one record a line, "
            "name the file .jsonl)"
        )
    raise ValueError(f"{path}: the file holds only white space; a JSON array of records is expected")


def _elements(path: Path, file: BinaryIO, begin: int) -> Iterator[tuple[bytes, int]]:
    """Bytes of each element of an array whose bracket was passed, and where in the file they begin.

    Args:
        path: For errors.
        file: Read from where it stands.
        begin: Where that is.
    """
    waiting, first, at, depth, count = b"", 0, 0, 0, 0  # the element begins at waiting[first], read up to waiting[at]
    while True:
        at = (_IN_RECORD if depth else _IN_ARRAY).match(waiting, at).end()
        mark = waiting[at : at + 1]
        if mark == b'"':  # a string that does not end here
            at_quote, at = at, _IN_STRING.match(waiting, at + 1).end()
            mark = waiting[at : at + 1]
            if not mark or (mark == b"\\" and at + 1 == len(waiting)):
                mark, at = b"", at_quote
        if not mark:
            # as much again as there is, so that a long element is not looked at for every chunk
            if not (chunk := file.read(max(_READ, len(waiting) - first))):
                raise ValueError(
                    f"{path}: broken JSON: the file ends in record {count + 1}, at byte {begin + len(waiting)}; is it "
                    "cut short? Export or copy it again"
                )
            waiting, begin, at, first = waiting[first:] + chunk, begin + first, at - first, 0
        elif depth == 0 and mark in b"],":
            raw = waiting[first:at]
            if mark == b"," or count or raw.strip():
                count += 1
                yield raw, begin + first
            first = at = at + 1
            if mark == b"]":
                _only_white_space(path, waiting[first:], file, begin + first)
                return
        elif mark in b"[{":
            depth, at = depth + 1, at + 1
        elif mark in b"]}" and depth:
            depth, at = depth - 1, at + 1
        else:  # nothing that JSON allows here: read no further, the decoder says what is wrong
            sign = character(path, waiting[at:] + file.read(3), begin + at)
            decode(waiting[first:at] + sign.encode(), path, f"{path}: record {count + 1}", begin + first)
            raise ValueError(f"{path}: broken JSON: {sign!r} at byte {begin + at}, in record {count + 1}")


def _only_white_space(path: Path, rest: bytes, file: BinaryIO, begin: int) -> None:
    while True:
        if found := rest.lstrip():
            place = begin + len(rest) - len(found)
            raise ValueError(f"{path}: broken JSON: something follows the array at byte {place}; one array is expected")
        begin, rest = begin + len(rest), file.read(_READ)
        if not rest:
            return
