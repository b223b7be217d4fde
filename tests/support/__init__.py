"""Helpers that tests and benchmarks share, e.g. `from support import tiny_bundle`."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

RANDOM_CONVNET = ("--model.network=convnet", "--model.weights=none")
"""Flags for tests that train on a folder: a small network without pretrained weights."""
