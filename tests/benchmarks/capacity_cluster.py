"""Replicas that an autoscaler starts and ends, under a load that changes.

Two simulations of the same cluster. `simulate_events` plays every request (SimPy) and is exact; it
takes about a second for 100,000 requests. `simulate_fluid` treats the requests of a replica as a
flow: what is offered beyond its capacity waits, and what is beyond `max_pending` is refused; the
images that are pending and the p99 below saturation come from a table that the event simulation of
one replica fills. It takes the same time for any rate, and tests/k8s/test_capacity.py holds it
against the event simulation at a small one.
"""

import bisect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import simpy
from capacity_autoscaler import SYNC_SECONDS, Autoscaler, PodMetrics, Settings
from capacity_service import Outcome, Replica, ServiceTimes, simulate_replica

CPU_WINDOW_SECONDS = 15
"""metrics-server reports the mean of its last interval, ..."""
CPU_DELAY_SECONDS = 15
"""... as old as this on average with the kubelet's own delay."""
CPU_YOUNG_SECONDS = 30
"""After which a pod that became ready has a CPU value."""
TABLE_UTILIZATIONS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94)

RateFunction = Callable[[float], float]


@dataclass
class Timeline:
    """A simulation, sample by sample; the lists have the same length."""

    step: float
    """Seconds between two samples."""
    rate: list[float] = field(default_factory=list)
    """Requests per second that are offered."""
    replicas: list[int] = field(default_factory=list)
    """Replicas that are ready."""
    refused: list[float] = field(default_factory=list)
    """Requests refused or expired, per second."""
    p99_ms: list[float] = field(default_factory=list)
    """Of the requests that are answered."""

    @property
    def refused_share(self) -> float:
        return sum(self.refused) / max(sum(self.rate), 1e-9)

    @property
    def replica_hours(self) -> float:
        return sum(self.replicas) * self.step / 3600

    def share_slower_than(self, limit_ms: float) -> float:
        """The share of the requests that were offered while the p99 was above the limit."""
        slow = 0.0
        for rate, p99 in zip(self.rate, self.p99_ms, strict=True):
            if p99 > limit_ms:
                slow += rate
        return slow / max(sum(self.rate), 1e-9)

    def seconds_refusing(self) -> float:
        """Time in which more than 1 % of the requests were refused."""
        return self.step * sum(
            1 for rate, lost in zip(self.rate, self.refused, strict=True) if lost > 0.01 * rate
        )


class UtilizationTable:
    """Pending images and p99 of one replica by its utilization, from the event simulation."""

    def __init__(self, times: ServiceTimes, requests: int) -> None:
        """`requests` are simulated at each utilization."""
        self.pending: list[float] = []
        self.p99_ms: list[float] = []
        for utilization in TABLE_UTILIZATIONS:
            rate = utilization * times.capacity
            outcome = simulate_replica(times, rate, requests)
            mean = sum(outcome.latencies) / len(outcome.latencies)
            self.pending.append(rate * mean)  # Little's law
            self.p99_ms.append(outcome.latency_ms(0.99))

    def interpolate(self, values: list[float], utilization: float) -> float:
        """A column of the table at a utilization; beyond the ends, the value at the end."""
        right = bisect.bisect_left(TABLE_UTILIZATIONS, utilization)
        if right == 0:
            return values[0]
        if right == len(TABLE_UTILIZATIONS):
            return values[-1]
        low = TABLE_UTILIZATIONS[right - 1]
        high = TABLE_UTILIZATIONS[right]
        share = (utilization - low) / (high - low)
        return values[right - 1] + share * (values[right] - values[right - 1])


