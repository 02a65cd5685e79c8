"""Score, allocate, plan: from a model and text to a pruning plan, every measurement kept in a file."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import replacing_file
from lightning_modules.structured_pruning import layer_damage
from lightning_modules.structured_pruning.allocation import Allocation
from lightning_modules.structured_pruning.budget import Removal, check_removable, whole_parts
from lightning_modules.structured_pruning.importance import Importance, LayerScores
from lightning_modules.structured_pruning.importance.base import Keep, best, checked
from lightning_modules.structured_pruning.layer_damage import LayerDamage
from lightning_modules.structured_pruning.layers import LayerShape, decoder_layers, shape_of
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash, settings_hash, tensors_hash, text_hash


class Stage(Protocol):
    """Shows a stage of long work: called with its title and amount, gives a function that is told the amount done."""

    def __call__(self, title: str, total: int, unit: str = "", start: int = 0) -> AbstractContextManager[Any]:
        """Enter the stage."""


@dataclass
class Planner:
    """Plans the pruning of one model.

    Damages and scores are measured once and kept in files whose names depend on weights and calibration text, so that
    an interrupted run, another budget or another allocation goes on with what is there.

    Attributes:
        model: The model to be pruned, with weights.
        base: Its folder or hub name, for the plan.
        batches: Calibration text, see ``batches.Batch``.
        importance: What is worth keeping within a layer.
        allocation: How much goes of each layer.
        multiple: Kept channels are a multiple of it.
        drop_layers: Layers of least damage to remove whole.
        cache: Folder for damages and scores of all models.
        stage: Shows progress.
    """

    model: Any
    base: str
    batches: list[dict[str, Tensor]]
    importance: Importance
    allocation: Allocation
    multiple: int
    drop_layers: int
    cache: Path
    stage: Stage

    def __post_init__(self) -> None:
        self.score_seconds: float | None = None  # None: not measured in this process
        self.text = text_hash(self.batches)
        self.shapes = [shape_of(layer) for layer in decoder_layers(self.model)]
        _check_drop_layers(self.drop_layers, len(self.shapes))

    def plan(self, target: int, settings: dict[str, Any]) -> PruningPlan:
        """What to keep so that as near as possible to ``target`` parameters go.

        Args:
            target: Parameters to remove from the decoder layers.
            settings: Where the decision comes from, for the plan's reader.

        Raises:
            ValueError: The target is not possible; the message says what is.
        """
        keep = self._keep(target)
        if self.model.device.type == "meta":  # only counting: which parts does not matter
            layers = [LayerPlan(list(range(k.groups)), list(range(k.channels))) for k in keep]
        else:
            scores = self._rescored(keep) if self.importance.rescores else self.scores
            layers = [self._chosen(scores[i], keep[i], shape.n_rep) for i, shape in enumerate(self.shapes)]
        made_from = {
            "importance": {"name": self.importance.name, **self.importance.config()},
            "allocation": {"name": self.allocation.name, **self.allocation.config()},
            "drop_layers": self.drop_layers,
            "channel_multiple": self.multiple,
            "calibration_hash": self.text,
            "calibration_tokens": sum(batch["input_ids"].numel() for batch in self.batches),
            "parameters_requested": target,
        }
        shapes = [[shape.groups, shape.channels] for shape in self.shapes]
        plan = PruningPlan(layers, shapes, self.base, self.hash, made_from | settings)
        plan.check()
        return plan

    @cached_property
    def hash(self) -> str:
        """Hash of the model's weights; "" where it has none, on the meta device."""
        return "" if self.model.device.type == "meta" else model_hash(self.model)

    @cached_property
    def damage(self) -> LayerDamage:
        """Losses without each layer."""
        path = self._folder / f"damage-{self.text[:16]}.json"
        total, before = len(self.shapes) + 1, len(layer_damage.measured(path))
        count = len(self.batches)
        with self.stage("Skipping each layer", total * count, "batches", start=before * count) as done:
            return layer_damage.measure(self.model, self.batches, path, done)

    @cached_property
    def scores(self) -> list[LayerScores]:
        """Importances of all groups and channels.

        Raises:
            ValueError: They cannot rank anything, see ``importance.base.checked``.
        """
        key = settings_hash([self.importance.name, self.importance.config(), self.text])
        path = self._folder / f"scores-{self.importance.name}-{key[:16]}.safetensors"
        scores = self._read_scores(path)
        if scores is None:
            started = time.perf_counter()
            if self.importance.shows_progress:
                scores = checked(self.importance.score(self.model, self.batches))
            else:
                with self.stage(f"Scoring by {self.importance.name}", len(self.batches), "batches") as done:
                    scores = checked(self.importance.score(self.model, _Counted(self.batches, done)))
            self.score_seconds = time.perf_counter() - started
            parts = {
                f"{i}.{kind}": part.contiguous()
                for i, layer in enumerate(scores)
                for kind, part in layer._asdict().items()
            }
            with replacing_file(path) as beside:
                save_file(parts, beside, {"hash": tensors_hash(parts)})
        return scores

    def _rescored(self, keep: list[Keep]) -> list[LayerScores]:
        with self.stage("Scoring layer by layer", len(self.shapes) * len(self.batches), "batches") as done:
            return self.importance.rescore(self.model, _Counted(self.batches, done), self.scores, keep)

    @property
    def _folder(self) -> Path:
        return self.cache / self.hash[:16]

    def _read_scores(self, path: Path) -> list[LayerScores] | None:
        """Scores measured before; a file that is not as it was written counts as none."""
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                if (file.metadata() or {}).get("hash") != tensors_hash(parts):
                    return None
            return [LayerScores(parts[f"{i}.groups"], parts[f"{i}.channels"]) for i in range(len(self.shapes))]
        except (OSError, SafetensorError, KeyError):
            return None

    def _keep(self, target: int) -> list[Keep]:
        """How many parts every layer keeps; none of a layer that is dropped whole."""
        damage = self.damage if self.allocation.needs_damage or self.drop_layers else None
        scores = self.scores if self.allocation.needs_scores else None
        dropped = set[int]()
        if damage is not None and self.drop_layers:
            order = sorted(range(len(self.shapes)), key=damage.without.__getitem__)
            dropped = set(order[: self.drop_layers])
        stay = [i for i in range(len(self.shapes)) if i not in dropped]
        shapes = [self.shapes[i] for i in stay]
        target -= _dropped_parameters([self.shapes[i] for i in dropped], target)
        removals = [Removal(0, 0)] * len(stay)
        if target:
            removals = self.allocation.removals(
                shapes,
                target,
                damage and LayerDamage(damage.dense, [damage.without[i] for i in stay]),
                scores and [scores[i] for i in stay],
            )
        kept = dict(zip(stay, whole_parts(shapes, removals, target, self.multiple), strict=True))
        return [kept.get(i, Keep(0, 0)) for i in range(len(self.shapes))]

    def _chosen(self, scores: LayerScores, keep: Keep, n_rep: int) -> LayerPlan:
        groups = best(scores.groups, keep.groups)
        return LayerPlan(groups, best(scores.channels, keep.channels), self.importance.query_heads(groups, n_rep))


