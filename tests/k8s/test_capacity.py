"""The capacity plan: the autoscaler's algorithm, the simulation of a replica, and both together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

BENCHMARKS = ROOT / "tests/benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from capacity_autoscaler import (  # noqa: E402
    SYNC_SECONDS,
    Autoscaler,
    PodMetrics,
    Settings,
    load_hpa,
    load_keda,
)

BUSY = 200.0  # pending images of a pod that can't keep up
IDLE = 0.0


@pytest.fixture(params=[load_hpa, load_keda], ids=["hpa", "keda"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """The shipped settings, for as many replicas as the test needs."""
    return request.param().with_limits(1, 1000)


def decide(autoscaler: Autoscaler, now: float, replicas: int, pending: float, cpu: float) -> int:
    return autoscaler.decide(now, replicas, [PodMetrics(replicas, pending, cpu)])


def test_a_spike_adds_four_replicas_or_doubles_them_every_15_seconds(settings):
    autoscaler = Autoscaler(settings)
    replicas = 1
    steps: list[int] = []
    for number in range(4):
        replicas = decide(autoscaler, number * SYNC_SECONDS, replicas, BUSY, 1.0)
        steps.append(replicas)
    assert steps == [5, 10, 20, 40]


def test_replicas_fall_after_the_window_by_a_tenth_a_minute(settings):
    autoscaler = Autoscaler(settings)
    replicas = 100
    by_time: dict[int, int] = {}
    for now in range(0, 481, SYNC_SECONDS):
        is_loaded = now == 0
        pending = settings.pending_target if is_loaded else IDLE
        cpu = settings.cpu_target if is_loaded else 0.01
        replicas = decide(autoscaler, now, replicas, pending, cpu)
        by_time[now] = replicas

    first_change = settings.down.window
    assert by_time[first_change - SYNC_SECONDS] == 100
    assert by_time[first_change] == 90
    assert by_time[first_change + 45] == 90
    assert by_time[first_change + 60] == 81


def test_few_replicas_fall_one_a_minute(settings):
    autoscaler = Autoscaler(settings)
    replicas = 4
    seen: list[int] = []
    for now in range(0, 901, SYNC_SECONDS):
        replicas = decide(autoscaler, now, replicas, IDLE, 0.01)
        seen.append(replicas)
    assert seen[-1] == 1
    assert sorted(set(seen), reverse=True) == [4, 3, 2, 1]


def test_a_metric_within_the_tolerance_changes_nothing(settings):
    for factor in (0.95, 1.05):
        cpu = factor * settings.cpu_target
        assert decide(Autoscaler(settings), 0, 10, 1.0, cpu) == 10


def test_pods_that_still_start_count_as_idle():
    """Otherwise replicas double again and again until the first new pod is ready."""
    settings = load_hpa().with_limits(1, 1000)
    starting = PodMetrics(30, None, None)
    busy = PodMetrics(10, 3 * settings.pending_target, settings.cpu_target)
    assert Autoscaler(settings).decide(0, 40, [busy, starting]) == 40
    assert Autoscaler(settings).decide(0, 10, [busy]) == 20


def test_the_settings_come_from_the_manifests(tmp_path):
    """A changed manifest changes what is simulated."""
    subprocess.run(["cp", "-r", ROOT / "k8s", tmp_path / "k8s"], check=True)
    manifest = tmp_path / "k8s/components/hpa/hpa.yaml"
    manifest.write_text(manifest.read_text().replace("maxReplicas: 8", "maxReplicas: 9"))
    scaled = tmp_path / "k8s/components/keda/scaledobject.yaml"
    scaled.write_text(scaled.read_text().replace("[30s]", "[2m]"))

    components = tmp_path / "k8s/components"
    assert load_hpa(components).most == load_hpa().most + 1
    assert load_keda(components).pending_window == 120
    assert load_hpa().pending_window == load_keda().pending_window


# Below, what needs SimPy.


@pytest.fixture(scope="module")
def service():
    pytest.importorskip("simpy", reason="SimPy is not installed")
    import capacity_service

    return capacity_service


@pytest.fixture(scope="module")
def times(service):
    """A slow replica: 20 requests a second, so that few events are enough."""
    return service.ServiceTimes(fixed_ms=0, image_ms=50, alone_ms=50, overhead_ms=0)


def test_a_replica_waits_as_long_as_theory_says(service, times):
    """Poisson arrivals, a constant duration, one at a time: the queue M/D/1."""
    utilization = 0.6
    outcome = service.simulate_replica(times, utilization * times.capacity, 40_000)
    duration = 1 / times.capacity
    expected = duration + utilization * duration / (2 * (1 - utilization))
    # Batches save nothing here, but all images of one are answered at its end.
    single = service.ServiceTimes(
        fixed_ms=0, image_ms=50, alone_ms=50, overhead_ms=0, max_batch_size=1
    )
    alone = service.simulate_replica(single, utilization * single.capacity, 40_000)
    mean = sum(alone.latencies) / len(alone.latencies)
    assert mean == pytest.approx(expected, rel=0.05)
    assert sum(outcome.latencies) / len(outcome.latencies) > mean


def test_a_replica_refuses_what_is_beyond_its_capacity(service, times):
    outcome = service.simulate_replica(times, 3 * times.capacity, 20_000)
    assert outcome.offered == 20_000
    assert outcome.lost_share == pytest.approx(2 / 3, abs=0.03)
    # Nobody waits longer than the images before them take.
    longest = (times.max_pending + times.max_batch_size) / times.capacity
    assert max(outcome.latencies) <= min(longest, times.deadline_seconds + 1)


def test_the_plan_is_the_least_number_of_replicas_with_the_p99(service, times):
    rate = 40 * times.capacity
    p99_ms = 300
    replicas = service.plan_replicas(times, rate, p99_ms, 8_000)

    def p99_with(count: int) -> float:
        return service.simulate_replica(times, rate / count, 8_000).latency_ms(0.99)

    assert p99_with(replicas) <= p99_ms < p99_with(replicas - 1)
    assert 40 < replicas < 120
    with pytest.raises(ValueError, match="no number of replicas"):
        service.plan_replicas(times, rate, 10, 8_000)


@pytest.mark.parametrize("load_settings", [load_hpa, load_keda], ids=["hpa", "keda"])
def test_the_flow_agrees_with_every_request_at_a_small_scale(times, load_settings):
    """The flow is what the page uses at 100,000 requests a second."""
    from capacity_cluster import UtilizationTable, simulate_events, simulate_fluid

    def spike(now: float) -> float:
        return times.capacity * (5 if 120 <= now < 420 else 0.5)

    settings = load_settings()
    table = UtilizationTable(times, 4_000)
    flow = simulate_fluid(times, table, settings, spike, 900, 10)
    events, outcome = simulate_events(times, settings, spike, 900, 10)

    assert outcome.lost_share > 0.01
    assert flow.refused_share == pytest.approx(outcome.lost_share, rel=0.25)
    assert flow.replica_hours == pytest.approx(events.replica_hours, rel=0.1)
    assert abs(max(flow.replicas) - max(events.replicas)) <= 1


def run_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "capacity_plan.py"), *arguments],
        capture_output=True,
        text=True,
    )


def test_the_command_draws_the_page_and_refuses_what_it_cannot_plan(service, times, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    file = tmp_path / "service.json"
    file.write_text(json.dumps({"service": times.as_json()}))

    refused = run_plan("replicas", "--rate", "100", "--p99-ms", "1", "--service", str(file))
    assert refused.returncode == 2
    assert refused.stderr.startswith("capacity_plan: no number of replicas")

    page = tmp_path / "CAPACITY.md"
    drawn = run_plan("plots", "--service", str(file), "--page", str(page), "--requests", "500")
    assert drawn.returncode == 0, drawn.stderr
    text = page.read_text()
    for name in ("spike", "ramp", "large-spike", "day"):
        assert f"| {name} | hpa |" in text
        assert f"| {name} | keda |" in text
        plot = Path(tmp_path / f"plots/capacity-{name}.svg")
        assert plot.read_text().rstrip().endswith("</svg>")
        assert plot.stat().st_size < 200_000
