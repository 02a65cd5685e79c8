"""Pruning one decoder layer after the other, each on what the pruned layers below it give.

Statistics, masks, new values and, where asked for, learning: all of a layer while it is on the device, before the next
one is looked at. So do Wanda and SparseGPT; what the unpruned model gives to a layer is not what it will get.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from common.progress import stage
from lightning_modules.batches import Batch
from lightning_modules.block_sparsity.demotion import Ratios, demote
from lightning_modules.block_sparsity.inputs import Inputs, collecting
from lightning_modules.block_sparsity.layer_files import LayerFiles
from lightning_modules.block_sparsity.masks import mask_weights
from lightning_modules.block_sparsity.mix import Mix, best_mix, in_bands
from lightning_modules.block_sparsity.pruner import Pruner
from lightning_modules.block_sparsity.reconstruction import Reconstruction, reconstruct
from lightning_modules.block_sparsity.scored import Scored
from lightning_modules.block_sparsity.scores import Score
from lightning_modules.block_sparsity.scores.obs_saliency import ObsSaliency
from lightning_modules.block_sparsity.sensitivity import output_sensitivity
from lightning_modules.block_sparsity.updates import Update
from lightning_modules.block_sparsity.updates.base import relative_error
from lightning_modules.stream import LayerInputs, decoder_layers, visiting

Statistics = Literal["sequential", "dense"]


@dataclass(frozen=True)
class Method:
    """How a layer is pruned.

    Args:
        score: Which weights matter.
        statistics: "sequential": a layer is given what the pruned layers below it give; "dense": what the model as it
            was gives, which saves a pass over the layer.
        update: New values of the weights that stay.
        reconstruction: What the layer learns afterwards.
    """

    score: Score
    statistics: Statistics = "sequential"
    update: Update | None = None
    reconstruction: Reconstruction | None = None

    def describe(self) -> dict[str, Any]:
        """What makes a difference, as plain values."""
        return {
            "score": self.score.describe(),
            "statistics": self.statistics,
            "update": self.update.describe() if self.update else None,
            "reconstruction": asdict(self.reconstruction) if self.reconstruction else None,
        }


@dataclass
class Errors:
    """How far the outputs on the calibration text are off, squared and relative: before something and after it.

    Attributes:
        matrices: Of each matrix, by name: only masked, and updated.
        layers: Of each decoder layer: before and after learning.
    """

    matrices: dict[str, tuple[float, float]] = field(default_factory=dict)
    layers: list[tuple[float, float]] = field(default_factory=list)


@torch.no_grad()
def prune_layers(
    model: nn.Module,
    pruner: Pruner,
    target: Ratios | Mix,
    method: Method,
    batches: Sequence[Batch],
    device: torch.device,
    folder: Path | None = None,
) -> Errors:
    """One iteration: new masks from the current weights, new values for those that stay, zero for the others.

    Args:
        model: The model that the pruner's matrices belong to.
        pruner: Its masks; they follow.
        target: Ratios after the iteration, of which an unstructured mask gets the sparsity that they would have; or
            bits, for which the mix that loses least is found first, by what the model as it is gives to each matrix.
        method: How.
        batches: Calibration text, see ``batches.Batch``; none is needed where nothing looks at inputs.
        device: Where to compute; layers visit it one after the other.
        folder: Where finished layers are kept for a run that goes on after this one was interrupted.

    Raises:
        ValueError: See ``demotion.demote`` and ``LayerInputs``.
    """
    score, update, learning = method.score, method.update, method.reconstruction
    if isinstance(target, Ratios):
        pruner.check_target(target)
    known = score.statistics(model, pruner.matrices, batches, device)
    targets = _targets(model, pruner, target, method, known, batches, device)
    looks = score.needs_inputs or update is not None
    moments = score.needs_moments or update is not None
    sequential = method.statistics == "sequential"
    pruned = LayerInputs(model, batches, device) if learning or (looks and sequential) else None
    whole = LayerInputs(model, batches, device) if learning or (looks and not sequential) else None
    shares = {name: asdict(one) for name, one in targets.items() if isinstance(one, Ratios)}
    maps = [one for one in targets.values() if isinstance(one, Tensor)]
    text = [part for batch in batches for _, part in sorted(batch.items())]
    # embeddings, norms, biases; what is known of a whole model beforehand is known by all of its matrices
    cut = set() if known else {id(matrix.weight) for matrix in pruner.matrices.values()}
    others = [weight.detach() for weight in model.parameters() if id(weight) not in cut]
    about = [method.describe(), pruner.describe(), shares]
    finished = LayerFiles(folder, about, itertools.chain(maps, text, others))
    errors, means, layers = Errors(), dict[str, Tensor](), decoder_layers(model)
    with stage("Pruning", len(layers), "layers") as done:
        for number, layer in enumerate(layers.values(), 1):
            mine = inside(layer, pruner.matrices)
            with visiting(layer, device), pruner.visiting(mine, device):
                kept = finished.next({**_weights(mine), **pruner.tensors(mine)})
                collects, inputs = kept is None and looks, dict[str, Inputs]()
                if collects and sequential and pruned is not None:
                    with collecting(mine, pruned, moments) as inputs:
                        for batch in range(len(batches)):
                            pruned.through(layer, batch)
                elif collects and whole is not None:
                    with collecting(mine, whole, moments) as inputs:
                        whole.advance(layer)
                if whole is not None and (sequential or not collects):
                    whole.advance(layer)
                if kept is None:
                    found = {
                        n: _cut(n, pruner, targets[n], method, known.get(n), inputs.pop(n, None), errors) for n in mine
                    }
                    if learning is not None and pruned is not None and whole is not None:
                        keep = {name: pruner.keep[name] for name in mine}
                        errors.layers.append(reconstruct(layer, mine, keep, pruned, whole.hidden, learning))
                    finished.write({**_weights(mine), **pruner.tensors(mine), **found})
                else:
                    found = _take(mine, pruner, kept)
                means |= {name: mean.cpu() for name, mean in found.items()}
                if pruned is not None and number < len(layers):
                    pruned.advance(layer)
            done(number)
    pruner.note(means)
    return errors


def _cut(
    name: str,
    pruner: Pruner,
    target: Ratios | Tensor,
    method: Method,
    known: Tensor | None,
    inputs: Inputs | None,
    errors: Errors,
) -> Tensor:
    """New mask and values of one matrix; the mean scores of its blocks, see ``Pruner.cut``."""
    weight, update = pruner.matrices[name].weight, method.update
    with _naming(name):
        if known is not None:
            known = known.to(weight.device)
        elif inputs is not None:
            known = method.score.statistic(weight.detach(), inputs)
        means, choice = pruner.cut(name, method.score, known, target)
        if update is not None and inputs is not None and inputs.tokens:
            was, keep = weight.detach().float(), pruner.keep[name]
            found, chosen = update.apply(was, keep, inputs.moments, choice)
            before = relative_error(was.masked_fill(~keep, 0.0), was, inputs.moments)
            errors.matrices[name] = (before, relative_error(found, was, inputs.moments))
            pruner.choose(name, chosen)
            weight.copy_(found)
    mask_weights({name: pruner.matrices[name]}, {name: pruner.keep[name]})
    return means


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors with the name of the matrix that they are about."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{name}: the inputs are too much alike ({error}); give a larger damping") from error
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from None


def _take(mine: Mapping[str, nn.Linear], pruner: Pruner, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A finished layer's weights and masks; the mean scores of its blocks."""
    for name, matrix in mine.items():
        matrix.weight.copy_(kept[f"{name}.weight"])
        pruner.take(name, kept)
    return {name: kept[name] for name in mine}


