"""Ray Serve: one replica that has all cores, with dynamic request batching.

https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html
"""

import contextlib
import os
import signal
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request

from rivals.graph import BATCH, BATCH_SECONDS, CORES, Graph, build_answer

MAX_ONGOING_REQUESTS = 100  # of a replica; the default 5 is smaller than a batch


@serve.deployment(max_ongoing_requests=MAX_ONGOING_REQUESTS, ray_actor_options={"num_cpus": CORES})
class ImageDeployment:
    """The replica."""

    def __init__(self) -> None:
        self.graph = Graph()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_SECONDS)
    async def run_batch(self, images: list[np.ndarray]) -> list[dict[str, Any]]:
        return [build_answer(row) for row in self.graph.run(np.stack(images))]

    async def __call__(self, request: Request) -> dict[str, Any]:
        if request.method == "GET":  # asks whether the replica is ready
            return {}
        image = self.graph.decode(await request.body())
        return await self.run_batch(image)


def run(port: int) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"enable_access_log": False},
    )
    with contextlib.suppress(KeyboardInterrupt):
        serve.run(ImageDeployment.bind(), route_prefix="/predict")
        signal.pause()
    ray.shutdown()
