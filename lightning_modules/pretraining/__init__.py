"""Pretraining a causal language model from random weights."""

from lightning_modules.pretraining.module import Pretraining

__all__ = ["Pretraining"]
