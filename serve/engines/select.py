"""The engines that each value of the setting `engine` stands for."""

from functools import partial

from serve.engines.base import EngineFactory
from serve.engines.cuda import CudaEngine, has_cuda_provider
from serve.engines.onnxruntime import OnnxRuntimeEngine
from serve.engines.openvino import OpenVinoEngine


def engine_factories(setting: str, precision: str) -> list[EngineFactory]:
    """Return the engines to try, the fastest first. Each is the fallback of the one before it.

    `precision` is that of the variant to run: bfloat16 replaces only fp32.
    """
    if setting == "openvino":
        if precision == "fp32":
            return [partial(OpenVinoEngine, bfloat16=True), OpenVinoEngine]
        return [OpenVinoEngine]
    if setting == "cuda":
        return [CudaEngine]
    if setting == "auto" and has_cuda_provider():
        return [CudaEngine, OnnxRuntimeEngine]
    return [OnnxRuntimeEngine]
