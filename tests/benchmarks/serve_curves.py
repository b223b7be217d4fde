"""Throughput over clients, and latency over the offered load, of Imago and other servers in turn.

    python tests/benchmarks/serve_curves.py [small-int8 …]
        [--seconds 5] [--rounds 3] [--rivals litserve fastapi mlserver ray bentoml]
        [--environments DIR] [--clients 1 2 4 8 16 32 64]
        [--loads 0.2 0.4 0.6 0.8 0.9 1.0 1.2] [--keep]

The curve over clients is a closed loop (wrk): each client sends its next request when the last one
is answered. The curve over load is an open one (open_loop.py): requests are due at a constant rate,
and latency counts from that time, so that a slow server is not spared (coordinated omission).
`load` is the rate as a multiple of what Imago answers 32 clients, for all servers the same rate.
Each round measures every server at a point before the next point; figures are medians of the
rounds. Prints a JSON line for each server and point; --keep also writes them into
serve_curves.json in this folder.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from open_loop import OpenLoopClient
from results import spread, write_result
from serve_models import make_jpeg, publish
from serve_rivals import DEFAULT_RIVALS, RIVALS, prepare_rivals, start_rival
from serve_speed import NO_TIMEOUT, WARM_UP_SECONDS, write_scripts
from serving import RunningServer, measure_load, resumed, run_wrk, running_service, suspend

from models.bundle import MANIFEST_FILE, read_manifest

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
LOADS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2)
KEYS = ("case", "server", "clients", "load")

Point = dict[str, float]


def measure_clients(server: RunningServer, script: Path, clients: int, seconds: int) -> Point:
    load = run_wrk(server, script, seconds, clients)
    return {"rate": load.rate, "p50_ms": load.p50, "p99_ms": load.p99}


def measure_offered(client: OpenLoopClient, rate: float, seconds: int) -> Point:
    result = client.run(rate, seconds)
    failed = result.offered - len(result.latencies)
    point = {"rate": len(result.latencies) / seconds, "failed_share": failed / result.offered}
    if result.latencies:
        point |= {"p50_ms": result.latency_ms(0.5), "p99_ms": result.latency_ms(0.99)}
    return point


def summarize(points: list[Point]) -> dict[str, Any]:
    """Medians over the rounds, and the spread of p99; a figure that a round lacks is left out."""
    line: dict[str, Any] = {}
    for name in points[0]:
        values = [point[name] for point in points if name in point]
        line[name] = round(statistics.median(values), 3)
    latencies = [point["p99_ms"] for point in points if "p99_ms" in point]
    return line | {"spread": {"p99_ms": spread(latencies)} if latencies else {}}


def measure_case(store: Path, name: str, options: argparse.Namespace) -> None:
    """Measure a case, e.g. small-int8, and print its lines."""
    model, _, variant = name.partition("-")
    variant = variant or "fp32"
    bundle = publish(store, model)
    graph = bundle / read_manifest(bundle).variants[variant].file
    image = make_jpeg(375, 500) if model == "large" else make_jpeg(32, 32)
    rivals = prepare_rivals(options.rivals, options.environments)
    scripts = write_scripts(store, image, list(rivals))

    with ExitStack() as stack:
        flags = ("--variant", variant, *NO_TIMEOUT)
        servers = {"service": stack.enter_context(running_service(store, model, *flags))}
        open_clients = {"service": OpenLoopClient(servers["service"].port, image)}
        for kind, python in rivals.items():
            server = start_rival(stack, kind, python, graph, bundle / MANIFEST_FILE)
            rival = RIVALS[kind]
            body = rival.build_body(image)
            servers[kind] = server
            open_clients[kind] = OpenLoopClient(server.port, body, rival.content_type, rival.path)
        for kind, server in servers.items():
            measure_load(server, scripts[kind], WARM_UP_SECONDS)
        capacity = measure_load(servers["service"], scripts["service"], options.seconds).rate
        for server in servers.values():
            suspend(server)

        points: dict[tuple[str, str, float], list[Point]] = {}
        for _ in range(options.rounds):
            for clients in options.clients:
                for kind, server in servers.items():
                    with resumed(server):
                        point = measure_clients(server, scripts[kind], clients, options.seconds)
                    points.setdefault((kind, "clients", clients), []).append(point)
            for load in options.loads:
                for kind, server in servers.items():
                    with resumed(server):
                        rate = load * capacity
                        point = measure_offered(open_clients[kind], rate, options.seconds)
                    points.setdefault((kind, "load", load), []).append(point)

    for (kind, axis, value), measured in points.items():
        line = {"case": name, "server": kind, axis: value, **summarize(measured)}
        print(json.dumps(line), flush=True)
        if options.keep:
            write_result(__file__, line, KEYS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["small-int8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of each point")
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=DEFAULT_RIVALS)
    parser.add_argument("--environments", type=Path, help="folder for the rivals' packages")
    parser.add_argument("--clients", nargs="*", type=int, default=CLIENTS)
    parser.add_argument("--loads", nargs="*", type=float, default=LOADS)
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as directory:
        for name in options.cases:
            measure_case(Path(directory), name, options)


if __name__ == "__main__":
    main()
