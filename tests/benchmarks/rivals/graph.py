"""What all servers share: the project's decoding, and the ONNX graph in one session on all cores.

Needs no packages but numpy, opencv-python-headless, pydantic and onnxruntime, since it runs in the
environments of other servers.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import project_path  # noqa: F401  makes the import below possible

from models.image import InputSpec, decode

CORES = len(os.sched_getaffinity(0))
BATCH = int(os.environ.get("BATCH", "16"))
"""Images; the largest batch of the servers that form batches."""
BATCH_SECONDS = float(os.environ.get("BATCH_SECONDS", "0.002"))
"""For which these servers wait for more images."""

# Paths, in variables because the servers start processes of their own.
GRAPH_VARIABLE = "RIVAL_GRAPH"
MANIFEST_VARIABLE = "RIVAL_MANIFEST"


class Graph:
    """The graph and the input of a bundle, from the variables above."""

    def __init__(self) -> None:
        manifest = json.loads(Path(os.environ[MANIFEST_VARIABLE]).read_text())
        self.spec = InputSpec.model_validate(manifest["input"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = CORES
        self.session = onnxruntime.InferenceSession(
            os.environ[GRAPH_VARIABLE], options, providers=["CPUExecutionProvider"]
        )

    def decode(self, data: bytes) -> np.ndarray:
        """Pixels of an image file, uint8 [H, W, C]."""
        return decode(data, self.spec)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Probabilities [N, K] of uint8 [N, H, W, C]."""
        return self.session.run(["probabilities"], {"image": images})[0]


def build_answer(probabilities: np.ndarray) -> dict[str, Any]:
    """The answer to one image, of probabilities [K]."""
    index = int(probabilities.argmax())
    return {"label": index, "confidence": float(probabilities[index])}
