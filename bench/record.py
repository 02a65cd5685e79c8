"""Run records: one strict-JSON object a run, appended to results.jsonl and never edited.

A measurement that was not made is null, never 0. A measurement that came out as NaN or infinite is a result (a run
diverged), so it is kept: JSON has no such numbers, they are written as the strings "NaN", "Infinity" and "-Infinity",
and `read` turns them back into floats.
"""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

from bench import machine

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Field:
    """One name of the run record.

    Attributes:
        type: "str", "int", "number", "bool", "list", "object" or "any".
        unit: Unit of the value, "" when it has none.
        meaning: One line for tables and reports.
        nullable: Whether null ("not recorded") is allowed.
    """

    type: str
    unit: str
    meaning: str
    nullable: bool = True


# Everything called "total" covers the same measured steps (`steps_measured`, warm-up excluded) of one rank, the mean
# over ranks where they differ. So bytes_raw_total / comm_time_ms_total is a bandwidth.
REQUIRED: dict[str, Field] = {
    "run_name": Field("str", "", "name of the run, unique within its results file", nullable=False),
    "world_size": Field("int", "ranks", "number of training processes", nullable=False),
    "model": Field("str", "", "model name or architecture", nullable=False),
    "dataset": Field("str", "", "dataset name or file name"),
    "max_length": Field("int", "tokens", "sequence length"),
    "batch_size": Field("int", "sequences", "sequences per rank and forward pass"),
    "compress_method": Field("str", "", "gradient compression method, 'none' without"),
    "compress_config": Field("object", "", "arguments of the compression method"),
    "seed": Field("int", "", "random seed"),
    "step_time_ms_mean": Field("number", "ms", "optimizer step time, mean"),
    "step_time_ms_p50": Field("number", "ms", "optimizer step time, median"),
    "step_time_ms_p90": Field("number", "ms", "optimizer step time, 90th percentile"),
    "tokens_per_s": Field("number", "tokens/s", "tokens trained on per second, all ranks together"),
    "comm_time_ms_total": Field("number", "ms", "time in communication operators over the measured steps"),
    "comm_ratio": Field("number", "fraction", "communication time as a share of step time"),
    "comm_time_ms_by_op": Field("object", "ms", "communication time over the measured steps, by operator"),
    "bytes_raw_total": Field("int", "bytes", "gradient bytes the uncompressed collective would send"),
    "bytes_compressed_total": Field("int", "bytes", "bytes really sent for gradients, indices and scales included"),
    "compression_ratio": Field("number", "ratio", "bytes_raw_total / bytes_compressed_total"),
    "train_loss": Field("number", "nats/token", "training loss at the end of the run"),
    "val_loss": Field("number", "nats/token", "token-weighted validation loss"),
    "val_ppl": Field("number", "", "validation perplexity, exp(val_loss)"),
}

OPTIONAL: dict[str, Field] = {
    "kind": Field("str", "", "what the record is: 'run' when absent, or 'figure'", nullable=False),
    "steps_measured": Field("int", "steps", "steps the timings and totals cover, warm-up excluded"),
    "step_time_ms_p95": Field("number", "ms", "optimizer step time, 95th percentile"),
    "compress_time_ms": Field("number", "ms", "time spent encoding over the measured steps"),
    "decompress_time_ms": Field("number", "ms", "time spent decoding over the measured steps"),
    "extra_collectives": Field("int", "calls", "collectives the method adds beyond its payload exchange"),
    "extra_collective_time_ms": Field("number", "ms", "time in those extra collectives"),
    "index_bytes": Field("int", "bytes", "part of bytes_compressed_total that encodes positions"),
    "density": Field("number", "fraction", "share of gradient elements sent"),
    "residual_norm": Field("number", "", "L2 norm of the error-feedback residual at the end"),
    "grad_rel_error": Field("number", "ratio", "||g - g_hat|| / ||g||, mean over sampled steps"),
    "grad_cos_sim": Field("number", "", "cosine of g and g_hat, mean over sampled steps"),
    "mem_peak_alloc_gb": Field("number", "GB", "peak GPU memory allocated by tensors (1e9 bytes)"),
    "mem_peak_reserved_gb": Field("number", "GB", "peak GPU memory reserved by the allocator (1e9 bytes)"),
    "time_to_target_ppl_s": Field("number", "s", "training time until validation PPL reached the stated target"),
    "ppl_at_fixed_time": Field("number", "", "validation PPL at the stated training time"),
    "overlap_ratio": Field("number", "fraction", "share of communication time covered by compute"),
    "effective_bandwidth": Field("number", "bytes/s", "bytes_compressed_total / communication time"),
    "nan_steps": Field("int", "steps", "steps with a non-finite loss or gradient"),
    "clipped_steps": Field("int", "steps", "steps in which gradient clipping acted"),
    "prefill": Field("object", "", "token-pruning block"),
    "structure": Field("object", "", "structured-pruning block"),
    "tiers": Field("object", "", "block-sparsity block"),
    "suspicious": Field("list", "", "reasons to distrust the record, such as a speed-up above its bound"),
    "config": Field("any", "", "full configuration the run was started with"),
    "git_commit": Field("str", "", "commit of the code that ran"),
    "git_dirty": Field("bool", "", "whether the code differed from that commit"),
    "versions": Field("object", "", "Python and package versions"),
    "machine": Field("object", "", "processor, memory, GPUs"),
    "date": Field("str", "", "time of the stamp, UTC, ISO 8601"),
}


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


def validate(record: Mapping[str, Any]) -> None:
    """Check a run record against `REQUIRED` and `OPTIONAL`; names in neither are allowed and not checked.

    Raises:
        ValueError: Naming every missing required field and every value of the wrong type.
    """
    missing = [name for name in REQUIRED if name not in record]
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
    line = json.dumps(_to_json(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
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
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a new file's directory entry durable too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def read(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
    """All readable records of a file, in file order.

    Returns:
        The records, and the number of non-empty lines skipped because they are not a strict-JSON object (torn by a
        killed writer).

    Raises:
        FileNotFoundError: There is no such file.
    """
    records: list[dict[str, Any]] = []
    skipped = 0
    for line in Path(path).read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode(), parse_constant=_refuse)
        except ValueError:
            skipped += 1
            continue
        if isinstance(record, dict):
            records.append(_from_json(record))
        else:
            skipped += 1
    return records, skipped
