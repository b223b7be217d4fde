"""What the best weights say of the validation and the test part, and how good that is."""

from dataclasses import dataclass

import numpy as np
import torch

from models.bundle import ClassMetrics, Metrics
from train.data import ImageData
from train.data.pixels import pixels_of
from train.export.calibrate import ece, nll, softmax
from train.export.onnx_graph import InferenceGraph
from train.learning.test_time_augmentation import augmented_views

CONFUSION_CLASSES = 256  # the most that get a confusion matrix, whose size is the square of it


@dataclass(frozen=True)
class Scores:
    """Of one part, in the order of the data's index."""

    logits: np.ndarray  # float32 [N,K]
    labels: np.ndarray  # int64 [N]

    def without(self, rows: np.ndarray) -> "Scores":
        return Scores(np.delete(self.logits, rows, 0), np.delete(self.labels, rows))


@torch.inference_mode()
def score(
    served: InferenceGraph, data: ImageData, part: str, device: torch.device, tta: str = "none"
) -> Scores:
    """Logits of a whole part, in float32 on the device; their mean over all views with test-time augmentation."""
    served = served.to(device).eval()
    logits, labels = [], []
    for images, truth in data.whole(part):
        seen = [
            served.logits(view.permute(0, 2, 3, 1)).float()
            for view in augmented_views(images.to(device), tta)
        ]
        logits.append(torch.stack(seen).mean(0).cpu())
        labels.append(truth.cpu())
    return Scores(torch.cat(logits).numpy(), torch.cat(labels).numpy())


def metrics(scores: Scores, temperature: float) -> Metrics:
    """With the temperature applied, as the graph does."""
    logits, labels = scores.logits, scores.labels
    classes = logits.shape[1]
    predicted = logits.argmax(1)
    true, support, answered = (
        np.bincount(of, minlength=classes)
        for of in (labels[predicted == labels], labels, predicted)
    )
    precision, recall = _ratio(true, answered), _ratio(true, support)
    f1 = _ratio(2 * precision * recall, precision + recall)
    rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(1)
    return Metrics(
        images=len(labels),
        accuracy=float((predicted == labels).mean()),
        top5=float((rank < 5).mean()) if classes > 5 else None,
        nll=nll(logits, labels, temperature),
        ece=ece(softmax(logits, temperature), labels),
        confusion=_confusion(labels, predicted, classes),
        per_class=[
            ClassMetrics(precision=p, recall=r, f1=f, support=int(s))
            for p, r, f, s in zip(precision, recall, f1, support, strict=True)
        ],
    )


def _confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> list[list[int]]:
    """Images by true class and answer; nothing where the manifest would be made of little else."""
    if classes > CONFUSION_CLASSES:
        return []
    return (
        np.bincount(classes * labels + predicted, minlength=classes**2)
        .reshape(classes, classes)
        .tolist()
    )


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(len(a)), where=b > 0)


def images(data: ImageData, part: str, rows: np.ndarray) -> np.ndarray:
    """What the network is fed for some images of a part, uint8 [n,H,W,C]."""
    index = data.index[part][rows]
    if data.place != "stream":
        return np.ascontiguousarray(data.known.pixels[index])
    return np.stack([pixels_of(data.found.items, i, data.input) for i in index.tolist()])


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` rows, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most), dtype=np.int64))
