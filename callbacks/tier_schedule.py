"""Demotion at epoch boundaries: all iterations of block sparsity, with fine-tuning between them, as one ``fit``."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from callbacks.measurement import Measurement
from lightning_modules.block_sparsity import BlockSparsity

_LIGHTNING_DEFAULT = 1000  # what Trainer makes of max_epochs that nobody gave


class TierSchedule(Measurement):
    """Runs the schedule of a BlockSparsity model: demotes when an iteration's epochs are over, checks the masks after
    every epoch, saves the result at the end of fit. The schedule sets the Trainer's number of epochs: leave
    ``max_epochs`` out, or at -1.

    Args:
        patience: Go on to the next iteration after so many validations without a better perplexity; None fine-tunes
            each iteration to its end.
    """

    runs_schedule = True  # what the model looks for, which does not know callbacks

    def __init__(self, patience: int | None = None) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"TierSchedule.patience must be at least 1, got {patience}")
        self.patience = patience
        self._next = 0  # the row that begins next
        self._since = 0  # the epoch in which the present one began
        self._stale, self._best = 0, math.inf  # validations without a better perplexity, and the best
        self._fresh = False  # whether the perplexity that is logged is of this epoch
        self._finished: list[dict[str, Any]] = []
        self._module: BlockSparsity | None = None
        self._rows: list[list[Any]] = []  # what is run: of each iteration its number, its shares and its epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Train for as many epochs as the schedule says.

        Raises:
            ValueError: The model has no schedule, its last iteration has no epoch to start in, the data have no
                calibration text, the Trainer is asked for another number of epochs, or the model refuses (see
                ``BlockSparsity.check_arguments``).
        """
        if not isinstance(pl_module, BlockSparsity):
            raise ValueError(f"TierSchedule needs a BlockSparsity model, not {type(pl_module).__name__}")
        if stage != "fit":
            return
        self._rows = [[row.iteration, *vars(row.ratios).values(), row.epochs] for row in pl_module.rows]
        if pl_module.rows[-1].epochs < 1:
            raise ValueError(
                f"schedule: iteration {pl_module.rows[-1].iteration} has no epochs to fine-tune in; give it some, or "
                "use the prune command"
            )
        if not hasattr(trainer.datamodule, "calibration"):
            raise ValueError(
                "TierSchedule needs data with calibration text, such as TextCorpus, not "
                f"{type(trainer.datamodule).__name__}"
            )
        if trainer.fast_dev_run:
            return
        pl_module.check_arguments("fit", trainer.datamodule)
        epochs = sum(row.epochs for row in pl_module.rows)
        if trainer.max_epochs not in (None, -1, _LIGHTNING_DEFAULT, epochs):
            raise ValueError(
                f"trainer.max_epochs is {trainer.max_epochs}, but the schedule has {epochs} epochs: leave max_epochs "
                "out, or change the schedule (model.iteration makes one iteration alone)"
            )
        trainer.fit_loop.max_epochs = epochs

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a limit of steps that would end before the last iteration begins.

        Raises:
            ValueError: ``max_steps`` is too small.
        """
        before = sum(row.epochs for row in pl_module.rows[:-1])
        steps = before * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if self.patience is None and not trainer.fast_dev_run and 0 <= trainer.max_steps <= steps:
            raise ValueError(
                f"trainer.max_steps {trainer.max_steps} ends before iteration {pl_module.rows[-1].iteration} begins, "
                f"after step {steps}: leave max_steps out; the schedule says how long to train"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Demote when the current iteration's epochs are over (iterations without epochs follow at once)."""
        while self._next < len(pl_module.rows) and self._over(trainer, pl_module):
            row = pl_module.rows[self._next]
            pl_module.start_iteration(row, trainer.datamodule, pl_module.device)
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            pl_module.restart(self._next, steps * max(row.epochs, 1))
            self._next += 1
            self._since = trainer.current_epoch
            self._stale, self._best = 0, math.inf

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Note that there is a perplexity: not every epoch need have one (``check_val_every_n_epoch``)."""
        self._fresh = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Check the masks, note the iteration's perplexity, and stop early where nothing improves.

        Raises:
            RuntimeError: A pruned weight came back.
        """
        violations = pl_module.check_masks(f"after epoch {trainer.current_epoch}")
        logged = trainer.callback_metrics.get("val/ppl") if self._fresh else None
        self._fresh = False
        ppl = float(logged) if logged is not None else None
        row = pl_module.rows[self._next - 1]
        known = next((done["ppl"] for done in self._finished if done["iteration"] == row.iteration), None)
        entry = pl_module.pruner.iteration_result(row.iteration, known if ppl is None else ppl, violations)
        pl_module.log("sparsity/violations", float(violations), rank_zero_only=True)
        pl_module.log("sparsity/zeros", entry["sparsity"], rank_zero_only=True)
        self._finished = [done for done in self._finished if done["iteration"] != row.iteration] + [entry]
        if ppl is not None:
            self._stale = 0 if ppl < self._best else self._stale + 1
            self._best = min(self._best, ppl)
        if self._gave_up():
            rank_zero_info(f"iteration {row.iteration}: no better perplexity in {self._stale} validations")
        # the Trainer's limit counts epochs that earlier iterations may not have used
        last, used = self._next == len(pl_module.rows), trainer.current_epoch + 1 - self._since
        if last and (self._gave_up() or used >= row.epochs):
            trainer.should_stop = True

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note whose result belongs in the run record; a run that is resumed after its last step trains no more."""
        self._module = pl_module

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``: the ``tiers`` block."""
        return self._module.pruner.result(self._finished) if self._module is not None else {}

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save model, tokenizer and tier maps."""
        if self._next < len(pl_module.rows):
            rank_zero_warn(
                f"stopped after iteration {self._next} of {len(pl_module.rows)}: what is saved is that far pruned"
            )
        if not trainer.fast_dev_run:
            pl_module.save(trainer.datamodule)
        trainer.strategy.barrier()

    def _over(self, trainer: Trainer, pl_module: Any) -> bool:
        if not self._next or self._gave_up():
            return True
        return trainer.current_epoch - self._since >= pl_module.rows[self._next - 1].epochs

    def _gave_up(self) -> bool:
        return self.patience is not None and self._stale >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Where in the schedule the run is."""
        fields = {"next": self._next, "since": self._since, "stale": self._stale, "best": self._best}
        return {**fields, "finished": self._finished, "rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``.

        Raises:
            ValueError: The run that is to go on had another schedule.
        """
        before = state_dict.get("rows", self._rows)
        if self._rows and before != self._rows:
            old, new = (_told(rows, other) for rows, other in ((before, self._rows), (self._rows, before)))
            raise ValueError(
                f"model.schedule: the checkpoint is of a run with {old}, this one has {new}; go on with the same "
                "schedule, or start another from a saved model (model.pretrained)"
            )
        self._next = state_dict["next"]
        self._since = state_dict["since"]
        self._stale, self._best = state_dict["stale"], state_dict["best"]
        self._finished = state_dict["finished"]


def _told(rows: list[list[Any]], other: list[list[Any]]) -> str:
    """The first iteration of a schedule that another has not."""
    number, *shares, epochs = next((row for row in rows if row not in other), rows[-1])
    dense, mid, topk = (f"{share:g}" for share in shares)
    return f"{len(rows)} iterations, {number} of dense {dense}, mid_2_4 {mid}, topk {topk} and {epochs} epochs"
