"""Evaluation of the best weights on the validation and the test part, and images of a part."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.bundle import ClassMetrics, Metrics
from train.data import ImageData
from train.data.pixels import read_pixels
from train.export.calibrate import expected_calibration_error
from train.export.onnx_graph import InferenceGraph
from train.export.scores import Scores, negative_log_likelihood, softmax
from train.export.steps import Advance, ignore_progress
from train.learning.test_time_augmentation import TestTimeAugmentation, augmented_views

MAX_CONFUSION_CLASSES = 256  # the matrix grows with the square of the classes
LISTED_CLASSES = 10  # classes that a warning names


@dataclass(frozen=True)
class PartScores:
    """Scores of the parts that a model is evaluated on."""

    val: Scores
    test: Scores
    test_augmented: Scores | None  # with test-time augmentation, where the recipe asks for it
    unleaked_test_rows: np.ndarray  # int64, see `find_unleaked_rows`

    @property
    def unleaked_test(self) -> Scores:
        """The scores that the bundle's test figures come from."""
        return self.test.take(self.unleaked_test_rows)


def find_unleaked_rows(images: int, leaked_rows: np.ndarray) -> np.ndarray:
    """Return the rows of a part that have no duplicate in another part, int64.

    Where every image has one, no row is left to measure anything on, so all rows are returned.
    """
    rows = np.delete(np.arange(images), leaked_rows)
    return rows if len(rows) else np.arange(images)


def evaluate_parts(
    graph: InferenceGraph,
    data: ImageData,
    device: torch.device,
    tta: TestTimeAugmentation,
    advance: Advance,
) -> PartScores:
    """Score the validation and the test part in float32 on the device."""
    val = score_part(graph, data, "val", device, advance)
    test = score_part(graph, data, "test", device, advance)
    test_augmented = None
    if tta != "none":
        test_augmented = score_part(graph, data, "test", device, tta=tta)
    unleaked_rows = find_unleaked_rows(len(test.labels), data.leaked_test_rows)
    return PartScores(val, test, test_augmented, unleaked_rows)


@torch.inference_mode()
def score_part(
    graph: InferenceGraph,
    data: ImageData,
    part: str,
    device: torch.device,
    advance: Advance = ignore_progress,
    tta: TestTimeAugmentation = "none",
) -> Scores:
    """Return the logits of a whole part; with test-time augmentation their mean over its views."""
    graph = graph.to(device).eval()
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for images, image_labels in data.unsharded_dataloader(part):
        view_logits: list[Tensor] = []
        for view in augmented_views(images.to(device), tta):
            view_logits.append(graph.logits(view.permute(0, 2, 3, 1)).float())
        logits.append(torch.stack(view_logits).mean(0).cpu())
        labels.append(image_labels.cpu())
        advance(len(images))
    return Scores(torch.cat(logits).numpy(), torch.cat(labels).numpy())


def compute_all_metrics(scores: PartScores, temperature: float) -> dict[str, Metrics]:
    """Return the metrics by part, as the manifest keeps them.

    `test_unleaked` leaves out the test images that have a duplicate in another part. `test_tta` is
    with test-time augmentation and leaves them out, too.
    """
    scores_by_part = {"val": scores.val, "test": scores.test}
    if len(scores.unleaked_test_rows) < len(scores.test.labels):
        scores_by_part["test_unleaked"] = scores.unleaked_test
    if scores.test_augmented is not None:
        scores_by_part["test_tta"] = scores.test_augmented.take(scores.unleaked_test_rows)
    return {part: compute_metrics(each, temperature) for part, each in scores_by_part.items()}


def compute_metrics(scores: Scores, temperature: float) -> Metrics:
    """Return the metrics of one part, with the temperature applied as in the graph."""
    logits = scores.logits
    labels = scores.labels
    classes = logits.shape[1]
    predicted = logits.argmax(1)

    images_of_class = np.bincount(labels, minlength=classes)
    predicted_as_class = np.bincount(predicted, minlength=classes)
    true_positives = np.bincount(labels[predicted == labels], minlength=classes)
    precision = _divide(true_positives, predicted_as_class)
    recall = _divide(true_positives, images_of_class)
    f1 = _divide(2 * precision * recall, precision + recall)

    per_class: list[ClassMetrics] = []
    for k in range(classes):
        per_class.append(
            ClassMetrics(
                precision=precision[k], recall=recall[k], f1=f1[k], support=int(images_of_class[k])
            )
        )

    top5 = None
    if classes > 5:
        true_logits = logits[np.arange(len(labels)), labels]
        rank = (logits > true_logits[:, None]).sum(1)
        top5 = float((rank < 5).mean())

    return Metrics(
        images=len(labels),
        accuracy=float((predicted == labels).mean()),
        balanced_accuracy=float(recall[images_of_class > 0].mean()),
        majority_accuracy=float(images_of_class.max() / len(labels)),
        top5=top5,
        nll=negative_log_likelihood(logits, labels, temperature),
        ece=expected_calibration_error(softmax(logits, temperature), labels),
        confusion=_confusion_matrix(labels, predicted, classes),
        per_class=per_class,
    )


def describe_weak_classes(metrics: Metrics, classes: list[str]) -> list[str]:
    """Return warnings on what the accuracy hides where the classes are unequal."""
    warnings: list[str] = []
    missed: list[str] = []
    for name, each in zip(classes, metrics.per_class, strict=True):
        if each.support and not each.recall:
            missed.append(f"{name} ({each.support})")
    if missed:
        listed = ", ".join(missed[:LISTED_CLASSES])
        if len(missed) > LISTED_CLASSES:
            listed += f" and {len(missed) - LISTED_CLASSES} more"
        warnings.append(
            f"WARNING: no test image of these classes is recognized: {listed}; add images of them"
        )

    majority = metrics.majority_accuracy
    if majority is not None and metrics.accuracy <= majority:
        warnings.append(
            f"WARNING: {metrics.accuracy:.1%} of the test images are classified correctly; always "
            f"predicting the largest class is no worse ({majority:.1%})"
        )
    return warnings


def _confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> list[list[int]]:
    """Return images by true and predicted class; empty with many classes."""
    if classes > MAX_CONFUSION_CLASSES:
        return []
    counts = np.bincount(classes * labels + predicted, minlength=classes**2)
    return counts.reshape(classes, classes).tolist()


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(len(a)), where=b > 0)


def load_images(data: ImageData, part: str, rows: np.ndarray) -> np.ndarray:
    """Return the network's input for these rows of a part, uint8 [n,H,W,C]."""
    index = data.index[part][rows]
    if data.storage != "stream":
        return np.ascontiguousarray(data.decoded.pixels[index])
    return np.stack(
        [read_pixels(data.dataset.items, i, data.input, data.max_pixels) for i in index.tolist()]
    )


def evenly_spaced_rows(count: int, limit: int) -> np.ndarray:
    """Return at most `limit` of `count` rows, evenly spaced, int64."""
    return np.unique(np.linspace(0, count - 1, min(count, limit), dtype=np.int64))
