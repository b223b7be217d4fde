"""The page with the plots of the capacity plan."""

from pathlib import Path
from typing import Any

import matplotlib
from capacity_cluster import Timeline
from capacity_service import ServiceTimes, simulate_replica

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "imago"  # the same bytes for the same plot
matplotlib.rcParams["svg.fonttype"] = "none"
import matplotlib.pyplot as plt  # noqa: E402

MAX_POINTS = 300
"""Of a line; more only make the file larger."""
LONG_SECONDS = 7200
"""Beyond which the axis of a plot is in hours."""
UTILIZATIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def write_page(
    page: Path,
    times: ServiceTimes,
    lines: list[dict[str, Any]],
    timelines: dict[tuple[str, str], Timeline],
    requests: int,
) -> None:
    """Write the page, and its plots into the folder `plots` next to it."""
    plots = page.parent / "plots"
    plots.mkdir(exist_ok=True)
    draw_latency(plots / "capacity-latency.svg", times, requests)
    for name in dict.fromkeys(scenario for scenario, _ in timelines):
        draw_scenario(plots / f"capacity-{name}.svg", name, times, timelines)
    page.write_text(build_text(times, lines))


def draw_latency(file: Path, times: ServiceTimes, requests: int) -> None:
    """p50 and p99 of a replica over its utilization."""
    p50: list[float] = []
    p99: list[float] = []
    for utilization in UTILIZATIONS:
        rate = utilization * times.capacity
        outcome = simulate_replica(times, rate, requests)
        p50.append(outcome.latency_ms(0.5))
        p99.append(outcome.latency_ms(0.99))

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(UTILIZATIONS, p50, marker=".", label="p50")
    axes.plot(UTILIZATIONS, p99, marker=".", label="p99")
    axes.set(xlabel="rate / capacity of a replica", ylabel="ms", ylim=(0, None))
    axes.legend()
    save(figure, file)


def draw_scenario(
    file: Path, name: str, times: ServiceTimes, timelines: dict[tuple[str, str], Timeline]
) -> None:
    """Replicas over time next to what the load needs, and the share that is refused."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 4), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    is_long = (
        max(len(line.rate) for key, line in timelines.items() if key[0] == name) > LONG_SECONDS
    )
    unit = 3600 if is_long else 60
    for (scenario, autoscaler), timeline in timelines.items():
        if scenario != name:
            continue
        every = max(len(timeline.rate) // MAX_POINTS, 1)
        points = range(0, len(timeline.rate), every)
        minutes = [point * timeline.step / unit for point in points]
        if autoscaler == "hpa":
            needed = [timeline.rate[point] / times.capacity for point in points]
            above.plot(minutes, needed, color="0.6", label="load / capacity of a replica")
        above.step(minutes, [timeline.replicas[point] for point in points], label=autoscaler)
        below.step(minutes, [worst_refusal(timeline, point, every) for point in points])

    above.set(ylabel="replicas", ylim=(0, None))
    above.legend()
    below.set(ylabel="% refused", xlabel="hours" if is_long else "minutes")
    save(figure, file)


def worst_refusal(timeline: Timeline, first: int, count: int) -> float:
    """The largest percentage refused in these samples."""
    worst = 0.0
    for point in range(first, min(first + count, len(timeline.rate))):
        worst = max(worst, 100 * timeline.refused[point] / max(timeline.rate[point], 1e-9))
    return worst


def save(figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def build_text(times: ServiceTimes, lines: list[dict[str, Any]]) -> str:
    rows: list[str] = []
    for line in lines:
        rows.append(
            f"| {line['scenario']} | {line['autoscaler']} | {100 * line['refused_share']:.2f} % "
            f"| {line['seconds_refusing']} s | {100 * line['slow_share']:.1f} % "
            f"| {line['most_replicas']} | {line['replica_hours']:,.1f} "
            f"| {line['over_needed']:.2f} |"
        )
    table = "\n".join(rows)
    return f"""# Capacity

Written by `python tests/benchmarks/capacity_plan.py plots`. What is simulated, with which times,
and how it is checked against the real service: [README](README.md#capacity). A replica here answers
{times.capacity:.0f} requests a second.

## Latency of a replica

![p50 and p99 over the utilization](plots/capacity-latency.svg)

## The autoscalers under load

With the settings in [k8s/components](../../k8s/components). `refused` counts status 429 and 504;
`refusing` is the time in which more than 1 % of the requests were refused; `slow` the share of the
requests that came while the p99 was more than 20 times a request alone; `over needed` the
replica-hours divided by those of an autoscaler that is always at its CPU target.

| load | autoscaler | refused | refusing | slow | most replicas | replica-hours | over needed |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

![A spike](plots/capacity-spike.svg)

![A ramp](plots/capacity-ramp.svg)

![A large spike](plots/capacity-large-spike.svg)

![A day](plots/capacity-day.svg)
"""
