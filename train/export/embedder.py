"""Embeddings of all images of a data set by the pretrained network, before it is trained."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.bundle import BundleError
from models.bundle.bundle import GraphFile
from models.bundle.verify import load_runner
from train.data import ImageData
from train.data.cache import DECODER_VERSION
from train.export.onnx_graph import InferenceGraph, export_onnx
from train.learning.embeddings import Embed, EmbeddedImages, open_embedding_cache
from train.learning.system import Classifier

# On a CPU, onnxruntime is about three times as fast as torch at efficientnet_lite0, but the export
# takes as long as some hundred images.
ONNX_MIN_IMAGES = 300


def embed_data(system: Classifier, data: ImageData, device: torch.device) -> None:
    """Give the data module the embeddings of all its images, those of the cache or computed.

    The network of the system must be built.
    """
    mean = system.mean.flatten().tolist()
    std = system.std.flatten().tolist()
    key = (
        system.weights.read().digest,
        system.name,
        repr(sorted(system.options.items())),
        data.input.model_dump_json(),
        DECODER_VERSION,
        repr((mean, std, data.max_pixels)),
    )
    images = EmbeddedImages(data, open_embedding_cache(data.cache, *key))
    graph = InferenceGraph(system.network, mean, std).eval()
    embed = _build_embed(graph, data, device, len(images.missing))
    embeddings = images.compute(embed)
    graph.cpu()
    system.train()
    data.record_embeddings(embeddings, hashlib.sha256("\n".join(key).encode()).hexdigest())


def _build_embed(graph: InferenceGraph, data: ImageData, device: torch.device, count: int) -> Embed:
    """Return the fastest function for `count` images on this device."""
    if device.type == "cpu" and count >= ONNX_MIN_IMAGES:
        embed = _build_onnx_embed(graph, data)
        if embed is not None:
            return embed

    graph.to(device)

    @torch.inference_mode()
    def run_torch(images: Tensor) -> np.ndarray:
        pixels = images.to(device).permute(0, 2, 3, 1)
        embedding = graph.network.embed(graph.normalize(pixels))
        return embedding.float().cpu().numpy()

    return run_torch


def _build_onnx_embed(graph: InferenceGraph, data: ImageData) -> Embed | None:
    """Return a function that runs the exported graph, or None where it can't be exported."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "embedding.onnx"
        try:
            export_onnx(graph, data.input, len(data.classes), path)
            run = load_runner(GraphFile.read(path))
        except (BundleError, RuntimeError, torch.onnx.errors.OnnxExporterError):
            return None

    def run_onnx(images: Tensor) -> np.ndarray:
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        return run(pixels)["embedding"]

    return run_onnx
