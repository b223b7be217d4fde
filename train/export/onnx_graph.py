"""The network as the service runs it, and its ONNX file: pixels in, everything that depends on weights inside."""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.bundle.checksums import BundleError
from models.bundle.onnx_screening import check_graph
from models.image import InputSpec
from models.networks.base import Network

OPSET = 20  # the first with GroupNormalization that can be told its type, Gelu and opset-wide float8: engines know it


class InferenceGraph(nn.Module):
    """uint8 [N,H,W,C] to what a bundle's graph gives: normalise, network, temperature, softmax.

    `energy` is -logsumexp of the uncalibrated logits (Liu et al., "Energy-based out-of-distribution detection", 2020).
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        network: Network,
        mean: Sequence[float],
        std: Sequence[float],
        temperature: float = 1.0,
    ):
        """`mean`, `std`: of each channel, in 0..255."""
        super().__init__()
        self.network, self.temperature = network, temperature
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("scale", 1 / torch.tensor(std).view(1, -1, 1, 1))

    def names(self) -> list[str]:
        return ["probabilities", "energy", "embedding", *(["cam"] if self.network.spatial else [])]

    def logits(self, image: Tensor) -> Tensor:
        return self.network(self.normalise(image))

    def normalise(self, image: Tensor) -> Tensor:
        return (image.permute(0, 3, 1, 2).float() - self.mean) * self.scale

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.network.outputs(self.normalise(image))
        logits = found["logits"]
        found["probabilities"] = torch.softmax(logits / self.temperature, 1)
        found["energy"] = -torch.logsumexp(logits, 1)
        return tuple(found[name] for name in self.names())


def export_onnx(
    served: InferenceGraph, spec: InputSpec, classes: int, path: Path, opset: int = OPSET
) -> int:
    """Write the graph as one ONNX file with a dynamic batch; returns the opset read back from it.

    Raises BundleError where what was written is not what a bundle's reader accepts, or of another opset.
    """
    served = copy.deepcopy(served).cpu().eval()
    example = torch.zeros(
        2, spec.height, spec.width, spec.channels, dtype=torch.uint8
    )  # 1 would be baked in
    with _quiet():
        program = torch.onnx.export(
            served,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=served.names(),
            dynamic_shapes={"image": {0: torch.export.Dim("N", min=1)}},
            external_data=False,
            verbose=False,
        )
        assert program is not None  # with dynamo there always is one
        program.save(path, external_data=False)
    graph = check_graph(path, spec, classes, served.names())
    if graph.opset != opset:
        raise BundleError(f"{path}: asked for opset {opset}, got {graph.opset}")
    return graph.opset


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns about its own affairs."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
