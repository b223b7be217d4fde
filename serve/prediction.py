"""Outputs of the graph to predictions as JSON, ready to be put into an answer."""

import base64
import json

import cv2
import numpy as np

from models.bundle import Manifest
from models.image import InputSpec, resize_to_input

MAP_SIDE = 64  # pixels of a heat map's longer side, at most


class Answers:
    """Composes predictions for one model. Labels are escaped once, since each answer repeats them."""

    def __init__(self, manifest: Manifest):
        calibration = manifest.calibration
        self.labels = [json.dumps(label) for label in manifest.classes]
        self.starts = [
            f'{{"label":{label},"index":{i},"confidence":' for i, label in enumerate(self.labels)
        ]
        self.abstain_below = calibration.abstain_threshold
        self.in_set_above = (
            None if calibration.conformal_quantile is None else 1 - calibration.conformal_quantile
        )
        self.energy_above = calibration.energy_threshold

    def compose(self, probabilities: np.ndarray, energy: np.ndarray, top_k: list[int]) -> list[str]:
        """[N,K], [N] and how many classes each image wants listed, to N JSON objects without their closing brace.

        The open end is where a caller appends what only some answers have, such as a heat map.
        """
        order = (-probabilities).argsort(1, kind="stable")[:, : max(top_k)].tolist()
        sets = (
            [None] * len(order) if self.in_set_above is None else probabilities >= self.in_set_above
        )
        composed = []
        for row, indices, members, free, k in zip(
            probabilities, order, sets, energy.tolist(), top_k, strict=True
        ):
            values = [row.item(i) for i in indices[:k]]
            top = ",".join(
                [f"{self.starts[i]}{p:.6g}}}" for i, p in zip(indices, values, strict=False)]
            )
            chosen = indices[:1] if members is None else members.nonzero()[0].tolist()
            unusual = self.energy_above is not None and free > self.energy_above
            composed.append(
                f'{self.starts[indices[0]]}{values[0]:.6g},"top":[{top}],'
                f'"prediction_set":[{",".join([self.labels[i] for i in chosen])}],'
                f'"abstain":{"true" if values[0] < self.abstain_below else "false"},'
                f'"out_of_distribution":{"true" if unusual else "false"},"energy":{free:.6g}'
            )
        return composed


def heat_map(cam: np.ndarray, spec: InputSpec) -> str:
    """What spoke for one class, float [h,w], to a gray PNG in base64: 255 where most did, 0 where nothing did.

    Its shape is that of the network's input, at most `MAP_SIDE` pixels long.
    """
    positive = np.maximum(cam, 0)
    gray = (positive * (255 / max(float(positive.max()), 1e-12))).astype(np.uint8)[:, :, None]
    scale = min(1.0, MAP_SIDE / max(spec.height, spec.width))
    size = InputSpec(
        height=round(spec.height * scale) or 1,
        width=round(spec.width * scale) or 1,
        channels=1,
        resize="stretch",
    )
    return base64.b64encode(cv2.imencode(".png", resize_to_input(gray, size))[1].data).decode()
