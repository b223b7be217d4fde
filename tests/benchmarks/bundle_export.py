"""Cost of a bundle: seconds to export, file sizes, latency and throughput of each variant.

    python tests/benchmarks/bundle_export.py [--networks resnet18 …] [--keep]

Each network has random weights and is exported, quantized and timed as after a fit, on the CPU, at
its usual input size. fp32 and int8 are timed in turn in one process: their ratio is the result, as
milliseconds depend on the machine.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bare  # noqa: F401  (first: it puts the repository on the path)
import numpy as np
import torch
from results import write_result

from models import networks
from models.bundle import GraphFile
from models.bundle.verify import load_runner
from models.image import InputSpec
from train.export.onnx_graph import InferenceGraph, export_onnx
from train.export.parity import measure_latencies, measure_parity
from train.export.provenance import cpu_name
from train.export.quantize import QuantizeConfig, quantize

# Network -> (side in pixels, channels).
SIZES = {
    "lenet": (28, 1),
    "convnet": (8, 1),
    "speednet": (32, 3),
    "resnet18": (32, 3),
    "resnet50": (224, 3),
    "mobilenetv3_small_100": (224, 3),
    "mobilenetv3_large_100": (224, 3),
    "efficientnet_b0": (224, 3),
    "convnext_tiny": (224, 3),
    "vit_base_patch16_224": (224, 3),
}
IMAGES = 16
CLASSES = 10
SECONDS_PER_TIMING = 0.15
LATENCY_BUDGET_SECONDS = 15

Result = dict[str, Any]


def build_graph(name: str) -> InferenceGraph:
    """Return a network with random weights as a bundle's graph."""
    size, channels = SIZES[name]
    torch.manual_seed(0)
    network = networks.build(name, classes=CLASSES, channels=channels, size=size)
    network.eval().requires_grad_(False)
    # Some heads start at zero, which makes all outputs the same.
    torch.nn.init.normal_(network.head.weight, std=0.1)
    return InferenceGraph(network, [127.0] * channels, [60.0] * channels)


def measure(name: str, directory: Path) -> Result:
    """Export, quantize and time one network."""
    size, channels = SIZES[name]
    graph = build_graph(name)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, channels), np.uint8)
    fp32 = directory / f"{name}.onnx"
    int8 = directory / f"{name}.int8.onnx"

    started = time.perf_counter()
    export_onnx(graph, InputSpec(height=size, width=size, channels=channels), CLASSES, fp32)
    exported = time.perf_counter()
    quantize(fp32, int8, images, lambda file: 1.0, 1.0, 1, QuantizeConfig())
    quantized = time.perf_counter()

    runners = {
        "fp32": load_runner(GraphFile.read(fp32)),
        "int8": load_runner(GraphFile.read(int8)),
    }
    parity = measure_parity(runners["fp32"], graph, images)
    latencies = measure_latencies(runners, images, SECONDS_PER_TIMING, LATENCY_BUDGET_SECONDS)
    batch_ms: dict[str, dict[int, float]] = {}
    images_per_second: dict[str, float] = {}
    for variant, latency in latencies.items():
        batch_ms[variant] = {n: round(ms, 3) for n, ms in latency.batch_ms.items()}
        images_per_second[variant] = latency.images_per_second

    return {
        "network": name,
        "input": [size, size, channels],
        "export_seconds": round(exported - started, 2),
        "quantize_seconds": round(quantized - exported, 2),
        "max_abs_diff": parity.max_abs_diff,
        "bytes": {"fp32": fp32.stat().st_size, "int8": int8.stat().st_size},
        "batch_ms": batch_ms,
        "images_per_second": {v: round(rate, 1) for v, rate in images_per_second.items()},
        "int8_over_fp32": round(images_per_second["int8"] / images_per_second["fp32"], 2),
    }


def format_table(results: list[Result]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| network | input | export s | int8 s | MB fp32 / int8 | ms, 1 image | images/s "
        "| int8 : fp32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        shape = "x".join(str(number) for number in result["input"])
        megabytes = format_pair(result, lambda r, v: f"{r['bytes'][v] / 1e6:.2f}")
        milliseconds = format_pair(result, lambda r, v: f"{r['batch_ms'][v][1]:.2f}")
        speed = format_pair(result, lambda r, v: f"{r['images_per_second'][v]:,.0f}")
        lines.append(
            f"| {result['network']} | {shape} | {result['export_seconds']:.1f} "
            f"| {result['quantize_seconds']:.1f} | {megabytes} | {milliseconds} | {speed} "
            f"| {result['int8_over_fp32']:.2f} |"
        )
    return "\n".join(lines)


def format_pair(result: Result, format_value: Callable[[Result, str], str]) -> str:
    """Format a value of fp32 and of int8."""
    return f"{format_value(result, 'fp32')} / {format_value(result, 'int8')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    options = parser.parse_args()

    results: list[Result] = []
    with tempfile.TemporaryDirectory() as directory:
        for name in options.networks:
            result = measure(name, Path(directory))
            results.append(result)
            print(json.dumps(result), flush=True)
            if options.keep:
                write_result(__file__, result, ("network",))

    print(f"\n{cpu_name()}\n\n{format_table(results)}")


if __name__ == "__main__":
    main()
