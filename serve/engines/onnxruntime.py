"""onnxruntime on the CPU, the default engine."""

from functools import partial
from typing import Any

import numpy as np
import onnxruntime

from models.bundle import BundleError, GraphFile
from serve.engines.base import measure_seconds

# Threads of a session over all threads spin for this time while they wait for the next node of the
# graph. Without spinning, a batch that runs alone takes a fifth longer; spinning longer gains
# nothing.
SPIN_MICROSECONDS = 100
SPEED_TEST_REPEATS = 3
LOG_LEVEL_FATAL = 4  # onnxruntime also raises its errors as exceptions


class OnnxRuntimeEngine:
    """Runs a graph on the CPU in two sessions.

    All predictors share a session of a single thread. Lone batches run in a session over all
    threads. A session of a single thread runs in the thread that calls it, so predictors share it
    and its weights.
    """

    name = "onnxruntime"
    is_bfloat16 = False

    def __init__(self, graph: GraphFile, threads: int):
        self.graph: GraphFile | None = graph  # until both sessions exist
        self.threads = threads
        self.single_thread_session = create_session(graph, 1, ["CPUExecutionProvider"])
        self.all_threads_session: onnxruntime.InferenceSession | None = None
        if threads == 1:
            self.all_threads_session = self.single_thread_session
            self.graph = None
        self.outputs = tuple(output.name for output in self.single_thread_session.get_outputs())

    def run(
        self, images: np.ndarray, output_names: tuple[str, ...], use_all_threads: bool
    ) -> list[np.ndarray]:
        """Run the graph; see `Engine.run`."""
        if not use_all_threads:
            return self.single_thread_session.run(output_names, {"image": images})

        if self.all_threads_session is None:  # at the first lone batch, which is the self check
            assert self.graph is not None
            self.all_threads_session = self._create_all_threads_session(self.graph)
            self.graph = None
        return self.all_threads_session.run(output_names, {"image": images})

    def _create_all_threads_session(self, graph: GraphFile) -> onnxruntime.InferenceSession:
        """Return a session over all threads if it is faster, else that of a single thread."""
        session = create_session(
            graph, self.threads, ["CPUExecutionProvider"], spin_microseconds=SPIN_MICROSECONDS
        )
        if _measure_session(session) < _measure_session(self.single_thread_session):
            return session
        return self.single_thread_session


def create_session(
    graph: GraphFile, threads: int, providers: list[Any], spin_microseconds: int = 0
) -> onnxruntime.InferenceSession:
    """Load a graph. Raises BundleError if onnxruntime can't."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_LEVEL_FATAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_microseconds))
    # Never its own format, which it would otherwise recognize by the contents.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = onnxruntime.InferenceSession(graph.content, options, providers=providers)
    except Exception as error:  # the exceptions of onnxruntime have no other base class
        reason = str(error).splitlines()[0]
        raise BundleError(f"{graph.path}: onnxruntime can't load it: {reason}") from error
    # onnxruntime (seen in 1.31) keeps the bytes for as long as the session, in case it creates it
    # once more with other providers. They would take as much memory as the weights.
    session._model_bytes = b""
    return session


def _measure_session(session: onnxruntime.InferenceSession) -> float:
    """Return the least seconds of a run on one image."""
    image = np.zeros((1, *session.get_inputs()[0].shape[1:]), np.uint8)
    return measure_seconds(partial(session.run, None, {"image": image}), SPEED_TEST_REPEATS)
