"""Measure what the service costs: CPU per request, idle, memory, start, latency of one client.

    python tests/benchmarks/serve_cost.py [--seconds 4]

- api_us: CPU of the HTTP process per request, with a network so small that it has most to do
  (32 clients).
- checks_cpu, checks_rate, checks_p99: CPU per request, requests per second and p99 of ResNet-18
  int8 at 32 pixels, divided by those of a service without metrics, drift, limits, request ids and
  checks (serve_unchecked.py); the two alternate.
- idle_cores: CPU of all processes over five idle seconds, in cores.
- one_client: requests per second of one client on ResNet-18 at 32 pixels, divided by those of one
  bare decode and run at a time with onnxruntime's default options; the rounds alternate.
- ready_s: seconds from the command to the first 200 of /health/ready, with the files in the page
  cache; the least of three starts.
- memory_mb: proportional set size of all processes after load, with ResNet-18.

Prints JSON lines; --keep also writes them into serve_cost.json in this folder.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from results import write_result
from serve_models import make_jpeg, publish
from serve_speed import BareRuntime
from serving import (
    LoadResult,
    find_descendants,
    find_http_process,
    measure_load,
    process_cpu_seconds,
    running_service,
    tree_cpu_seconds,
    write_wrk_script,
)

from models.bundle import read_manifest

UNCHECKED = str(Path(__file__).parent / "serve_unchecked.py")
INT8 = ("--variant", "int8")
ROUNDS = 5
IDLE_SECONDS = 5
SETTLE_SECONDS = 2
CHECKED_FIGURES = ("cpu", "rate", "p99")


def memory_mb(pid: int) -> float:
    """Proportional set size of a process and its descendants, in MiB."""
    kilobytes = 0
    for each in [pid, *find_descendants(pid)]:
        text = Path(f"/proc/{each}/smaps_rollup").read_text()
        kilobytes += int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])
    return kilobytes / 1024


def measure_http_cost(store: Path, script: Path, seconds: int) -> dict:
    """api_us, requests_s and idle_cores, with the tiny network."""
    publish(store, "tiny")
    with running_service(store, "tiny") as server:
        measure_load(server, script, 1)

        http_process = find_http_process(server.pid)
        cpu_before = process_cpu_seconds(http_process)
        load = measure_load(server, script, seconds)
        cpu = process_cpu_seconds(http_process) - cpu_before

        time.sleep(SETTLE_SECONDS)
        idle_before = tree_cpu_seconds(server.pid)
        time.sleep(IDLE_SECONDS)
        idle_cpu = tree_cpu_seconds(server.pid) - idle_before
    return {
        "api_us": round(1e6 * cpu / (load.rate * seconds), 1),
        "requests_s": load.rate,
        "idle_cores": round(idle_cpu / IDLE_SECONDS, 4),
    }


def measure_one_client(store: Path, script: Path, image: bytes, seconds: int) -> dict:
    """one_client, memory_mb and the CPU per request, with ResNet-18."""
    bundle = publish(store, "small")
    graph = bundle / read_manifest(bundle).variants["int8"].file
    bare = BareRuntime(graph, image, decodes=True, batch=1, threads=0)

    ratios: list[float] = []
    with running_service(store, "small", *INT8) as server:
        busy = measure_load(server, script, seconds)
        for _ in range(3):
            bare_rate = measure_sequential_rate(bare, 1.0)
            ratios.append(measure_load(server, script, 2, clients=1).rate / bare_rate)
        memory = memory_mb(server.pid)
    return {
        "one_client": round(statistics.median(ratios), 3),
        "memory_mb": round(memory, 1),
        "cpu_us_a_request": round(1e6 * busy.cpu, 1),
    }


def measure_sequential_rate(bare: BareRuntime, seconds: float) -> float:
    """Runs per second, one at a time."""
    count = 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        bare.run_batch()
        count += 1
    return count / (time.perf_counter() - started)


def measure_checks(store: Path, script: Path, seconds: int) -> dict:
    """The complete service divided by the one without checks."""
    programs = {"complete": ["-m", "serve"], "unchecked": [UNCHECKED]}
    with ExitStack() as stack:
        servers = {}
        for kind, program in programs.items():
            service = running_service(store, "small", *INT8, program=program)
            servers[kind] = stack.enter_context(service)
            measure_load(servers[kind], script, 1)

        rounds: list[dict[str, LoadResult]] = []
        for number in range(ROUNDS):
            # The first of a round is a few per cent slower, so the order alternates.
            order = list(servers) if number % 2 == 0 else list(servers)[::-1]
            rounds.append({kind: measure_load(servers[kind], script, seconds) for kind in order})

    line = {}
    for figure in CHECKED_FIGURES:
        ratios = [
            getattr(loads["complete"], figure) / getattr(loads["unchecked"], figure)
            for loads in rounds
        ]
        line[f"checks_{figure}"] = round(statistics.median(ratios), 4)
    return line


def measure_ready_seconds(store: Path) -> float:
    durations: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        with running_service(store, "small"):
            durations.append(time.perf_counter() - started)
    return min(durations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    parser.add_argument("--store", type=Path, help="keeps the bundles for the next run")
    options = parser.parse_args()
    seconds = options.seconds

    with tempfile.TemporaryDirectory() as directory:
        store = options.store or Path(directory)
        store.mkdir(parents=True, exist_ok=True)
        image = make_jpeg(32, 32)
        script = write_wrk_script(store, image)
        result: dict[str, object] = {"case": "cost"}
        for part in (
            lambda: measure_http_cost(store, script, seconds),
            lambda: measure_one_client(store, script, image, seconds),
            lambda: measure_checks(store, script, seconds),
            lambda: {"ready_s": round(measure_ready_seconds(store), 2)},
        ):
            line = part()
            print(json.dumps(line), flush=True)
            result |= line
        if options.keep:
            write_result(__file__, result, ("case",))


if __name__ == "__main__":
    main()
