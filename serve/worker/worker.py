"""The worker process: it holds the model, and has one predictor thread for each core.

LitServe runs in it, through `serve.processes.litserve_adapter`, and the supervisor replaces it when
it fails. Jobs arrive on a Unix socket in the format of `serve.wire`.
"""

import os
import signal
import sys
import time
from types import FrameType

from models.allocator import return_large_blocks
from models.store import LATEST
from serve import logs
from serve.active_jobs import ActiveJobs
from serve.bundle_source import BundleSource
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model
from serve.settings import Settings
from serve.shared_state import SharedState
from serve.wire import MODEL_INFO, Answer, Job, pack_answer
from serve.worker.batcher import Batcher
from serve.worker.decoding_memory import DecodingMemory
from serve.worker.drift_window import DriftWindow
from serve.worker.exit_status import HANGING, MODEL_UNUSABLE
from serve.worker.keeper import Keeper
from serve.worker.predictor import Observer, Predictor, PredictorContext
from serve.worker.reload import Reloader
from serve.worker.served_version import load_first_model
from serve.worker.shadow import ShadowSender
from serve.worker.worker_metrics import WorkerMetrics, set_served_model

HEARTBEAT_SECONDS = 0.5
# A run that takes this many times its duration at the start is a hang.
HANG_FACTOR = 5


