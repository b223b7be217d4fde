"""How many replicas a load needs, and what the autoscalers in k8s/ do with one that changes.

    python tests/benchmarks/capacity_plan.py measure [--case small --variant fp32] [--keep]
    python tests/benchmarks/capacity_plan.py replicas --rate 1000 --p99-ms 100
    python tests/benchmarks/capacity_plan.py autoscale [--scenario spike ramp large-spike day]
    python tests/benchmarks/capacity_plan.py plots
    python tests/benchmarks/capacity_plan.py check [--seconds 25]

`measure` loads the real service from one client to as many as fill its batches, and takes the
duration of a batch by its size from the throughput and the batch sizes that the service counts;
the spread of the durations and what HTTP adds come from requests that find the service idle.
`replicas` and `autoscale` simulate with these times (--service FILE, else what `measure --keep`
wrote, else DEFAULT_TIMES, which follow from the README's throughput). `autoscale` reads the
autoscalers from the manifests (--components DIR, else those in k8s/): a spike and a ramp from half
to five times what a replica answers, a spike from 20,000 to 100,000 requests a second, and a day up
to 100,000. All are played as a flow (see capacity_cluster.py); the last two with minReplicas and
maxReplicas that fit the load.
`plots` draws all of it on CAPACITY.md. `check` compares the simulation with the real service on
this machine at three rates: it fails where a p99 differs by more than 20 %, and takes three
minutes; run it on an otherwise idle machine. Prints JSON lines.
"""

import argparse
import json
import math
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_autoscaler import COMPONENTS, Settings, load_hpa, load_keda
from capacity_cluster import (
    RateFunction,
    Timeline,
    UtilizationTable,
    simulate_events,
    simulate_fluid,
)
from capacity_service import ServiceTimes, plan_replicas, simulate_replica
from open_loop import OpenLoopClient
from results import read_results, write_result
from serve_models import make_jpeg, publish
from serving import (
    CORES,
    RunningServer,
    measure_load,
    running_service,
    write_wrk_script,
)

HERE = Path(__file__).parent
PAGE = HERE / "CAPACITY.md"

DEFAULT_TIMES = ServiceTimes(
    fixed_ms=0.0, image_ms=8.77, alone_ms=6.0, overhead_ms=0.5, predictors=2
)
"""Until `measure --keep` has run: ResNet-18 in fp32 at 32 pixels answers 228 requests a second on
two cores (README, Speed); that one image alone takes 6 ms is assumed."""
CLIENTS = (2, 4, 8, 16, 32)
IDLE_RATE = 10
"""Requests per second that find the service idle, for its spread and overhead."""
SPREAD_SAMPLES = 200
START_SECONDS = 10
"""From the decision to a ready pod: scheduling, a start of 1.4 s, the readiness probe; the image
is on the node."""
CHECK_UTILIZATIONS = (0.4, 0.6, 0.8)
MAX_P99_DIFFERENCE = 0.2
P99_LIMIT_FACTOR = 20
"""A request counts as slow where the p99 is beyond this multiple of one alone."""
HEADROOM = 1.5
"""maxReplicas as a multiple of what the peak needs, where the load is beyond the shipped one."""
PEAK_RATE = 100_000
"""Of the large spike and the day."""
DAY_SECONDS = 86_400
SCENARIOS = ("spike", "ramp", "large-spike", "day")


@dataclass(frozen=True)
class Scenario:
    """A load over time."""

    name: str
    seconds: int
    rate: RateFunction
    has_shipped_limits: bool
    """Whether minReplicas and maxReplicas are those of the manifest."""


