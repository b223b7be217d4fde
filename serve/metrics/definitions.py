"""The metrics that the service counts: their types, help texts, labels and buckets.

All processes of the service use these definitions. Metrics that are computed during a scrape are in
`serve.metrics.derived_metrics`.
"""

from typing import Literal, NamedTuple

DURATION_BUCKETS_SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
)
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
DIFFERENCE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)

MAX_CLASS_LABELS = 100  # classes after these share the label OTHER_LABEL
OTHER_LABEL = "other"

FEEDBACK_BINS = 15  # of confidence, equally wide, as in the bundle's calibration error


class Definition(NamedTuple):
    """One metric. Its Prometheus name is `imago_<name>`."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    # How the values of several processes become one.
    combine: Literal["sum", "max", "min"] = "sum"
    # False if /metrics does not show it, but another metric that is computed from it.
    exposed: bool = True


def _counter(help: str, *labels: str) -> Definition:
    return Definition("counter", help, labels)


def _histogram(help: str, buckets: tuple[float, ...]) -> Definition:
    return Definition("histogram", help, buckets=buckets)


METRICS: dict[str, Definition] = {
    # Requests and images
    "requests": _counter("Responses to prediction requests, by status code.", "code"),
    "request_duration_seconds": _histogram(
        "Time from the head of a request to its response.", DURATION_BUCKETS_SECONDS
    ),
    "images": _counter(
        "Images by outcome: answered, refused (not decodable), expired, "
        "failed (including those of a lost worker).",
        "outcome",
    ),
    "pending_images": Definition("gauge", "Images accepted and not yet answered."),
    "rejected": _counter("Requests rejected before any work was done, by reason.", "reason"),
    # Steps of a prediction
    "queue_wait_seconds": _histogram(
        "Time an image waits in a worker's queue.", DURATION_BUCKETS_SECONDS
    ),
    "decode_seconds": _histogram("Time to decode and resize one image.", DURATION_BUCKETS_SECONDS),
    "inference_seconds": _histogram(
        "Time to run the graph on one batch.", DURATION_BUCKETS_SECONDS
    ),
    "batch_size": _histogram("Images in one run of the graph.", BATCH_SIZE_BUCKETS),
    # Predictions
    "predictions": _counter("Predictions by label.", "label"),
    "confidence": _histogram("Calibrated probability of the predicted label.", CONFIDENCE_BUCKETS),
    "abstained": _counter("Predictions whose confidence is below the bundle's threshold."),
    "out_of_distribution": _counter("Predictions whose energy is above the bundle's threshold."),
    # State of the service
    "model_info": Definition(
        "gauge",
        "1 for the model that is served.",
        ("name", "version", "variant", "digest"),
        combine="max",
    ),
    "ready": Definition(
        "gauge", "1 when all workers are ready and the service is not draining.", combine="min"
    ),
    "store_reachable": Definition(
        "gauge",
        "1 while the store answers; 0 while the service runs on what it has.",
        combine="min",
    ),
    "restarts": _counter("Processes replaced, by reason: crash, hang.", "process", "reason"),
    "reloads": _counter("New versions that a worker loaded (ok) or refused.", "outcome"),
    "cache": _counter("Images looked up in the answer cache: hit, miss.", "outcome"),
    # Feedback and drift; the windows become metrics in serve.metrics.derived_metrics
    "feedback": _counter("True labels: correct, wrong, unknown (no such answer).", "outcome"),
    "feedback_window": Definition(
        "gauge", "Last labels, by bin of confidence.", ("part", "bin"), exposed=False
    ),
    "drift_window": Definition("gauge", "Last images, by bin.", ("signal", "bin"), exposed=False),
    "drift_baseline": Definition(
        "gauge",
        "Baseline of the bundle, by bin.",
        ("signal", "bin"),
        combine="max",
        exposed=False,
    ),
    # Kept images
    "kept": _counter("Images kept for labelling, by reason; one may have several.", "reason"),
    "kept_dropped": _counter(
        "Images selected and not kept: duplicate, limit (files a day, bytes), disk (too little "
        "free), queue (too many at once), error, metadata (could not be taken out).",
        "reason",
    ),
    "kept_bytes": Definition("gauge", "Bytes of all kept images, as last counted.", combine="max"),
    # Shadow version
    "shadow_images": _counter(
        "Images of the shadow version: agree, disagree, failed, dropped (no idle time), "
        "too_large (files above 192 KiB are not sent to it).",
        "outcome",
    ),
    "shadow_seconds": _histogram(
        "Time to decode one image and run the shadow version on it.", DURATION_BUCKETS_SECONDS
    ),
    "shadow_confidence_difference": _histogram(
        "Absolute difference between the confidences of the two versions.", DIFFERENCE_BUCKETS
    ),
    "shadow_info": Definition(
        "gauge", "1 for the shadow version.", ("name", "version", "variant"), combine="max"
    ),
}
