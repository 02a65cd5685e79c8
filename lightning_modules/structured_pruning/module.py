"""Structured pruning as a LightningModule: the commands prune, verify, export and validate."""

import math
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor

from common.files import check_output, inputs_of, write_text
from common.manifest import CARD, check_manifest
from common.measure.memory import peak_bytes_so_far
from common.progress import stage
from common.randomness import run_seed
from lightning_modules import card as cards
from lightning_modules.causal_lm import CausalLM
from lightning_modules.data.cache import cache_root
from lightning_modules.loading import Dtype, check_vocabulary, dtype_of, load, load_config, load_on_meta, load_tokenizer
from lightning_modules.perplexity import text_perplexity, validation_perplexity
from lightning_modules.structured_pruning import report
from lightning_modules.structured_pruning.allocation import Allocation
from lightning_modules.structured_pruning.budget import BudgetUnit, channel_multiple, removed_parameters
from lightning_modules.structured_pruning.compensation import Compensation
from lightning_modules.structured_pruning.compensation.least_squares import LeastSquares
from lightning_modules.structured_pruning.estimate import expected_time
from lightning_modules.structured_pruning.evaluation import training_pass_seconds
from lightning_modules.structured_pruning.export import largest_difference, pad_to_stock, padded_parameters
from lightning_modules.structured_pruning.importance import Importance
from lightning_modules.structured_pruning.importance.gate_taylor import GateTaylor
from lightning_modules.structured_pruning.layers import decoder_layers, family, shape_of
from lightning_modules.structured_pruning.layout import AUTO, DropBy, Layout, Shape
from lightning_modules.structured_pruning.masking import masked
from lightning_modules.structured_pruning.memory import Workload, peaks
from lightning_modules.structured_pruning.model_shape import ModelShape
from lightning_modules.structured_pruning.needs import check_request, most_inputs, plan_inputs
from lightning_modules.structured_pruning.plan import FILE, PruningPlan
from lightning_modules.structured_pruning.planner import Planner
from lightning_modules.structured_pruning.possible import check_possible, possible_shares
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.refitted import check_refitted, put_refitted, refitted_hashes
from lightning_modules.structured_pruning.refitting import compensate
from lightning_modules.structured_pruning.rounds import Round, composed, load_rounds, recovered, short_recovery
from lightning_modules.structured_pruning.saving import save
from lightning_modules.structured_pruning.search import largest_share
from lightning_modules.structured_pruning.stock import check_plan
from lightning_modules.structured_pruning.verify import compare, exact_logits, proven_slice, reference_logits

_WIDE = 0.1  # share of padding above which the export says that the gain is going


