"""What is killed: commands that leave something behind, how they go on, and what must come out in the end."""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.experiments.runs import ROOT, main_py
from common.records import record

Outcome = Mapping[str, str]
"""What a finished command promises, by name; equal texts mean equal results."""

_FAULTS = ("--config", str(ROOT / "configs/bench/faults.yaml"))
_LLAMA = ("--model.model_type", "llama", "--model.config")
_SIZES = (
    "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2}"
)
_TEXT = (
    "--data.sources",
    "[topics]",
    "--data.block_size",
    "32",
    "--data.batch_size",
    "4",
    "--data.max_val_blocks",
    "16",
)


_FEW = ("--model.calibration_blocks", "4")


@dataclass(frozen=True)
class Scenario:
    """A command that may be interrupted at any time.

    Attributes:
        name: Its name in records.
        command: From the folder of the inputs (a small model in ``model``) to the command line.
        outcome: From the folder it ran in to what it left.
        resume: Arguments that continue an interrupted run, once it has left something to continue from.
        begun: Where what there is to continue from may lie.
        saves: Globs of what exists only while something is being saved.
        fresh_cache: Whether the command's own cache is what it leaves, so that it starts from an empty one.
    """

    name: str
    command: Callable[[Path], list[str]]
    outcome: Callable[[Path], Outcome]
    resume: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()
    saves: tuple[str, ...] = ("runs/**/.*.partial*",)
    fresh_cache: bool = False


def digest(folder: Path, *globs: str) -> str:
    """SHA-256 over names and contents of a folder's files that match."""
    found = hashlib.sha256()
    for path in sorted({path for glob in globs for path in folder.glob(glob) if path.is_file()}):
        found.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        found.update(_ordered(path.read_bytes()) if path.suffix == ".safetensors" else path.read_bytes())
    return found.hexdigest()


def _ordered(content: bytes) -> bytes:
    """A safetensors file with its header's names in order: the library writes metadata in another one each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]


def _trained(folder: Path) -> Outcome:
    """Losses of all steps, the exported weights, and what the one record says of steps and bytes."""
    losses: dict[int, str] = {}
    for log in sorted(folder.glob("runs/faults/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        with open(log, newline="") as file:
            losses |= {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}
    records = _records(folder / "runs/results.jsonl")
    fields = ("steps", "steps_measured", "val_loss", "bytes_compressed_total", "bytes_raw_total")
    return {
        "losses": json.dumps(sorted(losses.items())),
        "model": digest(folder / "runs/model", "*.safetensors"),
        "records": json.dumps([{name: one.get(name) for name in fields} for one in records]),
    }


def _records(path: Path) -> list[dict]:
    return record.read(path)[0] if path.exists() else []


def _training(engine: str) -> Scenario:
    return Scenario(
        engine,
        lambda inputs: main_py("fit", *_FAULTS, "--trainer.strategy.class_path", engine),
        _trained,
        resume=("--ckpt_path", "last"),
        begun=("runs/faults/checkpoints/last.ckpt", "runs/faults/checkpoints/.last.ckpt.old"),
    )


def _prepared(folder: Path) -> Outcome:
    return {"cache": digest(folder / "cache", "**/*.arrow", "**/*.bin", "**/*.npy", "**/*.safetensors")}


def _saliency(folder: Path) -> Outcome:
    return {"saliency": digest(folder / "runs/saliency", "*.safetensors")}


def _pruned(folder: Path) -> Outcome:
    # a command that was killed after it had recorded is started again, and records the same once more
    said = {one.get("val_ppl") for one in _records(folder / "runs/results.jsonl")}
    return {"weights": digest(folder / "runs/pruned", "*.safetensors"), "records": json.dumps(sorted(said))}


def _swept(folder: Path) -> Outcome:
    runs = [one for one in _records(folder / "sweep.jsonl") if one.get("kind") == "run"]
    return {"runs": json.dumps(sorted((one["run_name"], one["val_loss"]) for one in runs))}


def _on_model(command: str, config: str, field: str, output: str, *arguments: str) -> Callable[[Path], list[str]]:
    """A command that reads the small model and writes ``output``."""

    def line(inputs: Path) -> list[str]:
        model = str(inputs / "model")
        base = (f"--model.{field}", model, "--data.tokenizer", model)
        return main_py(command, "--config", str(ROOT / "configs" / config), *base, *_TEXT, *output.split(), *arguments)

    return line


def make_inputs() -> list[str]:
    """The command line that trains the small model of the other scenarios, into ``runs/model``."""
    short = ("--trainer.max_steps", "4", "--trainer.val_check_interval", "8", "--data.block_size", "32")
    return main_py("fit", *_FAULTS, *_LLAMA, _SIZES, *short)


def make_sparse(inputs: Path) -> list[str]:
    """The command line that makes the model in tiers that is packed, into ``sparse``."""
    output = ("--model.output", str(inputs / "sparse"))
    return _on_model("prune", "block_sparsity/oneshot.yaml", "pretrained", "", *output, *_FEW)(inputs)


def _packing(inputs: Path) -> list[str]:
    sparse = str(inputs / "sparse")
    arguments = ("--model.pretrained", sparse, "--data.tokenizer", sparse, "--model.output", "runs/packed", *_TEXT)
    return main_py("export", "--config", str(ROOT / "configs/block_sparsity/export.yaml"), *arguments)


def _packed(folder: Path) -> Outcome:
    return {"packed": digest(folder / "runs/packed", "*.safetensors", "config.json")}


def _sweep(inputs: Path) -> list[str]:
    main, *_ = main_py()
    config = str(ROOT / "configs/bench/smoke.yaml")
    return [main, "-m", "bench", "sweep", "--config", config, "--results", "sweep.jsonl", "--only", "local/*"]


SCENARIOS: dict[str, Scenario] = {
    one.name: one
    for one in (
        _training("CompressedFSDP"),
        _training("CompressedFSDP2"),
        _training("CompressedDDP"),
        Scenario("prepare", lambda inputs: main_py("prepare", *_FAULTS), _prepared, fresh_cache=True),
        Scenario(
            "predict",
            _on_model(
                "predict",
                "token_pruning/saliency.yaml",
                "base",
                "--model.folder runs/saliency",
                *("--model.num_samples", "64", "--data.max_train_blocks", "64", "--model.response", "8"),
            ),
            _saliency,
        ),
        Scenario(
            "prune structure",
            _on_model("prune", "structured_pruning/prune.yaml", "base", "--model.output runs/pruned"),
            _pruned,
        ),
        Scenario(
            "prune blocks",
            _on_model(
                "prune",
                "block_sparsity/oneshot.yaml",
                "pretrained",
                "--model.output runs/pruned",
                *_FEW,
            ),
            _pruned,
        ),
        Scenario("pack blocks", _packing, _packed),
        Scenario("sweep", _sweep, _swept, saves=()),
    )
}
