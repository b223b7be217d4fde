"""BentoML: a service with one worker and an endpoint with adaptive batching.

Images are base64 in a JSON list, since a batchable endpoint takes a list.
https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html
"""

import base64
import os
import sys
from typing import Any

import bentoml
import numpy as np

from rivals.graph import BATCH, Graph, build_answer


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class ImageService:
    """The service."""

    def __init__(self) -> None:
        self.graph = Graph()

    @bentoml.api(batchable=True, max_batch_size=BATCH, route="/predict")
    def predict(self, images: list[str]) -> list[dict[str, Any]]:
        decoded = [self.graph.decode(base64.b64decode(image)) for image in images]
        return [build_answer(row) for row in self.graph.run(np.stack(decoded))]


def run(port: int) -> None:
    """Replace this process by `bentoml serve`."""
    os.environ["BENTOML_DO_NOT_TRACK"] = "true"
    target = f"{__name__}:{ImageService.name}"
    options = ["--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", target, *options])
