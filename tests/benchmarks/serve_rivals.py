"""What the service is compared with, over HTTP: LitServe as it comes, and plain FastAPI with onnxruntime.

    python serve_rivals.py litserve|fastapi MODEL.onnx PORT MANIFEST.json

Both decode with the project's own code and run the same graph on all cores, one session. FastAPI takes the raw bytes,
LitServe base64 in JSON: a raw image body is a 500 there, and its form parser costs more. The environment's BATCH (16)
and BATCH_SECONDS (0.002) are LitServe's max_batch_size and batch_timeout.
"""

import base64
import os
import sys
from pathlib import Path

import litserve as ls
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from models.bundle import read_manifest  # noqa: E402
from models.image import InputSpec, decode  # noqa: E402


class Graph:
    def __init__(self, path: str, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(["probabilities"], {"image": images})[0]


def answer(row: np.ndarray) -> dict:
    index = int(row.argmax())
    return {"label": index, "confidence": float(row[index])}


class LitApi(ls.LitAPI):
    """At module level, since LitServe pickles it for its worker."""

    def __init__(self, path: str, spec: InputSpec, **options):
        super().__init__(**options)
        self.path, self.spec_ = path, spec

    def setup(self, device):
        self.graph = Graph(self.path, len(os.sched_getaffinity(0)))

    def decode_request(self, request):
        return decode(base64.b64decode(request["image"]), self.spec_)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return self.graph(x)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return answer(output)


def litserve(path: str, port: int, spec: InputSpec) -> None:
    api = LitApi(
        path,
        spec,
        max_batch_size=int(os.environ.get("BATCH", "16")),
        batch_timeout=float(os.environ.get("BATCH_SECONDS", "0.002")),
    )
    ls.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False
    )


def fastapi(path: str, port: int, spec: InputSpec) -> None:
    import uvicorn
    from fastapi import FastAPI, Request
    from starlette.concurrency import run_in_threadpool

    app, graph = FastAPI(), Graph(path, len(os.sched_getaffinity(0)))

    def predict(body: bytes) -> dict:
        return answer(graph(decode(body, spec)[None])[0])

    @app.post("/predict")
    async def endpoint(request: Request) -> dict:
        return await run_in_threadpool(predict, await request.body())

    @app.get("/health")
    async def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


if __name__ == "__main__":
    kind, model, number, manifest = sys.argv[1:]
    {"litserve": litserve, "fastapi": fastapi}[kind](
        model, int(number), read_manifest(Path(manifest).parent).input
    )
