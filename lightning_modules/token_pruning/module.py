"""Stage 2: train the scorers inside the real model, whose weights stay as they are."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import get_scheduler

from common.files import check_output, inputs_of
from common.randomness import run_seed, step_seed
from lightning_modules.batches import logits as logits_of
from lightning_modules.causal_lm import whole_steps
from lightning_modules.data.tokenizer import fingerprint
from lightning_modules.distillation import divergence
from lightning_modules.frozen import Frozen
from lightning_modules.loading import Dtype, check_vocabulary, load, load_config
from lightning_modules.metrics import WeightedMean
from lightning_modules.token_pruning import losses
from lightning_modules.token_pruning.anatomy import check_supported, input_device, layer_devices
from lightning_modules.token_pruning.evaluation import PruningQuality
from lightning_modules.token_pruning.identity import differences
from lightning_modules.token_pruning.masked_attention import KERNELS
from lightning_modules.token_pruning.networks import Network
from lightning_modules.token_pruning.passes import ending_at
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.samples import (
    Samples,
    check_choice,
    check_data,
    response_logits,
    response_nll,
    split_batch,
)
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.soft_mask import Budget, Pruning, layer_inputs
from lightning_modules.token_pruning.store import Saliency, check_saliency
from lightning_modules.token_pruning.targets import Target


class TokenPruning(L.LightningModule):
    """Trains a token pruner: loss of the pruned model + distance from saliency + order of saliency.

    The base model is frozen, is not part of the checkpoint, and prunes by an attention mask that gives exactly what
    dropping the tokens would. Each loss is summed over the pruning layers. With every weight but one at 0, that one
    alone trains the scorers.

    Args:
        base: Hugging Face folder, GGUF file or hub name of the model to prune.
        schedule: Where and how much to prune while training.
        output: The trained pruner is saved here at the end of fit.
        pruner: Start from this saved pruner (``validate`` measures it) instead of random weights.
        saliency: Folder that ``predict`` wrote; None trains without saliency.
        target: Saliency that validation compares scores with; the one that was collected.
        network: Kind and size of the scorers; None takes ``MLP``, or those of ``pruner``, which can have no others.
        lm_weight: Weight of the pruned model's loss on the responses. With this and ``kl_weight`` at 0 the model only
            reads, which takes a fraction of the time.
        mse_weight: Weight of the squared distance from saliency, which has mean 0 and deviation 1 in each prompt.
        ranking_weight: Weight of the logistic ranking loss.
        cross_entropy_weight: Weight of the cross entropy of the scores' softmax from saliency as shares, for saliency
            that is attention.
        kl_weight: Weight of the divergence from the unpruned model; costs a forward pass.
        ratio_weight: Weight of the squared distance of the mean sigmoid score from the share to keep.
        pairs: Token pairs per prompt and layer in the ranking loss.
        temperature: Of the Gumbel noise on scores and of the sigmoid that gradients pass.
        response: Tokens at the end of a block of plain text that count as response.
        eval_keep: Shares per stage that validation prunes to.
        learning_rate: Peak learning rate of AdamW.
        warmup_steps: Optimizer steps of linear warm-up, before a cosine to 0.
        device_map: For ``validate``: how to spread the base model over devices, as transformers takes it: "auto",
            "balanced", or a device, "cpu" or "disk" for each part by name. None puts all of it on the rank's device.
        offload_folder: For parts that ``device_map`` places on "disk".
        dtype: What the base model's weights are loaded as; "auto" is what they are on disk, "fast" the same but
            float32 on processors without instructions for 16 bits. Scorers are float32.
        attention: Attention kernel of the base model: "sdpa" or "eager"; None takes transformers' choice.
        overwrite: Let ``output`` replace a folder that Pare did not write.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        base: str,
        schedule: Schedule,
        output: str = "runs/token_pruner",
        pruner: str | None = None,
        saliency: str | None = None,
        target: Target | None = None,
        network: Network | None = None,
        lm_weight: float = 1.0,
        mse_weight: float = 1.0,
        ranking_weight: float = 1.0,
        cross_entropy_weight: float = 0.0,
        kl_weight: float = 0.0,
        ratio_weight: float = 0.0,
        pairs: int = 512,
        temperature: float = 1.0,
        response: int = 64,
        eval_keep: list[float] = [0.9, 0.8, 0.7, 0.5],  # noqa: B006 (jsonargparse shows it)
        learning_rate: float = 1e-3,
        warmup_steps: int = 20,
        device_map: dict[str, int | str] | str | None = None,
        offload_folder: str | None = None,
        dtype: Dtype = "float32",
        attention: str | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        self.weights = {"lm": lm_weight, "mse": mse_weight, "ranking": ranking_weight}
        self.weights |= {"cross_entropy": cross_entropy_weight, "kl": kl_weight, "ratio": ratio_weight}
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(f"loss weights must not be negative, nor all 0; got {self.weights}")
        if temperature <= 0 or learning_rate <= 0 or pairs < 1 or response < 1:
            raise ValueError("temperature and learning_rate must be positive, pairs and response at least 1")
        if warmup_steps < 0 or not all(0 < share <= 1 for share in eval_keep):
            raise ValueError(
                f"warmup_steps must not be negative, eval_keep within (0, 1]; got {warmup_steps} and {eval_keep}"
            )
        self.base, self.schedule, self.output, self.pruner_path = base, schedule, Path(output).expanduser(), pruner
        self.saliency_path, self.target, self.network = saliency, target, network
        if pruner is None:  # one that is only measured needs no saliency
            self._check_saliency()
        self.pairs, self.temperature, self.response, self.eval_keep = pairs, temperature, response, eval_keep
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.device_map, self.overwrite = device_map, overwrite
        self.loading: dict[str, Any] = {"dtype": dtype, "attention": attention}
        self.loading |= {
            "device_map": device_map,
            "offload_folder": offload_folder and str(Path(offload_folder).expanduser()),
        }
        self.pruner: Any = None
        self.saliency: Saliency | None = None
        self._base: Frozen | None = None
        self.quality = PruningQuality(eval_keep)
        self.supervised = WeightedMean()

    def check_arguments(self, command: str, data: Any) -> None:
        """Refuse what a command cannot do, before any text or weight is read.

        Args:
            command: "fit" or "validate"; others are not looked at.
            data: The DataModule.

        Raises:
            FileNotFoundError: No such base, pruner or saliency.
            ValueError: A model, schedule, pruner, network or data that do not go together, an attention that takes no
                mask, a device map while training or losses without the saliency that they need, or see
                ``common.files.check_output``.
        """
        if command not in ("fit", "validate"):
            return
        config = load_config(self.base)
        check_supported(config)
        check_data(data, config)
        if self.loading["attention"] not in (None, *KERNELS):
            raise ValueError(f"model.attention must take masks: {' or '.join(KERNELS)}")
        layers = self.schedule.resolve(config.num_hidden_layers)
        if self.pruner_path is not None:
            pruner = TokenPruner.load(self.pruner_path)
            pruner.check_base(config)
            self._check_pruner(pruner, layers)
        if command == "fit":
            if self.device_map is not None:
                raise ValueError("model.device_map is for validate: leave it out to train")
            self._check_saliency()
            check_output(self.output, "model.output", inputs_of(self, data), self.overwrite)
            if self.saliency_path is not None:
                check_saliency(Path(self.saliency_path).expanduser(), {"layers": layers})
            check_choice(self.schedule, data, config)

    def inputs(self) -> list[Any]:
        """See ``CausalLM.inputs``."""
        return [self.base, self.saliency_path, self.pruner_path]

    def leaves(self, command: str) -> Path | None:
        """See ``CausalLM.leaves``."""
        return self.output if command == "fit" else None

    def _check_pruner(self, pruner: TokenPruner, layers: list[int]) -> None:
        if list(pruner.layers) != layers:
            raise ValueError(f"{self.pruner_path} scores layers {list(pruner.layers)}, the schedule {layers}")
        if self.network is not None and self.network.describe() != pruner.network.describe():
            raise ValueError(f"network: the scorers of {self.pruner_path} are {pruner.network!r}; leave it out")

    def _check_saliency(self) -> None:
        taught = ("mse", "ranking", "cross_entropy")
        if self.saliency_path is None and any(self.weights[name] for name in taught):
            raise ValueError(
                "mse_weight, ranking_weight and cross_entropy_weight need saliency: give its folder, or set them to 0"
            )

    @property
    def model(self) -> Any:
        """The frozen base model.

        Raises:
            AttributeError: It is not loaded yet; a record of such a module has no model.
        """
        if self._base is None:
            raise AttributeError("configure_model has not loaded the base model yet")
        return self._base.model

    @property
    def parameter_count(self) -> int:
        """Parameters of the base model."""
        return int(self.model.num_parameters())

    def configure_model(self) -> None:
        """Load the base model, and make or load the scorers."""
        if self.pruner is not None:
            return
        self._base = Frozen(load(self.base, **self.loading))
        model = self._base.model
        layers = self.schedule.resolve(model.config.num_hidden_layers)
        if self.pruner_path is None:
            self.pruner = TokenPruner.for_model(model, layers, self.network)
        else:
            self.pruner = TokenPruner.load(self.pruner_path, model)
            self._check_pruner(self.pruner, layers)
        trained = sum(p.numel() for p in self.pruner.parameters())
        rank_zero_info(f"scorers after layers {layers}: {trained / 1e6:.2f} M parameters")

    def on_fit_start(self) -> None:
        """Read the saliency, and put the base model beside the scorers.

        Raises:
            ValueError: With a device map, since training keeps the model on one device; in float16; without saliency
                that a loss needs, or with saliency of other layers, of another tokenizer or another model; or with data
                of another tokenizer than the model's.
        """
        if self.device_map is not None:
            raise ValueError("model.device_map is for validate: leave it out to train")
        self._check_saliency()
        if self.model.dtype == torch.float16:  # see ``soft_mask.FLOOR``
            raise ValueError("model.dtype: the base model is float16, which cannot hold the mask; take bfloat16")
        check_data(self.trainer.datamodule, self.model.config)
        check_vocabulary(self.model, self.trainer.datamodule.tokenizer)
        self.model.to(self.device)
        if self.saliency_path is not None:
            expect = {
                "layers": self.schedule.resolve(self.model.config.num_hidden_layers),
                "tokenizer": fingerprint(self.trainer.datamodule.tokenizer),
            }
            self.saliency = Saliency(self.saliency_path, expect)
            others = differences(self.saliency.index["base"], self.model)  # rounding to another dtype is none
            if others:
                raise ValueError(
                    f"{self.saliency_path} was collected with another base ({'; '.join(others)}); collect it again for "
                    "this one (configs/token_pruning/saliency.yaml)"
                )

    def on_validation_start(self) -> None:
        """Put the base model beside the scorers, or, where a device map has placed it, each scorer beside its layer."""
        check_data(self.trainer.datamodule, self.model.config)
        check_vocabulary(self.model, self.trainer.datamodule.tokenizer)
        if self.target is not None:
            with torch.inference_mode(False):  # sums are added to outside of it, see ``validation_step``
                self.quality.expect(self.schedule.resolve(self.model.config.num_hidden_layers))
                self.quality.to(self.device)
        if self.device_map is None:
            self.model.to(self.device)
        else:
            self.pruner.spread(layer_devices(self.model))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Derive this micro-batch's noise, so that it does not depend on what ran before."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.started
        torch.manual_seed(step_seed(run_seed(), done, self.global_rank))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor | None]:
        """The weighted sum of losses over prompts pruned by noisy scores."""
        samples = split_batch(batch, self.response)
        parts = self.losses(samples) if len(samples.input_ids) else {}
        total: Tensor = sum((self.weights[name] * part for name, part in parts.items()), self._nothing())
        for name, part in parts.items():
            # "loss" is the cross entropy wherever there is one
            self.log("train/loss" if name == "lm" else f"train/{name}", part, prog_bar=name == "lm")
        self.log("train/total", total, prog_bar=True)
        return {"loss": total, "train_loss": parts["lm"].detach() if "lm" in parts else None}

    def losses(self, samples: Samples) -> dict[str, Tensor]:
        """Every loss whose weight is not 0, by name; those of the scores are sums over layers.

        Without losses on the pruned model's logits nothing is to be sent back through the model: it only reads, and no
        further than the last stage.
        """
        model, prompt = self.model, samples.prompt
        budget = Budget.of(self.schedule, model.config.num_hidden_layers, prompt)
        network = self.pruner.network
        shape = (network.pool, network.asking, network.logits)
        pruning = Pruning(self._score, prompt, budget, self.temperature, *shape)
        found: dict[str, Tensor] = {}
        if self.weights["lm"] or self.weights["kl"]:
            with layer_inputs(model, samples.real, pruning):
                logits = response_logits(model, samples)
            found = self._logit_losses(samples, logits)
        else:
            with torch.no_grad(), layer_inputs(model, samples.real, pruning), ending_at(model, budget.stages[-1] + 1):
                logits_of(model, samples.inputs())
        found |= self._score_losses(samples, budget, pruning)
        return {name: loss for name, loss in found.items() if self.weights[name]}

    def _score(self, layer: int, hidden_BNH: Tensor, there_BN: Tensor) -> Tensor:
        with torch.enable_grad():
            scores: Tensor = self.pruner(hidden_BNH, layer, there_BN)
        return scores

    def _logit_losses(self, samples: Samples, logits: Tensor) -> dict[str, Tensor]:
        """Losses of the pruned model on the responses."""
        nll, tokens = response_nll(logits, samples.labels)
        found = {"lm": nll.sum() / tokens.sum().clamp_min(1)}
        if self.weights["kl"]:
            with torch.no_grad():
                unpruned = response_logits(self.model, samples)
            found["kl"] = divergence(logits, unpruned, samples.labels[:, -logits.shape[1] :])
        return found

    def _score_losses(self, samples: Samples, budget: Budget, pruning: Pruning) -> dict[str, Tensor]:
        """Losses on the scores of tokens that reached each stage and may be dropped there."""
        targets, has_target = self._targets(samples, budget.stages)
        totals = dict.fromkeys(("mse", "ranking", "cross_entropy", "ratio"), self._nothing())
        before = samples.prompt
        for stage, layer in enumerate(budget.stages):
            scores, free = pruning.scores[layer], before & samples.prompt & ~budget.protected
            known = free & has_target[:, None]
            target = losses.normalise(targets[layer], known)
            totals["cross_entropy"] = totals["cross_entropy"] + losses.cross_entropy(scores, targets[layer], known)
            totals["mse"] = totals["mse"] + losses.regression(scores, target, known)
            totals["ranking"] = totals["ranking"] + losses.ranking(scores, target, known, self.pairs)
            left = torch.tensor(budget.tokens[stage], device=scores.device) - budget.protected.sum(1)
            share = left / free.sum(1).clamp_min(1)
            totals["ratio"] = totals["ratio"] + losses.kept_share(scores, free, share)
            before = pruning.alive[layer]
        return totals

    def _targets(self, samples: Samples, layers: list[int]) -> tuple[dict[int, Tensor], Tensor]:
        """Collected saliency [B, N] by layer, and which samples have any, bool [B]."""
        shape, device = samples.prompt.shape, samples.prompt.device
        has_target = torch.zeros(shape[0], dtype=torch.bool)
        targets = {layer: torch.zeros(shape, dtype=torch.float32) for layer in layers}
        if self.saliency is not None:
            for row, (key, prompt) in enumerate(zip(samples.keys(), samples.prompt.cpu(), strict=True)):
                values = self.saliency.get(key)
                if values is not None:
                    has_target[row] = True
                    for layer in layers:
                        targets[layer][row, prompt] = values[layer]
            self.supervised.update(has_target.sum(), len(has_target))
        return {layer: target.to(device) for layer, target in targets.items()}, has_target.to(device)

    def _nothing(self) -> Tensor:
        """0, with a gradient of 0 for every weight (ranks without a sample must still take part)."""
        return torch.stack([p.sum() for p in self.pruner.parameters()]).sum() * 0.0

    def on_fit_end(self) -> None:
        """Save the pruner on the first rank, and say how much of the data had saliency."""
        if self.saliency is not None:
            share = self.supervised.compute().item()
            say = rank_zero_info if share == 1 else rank_zero_warn
            say(f"{share:.0%} of the training samples had saliency")
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            target = self.saliency.index["target"] if self.saliency is not None else None
            self.pruner.notes = {"schedule": vars(self.schedule), "target": target, "weights": self.weights}
            self.pruner.notes |= {"steps": self.trainer.global_step, "data": self.trainer.datamodule.name}
            self.pruner.save(self.output, inputs_of(self, self.trainer.datamodule), self.overwrite)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Compare scores with saliency, and prune by them, by chance and by recency."""
        if self.device_map is not None:
            batch = {name: part.to(input_device(self.model)) for name, part in batch.items()}
        # saliency needs gradients, in which tensors made in Lightning's inference mode cannot take part
        with torch.inference_mode(False), torch.no_grad():
            samples = split_batch(batch, self.response)
            if len(samples.input_ids):
                self.quality.update(self.model, self.pruner, self.schedule, self.target, samples)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/ppl`` (unpruned), ``val/ppl_SCORER_KEEP`` and ``val/spearman_LAYER``."""
        for name, value in self.quality.compute().items():
            self.log(name, value, prog_bar=name == "val/ppl", sync_dist=True)
        with torch.inference_mode(False):
            self.quality.reset()

    def configure_optimizers(self) -> Any:
        """AdamW on the scorers, linear warm-up and a cosine to 0."""
        optimizer = torch.optim.AdamW(self.pruner.parameters(), lr=self.learning_rate, weight_decay=0.01)
        steps = whole_steps(self.trainer, "cosine")
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