def build_scenarios(capacity: float) -> dict[str, Scenario]:
    """The loads, for replicas with this many requests per second."""
    low = 0.5 * capacity
    high = 5 * capacity

    def spike(now: float) -> float:
        return high if 300 <= now < 1200 else low

    def ramp(now: float) -> float:
        if now < 1500:
            return min(max(low, low + (high - low) * (now - 300) / 600), high)
        return max(high - (high - low) * (now - 1500) / 600, low)

    def day(now: float) -> float:
        hour = now / 3600
        daily = 0.5 - 0.5 * math.cos(2 * math.pi * (hour - 4) / 24)
        evening = 0.25 * math.exp(-(((hour - 20) / 1.5) ** 2))
        rush = 0.15 if 43_200 <= now < 43_800 else 0.0  # ten minutes at noon
        return PEAK_RATE * min(0.12 + 0.63 * daily + evening + rush, 1.0)

    def large_spike(now: float) -> float:
        return PEAK_RATE if 600 <= now < 1500 else 0.2 * PEAK_RATE

    scenarios = [
        Scenario("spike", 2700, spike, True),
        Scenario("ramp", 3300, ramp, True),
        Scenario("large-spike", 4 * 3600, large_spike, False),
        Scenario("day", DAY_SECONDS, day, False),
    ]
    return {scenario.name: scenario for scenario in scenarios}


def load_autoscalers(components: Path) -> dict[str, Settings]:
    return {"hpa": load_hpa(components), "keda": load_keda(components)}


def play(
    times: ServiceTimes,
    table: UtilizationTable,
    settings: Settings,
    scenario: Scenario,
    start_seconds: float,
) -> Timeline:
    """Play a scenario as a flow."""
    if not scenario.has_shipped_limits:
        rates = [scenario.rate(now) for now in range(0, scenario.seconds, 60)]
        replicas = max(rates) * settings.cpu_limit / times.capacity / settings.cpu_target
        least = math.ceil(min(rates) / times.capacity)
        settings = settings.with_limits(least, math.ceil(HEADROOM * replicas))
    return simulate_fluid(times, table, settings, scenario.rate, scenario.seconds, start_seconds)


def summarize(
    times: ServiceTimes, settings: Settings, scenario: Scenario, timeline: Timeline
) -> dict[str, Any]:
    """The figures of a scenario."""
    limit_ms = P99_LIMIT_FACTOR * (times.alone_ms + times.overhead_ms)
    replica_seconds = sum(timeline.rate) * timeline.step / times.capacity
    needed_hours = replica_seconds * settings.cpu_limit / settings.cpu_target / 3600
    return {
        "scenario": scenario.name,
        "autoscaler": settings.name,
        "requests": round(sum(timeline.rate) * timeline.step),
        "refused_share": round(timeline.refused_share, 5),
        "seconds_refusing": round(timeline.seconds_refusing()),
        "slow_share": round(timeline.share_slower_than(limit_ms), 4),
        "most_replicas": max(timeline.replicas),
        "replica_hours": round(timeline.replica_hours, 1),
        "over_needed": round(timeline.replica_hours / needed_hours, 2),
    }


def run_autoscale(options: argparse.Namespace) -> None:
    times = load_times(options.service)
    scenarios = build_scenarios(times.capacity)
    table = UtilizationTable(times, options.requests)
    for name in options.scenario:
        scenario = scenarios[name]
        for settings in load_autoscalers(options.components).values():
            timeline = play(times, table, settings, scenario, options.start_seconds)
            line = summarize(times, settings, scenario, timeline)
            if options.events and scenario.has_shipped_limits:
                events, outcome = simulate_events(
                    times, settings, scenario.rate, scenario.seconds, options.start_seconds
                )
                line["events_refused_share"] = round(outcome.lost_share, 5)
                line["events_replica_hours"] = round(events.replica_hours, 1)
            print(json.dumps(line), flush=True)


def run_replicas(options: argparse.Namespace) -> None:
    times = load_times(options.service)
    try:
        replicas = plan_replicas(times, options.rate, options.p99_ms, options.requests)
    except ValueError as error:
        print(f"capacity_plan: {error}", file=sys.stderr)
        sys.exit(2)

    outcome = simulate_replica(times, options.rate / replicas, options.requests)
    line = {
        "rate": options.rate,
        "p99_ms": options.p99_ms,
        "replicas": replicas,
        "utilization": round(options.rate / replicas / times.capacity, 3),
        "simulated_p50_ms": round(outcome.latency_ms(0.5), 1),
        "simulated_p99_ms": round(outcome.latency_ms(0.99), 1),
    }
    print(json.dumps(line))


