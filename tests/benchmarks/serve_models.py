"""Bundles and images that the serving benchmarks share, made by the project's own networks and export.

The weights are random: speed does not depend on them. Images are smooth noise, on which JPEG does what it does on
photos.
"""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from models.bundle import (  # noqa: E402
    Calibration,
    DataInfo,
    Manifest,
    Provenance,
    Sample,
    Variant,
    file_sha256,
    write_checksums,
)
from models.image import InputSpec, decode  # noqa: E402
from models.store import Store  # noqa: E402

CASES = {
    "tiny": ("lenet", 32),
    "small": ("resnet18", 32),
    "large": ("resnet18", 224),
}  # network, pixels
CLASSES = 10


def picture(height: int, width: int, seed: int = 0, quality: int = 90) -> bytes:
    """JPEG bytes of smooth noise: a 500x375 one has about 40 kB."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(height // 8, 4), max(width // 8, 4), 3), np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = cv2.add(pixels, random.integers(0, 12, pixels.shape, np.uint8))
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def publish(store: Path, case: str) -> Path:
    """The directory of a case's bundle; where it is missing another process makes it: torch stays out of ours."""
    if not Store(store).latest(case):
        subprocess.run([sys.executable, __file__, store, case], check=True)
    return Store(store).path(case)


def make(store: Path, case: str) -> None:
    """Write the bundle of a case, with int8 where it is a ResNet."""
    import torch

    from models import networks
    from train.export.drift_baseline import build_drift_baseline
    from train.export.onnx_graph import InferenceGraph, export_onnx
    from train.export.quantize import QuantizeConfig, quantize

    torch.manual_seed(0)
    name, size = CASES[case]
    spec = InputSpec(height=size, width=size, short_side=256 if size == 224 else None)
    served = InferenceGraph(networks.build(name, CLASSES, 3, size), [120.0] * 3, [60.0] * 3)
    with Store(store).stage(case) as staged:
        root = staged.path
        export_onnx(served, spec, CLASSES, root / "model.onnx")
        files = [picture(size * 3 // 2, size * 2, seed) for seed in range(16)]
        images = np.stack([decode(data, spec) for data in files])
        found = {"fp32": "model.onnx"}
        if name == "resnet18":
            config = QuantizeConfig()
            quantize(
                root / "model.onnx", root / "model.int8.onnx", images, lambda _: 1.0, 1.0, config
            )
            found["int8"] = "model.int8.onnx"
        (root / "samples").mkdir()
        for i, data in enumerate(files):
            (root / "samples" / f"{i:02d}.jpg").write_bytes(data)
        with torch.inference_mode():
            outputs = served.eval()(torch.from_numpy(images))
            logits = served.logits(torch.from_numpy(images)).numpy()
        np.savez(
            root / "samples" / "expected.npz",
            pixels=images,
            **{key: value.numpy() for key, value in zip(served.output_names(), outputs, strict=True)},
        )
        Manifest(
            name=case,
            version=staged.version,
            created=datetime.now(UTC),
            network=name,
            input=spec,
            classes=[f"class {i}" for i in range(CLASSES)],
            outputs=served.output_names(),
            variants={
                kind: Variant(
                    file=file,
                    precision=kind,
                    sha256=file_sha256(root / file),
                    opset=20,
                    bytes=(root / file).stat().st_size,
                    tolerance=1e-3 if kind == "fp32" else 1.0,
                )
                for kind, file in found.items()
            },
            samples=[Sample(file=f"{i:02d}.jpg", label=0) for i in range(16)],
            calibration=Calibration(
                abstain_threshold=0.5, conformal_quantile=0.9, energy_threshold=0.0
            ),
            baseline=build_drift_baseline(
                logits, 1.0, images, np.array([[2 * size, size * 3 // 2]] * len(images))
            ),
            provenance=Provenance(
                data=DataInfo(source="noise", digest="0" * 64, counts={}), device="cpu", seed=0
            ),
        ).write(root)
        write_checksums(root)
        staged.publish()


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
