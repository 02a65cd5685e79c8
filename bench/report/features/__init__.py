"""The four features as the report compares them: what each saves against what it costs, read off the records.

One file a feature; each says where its points stand in the records, and in which words they are told.
"""

from bench.report.features import blocks, gradients, structure, tokens
from bench.report.features.base import Axis, Case, Feature, Point, Speed

__all__ = ["FEATURES", "Axis", "Case", "Feature", "Point", "Speed"]
FEATURES: tuple[Feature, ...] = (gradients.FEATURE, tokens.FEATURE, structure.FEATURE, blocks.FEATURE)
