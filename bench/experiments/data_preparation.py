"""Memory and time to prepare a 440 MB JSON array, and to start again with the finished cache."""

import json
import random
import re
from pathlib import Path

from bench.experiments.runs import ROOT, main_py, say
from bench.network.process import Measured, run_measured
from bench.tables import figures

RECORDS = "pretraining.jsonl"
SIZE_MB, CONFIG = 440, "configs/pretraining/gpt2_tiny.yaml"
COMMAND = "python -m bench experiment data_preparation"


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    say("writing the corpus")
    corpus = folder / "corpus.json"
    _write_array(corpus, SIZE_MB)
    first, again = _prepare(folder, corpus), _prepare(folder, corpus)
    # the second start imports and opens the same things and prepares nothing: what the first has beyond it is extra
    idle_mb, peak_mb = again.peak_memory_mb or 0.0, first.peak_memory_mb or 0.0
    extra, took, restart = peak_mb - idle_mb, _seconds(first), _seconds(again)
    size = f"{corpus.stat().st_size / 1e6:.0f} MB JSON array"
    details = {"idle_mb": idle_mb, "peak_mb": peak_mb, "wall_s": first.wall_s}
    memory = f"peak extra memory to prepare a {size} ({first.memory_kind} of all processes, over a second start)"
    rows: list[tuple[str, str, float, str, str, bool | None]] = [
        ("data-memory", memory, extra, "MB", "< 200 MB", extra < 200),
        ("data-time", "time to prepare it: read, train a tokenizer, tokenise, pack", took, "s", "report", None),
        ("data-restart", "second start with the finished cache", restart, "s", "< 2 s", restart < 2),
    ]
    for name, what, value, unit, target, reached in rows:
        figures.append(
            records,
            figure=name,
            what=what,
            value=value,
            unit=unit,
            target=target,
            reached=reached,
            command=COMMAND,
            details=details,
        )


def _prepare(folder: Path, corpus: Path) -> Measured:
    data = ["--data", "TextCorpus", "--data.train", str(corpus), "--data.cache_dir", str(folder / "cache")]
    command = main_py("prepare", "--config", str(ROOT / CONFIG), *data)
    done = run_measured(command, cwd=folder, env={"CI": "true"}, log=folder / "prepare.log")
    if done.returncode:
        raise RuntimeError(f"prepare failed:\n{done.output}")
    return done


def _seconds(done: Measured) -> float:
    """The time that the command itself reports for the data, without starting Python."""
    return float(re.findall(r"data ready in ([\d.]+) s", done.output)[0])


def _write_array(path: Path, megabytes: int) -> None:
    """A JSON array of articles of random length, with words in a natural (Zipf) frequency."""
    draw = random.Random(0)
    words = [
        "".join(draw.choice("etaoinshrdlucmfwypvbgkjqxz") for _ in range(draw.randint(2, 9))) for _ in range(20_000)
    ]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    with open(path, "w") as file:
        file.write("[")
        number = 0
        while file.tell() < megabytes * 1e6:
            text = " ".join(draw.choices(words, weights, k=draw.randint(50, 1500)))
            article = json.dumps({"id": str(number), "title": f"Article {number}", "text": text})
            file.write((",\n" if number else "\n") + article)
            number += 1
        file.write("\n]\n")
