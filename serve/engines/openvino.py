"""OpenVINO on the CPU, an optional extra.

It is faster than onnxruntime on Intel's and newer AMD processors. bfloat16 doubles the speed of
fp32 if the processor supports it, but is less exact. `serve.model` uses it only if the bundle's
samples keep their labels.
"""

import threading
from typing import Any

import numpy as np

from models.bundle import BundleError, GraphFile


class OpenVinoEngine:
    """Runs a graph on the CPU in two compiled models.

    All predictors share a model with a stream of one thread for each core. Lone batches run in a
    model with a single stream over all cores.
    """

    def __init__(self, graph: GraphFile, threads: int, bfloat16: bool = False):
        """Load the graph.

        Raises BundleError for a bad graph, ValueError if the extra or bfloat16 is missing.
        """
        try:
            import openvino
        except ImportError as error:
            raise ValueError(
                "engine openvino: the extra is not installed; run pip install 'imago[openvino]'"
            ) from error
        core = openvino.Core()
        if bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError("engine openvino: this processor has no bfloat16")

        self.name = "openvino-bf16" if bfloat16 else "openvino"
        self.is_bfloat16 = bfloat16
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        }
        try:
            model = core.read_model(graph.content)
            self.outputs = tuple(output.any_name for output in model.outputs)
            self.single_thread_model = core.compile_model(
                model, "CPU", {**config, "NUM_STREAMS": threads}
            )
            self.all_threads_model = self.single_thread_model
            if threads > 1:
                self.all_threads_model = core.compile_model(
                    model, "CPU", {**config, "NUM_STREAMS": 1}
                )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise BundleError(f"{graph.path}: OpenVINO can't load it: {reason}") from error

        # An inference request belongs to one thread.
        self.single_thread_requests = threading.local()
        self.all_threads_requests = threading.local()

    def run(
        self, images: np.ndarray, output_names: tuple[str, ...], use_all_threads: bool
    ) -> list[np.ndarray]:
        """Run the graph; see `Engine.run`."""
        if use_all_threads:
            request = _get_request(self.all_threads_model, self.all_threads_requests)
        else:
            request = _get_request(self.single_thread_model, self.single_thread_requests)
        request.infer({"image": images})
        return [request.get_tensor(name).data.copy() for name in output_names]


def _get_request(compiled_model: Any, requests: threading.local) -> Any:
    """Return the calling thread's inference request for this model."""
    request = getattr(requests, "request", None)
    if request is None:
        request = compiled_model.create_infer_request()
        requests.request = request
    return request
