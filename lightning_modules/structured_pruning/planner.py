"""Score, allocate, plan: from a model and text to a pruning plan, every measurement kept in a file."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import replacing_file
from lightning_modules.perplexity import mean_nll
from lightning_modules.structured_pruning import layer_curves, layer_damage, loss_file
from lightning_modules.structured_pruning.block_influence import block_influence
from lightning_modules.structured_pruning.compensation import Compensation
from lightning_modules.structured_pruning.compensation.unchanged import Unchanged
from lightning_modules.structured_pruning.free import free_parts
from lightning_modules.structured_pruning.importance import Importance, LayerScores
from lightning_modules.structured_pruning.importance.base import Keep, best, checked
from lightning_modules.structured_pruning.layer_damage import LayerDamage
from lightning_modules.structured_pruning.layers import decoder_layers, shape_of
from lightning_modules.structured_pruning.layout import AUTO, Layout
from lightning_modules.structured_pruning.masking import masked
from lightning_modules.structured_pruning.needs import amount, check_tokens, most_inputs
from lightning_modules.structured_pruning.plan import LayerPlan, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash, settings_hash, tensors_hash, text_hash
from lightning_modules.structured_pruning.refitting import refit
from lightning_modules.structured_pruning.slicing import slice_model
from lightning_modules.structured_pruning.stock import group_step
from lightning_modules.structured_pruning.trials import MOST_CONTENDERS, Candidate, Space, check_stock

_REFIT_TOKENS = 3  # for one that determines the widest matrix, in refits of trials
_REFIT_PASSES = 3.0  # of the dense model, and of the sliced one for two matrices and once more


class Stage(Protocol):
    """Shows a stage of long work: called with its title and amount, gives a function that is told the amount done."""

    def __call__(self, title: str, total: int, unit: str = "", start: int = 0) -> AbstractContextManager[Any]:
        """Enter the stage."""


@dataclass
class Planner:
    """Plans the pruning of one model.

    Damages, scores and trials are measured once and kept in files whose names depend on weights and calibration text,
    so that an interrupted run, another budget or another allocation goes on with what is there.

    Attributes:
        model: The model to be pruned, with weights.
        base: Its folder or hub name, for the plan.
        batches: Calibration text, see ``batches.Batch``.
        importance: What is worth keeping within a layer.
        layout: The shape of the result, and where its parameters are taken from.
        cache: Folder for damages, scores and trials of all models.
        stage: Shows progress.
        probe_blocks: Rows of the calibration text that whole layers and shapes are tried on.
        compensation: What follows slicing; shapes are tried after a quick form of it.
    """

    model: Any
    base: str
    batches: list[dict[str, Tensor]]
    importance: Importance
    layout: Layout
    cache: Path
    stage: Stage
    probe_blocks: int = 4
    compensation: Compensation = field(default_factory=Unchanged)

    def __post_init__(self) -> None:
        self.score_seconds: float | None = None  # None: not measured in this process
        self.text = text_hash(self.batches)
        self.shapes = [shape_of(layer) for layer in decoder_layers(self.model)]
        self.layout.check(self.shapes)

    def plan(self, target: int, settings: dict[str, Any]) -> PruningPlan:
        """What to keep so that as near as possible to ``target`` parameters go.

        Args:
            target: Parameters to remove from the decoder layers.
            settings: Where the decision comes from, for the plan's reader.

        Raises:
            ValueError: The target is not possible; the message says what is.
        """
        keep, found = self._stock(target) if self.layout.shape == "stock" else self._free(target)
        if self.model.device.type == "meta":  # only counting: which parts does not matter
            layers = [LayerPlan(list(range(k.groups)), list(range(k.channels))) for k in keep]
        else:
            scores = self._rescored(keep) if self.importance.rescores else self.scores
            layers = [self._chosen(scores[i], keep[i], shape.n_rep) for i, shape in enumerate(self.shapes)]
        made_from = {
            "importance": {"name": self.importance.name, **self.importance.config()},
            **self.layout.settings(),
            "calibration_hash": self.text,
            "calibration_tokens": _tokens(self.batches),
            "parameters_requested": target,
        }
        shapes = [[shape.groups, shape.channels] for shape in self.shapes]
        plan = PruningPlan(layers, shapes, self.base, self.hash, made_from | found | settings)
        plan.check()
        return plan

    def _free(self, target: int) -> tuple[list[Keep], dict[str, Any]]:
        """How many parts every layer keeps in a shape of its own; none of a layer that is dropped whole."""
        layout = self.layout
        damage = self.damage if layout.divides.needs_damage else None
        scores = self.scores if layout.divides.needs_scores else None
        dropped = self._worthless()[: layout.dropped] if layout.dropped else []
        return free_parts(self.shapes, layout, target, dropped, damage, scores)

    def _stock(self, target: int) -> tuple[list[Keep], dict[str, Any]]:
        """How many parts every layer keeps where all kept layers are alike; and what was tried."""
        layout, config = self.layout, self.model.config
        check_stock(config, self.shapes, layout, target)
        space = Space(config, self.shapes, layout, self._worthless, target)
        count = space.most_trials()
        if count > 1:
            count += MOST_CONTENDERS if self._refit_rows else 0
            _ = self.scores, self._worthless() if max(space.drop_counts()) else []  # each shows a stage of its own
        with self.stage("Trying shapes", count, "shapes") if count > 1 else nullcontext(_silent) as done:
            numbers = itertools.count(1)

            def counted(candidate: Candidate, loss: Callable[[Candidate], float]) -> float:
                found = loss(candidate)
                done(next(numbers))
                return found

            refitted = partial(counted, loss=self._refitted) if self._refit_rows else None
            best, trials = space.search(partial(counted, loss=self._tried), refitted)
        kept, rest = space.rest(best.dropped)
        share = None if layout.attention_share == AUTO else layout.attention_share
        decoder = sum(s.parameters for s in self.shapes)
        note = group_step(kept, best.groups, target - rest, share, decoder)
        found = {"trials": [trial.fields() for trial in trials], "dropped": list(best.dropped), "notes": [note]}
        whole = Keep(best.groups, best.channels)
        return [Keep(0, 0) if i in best.dropped else whole for i in range(len(self.shapes))], found

    @cached_property
    def hash(self) -> str:
        """Hash of the model's weights; "" where it has none, on the meta device."""
        return "" if self.model.device.type == "meta" else model_hash(self.model)

    @cached_property
    def damage(self) -> LayerDamage:
        """Losses without each layer."""
        path = self._damage_path
        total, before = len(self.shapes) + 1, len(layer_damage.measured(path))
        count = len(self.probes)
        with self.stage("Skipping each layer", total * count, "batches", start=before * count) as done:
            found = layer_damage.measure(self.model, self.probes, path, done)
        free = self.layout.shape == "free"
        return replace(found, partly=self._curves()) if free and self.layout.divides.rates else found

    def _curves(self) -> list[list[tuple[float, float]]]:
        """Shares of each layer's parts and the losses without them, see ``LayerDamage.partly``."""
        cuts = [[self._cut(i, rate) for rate in self.layout.divides.rates] for i in range(len(self.shapes))]
        path, total = self._curves_path, sum(map(len, cuts))
        known = loss_file.read(path)
        before = sum(layer_curves.key(i, plan) in known for i, mine in enumerate(cuts) for plan, _ in mine)
        with self.stage("Cutting into each layer", total, "losses", start=before) as done:
            plans = [[plan for plan, _ in mine] for mine in cuts]
            losses = layer_curves.measure(self.model, self.probes, plans, path, done)
        return [
            [(share, loss) for (_, share), loss in zip(mine, found, strict=True)]
            for mine, found in zip(cuts, losses, strict=True)
        ]

    def _uncut(self) -> int:
        """Losses of cut layers that have still to be measured; all of them where which parts go is not known yet."""
        rates, layers = self.layout.divides.rates, range(len(self.shapes))
        if self._read_scores(self._scores_path) is None:
            return len(self.shapes) * len(rates)
        known = loss_file.read(self._curves_path)
        return len({layer_curves.key(i, self._cut(i, rate)[0]) for i in layers for rate in rates} - known.keys())

    def _cut(self, index: int, rate: float) -> tuple[LayerPlan, float]:
        """What a layer keeps when about so much goes of what may go, and the share that goes."""
        shape, share = self.shapes[index], self.layout.attention_share
        groups = shape.groups if share == 0 else max(1, round((1 - rate) * shape.groups))
        channels = shape.channels if share == 1 else max(1, round((1 - rate) * shape.channels))
        mine = [(share != 0) * shape.group_parameters, (share != 1) * shape.channel_parameters]
        gone = (shape.groups - groups) * mine[0] + (shape.channels - channels) * mine[1]
        may_go = shape.groups * mine[0] + shape.channels * mine[1]
        return self._chosen(self.scores[index], Keep(groups, channels), shape.n_rep), gone / may_go

    def work(self, target: int) -> dict[str, float]:
        """What a plan for this target has still to measure, in token passes, see ``estimate.described``."""
        layout, stock = self.layout, self.layout.shape == "stock"
        tokens = {"all": _tokens(self.batches), "probes": _tokens(self.probes)}
        found = dict[str, float]()
        drops = [layout.dropped or 0]
        trials = 0
        if stock:
            space = Space(self.model.config, self.shapes, layout, self._worthless, target)
            drops, trials = space.drop_counts(), space.most_trials()
        count = len(self.shapes)
        if (max(drops) and layout.drop_by == "damage") or (not stock and layout.divides.needs_damage):
            left = count + 1 - len(layer_damage.measured(self._damage_path))
            found["layers"] = tokens["probes"] * layer_damage.cost(count, left)
        elif max(drops) and not loss_file.read(self._influence_path):
            found["layers"] = float(tokens["probes"])
        if not stock and layout.divides.rates:
            found["cut layers"] = tokens["probes"] * self._uncut() / 2  # a pass starts at the layer
        if self._read_scores(self._scores_path) is None:
            found[self.importance.name] = tokens["all"] * self.importance.passes
        if self.importance.rescores:
            found["again, layer by layer"] = tokens["all"] * self.importance.passes * count
        if trials > 1:
            most = (trials, MOST_CONTENDERS if self._refit_rows else 0)
            new, again = most if any(found.values()) else self._untried(space)
            refits = _REFIT_PASSES * _tokens(self._refit_rows) + tokens["probes"]
            found["shapes"] = float(new * tokens["probes"] + again * refits)
        return {what: passes for what, passes in found.items() if passes}

    @cached_property
    def probes(self) -> list[dict[str, Tensor]]:
        """The first rows of the calibration text."""
        found, left = list[dict[str, Tensor]](), self.probe_blocks
        for batch in self.batches:
            if left:
                found.append({name: part[:left] for name, part in batch.items()})
                left -= len(found[-1]["input_ids"])
        return found

    def tried_tokens(self) -> dict[str, int]:
        """How much text shapes are tried on, by the names of ``memory.Workload``; nothing where none are tried."""
        if self.layout.shape != "stock" or not self.probes:
            return {}
        most = max(one["input_ids"].numel() for one in self.probes)
        refitted = _tokens(self._refit_rows)
        return {"probe_tokens": _tokens(self.probes), "probe_batch_tokens": most, "refit_tokens": refitted}

    def _worthless(self) -> list[int]:
        """Layers that may be dropped, the least worth first."""
        worth = self.damage.without if self.layout.drop_by == "damage" else self._influence
        return sorted(self.layout.droppable(self.shapes), key=worth.__getitem__)

    @cached_property
    def _influence(self) -> list[float]:
        known = loss_file.read(self._influence_path)
        if not known:
            with self.stage("Influence of each layer", len(self.probes), "batches") as done:
                found = block_influence(self.model, self.probes, done)
            known = {str(layer): value for layer, value in enumerate(found)}
            loss_file.write(self._influence_path, known)
        return [known[str(layer)] for layer in range(len(self.shapes))]

    def _tried(self, candidate: Candidate) -> float:
        """Loss of the model in a shape, by masks; measured once."""
        path, key = self._trials_path, self._key(candidate)
        known = loss_file.read(path)
        if key not in known:
            with masked(self.model, self._shaped(candidate)):
                known[key] = mean_nll(self.model, self.probes)
            loss_file.write(path, known)
        return known[key]

    @cached_property
    def _refit_rows(self) -> list[dict[str, Tensor]]:
        """Rows that follow the probes, for quick refits; none where nothing is refitted, or the text is too little."""
        if not self.compensation.refits or not self.batches:
            return []
        quick = self.compensation.quick()
        widest, hidden = most_inputs(self.shapes), self.model.config.hidden_size
        wanted = _REFIT_TOKENS * quick.fewest_tokens(widest, hidden)
        found, tried = list[dict[str, Tensor]](), self.probe_blocks
        for batch in self.batches:
            size, length = batch["input_ids"].shape
            first = min(tried, size)
            tried -= first
            while first < size:  # a padded row has fewer tokens than it is long
                tokens, rows = amount(found)
                more = max(math.ceil((wanted - tokens) / length), quick.folds - rows)
                if more <= 0:
                    break
                found.append({name: part[first : first + more] for name, part in batch.items()})
                first += more
        try:
            check_tokens(quick, widest, hidden, *amount(found))
        except ValueError:
            return []
        return found

    def _refitted(self, candidate: Candidate) -> float:
        """Loss of the model in a shape after a quick refit on other text than it is tried on; measured once."""
        path, key = self._trials_path, self._refit_key(candidate)
        known = loss_file.read(path)
        if key not in known:
            plan = self._shaped(candidate)
            sliced = slice_model(self.model, plan)
            refit(self.model, sliced, plan, self._refit_rows, self.compensation.quick())
            known[key] = mean_nll(sliced, self.probes)
            loss_file.write(path, known)
        return known[key]

    def _shaped(self, candidate: Candidate) -> PruningPlan:
        """The plan for a shape."""
        gone, keep = set(candidate.dropped), Keep(candidate.groups, candidate.channels)
        layers = [
            LayerPlan([], []) if i in gone else self._chosen(self.scores[i], keep, shape.n_rep)
            for i, shape in enumerate(self.shapes)
        ]
        return PruningPlan(layers, [[s.groups, s.channels] for s in self.shapes], self.base, self.hash)

    def _untried(self, space: Space) -> tuple[int, int]:
        """How many shapes of a search have still to be tried, and refitted, damages being known."""
        known = loss_file.read(self._trials_path)
        missing, unfitted = list[Candidate](), list[Candidate]()

        def loss(candidate: Candidate, key: Callable[[Candidate], str], new: list[Candidate]) -> float:
            if key(candidate) not in known:
                new.append(candidate)
            return known.get(key(candidate), math.inf)

        refitted = partial(loss, key=self._refit_key, new=unfitted) if self._refit_rows else None
        space.search(partial(loss, key=self._key, new=missing), refitted)
        return len(missing), len(unfitted)

    def _key(self, candidate: Candidate) -> str:
        return settings_hash([self.importance.name, self.importance.config(), self.text, asdict(candidate)])

    def _refit_key(self, candidate: Candidate) -> str:
        return settings_hash([self._key(candidate), self.compensation.quick().describe(), text_hash(self._refit_rows)])

    @cached_property
    def scores(self) -> list[LayerScores]:
        """Importances of all groups and channels.

        Raises:
            ValueError: They cannot rank anything, see ``importance.base.checked``.
        """
        path = self._scores_path
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

    @property
    def _damage_path(self) -> Path:
        return self._folder / f"damage-{text_hash(self.probes)[:16]}.json"

    @property
    def _curves_path(self) -> Path:
        key = settings_hash([self.importance.name, self.importance.config(), self.text])
        return self._folder / f"curves-{text_hash(self.probes)[:16]}-{key[:16]}.json"

    @property
    def _influence_path(self) -> Path:
        return self._folder / f"influence-{text_hash(self.probes)[:16]}.json"

    @property
    def _scores_path(self) -> Path:
        key = settings_hash([self.importance.name, self.importance.config(), self.text])
        return self._folder / f"scores-{self.importance.name}-{key[:16]}.safetensors"

    @property
    def _trials_path(self) -> Path:
        return self._folder / f"trials-{text_hash(self.probes)[:16]}.json"

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

    def _chosen(self, scores: LayerScores, keep: Keep, n_rep: int) -> LayerPlan:
        groups = best(scores.groups, keep.groups)
        return LayerPlan(groups, best(scores.channels, keep.channels), self.importance.query_heads(groups, n_rep))


def _tokens(batches: Sequence[dict[str, Tensor]]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def _silent(done: int) -> None:
    """Progress that nobody sees."""


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
