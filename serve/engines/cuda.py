"""onnxruntime on an NVIDIA GPU."""

import ctypes

import numpy as np
import onnxruntime

from models.bundle import GraphFile
from serve.engines.onnxruntime import create_session

PROVIDER = "CUDAExecutionProvider"
PROVIDER_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}


def has_cuda_provider() -> bool:
    """Whether the installed onnxruntime was built with CUDA."""
    return PROVIDER in onnxruntime.get_available_providers()


class CudaEngine:
    """One session on the GPU; onnxruntime runs the nodes that the GPU can't run on the CPU."""

    name = "cuda"
    is_bfloat16 = False

    def __init__(self, graph: GraphFile, threads: int):
        """Load the graph. Raises ValueError if no GPU is usable, BundleError for a bad graph."""
        if not has_cuda_provider():
            raise ValueError(
                "engine cuda: this onnxruntime has no CUDA; "
                "install onnxruntime-gpu or choose another engine"
            )
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise ValueError(
                "engine cuda: this machine has no NVIDIA driver (libcuda.so.1); "
                "choose another engine"
            ) from None

        # The wheels of CUDA and cuDNN put their libraries where the linker does not search.
        onnxruntime.preload_dlls()
        providers = [(PROVIDER, PROVIDER_OPTIONS), "CPUExecutionProvider"]
        self.session = create_session(graph, threads, providers)
        if PROVIDER not in self.session.get_providers():
            raise ValueError("engine cuda: this machine has no usable GPU; choose another engine")
        self.outputs = tuple(output.name for output in self.session.get_outputs())

    def run(
        self, images: np.ndarray, output_names: tuple[str, ...], use_all_threads: bool
    ) -> list[np.ndarray]:
        """Run the graph; see `Engine.run`."""
        return self.session.run(output_names, {"image": images})
