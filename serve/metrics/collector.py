"""Sums the counters of all processes for prometheus_client, once per scrape, in the supervisor."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from serve.metrics import derived_metrics
from serve.metrics.definitions import METRICS, Definition
from serve.metrics.shared_counters import count_numbers, read_entries

# By `Definition.combine`.
COMBINE = {"sum": np.add, "max": np.maximum, "min": np.minimum}

# The numbers of each series of one metric, by its label values.
Series = dict[tuple[str, ...], np.ndarray]


class CounterCollector:
    """A prometheus_client collector over the counter files of a run directory."""

    def __init__(self, run_directory: str):
        self.run_directory = Path(run_directory)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the service."""
        totals = self._sum_files()

        for name, definition in METRICS.items():
            if definition.exposed:
                yield build_family(name, definition, totals[name])

        yield from derived_metrics.compute(
            drift_baseline=_first_numbers(totals["drift_baseline"]),
            drift_window=_first_numbers(totals["drift_window"]),
            feedback_window=_first_numbers(totals["feedback_window"]),
            model_info=_first_numbers(totals["model_info"]),
        )

    def _sum_files(self) -> dict[str, Series]:
        """Return the series of each metric by its name, combined over all files."""
        totals: dict[str, Series] = {name: {} for name in METRICS}
        for path in sorted(self.run_directory.glob("*.metrics")):
            data = path.read_bytes()
            values = np.frombuffer(data, np.float64)
            for name, labels, index in read_entries(data):
                definition = METRICS[name]
                series = totals[name]
                numbers = values[index : index + count_numbers(definition)]
                if labels in series:
                    series[labels] = COMBINE[definition.combine](series[labels], numbers)
                else:
                    series[labels] = numbers
        return totals


def build_family(name: str, definition: Definition, series: Series) -> Metric:
    """Return a metric with its series, as prometheus_client exposes it."""
    full_name = f"imago_{name}"

    if definition.kind == "histogram":
        histogram = HistogramMetricFamily(full_name, definition.help, labels=definition.labels)
        bounds = [str(float(bucket)) for bucket in definition.buckets]
        bounds.append("+Inf")
        for labels, numbers in series.items():
            cumulative = numbers[:-1].cumsum()
            buckets = list(zip(bounds, cumulative, strict=True))
            histogram.add_metric(labels, buckets, float(numbers[-1]))
        return histogram

    family_type = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    family = family_type(full_name, definition.help, labels=definition.labels)
    for labels, numbers in series.items():
        # An info metric of a model that is no longer served is 0. It is not shown.
        if definition.combine == "max" and numbers[0] == 0:
            continue
        family.add_metric(labels, float(numbers[0]))
    return family


def _first_numbers(series: Series) -> dict[tuple[str, ...], float]:
    return {labels: float(numbers[0]) for labels, numbers in series.items()}
