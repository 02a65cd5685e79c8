"""Are the counted bytes the bytes on the wire? int8 against its formula, and against the interface's own counter."""

import sys
from pathlib import Path

from bench.experiments.runs import fit
from bench.tables import figures

RECORDS = "pretraining.jsonl"
CONFIG, BLOCK = "configs/pretraining/two_hosts.yaml", 256
_HEADERS = 66  # bytes of Ethernet (14), IPv4 (20) and TCP with timestamps (32) that the interface counts per packet


def run(records: Path, folder: Path) -> None:
    """Measure on two emulated hosts and append the figures."""
    link = [sys.executable, "-m", "bench", "link", "--rate", "1gbit", "--"]
    done = fit(folder, CONFIG, prefix=link).record
    # bytes_raw is 4N(n−1)/n; int8 should send N(1 + 4/B)(n−1)/n
    formula = done["bytes_raw_total"] / 4 * (1 + 4 / BLOCK)
    counted = done["bytes_compressed_total"]
    deviation = 100 * (counted / formula - 1)
    figures.append(
        records,
        figure="int8-bytes-formula",
        what="int8 bytes counted against N(1+4/B)(n−1)/n",
        value=deviation,
        unit="%",
        target="within 0.1 %",
        reached=abs(deviation) <= 0.1,
        command="python -m bench experiment wire_bytes",
        details={"counted": counted, "formula": formula, "steps": done["steps_measured"]},
    )
    everything = counted + done["bytes_parameters_total"]
    nic, packets = done["bytes_nic_total"], done["packets_nic_total"]
    difference = 100 * ((nic - _HEADERS * packets) / everything - 1)
    figures.append(
        records,
        figure="bytes-on-the-wire",
        what="interface counter, headers taken off, against counted bytes (gradients and parameters), "
        f"two emulated hosts, 1 Gbit/s (headers are {100 * _HEADERS * packets / everything:.1f} % more)",
        value=difference,
        unit="%",
        target="within 2 %",
        reached=abs(difference) <= 2,
        command="python -m bench experiment wire_bytes",
        details={"nic": nic, "packets": packets, "counted": everything, "steps": done["steps_measured"]},
    )
