"""Compose predictions as JSON from the outputs of the graph.

Used by worker processes and by `serve.model`.
"""

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from models.bundle import Calibration
from models.image import InputSpec, resize_to_input

MAX_ACTIVATION_MAP_PIXELS = 64  # longer side of a class-activation map
MAX_FLOAT16 = 65504.0


@dataclass(frozen=True)
class ClassConfidence:
    """A class and its calibrated probability."""

    label: str
    index: int
    confidence: float


@dataclass(frozen=True)
class Prediction(ClassConfidence):
    """The prediction for one image, with the fields of the service's answers."""

    top: list[ClassConfidence]  # the most likely classes, in descending order
    prediction_set: list[str]  # contains the true class with the bundle's conformal level
    abstain: bool  # the confidence is below the bundle's threshold
    out_of_distribution: bool  # the energy is above the bundle's threshold
    energy: float  # -logsumexp of the logits; high for images unlike the training data


def parse_prediction(text: str) -> Prediction:
    """Return the prediction that a composed JSON object holds."""
    members = json.loads(text)
    top = [ClassConfidence(**choice) for choice in members.pop("top")]
    return Prediction(top=top, **members)


class PredictionComposer:
    """Composes the predictions of one model.

    Labels are escaped once, since every prediction contains labels.
    """

    def __init__(self, classes: list[str], calibration: Calibration):
        self.labels = [json.dumps(label) for label in classes]
        self.class_starts = [
            f'{{"label":{label},"index":{index},"confidence":'
            for index, label in enumerate(self.labels)
        ]
        self.lowest_answered_confidence = calibration.lowest_answered_confidence
        self.energy_threshold = calibration.energy_threshold

        # A class belongs to the prediction set from this probability on; None: the set is the
        # predicted class.
        self.set_threshold: float | None = None
        if calibration.conformal_quantile is not None:
            self.set_threshold = 1 - calibration.conformal_quantile

    def compose(self, probabilities: np.ndarray, energy: np.ndarray, top_k: list[int]) -> list[str]:
        """Return one JSON object for each image, without its closing brace.

        The caller may append more keys, and closes the object.
        `probabilities` is [N, K], `energy` [N]; `top_k` holds how many classes to list for
        each image.
        """
        ranking = (-probabilities).argsort(1, kind="stable")[:, : max(top_k)].tolist()
        energies = energy.tolist()
        is_member: np.ndarray | None = None
        if self.set_threshold is not None:
            is_member = probabilities >= self.set_threshold

        predictions: list[str] = []
        for i, k in enumerate(top_k):
            top = ranking[i][:k]
            row = probabilities[i]
            values = [row.item(index) for index in top]
            confidence = values[0]
            entries = [
                f"{self.class_starts[index]}{value:.6g}}}"
                for index, value in zip(top, values, strict=True)
            ]

            members = top[:1] if is_member is None else is_member[i].nonzero()[0].tolist()
            prediction_set = ",".join([self.labels[index] for index in members])
            abstain = confidence < self.lowest_answered_confidence
            unusual = self.energy_threshold is not None and energies[i] > self.energy_threshold

            predictions.append(
                f'{self.class_starts[top[0]]}{confidence:.6g},"top":[{",".join(entries)}],'
                f'"prediction_set":[{prediction_set}],'
                f'"abstain":{"true" if abstain else "false"},'
                f'"out_of_distribution":{"true" if unusual else "false"},'
                f'"energy":{energies[i]:.6g}'
            )
        return predictions


def normalize_activations(activations: np.ndarray) -> np.ndarray:
    """Scale a class-activation map, float [h, w], to 0..1: 1 is the largest, 0 all not positive.

    Method: CAM, Zhou et al. 2016.
    """
    positive = np.maximum(activations, 0)
    return positive / max(float(positive.max()), 1e-12)


def encode_activation_map(activations: np.ndarray, spec: InputSpec) -> str:
    """Encode a class-activation map, float [h, w], as a gray PNG in base64.

    The largest activation becomes 255, and each that is not positive 0. The image has the shape of
    the network's input, scaled down if its longer side exceeds MAX_ACTIVATION_MAP_PIXELS.
    """
    gray = (normalize_activations(activations) * 255).astype(np.uint8)[:, :, None]

    scale = min(1.0, MAX_ACTIVATION_MAP_PIXELS / max(spec.height, spec.width))
    size = InputSpec(
        height=round(spec.height * scale) or 1,
        width=round(spec.width * scale) or 1,
        channels=1,
        resize="stretch",
    )
    png = cv2.imencode(".png", resize_to_input(gray, size))[1]
    return base64.b64encode(png.data).decode()


def encode_embedding_numbers(embedding: np.ndarray) -> str:
    """Encode an embedding, float32 [D], as a JSON list of numbers."""
    return f"[{','.join([f'{value:.7g}' for value in embedding.tolist()])}]"


def encode_embedding_base64(embedding: np.ndarray) -> str:
    """Encode an embedding, float32 [D], as a JSON string: little-endian float16 in base64.

    Numbers that float16 can't hold become its largest ones.
    """
    halves = np.clip(embedding, -MAX_FLOAT16, MAX_FLOAT16).astype("<f2")
    return f'"{base64.b64encode(halves.tobytes()).decode()}"'


def are_finite(outputs: Sequence[np.ndarray]) -> bool:
    """Whether outputs of the graph hold no NaN and no infinity.

    A sum of squares is finite only if each of its terms is, and takes less time than a test of each
    number. It also overflows for numbers above 1e19, which `find_finite_rows` then tests exactly.
    """
    return all(math.isfinite(np.vdot(output, output)) for output in outputs)


def find_finite_rows(outputs: Sequence[np.ndarray]) -> list[int]:
    """Return the images, rows of the outputs [N, ...], for which all numbers are finite."""
    is_finite = np.ones(len(outputs[0]), bool)
    for output in outputs:
        is_finite &= np.isfinite(output).reshape(len(output), -1).all(1)
    return is_finite.nonzero()[0].tolist()
