"""Wanda and SparseGPT beside their authors' code: the same model, the same calibration text, 2:4, nothing trained.

`git clone https://github.com/locuslab/wanda` has both (MIT and Apache-2.0); its folder is given as `--official`. Its
functions run as they are, but for what has changed around them since: layers are called with their rotary angles, and
nothing waits for a GPU where there is none. Each text is cut in two: calibration on the first halves, perplexity on the
second. Prunings that are finished in a `--folder` are not repeated.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.experiments.runs import claim, halves, say
from bench.tables import figures
from common.files import write_text
from lightning_modules.block_sparsity.demotion import Ratios
from lightning_modules.block_sparsity.layerwise import Method, prune_layers
from lightning_modules.block_sparsity.matrices import linear_layers
from lightning_modules.block_sparsity.pruner import Pruner
from lightning_modules.block_sparsity.scores.obs_saliency import ObsSaliency
from lightning_modules.block_sparsity.scores.wanda import Wanda
from lightning_modules.block_sparsity.updates.obs import Obs
from lightning_modules.loading import load
from lightning_modules.perplexity import mean_nll, perplexity

RECORDS = "block_peers.jsonl"
COMMAND = "python -m bench experiment block_official --model FOLDER --texts NAME=FILE,NAME=FILE --official FOLDER"
LENGTH, CALIBRATION_BLOCKS, EVALUATION_BLOCKS = 512, 16, 16
METHODS = {"wanda": Method(Wanda()), "sparsegpt": Method(ObsSaliency(), update=Obs())}


def run(records: Path, folder: Path, model: Path, texts: Mapping[str, Path], official: Path) -> None:
    """Measure and append the figures.

    Args:
        records: File that the figures are appended to.
        folder: Working folder.
        model: Hugging Face folder of a Llama.
        texts: Texts by name.
        official: Checkout of the authors' code.

    Raises:
        FileNotFoundError: It is none.
        ValueError: A text too short to be cut in two, or a folder that ``claim`` refuses.
    """
    if not (official / "lib/prune.py").is_file():
        raise FileNotFoundError(
            f"official: {official} has no lib/prune.py; git clone https://github.com/locuslab/wanda"
        )
    claim(
        folder, model, *texts.values(), official / "lib", model=model.name, texts={n: str(p) for n, p in texts.items()}
    )
    held_out = halves(folder, texts)
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration = blocks(tokenizer, folder / "calibration.json", CALIBRATION_BLOCKS)
    evaluated = {name: blocks(tokenizer, path, EVALUATION_BLOCKS) for name, path in held_out.items()}
    for name, method in METHODS.items():
        ours = _once(folder / f"{name}-ours.json", partial(_ours, model, method, calibration, evaluated))
        theirs = _once(
            folder / f"{name}-official.json", partial(_theirs, model, official, name, calibration, evaluated)
        )
        for text in held_out:
            ratio = ours[text] / theirs[text]
            figures.append(
                records,
                figure=f"official-{name}-{text}",
                what=f"2:4 by {name}, nothing trained: our perplexity on {text} over that of the authors' code "
                f"({theirs[text]:.1f} → {ours[text]:.1f})",
                value=ratio,
                unit="×",
                target="within 3 %",
                reached=abs(ratio - 1) <= 0.03,
                command=COMMAND,
                details={"calibration_tokens": LENGTH * CALIBRATION_BLOCKS, "ours": ours, "official": theirs},
            )


def blocks(tokenizer: Any, path: Path, count: int) -> list[Tensor]:
    """Blocks of a text, int64 ``[1, LENGTH]`` each, evenly spread over it."""
    text = "\n\n".join(document["text"] for document in json.loads(path.read_text()))
    ids = torch.tensor(tokenizer(text).input_ids)
    whole = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(whole) < count:
        raise ValueError(f"{path}: {len(whole)} blocks of {LENGTH} tokens where {count} are needed")
    return [whole[i * len(whole) // count][None] for i in range(count)]


def _once(path: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What has been measured, measured unless it has been."""
    if not path.exists():
        write_text(path, json.dumps(measure()))
        say(f"{path.stem}: {path.read_text()}")
    found: dict[str, float] = json.loads(path.read_text())
    return found


def _ours(
    model: Path, method: Method, calibration: list[Tensor], evaluated: Mapping[str, list[Tensor]]
) -> dict[str, float]:
    found = load(model)
    batches = [{"input_ids": ids, "labels": ids} for ids in calibration]
    prune_layers(found, Pruner(found, pattern="2:4"), Ratios(0, 1, 0), method, batches, torch.device("cpu"))
    return _measured(found, evaluated)


def _theirs(
    model: Path, official: Path, name: str, calibration: list[Tensor], evaluated: Mapping[str, list[Tensor]]
) -> dict[str, float]:
    found = load(model)
    args = SimpleNamespace(nsamples=len(calibration), seed=0, sparsity_ratio=0.5, use_variant=False)
    found.seqlen, found.hf_device_map = LENGTH, {}
    with _authors(official) as prune, _angles(found), torch.no_grad():
        loader = ([(ids, ids) for ids in calibration], None)
        with mock.patch.object(prune, "get_loaders", lambda *_, **__: loader):
            getattr(prune, f"prune_{name}")(args, found, None, torch.device("cpu"), prune_n=2, prune_m=4)
    return _measured(found, evaluated)


@contextmanager
def _authors(official: Path) -> Iterator[Any]:
    """Their module, on a machine without a GPU, too."""
    with mock.patch.object(sys, "path", [str(official), *sys.path]):
        module = importlib.import_module("lib.prune")
    idle = [mock.patch.object(torch.cuda, what, lambda: None) for what in ("synchronize", "empty_cache")]
    with idle[0], idle[1]:
        yield module


@contextmanager
def _angles(model: Any) -> Iterator[None]:
    """Call layers with rotary angles, which they did not take as an argument when the authors' loop was written."""
    angles = model.model.rotary_emb(torch.zeros(1, dtype=model.dtype), torch.arange(LENGTH)[None])
    inner = {layer: layer.forward for layer in model.model.layers}

    def forward(layer: Any, hidden: Tensor, **_: Any) -> Tensor:
        out: Tensor = inner[layer](hidden, position_embeddings=angles, attention_mask=None)
        return out

    for layer in inner:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in inner:
            del layer.forward


def _measured(model: Any, evaluated: Mapping[str, list[Tensor]]) -> dict[str, float]:
    zeros = [float((matrix.weight == 0).float().mean()) for matrix in linear_layers(model).values()]
    found = {"zeros": sum(zeros) / len(zeros)}
    for name, text in evaluated.items():
        found[name] = perplexity(mean_nll(model, [{"input_ids": ids, "labels": ids} for ids in text]))
    return found
