"""The servers that serve_speed.py compares with: LitServe as it comes, FastAPI with onnxruntime.

    python serve_rivals.py litserve|fastapi MODEL.onnx PORT MANIFEST.json

Both decode with the project's own code and run the same graph on all cores with one session.
FastAPI takes the raw bytes, LitServe base64 in JSON: it answers a raw image body with 500, and its
form parser costs more. The variables BATCH (16) and BATCH_SECONDS (0.002) set LitServe's
max_batch_size and batch_timeout.
"""

import base64
import os
import sys
from pathlib import Path
from typing import Any

import litserve as ls
import numpy as np
import project_path  # noqa: F401  makes the imports below possible

from models.bundle import read_manifest
from models.image import InputSpec, decode


class Graph:
    """The ONNX graph with a session over all cores."""

    def __init__(self, path: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities [N, K] of uint8 [N, H, W, C]."""
        return self.session.run(["probabilities"], {"image": images})[0]


def build_answer(probabilities: np.ndarray) -> dict[str, float]:
    index = int(probabilities.argmax())
    return {"label": index, "confidence": float(probabilities[index])}


class ImageAPI(ls.LitAPI):
    """LitServe's API of the graph; at module level, since LitServe pickles it for its worker."""

    def __init__(self, path: str, spec: InputSpec, **options: Any) -> None:
        super().__init__(**options)
        self.path = path
        self.input_spec = spec

    def setup(self, device: str) -> None:
        self.graph = Graph(self.path)

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        return decode(base64.b64decode(request["image"]), self.input_spec)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.graph(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, float]:
        return build_answer(output)


def run_litserve(path: str, port: int, spec: InputSpec) -> None:
    api = ImageAPI(
        path,
        spec,
        max_batch_size=int(os.environ.get("BATCH", "16")),
        batch_timeout=float(os.environ.get("BATCH_SECONDS", "0.002")),
    )
    ls.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1",
        port=port,
        generate_client_file=False,
        log_level="error",
        access_log=False,
    )


def run_fastapi(path: str, port: int, spec: InputSpec) -> None:
    import uvicorn
    from fastapi import FastAPI, Request
    from starlette.concurrency import run_in_threadpool

    app = FastAPI()
    graph = Graph(path)

    def predict(body: bytes) -> dict[str, float]:
        images = decode(body, spec)[None]
        return build_answer(graph(images)[0])

    @app.post("/predict")
    async def predict_endpoint(request: Request) -> dict:
        return await run_in_threadpool(predict, await request.body())

    @app.get("/health")
    async def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


RIVALS = {"litserve": run_litserve, "fastapi": run_fastapi}


def main() -> None:
    kind, graph, port, manifest = sys.argv[1:]
    spec = read_manifest(Path(manifest).parent).input
    RIVALS[kind](graph, int(port), spec)


if __name__ == "__main__":
    main()
