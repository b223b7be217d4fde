"""Comparison of two bundles on the same images, and the gate that a new version has to pass."""

from models.comparison.compare import ComparisonError, compare_candidates
from models.comparison.gate import GateConfig, decide
from models.comparison.results import Comparison
from models.comparison.test_images import TestImage

__all__ = [
    "Comparison",
    "ComparisonError",
    "GateConfig",
    "TestImage",
    "compare_candidates",
    "decide",
]