class StructuredPruning(CausalLM):
    """Removes whole groups of heads and MLP channels from a Llama, Mistral or Qwen2.

    ``prune`` scores, allocates, plans, slices, verifies and saves; ``verify`` proves the saved result against the dense
    model; ``export`` writes it as a stock class; ``validate`` is its perplexity.

    Args:
        base: Hugging Face folder, GGUF file or hub name of the model to prune; may itself be pruned.
        output: Folder of the pruned model; an earlier one of Pare's is replaced when the new one is complete.
        budget: For ``budget_unit`` "decoder" the share of the decoder layers' parameters to remove; for "parameters"
            and "bytes" what the whole model may keep.
        budget_unit: What ``budget`` counts.
        importance: What is worth keeping within a layer; GateTaylor when not given.
        shape: "stock": one number of key-value groups and one FFN width for all kept layers, saved as the family's own
            class, which engines load. "free": every layer has its own, saved as a class that travels with the folder.
        allocation: How the budget is divided among the layers of a free shape; Inverse when not given.
        attention_share: Share of the parameters to remove, after dropped layers, that attention gives; the MLPs give
            the rest. "auto": in a stock shape a few shapes that all remove the budget are tried on a little text; in a
            free one the allocation says.
        drop_layers: Layers to remove whole; they count towards the budget. "auto": tried like ``attention_share`` in a
            stock shape (with several rounds, none), none in a free one.
        drop_by: Which layers go first: those whose removal raises the loss least ("damage"), or those that change what
            passes through them least ("block_influence", one pass).
        protect_layers: Layers that are never dropped, from 0; in a free shape they stay whole.
        compensation: How what is left makes up for what is gone, on the calibration text; LeastSquares when not given,
            Unchanged for nothing.
        channel_multiple: Kept channels are a multiple of it; when not given, the largest power of two up to 64 that
            divides every layer's width and leaves at least 8 widths to choose from.
        calibration_blocks: Blocks of training text that parts are scored on; the seed draws them.
        probe_blocks: How many of them whole layers and shapes are tried on.
        max_ppl_ratio: Search for the largest share up to ``budget`` whose perplexity, before compensation, is at most
            this many times the dense model's.
        search_blocks: Blocks of training text that this is judged on; parts are scored on others, and what is reported
            is the validation text's.
        rounds: Prune in so many rounds of equal size, with a short recovery by low-rank adapters between them.
        recovery_steps: Optimizer steps of each short recovery, on the calibration text.
        recovery_learning_rate: Its learning rate.
        plan: Slice by this plan instead of making one.
        dtype: What weights are loaded as and saved in; verification is in float64 whatever it is.
        attention: See ``CausalLM``.
        verify_blocks: Blocks of validation text that logits are compared on.
        tolerance: Largest difference of logits that rounding may cause, in float64, as a share of the largest logit.
        portable: Folder of the stock export; beside ``output`` when not given.
        measure_cost: Also time one plain forward and backward pass over the calibration text, to compare scoring with.
        cache_dir: Folder for damages and scores. Default: $PARE_CACHE, or ~/.cache/pare.
        overwrite: Let ``output`` and ``portable`` replace folders that Pare did not write.
    """

    def __init__(
        self,
        base: str,
        output: str,
        budget: float = 0.25,
        budget_unit: BudgetUnit = "decoder",
        importance: Importance | None = None,
        shape: Shape = "stock",
        allocation: Allocation | None = None,
        attention_share: float | Literal["auto"] = "auto",
        drop_layers: int | Literal["auto"] = "auto",
        drop_by: DropBy = "damage",
        protect_layers: list[int] | None = None,
        compensation: Compensation | None = None,
        channel_multiple: int | None = None,
        calibration_blocks: int = 128,
        probe_blocks: int = 4,
        max_ppl_ratio: float | None = None,
        search_blocks: int = 32,
        rounds: int = 1,
        recovery_steps: int = 50,
        recovery_learning_rate: float = 1e-4,
        plan: str | None = None,
        dtype: Dtype = "float32",
        attention: str | None = None,
        verify_blocks: int = 2,
        tolerance: float = 1e-6,
        portable: str | None = None,
        measure_cost: bool = False,
        cache_dir: str | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, attention=attention)
        positive = {
            "calibration_blocks": calibration_blocks,
            "probe_blocks": probe_blocks,
            "search_blocks": search_blocks,
            "verify_blocks": verify_blocks,
            "tolerance": tolerance,
            "rounds": rounds,
            "recovery_steps": recovery_steps,
            "recovery_learning_rate": recovery_learning_rate,
        }
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if max_ppl_ratio is not None and (max_ppl_ratio <= 1 or budget_unit != "decoder"):
            raise ValueError("max_ppl_ratio must be above 1, and needs budget_unit decoder")
        dropping = drop_layers not in (0, AUTO)
        alone = max_ppl_ratio is not None or plan is not None or dropping or (importance and importance.control)
        if rounds > 1 and alone:
            raise ValueError("rounds above 1 cannot be combined with max_ppl_ratio, plan, drop_layers or a control")
        self.base = base
        self.output = Path(output).expanduser()
        self.portable = (
            Path(portable).expanduser() if portable else self.output.with_name(f"{self.output.name}-portable")
        )
        self.overwrite = overwrite
        self.budget = budget
        self.budget_unit = budget_unit
        self.importance = importance or GateTaylor()
        self.compensation = compensation or LeastSquares()
        self.layout = Layout(
            shape,
            allocation,
            attention_share,
            0 if rounds > 1 else drop_layers,
            drop_by,
            tuple(sorted(protect_layers or ())),
        )
        self.multiple = channel_multiple
        self.calibration_blocks = calibration_blocks
        self.probe_blocks = probe_blocks
        self.max_ppl_ratio, self.search_blocks = max_ppl_ratio, search_blocks
        self.rounds = rounds
        self.recovery_steps = recovery_steps
        self.recovery_learning_rate = recovery_learning_rate
        self.plan_path = Path(plan).expanduser() if plan is not None else None
        self.verify_blocks = verify_blocks
        self.tolerance = tolerance
        self.measure_cost = measure_cost
        self.cache = cache_root(cache_dir).with_name("structured_pruning")

    # ---- before any work ----------------------------------------------------------------------------------------

    def check_arguments(self, command: str, data: Any) -> None:
        """Refuse what a command cannot do, before any text or weight is read: configurations alone say it.

        Args:
            command: "prune", "verify" or "export"; others are not looked at.
            data: The DataModule, whose files must not be written over.

        Raises:
            FileNotFoundError: A model, or the plan, is not there.
            ValueError: An architecture, budget or plan that cannot be used; or a folder that must not be written, see
                ``common.files.check_output``.
        """
        if command == "prune":
            check_output(self.output, "model.output", inputs_of(self, data), self.overwrite)
            self._check_request(data)
        elif command == "verify":
            PruningPlan.load(self.output / FILE).check_fits(self._counted().shapes)
        elif command == "export":
            check_output(self.portable, "model.portable", [self.output, *inputs_of(self, data)], self.overwrite)
            family(load_config(self.output))

    def _check_request(self, data: Any) -> None:
        whole, config = self._counted(), self._weightless.config
        if self.plan_path is not None:
            plan = PruningPlan.load(self.plan_path)
            plan.check_fits(whole.shapes)
            if self.layout.shape == "stock":
                check_plan(config, whole.shapes, plan.layers)
            inputs = plan_inputs(whole.shapes, plan.layers)
        else:
            target = self._target(whole)
            check_possible(config, whole.shapes, target, self._layout(whole), self.rounds)
            inputs = most_inputs(whole.shapes, target)
        self._check_text(inputs, data)

    def _check_text(self, inputs: int, data: Any) -> None:
        """Refuse less text than compensation needs for matrices of so many inputs."""
        tokens = self.calibration_blocks * getattr(data, "block_size", math.inf)
        check_request(self.compensation, self._weightless.config, inputs, tokens, self.calibration_blocks)

    def _counted(self) -> ModelShape:
        """The base model's shape, from its configuration."""
        return ModelShape.of(self._weightless, self._weights_dtype().itemsize)

    @cached_property
    def _weightless(self) -> Any:
        """The base model on the meta device."""
        return load_on_meta(self.base, supported=family)

    def inputs(self) -> list[Any]:
        """See ``CausalLM.inputs``."""
        return [self.base, self.plan_path]

    def leaves(self, command: str) -> Path | None:
        """See ``CausalLM.leaves``."""
        return {"prune": self.output, "export": self.portable}.get(command)

    # ---- the commands -------------------------------------------------------------------------------------------

    def build_model(self) -> Any:
        """See ``CausalLM.build_model``: the pruned model, so that validation is of what was saved."""
        return self._load(self.output)

    def _load(self, path: str | Path) -> Any:
        return load(path, **self.loading, supported=family)

    def _weights_dtype(self) -> torch.dtype:
        """What weights are loaded as."""
        return dtype_of(self.loading["dtype"], load_config(self.base).dtype)

    def prune(self, datamodule: LightningDataModule, device: torch.device, dry_run: bool = False) -> dict[str, Any]:
        """Make and save the pruned model; fields of the run record.

        Args:
            datamodule: Calibration text (its training batches) and evaluation text (its validation batches).
            device: Where to compute.
            dry_run: Say what would be removed; nothing is written but measurements in the cache.

        Raises:
            ValueError: A budget, plan, architecture or calibration text that cannot be used, or a result that is not
                what the plan says; an earlier output folder is still there.
        """
        self.check_arguments("prune", datamodule)
        check_vocabulary(self._weightless, datamodule.tokenizer)
        whole = self._counted()
        layout = self._layout(whole)
        measured: dict[str, Any]
        if dry_run and self._needs_no_weights():
            plan = self._planner(self._weightless, [], layout).plan(self._target(whole), self._settings())
            measured = {"peak_bytes": self._peaks(whole, plan, datamodule, {})}
            return _shown(self.base, self._structure(whole, plan, datamodule, measured))
        batches = datamodule.calibration(self.calibration_blocks, run_seed())
        apart: list[dict[str, Tensor]] = []
        if self.max_ppl_ratio is not None:
            apart = datamodule.calibration(self.search_blocks, run_seed(), skip=self.calibration_blocks)
        ids = self._verification_ids(datamodule).to(device)
        tokenizer = load_tokenizer(self.base, datamodule)
        model: Any = self._load(self.base).to(device)
        measured = {}
        if not dry_run:
            measured["ppl_before"] = validation_perplexity(model, datamodule, "Perplexity before")
        if self.measure_cost:
            measured["training_pass_seconds"] = training_pass_seconds(model, batches)
        rounds: list[Round] = []
        seconds: list[float | None] = []
        removed = 0
        for number in range(1, self.rounds + 1):
            planner = self._planner(model, batches, layout)
            part = 1.0 if dry_run else number / self.rounds
            plan = self._plan(planner, whole, apart, part, removed)
            self._check_text(plan_inputs(planner.shapes, plan.layers), datamodule)
            if dry_run:
                measured["peak_bytes"] = self._peaks(whole, plan, datamodule, planner.tried_tokens())
                return _shown(self.base, self._structure(whole, plan, datamodule, measured))
            seconds.append(planner.score_seconds)
            # of all rounds, where none was known from before
            score_seconds = None if None in seconds else sum(one or 0.0 for one in seconds)
            measured |= {"score_seconds": score_seconds, "peak_memory_bytes": peak_bytes_so_far(device)}
            del planner  # it holds the model that is about to be replaced
            sliced, verification = proven_slice(model, plan, ids, self.tolerance)
            if not self.importance.control:  # a control that fails is what it is there for; its record says so
                verification.raise_if_failed()
            measured |= asdict(verification)
            plan, refit = compensate(model, sliced, plan, batches, self.compensation)
            model = sliced
            removed = whole.footprint(block_size=1).parameters - model.num_parameters()
            adapters = None
            if number < self.rounds:
                with stage(f"Recovery after round {number}", self.recovery_steps, "steps") as done:
                    learning_rate = self.recovery_learning_rate
                    model, adapters = short_recovery(model, batches, self.recovery_steps, learning_rate, done)
            rounds.append(Round(plan, adapters, refit.tensors if number < self.rounds else None))
        plan = composed([one.plan for one in rounds])
        structure = self._structure(whole, plan, datamodule, measured | {"model_class": type(model).__name__})
        report.count_biases(structure, model)
        card = report.card(self.base, datamodule.name, structure, model.config)
        save(self.output, model, tokenizer, card, plan, rounds, inputs_of(self, datamodule), self.overwrite)
        print(f"pruned model: {self.output}", flush=True)  # what follows only measures
        again: Any = load(self.output, model.dtype, self.loading["attention"]).to(device)
        structure["reload_difference"] = largest_difference(model, again, ids)
        structure["ppl_after"] = validation_perplexity(again, datamodule, "Perplexity after")
        write_text(self.output / CARD, report.card(self.base, datamodule.name, structure, model.config))
        return _shown(self.base, structure) | {"val_ppl": structure["ppl_after"]}

    def _peaks(self, whole: ModelShape, plan: PruningPlan, data: Any, tried: dict[str, int]) -> dict[str, int]:
        """See ``memory.peaks``."""
        block, config = data.block_size, self._weightless.config
        tokens = [data.batch_size * block, self.calibration_blocks * block, self.verify_blocks * block]
        work = Workload(whole, config.hidden_size, config.vocab_size, *tokens, **tried)
        return peaks(work, plan.layers, self.importance, self.compensation)

    def _needs_no_weights(self) -> bool:
        layout = self.layout
        if layout.shape == "stock":
            measured = layout.attention_share == AUTO or layout.dropped != 0
        else:
            measured = layout.divides.needs_damage or layout.divides.needs_scores or layout.dropped != 0
        return not measured and self.plan_path is None and self.max_ppl_ratio is None

    def _layout(self, whole: ModelShape) -> Layout:
        return replace(self.layout, multiple=channel_multiple(whole.shapes, self.multiple))

    def _planner(self, model: Any, batches: list[dict[str, Tensor]], layout: Layout) -> Planner:
        measured = (self.importance, layout, self.cache, stage, self.probe_blocks, self.compensation)
        return Planner(model, self.base, batches, *measured)

    def _structure(
        self, whole: ModelShape, plan: PruningPlan, datamodule: LightningDataModule, measured: dict[str, Any]
    ) -> dict[str, Any]:
        """The record's block, with the size of the stock export."""
        size = padded_parameters(self._weightless.config, whole, plan.layers) * whole.bytes_per_parameter
        export = {"export_bytes_before": whole.footprint(block_size=1).weight_bytes, "export_bytes_after": size}
        return report.structure(whole, plan, datamodule.block_size, datamodule.perplexity_on, export | measured)

    def _target(self, whole: ModelShape) -> int:
        return removed_parameters(self.budget, self.budget_unit, whole.footprint(block_size=1))

    def _settings(self) -> dict[str, Any]:
        names = ("budget", "budget_unit", "max_ppl_ratio", "rounds", "recovery_steps", "recovery_learning_rate")
        return {name: getattr(self, name) for name in names}

    def _plan(
        self,
        planner: Planner,
        whole: ModelShape,
        apart: list[dict[str, Tensor]],
        part: float,
        removed: int,
    ) -> PruningPlan:
        """The given plan; or the one for this part of the budget; or the one for the largest share under the limit.

        The limit is judged on text apart from what parts are scored on, and from what is reported.
        """
        if self.plan_path is not None:
            plan = PruningPlan.load(self.plan_path)
            plan.check_fits(planner.shapes, planner.hash)
            return plan
        target = self._target(whole)
        part_target = round(part * target) - removed
        rank_zero_info(expected_time(planner.work(part_target), planner.model, planner.batches))
        if self.max_ppl_ratio is None:
            return planner.plan(part_target, self._settings() | {"parameters_requested": target})
        decoder = whole.footprint(block_size=1).decoder_parameters

        dense = text_perplexity(planner.model, apart, "Perplexity of text apart")

        def ratio(share: float) -> float:
            with masked(planner.model, planner.plan(round(share * decoder), {})):
                found = text_perplexity(planner.model, apart, f"Trying {share:.1%}") / dense
            rank_zero_info(f"removing {share:.2%} of the decoder's parameters: perplexity {found:.3f} × dense")
            return found

        shares = possible_shares(self._weightless.config, planner.shapes, self.budget, planner.layout)
        share = largest_share(ratio, self.max_ppl_ratio, shares)
        chosen_on = f"{self.search_blocks} blocks of training text that parts are not scored on; nothing refitted"
        return planner.plan(round(share * decoder), self._settings() | {"share_found": share, "chosen_on": chosen_on})

    def verify(self, datamodule: LightningDataModule, device: torch.device) -> dict[str, Any]:
        """Compare the saved model with the dense one whose removed parts are zeroed; fields of the run record.

        Where there were several rounds, each is gone through again, with the recovery that followed it.

        Raises:
            FileNotFoundError: The output folder has no plan.
            ValueError: The base is not the model that the plan was made for, or a comparison failed.
        """
        self.check_arguments("verify", datamodule)
        check_manifest(self.output)
        plan = PruningPlan.load(self.output / FILE)
        *earlier, (last, _, _) = load_rounds(self.output, plan)
        ids = self._verification_ids(datamodule).to(device)
        dense = self._load(self.base).to(device)
        plan.check_fits([shape_of(layer) for layer in decoder_layers(dense)], model_hash(dense))
        for done in earlier:
            dense, verification = proven_slice(dense, done.plan, ids, self.tolerance)
            verification.raise_if_failed()
            put_refitted(dense, done.refitted or {})
            dense = recovered(dense, done.adapters or {})
        if refitted_hashes(last):  # the slice is proved, and what is saved is the slice but for what was refitted
            sliced, verification = proven_slice(dense, last, ids, self.tolerance)
            verification.raise_if_failed()
            del dense
            check_refitted(sliced, self._load(self.output), last, rounding=bool(earlier))
        else:
            reference = reference_logits(dense, last, ids)
            del dense
            verification = compare(*reference, self._load(self.output).to(device), ids, self.tolerance)
            verification.raise_if_failed()
        if refitted_hashes(last):
            Console().print(report.refit_table(last.settings["compensation"]))
        print("\n".join(f"{name}: {value:.3g}" for name, value in asdict(verification).items()))
        return {"structure": asdict(verification)}

    def export(self, datamodule: LightningDataModule, device: torch.device) -> dict[str, Any]:
        """Write the pruned model zero-padded to its widest layer, as a stock class; fields of the run record.

        Raises:
            ValueError: The stock model's logits differ from the pruned one's; nothing is written.
        """
        self.check_arguments("export", datamodule)
        ids = self._verification_ids(datamodule).to(device)
        tokenizer = load_tokenizer(self.output, datamodule)
        pruned = self._load(self.output).to(device)
        padded = pad_to_stock(pruned)
        logits = exact_logits(pruned, ids)
        difference = float((exact_logits(padded.model, ids) - logits).abs().max())
        if not difference <= self.tolerance * float(logits.abs().max()):
            raise ValueError(
                f"export: logits differ by {difference:.3g}, more than {self.tolerance:g} of the largest; nothing was "
                "written"
            )
        if padded.padding > _WIDE * padded.parameters:
            rank_zero_warn(
                f"{padded.padding / padded.parameters:.1%} of the export is padding, because its layers differ in "
                "width; shape: stock avoids that"
            )
        name = type(padded.model).__name__
        text = f"{name}, padded with zeros from a pruned model.\n\n{cards.usage(padded.model.config)}"
        card = cards.card(f"{cards.short(self.base)}, structurally pruned", text, self.base, ["pruned"])
        inputs = [self.output, *inputs_of(self, datamodule)]
        save(self.portable, padded.model, tokenizer, card, inputs=inputs, overwrite=self.overwrite)
        print(f"{name} in {self.portable}: logits differ by at most {difference:.3g}")
        return {
            "structure": {
                "portable_class": name,
                "portable_max_difference": difference,
                "portable_parameters": padded.parameters,
                "portable_padding_parameters": padded.padding,
            }
        }

    def _verification_ids(self, datamodule: LightningDataModule) -> Tensor:
        """Blocks of validation text, int64 ``[verify_blocks, T]``, cut to the shortest of them.

        Raises:
            ValueError: There is no validation text.
        """
        rows = (row for batch in datamodule.val_dataloader() for row in batch["input_ids"])
        first = list(islice(rows, self.verify_blocks))
        if not first:
            raise ValueError("data: no validation text to compare logits on; give more text, or a larger val_percent")
        return torch.stack([row[: min(map(len, first))] for row in first])


def _shown(base: str, structure: dict[str, Any]) -> dict[str, Any]:
    """Fields of the run record, shown on the console too."""
    console = Console()
    settings = structure["settings"]
    part = f", round {settings['round']}" if "round" in settings else ""
    if settings.get("trials"):
        console.print(report.trials_table(settings["trials"], part))
    console.print(report.layer_table(structure["layers"]))
    if settings.get("compensation", {}).get("fits"):
        console.print(report.refit_table(settings["compensation"], part))
    console.print(report.table(base, structure))
    if "peak_bytes" in structure:
        console.print(report.memory_table(structure["peak_bytes"]))
    for note in settings.get("notes", ()):
        console.print(f"note: {note}")
    return {"structure": structure}
