"""MLServer: a custom runtime in its one inference worker, with adaptive batching.

Images are base64 in a BYTES tensor of the Open Inference Protocol. MLServer joins the tensors of
the requests of a batch.
https://docs.seldon.ai/mlserver/user-guide/custom
https://docs.seldon.ai/mlserver/user-guide/adaptive-batching
"""

import os
import socket
import sys
import tempfile

import numpy as np
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from rivals.graph import BATCH, BATCH_SECONDS, Graph

MODEL = "images"


class ImageModel(MLModel):
    """The runtime; the variables MLSERVER_MODEL_* name it."""

    async def load(self) -> bool:
        self.graph = Graph()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        files = Base64Codec.decode_input(payload.inputs[0])
        images = np.stack([self.graph.decode(file) for file in files])
        probabilities = self.graph.run(images)
        labels = probabilities.argmax(1)[:, None]
        confidences = probabilities.max(1)[:, None]
        outputs = [
            NumpyCodec.encode_output("label", labels),
            NumpyCodec.encode_output("confidence", confidences),
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(port: int) -> None:
    """Replace this process by `mlserver start`."""
    settings = {
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_HTTP_PORT": port,
        "MLSERVER_GRPC_PORT": find_free_port(),
        "MLSERVER_METRICS_PORT": find_free_port(),
        "MLSERVER_DEBUG": "false",  # else each request is logged
        "MLSERVER_MODEL_NAME": MODEL,
        "MLSERVER_MODEL_IMPLEMENTATION": f"{__name__}.{ImageModel.__name__}",
        "MLSERVER_MODEL_MAX_BATCH_SIZE": BATCH,
        "MLSERVER_MODEL_MAX_BATCH_TIME": BATCH_SECONDS,
    }
    os.environ |= {name: str(value) for name, value in settings.items()}
    # Without files of settings, and for what it writes.
    os.chdir(tempfile.mkdtemp(prefix="mlserver-"))
    os.execv(sys.executable, [sys.executable, "-m", "mlserver.cli.main", "start", "."])
