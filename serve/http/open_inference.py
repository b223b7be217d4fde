"""The Open Inference Protocol, version 2, with the binary tensor extension, over the same queue as /predict.

One input, `image`: UINT8 [N, height, width, channels] as the network takes it, or BYTES [N] with the bytes of image
files. Outputs: `probabilities` FP32 [N, K], `energy` FP32 [N], `label` BYTES [N].
https://github.com/kserve/open-inference-protocol
"""

import json
import math
import struct
from itertools import chain
from typing import Any

import numpy as np

from serve.http import request_body
from serve.http.dispatcher import Dispatcher
from serve.http.predict_endpoint import PredictEndpoint, PredictInput
from serve.http.responses import JSON, Problem, Request, Response, json_response
from serve.wire import ARRAYS, LABEL_LENGTH, TENSOR, Answer

OUTPUTS = ("probabilities", "energy", "label")
LENGTH = b"inference-header-content-length"
MAX_JSON = 2 << 20  # bytes; reading more would hold up other requests
SPARE = 256  # lists and commas of a request besides those of its tensor


class OpenInference:
    """Handles every path below /v2. Errors are `{"error": "…"}`, as the protocol has it."""

    def __init__(self, predict_endpoint: PredictEndpoint, dispatcher: Dispatcher) -> None:
        self.predict_endpoint = predict_endpoint
        self.dispatcher = dispatcher

    async def __call__(self, request: Request) -> Response:
        try:
            return await self.route(
                request, [part for part in request.scope["path"].split("/")[2:] if part]
            )
        except Problem as problem:
            if problem.reason:
                self.predict_endpoint.counters.add("rejected", problem.reason)
            response = json_response({"error": problem.detail}, problem.status)
            response.headers = problem.response(request.id).headers
            return response

    async def route(self, request: Request, path: list[str]) -> Response:
        match path:
            case ["models", name, *rest]:
                action = self.action(name, rest)
                if action == "infer":
                    _takes(request, "POST")
                    return await self.infer(request)
                answer = {"": self.metadata, "ready": self.ready}.get(action)
            case _:
                answer = {
                    "": self.server,
                    "health/live": self.live,
                    "health/ready": self.ready,
                }.get("/".join(path))
        if answer is None:
            raise Problem(404, "no such path in the Open Inference Protocol")
        _takes(request, "GET", "HEAD")
        return answer()

    def server(self) -> Response:
        return json_response(
            {"name": "imago", "version": "2", "extensions": ["binary_tensor_data"]}
        )

    def live(self) -> Response:
        return json_response({"live": True})

    def ready(self) -> Response:
        ready = self.dispatcher.is_ready and not self.predict_endpoint.state.draining
        return json_response({"ready": ready}, 200 if ready else 503)

    def action(self, name: str, rest: list[str]) -> str:
        """What is asked of the model.

        Raises Problem 404 for another model or version than the one that is served, 503 until that is known.
        """
        model = self.dispatcher.model
        if not model:
            raise Problem(
                503,
                "no model is ready; try again in a second",
                "not_ready" if rest[-1:] == ["infer"] else None,
            )
        if name != model.get("name"):
            raise Problem(404, f"there is no model {name!r} here")
        if rest[:1] == ["versions"]:
            if rest[1:2] != [model["version"]]:
                raise Problem(404, f"version {model['version']} is served, no other")
            rest = rest[2:]
        if len(rest) > 1:
            raise Problem(404, "no such path in the Open Inference Protocol")
        return rest[0] if rest else ""

    def metadata(self) -> Response:
        model = self.dispatcher.model
        spec = model["input"]
        return json_response(
            {
                "name": model["name"],
                "versions": [model["version"]],
                "platform": "onnx",
                "inputs": [
                    {
                        "name": "image",
                        "datatype": "UINT8",
                        "shape": [-1, spec["height"], spec["width"], spec["channels"]],
                    }
                ],
                "outputs": [
                    {
                        "name": "probabilities",
                        "datatype": "FP32",
                        "shape": [-1, len(model["classes"])],
                    },
                    {"name": "energy", "datatype": "FP32", "shape": [-1]},
                    {"name": "label", "datatype": "BYTES", "shape": [-1]},
                ],
            }
        )

    async def infer(self, request: Request) -> Response:
        asked: dict[str, Any] = {}

        def parse(content: bytes) -> PredictInput:
            limit = self.predict_endpoint.settings.max_images
            header, images, flags = read(
                content, request.headers, self.dispatcher.model["input"], limit
            )
            asked.update(header)
            outputs(header)  # what is wrong with them shows before any work is done
            return PredictInput(images, 1, flags | ARRAYS)

        answers = await self.predict_endpoint.predict(request, parse)
        failed = next((a for a in answers if a.status != 200), None)
        if failed:
            raise Problem(failed.status, failed.body.decode())
        return self.write(request.id, asked, answers)

    def write(self, request_id: str, asked: dict[str, Any], answers: list[Answer]) -> Response:
        model = self.dispatcher.model
        ends = [LABEL_LENGTH.size + LABEL_LENGTH.unpack_from(a.body)[0] for a in answers]
        labels = [a.body[LABEL_LENGTH.size : end] for a, end in zip(answers, ends, strict=True)]
        rows = [
            np.frombuffer(a.body, "<f4", offset=end) for a, end in zip(answers, ends, strict=True)
        ]
        values = np.stack(rows)
        self.predict_endpoint.feedback.remember(request_id, answers)
        tensors = {"probabilities": ("FP32", values[:, :-1]), "energy": ("FP32", values[:, -1])}
        described, chunks = [], []
        for name, binary in outputs(asked):
            if name == "label":
                entry: dict[str, Any] = {"name": name, "datatype": "BYTES", "shape": [len(labels)]}
                data = b"".join(struct.pack("<I", len(label)) + label for label in labels)
                plain: list = [label.decode() for label in labels]
            else:
                kind, array = tensors[name]
                entry = {"name": name, "datatype": kind, "shape": list(array.shape)}
                data, plain = array.tobytes(), [] if binary else array.ravel().tolist()
            if binary:
                entry["parameters"] = {"binary_data_size": len(data)}
                chunks.append(data)
            else:
                entry["data"] = plain
            described.append(entry)
        answer = {
            "model_name": model["name"],
            "model_version": str(answers[-1].version),
            "outputs": described,
        }
        if "id" in asked:
            answer["id"] = asked["id"]
        text = json.dumps(answer, separators=(",", ":")).encode()
        version = (b"x-model-version", b"%d" % answers[-1].version)
        if not chunks:
            return Response(200, text, JSON, [version])
        return Response(
            200,
            b"".join((text, *chunks)),
            b"application/octet-stream",
            [version, (LENGTH, b"%d" % len(text))],
        )


