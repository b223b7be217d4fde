"""What the service counts, and where: each thread or process that counts has a small file in shared memory of its own.

A file has one writer, so counting takes no lock and costs well under a microsecond; a worker that is replaced goes on
with the file of the one before, so counters never fall. Whoever answers /metrics sums over the files.
"""

import json
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from serve.metrics import derived_metrics

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
MAX_LABELS = 100  # classes beyond so many are counted together
OTHER = "other"


class Definition(NamedTuple):
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    combine: Literal["sum", "max", "min"] = "sum"  # over processes


METRICS = {
    "requests": Definition(
        "counter", "Answers to requests for predictions, by status code.", ("code",)
    ),
    "request_duration_seconds": Definition(
        "histogram", "From the head of a request to its answer.", (), SECONDS
    ),
    "images": Definition(
        "counter",
        "Images: answered, refused (not decodable), expired, failed (lost, too).",
        ("outcome",),
    ),
    "queue_wait_seconds": Definition(
        "histogram", "From a worker's queue to a predictor.", (), SECONDS
    ),
    "decode_seconds": Definition("histogram", "Decode and resize of one image.", (), SECONDS),
    "inference_seconds": Definition("histogram", "One run of the graph on one batch.", (), SECONDS),
    "batch_size": Definition(
        "histogram", "Images in one run of the graph.", (), (1, 2, 4, 8, 16, 32, 64, 128)
    ),
    "pending_images": Definition("gauge", "Images accepted and not yet answered."),
    "rejected": Definition(
        "counter", "Requests turned away before any work, by reason.", ("reason",)
    ),
    "predictions": Definition("counter", "Predicted labels.", ("label",)),
    "confidence": Definition(
        "histogram",
        "Calibrated probability of the predicted label.",
        (),
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1),
    ),
    "abstained": Definition("counter", "Predictions below the bundle's threshold of confidence."),
    "out_of_distribution": Definition(
        "counter", "Predictions above the bundle's threshold of energy."
    ),
    "model_info": Definition(
        "gauge",
        "1 for what is served now.",
        ("name", "version", "variant", "digest"),
        combine="max",
    ),
    "ready": Definition(
        "gauge", "1 when all workers are ready and the service is not draining.", combine="min"
    ),
    "restarts": Definition(
        "counter", "Processes replaced, by reason: crash, hang.", ("process", "reason")
    ),
    "reloads": Definition(
        "counter", "New versions that a worker took (ok) or refused.", ("outcome",)
    ),
    "cache": Definition("counter", "Images looked up in the cache: hit, miss.", ("outcome",)),
    "feedback": Definition(
        "counter", "True labels: correct, wrong, unknown (no such answer).", ("outcome",)
    ),
    "feedback_window": Definition("gauge", derived_metrics.HIDDEN, ("part", "bin")),
    "drift_window": Definition("gauge", derived_metrics.HIDDEN, ("signal", "bin")),
    "drift_baseline": Definition("gauge", derived_metrics.HIDDEN, ("signal", "bin"), combine="max"),
    "shadow_images": Definition(
        "counter",
        "Images of the second version: agree, disagree, failed, dropped (no idle "
        "time), too_large (it gets no file of more than 192 KiB).",
        ("outcome",),
    ),
    "shadow_seconds": Definition(
        "histogram", "Decode and inference of one image by the second version.", (), SECONDS
    ),
    "shadow_confidence_difference": Definition(
        "histogram",
        "|difference| of the two versions' confidence.",
        (),
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1),
    ),
    "shadow_info": Definition(
        "gauge", "1 for the second version.", ("name", "version", "variant"), combine="max"
    ),
}


class SharedCounters:
    """The counting file of one writer: `used` bytes of entries (key length, key, doubles), all aligned to 8.

    It grows as its entries do. Another process may go on with the map of its shorter self: both are the same memory.
    """

    HEAD = struct.Struct("<q")

    def __init__(self, path: str, capacity: int = 1 << 16):
        self.path = path
        self.grow(capacity)
        self.slots = {(name, labels): at for name, labels, at in entries(self.map)}
        self.used = max(8, self.HEAD.unpack_from(self.map, 0)[0])

    def grow(self, capacity: int) -> None:
        with open(self.path, "a+b") as file:
            if os.fstat(file.fileno()).st_size < capacity:
                file.truncate(-(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE)
            self.map = mmap.mmap(file.fileno(), 0)
        self.values = memoryview(self.map).cast("d")

    def slot(self, name: str, *labels: str) -> int:
        """Index into `values` of a metric's first number; it is made at its first use."""
        key = (name, labels)
        if key not in self.slots:
            text = json.dumps([name, labels]).encode()
            text += b" " * (-len(text) % 8)
            size = 8 + len(text) + 8 * _numbers(METRICS[name])
            if self.used + size > len(self.map):
                self.grow(2 * (self.used + size))
            self.HEAD.pack_into(self.map, self.used, len(text))
            self.map[self.used + 8 : self.used + 8 + len(text)] = text
            self.slots[key] = (self.used + 8 + len(text)) // 8
            self.used += size
            self.HEAD.pack_into(self.map, 0, self.used)  # last: a reader sees whole entries only
        return self.slots[key]

    def add(self, name: str, *labels: str, by: float = 1) -> None:
        at = self.slot(name, *labels)  # first: it may make `values` anew
        self.values[at] += by

    def set(self, name: str, *labels: str, to: float) -> None:
        at = self.slot(name, *labels)
        self.values[at] = to

    def setter(self, name: str) -> Callable[[float], None]:
        """A function that sets this gauge."""
        at = self.slot(name)
        return lambda value: self.values.__setitem__(at, value)

    def observe(self, name: str, value: float) -> None:
        at, edges = self.slot(name), METRICS[name].buckets
        self.values[at + bisect_left(edges, value)] += 1
        self.values[at + len(edges) + 1] += value

    def observe_all(self, name: str, values: np.ndarray) -> None:
        at, edges = self.slot(name), METRICS[name].buckets
        for i, count in enumerate(
            np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1).tolist()
        ):
            if count:
                self.values[at + i] += count
        self.values[at + len(edges) + 1] += float(values.sum())


