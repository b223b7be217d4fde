"""The algorithm of the HorizontalPodAutoscaler, with the settings that k8s/ ships.

Written after the controller of Kubernetes 1.33 (pkg/controller/podautoscaler): every 15 seconds
each metric proposes a number of replicas, the largest proposal counts, and the rules of `behavior`
bound the change. Pods without a value count as idle when replicas are added and as busy when they
are removed. KEDA creates such an autoscaler, with the defaults of Kubernetes where its ScaledObject
sets nothing, and with the sum over all pods as an external metric.
"""

import math
import re
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from project_path import ROOT

COMPONENTS = ROOT / "k8s/components"
SYNC_SECONDS = 15
"""Between two decisions (--horizontal-pod-autoscaler-sync-period)."""
TOLERANCE = 0.1
"""Of a ratio between a metric and its target that changes nothing."""
SCRAPE_FALLBACK_SECONDS = 15

# What Kubernetes takes where `behavior` says nothing.
DEFAULT_SCALE_UP: dict[str, Any] = {
    "stabilizationWindowSeconds": 0,
    "policies": [
        {"type": "Percent", "value": 100, "periodSeconds": 15},
        {"type": "Pods", "value": 4, "periodSeconds": 15},
    ],
}
DEFAULT_SCALE_DOWN: dict[str, Any] = {
    "stabilizationWindowSeconds": 300,
    "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
}


@dataclass(frozen=True)
class Policy:
    """How many replicas a direction may change within a period."""

    is_percent: bool
    value: int
    period: int
    """Seconds."""


@dataclass(frozen=True)
class Rules:
    """The `scaleUp` or `scaleDown` of a `behavior`."""

    window: int
    """Seconds over which the most cautious proposal counts."""
    policies: tuple[Policy, ...]

    @classmethod
    def parse(cls, direction: dict[str, Any], defaults: dict[str, Any]) -> "Rules":
        policies: list[Policy] = []
        for policy in direction.get("policies", defaults["policies"]):
            is_percent = policy["type"] == "Percent"
            policies.append(Policy(is_percent, policy["value"], policy["periodSeconds"]))
        key = "stabilizationWindowSeconds"
        return cls(direction.get(key, defaults[key]), tuple(policies))


@dataclass(frozen=True)
class Settings:
    """What a manifest asks for."""

    name: str
    least: int
    most: int
    pending_target: float
    """Images that are accepted and not yet answered, of a replica."""
    pending_window: int
    """Seconds over which Prometheus averages them."""
    scrape_interval: int
    """Seconds."""
    cpu_target: float
    """Cores of a replica."""
    cpu_limit: float
    """Cores of a replica."""
    is_external: bool
    """Whether the pending images come as one sum, as from KEDA, and not for each pod."""
    up: Rules
    down: Rules

    def with_limits(self, least: int, most: int) -> "Settings":
        """The same settings between other numbers of replicas."""
        return replace(self, least=least, most=most)


def load_hpa(components: Path = COMPONENTS) -> Settings:
    """Read the settings of the component `hpa`, and of the rules for prometheus-adapter."""
    spec = _load_yaml(components / "hpa/hpa.yaml")["spec"]
    adapter = _load_yaml(components / "hpa/prometheus-adapter-values.yaml")
    pending, cpu = spec["metrics"]
    behavior = spec.get("behavior", {})
    return Settings(
        name="hpa",
        least=spec["minReplicas"],
        most=spec["maxReplicas"],
        pending_target=float(pending["pods"]["target"]["averageValue"]),
        pending_window=_parse_window(adapter["rules"]["custom"][0]["metricsQuery"]),
        scrape_interval=_load_scrape_interval(components),
        cpu_target=_parse_cores(cpu["containerResource"]["target"]["averageValue"]),
        cpu_limit=_load_cpu_limit(components),
        is_external=False,
        up=Rules.parse(behavior.get("scaleUp", {}), DEFAULT_SCALE_UP),
        down=Rules.parse(behavior.get("scaleDown", {}), DEFAULT_SCALE_DOWN),
    )


def load_keda(components: Path = COMPONENTS) -> Settings:
    """Read the settings of the component `keda`."""
    spec = _load_yaml(components / "keda/scaledobject.yaml")["spec"]
    pending, cpu = spec["triggers"]
    advanced = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {})
    behavior = advanced.get("behavior", {})
    return Settings(
        name="keda",
        least=spec["minReplicaCount"],
        most=spec["maxReplicaCount"],
        pending_target=float(pending["metadata"]["threshold"]),
        pending_window=_parse_window(pending["metadata"]["query"]),
        scrape_interval=_load_scrape_interval(components),
        cpu_target=_parse_cores(cpu["metadata"]["value"]),
        cpu_limit=_load_cpu_limit(components),
        is_external=True,
        up=Rules.parse(behavior.get("scaleUp", {}), DEFAULT_SCALE_UP),
        down=Rules.parse(behavior.get("scaleDown", {}), DEFAULT_SCALE_DOWN),
    )


def _load_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def _load_cpu_limit(components: Path) -> float:
    deployment = _load_yaml(components.parent / "base/serving/deployment.yaml")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    return _parse_cores(container["resources"]["limits"]["cpu"])


def _load_scrape_interval(components: Path) -> int:
    monitor = _load_yaml(components / "pod-monitor/podmonitor.yaml")
    endpoint = monitor["spec"]["podMetricsEndpoints"][0]
    return _parse_duration(endpoint.get("interval", f"{SCRAPE_FALLBACK_SECONDS}s"))


