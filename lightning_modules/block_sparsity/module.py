"""Progressive block sparsity: masks held while fine-tuning, and the commands around it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.files import check_output, inputs_of
from lightning_modules.block_sparsity import commands, lora, sharded
from lightning_modules.block_sparsity.arguments import check_mix, check_numbers
from lightning_modules.block_sparsity.demotion import Ratios, Scope
from lightning_modules.block_sparsity.layer_files import layer_folder
from lightning_modules.block_sparsity.layerwise import Errors, Method, Statistics, prune_layers
from lightning_modules.block_sparsity.masks import mask_gradients, mask_weights, refuse, violations
from lightning_modules.block_sparsity.matrices import linear_layers
from lightning_modules.block_sparsity.mix import Mix, choices
from lightning_modules.block_sparsity.packed_model import PACKED_FILE, from_state, read_packed
from lightning_modules.block_sparsity.pruner import TIERS_FILE, Pattern, Pruner, packed_bits, tiers_file
from lightning_modules.block_sparsity.reconstruction import Reconstruction
from lightning_modules.block_sparsity.restarts import Restarts
from lightning_modules.block_sparsity.schedules import Schedule
from lightning_modules.block_sparsity.schedules.base import Row
from lightning_modules.block_sparsity.schedules.original import OriginalSchedule
from lightning_modules.block_sparsity.scores import Score
from lightning_modules.block_sparsity.scores.wanda import Wanda
from lightning_modules.block_sparsity.tiers import TOPK
from lightning_modules.block_sparsity.updates import Update
from lightning_modules.causal_lm import CausalLM
from lightning_modules.frozen import Frozen
from lightning_modules.loading import check_vocabulary, hub_file, load, load_config, load_on_meta

_CHECKPOINT = "block_sparsity"
_SHARDING = (FSDPStrategy, ModelParallelStrategy)


class BlockSparsity(CausalLM):
    """Prunes a model's linear layers in blocks of three tiers: dense, two of every four weights, the k best weights.

    ``fit`` with the callback TierSchedule demotes blocks at epoch boundaries and fine-tunes between them with masks
    held; ``prune`` makes one demotion without training; ``export`` packs a pruned folder, or unpacks a packed one;
    ``verify`` proves that a packed folder is the pruned one. A model that has tier maps beside it keeps them.

    Args:
        pretrained: Hugging Face folder, GGUF file or hub name to start from; with tier maps in it, pruning goes on from
            them.
        tier_maps: Tier maps that ``pretrained`` was pruned by, or a folder with them, where they do not lie beside it.
        output: Folder for the result. An earlier result is replaced when the new one is complete.
        overwrite: Replace ``output`` also where Pare did not write it.
        schedule: Iterations; by default the original five, to 35/45/20 % dense/2:4/top-k.
        iteration: Make only this iteration of the schedule; None makes all of them in ``fit``, the last in ``prune``.
        score: Importance of a weight; by default Wanda.
        block: Side of a block, a multiple of 4.
        topk: Weights that a top-k block keeps; by default 10, or what the tier maps say; "auto" chooses, with
            ``target_bits``, and has such blocks only where 2:4 blocks alone are not small enough.
        target_bits: Bits per weight of the pruned matrices after the last iteration, packed as ``export_dtype`` and
            ``export_bands`` say: instead of the schedule's shares, the mix of tiers that loses least in as many.
            Iterations before it go as far on the way as the schedule does.
        scope: Who competes for the tiers: the blocks of one "matrix", all ("global"), or one row of blocks ("band").
        row_relative: Divide scores by the mean of their row, as Wanda compares within rows.
        matrix_relative: Divide them by the mean of their matrix: for a scope in which matrices compete.
        pattern: "tiers"; baselines: "unstructured" with the same share of zeros in every row, and "2:4" or "4:8"
            throughout, whatever the schedule says.
        calibration_blocks: Blocks of training text (or samples), spread evenly over it, that scores and reconstruction
            see.
        calibration_seed: Draws the blocks instead.
        statistics: "sequential": scores and updates of a layer see what the pruned layers below it give; "dense": what
            the model gives as it is before the iteration, which takes half the time.
        update: New values of the weights that stay, at once after each demotion: ``Obs`` (SparseGPT),
            ``ConjugateGradient``; None leaves them.
        finetune: "full" trains every weight that is kept; "lora" trains adapters that are merged under the masks.
        lora_rank: Rank of the adapters.
        reconstruction_steps: After each demotion, fit every layer for so many steps to its outputs before; 0 does not.
        reconstruction_lr: Adam's learning rate for that.
        teacher: Dense model to distil from; None trains on the text alone.
        distill_weight: Share of the distillation loss.
        iteration_lr_factor: The learning rate, which starts again with every iteration, is multiplied by this at each
            after the first.
        export_dtype: Type of packed values; by default the model's own where it has 16 bits, else float16. "int8"
            stores the tiers in 8 bits with scales, and everything else in that.
        export_bands: Pack in bands of rows, as products with packed weights read them; needs the scope "band".
        budget: The old name of ``scope``; an error says so.
        **kwargs: Optimizer and schedule, see ``CausalLM``; warm-up and schedule are those of one iteration.
    """

    def __init__(
        self,
        pretrained: str,
        output: str = "runs/block_sparsity/model",
        tier_maps: str | None = None,
        overwrite: bool = False,
        schedule: Schedule | None = None,
        iteration: int | None = None,
        score: Score | None = None,
        block: int = 16,
        topk: int | Literal["auto"] | None = None,
        target_bits: float | None = None,
        scope: Scope = "matrix",
        row_relative: bool = False,
        matrix_relative: bool = False,
        pattern: Pattern = "tiers",
        calibration_blocks: int = 32,
        calibration_seed: int | None = None,
        statistics: Statistics = "sequential",
        update: Update | None = None,
        finetune: Literal["full", "lora"] = "full",
        lora_rank: int = 8,
        reconstruction_steps: int = 0,
        reconstruction_lr: float = 1e-4,
        teacher: str | None = None,
        distill_weight: float = 0.5,
        iteration_lr_factor: float = 1.0,
        export_dtype: Literal["float16", "bfloat16", "float32", "int8"] | None = None,
        export_bands: bool = False,
        budget: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if budget is not None:
            raise ValueError(f"model.budget is now called model.scope: give model.scope {budget}")
        self.stored = torch.float32
        """What ``pretrained`` is stored as, and results are."""
        self.export_dtype, self.export_bands = export_dtype, export_bands
        k = check_mix(block, topk, target_bits, pattern, scope, self.export_values, export_bands)
        self.target_bits, self.topk = target_bits, topk
        whole = {"calibration_blocks": (calibration_blocks, 1), "lora_rank": (lora_rank, 1)}
        check_numbers(
            {**whole, "reconstruction_steps": (reconstruction_steps, 0)},
            {"reconstruction_lr": reconstruction_lr, "iteration_lr_factor": iteration_lr_factor},
            {"distill_weight": distill_weight},
        )
        if row_relative and matrix_relative:
            raise ValueError("row_relative and matrix_relative cannot both be true: scores are divided by one mean")
        self.pretrained = pretrained
        self.folder = Path(pretrained).expanduser()  # where a Hub name leads nowhere
        self.output = Path(output).expanduser()
        self.maps = Path(tier_maps).expanduser() if tier_maps is not None else self.folder
        self.overwrite = overwrite
        self.schedule = schedule or OriginalSchedule()
        self.rows = self.schedule.rows if iteration is None else [self.schedule.row(iteration)]
        self.score = score or Wanda()
        self.calibration_blocks, self.calibration_seed = calibration_blocks, calibration_seed
        self.finetune, self.lora_rank = finetune, lora_rank
        learning = Reconstruction(reconstruction_steps, reconstruction_lr) if reconstruction_steps else None
        self.method = Method(self.score, statistics, update, learning)
        self.teacher, self.distill_weight = teacher, distill_weight
        self.iteration_lr_factor = iteration_lr_factor
        self._pruning = {"block": block, "k": k, "pattern": pattern, "scope": scope}
        self._pruning |= {"row_relative": row_relative, "matrix_relative": matrix_relative}
        self._pruning["open_k"] = not isinstance(topk, int)
        self.pruner: Pruner
        self._teacher: Frozen | None = None
        self._held: dict[str, Tensor] | None = None  # where weights are cut up

    # ---- before any work ----------------------------------------------------------------------------------------

    def check_arguments(self, command: str, data: Any) -> None:
        """Refuse what a command cannot do, before any text or weight is read.

        Args:
            command: "fit", "prune", "export" or "verify"; others are not looked at.
            data: The DataModule, whose files must not be overwritten.

        Raises:
            FileNotFoundError: There is no such model, or nothing to export or verify.
            ValueError: The teacher's tokens are others, or see ``loading.load_config`` and
                ``common.files.check_output``.
        """
        for path in (self.pretrained, self.teacher if command == "fit" else None):
            if path is not None:
                load_config(path)
        if command in ("fit", "prune", "export"):
            check_output(self.output, "model.output", inputs_of(self, data), self.overwrite)
        if command == "fit" and self.teacher is not None:
            self._check_teacher(self.teacher, data)
        folder, packed, maps = self.folder, (self.folder / PACKED_FILE).is_file(), self._maps_file()
        if maps is None and self.maps != folder:
            raise FileNotFoundError(f"model.tier_maps: {self.maps} is or has no tier maps ({TIERS_FILE})")
        if command in ("export", "verify") and maps is None:
            if command == "verify" and packed:
                raise ValueError(f"model.pretrained: {folder} is packed; give the pruned folder that it was made from")
            if not packed:
                raise FileNotFoundError(
                    f"model.pretrained: {folder} has no tier maps ({TIERS_FILE}); prune or fit it first"
                )
        if command == "verify" and not (self.output / PACKED_FILE).is_file():
            raise FileNotFoundError(f"model.output: {self.output} has no packed model ({PACKED_FILE}); export it first")

    def _check_teacher(self, teacher: str, data: Any) -> None:
        known, tokens = load_config(teacher).vocab_size, load_config(self.pretrained).vocab_size
        if known != tokens:
            raise ValueError(
                f"model.teacher: its vocabulary has {known} tokens, the model's has {tokens}; give the dense model "
                "that this one was pruned from"
            )
        check_vocabulary(load_on_meta(teacher), getattr(data, "tokenizer", None))

    def inputs(self) -> list[Any]:
        """See ``CausalLM.inputs``."""
        return [self.pretrained, self.teacher, self.maps]

    def leaves(self, command: str) -> Path | None:
        """See ``CausalLM.leaves``."""
        return self.output if command in ("fit", "prune", "export") else None

    # ---- the model --------------------------------------------------------------------------------------------

    def build_model(self) -> PreTrainedModel:
        """See ``CausalLM.build_model``; masks that lie beside the model hold from the start."""
        folder, packed = self.folder, (self.folder / PACKED_FILE).is_file()
        stored = load_config(self.pretrained).dtype
        self.stored = stored if isinstance(stored, torch.dtype) else torch.float32
        model = load(self.pretrained, **self.loading)
        self.pruner = Pruner(model, **self._pruning)  # type: ignore[arg-type]
        if packed:
            found = read_packed(folder)
            self.pruner.adopt(found.tiers(), found.iteration, str(folder / PACKED_FILE))
        elif maps := self._maps_file():
            self.pruner.load(maps)
        if not any(matrix.weight.is_meta for matrix in self.pruner.matrices.values()):  # ranks have their rows later
            refuse(violations(self.pruner.matrices, self.pruner.keep), f"in {self.pretrained}")
        return model.train()

    def _maps_file(self) -> Path | None:
        """The tier maps to go on from, of a model on the Hub too; None of a dense model."""
        if self.maps == self.folder and self.folder.is_file():
            return None  # a GGUF file: the model itself, with nothing beside it
        if self.maps != self.folder or self.folder.exists():
            return tiers_file(self.maps)
        return hub_file(self.pretrained, TIERS_FILE)

    def configure_model(self) -> None:
        """Build the model, and adapters over it for LoRA."""
        if self.model is not None:
            return
        super().configure_model()
        if self.finetune == "lora":
            assert self.model is not None
            self.model = lora.add_adapters(self.model, self.pruner.matrices, self.lora_rank)

    @property
    def plain_model(self) -> PreTrainedModel:
        """The Hugging Face model, inside the adapters if there are any."""
        return self.model.get_base_model() if self.finetune == "lora" else self.model

    # ---- one iteration ----------------------------------------------------------------------------------------

    def start_iteration(self, row: Row, data: Any, device: torch.device) -> None:
        """Demote to a row's ratios by the current weights, mask and update.

        Args:
            row: The iteration.
            data: DataModule with calibration text.
            device: Where to compute.

        Raises:
            ValueError: See ``demotion.demote``.
        """
        self.merge()
        # compiled layers would pass over the hooks that see what matrices are given
        with self.whole_model(changes=True) as model, torch.compiler.set_stance("force_eager"):
            if model is not None:
                kept = self._trainer is None or not self.trainer.fast_dev_run
                folder = layer_folder(self.output) if kept else None  # nothing is saved that would remove them
                batches = self.calibration(data)
                errors = prune_layers(model, self.pruner, self.target(row), self.method, batches, device, folder)
                self._say(errors)
        self.pruner.iteration = row.iteration
        self._hold()
        rank_zero_info(
            f"iteration {row.iteration}: {100 * self.pruner.sparsity()['sparsity']:.2f} % of the weights are zero"
        )

    @staticmethod
    def _say(errors: Errors) -> None:
        for what, pairs in {"weight update": errors.matrices.values(), "reconstruction": errors.layers}.items():
            if pairs:
                before, after = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
                rank_zero_info(f"{what}: mean relative error {before:.4f} → {after:.4f}")

    def calibration(self, data: Any) -> Any:
        """Text that scores, updates and reconstruction see."""
        return data.calibration(self.calibration_blocks, self.calibration_seed)

    @contextmanager
    def whole_model(self, changes: bool = False) -> Iterator[PreTrainedModel | None]:
        """The model with all of its weights, its masks' matrices among them; None on ranks that do not have it.

        Under FSDP the first rank gathers it in host memory. All ranks must enter together.

        Args:
            changes: Have all ranks take over what the first one changed in weights and masks: sums may differ in their
                last bits from rank to rank, masks may not.
        """
        engine = self._engine()
        if engine is None:
            yield self.plain_model
            if changes and self._ranks() > 1:
                self._share_masks()
                for matrix in self.pruner.matrices.values():
                    torch.distributed.broadcast(matrix.weight.detach(), 0)
            return
        state, here = sharded.gather(engine), self.pruner.matrices
        model = None
        if not self.global_rank:
            model = from_state(self.model.config, {name.removeprefix("model."): w for name, w in state.items()})
            self.pruner.matrices = linear_layers(model)
        try:
            yield model
        finally:
            self.pruner.matrices = here
        if changes:
            self._share_masks()
            found = {} if model is None else {f"model.{name}": w for name, w in model.state_dict().items()}
            sharded.hand_out(engine, found)

    def _ranks(self) -> int:
        return self.trainer.world_size if self._trainer is not None else 1

    def _engine(self) -> nn.Module | None:
        """What a strategy that cuts weights up has made of this module; None where they are whole."""
        model = self.trainer.strategy.model if self._trainer is not None else None
        return model if model is not None and sharded.is_sharded(model) else None

    def _share_masks(self) -> None:
        """Have all ranks take over the first one's."""
        self.pruner.load_state(self.trainer.strategy.broadcast(self.pruner.state()), "the first rank")

    def _hold(self) -> None:
        """Cut the masks like the weights that they hold."""
        engine = self._engine()
        self._held = sharded.cut_masks(engine, self.pruner.matrices, self.pruner.keep) if engine is not None else None

    @property
    def held(self) -> Mapping[str, Tensor]:
        """Masks of what this rank has of each matrix."""
        return self.pruner.keep if self._held is None else self._held

    def target(self, row: Row) -> Ratios | Mix:
        """What an iteration ends with: the row's shares, or with ``target_bits`` the bits that belong to it."""
        if self.target_bits is None:
            return row.ratios
        block, k = self.pruner.block, self.pruner.k
        form = (self.export_values, self.export_bands)
        dense, end, here = (
            packed_bits(shares, block, k, *form)
            for shares in (Ratios(1, 0, 0), self.schedule.rows[-1].ratios, row.ratios)
        )
        done = (dense - here) / (dense - end) if dense > end else 1.0
        settled = self.topk != "auto" or any(tiers.counts()[TOPK] for tiers in self.pruner.tiers.values())
        ks = () if settled else choices(block, self.export_values)
        return Mix(dense - done * (dense - self.target_bits), str(self._pruning["scope"]), ks, *form)

    @property
    def export_values(self) -> str:
        """Type of packed values; of the right size also before the model is read."""
        sixteen = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
        return self.export_dtype or sixteen.get(self.stored, "float16")

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """See ``CausalLM.scheduler``; ``restart`` begins again."""
        return LambdaLR(optimizer, Restarts(self.lr_schedule, self.warmup_steps, steps))

    def restart(self, iteration: int, steps: int) -> None:
        """Begin an iteration's fine-tuning: a fresh optimizer, and the learning rate from its warm-up on.

        Args:
            iteration: How many were fine-tuned before in this run; ``iteration_lr_factor`` counts as often.
            steps: Optimizer steps that it has.
        """
        scheduler: Any = self.lr_schedulers()
        scheduler.optimizer.state.clear()  # moments of weights that were others
        for rate in scheduler.lr_lambdas:
            rate.start(scheduler.last_epoch, steps, self.iteration_lr_factor**iteration)
        for group, peak, rate in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = peak * rate(scheduler.last_epoch)

    def merge(self) -> None:
        """Take the adapters into the weights they may change; nothing without adapters."""
        if self.finetune != "lora":
            return
        changed = lora.merge_masked(self.plain_model, self.pruner.keep)
        if self._trainer and self.trainer.optimizers:
            for parameter in changed:  # moments of the old adapters would push the new ones
                self.trainer.optimizers[0].state.pop(parameter, None)

    # ---- fine-tuning ------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse strategies that fine-tuning does not know, and training in which nothing would be pruned or saved.

        Raises:
            ValueError: The strategy is one, or cuts up weights that adapters are to be merged into; or no callback runs
                the schedule.
        """
        if stage != "fit":
            return
        strategy = self.trainer.strategy
        whole, cut = isinstance(strategy, SingleDeviceStrategy | DDPStrategy), isinstance(strategy, _SHARDING)
        if not whole and not (cut and self.finetune == "full"):
            raise ValueError(
                f"trainer.strategy {type(strategy).__name__}: model.finetune {self.finetune} runs on one device or ddp"
                + (", or under FSDP" if self.finetune == "full" else "; only finetune full runs under FSDP, too")
            )
        if not any(getattr(callback, "runs_schedule", False) for callback in self.trainer.callbacks):
            raise ValueError(
                "trainer.callbacks: fit prunes and saves by the callback TierSchedule, and there is none; add it, or "
                "use the prune command"
            )

    def on_fit_start(self) -> None:
        """Bring masks and teacher to the device."""
        if self._engine() is None:
            self.pruner.to(self.device)
        self._hold()
        self.check_masks(f"in {self.pretrained}")
        if self.teacher is not None:
            self._teacher = Frozen(load(self.teacher, **self.loading))
            self._teacher.to(self.device)

    def on_train_start(self) -> None:
        """Cut the masks of a checkpoint, which strategies that cut up weights read after ``on_fit_start``."""
        if self._held is not None:
            self._hold()
            self.check_masks("in the checkpoint")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | dict[str, Tensor]:
        """Next-token loss, mixed with the distance from the teacher where there is one."""
        if self._teacher is None:
            return super().training_step(batch, batch_idx)
        return self.distilled_step(batch, self._teacher.model, self.distill_weight)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Hold the masks in the gradients; this comes before clipping."""
        mask_gradients(self.pruner.matrices, self.held)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Hold the masks in the weights: moments from before a demotion would still move them."""
        super().optimizer_step(*args, **kwargs)
        if self.finetune == "full":
            mask_weights(self.pruner.matrices, self.held)

    def on_validation_start(self) -> None:
        """What is validated is what would be saved."""
        self.merge()

    def check_masks(self, when: str) -> int:
        """Violations on all ranks, 0.

        Raises:
            RuntimeError: A pruned weight is not zero.
        """
        found = violations(self.pruner.matrices, self.held)
        if self._held is not None:
            found = int(self.trainer.strategy.reduce(torch.tensor(found, device=self.device), reduce_op="sum"))
        return refuse(found, when)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Masks go along with the weights."""
        checkpoint[_CHECKPOINT] = self.pruner.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Masks come back with the weights.

        Raises:
            ValueError: The checkpoint has none, or another model's.
        """
        if _CHECKPOINT not in checkpoint:
            raise ValueError(
                "the checkpoint has no tier maps: it is no BlockSparsity run's; start from model.pretrained"
            )
        self.configure_model()
        self.pruner.load_state(checkpoint[_CHECKPOINT], "the checkpoint")

    def write_export(
        self, folder: Path, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, card: str
    ) -> None:
        """See ``CausalLM.write_export``; adapters are merged before."""
        if self.finetune == "lora":
            self.merge()
            state = lora.plain_state(self.plain_model)
        super().write_export(folder, state, tokenizer, card)

    # ---- results and commands --------------------------------------------------------------------------------

    def save(self, data: Any) -> None:
        """See ``commands.save``."""
        commands.save(self, data)

    def prune(self, data: L.LightningDataModule, device: torch.device, dry_run: bool = False) -> dict[str, Any] | None:
        """See ``commands.prune`` and ``PareTrainer.prune``."""
        return commands.prune(self, data, device, dry_run)

    def export(self, data: L.LightningDataModule, device: torch.device) -> dict[str, Any]:
        """See ``commands.export`` and ``PareTrainer.export``."""
        return commands.export(self, data)

    def verify(self, data: L.LightningDataModule, device: torch.device) -> dict[str, Any]:
        """See ``commands.verify`` and ``PareTrainer.verify``."""
        return commands.verify(self, data, device)
