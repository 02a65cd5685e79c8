"""How long a newcomer waits for the quickstart, from an empty cache to the table."""

import os
import tempfile
from pathlib import Path
from unittest import mock

from bench.experiments.runs import fit
from bench.tables import figures

RECORDS = "pretraining.jsonl"
COMMAND = "python -m bench experiment quickstart"


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, PARE_CACHE=cache):
        done = fit(folder, "configs/quickstart.yaml")
    minutes, fields = done.wall_s / 60, done.record
    start, end = done.losses[0], fields["train_loss"]
    details = {name: fields[name] for name in ("val_ppl", "tokens_per_s", "compression_ratio", "comm_ratio", "steps")}
    figures.append(
        records,
        figure="quickstart-time",
        what="quickstart from an empty cache to the table",
        value=minutes,
        unit="min",
        target="≤ 5 min on 2 CPU cores",
        reached=minutes <= 5,
        command=COMMAND,
        details=details,
    )
    figures.append(
        records,
        figure="quickstart-loss",
        what=f"fall of the training loss ({start:.2f} → {end:.2f} nats per token)",
        value=start - end,
        unit="nats",
        target="falls clearly (≥ 2 nats)",
        reached=start - end >= 2,
        command=COMMAND,
        details=details,
    )