def _parse_window(query: str) -> int:
    """Seconds of the range in a query such as `avg_over_time(x[1m])`."""
    match = re.search(r"\[(\w+)\]", query)
    assert match is not None, f"no range in {query}"
    return _parse_duration(match[1])


def _parse_duration(text: str) -> int:
    return int(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def _parse_cores(text: str) -> float:
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


@dataclass(frozen=True)
class PodMetrics:
    """The metrics of pods that started at the same time."""

    count: int
    pending: float | None
    """Images of each pod, averaged over the window; None while there is no sample."""
    cpu: float | None
    """Cores of each pod; None while the pod is too young."""


class Autoscaler:
    """Decides on the number of replicas. `decide` is called every SYNC_SECONDS."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.proposals: deque[tuple[float, int]] = deque()  # time and replicas
        self.changes: deque[tuple[float, int]] = deque()  # time and replicas added or removed

    def decide(self, now: float, replicas: int, pods: list[PodMetrics]) -> int:
        """Return the number of replicas from now on.

        `replicas` is the number that is set; `pods` are those that run, ready or not.
        """
        cpu_proposal = self._propose_by_average(replicas, pods, "cpu", self.settings.cpu_target)
        if self.settings.is_external:
            pending_proposal = self._propose_by_sum(replicas, pods)
        else:
            pending_proposal = self._propose_by_average(
                replicas, pods, "pending", self.settings.pending_target
            )
        proposal = max(cpu_proposal, pending_proposal)
        proposal = min(max(proposal, self.settings.least), self.settings.most)

        wanted = self._stabilize(now, replicas, proposal)
        wanted = self._limit_rate(now, replicas, wanted)
        wanted = min(max(wanted, self.settings.least), self.settings.most)
        if wanted != replicas:
            self.changes.append((now, wanted - replicas))
        longest = max(
            policy.period for policy in self.settings.up.policies + self.settings.down.policies
        )
        while self.changes and self.changes[0][0] <= now - longest:
            self.changes.popleft()
        return wanted

    def _propose_by_average(
        self, replicas: int, pods: list[PodMetrics], metric: str, target: float
    ) -> int:
        values: list[tuple[int, float]] = []
        for pod in pods:
            value = getattr(pod, metric)
            if value is not None:
                values.append((pod.count, value))
        measured = sum(count for count, _ in values)
        if measured == 0:
            return replicas

        total = sum(count * value for count, value in values)
        ratio = total / measured / target
        missing = max(replicas - measured, 0)
        if missing == 0:
            return replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(ratio * measured)
        if abs(ratio - 1) <= TOLERANCE:
            return replicas

        assumed = 0.0 if ratio > 1 else target
        new_ratio = (total + missing * assumed) / replicas / target
        if abs(new_ratio - 1) <= TOLERANCE or (new_ratio > 1) != (ratio > 1):
            return replicas
        proposal = math.ceil(new_ratio * replicas)
        has_reversed = (ratio > 1 and proposal < replicas) or (ratio < 1 and proposal > replicas)
        return replicas if has_reversed else proposal

    def _propose_by_sum(self, replicas: int, pods: list[PodMetrics]) -> int:
        total = sum(pod.count * (pod.pending or 0.0) for pod in pods)
        ratio = total / (self.settings.pending_target * replicas)
        if abs(ratio - 1) <= TOLERANCE:
            return replicas
        return math.ceil(total / self.settings.pending_target)

    def _stabilize(self, now: float, replicas: int, proposal: int) -> int:
        """The most cautious proposal within the windows."""
        settings = self.settings
        if not self.proposals:
            self.proposals.append((now, replicas))  # as the controller does when it starts
        self.proposals.append((now, proposal))
        longest = max(settings.up.window, settings.down.window)
        while self.proposals[0][0] < now - longest:
            self.proposals.popleft()

        lowest = proposal
        highest = proposal
        for time, proposed in self.proposals:
            if time > now - settings.up.window:
                lowest = min(lowest, proposed)
            if time > now - settings.down.window:
                highest = max(highest, proposed)
        if replicas < lowest:
            return lowest
        if replicas > highest:
            return highest
        return replicas

    def _limit_rate(self, now: float, replicas: int, wanted: int) -> int:
        if wanted > replicas:
            limits = [
                self._upper_limit(now, replicas, policy) for policy in self.settings.up.policies
            ]
            return min(wanted, max(limits))
        if wanted < replicas:
            limits = [
                self._lower_limit(now, replicas, policy) for policy in self.settings.down.policies
            ]
            return max(wanted, min(limits))
        return wanted

    def _upper_limit(self, now: float, replicas: int, policy: Policy) -> int:
        start = replicas - self._sum_changes(now, policy.period)
        if policy.is_percent:
            return math.ceil(start * (1 + policy.value / 100))
        return start + policy.value

    def _lower_limit(self, now: float, replicas: int, policy: Policy) -> int:
        start = replicas - self._sum_changes(now, policy.period)
        if policy.is_percent:
            return int(start * (1 - policy.value / 100))
        return start - policy.value

    def _sum_changes(self, now: float, period: int) -> int:
        """Replicas added, less those removed, within the last `period` seconds."""
        return sum(change for time, change in self.changes if time > now - period)
