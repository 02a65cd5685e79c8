"""Pruning in several rounds, each but the last followed by a short recovery; how the result is kept and made again.

A pruned folder of several rounds holds, besides the plan in numbers of the first model, the plan of each round in
numbers of the model that it cut, the matrices that were refitted after it, and the adapters that were merged then:
enough to go the same way again.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_modules.batches import Batch
from lightning_modules.structured_pruning.adapter import adapter_weights, attach
from lightning_modules.structured_pruning.evaluation import backward
from lightning_modules.structured_pruning.layers import ATTENTION, MLP
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.refitted import hashes_of, refitted_hashes

FOLDER = "rounds"
_RANK = 8


class Round(NamedTuple):
    """One round.

    Attributes:
        plan: What it keeps of the model at its beginning.
        adapters: Weights of the adapters that were merged after it; None after the last round.
        refitted: What its compensation changed of the slice, see ``refitting.Refit``; None after the last round, whose
            matrices are the pruned model's.
    """

    plan: PruningPlan
    adapters: dict[str, Tensor] | None
    refitted: dict[str, Tensor] | None = None


def short_recovery(
    model: Any,
    batches: Sequence[Batch],
    steps: int,
    learning_rate: float,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[Any, dict[str, Tensor]]:
    """Train low-rank adapters on all seven projections for a few steps and merge them.

    Args:
        model: A pruned model; its weights change.
        batches: Text, taken again from the beginning when it ends.
        steps: Optimizer steps, a batch each.
        learning_rate: Of AdamW, constant.
        done: Told the number of steps done, for progress.

    Returns:
        The merged model, in evaluation mode, and the adapters' weights, on the CPU.
    """
    adapted: Any = attach(model, _lora())
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps), 1):
        backward(adapted, batch)
        optimizer.step()
        optimizer.zero_grad()
        done(step)
    weights = {name: weight.cpu().clone() for name, weight in adapter_weights(adapted.state_dict()).items()}
    return _merged(adapted), weights


def recovered(model: Any, adapters: dict[str, Tensor]) -> Any:
    """Merge the adapters of an earlier ``short_recovery`` again; the model's weights change."""
    return _merged(attach(model, _lora(), adapters))


def composed(plans: Sequence[PruningPlan]) -> PruningPlan:
    """One plan that keeps what all rounds keep, in numbers of the first model.

    Its settings are the last round's, which ``settings["round"]`` says; without notes, which are of what it cut.

    Raises:
        ValueError: A plan is not for what the one before keeps.
    """
    first, *later = plans
    layers = list(first.layers)
    for plan in later:
        if plan.shapes != [[len(layer.groups), len(layer.channels)] for layer in layers if not layer.dropped]:
            raise ValueError("rounds: a plan is not for the model that the round before leaves")
        follows = iter(plan.layers)  # a dropped layer is not in later plans
        layers = [layer if layer.dropped else _within(layer, next(follows)) for layer in layers]
    settings = plans[-1].settings | ({"round": len(plans), "notes": []} if later else {})
    return PruningPlan(layers, first.shapes, first.base, first.base_hash, settings)


def save_rounds(folder: Path, rounds: Sequence[Round]) -> None:
    """Write the rounds of a pruned folder; a single one is the folder's plan, so nothing is written."""
    if len(rounds) < 2:
        return
    for (plan, weights, refitted), paths in zip(rounds, _paths(folder), strict=False):
        plan.save(paths.plan)
        for part, path in ((weights, paths.adapters), (refitted, paths.refitted)):
            if part is not None:
                save_file({name: weight.contiguous() for name, weight in part.items()}, path)


def load_rounds(folder: Path, plan: PruningPlan) -> list[Round]:
    """Read the rounds of a pruned folder.

    Args:
        folder: What ``prune`` wrote.
        plan: The folder's plan.

    Returns:
        As many rounds as there were; for a single one the plan itself.

    Raises:
        ValueError: A file is damaged, or the rounds together are not the folder's plan.
    """
    if not (folder / FOLDER).is_dir():
        return [Round(plan, None)]
    rounds = []
    for paths in _paths(folder):
        if not paths.plan.exists():
            break
        rounds.append(Round(PruningPlan.load(paths.plan), _weights(paths.adapters), _weights(paths.refitted)))
    together = composed([one.plan for one in rounds]) if rounds else None
    if together is None or together.layers != plan.layers:
        raise ValueError(f"{folder / FOLDER}: the rounds together do not keep what the plan of {folder} says")
    if any((one.adapters is None) != (one is rounds[-1]) for one in rounds):
        raise ValueError(f"{folder / FOLDER}: every round but the last has adapters, but some are missing")
    for number, one in enumerate(rounds[:-1], 1):
        if hashes_of(one.refitted or {}) != refitted_hashes(one.plan):
            raise ValueError(f"{folder / FOLDER}: what was refitted in round {number} is not what its plan says")
    return rounds


def _lora() -> LoraConfig:
    return LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=list(ATTENTION + MLP), task_type="CAUSAL_LM")


def _merged(adapted: Any) -> Any:
    return adapted.merge_and_unload().requires_grad_(True).eval()


def _within(layer: LayerPlan, later: LayerPlan) -> LayerPlan:
    return LayerPlan([layer.groups[g] for g in later.groups], [layer.channels[c] for c in later.channels])


class _Paths(NamedTuple):
    plan: Path
    adapters: Path
    refitted: Path


def _paths(folder: Path) -> Iterator[_Paths]:
    """Where the plan, the adapters and the refitted matrices of the first, second, … round are."""
    for number in itertools.count(1):
        path = folder / FOLDER / f"{number}.json"
        yield _Paths(path, path.with_suffix(".safetensors"), path.with_suffix(".refitted.safetensors"))


def _weights(path: Path) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); prune the model again") from error
    return weights
