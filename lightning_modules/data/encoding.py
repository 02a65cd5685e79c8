"""Is a file UTF-8 text? If not, say what to do about it."""

import codecs
from pathlib import Path
from typing import BinaryIO

# in this order: the mark of UTF-32 begins with that of UTF-16
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def skip_byte_order_mark(path: Path, file: BinaryIO) -> int:
    """Go behind the byte order mark of a UTF-8 file; returns how many bytes that was.

    Raises:
        ValueError: the mark is that of another encoding.
    """
    head = file.read(4)
    for mark, name in _OTHER_MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"{path}: is {name}, not UTF-8; convert it first: {_iconv(path, name)}")
    return file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)


def not_utf8(path: Path, offset: int) -> ValueError:
    """Bytes that no UTF-8 text has."""
    return ValueError(f"{path}: not UTF-8 at byte {offset}; convert it first, e.g. {_iconv(path, 'WINDOWS-1252')}")


def has_nul(path: Path, offset: int) -> ValueError:
    """A byte that text files do not have."""
    return ValueError(
        f"{path}: NUL byte at byte {offset}; remove it. If the file is UTF-16 without a byte order mark: "
        f"{_iconv(path, 'UTF-16LE')}"
    )


def character(path: Path, raw: bytes, offset: int) -> str:
    """The character that some bytes begin with.

    Args:
        path: File they are from.
        raw: At least four, unless the file ends.
        offset: Where in the file they begin.

    Raises:
        ValueError: they are not UTF-8, or a NUL.
    """
    for length in range(1, 5):
        try:
            sign = raw[:length].decode("utf-8")
        except UnicodeDecodeError:
            continue
        if sign == "\0":
            raise has_nul(path, offset)
        return sign
    raise not_utf8(path, offset)


def _iconv(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}.utf8{path.suffix}"
