"""What compression saves of everything a fully sharded step sends, parameters included: FSDP2, two ranks."""

from pathlib import Path

from bench.experiments.runs import fit, say
from bench.tables import figures

RECORDS = "compression.jsonl"
STEPS, CONFIG = 12, "configs/pretraining/gpt2_tiny.yaml"
# compressor of gradients, of parameters, and the share that should not be exceeded
ARMS = {
    "fp32": ("NoCompressionA2A", None, None),
    "bf16 gradients": ("BF16", None, None),
    "bf16 gradients and parameters": ("BF16", "BF16", None),
    "int8 gradients": ("Int8", None, 0.75),
    "int8 gradients and parameters": ("Int8", "Int8", 0.27),
}


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    totals: dict[str, float] = {}
    for arm, (gradients, parameters, _) in ARMS.items():
        strategy = "--trainer.strategy"
        arguments = ["--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0"]
        arguments += [f"{strategy}.class_path", "CompressedFSDP2", f"{strategy}.compressor", gradients]
        arguments += [f"{strategy}.parameter_compressor", parameters] if parameters else []
        done = fit(folder / arm.replace(" ", "-"), CONFIG, *arguments).record
        sent = done["bytes_compressed_total"] + done["bytes_parameters_total"]
        totals[arm] = sent / done["steps_measured"]
        say(f"{arm}: {totals[arm] / 1e6:.2f} MB per rank and step")
    for arm, (_, _, bound) in ARMS.items():
        share = totals[arm] / totals["fp32"]
        figures.append(
            records,
            figure=f"total-traffic-{arm.replace(' ', '-')}",
            what=f"all bytes of a FULL_SHARD step with {arm}, over fp32 (ideal ring)",
            value=share,
            unit="of fp32",
            target="report" if bound is None else f"≤ {bound}",
            reached=None if bound is None else share <= bound,
            command="python -m bench experiment total_traffic",
            details={"bytes_per_step": totals[arm], "steps": STEPS},
        )
