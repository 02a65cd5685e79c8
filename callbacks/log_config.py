"""The run's configuration, kept where people look."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger


class LogConfig(SaveConfigCallback):
    """Saves ``config.yaml`` beside the logs and shows it as text in TensorBoard; without a logger nothing is saved."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See ``SaveConfigCallback.setup``."""
        # Without logs Lightning takes the working directory, where a config.yaml is the user's own.
        self.save_to_log_dir = bool(trainer.loggers)
        super().setup(trainer, pl_module, stage)

    def text(self) -> str:
        """The whole configuration as YAML; running ``fit --config`` on it repeats the run."""
        return self.parser.dump(self.config, skip_none=False)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See ``SaveConfigCallback.save_config``; on rank 0."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", f"```yaml\n{self.text()}\n```", 0)
