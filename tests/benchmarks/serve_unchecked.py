"""The service without its metrics, limits, request ids and checks, to measure what these cost.

    python serve_unchecked.py FLAGS…    takes the flags of `python -m serve`

The calls of `replace` below show all that is left out; worker processes inherit them by fork.
The limits of serve/http/protocol.py (heads, connections, slow clients) and the timer of all
deadlines stay on, because the protocol depends on them. A name that the service no longer has
raises AttributeError, so that the benchmark never measures a service that still does the work.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from serve.__main__ import main
from serve.http.app import Service
from serve.http.dispatcher import PendingRequest
from serve.http.feedback import FeedbackEndpoint
from serve.http.predict_endpoint import PredictEndpoint, Reservation
from serve.http.responses import Receive, Request, Scope
from serve.worker.batcher import QueuedJob
from serve.worker.predictor import Predictor
from serve.worker.worker_metrics import WorkerMetrics


def do_nothing(*_: object) -> None:
    """Stand for a check or a count."""


def replace(owner: type, **attributes: object) -> None:
    """Replace attributes of a class. Raises AttributeError for one that it does not have."""
    for name, value in attributes.items():
        getattr(owner, name)
        setattr(owner, name, value)


def finish_uncounted(request: PendingRequest) -> None:
    """Finish a request without counting its images or catching errors."""
    request.detach()
    request.on_done(request)


def build_request(service: Service, scope: Scope, receive: Receive) -> Request:
    """Build a request with the same id as all others."""
    return Request(scope, receive, dict(scope["headers"]), "0")


def admit_all(endpoint: PredictEndpoint, headers: dict[bytes, bytes]) -> Reservation:
    """Admit every request."""
    return Reservation()


def start_unrecorded_job(predictor: Predictor, queued: QueuedJob) -> float:
    """Return a time that no deadline is before."""
    return 0.0


replace(
    Service,
    check_access=do_nothing,
    record=do_nothing,
    count_request=do_nothing,
    build_request=build_request,
)
replace(
    PredictEndpoint,
    admit=admit_all,
    reserve=do_nothing,
    release=do_nothing,
    check_capacity=do_nothing,
)
replace(FeedbackEndpoint, remember=do_nothing)
replace(PendingRequest, finish=finish_uncounted)
replace(WorkerMetrics, count_batch=do_nothing)
replace(
    Predictor,
    _set_idle=do_nothing,
    _start_job=start_unrecorded_job,
    _start_run=do_nothing,
    _restart_clock=do_nothing,
)

if __name__ == "__main__":
    sys.exit(main(["--drift-window", "0", "--reload-seconds", "0", *sys.argv[1:]]))