def _takes(request: Request, *methods: str) -> None:
    if request.scope["method"] not in methods:
        raise Problem(405, f"this path takes {' and '.join(methods)}", allow=", ".join(methods))


def read(
    content: bytes, headers: dict[bytes, bytes], spec: dict[str, Any], limit: int
) -> tuple[dict, list[bytes], int]:
    """The JSON part of an infer request, its images, at most `limit`, and the flags that say what they are.

    Raises Problem 400, 413, 415.
    """
    want = [spec["height"], spec["width"], spec["channels"]]
    if b"content-encoding" in headers:
        raise Problem(415, "compressed requests are not taken")
    try:
        end = int(headers.get(LENGTH, b"%d" % len(content)))
        if end > MAX_JSON:
            raise Problem(
                413, f"more than {MAX_JSON} bytes of JSON; send the tensor in binary", "body"
            )
    except ValueError as error:
        raise Problem(400, "the length of the JSON is not a number") from error
    if (
        not 0 <= end <= len(content)
    ):  # before anything is cut off: -1 would take all but the last byte for JSON
        raise Problem(400, "the length of the JSON is not one that the request has")
    header = request_body.load_bounded_json(
        content[:end],
        max_lists=limit * (1 + want[0] + want[0] * want[1]) + SPARE,
        max_commas=limit * math.prod(want) + SPARE,
    )
    if not isinstance(header, dict):
        raise Problem(400, "the request is not a JSON object of the length stated")
    inputs = header.get("inputs")
    if (
        not isinstance(inputs, list)
        or len(inputs) != 1
        or not isinstance(inputs[0], dict)
        or inputs[0].get("name") != "image"
    ):
        raise Problem(400, "there must be one input, named image")
    shape, kind = inputs[0].get("shape"), inputs[0].get("datatype")
    if not isinstance(shape, list) or not shape or any(type(n) is not int or n < 1 for n in shape):
        raise Problem(400, "shape must be a list of positive numbers")
    if shape[0] > limit:
        raise Problem(413, f"more than the {limit} images allowed in one request", "images")
    data = _data(inputs[0], content[end:])
    if kind == "BYTES":
        return header, _files(data, shape), 0
    if kind == "UINT8":
        return header, _tensors(data, shape, want), TENSOR
    raise Problem(400, "the datatype must be UINT8 or BYTES")


