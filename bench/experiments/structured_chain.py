"""From a dense model to a pruned, recovered one that talks: the committed configurations one after another, timed.

Two chains: the recommended one and that of the original recipe, each in its folder with an empty cache.
"""

import os
from pathlib import Path
from typing import Any
from unittest import mock

from bench.experiments.runs import corpus, run_main, say
from bench.tables import figures
from common.records import record

RECORDS = "structured_chain.jsonl"
CONFIGS = "configs/structured_pruning"
COMMANDS = ("prune", "verify", "fit", "export", "validate", "generate")
_O = "original"
CHAINS = {  # the configuration of each command; export writes what recovery made
    "recommended": ("prune", "prune", "recover", "prune", "validate", "recover"),
    _O: (_O, _O, f"{_O}_recover", _O, f"{_O}_validate", f"{_O}_recover"),
}
RECOVERED = {"recommended": "recovered", _O: f"{_O}_recovered"}
LIMIT_MIN = 10


def run(records: Path, folder: Path, model: Path) -> None:
    """Run the chains in empty folders, and append the time of each command and of all.

    Raises:
        RuntimeError: A command failed.
    """
    for chain, configs in CHAINS.items():
        _chain(records, folder / chain, model, chain, configs)


def _chain(records: Path, folder: Path, model: Path, chain: str, configs: tuple[str, ...]) -> None:
    place = folder / "runs/llama_gqa/model"  # where the configurations look for the dense model
    place.parent.mkdir(parents=True)
    place.symlink_to(model.resolve(), target_is_directory=True)
    took: dict[str, float] = {}
    with mock.patch.dict(os.environ, PARE_CACHE=str(folder / "cache")):
        for name, config in zip(COMMANDS, configs, strict=True):
            more = ["--prompt", "It was", "--max_new_tokens", "20"] if name == "generate" else corpus()
            if name == "export":
                more += ["--model.output", f"runs/structured_pruning/{RECOVERED[chain]}"]
            took[name] = run_main(folder, name, f"{CONFIGS}/{config}.yaml", *more)
            say(f"{chain}, {name}: {took[name]:.0f} s")
    total = sum(took.values()) / 60
    ppl = _ppl(folder, recovered=configs[2])
    figures.append(
        records,
        figure=f"structure-chain-{chain}",
        what=f"{chain}: {', '.join(COMMANDS[:-1])} and {COMMANDS[-1]} from the committed configurations, empty cache ("
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())
        + f"); perplexity {ppl['dense']:.1f} dense, {ppl['pruned']:.1f} pruned, {ppl['recovered']:.1f} recovered",
        value=total,
        unit="min",
        target=f"≤ {LIMIT_MIN} min",
        reached=total <= LIMIT_MIN,
        command=f"python -m bench experiment structured_chain --model {model.name}",
        details={"seconds": took, "ppl": ppl, "said": (folder / "output.log").read_text().strip().splitlines()[-1]},
    )


def _ppl(folder: Path, recovered: str) -> dict[str, Any]:
    """Perplexities that the chain left behind: of the dense model, after pruning, after recovery."""
    found, _ = record.read(folder / "runs/results.jsonl")
    pruning = next(one["structure"] for one in found if "ppl_before" in one.get("structure", {}))
    recovery = next(one for one in found if one["run_name"] == recovered)
    return {"dense": pruning["ppl_before"], "pruned": pruning["ppl_after"], "recovered": recovery["val_ppl"]}
