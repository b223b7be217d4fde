"""The certificate: how far each ONNX file is from the torch network, and how fast it is here."""

import time
from functools import partial

import numpy as np
import torch

from models.bundle import Latency, Parity
from models.bundle.verify import Runner, measure_latency_ms
from models.cpu_quota import available_cores
from train.export.onnx_graph import InferenceGraph
from train.export.provenance import cpu_name

BATCH_SIZES = (1, 2, 7, 64)
TOLERANCE = 1e-4  # of a probability, for fp32
LATENCY_SIZES = (1, 8, 16)
ROUNDS, PATIENCE = 4, 5.0  # no further round once so many seconds have passed


def torch_outputs(served: InferenceGraph, images: np.ndarray) -> dict[str, np.ndarray]:
    """What the torch network gives for uint8 [N,H,W,C], by output name."""
    with torch.inference_mode():
        outputs = served(torch.from_numpy(images))
    return {name: value.numpy() for name, value in zip(served.names(), outputs, strict=True)}


def parity(
    run: Runner, served: InferenceGraph, images: np.ndarray, tolerance: float = TOLERANCE
) -> Parity:
    """Compare ONNX with torch on real images, uint8 [n,H,W,C], at several batch sizes.

    A batch size b gets the first 8 b images, so that small batches, which cost most an image, don't take most of the
    time. Where the two best classes of an image lie within twice the tolerance, either label is right: a tie.
    """
    expected = torch_outputs(served, images)["probabilities"]
    difference, same = 0.0, np.ones(len(images), bool)
    for size in BATCH_SIZES:
        for start in range(0, min(8 * size, len(images)), size):
            rows = slice(start, start + size)
            found, wanted = (
                run(images[rows])["probabilities"],
                torch_outputs(served, images[rows])["probabilities"],
            )
            difference = max(difference, float(np.abs(found - wanted).max()))
            same[rows] &= found.argmax(1) == wanted.argmax(1)
    best = np.sort(expected, 1)
    ties = np.flatnonzero(best[:, -1] - best[:, -2] <= 2 * tolerance)
    same[ties] = True
    return Parity(
        images=len(images),
        batch_sizes=list(BATCH_SIZES),
        max_abs_diff=difference,
        agreement=float(same.mean()),
        ties=ties.tolist(),
    )


def latencies(
    runs: dict[str, Runner], images: np.ndarray, seconds: float = 0.05, patience: float = PATIENCE
) -> dict[str, Latency]:
    """Time the variants in turn, several rounds, and keep each one's best round: whatever else the machine does then
    slows none of them alone."""
    best = {name: dict.fromkeys(LATENCY_SIZES, float("inf")) for name in runs}
    began = time.monotonic()
    for turn in range(ROUNDS):
        if turn and time.monotonic() - began > patience:
            break
        for name, run in runs.items():
            for size in LATENCY_SIZES:
                batch = np.resize(images, (size, *images.shape[1:]))
                best[name][size] = min(
                    best[name][size], measure_latency_ms(partial(run, batch), seconds)
                )
    return {
        name: Latency(
            device=cpu_name(),
            threads=available_cores(),
            batch_ms=found,
            images_per_second=max(1000 * size / ms for size, ms in found.items()),
        )
        for name, found in best.items()
    }
