"""After the fit: test the best weights, write the bundle, publish and promote it."""
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.bundle import (
    EXPECTED,
    OUTPUTS,
    SAMPLES,
    DataInfo,
    Manifest,
    Metrics,
    Provenance,
    Sample,
    Variant,
    sha256,
    write_sums,
)
from models.image import decode
from models.store import Store

OPSET = 20
PACKAGES = ("torch", "torchvision", "lightning", "onnx", "onnxscript", "onnxruntime", "numpy", "opencv-python-headless")
SAMPLE_COUNT = 16


@dataclass
class Export:
    """What follows the fit.

    Args:
        enabled: test the best weights and write a bundle.
    """

    enabled: bool = True


class Graph(nn.Module):
    """What the bundle's graph computes from uint8 [N,H,W,C]: probabilities, energy, embedding, cam where it exists."""

    def __init__(self, system: L.LightningModule):
        super().__init__()
        self.network = system.network
        self.register_buffer("mean", system.mean.clone())
        self.register_buffer("std", system.std.clone())
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        found = self.network.outputs(x)
        outputs = {"probabilities": (found["logits"] / self.temperature).softmax(1),
                   "energy": -found["logits"].logsumexp(1), "embedding": found["embedding"]}
        return outputs | {"cam": found["cam"]} if "cam" in found else outputs


def export_bundle(trainer: L.Trainer, system: L.LightningModule, data: L.LightningDataModule, export: Export,
                  store: str, name: str, recipe: dict[str, Any], seconds: dict[str, float]) -> Path:
    """Publish the best weights as the next version of `name`, promote it, print one line; give back its directory."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    tested = trainer.test(system, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)[0]
    validated = trainer.validate(system, datamodule=data, verbose=False)[0]
    graph = Graph(system).eval().cpu().float()
    graph.network.to(memory_format=torch.contiguous_format)
    samples = data.samples(SAMPLE_COUNT)
    pixels = torch.from_numpy(np.stack([decode(image, data.input) for _, image, _ in samples]))
    with torch.no_grad():
        expected = {key: value.numpy() for key, value in graph(pixels).items()}
    with Store(store).stage(name) as staged:
        directory = staged.path
        opset = write_onnx(graph, pixels, directory / "model.onnx")
        save_file({k: v.contiguous() for k, v in graph.network.state_dict().items()}, directory / "weights.safetensors")
        (directory / SAMPLES).mkdir()
        for file, image, _ in samples:
            (directory / SAMPLES / file).write_bytes(image)
        np.savez(directory / SAMPLES / EXPECTED, **expected)
        model = directory / "model.onnx"
        Manifest(
            name=name, version=staged.version, created=datetime.now(UTC), network=system.name, classes=data.classes,
            input=data.input, outputs=list(expected),
            variants={"fp32": Variant(file=model.name, precision="fp32", sha256=sha256(model),
                                      bytes=model.stat().st_size, opset=opset, accuracy=tested["test/accuracy"])},
            metrics={part: Metrics(images=data.counts[part], accuracy=of[f"{part}/accuracy"], nll=of[f"{part}/loss"])
                     for part, of in (("val", validated), ("test", tested))},
            samples=[Sample(file=file, label=label) for file, _, label in samples],
            provenance=provenance(trainer, data, recipe, seconds)).write(directory)
        write_sums(directory)
        path = staged.publish().path
    print(f"{path}: test accuracy {tested['test/accuracy']:.4f} on {data.counts['test']} images; "
          f"serve it: python -m serve --store {store} --model {name}")
    return path


def write_onnx(graph: nn.Module, pixels: Tensor, file: Path) -> int:
    """Export with a batch of any size; give back the opset that the file says."""
    names = [n for n in (*OUTPUTS, "cam") if n in graph(pixels[:2])]
    program = torch.onnx.export(
        graph, (pixels[:2],), dynamo=True, opset_version=OPSET, input_names=["image"], output_names=names,
        dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=4096)}}, verbose=False)
    program.save(file, external_data=False)
    return next(o.version for o in onnx.load(file).opset_import if o.domain in ("", "ai.onnx"))


def provenance(trainer: L.Trainer, data: L.LightningDataModule, recipe: dict[str, Any],
               seconds: dict[str, float]) -> Provenance:
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return Provenance(
        git_commit=commit, git_dirty=None if status is None else bool(status), device=name,
        data=DataInfo(source=str(data.source), digest=data.digest, counts=data.counts),
        packages={p: package_version(p) for p in PACKAGES}, seed=recipe["seed_everything"], recipe=recipe,
        seconds=seconds)


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
