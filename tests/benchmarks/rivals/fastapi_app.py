"""FastAPI with onnxruntime: the raw bytes of an image, a run for each in the thread pool."""

from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from rivals.graph import Graph, build_answer


def run(port: int) -> None:
    app = FastAPI()
    graph = Graph()

    def predict(body: bytes) -> dict[str, Any]:
        images = graph.decode(body)[None]
        return build_answer(graph.run(images)[0])

    @app.post("/predict")
    async def predict_endpoint(request: Request) -> dict:
        return await run_in_threadpool(predict, await request.body())

    @app.get("/health")
    async def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)
