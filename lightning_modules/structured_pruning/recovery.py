"""Recovery of a pruned model by low-rank adapters, with or without the dense model as a teacher."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.files import check_output, inputs_of, replacing
from lightning_modules import card as cards
from lightning_modules.card import write_card
from lightning_modules.causal_lm import CausalLM
from lightning_modules.loading import check_vocabulary, dtype_of, load, load_config, load_on_meta
from lightning_modules.structured_pruning import adapter as adapters
from lightning_modules.structured_pruning.layers import family
from lightning_modules.structured_pruning.plan import FILE, PruningPlan
from lightning_modules.structured_pruning.provenance import model_hash
from lightning_modules.structured_pruning.sharing import share_equal

_ADAPTER = "adapter"  # folder of the adapter within the merged model's


class LoraRecovery(CausalLM):
    """Trains low-rank adapters on a pruned model, whose weights stay as they are; ``HFExport`` merges them at the end.

    Checkpoints hold the adapters alone, with a hash of the base's weights; on another base they are refused, and with
    another rank, alpha or target_modules (older checkpoints do not say; theirs must only have the same shapes). The
    merged folder also holds the adapter, which ``export`` merges again.

    Args:
        base: Hugging Face folder or hub name of the pruned model.
        rank: Rank of the adapters.
        alpha: Adapters are scaled by alpha / rank.
        dropout: Dropout on the adapters' input.
        target_modules: Projections that get an adapter.
        adapter: Go on from (``fit``), measure (``validate``) or merge (``export``) this saved adapter. Its rank, alpha
            and target_modules count; ``fit`` refuses others.
        merged: Folder that ``export`` writes.
        teacher: Folder or hub name of the dense model to learn from too.
        distill_weight: Share of the teacher in the loss; the rest is the text's next token.
        temperature: Softens the distributions of teacher and student.
        hidden_weight: Weight of the distance between the student's and the teacher's hidden states in the loss, beside
            the rest; 0 leaves them out. What enters a kept layer is compared with what entered it in the teacher.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled decay of the adapters.
        lr_schedule: See ``CausalLM``.
        warmup_steps: Optimizer steps of linear warm-up.
        overwrite: Let ``merged`` replace a folder that Pare did not write.
        **kwargs: See ``CausalLM``.
    """

    def __init__(
        self,
        base: str,
        rank: int = 8,
        alpha: int = 16,
        dropout: float = 0.05,
        target_modules: list[str] = [  # noqa: B006 (jsonargparse shows it)
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ],
        adapter: str | None = None,
        merged: str | None = None,
        teacher: str | None = None,
        distill_weight: float = 0.5,
        temperature: float = 2.0,
        hidden_weight: float = 0.0,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        lr_schedule: str = "linear",
        warmup_steps: int = 100,
        overwrite: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(learning_rate, weight_decay, lr_schedule=lr_schedule, warmup_steps=warmup_steps, **kwargs)
        if not 0 < distill_weight <= 1:
            raise ValueError(f"distill_weight must be above 0 and at most 1, got {distill_weight}")
        if hidden_weight < 0 or (hidden_weight and teacher is None):
            raise ValueError(f"hidden_weight must not be negative, and needs a teacher; got {hidden_weight}")
        for name, value in (("rank", rank), ("alpha", alpha), ("temperature", temperature)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.base = base
        self.adapter = Path(adapter).expanduser() if adapter is not None else None
        self.merged = Path(merged).expanduser() if merged is not None else None
        self.overwrite = overwrite
        self.teacher_path = teacher
        self.distill_weight = distill_weight
        self.temperature = temperature
        self.hidden_weight = hidden_weight
        self.lora = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
        )
        self.teacher: Any = None
        self._pairs: list[tuple[int, int]] = []  # hidden states of the student, and the teacher's that they should be
        self.base_hash = ""
        self.strict_loading = False  # checkpoints hold no base; what they must hold is checked on loading

    trained_only = True

    # ---- before any work ------------------------------------------------------------------------------------------

    def check_arguments(self, command: str, data: Any) -> None:
        """Refuse what a command cannot do, before any text or weight is read.

        Args:
            command: "fit", "validate", "test", "predict" or "export".
            data: The DataModule, whose files must not be written over.

        Raises:
            FileNotFoundError: The base, the teacher or the adapter is not there.
            ValueError: They do not belong together, an argument is missing, or ``merged`` must not be written, see
                ``common.files.check_output``.
        """
        config = load_config(self.base)
        family(config)
        if self.adapter is not None:
            adapters.check_adapter(self.adapter)
            if command == "fit":
                saved = _settings(LoraConfig.from_pretrained(str(self.adapter)))
                _refuse_others(f"the adapter in {self.adapter}", saved, _settings(self.lora))
        if self.teacher_path is not None:
            self._check_teacher(load_config(self.teacher_path), config)
            if command == "fit":
                check_vocabulary(load_on_meta(self.teacher_path), getattr(data, "tokenizer", None))
        if command == "export":
            if self.adapter is None or self.merged is None:
                raise ValueError("export needs the adapter to merge (adapter) and the folder to write (merged)")
            check_output(self.merged, "model.merged", inputs_of(self, data), self.overwrite)

    def _check_teacher(self, teacher: Any, student: Any) -> None:
        if teacher.vocab_size != student.vocab_size:
            raise ValueError(
                f"teacher: its vocabulary has {teacher.vocab_size} tokens, the base's has {student.vocab_size}; give "
                "the model that the base was pruned from"
            )
        if self.hidden_weight:
            if teacher.hidden_size != student.hidden_size:
                raise ValueError(
                    f"hidden_weight: the teacher's hidden states are {teacher.hidden_size} wide, the base's "
                    f"{student.hidden_size}; give the model that the base was pruned from, or hidden_weight 0"
                )
            self._kept_layers(teacher.num_hidden_layers, student.num_hidden_layers)

    def _kept_layers(self, teacher: int, student: int) -> list[int]:
        """Which of the teacher's layers the student's are.

        Raises:
            ValueError: The student has fewer, and nothing says which.
        """
        path = Path(self.base).expanduser() / FILE
        if path.is_file():
            plan = PruningPlan.load(path)
            kept = [number for number, layer in enumerate(plan.layers) if not layer.dropped]
            if len(plan.layers) == teacher and len(kept) == student:
                return kept
        if teacher != student:
            raise ValueError(
                f"hidden_weight: the teacher has {teacher} layers and the base {student}, and {self.base} has no plan "
                "that says which were dropped; give the folder that prune wrote, or hidden_weight 0"
            )
        return list(range(student))

    def inputs(self) -> list[Any]:
        """See ``CausalLM.inputs``."""
        return [self.base, self.adapter, self.teacher_path]

    # ---- the model ------------------------------------------------------------------------------------------------

    def build_model(self) -> Any:
        """See ``CausalLM.build_model``: the base, frozen, with adapters.

        Raises:
            ValueError: ``adapter`` was trained on another base.
        """
        model = load(self.base, self._stored(), self.loading["attention"], supported=family)
        # as in float32, so that it is the same whatever the adapters are trained beside
        self.base_hash = "" if model.device.type == "meta" else model_hash(model, widened=True)
        self._convert(model)
        weights = None
        if self.adapter is not None:
            saved, weights = adapters.read_adapter(self.adapter, self.base, self.base_hash)
            saved.lora_dropout = self.lora.lora_dropout  # of training, not of the adapter
            self.lora = saved
        return adapters.attach(model, self.lora, weights).train()

    def _convert(self, model: Any) -> None:
        """Make the weights what they would be loaded as; buffers are in float32 either way."""
        model.config.dtype = dtype_of(self.loading["dtype"], self._stored())
        for weight in model.parameters():
            weight.data = weight.data.to(model.config.dtype)

    def _stored(self) -> torch.dtype:
        """What the base is on disk."""
        stored: Any = load_config(self.base).dtype
        return stored or torch.float32

    def configure_model(self) -> None:
        """Build the model, and the teacher where there is one."""
        if self.model is not None:
            return
        super().configure_model()
        fitting = self._trainer is not None and self.trainer.training
        if fitting and str(self.trainer.precision) in ("bf16-true", "16-true"):
            rank_zero_warn(
                f"trainer.precision {self.trainer.precision}: adapters and rotary frequencies are in 16 bits too, and "
                "small steps are lost; model.dtype bfloat16 with precision 32-true halves the base alone"
            )
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.parameter_count -= trained  # of the model that comes of merging
        rank_zero_info(f"adapters of rank {self.lora.r}: {trained:,} parameters to train")
        if self.teacher_path is not None:
            teacher = load(self.teacher_path, **self.loading)
            # A submodule, not ``Frozen``: sharding strategies then cut it up like the student, of whose size it is or
            # larger, instead of holding it whole on every rank. In training mode until on_train_start.
            self.teacher = teacher.requires_grad_(False).train()
            self._check_teacher(teacher.config, self.model.config)
            layers = [model.config.num_hidden_layers for model in (teacher, self.model)]
            if self.hidden_weight:
                kept = self._kept_layers(*layers)
                self._pairs = [*list(enumerate(kept))[1:], (layers[1], layers[0])]  # what is embedded is the same
            alone = self._trainer is None or self.trainer.world_size == 1  # sharding would cut what is shared twice
            if alone and teacher.device.type != "meta":
                shared = share_equal(teacher, self.model)
                rank_zero_info(f"teacher: {shared / 1e6:,.1f} MB of its weights are the base's own, and held once")

    def on_train_start(self) -> None:
        """The teacher has no dropout; set here, because Lightning warns of what is in evaluation mode before."""
        if self.teacher is not None:
            self.teacher.eval()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | dict[str, Tensor]:
        """Mean next-token loss, mixed with the divergence from the teacher."""
        if self.teacher is None:
            return super().training_step(batch, batch_idx)
        hidden = {"hidden_weight": self.hidden_weight, "pairs": self._pairs}
        return self.distilled_step(batch, self.teacher, self.distill_weight, self.temperature, **hidden)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters alone, and say what they belong to."""
        checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if ".lora_" in n}
        checkpoint["recovery"] = {"base": self.base, "base_hash": self.base_hash, **_settings(self.lora)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, or of other adapters.

        Raises:
            ValueError: It is one.
        """
        made_on = checkpoint.get("recovery")
        if made_on is None:
            raise ValueError("the checkpoint is not one of LoraRecovery")
        adapters.refuse_other_base("the checkpoint", made_on["base"], made_on["base_hash"], self.base, self.base_hash)
        now = _settings(self.lora)
        _refuse_others("the checkpoint", {name: made_on.get(name, own) for name, own in now.items()}, now)
        own = {n for n, _ in self.named_parameters() if ".lora_" in n}
        if "state_dict" in checkpoint and (others := own ^ set(checkpoint["state_dict"])):
            raise ValueError(f"target_modules: the checkpoint has other adapters than this run, e.g. {min(others)}")

    # ---- the result -----------------------------------------------------------------------------------------------

    def leaves(self, command: str) -> Path | None:
        """See ``CausalLM.leaves``."""
        return self.merged if command == "export" else None

    def write_export(
        self, folder: Path, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, card: str
    ) -> None:
        """See ``CausalLM.write_export``: adapters merged into a fresh copy of the base, and the adapter beside."""
        weights = {name: weight.detach().cpu() for name, weight in adapters.adapter_weights(state).items()}
        self._merge(folder, self.lora, weights, tokenizer, card)

    def export(self, datamodule: LightningDataModule, device: torch.device) -> dict[str, Any]:
        """Merge the saved ``adapter`` into ``base`` and write ``merged``.

        Raises:
            ValueError: The adapter was trained on another base, or an argument is missing.
        """
        self.check_arguments("export", datamodule)
        merged = self.merged
        assert merged is not None
        base, adapter = cards.short(self.base), cards.short(self.adapter or "")
        text = f"{base} with the adapter {adapter} merged into it.\n\n{cards.usage(load_config(self.base))}"
        card = cards.card(f"{base}, recovered", text, self.base, ["pruned"])
        with replacing(merged, "model", inputs_of(self, datamodule), self.overwrite) as folder:
            self._merge(folder, None, None, datamodule.tokenizer, card)
        print(f"merged model: {merged}")
        return {}

    def _merge(
        self,
        folder: Path,
        config: LoraConfig | None,
        weights: dict[str, Tensor] | None,
        tokenizer: PreTrainedTokenizerBase,
        card: str,
    ) -> None:
        """Merge these adapters, or the saved ones, into a fresh copy of the base; write both."""
        base = load(self.base, supported=family)
        check_vocabulary(base, tokenizer)
        base_hash = model_hash(base)
        if config is None:
            assert self.adapter is not None
            config, weights = adapters.read_adapter(self.adapter, self.base, base_hash)
        adapted = adapters.attach(base, config, weights)
        adapters.save_adapter(folder / _ADAPTER, adapted, self.base, base_hash)
        # merged in float32, written in the dtype that the base has on disk
        adapted.merge_and_unload().to(self._stored()).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_card(folder, card)


def _settings(lora: LoraConfig) -> dict[str, Any]:
    """What weights of adapters mean nothing without, by the names of this module's arguments."""
    return {"rank": lora.r, "alpha": lora.lora_alpha, "target_modules": sorted(lora.target_modules or ())}


def _refuse_others(what: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError unless something was trained with the present settings."""
    for name, value in now.items():
        if then[name] != value:
            raise ValueError(f"{name}: {what} was trained with {then[name]}, not {value}; give model.{name} as it was")
