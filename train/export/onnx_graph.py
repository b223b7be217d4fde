"""The network as it is served, and its export to ONNX.

Its input is pixels. It contains everything that depends on the weights: normalization, network,
temperature, softmax.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.bundle import BundleError
from models.bundle.onnx_screening import check_graph
from models.image import InputSpec
from models.networks.base import Network

# The first opset with Gelu and with a GroupNormalization that takes a type; engines support it.
OPSET = 20


class InferenceGraph(nn.Module):
    """Maps images uint8 [N,H,W,C] to the outputs of a bundle's graph.

    Outputs: `probabilities` [N,K], with the temperature applied; `energy` [N], -logsumexp of the
    logits without temperature (Liu et al., "Energy-based out-of-distribution detection", 2020);
    `embedding` [N,D]; and `cam` [N,K,h,w], class activation maps, where the network has them.
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
        """`mean` and `std`: of each channel, in 0..255."""
        super().__init__()
        self.network = network
        self.temperature = temperature
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("scale", 1 / torch.tensor(std).view(1, -1, 1, 1))

    def output_names(self) -> list[str]:
        """Return the names of the outputs, in the order of `forward`."""
        names = ["probabilities", "energy", "embedding"]
        if self.network.spatial:
            names.append("cam")
        return names

    def normalize(self, image: Tensor) -> Tensor:
        """Return float32 [N,C,H,W]."""
        return (image.permute(0, 3, 1, 2).float() - self.mean) * self.scale

    def logits(self, image: Tensor) -> Tensor:
        """Return logits [N,K] without temperature."""
        return self.network(self.normalize(image))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in the order of `output_names`."""
        outputs = self.network.outputs(self.normalize(image))
        logits = outputs["logits"]
        outputs["probabilities"] = torch.softmax(logits / self.temperature, 1)
        outputs["energy"] = -torch.logsumexp(logits, 1)
        return tuple(outputs[name] for name in self.output_names())


def export_onnx(
    graph: InferenceGraph, spec: InputSpec, classes: int, path: Path, opset: int = OPSET
) -> int:
    """Write the graph as one ONNX file with a dynamic batch; return the opset read back from it.

    Raises BundleError where a reader of bundles would not accept the file, or where it has another
    opset.
    """
    graph = copy.deepcopy(graph).cpu().eval()
    # A batch of 2, as the exporter would take a batch of 1 for a constant.
    example = torch.zeros(2, spec.height, spec.width, spec.channels, dtype=torch.uint8)

    with _silence_exporter():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=graph.output_names(),
            dynamic_shapes={"image": {0: torch.export.Dim("N", min=1)}},
            external_data=False,
            verbose=False,
        )
        assert program is not None  # it is None only with dynamo=False
        program.save(path, external_data=False)

    written = check_graph(path, path.read_bytes(), spec, classes, graph.output_names())
    if written.opset != opset:
        raise BundleError(f"{path}: has opset {written.opset} instead of {opset}")
    return written.opset


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Hide what the exporter logs and warns about its own implementation."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
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
