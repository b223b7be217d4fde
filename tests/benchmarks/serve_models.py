"""Bundles and images that the serving benchmarks share, made by the project's networks and export.

The weights are random, since speed does not depend on them. Images are smooth noise, for which JPEG
does the same work as for photos. Run as a script (`serve_models.py STORE CASE`) it writes one.
"""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import project_path  # noqa: F401  makes the imports below possible

from models.bundle import (
    Calibration,
    DataInfo,
    Manifest,
    Provenance,
    Sample,
    Variant,
    file_sha256,
    write_checksums,
)
from models.image import InputSpec, decode
from models.store import Store

# Network and pixels a side.
CASES = {
    "tiny": ("lenet", 32),
    "small": ("resnet18", 32),
    "large": ("resnet18", 224),
}
CLASSES = 10
SAMPLES = 16


def make_jpeg(height: int, width: int, seed: int = 0, quality: int = 90) -> bytes:
    """JPEG bytes of smooth noise: a 500x375 image has about 40 kB."""
    random = np.random.default_rng(seed)
    coarse_shape = (max(height // 8, 4), max(width // 8, 4), 3)
    coarse = random.integers(0, 256, coarse_shape, np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = cv2.add(pixels, random.integers(0, 12, pixels.shape, np.uint8))
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def publish(store: Path, case: str) -> Path:
    """Return the directory of a case's bundle; write it first where it is missing.

    Another process writes it, so that the benchmark does not load torch.
    """
    if not Store(store).latest(case):
        subprocess.run([sys.executable, __file__, store, case], check=True)
    return Store(store).path(case)


def write_bundle(store: Path, case: str) -> None:
    """Write the bundle of a case, with int8 where it is a ResNet."""
    import torch

    from models import networks
    from train.export.drift_baseline import build_image_baseline, build_prediction_baseline
    from train.export.onnx_graph import InferenceGraph, export_onnx
    from train.export.quantize import QuantizeConfig, quantize

    torch.manual_seed(0)
    name, size = CASES[case]
    spec = InputSpec(height=size, width=size, short_side=256 if size == 224 else None)
    graph = InferenceGraph(networks.build(name, CLASSES, 3, size), [120.0] * 3, [60.0] * 3)
    graph.eval()

    height = size * 3 // 2
    width = size * 2
    files = [make_jpeg(height, width, seed) for seed in range(SAMPLES)]
    images = np.stack([decode(data, spec) for data in files])
    with torch.inference_mode():
        outputs = graph(torch.from_numpy(images))
        logits = graph.logits(torch.from_numpy(images)).numpy()
    names = graph.output_names()
    expected = {key: value.numpy() for key, value in zip(names, outputs, strict=True)}
    original_sizes = np.array([[width, height]] * SAMPLES)

    with Store(store).stage(case) as staged:
        directory = staged.path
        export_onnx(graph, spec, CLASSES, directory / "model.onnx")
        variants = {"fp32": describe_variant(directory / "model.onnx", "fp32")}
        if name == "resnet18":
            int8 = directory / "model.int8.onnx"
            quantize(
                directory / "model.onnx", int8, images, lambda _: 1.0, 1.0, 1, QuantizeConfig()
            )
            variants["int8"] = describe_variant(int8, "int8")

        write_samples(directory / "samples", files, {"pixels": images, **expected})
        manifest = Manifest(
            name=case,
            version=staged.version,
            created=datetime.now(UTC),
            network=name,
            input=spec,
            classes=[f"class {i}" for i in range(CLASSES)],
            outputs=names,
            variants=variants,
            samples=[Sample(file=f"{i:02d}.jpg", label=0) for i in range(SAMPLES)],
            calibration=Calibration(
                abstain_threshold=0.5, conformal_quantile=0.9, energy_threshold=0.0
            ),
            baseline=build_prediction_baseline(logits, 1.0)
            | build_image_baseline(images, original_sizes),
            provenance=Provenance(
                data=DataInfo(source="noise", digest="0" * 64, counts={}), device="cpu", seed=0
            ),
        )
        manifest.write(directory)
        write_checksums(directory)
        staged.publish()


def write_samples(directory: Path, files: list[bytes], expected: dict[str, np.ndarray]) -> None:
    """Write the sample images and expected.npz."""
    directory.mkdir()
    for i, data in enumerate(files):
        (directory / f"{i:02d}.jpg").write_bytes(data)
    np.savez(directory / "expected.npz", **expected)


def describe_variant(graph: Path, precision: str) -> Variant:
    return Variant(
        file=graph.name,
        precision=precision,
        sha256=file_sha256(graph),
        opset=20,
        bytes=graph.stat().st_size,
        tolerance=1e-3 if precision == "fp32" else 1.0,
    )


if __name__ == "__main__":
    write_bundle(Path(sys.argv[1]), sys.argv[2])