def _numbers(definition: Definition) -> int:
    """One, or for a histogram a count for each bucket, one for the rest, and the sum."""
    return len(definition.buckets) + 2 if definition.kind == "histogram" else 1


def entries(data: bytes | mmap.mmap) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Name, labels and index of the first double of each entry of a counters."""
    at, used = 8, SharedCounters.HEAD.unpack_from(data, 0)[0]
    while at < used:
        (length,) = SharedCounters.HEAD.unpack_from(data, at)
        name, labels = json.loads(data[at + 8 : at + 8 + length])
        at += 8 + length
        yield name, tuple(labels), at // 8
        at += 8 * _numbers(METRICS[name])


class Collector:
    """Sums the counter files of a run directory for prometheus_client's exposition."""

    def __init__(self, run: str):
        self.run = Path(run)

    def collect(self) -> Iterable[Metric]:
        totals: dict[str, dict[tuple[str, ...], np.ndarray]] = {name: {} for name in METRICS}
        for path in sorted(self.run.glob("*.metrics")):
            data = path.read_bytes()
            values = np.frombuffer(data, np.float64)
            for name, labels, at in entries(data):
                found = values[at : at + _numbers(METRICS[name])]
                merge = {"sum": np.add, "max": np.maximum, "min": np.minimum}[METRICS[name].combine]
                before = totals[name].get(labels)
                totals[name][labels] = found.copy() if before is None else merge(before, found)
        for name, series in totals.items():
            if METRICS[name].help != derived_metrics.HIDDEN:
                yield _family(name, METRICS[name], series)
        yield from derived_metrics.families(
            {
                name: {labels: float(numbers[0]) for labels, numbers in totals[name].items()}
                for name in derived_metrics.FROM
            }
        )


def _family(name: str, definition: Definition, series: dict[tuple[str, ...], np.ndarray]) -> Metric:
    full = f"imago_{name}"
    if definition.kind == "histogram":
        histogram = HistogramMetricFamily(full, definition.help, labels=definition.labels)
        for labels, numbers in series.items():
            edges = [*map(str, map(float, definition.buckets)), "+Inf"]
            histogram.add_metric(
                labels, list(zip(edges, numbers[:-1].cumsum(), strict=True)), float(numbers[-1])
            )
        return histogram
    make = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    family = make(full, definition.help, labels=definition.labels)
    for labels, numbers in series.items():
        if definition.combine != "max" or numbers[0]:  # a model that is served no more
            family.add_metric(labels, float(numbers[0]))
    return family


def tell_served(counters: SharedCounters, model) -> None:
    """A worker's `model_info` is 1 for this model alone, also where the worker before it served another."""
    for name, labels in list(counters.slots):
        if name == "model_info":
            counters.set(name, *labels, to=0)
    counters.set("model_info", model.name, str(model.version), model.variant, model.digest, to=1)


class WorkerMetrics:
    """What one predictor thread counts."""

    def __init__(self, path: str):
        self.counters, self.model, self.label_slots = SharedCounters(path), None, list[int]()

    def serve(self, model) -> None:
        """Count for this model from now on."""
        self.model = model
        names = [
            label if i < MAX_LABELS else OTHER for i, label in enumerate(model.manifest.classes)
        ]
        self.label_slots = [self.counters.slot("predictions", name) for name in names]
        for name in ("abstained", "out_of_distribution"):
            self.counters.slot(name)

    def batch(
        self,
        model,
        outputs: list[np.ndarray],
        queue_us: list[int],
        decode_us: list[int],
        infer: float,
    ) -> None:
        """Count a batch that was answered: probabilities [N,K] and energy [N], microseconds, seconds."""
        if model is not self.model:
            self.serve(model)
        counters, probabilities, calibration = self.counters, outputs[0], model.manifest.calibration
        counters.observe("batch_size", len(queue_us))
        counters.observe("inference_seconds", infer)
        for queue, decode in zip(queue_us, decode_us, strict=True):
            counters.observe("queue_wait_seconds", queue * 1e-6)
            counters.observe("decode_seconds", decode * 1e-6)
        confidence = probabilities.max(1)
        counters.observe_all("confidence", confidence)
        for index in probabilities.argmax(1).tolist():
            counters.values[self.label_slots[index]] += 1
        if calibration.abstain_threshold:
            counters.add("abstained", by=int((confidence < calibration.abstain_threshold).sum()))
        if calibration.energy_threshold is not None:
            counters.add(
                "out_of_distribution", by=int((outputs[1] > calibration.energy_threshold).sum())
            )