def _targets(
    model: nn.Module,
    pruner: Pruner,
    target: Ratios | Mix,
    method: Method,
    known: Mapping[str, Tensor],
    batches: Sequence[Batch],
    device: torch.device,
) -> dict[str, Ratios | Tensor]:
    """What each matrix ends with: its own ratios, or the tier of each of its blocks."""
    if isinstance(target, Mix):
        # an update makes up for what goes: what is left to lose then is what OBS saliencies say
        score = ObsSaliency(method.update.damping) if method.update is not None else method.score
        minded = output_sensitivity(model, pruner.matrices, batches, device)
        scores = _scores(model, pruner, score, {} if method.update is not None else known, batches, device)
        weighted = {name: one.weighted(minded[name]) for name, one in scores.items()}
        found = best_mix(weighted, pruner.tiers, target, target.ks or [pruner.k])
        pruner.set_topk(found.k)
        rank_zero_info(
            f"{found.bits:.3f} bits per weight: top-k blocks of {found.k} weights; "
            f"{100 * found.loss:.2f} % of the squared scores go"
        )
        if pruner.scope == "band":
            bits = partial(target.size, block=pruner.block, k=found.k)
            return {name: in_bands(one, bits) for name, one in found.maps.items()}
        return dict(found.maps)
    if not pruner.tiers or pruner.scope != "global":
        return dict.fromkeys(pruner.matrices, target)
    tiers = copy.deepcopy(pruner.tiers)
    demote(_scores(model, pruner, method.score, known, batches, device), tiers, target, "global")
    return {name: _ratios(one.map_rc) for name, one in tiers.items()}


def _ratios(map_rc: Tensor) -> Ratios:
    return Ratios(*(torch.bincount(map_rc.flatten().long(), minlength=3) / map_rc.numel()).tolist())


def _scores(
    model: nn.Module,
    pruner: Pruner,
    score: Score,
    known: Mapping[str, Tensor],
    batches: Sequence[Batch],
    device: torch.device,
) -> dict[str, Scored]:
    """How each matrix is scored by what the model as it is gives to it."""
    if not score.needs_inputs:
        return {name: _scored(pruner, name, score, known.get(name)) for name in pruner.matrices}
    stream, layers, scores = LayerInputs(model, batches, device), decoder_layers(model), dict[str, Scored]()
    with stage("Shares of the matrices", len(layers), "layers") as done:
        for number, layer in enumerate(layers.values(), 1):
            mine = inside(layer, pruner.matrices)
            with visiting(layer, device), collecting(mine, stream, score.needs_moments) as inputs:
                stream.advance(layer)
                found = {}
                for name, matrix in mine.items():
                    with _naming(name):
                        found[name] = score.statistic(matrix.weight.detach(), inputs.pop(name))
            for name, statistic in found.items():
                home = pruner.matrices[name].weight.device
                scores[name] = _scored(pruner, name, score, None if statistic is None else statistic.to(home))
            done(number)
    return scores


def _scored(pruner: Pruner, name: str, score: Score, statistic: Tensor | None) -> Scored:
    with _naming(name):
        return pruner.scored(name, score, statistic)


def inside(layer: nn.Module, matrices: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Those of the matrices that belong to a layer."""
    modules = set(layer.modules())
    return {name: matrix for name, matrix in matrices.items() if matrix in modules}


def _weights(mine: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    return {f"{name}.weight": matrix.weight for name, matrix in mine.items()}
