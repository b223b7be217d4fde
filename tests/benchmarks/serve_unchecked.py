"""The service without its metrics, limits, request ids and checks, so that others can measure what these cost.

    python serve_unchecked.py FLAGS…    takes the flags of `python -m serve`

What it leaves out stands below; the worker process imports this file as well. The limits of
serve/http/protocol.py (heads, connections, slow clients) and the one timer of all deadlines stay
on: the protocol itself hangs on them. A name that the service has no more raises AttributeError, so
that nothing is measured against a service that still does it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from serve.__main__ import main
from serve.http.app import Front
from serve.http.dispatcher import Ask
from serve.http.feedback import FeedbackEndpoint
from serve.http.predict_endpoint import Place, Predictor
from serve.http.responses import Request
from serve.shared_state import SharedState
from serve.worker.worker_metrics import WorkerMetrics


def nothing(*_: object) -> None:
    """Instead of a check or a count."""


def replace(owner: type, **others: object) -> None:
    for name, other in others.items():
        getattr(owner, name)
        setattr(owner, name, other)


def finish(ask: Ask) -> None:
    """Without a count of its images, and with no care for what fails."""
    ask.again = None
    ask.pool.asks.pop(ask, None)
    ask.done(ask)


replace(
    Front,
    authorize=nothing,
    finish=nothing,
    count=nothing,
    request=lambda self, scope, receive: Request(scope, receive, dict(scope["headers"]), "0"),
)
replace(
    Predictor, enter=lambda self, headers: Place(), hold=nothing, leave=nothing, check_room=nothing
)
replace(FeedbackEndpoint, remember=nothing)
replace(WorkerMetrics, count_batch=nothing)
replace(Ask, finish=finish)
replace(
    SharedState, set_idle=nothing, set_busy=lambda self, worker, predictor: 0.0
)  # the time, which no deadline is before

if __name__ == "__main__":
    sys.exit(main(["--drift-window", "0", "--reload-seconds", "0", *sys.argv[1:]]))
