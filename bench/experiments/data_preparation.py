"""Memory and time to prepare a 440 MB JSON array, and to start again with the finished cache."""

import json
import random
import re
from pathlib import Path

from bench import figures
from bench.experiments.runs import ROOT, main_py, say
from bench.process import Measured, run_measured

SIZE_MB, CONFIG = 440, "configs/pretraining/gpt2_tiny.yaml"
COMMAND = "python -m bench experiment data_preparation"


def run(records: Path, folder: Path) -> None:
    """Measure and append the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    say("writing the corpora")
    small, large = folder / "small.json", folder / "large.json"
    _write_array(small, 2)
    _write_array(large, SIZE_MB)
    # The tokenizer is trained once on the small corpus: what is measured is reading, tokenising and packing.
    idle = _prepare(folder, small)
    say(f"{small.stat().st_size / 1e6:.0f} MB: peak {idle.peak_memory_mb:.0f} MB")
    first = _prepare(folder, large)
    again = _prepare(folder, large)
    extra = first.peak_memory_mb - idle.peak_memory_mb
    took, restart = _seconds(first), _seconds(again)
    size = f"{large.stat().st_size / 1e6:.0f} MB JSON array"
    common = {"command": COMMAND, "details": {"idle_mb": idle.peak_memory_mb, "peak_mb": first.peak_memory_mb}}
    rows = [
        ("data-memory", f"peak extra memory to prepare a {size} ({first.memory_kind} of all processes)", extra, "MB"),
        ("data-time", f"time to prepare it, tokenizer training included ({took:.0f} s, 2 processes)", took, "s"),
        ("data-restart", "second start with the finished cache", restart, "s"),
    ]
    targets = {"data-memory": ("< 200 MB", extra < 200), "data-time": ("report", None)}
    targets["data-restart"] = ("< 2 s", restart < 2)
    for name, what, value, unit in rows:
        target, reached = targets[name]
        figures.append(
            records, figure=name, what=what, value=value, unit=unit, target=target, reached=reached, **common
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
    return float(re.search(r"data ready in ([\d.]+) s", done.output)[1])


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
