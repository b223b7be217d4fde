"""onnxruntime on the CPU, the default engine."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import onnxruntime

from models.bundle import BundleError, GraphFile

# Threads of a session over all threads spin for this time while they wait for the next node of the
# graph. Without spinning, a batch that runs alone takes a fifth longer; spinning longer gains
# nothing.
SPIN_MICROSECONDS = 100
# Of each TRIAL_PERIOD lone images, the first ones take turns between the sessions.
TRIAL_RUNS = 8
TRIAL_PERIOD = 500
LOG_LEVEL_FATAL = 4  # onnxruntime also raises its errors as exceptions


class Session(Protocol):
    """What `SessionChooser` uses of an onnxruntime.InferenceSession."""

    def run(
        self, output_names: tuple[str, ...], input_feed: dict[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Run the graph."""


class SessionChooser:
    """Runs a graph in the fastest of several sessions, which runs of a single image tell.

    The first such runs of each period take turns, and the session with the least duration gets the
    others. It is tried again in each period, since a measurement at the start is disturbed by the
    other processes that start. Threads may share it: a duration that is lost does no harm.
    """

    def __init__(
        self, sessions: list[Session], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """The first session counts as the fastest until all have been tried."""
        self.sessions = sessions
        self.clock = clock
        self.fastest = sessions[0]
        self.start_period()

    def start_period(self) -> None:
        """Try the sessions in the next runs."""
        self.runs = 0  # of a single image
        self.least_seconds = [math.inf] * len(self.sessions)

    def run(self, images: np.ndarray, output_names: tuple[str, ...]) -> list[np.ndarray]:
        """Run the graph on uint8 [N, H, W, C]."""
        if len(images) > 1:
            return self.fastest.run(output_names, {"image": images})

        if self.runs >= TRIAL_PERIOD:
            self.start_period()
        number = self.runs
        self.runs += 1
        if number >= TRIAL_RUNS:
            return self.fastest.run(output_names, {"image": images})

        turn = number % len(self.sessions)
        start = self.clock()
        outputs = self.sessions[turn].run(output_names, {"image": images})
        self.least_seconds[turn] = min(self.least_seconds[turn], self.clock() - start)
        if number == TRIAL_RUNS - 1:
            position = self.least_seconds.index(min(self.least_seconds))
            self.fastest = self.sessions[position]
        return outputs


class OnnxRuntimeEngine:
    """Runs a graph on the CPU in two sessions.

    All predictors share a session of a single thread. Lone batches run in a session over all
    threads, if that is faster. A session of a single thread runs in the thread that calls it, so
    predictors share it and its weights.
    """

    name = "onnxruntime"
    is_bfloat16 = False

    def __init__(self, graph: GraphFile, threads: int):
        self.graph: GraphFile | None = graph  # until both sessions exist
        self.threads = threads
        self.single_thread_session = create_session(graph, 1, ["CPUExecutionProvider"])
        self.lone_sessions: SessionChooser | None = None
        if threads == 1:
            self.lone_sessions = SessionChooser([self.single_thread_session])
            self.graph = None
        self.outputs = tuple(output.name for output in self.single_thread_session.get_outputs())

    def run(
        self, images: np.ndarray, output_names: tuple[str, ...], use_all_threads: bool
    ) -> list[np.ndarray]:
        """Run the graph; see `Engine.run`."""
        if not use_all_threads:
            return self.single_thread_session.run(output_names, {"image": images})

        if self.lone_sessions is None:  # at the first lone batch, which is the self check
            self.lone_sessions = self._create_lone_sessions()
        return self.lone_sessions.run(images, output_names)

    def _create_lone_sessions(self) -> SessionChooser:
        """Return the session over all threads and that of one, tried once before any request."""
        assert self.graph is not None
        session = create_session(
            self.graph, self.threads, ["CPUExecutionProvider"], spin_microseconds=SPIN_MICROSECONDS
        )
        self.graph = None
        chooser = SessionChooser([session, self.single_thread_session])
        image = np.zeros((1, *session.get_inputs()[0].shape[1:]), np.uint8)
        for _ in range(TRIAL_RUNS):
            chooser.run(image, self.outputs)
        chooser.start_period()  # once more with the first requests
        return chooser


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
