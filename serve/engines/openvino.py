"""OpenVINO on the CPU, an optional extra: faster than onnxruntime on Intel's and newer AMD processors.

bfloat16 doubles the speed of fp32 where the processor has it. Since it is less exact, `serve.model` keeps it only where
the bundle's own samples come out right.
"""

import threading
from pathlib import Path

import numpy as np

from models.bundle import BundleError


class OpenVino:
    """One compiled model with a stream of one thread a core for predictors, one over all cores for lone batches."""

    def __init__(self, path: Path, threads: int, bf16: bool = False):
        """Raises ValueError where the extra is missing or the processor has no bfloat16, BundleError for a bad file."""
        try:
            import openvino
        except ImportError as error:
            raise ValueError(
                "engine openvino needs the extra of this name: pip install 'imago[openvino]'"
            ) from error
        core = openvino.Core()
        if bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("this processor has no bfloat16")
        self.name = "openvino-bf16" if bf16 else "openvino"
        common = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        }
        try:
            graph = core.read_model(path)
            self.outputs = tuple(output.any_name for output in graph.outputs)
            self.narrow = core.compile_model(graph, "CPU", {**common, "NUM_STREAMS": threads})
            self.wide = (
                core.compile_model(graph, "CPU", {**common, "NUM_STREAMS": 1})
                if threads > 1
                else self.narrow
            )
        except RuntimeError as error:
            raise BundleError(
                f"{path}: OpenVINO can't load it: {str(error).splitlines()[0]}"
            ) from error
        self.requests = threading.local()

    def run(self, images: np.ndarray, wanted: tuple[str, ...], alone: bool) -> list[np.ndarray]:
        kind = "wide" if alone else "narrow"
        request = getattr(self.requests, kind, None)
        if request is None:  # a request belongs to one thread
            request = getattr(self, kind).create_infer_request()
            setattr(self.requests, kind, request)
        request.infer({"image": images})
        return [request.get_tensor(name).data.copy() for name in wanted]
