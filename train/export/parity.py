"""Parity: how far an ONNX file is from the torch network, and how fast it is on this machine."""

import time
from functools import partial

import numpy as np
import torch

from models.bundle import Latency, Parity
from models.bundle.verify import Runner, measure_latency_ms
from models.cpu_quota import available_cores
from train.export.onnx_graph import InferenceGraph
from train.export.provenance import cpu_name

FP32_TOLERANCE = 1e-4  # of a probability
PARITY_BATCH_SIZES = (1, 2, 7, 64)
BATCHES_PER_SIZE = 8

LATENCY_BATCH_SIZES = (1, 8, 16)
LATENCY_ROUNDS = 4
LATENCY_BUDGET_SECONDS = 5.0  # after which no further round starts
LATENCY_GAIN = 0.02  # of the best time; a round without such a gain is the last


def run_torch(graph: InferenceGraph, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the outputs of the torch network by name, for images uint8 [N,H,W,C]."""
    with torch.inference_mode():
        outputs = graph(torch.from_numpy(images))
    values = [output.numpy() for output in outputs]
    return dict(zip(graph.output_names(), values, strict=True))


def measure_parity(
    run: Runner, graph: InferenceGraph, images: np.ndarray, tolerance: float = FP32_TOLERANCE
) -> Parity:
    """Compare an ONNX file with the torch network on real images, uint8 [n,H,W,C].

    Each batch size is compared on its first 8 batches only, as small batches take the most time per
    image; the torch network runs once, on all images. Where the two best classes of an image lie
    within twice the tolerance, either label is correct: the image counts as a tie.
    """
    expected = run_torch(graph, images)["probabilities"]
    max_difference = 0.0
    is_same_label = np.ones(len(images), bool)
    for size in PARITY_BATCH_SIZES:
        for start in range(0, min(BATCHES_PER_SIZE * size, len(images)), size):
            rows = slice(start, start + size)
            actual = run(images[rows])["probabilities"]
            difference = float(np.abs(actual - expected[rows]).max())
            max_difference = max(max_difference, difference)
            is_same_label[rows] &= actual.argmax(1) == expected[rows].argmax(1)

    probabilities = np.sort(expected, 1)
    margin = probabilities[:, -1] - probabilities[:, -2]
    ties = np.flatnonzero(margin <= 2 * tolerance)
    is_same_label[ties] = True

    return Parity(
        images=len(images),
        batch_sizes=list(PARITY_BATCH_SIZES),
        max_abs_diff=max_difference,
        agreement=float(is_same_label.mean()),
        ties=ties.tolist(),
    )


def measure_latencies(
    runners: dict[str, Runner],
    images: np.ndarray,
    seconds: float = 0.05,
    budget_seconds: float = LATENCY_BUDGET_SECONDS,
) -> dict[str, Latency]:
    """Time the variants in turn, over several rounds, and return the best round of each one.

    As they take turns, other load on the machine slows down all variants alike. Rounds end where
    one makes no variant faster than those before it.
    `seconds` is the time for each variant and batch size in a round.
    """
    best_ms: dict[str, dict[int, float]] = {}
    for name in runners:
        best_ms[name] = dict.fromkeys(LATENCY_BATCH_SIZES, float("inf"))

    started = time.monotonic()
    for round_number in range(LATENCY_ROUNDS):
        if round_number > 0 and time.monotonic() - started > budget_seconds:
            break

        has_gained = False
        for name, run in runners.items():
            for size in LATENCY_BATCH_SIZES:
                batch = np.resize(images, (size, *images.shape[1:]))
                milliseconds = measure_latency_ms(partial(run, batch), seconds)
                best = best_ms[name][size]
                has_gained = has_gained or milliseconds < (1 - LATENCY_GAIN) * best
                best_ms[name][size] = min(best, milliseconds)
        if not has_gained:
            break

    return {name: _as_latency(batch_ms) for name, batch_ms in best_ms.items()}


def _as_latency(batch_ms: dict[int, float]) -> Latency:
    """Return the manifest entry for milliseconds by batch size."""
    throughputs = [1000 * size / milliseconds for size, milliseconds in batch_ms.items()]
    return Latency(
        device=cpu_name(),
        threads=available_cores(),
        batch_ms=batch_ms,
        images_per_second=max(throughputs),
    )
