"""Physical limits of a run's step time: what computing alone takes, and what its bytes take on the wire."""

from collections.abc import Mapping
from typing import Any


def sent_per_step(record: Mapping[str, Any]) -> float | None:
    """Bytes a rank sends in a step, gradients and parameters; None where they were not counted."""
    gradients, parameters = record.get("bytes_compressed_total"), record.get("bytes_parameters_total")
    steps = record.get("steps_measured")
    return None if gradients is None or parameters is None or not steps else (gradients + parameters) / steps


def modelled_step_ms(record: Mapping[str, Any], rate_bits_per_s: float) -> float | None:
    """Step time on a link of another rate: the median step without its communication, and bytes over rate.

    Encoding and decoding are part of the step; nothing overlaps, as on CPU, where gloo blocks.

    Args:
        record: A run record.
        rate_bits_per_s: The link's rate.

    Returns:
        Milliseconds; None when the record lacks bytes or communication time.
    """
    sent, step, wire = sent_per_step(record), record.get("step_time_ms_p50"), record.get("comm_time_ms_total")
    if sent is None or step is None or wire is None:
        return None
    return step - wire / record["steps_measured"] + sent * 8e3 / rate_bits_per_s
