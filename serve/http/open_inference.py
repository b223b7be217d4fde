"""The Open Inference Protocol, version 2, with the binary tensor extension.

Requests pass through the same queue as those to /predict. Runs in HTTP processes.

There is one input, `image`: UINT8 [N, height, width, channels] as the network takes it, or BYTES
[N] with the bytes of image files. The outputs are `probabilities` FP32 [N, K], `energy` FP32 [N]
and `label` BYTES [N]. With Triton's parameter `classification`, `probabilities` is BYTES [N, k]
with the k most likely classes. A request that names its outputs may also ask for `embedding` FP32
[N, D] and, where the model has activation maps, for `cam` FP32 [N, h, w], that of the label.

https://github.com/kserve/open-inference-protocol
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from serve.http import request_body
from serve.http.dispatcher import Dispatcher
from serve.http.predict_endpoint import PredictEndpoint, PredictInput
from serve.http.responses import JSON, Problem, Request, Response, json_response
from serve.wire import ARRAYS, CAM, EMBEDDING, TENSOR, Answer, unpack_arrays

OUTPUT_NAMES = ("probabilities", "energy", "label")  # those of a request that names none
# Further outputs, which a request must name, and the flags of the jobs.
OPTIONAL_OUTPUT_FLAGS = {"embedding": EMBEDDING, "cam": CAM}
JSON_LENGTH_HEADER = b"inference-header-content-length"
MAX_JSON_BYTES = 2 << 20  # parsing more would block other requests
MAX_EXTRA_ELEMENTS = 256  # lists and commas that a request may have besides those of its tensor

_LENGTH = struct.Struct("<I")  # precedes each element of a binary BYTES tensor


@dataclass
class RequestedOutput:
    """One output of an inference request."""

    name: str
    is_binary: bool  # send it after the JSON instead of in it

    top_classes: int = 0
    """Send this many of the most likely classes as text instead of the tensor; 0: the tensor."""


@dataclass
class InferenceRequest:
    """The content of an inference request."""

    id: str | None  # returned in the response
    images: list[bytes]  # image files, or uint8 tensors if `flags` has TENSOR
    flags: int  # of `serve.wire`
    outputs: list[RequestedOutput]


class OpenInference:
    """Handles all paths below /v2. An error is `{"error": "…"}`, as the protocol requires."""

    def __init__(self, predict_endpoint: PredictEndpoint, dispatcher: Dispatcher):
        self.predict_endpoint = predict_endpoint
        self.dispatcher = dispatcher

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        try:
            return await self._route(request)
        except Problem as problem:
            if problem.reason:
                self.predict_endpoint.counters.add("rejected", problem.reason)
            response = json_response({"error": problem.detail}, problem.status)
            response.headers = problem.response(request.id).headers
            return response

    async def _route(self, request: Request) -> Response:
        segments = [segment for segment in request.scope["path"].split("/")[2:] if segment]
        handler: Callable[[], Response] | None
        if len(segments) >= 2 and segments[0] == "models":
            action = self._parse_model_path(segments[1], segments[2:])
            if action == "infer":
                _check_method(request, "POST")
                return await self._infer(request)
            handler = {"": self._describe_model, "ready": self._ready}.get(action)
        else:
            handler = {
                "": self._describe_server,
                "health/live": self._live,
                "health/ready": self._ready,
            }.get("/".join(segments))

        if handler is None:
            raise _unknown_path()
        _check_method(request, "GET", "HEAD")
        return handler()

    def _parse_model_path(self, name: str, segments: list[str]) -> str:
        """Return the last segment of a path below /v2/models/<name>, such as "infer", or "".

        Raises Problem 404 for a model or version that is not served, 503 until a worker is ready.
        """
        model = self.dispatcher.model
        if not model:
            is_inference = segments[-1:] == ["infer"]
            raise Problem(
                503,
                "no model is ready; try again in a second",
                "not_ready" if is_inference else None,
            )
        if name != model.get("name"):
            raise Problem(404, f"no model {name!r} is served")
        if segments[:1] == ["versions"]:
            if segments[1:2] != [model["version"]]:
                raise Problem(404, f"version {model['version']} is served, no other")
            segments = segments[2:]
        if len(segments) > 1:
            raise _unknown_path()
        return segments[0] if segments else ""

    def _describe_server(self) -> Response:
        return json_response(
            {
                "name": "imago",
                "version": "2",
                "extensions": ["binary_tensor_data", "classification"],
            }
        )

    def _live(self) -> Response:
        return json_response({"live": True})

    def _ready(self) -> Response:
        is_ready = self.dispatcher.is_ready and not self.predict_endpoint.state.draining
        return json_response({"ready": is_ready}, 200 if is_ready else 503)

    def _describe_model(self) -> Response:
        model = self.dispatcher.model
        outputs: list[dict[str, Any]] = [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(model["classes"])]},
            {"name": "energy", "datatype": "FP32", "shape": [-1]},
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
        ]
        for name in OPTIONAL_OUTPUT_FLAGS:
            if name in model["outputs"]:
                shape = model["output_shapes"][name]
                if name == "cam":
                    shape = shape[1:]  # of the predicted class only
                outputs.append({"name": name, "datatype": "FP32", "shape": [-1, *shape]})

        spec = model["input"]
        image_shape = [-1, spec["height"], spec["width"], spec["channels"]]
        return json_response(
            {
                "name": model["name"],
                "versions": [model["version"]],
                "platform": "onnx",
                "inputs": [{"name": "image", "datatype": "UINT8", "shape": image_shape}],
                "outputs": outputs,
            }
        )

    async def _infer(self, request: Request) -> Response:
        inference: InferenceRequest | None = None

        def parse(content: bytes) -> PredictInput:
            nonlocal inference
            max_images = self.predict_endpoint.settings.max_images
            model = self.dispatcher.model
            inference = parse_inference(content, request.headers, model["input"], max_images)
            flags = inference.flags | ARRAYS
            for output in inference.outputs:
                if output.name in OPTIONAL_OUTPUT_FLAGS and output.name not in model["outputs"]:
                    raise Problem(400, f"this model has no output {output.name}")
                flags |= OPTIONAL_OUTPUT_FLAGS.get(output.name, 0)
            name = self.predict_endpoint.build_name(request)
            return PredictInput(inference.images, 1, flags, name)

        answers = await self.predict_endpoint.predict(request, parse)
        for i, answer in enumerate(answers):
            if answer.status != 200:
                position = f"image {i}: " if len(answers) > 1 else ""
                raise Problem(answer.status, position + answer.body.decode())

        assert inference is not None
        self.predict_endpoint.feedback.remember(request.id, answers)
        return build_response(self.dispatcher.model, inference, answers)


def build_response(
    model: dict[str, Any], inference: InferenceRequest, answers: list[Answer]
) -> Response:
    """Compose the outputs of all images. Binary outputs follow the JSON, in the same order.

    `model` is the description of the model that answered.
    """
    images = [unpack_arrays(answer.body) for answer in answers]
    labels = [image.label for image in images]
    probabilities = np.stack([image.probabilities for image in images])
    tensors = {
        "probabilities": probabilities,
        "energy": np.array([image.energy for image in images], "<f4"),
        "embedding": np.stack([image.embedding for image in images]),
        "cam": np.stack([image.activation_map for image in images]),
    }

    entries: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for output in inference.outputs:
        if output.name == "label":
            entry, chunk = _encode_texts("label", labels, [len(labels)], output.is_binary)
        elif output.top_classes:
            texts, shape = _rank_classes(probabilities, model["classes"], output.top_classes)
            entry, chunk = _encode_texts(output.name, texts, shape, output.is_binary)
        else:
            entry, chunk = _encode_tensor(output.name, tensors[output.name], output.is_binary)
        entries.append(entry)
        if output.is_binary:
            entry["parameters"] = {"binary_data_size": len(chunk)}
            chunks.append(chunk)

    version = answers[-1].version
    members = {"model_name": model["name"], "model_version": str(version), "outputs": entries}
    if inference.id is not None:
        members["id"] = inference.id
    text = json.dumps(members, separators=(",", ":")).encode()

    headers = [(b"x-model-version", b"%d" % version)]
    if not chunks:
        return Response(200, text, JSON, headers)
    headers.append((JSON_LENGTH_HEADER, b"%d" % len(text)))
    return Response(200, b"".join((text, *chunks)), b"application/octet-stream", headers)


def _rank_classes(
    probabilities: np.ndarray, classes: list[str], count: int
) -> tuple[list[bytes], list[int]]:
    """Return `count` classes of each image, the most likely first, and the shape of the texts.

    A text is "<probability>:<index>:<label>", as Triton's classification extension has it. Raises
    Problem 503 if another model answered than the one with these classes.
    """
    if probabilities.shape[1] != len(classes):
        raise Problem(503, "the model was replaced during the request; try again")

    texts: list[bytes] = []
    ranking = (-probabilities).argsort(1, kind="stable")[:, :count]
    for row, indices in zip(probabilities, ranking.tolist(), strict=True):
        for index in indices:
            texts.append(f"{row[index]:.6f}:{index}:{classes[index]}".encode())
    return texts, list(ranking.shape)


def _encode_texts(
    name: str, texts: list[bytes], shape: list[int], is_binary: bool
) -> tuple[dict[str, Any], bytes]:
    """Return the JSON entry of a BYTES tensor, and its bytes if it is sent in binary."""
    entry: dict[str, Any] = {"name": name, "datatype": "BYTES", "shape": shape}
    if is_binary:
        return entry, b"".join([_LENGTH.pack(len(text)) + text for text in texts])
    entry["data"] = [text.decode() for text in texts]
    return entry, b""


def _encode_tensor(name: str, tensor: np.ndarray, is_binary: bool) -> tuple[dict[str, Any], bytes]:
    """Return the JSON entry of a float32 tensor, and its bytes if it is sent in binary."""
    entry: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(tensor.shape)}
    if is_binary:
        return entry, tensor.tobytes()
    entry["data"] = tensor.ravel().tolist()
    return entry, b""


def parse_inference(
    content: bytes, headers: dict[bytes, bytes], spec: dict[str, Any], max_images: int
) -> InferenceRequest:
    """Parse the body of an inference request for a model with the input `spec`.

    Raises Problem 400 or 413.
    """
    image_shape = [spec["height"], spec["width"], spec["channels"]]
    json_end = _parse_json_length(content, headers)
    members = _load_json(content[:json_end], image_shape, max_images)

    inputs = members.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise Problem(400, "there must be one input, named image")
    image = inputs[0]
    if not isinstance(image, dict) or image.get("name") != "image":
        raise Problem(400, "there must be one input, named image")

    shape = image.get("shape")
    if not isinstance(shape, list) or not shape or any(type(n) is not int or n < 1 for n in shape):
        raise Problem(400, "shape must be a list of positive numbers")
    if shape[0] > max_images:
        raise Problem(413, f"more than the {max_images} images allowed in one request", "images")

    data = _read_data(image, content[json_end:])
    if image.get("datatype") == "BYTES":
        images = _parse_files(data, shape)
        flags = 0
    elif image.get("datatype") == "UINT8":
        images = _parse_tensor(data, shape, image_shape)
        flags = TENSOR
    else:
        raise Problem(400, "the datatype must be UINT8 or BYTES")

    request_id = members.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise Problem(400, "id must be a string")
    return InferenceRequest(request_id, images, flags, _parse_outputs(members))


def _parse_json_length(content: bytes, headers: dict[bytes, bytes]) -> int:
    """Return the length of the JSON at the start of the content. A header states it, if sent."""
    try:
        length = int(headers.get(JSON_LENGTH_HEADER, b"%d" % len(content)))
    except ValueError as error:
        raise Problem(400, "the length of the JSON is not a number") from error
    if length > MAX_JSON_BYTES:
        raise Problem(
            413, f"more than {MAX_JSON_BYTES} bytes of JSON; send the tensor in binary", "body"
        )
    # Checked before any slicing: content[:-1] would take all but the last byte for JSON.
    if not 0 <= length <= len(content):
        raise Problem(400, "the length of the JSON is larger than the body, or negative")
    return length


def _load_json(text: bytes, image_shape: list[int], max_images: int) -> dict[str, Any]:
    height, width, _ = image_shape
    lists_per_image = 1 + height + height * width
    members = request_body.load_bounded_json(
        text,
        max_lists=max_images * lists_per_image + MAX_EXTRA_ELEMENTS,
        max_commas=max_images * math.prod(image_shape) + MAX_EXTRA_ELEMENTS,
    )
    if not isinstance(members, dict):
        raise Problem(400, "the request is not a JSON object of the length stated")
    return members


def _read_data(entry: dict[str, Any], binary: bytes) -> bytes | list[Any]:
    """Return the content of a tensor: bytes if it was sent in binary, else the list in the JSON."""
    size = _read_parameters(entry).get("binary_data_size")
    if size is None:
        data = entry.get("data")
        if binary or not isinstance(data, list):
            raise Problem(400, "the input has neither data nor binary_data_size")
        return data
    if type(size) is not int or size != len(binary):
        raise Problem(400, f"binary_data_size is {size!r}, but {len(binary)} bytes were sent")
    return binary


def _parse_tensor(data: bytes | list[Any], shape: list[int], image_shape: list[int]) -> list[bytes]:
    """Split uint8 [N, H, W, C], in binary or as a nested list, into the bytes of each image."""
    if shape[1:] != image_shape:
        raise Problem(400, f"shape must be [N, {', '.join(map(str, image_shape))}]")
    if isinstance(data, list):
        data = _pack_numbers(_flatten(data, len(shape)))

    image_bytes = math.prod(image_shape)
    expected = shape[0] * image_bytes
    if len(data) != expected:
        raise Problem(400, f"the data has {len(data)} values, but the shape needs {expected}")
    return [data[start : start + image_bytes] for start in range(0, len(data), image_bytes)]


def _flatten(data: list[Any], dimensions: int) -> list[Any]:
    """Return the elements of a list that is flat or nested up to `dimensions` deep.

    NumPy is not used, because it gives every element the size of the longest string in the list.
    """
    for _ in range(dimensions - 1):
        if not data or type(data[0]) is not list:
            break
        types = set(map(type, data))
        if types != {list} or len(set(map(len, data))) > 1:
            raise Problem(400, "data is not a tensor")
        data = list(chain.from_iterable(data))
    return data


def _pack_numbers(data: list[Any]) -> bytes:
    """Return numbers from 0 to 255 as bytes. Raises Problem 400 for other elements."""
    # The type excludes bool, which is a subclass of int; bytes() checks the range.
    if set(map(type, data)) <= {int}:
        try:
            return bytes(data)
        except ValueError:
            pass
    raise Problem(400, "data must be whole numbers from 0 to 255")


def _parse_files(data: bytes | list[Any], shape: list[int]) -> list[bytes]:
    """Return the elements of BYTES [N] or [N, 1]. In JSON they are base64, flat or nested."""
    if isinstance(data, bytes):
        files = _split_binary_files(data, shape[0])
    else:
        files = _decode_files(_flatten(data, len(shape))[: shape[0] + 1])

    if shape not in ([len(files)], [len(files), 1]):
        raise Problem(400, f"the shape {shape} does not fit the {len(files)} images that were sent")
    return files


def _decode_files(texts: list[Any]) -> list[bytes]:
    """Return the files that are base64 in JSON. Raises Problem 400 for the first that is not."""
    files: list[bytes] = []
    for i, text in enumerate(texts):
        file = request_body.decode_base64_image(text, f"data[{i}] of the input")
        if isinstance(file, Problem):
            raise file
        files.append(file)
    return files


def _split_binary_files(data: bytes, max_files: int) -> list[bytes]:
    """Split a binary BYTES tensor, in which the length of each element precedes it."""
    files: list[bytes] = []
    position = 0
    while position + _LENGTH.size <= len(data) and len(files) <= max_files:
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        files.append(data[position : position + length])
        position += length
    if position != len(data):
        raise Problem(400, "the lengths in the BYTES tensor do not add up")
    return files


def _parse_outputs(members: dict[str, Any]) -> list[RequestedOutput]:
    """Return the requested outputs; all of them if the request names none."""
    is_binary = _read_parameters(members).get("binary_data_output") is True
    entries = members.get("outputs") or [{"name": name} for name in OUTPUT_NAMES]
    known_names = (*OUTPUT_NAMES, *OPTIONAL_OUTPUT_FLAGS)
    unknown = f"outputs can be {', '.join(known_names)}"
    if not isinstance(entries, list):
        raise Problem(400, unknown)

    outputs: list[RequestedOutput] = []
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("name") not in known_names:
            raise Problem(400, unknown)
        if any(output.name == entry["name"] for output in outputs):
            raise Problem(400, f"the output {entry['name']} is requested twice")
        parameters = _read_parameters(entry)
        binary_data = parameters.get("binary_data", is_binary)
        top_classes = _parse_classification(entry["name"], parameters)
        outputs.append(RequestedOutput(entry["name"], binary_data is True, top_classes))
    return outputs


def _parse_classification(output: str, parameters: dict[str, Any]) -> int:
    """Return the number of classes that Triton's classification extension asks for, 0 for none."""
    count = parameters.get("classification", 0)
    if type(count) is not int or count < 0:
        raise Problem(400, "classification must be a number of classes")
    if count and output != "probabilities":
        raise Problem(400, f"classification is available for probabilities, not for {output}")
    return count


def _read_parameters(entry: dict[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Problem(400, "parameters must be an object")
    if "shared_memory_region" in parameters:
        raise Problem(400, "shared_memory_region is not supported; send tensors in the request")
    return parameters


def _check_method(request: Request, *methods: str) -> None:
    if request.scope["method"] not in methods:
        raise Problem(405, f"this path allows {' and '.join(methods)}", allow=", ".join(methods))


def _unknown_path() -> Problem:
    return Problem(404, "no such path in the Open Inference Protocol")
