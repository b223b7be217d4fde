"""The metrics of a worker process: predictions of each predictor thread, and the served model."""

import numpy as np

from serve.metrics.definitions import MAX_CLASS_LABELS, OTHER_LABEL
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model


def set_served_model(counters: SharedCounters, model: Model) -> None:
    """Set `model_info` to 1 for this model, and to 0 for those that this worker served before."""
    for name, labels in list(counters.slots):
        if name == "model_info":
            counters.set(name, *labels, to=0)
    counters.set("model_info", model.name, str(model.version), model.variant, model.digest, to=1)


class WorkerMetrics:
    """The counters of one predictor thread."""

    def __init__(self, path: str, model: Model):
        self.counters = SharedCounters(path)
        self.set_model(model)

    def set_model(self, model: Model) -> None:
        """Count the predictions of this model. Its series exist from now on, with value 0."""
        self.model = model
        self.label_slots: list[int] = []
        for index, label in enumerate(model.manifest.classes):
            name = label if index < MAX_CLASS_LABELS else OTHER_LABEL
            self.label_slots.append(self.counters.slot("predictions", name))
        self.counters.slot("abstained")
        self.counters.slot("out_of_distribution")

    def count_batch(
        self,
        model: Model,
        outputs: list[np.ndarray],
        queue_us: list[int],
        decode_us: list[int],
        infer_seconds: float,
    ) -> None:
        """Count a batch of answers.

        `outputs` begins with probabilities [N, K] and energy [N]; `queue_us` and `decode_us` are
        microseconds per image.
        """
        if model is not self.model:
            self.set_model(model)

        counters = self.counters
        counters.observe("batch_size", len(queue_us))
        counters.observe("inference_seconds", infer_seconds)
        for queue, decode in zip(queue_us, decode_us, strict=True):
            counters.observe("queue_wait_seconds", queue * 1e-6)
            counters.observe("decode_seconds", decode * 1e-6)

        probabilities = outputs[0]
        confidence = probabilities.max(1)
        counters.observe_all("confidence", confidence)
        for index in probabilities.argmax(1).tolist():
            counters.values[self.label_slots[index]] += 1

        calibration = model.calibration
        if calibration.abstain_threshold:
            abstained = confidence < calibration.lowest_answered_confidence
            counters.add("abstained", by=int(abstained.sum()))
        if calibration.energy_threshold is not None:
            out_of_distribution = outputs[1] > calibration.energy_threshold
            counters.add("out_of_distribution", by=int(out_of_distribution.sum()))
