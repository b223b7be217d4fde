"""Engines: what runs a bundle's graph. All have the same face, so that a model does not know which one it has.

An engine is shared by all predictor threads of a worker. `run` says whether the batch is alone: a lone batch may use
every core (latency), while under load each predictor runs its own batch on its own core, and no core waits for another
(throughput).
"""

import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort

from models.bundle import BundleError
from serve.engines.openvino import OpenVino

SPIN_US = 100  # a thread awaits the next node of a lone run awake: sleeping costs a fifth of it, longer gains nothing


class Engine(Protocol):
    name: str
    outputs: tuple[str, ...]  # what the graph can give

    def run(self, images: np.ndarray, wanted: tuple[str, ...], alone: bool) -> list[np.ndarray]:
        """uint8 [N,H,W,C] to the wanted outputs, in their order."""


class OnnxRuntime:
    """onnxruntime on the CPU: one session of one thread for all predictors, one over all threads for lone batches.

    A session of one thread runs in the thread that calls it, so predictors share it and its weights. The other is made
    by the first lone batch, which is the model's own check; a network so small that threads cost it more than they gain
    has none.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int):
        self.path, self.threads = path, threads
        self.narrow = _session(path, 1, ["CPUExecutionProvider"])
        self.wide = self.narrow if threads == 1 else None
        self.outputs = tuple(output.name for output in self.narrow.get_outputs())

    def run(self, images: np.ndarray, wanted: tuple[str, ...], alone: bool) -> list[np.ndarray]:
        if not alone:
            return self.narrow.run(wanted, {"image": images})
        if self.wide is None:
            wide = _session(self.path, self.threads, ["CPUExecutionProvider"], SPIN_US)
            self.wide = wide if _seconds(wide) < _seconds(self.narrow) else self.narrow
        return self.wide.run(wanted, {"image": images})


def _seconds(session: ort.InferenceSession, runs: int = 3) -> float:
    """Least time of a run on one image; the first, which allocates, is left out."""
    image = np.zeros((1, *session.get_inputs()[0].shape[1:]), np.uint8)
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        session.run(None, {"image": image})
        times.append(time.perf_counter() - start)
    return min(times[1:])


class Cuda:
    """onnxruntime on an NVIDIA GPU; what the GPU can't run falls back to the CPU, node by node."""

    name = "cuda"

    def __init__(self, path: Path, threads: int):
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise ValueError(
                "engine cuda: this onnxruntime has no CUDA; install onnxruntime-gpu, or take another"
            )
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise ValueError(
                "engine cuda: there is no NVIDIA driver (libcuda.so.1) here; take another"
            ) from None
        ort.preload_dlls()  # CUDA and cuDNN lie in packages of their own, where the linker does not look
        options = {
            "cudnn_conv_algo_search": "HEURISTIC",
            "arena_extend_strategy": "kSameAsRequested",
        }
        self.session = _session(
            path, threads, [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
        )
        if "CUDAExecutionProvider" not in self.session.get_providers():
            raise ValueError("engine cuda: no usable GPU was found; take another engine")
        self.outputs = tuple(output.name for output in self.session.get_outputs())

    def run(self, images: np.ndarray, wanted: tuple[str, ...], alone: bool) -> list[np.ndarray]:
        return self.session.run(wanted, {"image": images})


def _session(path: Path, threads: int, providers: list, spin_us: int = 0) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it would print is raised as well
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
    try:
        return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions share no base class but this
        raise BundleError(
            f"{path}: onnxruntime can't load it: {str(error).splitlines()[0]}"
        ) from error


def makers(name: str, precision: str) -> list[Callable[[Path, int], Engine]]:
    """How to make the engine of a setting's name, the fastest way first; a later one is for where that fails."""
    if name == "auto":
        return (
            [Cuda, OnnxRuntime]
            if "CUDAExecutionProvider" in ort.get_available_providers()
            else [OnnxRuntime]
        )
    if name == "openvino":
        return [partial(OpenVino, bf16=True), OpenVino] if precision == "fp32" else [OpenVino]
    return [Cuda if name == "cuda" else OnnxRuntime]