class Worker:
    """The program of a worker process. The supervisor pickles it into the process it starts."""

    def __init__(self, settings: Settings, run_directory: str, threads: int):
        self.settings = settings
        self.run_directory = run_directory
        self.threads = threads
        self.keeper: Keeper | None = None

    def setup(self) -> None:
        """Load the model. Exit with status MODEL_UNUSABLE and one line on stderr if it fails."""
        return_large_blocks()
        self.parent_pid = os.getppid()
        self.state = SharedState(self.run_directory)
        self._handle_signals()
        logs.configure(self.settings)
        try:
            self.source = BundleSource(self.settings)
            self.model = load_first_model(
                self.settings, self.source, self.run_directory, self.threads
            )
        except (ValueError, OSError) as error:  # BundleError is a ValueError
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(MODEL_UNUSABLE)

    def run(self, number: int) -> None:
        """Serve as the worker with this number, until the supervisor ends the process."""
        self.number = number
        self.metrics_prefix = os.path.join(self.run_directory, f"worker-{number}")
        self.active_jobs = ActiveJobs(
            self.run_directory, number, self.threads, self.settings.max_batch_size
        )
        self.batcher = Batcher(
            os.path.join(self.run_directory, f"worker-{number}.sock"),
            self._active_predictors(),
            self.settings.max_batch_size,
            self.settings.batch_wait_ms / 1000,
            self._pack_model_info,
            self._handle_notice,
        )
        self.model_counters = SharedCounters(f"{self.metrics_prefix}-model.metrics")
        set_served_model(self.model_counters, self.model)
        self.reload_counters = SharedCounters(f"{self.metrics_prefix}-reload.metrics")
        self.reload_counters.set("store_reachable", to=int(self.source.is_reachable))
        self.run_seconds = self.model.run_seconds

        self.drift_window = self._create_drift_window()
        if self.settings.keep:
            self.keeper = self._create_keeper()
            self.keeper.start()
        self.predictors = self._start_predictors()
        if self.settings.version == LATEST and self.settings.reload_seconds:
            self._start_reloader()
        self._send_heartbeats()

    def replace_model(self, model: Model) -> None:
        """Serve another model from the next batch on, and announce it to all HTTP processes."""
        # Batches of both models may run at this moment, so the slower one sets the time to wait.
        self.run_seconds = max(self.model.run_seconds, model.run_seconds)

        self.model = model
        self.batcher.set_active_predictors(self._active_predictors())
        self.batcher.broadcast(self._pack_model_info())
        set_served_model(self.model_counters, model)
        if self.drift_window is not None:
            self.drift_window.start(model)

    def _current_model(self) -> Model:
        return self.model

    def _handle_signals(self) -> None:
        """Ignore signals until the supervisor stops the service.

        Ctrl+C and systemd send them to the whole process group.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._handle_sigterm)

    def _handle_sigterm(self, number: int, frame: FrameType | None) -> None:
        if self.state.stopping:
            if self.keeper is not None:
                # For as long as the supervisor lets it.
                self.keeper.finish(self.settings.drain_seconds)
            os._exit(0)

    def _active_predictors(self) -> int:
        """Return the number of threads that take batches: one for a light model, else all."""
        return 1 if self.model.is_light else self.threads

    def _pack_model_info(self) -> bytes:
        """Return the frame that announces the model to an HTTP process."""
        return pack_answer(Answer(MODEL_INFO, 200, self.model.version, self.model.description))

    def _create_drift_window(self) -> DriftWindow | None:
        if not self.settings.drift_window:
            return None
        counters = SharedCounters(f"{self.metrics_prefix}-drift.metrics")
        return DriftWindow(counters, self.settings.drift_window, self.model)

    def _create_shadow_sender(self) -> ShadowSender:
        counters = SharedCounters(f"{self.metrics_prefix}-shadow.metrics")
        return ShadowSender(
            self.run_directory, self.number, self.settings.shadow_share, self.batcher, counters
        )

    def _create_keeper(self) -> Keeper:
        counters = SharedCounters(f"{self.metrics_prefix}-keep.metrics")
        return Keeper(self.settings, self.run_directory, self.number, counters)

    def _handle_notice(self, job: Job) -> None:
        if self.keeper is not None:
            self.keeper.on_notice(job)

    def _start_predictors(self) -> list[Predictor]:
        """Start a predictor thread for each core."""
        observers: list[Observer] = []
        if self.drift_window is not None:
            observers.append(self.drift_window)
        if self.settings.shadow_version:
            observers.append(self._create_shadow_sender())
        if self.keeper is not None:
            # Before the others: the shadow version may ask to keep an image that it was sent.
            observers.insert(0, self.keeper)

        context = PredictorContext(
            self.settings,
            self.batcher,
            self.active_jobs,
            DecodingMemory(self.run_directory, self.state, self.number, self.settings.workers),
            self._current_model,
            observers,
            observes_embedding=self.keeper is not None,
        )
        predictors: list[Predictor] = []
        for i in range(self.threads):
            metrics = WorkerMetrics(f"{self.metrics_prefix}-{i}.metrics", self.model)
            predictor = Predictor(i, context, metrics)
            predictor.start()
            predictors.append(predictor)
        return predictors

    def _start_reloader(self) -> None:
        Reloader(
            self.settings,
            self.source,
            self.run_directory,
            self.threads,
            self.reload_counters,
            self._current_model,
            self.replace_model,
        ).start()

    def _send_heartbeats(self) -> None:
        """Show the supervisor that this process is alive.

        Exit when the process that started this one is gone, or when a predictor hangs.
        """
        while os.getppid() == self.parent_pid:
            self.state.set_heartbeat(self.number)
            self._exit_if_a_predictor_hangs()
            time.sleep(HEARTBEAT_SECONDS)
        os._exit(1)

    def _exit_if_a_predictor_hangs(self) -> None:
        """End the process where a predictor hangs.

        HTTP processes read from the records of active jobs which images must not be sent again.
        """
        worker_timeout = self.settings.worker_timeout_seconds
        least_limit = HANG_FACTOR * self.run_seconds
        shares: list[float] = []
        for predictor in self.predictors:
            limit_seconds = max(worker_timeout * predictor.timeout_share, least_limit)
            shares.append(predictor.stalled_seconds() / limit_seconds)
        if max(shares) <= 1:
            return

        for number, share in enumerate(shares):
            # Another predictor may hang as well, only not for as long.
            if share > 1 / 2:
                self.active_jobs.set_hanging(number)
        os._exit(HANGING)
