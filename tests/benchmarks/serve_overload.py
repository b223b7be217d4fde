"""Measure goodput at ten times the capacity, and what a refusal costs.

    python tests/benchmarks/serve_overload.py
        [--case small|large] [--variant fp32] [--seconds 5] [--rounds 3]

The capacity is what 32 clients in a closed loop get (wrk; ResNet-18 at 32 or 224 pixels). Then hey
offers a little more than ten times that rate, from eight times as many connections as MAX_PENDING.
`offered` is the load that arrived, as a multiple of the capacity: on few cores the client of the
small case cannot send ten times the capacity, that of the large one can. Responses are counted by
the server's metrics over `--seconds` in the middle of a load, because at its start nothing is
answered yet, and requests in flight at its end are lost.

Both clients share the cores with the server, so figures are divided by the share that a client
left: `goodput = (200s a second / share left) / (capacity / share left)`; `goodput_raw` is without
it. The capacity is taken before and after each flood, which is compared with the mean of the two;
figures are medians of the rounds. `refusal_cpu_us` is the CPU of the HTTP process per request of
the flood; `refusal_ms` the latency of refusals (p50, p99) while the worker is suspended and
MAX_PENDING images wait. Prints one JSON line; --keep also writes it into serve_overload.json in
this folder.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from results import spread, write_result
from serve_models import make_jpeg, publish
from serving import (
    CORES,
    RunningServer,
    find_http_process,
    find_worker,
    measure_load,
    process_cpu_seconds,
    run_wrk,
    running_service,
    write_wrk_script,
    wrk_command,
)

from support.load_generator import LoadGenerator

MAX_PENDING = 64
FLOOD_CONNECTIONS = 8 * MAX_PENDING
FLOOD_FACTOR = 14
"""Of the capacity; connections that wait for a response offer nothing meanwhile."""
EDGE_SECONDS = 3
"""At the start and the end of a load that are not measured."""


@dataclass(frozen=True)
class Counts:
    """The counters that are read at the start and the end of a measurement."""

    answered: float
    refused: float
    client_cpu: float
    http_cpu: float
    time: float


@dataclass(frozen=True)
class SteadyLoad:
    """Rates in the middle of a load."""

    answered: float
    """Requests per second with status 200."""
    offered: float
    """Requests per second with status 200 or 429."""
    client_share: float
    """The client's share of all cores, 0 to 1."""
    http_cpu: float
    """CPU seconds of the HTTP process per second."""

    @property
    def corrected(self) -> float:
        """Answered requests per second, for all cores."""
        return self.answered / (1 - self.client_share)


def read_metric(port: int, series: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(series))


def read_counts(server: RunningServer, client: int, http_process: int) -> Counts:
    return Counts(
        answered=read_metric(server.metrics_port, 'imago_requests_total{code="200"}'),
        refused=read_metric(server.metrics_port, 'imago_requests_total{code="429"}'),
        client_cpu=process_cpu_seconds(client),
        http_cpu=process_cpu_seconds(http_process),
        time=time.perf_counter(),
    )


def measure_steady_load(client: list[str], server: RunningServer, seconds: int) -> SteadyLoad:
    """Run a client's command and measure in the middle of its load."""
    http_process = find_http_process(server.pid)
    process = subprocess.Popen(client, stdout=subprocess.DEVNULL)
    try:
        time.sleep(EDGE_SECONDS)
        before = read_counts(server, process.pid, http_process)
        time.sleep(seconds)
        after = read_counts(server, process.pid, http_process)
    finally:
        process.kill()
        process.wait()

    wall = after.time - before.time
    answered = after.answered - before.answered
    refused = after.refused - before.refused
    return SteadyLoad(
        answered=answered / wall,
        offered=(answered + refused) / wall,
        client_share=(after.client_cpu - before.client_cpu) / wall / CORES,
        http_cpu=(after.http_cpu - before.http_cpu) / wall,
    )


def hey_command(port: int, body: Path, seconds: int, rate: float) -> list[str]:
    """A client that sends `rate` requests per second, whether or not earlier ones are answered."""
    return [
        "hey",
        *("-z", f"{seconds}s"),
        *("-c", str(FLOOD_CONNECTIONS)),
        *("-q", f"{rate / FLOOD_CONNECTIONS:.3f}"),
        *("-m", "POST"),
        *("-T", "image/jpeg"),
        *("-D", str(body)),
        f"http://127.0.0.1:{port}/predict",
    ]


@contextmanager
def suspended_worker(server: RunningServer) -> Iterator[None]:
    worker = find_worker(server.pid)
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def measure_refusals(server: RunningServer, image: bytes, script: Path) -> dict[str, float]:
    """p50 and p99 in milliseconds of one client's refusals, while MAX_PENDING images wait."""
    with LoadGenerator(server.port, image, MAX_PENDING), suspended_worker(server):
        while read_metric(server.metrics_port, "imago_pending_images") < MAX_PENDING:
            time.sleep(0.05)
        result = run_wrk(server, script, 2, clients=1)
    assert result.has_errors, "no request was refused"
    return {"50": result.p50, "99": result.p99}


def measure(store: Path, case: str, variant: str, seconds: int, rounds: int) -> dict:
    publish(store, case)
    image = make_jpeg(32, 32)
    script = write_wrk_script(store, image)
    body = store / "flood.body"
    body.write_bytes(image)
    load_seconds = seconds + 2 * EDGE_SECONDS

    measured: list[dict[str, float]] = []
    flags = ("--variant", variant, "--max-pending", str(MAX_PENDING))
    with running_service(store, case, *flags) as server:
        closed_loop = wrk_command(server.port, script, load_seconds)
        measure_load(server, script, 2)
        before = measure_steady_load(closed_loop, server, seconds)
        for _ in range(rounds):
            rate = FLOOD_FACTOR * before.answered
            flood = measure_steady_load(
                hey_command(server.port, body, load_seconds, rate), server, seconds
            )
            after = measure_steady_load(closed_loop, server, seconds)
            measured.append(compare(flood, before, after))
            before = after
        refusals = measure_refusals(server, image, script)

    line: dict[str, object] = {"case": case, "variant": variant, "rounds": rounds}
    for figure in measured[0]:
        values = [each[figure] for each in measured]
        line[figure] = round(statistics.median(values), 3)
    goodputs = [each["goodput"] for each in measured]
    return line | {"refusal_ms": refusals, "spread": {"goodput": spread(goodputs)}}


def compare(flood: SteadyLoad, before: SteadyLoad, after: SteadyLoad) -> dict[str, float]:
    """Compare a flood with the capacity before and after it."""
    capacity = (before.answered + after.answered) / 2
    corrected_capacity = (before.corrected + after.corrected) / 2
    return {
        "capacity": capacity,
        "offered": flood.offered / capacity,
        "goodput": flood.corrected / corrected_capacity,
        "goodput_raw": flood.answered / capacity,
        "client_share": flood.client_share,
        "refusal_cpu_us": 1e6 * flood.http_cpu / flood.offered,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("small", "large"), default="small")
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", default="fp32")
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    parser.add_argument("--store", type=Path, help="keeps the bundles for the next run")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        store = options.store or Path(directory)
        line = measure(store, options.case, options.variant, options.seconds, options.rounds)
        print(json.dumps(line))
        if options.keep:
            write_result(__file__, line, ("case", "variant"))


if __name__ == "__main__":
    main()
