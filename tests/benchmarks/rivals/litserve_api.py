"""LitServe as it comes: images as base64 in JSON, batches of BATCH within BATCH_SECONDS.

It answers a raw image body with 500, and its form parser costs more than base64.
"""

import base64
from typing import Any

import litserve as ls
import numpy as np

from rivals.graph import BATCH, BATCH_SECONDS, Graph, build_answer


class ImageAPI(ls.LitAPI):
    """The API of the graph; at module level, since LitServe pickles it for its worker."""

    def setup(self, device: str) -> None:
        self.graph = Graph()

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        return self.graph.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.graph.run(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        return build_answer(output)


def run(port: int) -> None:
    api = ImageAPI(max_batch_size=BATCH, batch_timeout=BATCH_SECONDS)
    ls.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1",
        port=port,
        generate_client_file=False,
        log_level="error",
        access_log=False,
    )
