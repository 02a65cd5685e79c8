"""Tasks: what a model can still do, by lm-eval, on files of the user's own or tasks of the Hub."""

from lightning_modules.evaluation.module import TaskEvaluation

__all__ = ["TaskEvaluation"]
