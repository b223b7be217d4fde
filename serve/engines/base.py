"""The protocol that all engines share."""

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from models.bundle import GraphFile


class Engine(Protocol):
    """Runs a graph. All predictor threads of a worker share one engine.

    While several predictors are busy, each runs its own batch on one core, and no core waits for
    another (throughput). A batch that is alone may use all cores (latency).
    """

    name: str
    outputs: tuple[str, ...]  # names of all outputs of the graph
    is_bfloat16: bool  # less exact than the precision of the variant

    def run(
        self, images: np.ndarray, output_names: tuple[str, ...], use_all_threads: bool
    ) -> list[np.ndarray]:
        """Run the graph on uint8 [N, H, W, C] and return the named outputs in this order."""


# Makes an engine from the contents of a graph and a number of threads. It does not read the file
# once more, as that may have changed since it was checked. Raises BundleError for a graph that it
# can't load, and ValueError if this machine lacks what the engine needs.
EngineFactory = Callable[[GraphFile, int], Engine]


def measure_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the least duration of a call, without the first call, which allocates memory."""
    run()
    durations: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return min(durations)
