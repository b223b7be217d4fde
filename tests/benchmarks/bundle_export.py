"""What a bundle costs and gives: seconds to export, bytes, latency and throughput of each variant.

    python tests/benchmarks/bundle_export.py [--networks resnet18 …] [--out bundle_export.json]

Each network has random weights and is exported, quantized and timed as after a fit, on the CPU, at the size it is used
at. fp32 and int8 are timed in turn in the same process; their ratio is what counts, milliseconds are this machine's.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import bare  # noqa: F401  (first: it puts the repository on the path)
import numpy as np
import torch

from models import networks
from models.bundle.verify import load_runner
from models.image import InputSpec
from train.export import parity as parity_check
from train.export.onnx_graph import InferenceGraph, export_onnx
from train.export.provenance import cpu_name
from train.export.quantize import QuantizeConfig, quantize

SIZES = {
    "lenet": (28, 1),
    "convnet": (8, 1),
    "speednet": (32, 3),
    "resnet18": (32, 3),
    "resnet50": (224, 3),
    "mobilenet_v3_small": (224, 3),
    "mobilenet_v3_large": (224, 3),
    "efficientnet_b0": (224, 3),
    "convnext_tiny": (224, 3),
    "vit_b_16": (224, 3),
}
IMAGES = 16


def measure(name: str, directory: Path) -> dict:
    size, channels = SIZES[name]
    torch.manual_seed(0)
    network = (
        networks.build(name, classes=10, channels=channels, size=size).eval().requires_grad_(False)
    )
    torch.nn.init.normal_(
        network.head.weight, std=0.1
    )  # some start at zero, and then every answer is the same
    served = InferenceGraph(network, [127.0] * channels, [60.0] * channels)
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, channels), np.uint8)
    files = {"fp32": directory / f"{name}.onnx", "int8": directory / f"{name}.int8.onnx"}
    began = time.perf_counter()
    export_onnx(served, InputSpec(height=size, width=size, channels=channels), 10, files["fp32"])
    exported = time.perf_counter()
    quantize(files["fp32"], files["int8"], images, lambda file: 1.0, 1.0, QuantizeConfig())
    quantized = time.perf_counter()
    runs = {variant: load_runner(file) for variant, file in files.items()}
    parity = parity_check.parity(runs["fp32"], served, images)
    timed = parity_check.latencies(runs, images, seconds=0.15, patience=15)
    speed = {variant: found.images_per_second for variant, found in timed.items()}
    return {
        "network": name,
        "input": [size, size, channels],
        "export_seconds": round(exported - began, 2),
        "quantize_seconds": round(quantized - exported, 2),
        "max_abs_diff": parity.max_abs_diff,
        "bytes": {v: file.stat().st_size for v, file in files.items()},
        "batch_ms": {
            v: {n: round(ms, 3) for n, ms in found.batch_ms.items()} for v, found in timed.items()
        },
        "images_per_second": {v: round(s, 1) for v, s in speed.items()},
        "int8_over_fp32": round(speed["int8"] / speed["fp32"], 2),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| network | input | export s | int8 s | MB fp32 / int8 | ms, 1 image | images/s | int8 : fp32 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        megabytes, one, speed = (
            {v: of(r, v) for v in ("fp32", "int8")}
            for of in (
                lambda r, v: f"{r['bytes'][v] / 1e6:.2f}",
                lambda r, v: f"{r['batch_ms'][v][1]:.2f}",
                lambda r, v: f"{r['images_per_second'][v]:,.0f}",
            )
        )
        pairs = [f"{pair['fp32']} / {pair['int8']}" for pair in (megabytes, one, speed)]
        lines.append(
            f"| {r['network']} | {'x'.join(map(str, r['input']))} | {r['export_seconds']:.1f} | "
            f"{r['quantize_seconds']:.1f} | {' | '.join(pairs)} | {r['int8_over_fp32']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in options.networks:
            rows.append(measure(name, Path(directory)))
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n{cpu_name()}\n\n{table(rows)}")
    if options.out:
        known = json.loads(options.out.read_text())["networks"] if options.out.exists() else []
        kept = [row for row in known if row["network"] not in options.networks]
        order = list(SIZES)
        rows = sorted(kept + rows, key=lambda row: order.index(row["network"]))
        options.out.write_text(
            json.dumps({"device": cpu_name(), "networks": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
