"""Does an interrupted run continue bit for bit? Signalled mid-epoch near step 30 of 60, resumed, compared."""

import os
import signal
import subprocess
import time
from pathlib import Path

from bench.experiments.runs import ROOT, fit, losses, main_py, say
from bench.tables import figures

RECORDS = "pretraining.jsonl"
STEPS, INTERRUPT, CONFIG = 60, 30, "configs/pretraining/gpt2_tiny.yaml"
# gradient accumulation 2; GPT-2's dropout of 0.1 is on; an epoch is longer than the run, so the stop is mid-epoch
ARGUMENTS = [
    *("--trainer.max_steps", str(STEPS), "--trainer.accumulate_grad_batches", "2", "--trainer.limit_val_batches", "0"),
    *("--trainer.strategy.compressor", "Int8"),
]


def run(records: Path, folder: Path) -> None:
    """Measure and append the figure."""
    say("uninterrupted")
    whole = fit(folder / "whole", CONFIG, *ARGUMENTS).losses
    say(f"interrupted near step {INTERRUPT}")
    code, stopped = _interrupt(folder / "parts")
    say(f"exit status {code}, {stopped} steps logged; resuming")
    resumed = fit(folder / "parts", CONFIG, *ARGUMENTS, "--ckpt_path", "last").losses
    equal = sum(whole[step] == resumed[step] for step in range(stopped, STEPS))
    figures.append(
        records,
        figure="exact-resume",
        what=f"losses equal bit for bit after SIGTERM at step {stopped} of {STEPS} and resume"
        " (accumulation 2, dropout, int8, FSDP1)",
        value=equal,
        unit=f"of {STEPS - stopped}",
        target="all",
        reached=equal == STEPS - stopped,
        command="python -m bench experiment exact_resume",
        details={"exit_status": code, "steps_before": stopped},
    )


def _interrupt(folder: Path) -> tuple[int, int]:
    """Run until about ``INTERRUPT`` steps are logged, send SIGTERM to rank 0; exit status and steps done."""
    folder.mkdir(parents=True)
    environment = {**os.environ, "CI": "true"}
    with open(folder / "interrupted.log", "w") as log:
        command = main_py("fit", "--config", str(ROOT / CONFIG), *ARGUMENTS)
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None and len(losses(folder)) < INTERRUPT:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code != 128 + signal.SIGTERM:
        raise RuntimeError(f"expected exit status 143, got {code}: {(folder / 'interrupted.log').read_text()[-2000:]}")
    return code, len(losses(folder))