def _data(entry: dict[str, Any], binary: bytes) -> bytes | list:
    """The tensor's bytes where it came in binary, else its list."""
    size = _parameters(entry).get("binary_data_size")
    if size is None:
        if binary or not isinstance(entry.get("data"), list):
            raise Problem(400, "the input has neither data nor binary_data_size")
        return entry["data"]
    if type(size) is not int or size != len(binary):
        raise Problem(400, f"binary_data_size is {size!r}, and {len(binary)} bytes came")
    return binary


def _tensors(data: bytes | list, shape: list[int], want: list[int]) -> list[bytes]:
    """uint8 [N,H,W,C], raw or as (nested) list, to the bytes of each image."""
    if shape[1:] != want:
        raise Problem(400, f"shape must be [N, {', '.join(map(str, want))}]")
    if isinstance(data, list):
        data = _values(data, len(shape))
    size = math.prod(want)
    if len(data) != shape[0] * size:
        raise Problem(400, f"{len(data)} values came, and the shape says {shape[0] * size}")
    return [data[at : at + size] for at in range(0, len(data), size)]


def _values(data: list, depth: int) -> bytes:
    """The numbers of a list, flat or nested up to `depth`. NumPy would give each leaf the room of the longest text."""
    for _ in range(depth - 1):
        if not data or type(data[0]) is not list:
            break
        if set(map(type, data)) != {list} or len(set(map(len, data))) > 1:
            raise Problem(400, "data is not a tensor")
        data = list(chain.from_iterable(data))
    try:
        if set(map(type, data)) <= {int}:  # True and False are none
            return bytes(data)
    except ValueError:
        pass  # one of them is no byte
    raise Problem(400, "data must be whole numbers from 0 to 255")


def _files(data: bytes | list, shape: list[int]) -> list[bytes]:
    """BYTES [N] or [N, 1]: in binary each with its length before it, in JSON as base64."""
    found = []
    if isinstance(data, list):
        try:
            found = [request_body.decode_base64(text) for text in data[: shape[0] + 1]]
        except (ValueError, TypeError, AttributeError) as error:
            raise Problem(400, "BYTES in JSON must be base64") from error
    else:
        at = 0
        while at + 4 <= len(data) and len(found) <= shape[0]:
            (length,) = struct.unpack_from("<I", data, at)
            found.append(data[at + 4 : at + 4 + length])
            at += 4 + length
        if at != len(data):
            raise Problem(400, "the lengths in the BYTES tensor do not add up")
    if shape not in ([len(found)], [len(found), 1]):
        raise Problem(400, f"the shape {shape} is not that of the images that came")
    return found


def outputs(header: dict[str, Any]) -> list[tuple[str, bool]]:
    """Names of the outputs that are wanted, and whether in binary. Raises Problem 400."""
    default = _parameters(header).get("binary_data_output") is True
    wanted = header.get("outputs") or [{"name": name} for name in OUTPUTS]
    if not isinstance(wanted, list) or any(
        not isinstance(o, dict) or o.get("name") not in OUTPUTS for o in wanted
    ):
        raise Problem(400, f"outputs can be {', '.join(OUTPUTS)}")
    if len({o["name"] for o in wanted}) < len(wanted):
        raise Problem(400, "an output is asked for twice")
    return [(o["name"], _parameters(o).get("binary_data", default) is True) for o in wanted]


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    found = entry.get("parameters", {})
    if not isinstance(found, dict):
        raise Problem(400, "parameters must be an object")
    return found
