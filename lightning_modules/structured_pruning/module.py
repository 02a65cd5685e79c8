"""Structured pruning as a LightningModule: the commands prune, verify, export and validate."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor

from lightning_modules.causal_lm import CausalLM, check_vocabulary
from lightning_modules.data.cache import cache_root
from lightning_modules.data.progress import stage
from lightning_modules.structured_pruning import report
from lightning_modules.structured_pruning.allocation import Allocation
from lightning_modules.structured_pruning.allocation.inverse import Inverse
from lightning_modules.structured_pruning.anatomy import decoder_layers, shape_of
from lightning_modules.structured_pruning.budget import Unit, channel_multiple, removed_parameters
from lightning_modules.structured_pruning.evaluation import peak_memory_bytes, ppl, training_pass_seconds
from lightning_modules.structured_pruning.export import largest_difference, pad_to_stock
from lightning_modules.structured_pruning.footprint import Anatomy
from lightning_modules.structured_pruning.importance import Importance
from lightning_modules.structured_pruning.importance.gate_taylor import GateTaylor
from lightning_modules.structured_pruning.loading import load, load_on_meta, save
from lightning_modules.structured_pruning.masking import masked
from lightning_modules.structured_pruning.plan import FILE, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.prune import Pruner
from lightning_modules.structured_pruning.search import largest_share
from lightning_modules.structured_pruning.slicing import slice_model
from lightning_modules.structured_pruning.verify import compare, in_float32, reference_logits

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PORTABLE = 1e-5  # largest difference of logits that padding may cause, in float32
_WIDE = 0.1  # share of padding above which the export says that the gain is going


class StructuredPruning(CausalLM):
    """Removes whole groups of heads and MLP channels from a Llama, Mistral or Qwen2.

    ``prune`` scores, allocates, plans, slices, verifies and saves; ``verify`` proves the saved result against the dense
    model; ``export`` writes it as a stock class; ``validate`` is its perplexity.

    Args:
        base: Hugging Face folder or hub name of the model to prune; may itself be pruned.
        output: Folder of the pruned model; an earlier one is replaced when the new one is complete.
        budget: For ``budget_unit`` "decoder" the share of the decoder layers' parameters to remove; for "parameters"
            and "bytes" what the whole model may keep.
        budget_unit: What ``budget`` counts.
        importance: What is worth keeping within a layer; GateTaylor when not given.
        allocation: How the budget is divided among the layers; Inverse when not given.
        drop_layers: Layers of least damage to remove whole; they count towards the budget.
        channel_multiple: Kept channels are a multiple of it; when not given, the largest power of two up to 64 that
            divides every layer's width and leaves at least 8 widths to choose from.
        calibration_blocks: Blocks of training text that layers and parts are scored on.
        max_ppl_ratio: Search for the largest share up to ``budget`` whose perplexity is at most this many times the
            dense model's.
        plan: Slice by this plan instead of making one.
        dtype: What weights are loaded as and saved in; scores and verification are in float32.
        verify_blocks: Blocks of validation text that logits are compared on.
        tolerance: Largest difference of logits that rounding may cause, in float32.
        portable: Folder of the stock export; beside ``output`` when not given.
        measure_cost: Also time one plain forward and backward pass over the calibration text, to compare scoring with.
        cache_dir: Folder for damages and scores. Default: $PARE_CACHE, or ~/.cache/pare.
    """

    def __init__(
        self,
        base: str,
        output: str,
        budget: float = 0.25,
        budget_unit: Unit = "decoder",
        importance: Importance | None = None,
        allocation: Allocation | None = None,
        drop_layers: int = 0,
        channel_multiple: int | None = None,
        calibration_blocks: int = 128,
        max_ppl_ratio: float | None = None,
        plan: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        verify_blocks: int = 2,
        tolerance: float = 1e-4,
        portable: str | None = None,
        measure_cost: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        positive = {"calibration_blocks": calibration_blocks, "verify_blocks": verify_blocks, "tolerance": tolerance}
        for name, value in positive.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if max_ppl_ratio is not None and (max_ppl_ratio <= 1 or budget_unit != "decoder"):
            raise ValueError("max_ppl_ratio must be above 1, and needs budget_unit decoder")
        self.base, self.output = base, Path(output)
        self.budget, self.budget_unit = budget, budget_unit
        self.importance, self.allocation = importance or GateTaylor(), allocation or Inverse()
        self.drop_layers, self.multiple = drop_layers, channel_multiple
        self.calibration_blocks, self.max_ppl_ratio = calibration_blocks, max_ppl_ratio
        self.plan_path, self.dtype_name = plan, dtype
        self.verify_blocks, self.tolerance = verify_blocks, tolerance
        self.portable = Path(portable) if portable else self.output.with_name(f"{self.output.name}-portable")
        self.measure_cost = measure_cost
        self.cache = cache_root(cache_dir).with_name("structured_pruning")

    def build_model(self) -> Any:
        """See ``CausalLM.build_model``: the pruned model, so that validation is of what was saved."""
        return load(self.output)[0]

    # ---- prune ------------------------------------------------------------------------------------------------

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
        block = datamodule.block_size
        if dry_run and self._needs_no_weights():
            dense: Any = load_on_meta(self.base)
            anatomy = Anatomy.of(dense, _DTYPES[self.dtype_name].itemsize)
            plan = self._pruner(dense, []).plan(self._target(anatomy, block), self._settings())
            return self._finish({}, anatomy, plan, block)
        dense, tokenizer = load(self.base, device, _DTYPES[self.dtype_name])
        check_vocabulary(dense, datamodule.tokenizer)
        anatomy = Anatomy.of(dense, _DTYPES[self.dtype_name].itemsize)
        pruner = self._pruner(dense, self._calibration(datamodule))
        fields: dict[str, Any] = {}
        if not dry_run or self.max_ppl_ratio is not None:
            fields["ppl_before"] = self._ppl(dense, datamodule, "Perplexity before")
        started = time.perf_counter()
        plan = self._plan(pruner, anatomy, datamodule, fields)
        fields["plan_seconds"] = time.perf_counter() - started
        fields["score_seconds"] = pruner.score_seconds
        fields["score_peak_memory_bytes"] = peak_memory_bytes(device)
        if dry_run:
            return self._finish(fields, anatomy, plan, block)
        if self.measure_cost:
            fields["training_pass_seconds"] = training_pass_seconds(dense, pruner.batches)
        ids = self._verification_ids(datamodule).to(device)
        with in_float32(dense):
            reference = reference_logits(dense, plan, ids)
        pruned = slice_model(dense, plan)
        del dense, pruner
        with in_float32(pruned):
            verification = compare(*reference, pruned, ids, self.tolerance)
        if not self.importance.control:
            verification.raise_if_failed()
        fields |= asdict(verification)
        fields["ppl_after"] = self._ppl(pruned, datamodule, "Perplexity after")
        fields = self._finish(fields, anatomy, plan, block)
        card = report.card(self.base, fields["structure"] | {"dataset": datamodule.name})
        save(self.output, pruned, tokenizer, card, plan)
        print(f"pruned model: {self.output}")
        return fields | {"val_ppl": fields["structure"]["ppl_after"]}

    def _needs_no_weights(self) -> bool:
        measured = self.allocation.needs_damage or self.allocation.needs_scores or self.drop_layers
        return not measured and self.plan_path is None and self.max_ppl_ratio is None

    def _pruner(self, model: Any, batches: list[dict[str, Tensor]]) -> Pruner:
        multiple = channel_multiple([shape_of(layer) for layer in decoder_layers(model)], self.multiple)
        return Pruner(
            model, self.base, batches, self.importance, self.allocation, multiple, self.drop_layers, self.cache, stage
        )

    def _calibration(self, datamodule: LightningDataModule) -> list[dict[str, Tensor]]:
        """The first so many blocks in the training order, which follows from the run's seed.

        Raises:
            ValueError: There are fewer.
        """
        batches: list[dict[str, Tensor]] = []
        blocks = 0
        for batch in datamodule.train_dataloader():
            batches.append({name: part[: self.calibration_blocks - blocks] for name, part in batch.items()})
            blocks += len(batches[-1]["input_ids"])
            if blocks == self.calibration_blocks:
                return batches
        raise ValueError(
            f"calibration_blocks is {self.calibration_blocks}, but the training text fills only {blocks} blocks in "
            "whole batches; give more text, or lower calibration_blocks or the data's block_size or batch_size"
        )

    def _target(self, anatomy: Anatomy, block: int) -> int:
        return removed_parameters(self.budget, self.budget_unit, anatomy.footprint(block))

    def _settings(self) -> dict[str, Any]:
        return {"budget": self.budget, "budget_unit": self.budget_unit, "max_ppl_ratio": self.max_ppl_ratio}

    def _plan(
        self, pruner: Pruner, anatomy: Anatomy, datamodule: LightningDataModule, fields: dict[str, Any]
    ) -> PruningPlan:
        """The given plan; or the one for the budget; or the one for the largest share that the limit allows."""
        if self.plan_path is not None:
            plan = PruningPlan.load(Path(self.plan_path))
            plan.check_fits(pruner.shapes, pruner.hash)
            return plan
        target = self._target(anatomy, datamodule.block_size)
        if self.max_ppl_ratio is None:
            return pruner.plan(target, self._settings())
        decoder = anatomy.footprint(datamodule.block_size).decoder_parameters

        def perplexity(share: float) -> float:
            with masked(pruner.model, pruner.plan(round(share * decoder), {})):
                found = self._ppl(pruner.model, datamodule, f"Trying {share:.1%}")
            rank_zero_info(f"removing {share:.2%} of the decoder's parameters: perplexity {found:.2f}")
            return found

        share = largest_share(perplexity, self.max_ppl_ratio * fields["ppl_before"], self.budget)
        return pruner.plan(round(share * decoder), self._settings() | {"share_found": share})

    def _finish(self, fields: dict[str, Any], anatomy: Anatomy, plan: PruningPlan, block: int) -> dict[str, Any]:
        """Show the costs, and complete the record's block."""
        before, after = anatomy.footprint(block), anatomy.footprint(block, plan.layers)
        structure = {
            "layers": report.layer_fields(anatomy.shapes, plan.layers),
            **before.fields("before"),
            **after.fields("after"),
            "block_size": block,
            "importance": plan.settings.get("importance", {}).get("name"),
            "allocation": plan.settings.get("allocation", {}).get("name"),
            "budget_requested": plan.settings.get("parameters_requested"),
            "budget_obtained": before.parameters - after.parameters,
            "settings": plan.settings,
            **fields,
        }
        console = Console()
        console.print(report.layer_table(structure["layers"]))
        console.print(report.table(self.base, block, before, after, fields))
        return {"structure": structure}

    # ---- verify and export --------------------------------------------------------------------------------------

    def verify(self, datamodule: LightningDataModule, device: torch.device) -> dict[str, Any]:
        """Compare the saved model with the dense one whose removed parts are zeroed; fields of the run record.

        Raises:
            FileNotFoundError: The output folder has no plan.
            ValueError: The base is not the model that the plan was made for, or a comparison failed.
        """
        plan = PruningPlan.load(self.output / FILE)
        ids = self._verification_ids(datamodule).to(device)
        dtype = _DTYPES[self.dtype_name]
        dense, _ = load(self.base, device, dtype)
        plan.check_fits([shape_of(layer) for layer in decoder_layers(dense)], model_hash(dense))
        with in_float32(dense):
            reference = reference_logits(dense, plan, ids)
        del dense
        pruned, _ = load(self.output, device, dtype)
        with in_float32(pruned):
            verification = compare(*reference, pruned, ids, self.tolerance)
        verification.raise_if_failed()
        print("\n".join(f"{name}: {value:.3g}" for name, value in asdict(verification).items()))
        return {"structure": asdict(verification)}

    def export(self, datamodule: LightningDataModule, device: torch.device) -> dict[str, Any]:
        """Write the pruned model zero-padded to its widest layer, as a stock class; fields of the run record.

        Raises:
            ValueError: The stock model's logits differ from the pruned one's; nothing is written.
        """
        ids = self._verification_ids(datamodule).to(device)
        pruned, tokenizer = load(self.output, device, _DTYPES[self.dtype_name])
        padded = pad_to_stock(pruned)
        with in_float32(pruned), in_float32(padded.model):
            difference = largest_difference(pruned, padded.model, ids)
        if not difference <= _PORTABLE:
            raise ValueError(f"export: logits differ by {difference:.3g}, more than {_PORTABLE:g}; nothing was written")
        if padded.padding > _WIDE * padded.parameters:
            rank_zero_warn(
                f"{padded.padding / padded.parameters:.1%} of the export is padding, because its layers differ in "
                "width; the allocation Uniform avoids that"
            )
        name = type(padded.model).__name__
        save(self.portable, padded.model, tokenizer, f"# {self.output.name}\n\n{name}, padded from a pruned model.\n")
        print(f"{name} in {self.portable}: logits differ by at most {difference:.3g}")
        return {
            "structure": {
                "portable_class": name,
                "portable_max_difference": difference,
                "portable_parameters": padded.parameters,
                "portable_padding_parameters": padded.padding,
            }
        }

    # ---- shared -------------------------------------------------------------------------------------------------

    def _verification_ids(self, datamodule: LightningDataModule) -> Tensor:
        """Blocks of validation text, int64 ``[verify_blocks, T]``."""
        return torch.cat([batch["input_ids"] for batch in datamodule.val_dataloader()])[: self.verify_blocks]

    def _ppl(self, model: Any, datamodule: LightningDataModule, title: str) -> float:
        loader = datamodule.val_dataloader()
        with stage(title, len(loader), "batches") as done:
            return ppl(model, loader, done)