class _History:
    """Values over time whose mean over any window is quick."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.sums = [0.0]

    def append(self, value: float) -> None:
        self.sums.append(self.sums[-1] + value)

    def mean(self, start: float, end: float) -> float | None:
        """The mean of the samples within these seconds; None if there are none."""
        first = max(int(start / self.step), 0)
        last = min(int(end / self.step), len(self.sums) - 1)
        if last <= first:
            return None
        return (self.sums[last] - self.sums[first]) / (last - first)


@dataclass
class _Cohort:
    """Replicas that started together."""

    count: int
    ready_at: float


class _Cohorts:
    """All replicas, oldest first. The youngest are removed first, as by a ReplicaSet."""

    def __init__(self, count: int) -> None:
        self.cohorts = [_Cohort(count, 0.0)]

    @property
    def total(self) -> int:
        return sum(cohort.count for cohort in self.cohorts)

    def count_ready(self, now: float) -> int:
        return sum(cohort.count for cohort in self.cohorts if cohort.ready_at <= now)

    def resize(self, count: int, ready_at: float) -> None:
        change = count - self.total
        if change > 0:
            self.cohorts.append(_Cohort(change, ready_at))
        while change < 0:
            youngest = self.cohorts[-1]
            removed = min(youngest.count, -change)
            youngest.count -= removed
            change += removed
            if youngest.count == 0:
                self.cohorts.pop()


def simulate_fluid(
    times: ServiceTimes,
    table: UtilizationTable,
    settings: Settings,
    rate: RateFunction,
    seconds: float,
    start_seconds: float,
    step: float = 1.0,
) -> Timeline:
    """Play `seconds` of a load; a new pod is ready `start_seconds` after it was asked for."""
    autoscaler = Autoscaler(settings)
    cohorts = _Cohorts(replicas_for(settings, times, rate(0.0)))
    pending_history = _History(step)
    cpu_history = _History(step)
    timeline = Timeline(step)
    queue = 0.0  # of each ready replica, beyond what is pending below saturation
    next_sync = 0.0

    for number in range(int(seconds / step)):
        now = number * step
        ready = cohorts.count_ready(now)
        offered = rate(now)
        share = offered / ready
        utilization = min(share / times.capacity, 1.0)

        flowing = table.interpolate(table.pending, utilization)
        room = max(times.max_pending - flowing, 0.0)
        queue += (share - times.capacity) * step
        refused = max(queue - room, 0.0)
        queue = min(max(queue, 0.0), room)

        timeline.rate.append(offered)
        timeline.replicas.append(ready)
        timeline.refused.append(refused * ready / step)
        wait_ms = 1e3 * queue / times.capacity
        timeline.p99_ms.append(table.interpolate(table.p99_ms, utilization) + wait_ms)
        pending_history.append(flowing + queue)
        busy = 1.0 if queue > 0 else utilization
        cpu_history.append(busy * settings.cpu_limit)

        if now >= next_sync:
            next_sync += SYNC_SECONDS
            pods = _observe(now, settings, cohorts, pending_history, cpu_history)
            wanted = autoscaler.decide(now, cohorts.total, pods)
            cohorts.resize(wanted, now + start_seconds)
            queue *= ready / max(cohorts.count_ready(now), 1)
        newly_ready = cohorts.count_ready(now + step)
        if newly_ready > ready:
            queue *= ready / newly_ready
    return timeline


def replicas_for(settings: Settings, times: ServiceTimes, rate: float) -> int:
    """Replicas that have settled at a constant rate, by their CPU."""
    wanted = -(-rate * settings.cpu_limit // (times.capacity * settings.cpu_target))
    return int(min(max(wanted, settings.least), settings.most))


def _observe(
    now: float,
    settings: Settings,
    cohorts: _Cohorts,
    pending_history: _History,
    cpu_history: _History,
) -> list[PodMetrics]:
    """What the metrics say of each cohort; a scrape is half an interval old on average."""
    scraped_until = now - settings.scrape_interval / 2
    cpu_until = now - CPU_DELAY_SECONDS
    pods: list[PodMetrics] = []
    for cohort in cohorts.cohorts:
        started = max(scraped_until - settings.pending_window, cohort.ready_at)
        pending = pending_history.mean(started, scraped_until)
        cpu = None
        if cohort.ready_at == 0 or now - cohort.ready_at >= CPU_YOUNG_SECONDS:
            cpu = cpu_history.mean(cpu_until - CPU_WINDOW_SECONDS, cpu_until)
        pods.append(PodMetrics(cohort.count, pending, cpu))
    return pods


@dataclass
class _Pod:
    """A replica of the event simulation, and what it showed each second."""

    replica: Replica
    ready_at: float
    pending: _History
    cpu: _History
    busy_before: float = 0.0


class _EventCluster:
    """The replicas, the load and the autoscaler of `simulate_events`."""

    def __init__(
        self, times: ServiceTimes, settings: Settings, rate: RateFunction, start_seconds: float
    ) -> None:
        self.env = simpy.Environment()
        self.times = times
        self.settings = settings
        self.rate = rate
        self.start_seconds = start_seconds
        self.generator = random.Random(0)
        self.autoscaler = Autoscaler(settings)
        self.timeline = Timeline(1.0)
        self.pods: list[_Pod] = []
        self.ended: list[Replica] = []
        for _ in range(replicas_for(settings, times, rate(0.0))):
            self._start_pod(0.0)

    def run(self, seconds: float) -> tuple[Timeline, Outcome]:
        self.env.process(self._send_requests())
        self.env.process(self._observe_and_scale())
        self.env.run(seconds)

        total = Outcome()
        for replica in [pod.replica for pod in self.pods] + self.ended:
            total.latencies += replica.outcome.latencies
            total.refused += replica.outcome.refused
            total.expired += replica.outcome.expired
        return self.timeline, total

    def _start_pod(self, ready_at: float) -> None:
        replica = Replica(self.env, self.times, self.generator)
        self.pods.append(_Pod(replica, ready_at, _History(1.0), _History(1.0)))

    def _ready_pods(self) -> list[_Pod]:
        return [pod for pod in self.pods if pod.ready_at <= self.env.now]

    def _send_requests(self) -> Iterator[simpy.Event]:
        while True:
            yield self.env.timeout(self.generator.expovariate(self.rate(self.env.now)))
            self.generator.choice(self._ready_pods()).replica.request()

    def _observe_and_scale(self) -> Iterator[simpy.Event]:
        lost_before = 0
        next_sync = 0.0
        predictors = self.times.workers * self.times.predictors
        while True:
            now = self.env.now
            lost = 0
            for pod in self.pods:
                busy = (pod.replica.busy_seconds - pod.busy_before) / predictors
                pod.busy_before = pod.replica.busy_seconds
                pod.pending.append(pod.replica.pending)
                pod.cpu.append(min(busy, 1.0) * self.settings.cpu_limit)
                lost += pod.replica.outcome.refused + pod.replica.outcome.expired
            lost += sum(each.outcome.refused + each.outcome.expired for each in self.ended)

            self.timeline.rate.append(self.rate(now))
            self.timeline.replicas.append(len(self._ready_pods()))
            self.timeline.refused.append(lost - lost_before)
            self.timeline.p99_ms.append(self._recent_p99_ms())
            lost_before = lost
            if now >= next_sync:
                next_sync += SYNC_SECONDS
                self._scale(now)
            yield self.env.timeout(1.0)

    def _recent_p99_ms(self) -> float:
        recent: list[float] = []
        for pod in self.pods:
            recent += pod.replica.outcome.latencies[-100:]
        if not recent:
            return 0.0
        return 1e3 * sorted(recent)[int(0.99 * len(recent))]

    def _scale(self, now: float) -> None:
        metrics: list[PodMetrics] = []
        for pod in self.pods:
            age = now - pod.ready_at
            scraped = len(pod.pending.sums) - 1 - self.settings.scrape_interval / 2
            window = min(self.settings.pending_window, age) if pod.ready_at else scraped
            window = min(window, self.settings.pending_window)
            pending = pod.pending.mean(scraped - window, scraped) if window > 0 else None
            cpu = None
            if pod.ready_at == 0 or age >= CPU_YOUNG_SECONDS:
                until = len(pod.cpu.sums) - 1 - CPU_DELAY_SECONDS
                cpu = pod.cpu.mean(until - CPU_WINDOW_SECONDS, until)
            metrics.append(PodMetrics(1, pending, cpu))

        wanted = self.autoscaler.decide(now, len(self.pods), metrics)
        while len(self.pods) < wanted:
            self._start_pod(now + self.start_seconds)
        while len(self.pods) > wanted:
            # What it has accepted is still answered: the replica goes on in the simulation.
            self.ended.append(self.pods.pop().replica)


def simulate_events(
    times: ServiceTimes,
    settings: Settings,
    rate: RateFunction,
    seconds: float,
    start_seconds: float,
) -> tuple[Timeline, Outcome]:
    """Play every request of `seconds` of a load. For rates up to some thousand a second."""
    return _EventCluster(times, settings, rate, start_seconds).run(seconds)