def load_times(file: Path | None) -> ServiceTimes:
    """Read a file, or what `measure --keep` wrote last; DEFAULT_TIMES without either."""
    if file is not None:
        return ServiceTimes.parse(json.loads(file.read_text()))
    kept = read_results(__file__)
    return ServiceTimes.parse(kept[-1]) if kept else DEFAULT_TIMES


# Measuring the real service


@contextmanager
def started_service(options: argparse.Namespace) -> Iterator[tuple[RunningServer, bytes, Path]]:
    """The service of a case, its image, and the script that makes wrk send it."""
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory)
        publish(store, options.case)
        image = make_jpeg(375, 500) if options.case == "large" else make_jpeg(32, 32)
        script = write_wrk_script(store, image)
        with running_service(store, options.case, "--variant", options.variant) as server:
            measure_load(server, script, 2)
            yield server, image, script


def read_batches(port: int) -> tuple[float, float]:
    """Batches and images that the service has run."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    values: dict[str, float] = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if name in ("imago_batch_size_sum", "imago_batch_size_count"):
            values[name] = float(value)
    return values["imago_batch_size_count"], values["imago_batch_size_sum"]


def measure_times(server: RunningServer, image: bytes, script: Path, seconds: int) -> ServiceTimes:
    """Durations by batch size, overhead and spread."""
    sizes: list[float] = []
    durations: list[float] = []
    for clients in CLIENTS:
        if clients < CORES:
            continue
        batches_before, images_before = read_batches(server.metrics_port)
        load = measure_load(server, script, seconds, clients)
        batches_after, images_after = read_batches(server.metrics_port)
        size = (images_after - images_before) / (batches_after - batches_before)
        sizes.append(size)
        durations.append(1e3 * CORES * size / load.rate)
    fixed_ms, image_ms = fit_line(sizes, durations)

    idle = OpenLoopClient(server.port, image).run(IDLE_RATE, SPREAD_SAMPLES / IDLE_RATE)
    ordered = sorted(1e3 * latency for latency in idle.latencies)
    overhead_ms = max(ordered[0] - read_run_ms(server), 0.0)
    alone_ms = sum(ordered) / len(ordered) - overhead_ms
    # Around the mean, because the throughput above gives mean durations.
    ratios = [round((latency - overhead_ms) / alone_ms, 3) for latency in ordered]
    return ServiceTimes(
        fixed_ms=round(fixed_ms, 3),
        image_ms=round(image_ms, 3),
        alone_ms=round(alone_ms, 3),
        overhead_ms=round(overhead_ms, 3),
        spread=tuple(ratios),
        predictors=CORES,
    )


def read_run_ms(server: RunningServer) -> float:
    """Decoding and inference of one image that finds the service idle, as the service says."""
    image = make_jpeg(32, 32)
    shortest = math.inf
    for _ in range(20):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/predict", image, {"Content-Type": "image/jpeg"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            timing = response.headers["Server-Timing"]
        total = 0.0
        for part in timing.split(","):
            name, _, duration = part.strip().partition(";dur=")
            if name in ("decode", "infer"):
                total += float(duration)
        shortest = min(shortest, total)
    return shortest


def fit_line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Intercept (at least 0) and slope by least squares."""
    mean_x = sum(x) / len(x)
    mean_y = sum(y) / len(y)
    covariance = 0.0
    variance = 0.0
    for a, b in zip(x, y, strict=True):
        covariance += (a - mean_x) * (b - mean_y)
        variance += (a - mean_x) ** 2
    slope = covariance / variance if variance else mean_y / mean_x
    intercept = mean_y - slope * mean_x
    if intercept < 0:
        return 0.0, mean_y / mean_x
    return intercept, slope