def check_possible(
    shapes: Sequence[LayerShape], target: int, allocation: Allocation, multiple: int, drop_layers: int, rounds: int
) -> None:
    """Refuse what no damages and scores can make possible; needs no weights.

    Where layers differ in size and some are to be dropped, which ones only damages say, and only they can tell.

    Args:
        shapes: The layers.
        target: Parameters to remove from all of them.
        allocation: How much goes of each layer.
        multiple: Kept channels are a multiple of it.
        drop_layers: Layers to remove whole.
        rounds: Rounds of equal size.

    Raises:
        ValueError: The message says what is possible.
    """
    _check_drop_layers(drop_layers, len(shapes))
    if drop_layers and len({shape.parameters for shape in shapes}) > 1:
        return
    target -= _dropped_parameters(shapes[:drop_layers], target)
    stay = shapes[drop_layers:]
    if not target:
        return
    for number in range(rounds):
        gone = round(number / rounds * target)
        allocation.check_target(stay, round((number + 1) / rounds * target) - gone, gone)
    check_removable(stay, target, multiple)


def _check_drop_layers(drop_layers: int, layers: int) -> None:
    if not 0 <= drop_layers < layers:
        raise ValueError(f"drop_layers must lie between 0 and {layers - 1}, got {drop_layers}")


def _dropped_parameters(dropped: Sequence[LayerShape], target: int) -> int:
    """Parameters of layers that go whole.

    Raises:
        ValueError: They are more than is to go.
    """
    parameters = sum(shape.parameters for shape in dropped)
    if parameters > target:
        raise ValueError(
            f"budget: dropping {len(dropped)} layers removes {parameters - target:,} parameters too many; "
            "lower drop_layers or remove more"
        )
    return parameters


class _Counted(Sequence[dict[str, Tensor]]):
    """Batches that report how many have been taken so far."""

    def __init__(self, batches: list[dict[str, Tensor]], done: Any) -> None:
        self._batches, self._done, self._taken = batches, done, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        batch = self._batches[index]  # past the end this raises, which ends a loop
        self._done(self._taken)
        self._taken += 1
        return batch
