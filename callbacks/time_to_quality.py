"""How long training takes to reach a quality, and what quality a time buys."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.measurement import Measurement, validate_now


class TimeToQuality(Measurement):
    """Notes validation perplexity against training time.

    Training time excludes validation. Both answers are read off validations that were made, never interpolated.

    Args:
        target_ppl: Record the training time of the first validation at or below this perplexity.
        fixed_time_s: Record the perplexity of the last validation within this many seconds of training.
        from_start: Validate before the first step, too.
    """

    def __init__(
        self, target_ppl: float | None = None, fixed_time_s: float | None = None, from_start: bool = False
    ) -> None:
        self.target_ppl = target_ppl
        self.fixed_time_s = fixed_time_s
        self.from_start = from_start
        self.curve: list[dict[str, float]] = []
        self._trained_s = 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate first, where that is asked for; start the clock."""
        if self.from_start and self._due(trainer):
            validate_now(trainer)
        self._since = time.perf_counter()

    def _due(self, trainer: Trainer) -> bool:
        """Whether a point is missing: the first one, or one that a kill came before, after that step's checkpoint."""
        if not trainer.enable_validation or any(point["step"] == trainer.global_step for point in self.curve):
            return False
        asks_type: Any = None
        return trainer.global_step == 0 or trainer.fit_loop.epoch_loop._should_check_val_fx(asks_type)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock while validating."""
        if self._since is not None:
            self._trained_s += time.perf_counter() - self._since
            self._since = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note one point of the curve, with the perplexities of other texts where there are any, and go on."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/ppl")}
        if "val/ppl" in found:
            named = {name.replace("/", "_"): value for name, value in found.items()}
            point = {"train_s": self._trained_s, "step": trainer.global_step, **named}
            self.curve = [one for one in self.curve if one["step"] != point["step"]] + [point]
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The curve so far, so that a resumed run knows its past."""
        running = time.perf_counter() - self._since if self._since is not None else 0.0
        return {"curve": self.curve, "trained_s": self._trained_s + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self.curve, self._trained_s = state_dict["curve"], state_dict["trained_s"]

    def summary(self) -> dict[str, Any]:
        """See ``Measurement.summary``."""
        fields: dict[str, Any] = {"val_curve": self.curve}
        if self.target_ppl is not None:
            reached = [p["train_s"] for p in self.curve if p["val_ppl"] <= self.target_ppl]
            fields |= {"target_ppl": self.target_ppl, "time_to_target_ppl_s": reached[0] if reached else None}
        if self.fixed_time_s is not None:
            within = [p["val_ppl"] for p in self.curve if p["train_s"] <= self.fixed_time_s]
            fields |= {"fixed_time_s": self.fixed_time_s, "ppl_at_fixed_time": within[-1] if within else None}
        return fields
