"""The service without its metrics, limits, request ids and checks, so that others can measure what these cost.

    python serve_unchecked.py FLAGS…    takes the flags of `python -m serve`

What it leaves out stands below; the worker process imports this file as well. The limits of serve/connection.py (heads,
connections, slow clients) stay on: the protocol itself hangs on them.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from serve.__main__ import main
from serve.feedback import Feedback
from serve.front import Front
from serve.metrics import WorkerMetrics
from serve.predict import Place, Predictor
from serve.responses import Request
from serve.state import State


def nothing(*_: object) -> None:
    """Instead of a check or a count."""


Front.authorize = Front.finish = Front.count = nothing
Front.request = lambda self, scope, receive: Request(scope, receive, dict(scope["headers"]), "0")
Predictor.enter = lambda self, headers: Place()
Predictor.hold = Predictor.leave = Predictor.check_room = nothing
Feedback.remember = WorkerMetrics.batch = WorkerMetrics.outcome = State.end = nothing
State.begin = lambda self, worker, predictor: 0.0  # the time, which no deadline is before

if __name__ == "__main__":
    sys.exit(main(["--drift-window", "0", "--reload-seconds", "0", *sys.argv[1:]]))
