"""Helpers that tests and benchmarks share, e.g. `from support import tiny_bundle`."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
