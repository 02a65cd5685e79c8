"""Run records: one strict-JSON object a run, appended to results.jsonl and never edited.

A measurement that was not made is null, never 0. A measurement that came out as NaN or infinite is a result (a run
diverged), so it is kept: JSON has no such numbers, they are written as the strings "NaN", "Infinity" and "-Infinity",
and `read` turns them back into floats.

Every line ends with a digest of what stands before it, so that a damaged or edited record is noticed, not believed.
Lines of before this rule have none; after the first line of a file that has one, all have.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

from common.manifest import sync
from common.records import machine
from common.records.schema import OPTIONAL, REQUIRED, Field

DIGEST = "digest"
LINK_RATE, LINK_DELAY = "PARE_LINK_RATE", "PARE_LINK_DELAY"  # of the link between emulated hosts, for what runs there
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):  # bool is an int to Python, not to a reader of the record
        return name in ("bool", "any")
    checks: dict[str, Any] = {"str": str, "int": Integral, "bool": bool, "list": list | tuple, "object": Mapping}
    if name == "number":
        return isinstance(value, Real) or (isinstance(value, str) and value in _NON_FINITE)
    return name == "any" or isinstance(value, checks[name])


def check_types(record: Mapping[str, Any], fields: Mapping[str, Field]) -> list[str]:
    """Complaints about the values of those `fields` that the record has; empty when all is well."""
    problems = []
    for name, field in fields.items():
        if name not in record:
            continue
        value = record[name]
        if value is None:
            if not field.nullable:
                problems.append(f"{name} is null, expected {field.type}")
        elif not _has_type(value, field.type):
            problems.append(f"{name} is {type(value).__name__} {value!r:.60}, expected {field.type}")
    return problems


def validate(record: Mapping[str, Any], training: bool = True) -> None:
    """Check a run record against `REQUIRED` and `OPTIONAL`; names in neither are allowed and not checked.

    Args:
        record: The record.
        training: The record of a training run, which has every required name; others have those that are never null.

    Raises:
        ValueError: Naming every missing required field and every value of the wrong type.
    """
    missing = [name for name, field in REQUIRED.items() if name not in record and (training or not field.nullable)]
    problems = [f"missing: {', '.join(missing)} (null means not measured)"] if missing else []
    problems += check_types(record, {**REQUIRED, **OPTIONAL})
    if problems:
        raise ValueError("invalid run record: " + "; ".join(problems))


def stamp() -> dict[str, Any]:
    """Where a number came from: git_commit, git_dirty, versions, machine, date (UTC ISO 8601).

    git values are None outside a git checkout. Contains no host name, user name or path.
    """
    return {
        **machine.git_state(),
        "versions": machine.versions(),
        "machine": machine.identity(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def link() -> dict[str, Any]:
    """The fields about the emulated link that this process was started on, see `schema.OPTIONAL`; none without."""
    rate = os.environ.get(LINK_RATE)
    if rate is None:
        return {}
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return {
        "link_rate": rate,
        "link_delay": os.environ.get(LINK_DELAY),
        "link_emulated": True,
        "ranks_per_host": ranks,
    }


def _to_json(value: Any) -> Any:
    """Copy of `value` in strict-JSON types: NumPy scalars become numbers, non-finite floats strings, paths text."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isfinite(number):
            return number
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r:.60} cannot be stored in a record")


def _from_json(value: Any, name: str = "") -> Any:
    """Inverse of `_to_json` for non-finite floats; fields that hold text keep their text."""
    if isinstance(value, dict):
        return {key: _from_json(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    known = REQUIRED.get(name) or OPTIONAL.get(name)
    if isinstance(value, str) and not (known and known.type == "str"):
        return _NON_FINITE.get(value, value)
    return value


def as_json(value: Any) -> Any:
    """A copy of a record, or a part of one, in strict-JSON types, as `append` writes it.

    Raises:
        TypeError: It holds something that JSON cannot.
    """
    return _to_json(value)


def append(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Append a record as one line, durably, while other processes may do the same.

    The file is locked; a torn last line of a killed writer is left as it is and closed with a newline, so it cannot
    swallow this record; after an error part-way (disk full) the file is cut back to its former length.

    Args:
        path: The .jsonl file; it and its folder are created when missing.
        record: The record, see `validate`. Not validated here.

    Raises:
        TypeError: The record holds something JSON cannot (a tensor, say); nothing is written.
        OSError: The write failed; nothing of the record is left in the file.
    """
    line = sealed(_to_json(record))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            done = 0
            while done < len(line):
                done += os.write(handle, line[done:])
            os.fsync(handle)
        except BaseException:
            os.ftruncate(handle, size)
            raise
    finally:
        os.close(handle)  # also releases the lock
    if size == 0:
        sync(path.parent)  # a new file's name


def sealed(record: Mapping[str, Any]) -> bytes:
    """The line of a record in strict-JSON types, its digest (SHA-256 of the line without it) last."""
    plain = {name: value for name, value in record.items() if name != DIGEST}
    return _text({**plain, DIGEST: _digest(plain)}) + b"\n"


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(plain)).hexdigest()


def _misnamed(record: Mapping[str, Any]) -> bool:
    """Whether the digest is there and its name is not: a bit flipped in the name would make the line look unsealed."""
    name = next(reversed(list(record)), DIGEST)
    return name != DIGEST and record[name] == _digest({key: record[key] for key in record if key != name})


def _text(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def read(path: str | os.PathLike) -> tuple[list[dict[str, Any]], list[int]]:
    """All readable records of a file, in file order.

    Returns:
        The records, and the numbers (from 1) of the lines passed over: torn by a killed writer, damaged, or edited.

    Raises:
        FileNotFoundError: There is no such file.
    """
    records: list[dict[str, Any]] = []
    broken: list[int] = []
    sealing = False
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode(), parse_constant=_refuse)
        except ValueError:
            record = None
        sealing |= isinstance(record, dict) and (DIGEST in record or _misnamed(record))
        if not isinstance(record, dict) or (sealing and sealed(record) != line + b"\n"):
            broken.append(number)
            continue
        record.pop(DIGEST, None)
        records.append(_from_json(record))
    return records, broken


def passed_over(path: str | os.PathLike, lines: Sequence[int]) -> str:
    """What to tell of lines that `read` passed over."""
    shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
    return f"{Path(path).name}: {len(lines)} broken line(s) skipped (torn, damaged or edited): {shown}"