def run_measure(options: argparse.Namespace) -> None:
    with started_service(options) as (server, image, script):
        times = measure_times(server, image, script, options.seconds)
    line = {
        "case": options.case,
        "variant": options.variant,
        "capacity": round(times.capacity, 1),
        "service": times.as_json(),
    }
    print(json.dumps(line))
    if options.keep:
        write_result(__file__, line, ("case", "variant"))


def run_check(options: argparse.Namespace) -> None:
    """Compare the simulation with the real service; exit with 1 where a p99 differs too much."""
    differences: list[float] = []
    with started_service(options) as (server, image, script):
        times = measure_times(server, image, script, max(options.seconds // 5, 2))
        client = OpenLoopClient(server.port, image)
        for utilization in CHECK_UTILIZATIONS:
            rate = utilization * times.capacity
            real = client.run(rate, options.seconds, "poisson")
            simulated = simulate_replica(times, rate, int(rate * options.seconds))
            difference = simulated.latency_ms(0.99) / real.latency_ms(0.99) - 1
            differences.append(abs(difference))
            line = {
                "utilization": utilization,
                "rate": round(rate, 1),
                "real_p50_ms": round(real.latency_ms(0.5), 1),
                "simulated_p50_ms": round(simulated.latency_ms(0.5), 1),
                "real_p99_ms": round(real.latency_ms(0.99), 1),
                "simulated_p99_ms": round(simulated.latency_ms(0.99), 1),
                "p99_difference": round(difference, 3),
            }
            print(json.dumps(line), flush=True)
    sys.exit(0 if max(differences) <= MAX_P99_DIFFERENCE else 1)


# The page


def run_plots(options: argparse.Namespace) -> None:
    from capacity_page import write_page

    times = load_times(options.service)
    table = UtilizationTable(times, options.requests)
    scenarios = build_scenarios(times.capacity)
    lines: list[dict[str, Any]] = []
    timelines: dict[tuple[str, str], Timeline] = {}
    for scenario in scenarios.values():
        for settings in load_autoscalers(options.components).values():
            timeline = play(times, table, settings, scenario, options.start_seconds)
            timelines[scenario.name, settings.name] = timeline
            lines.append(summarize(times, settings, scenario, timeline))
    write_page(options.page, times, lines, timelines, options.requests)
    print(options.page)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")

    measure = commands.add_parser("measure", help="measure the service times on this machine")
    measure.add_argument("--keep", action="store_true", help="write them to a file as well")
    measure.set_defaults(run=run_measure)
    check = commands.add_parser("check", help="compare the simulation with the real service")
    check.set_defaults(run=run_check)
    for command, seconds in ((measure, 4), (check, 25)):
        command.add_argument("--case", choices=("small", "large", "tiny"), default="small")
        command.add_argument("--variant", choices=("fp32", "int8"), default="fp32")
        command.add_argument("--seconds", type=int, default=seconds, help="of each load")

    replicas = commands.add_parser("replicas", help="replicas for a rate and a p99")
    replicas.add_argument("--rate", type=float, required=True, help="requests per second")
    replicas.add_argument("--p99-ms", type=float, required=True)
    replicas.add_argument("--requests", type=int, default=30_000, help="simulated for each guess")
    replicas.set_defaults(run=run_replicas)

    autoscale = commands.add_parser("autoscale", help="play the autoscalers of k8s/")
    autoscale.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    autoscale.add_argument(
        "--events", action="store_true", help="also play every request of a spike or a ramp"
    )
    autoscale.set_defaults(run=run_autoscale)
    plots = commands.add_parser("plots", help="draw the scenarios on a page")
    plots.add_argument("--page", type=Path, default=PAGE)
    plots.set_defaults(run=run_plots)
    for command in (autoscale, plots):
        command.add_argument("--components", type=Path, default=COMPONENTS)
        command.add_argument("--start-seconds", type=float, default=START_SECONDS)
        command.add_argument(
            "--requests", type=int, default=20_000, help="simulated for each utilization"
        )
    for command in (replicas, autoscale, plots):
        command.add_argument("--service", type=Path, help="JSON that `measure` printed")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
