"""A replica of the service as a discrete-event simulation (SimPy).

What is modelled is what the service does: requests beyond `max_pending` images are refused; each
image goes to the worker with the fewest images; a free predictor takes its share of the queue, at
most `max_batch_size`, and is busy for the time that was measured for that batch; images that waited
longer than the deadline are dropped. Times are drawn around the measured mean with the spread that
was measured without load.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import simpy

DEFAULT_MAX_PENDING = 256
DEFAULT_DEADLINE_SECONDS = 10.0


@dataclass(frozen=True)
class ServiceTimes:
    """What a replica takes for its work, and its limits."""

    fixed_ms: float
    """Of a batch, whatever its size, while other batches run."""
    image_ms: float
    """Of each image of a batch, while other batches run."""
    alone_ms: float
    """Of a single image while nothing else runs: all cores work on it."""
    overhead_ms: float
    """Of a request before and after its batch: HTTP, and the way between the processes."""
    spread: tuple[float, ...] = (1.0,)
    """Durations divided by their mean; one is drawn for each batch."""
    workers: int = 1
    predictors: int = 1
    """Batches that run at the same time in a worker."""
    max_batch_size: int = 8
    max_pending: int = DEFAULT_MAX_PENDING
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS

    def batch_seconds(self, size: int, is_alone: bool) -> float:
        """Mean duration of a batch of `size` images."""
        loaded = self.fixed_ms + self.image_ms * size
        return 1e-3 * (min(self.alone_ms, loaded) if is_alone and size == 1 else loaded)

    @property
    def capacity(self) -> float:
        """Images per second of a replica whose batches are full."""
        duration = self.batch_seconds(self.max_batch_size, False)
        return self.workers * self.predictors * self.max_batch_size / duration

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> "ServiceTimes":
        """The times in what `capacity_plan.py measure` prints. Raises ValueError without any."""
        try:
            values = dict(entry["service"])
            values["spread"] = tuple(values["spread"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no service times in the file: {error!r}") from None

    def as_json(self) -> dict[str, Any]:
        """Values for a JSON file."""
        return asdict(self)


@dataclass
class Outcome:
    """What happened to the requests of a simulation."""

    latencies: list[float] = field(default_factory=list)
    """Seconds, of the answered requests."""
    refused: int = 0
    """Status 429."""
    expired: int = 0
    """Status 504."""

    @property
    def offered(self) -> int:
        return len(self.latencies) + self.refused + self.expired

    @property
    def lost_share(self) -> float:
        """Refused and expired requests, as a share of all."""
        return (self.refused + self.expired) / max(self.offered, 1)

    def latency_ms(self, quantile: float) -> float:
        """The `quantile` (0 to 1) of the latencies; infinite where nothing was answered."""
        if not self.latencies:
            return float("inf")
        ordered = sorted(self.latencies)
        return 1e3 * ordered[min(int(quantile * len(ordered)), len(ordered) - 1)]


class _Worker:
    """The queue of a worker process and its predictors."""

    def __init__(self, replica: "Replica") -> None:
        self.replica = replica
        self.queue: deque[float] = deque()  # times at which images arrived
        self.running = 0  # images in batches
        self.free = replica.times.predictors
        self.wakers: deque[simpy.Event] = deque()
        for _ in range(replica.times.predictors):
            replica.env.process(self._run_predictor())

    @property
    def images(self) -> int:
        return len(self.queue) + self.running

    def add(self, arrived: float) -> None:
        self.queue.append(arrived)
        if self.wakers:
            self.wakers.popleft().succeed()

    def _run_predictor(self) -> Iterator[simpy.Event]:
        env = self.replica.env
        while True:
            while not self.queue:
                waker = env.event()
                self.wakers.append(waker)
                yield waker

            batch, is_alone = self._take_batch()
            if not batch:
                continue

            self.free -= 1
            self.running += len(batch)
            duration = self.replica.draw_seconds(len(batch), is_alone)
            self.replica.busy_seconds += duration
            yield env.timeout(duration)

            self.running -= len(batch)
            self.free += 1
            self.replica.finish(batch)

    def _take_batch(self) -> tuple[list[float], bool]:
        times = self.replica.times
        share = -(-len(self.queue) // max(self.free, 1))
        size = min(times.max_batch_size, share)
        jobs = [self.queue.popleft() for _ in range(size)]
        is_alone = self.free == times.predictors and not self.queue

        oldest = self.replica.env.now - times.deadline_seconds
        alive = [arrived for arrived in jobs if arrived >= oldest]
        self.replica.expire(len(jobs) - len(alive))
        return alive, is_alone


class Replica:
    """A pod of the service."""

    def __init__(
        self, env: simpy.Environment, times: ServiceTimes, generator: random.Random
    ) -> None:
        self.env = env
        self.times = times
        self.generator = generator
        self.outcome = Outcome()
        self.pending = 0
        self.busy_seconds = 0.0
        """Of all predictors together, since the start."""
        self.workers = [_Worker(self) for _ in range(times.workers)]

    def request(self) -> None:
        """Take a request, or refuse it."""
        if self.pending >= self.times.max_pending:
            self.outcome.refused += 1
            return
        self.pending += 1
        min(self.workers, key=lambda worker: worker.images).add(self.env.now)

    def draw_seconds(self, size: int, is_alone: bool) -> float:
        mean = self.times.batch_seconds(size, is_alone)
        return mean * self.generator.choice(self.times.spread)

    def expire(self, count: int) -> None:
        self.pending -= count
        self.outcome.expired += count

    def finish(self, batch: list[float]) -> None:
        self.pending -= len(batch)
        overhead = 1e-3 * self.times.overhead_ms
        for arrived in batch:
            self.outcome.latencies.append(self.env.now - arrived + overhead)


def simulate_replica(times: ServiceTimes, rate: float, requests: int, seed: int = 0) -> Outcome:
    """Offer a Poisson process of `rate` requests per second to one replica.

    A Service of Kubernetes spreads connections at random, and a Poisson process that is split at
    random is one again: so a replica of N at rate R sees what one sees at R / N.
    """
    env = simpy.Environment()
    generator = random.Random(seed)
    replica = Replica(env, times, generator)

    def send_requests() -> Iterator[simpy.Event]:
        for _ in range(requests):
            yield env.timeout(generator.expovariate(rate))
            replica.request()

    env.process(send_requests())
    env.run()
    return replica.outcome


def find_smallest(is_enough: Callable[[int], bool], low: int, high: int) -> int:
    """The least number in low..high for which `is_enough`, which is monotonic."""
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


def plan_replicas(times: ServiceTimes, rate: float, p99_ms: float, requests: int) -> int:
    """Replicas that answer `rate` requests per second, each one, with this p99.

    Raises ValueError where even an idle replica is slower.
    """

    def is_enough(replicas: int) -> bool:
        outcome = simulate_replica(times, rate / replicas, requests)
        return outcome.lost_share == 0 and outcome.latency_ms(0.99) <= p99_ms

    least = max(int(rate / times.capacity), 1)
    most = 64 * least + 64
    if not is_enough(most):
        raise ValueError(
            f"no number of replicas has a p99 of {p99_ms:g} ms: one image alone takes "
            f"{times.alone_ms + times.overhead_ms:.1f} ms; allow more, or take a smaller network"
        )
    return find_smallest(is_enough, least, most)
