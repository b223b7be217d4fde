"""Read opset, signature and operators of an untrusted ONNX file, before a runtime opens it.

Refused are files that are cut short, keep weights in other files, contain training information,
use operators of an unknown domain, or have another signature than the manifest states. The parser
walks the protobuf wire format and never reads the weights. It needs no `onnx` package, and no size
that the file states makes it allocate memory.

Wire format (protobuf.dev/programming-guides/encoding): a message is a sequence of fields. A field
is a key, which is the varint `field number << 3 | wire type`, and a value:

    wire type  value
    0          a varint: 7 bits a byte, least significant first; the top bit says more follow
    1          8 bytes
    2          a varint, the length, and that many bytes: text, a tensor's data, or a message
    5          4 bytes

Messages and fields of onnx.proto3 (ONNX IR 10) that are read; all others are skipped:

    message            number  field
    ModelProto         7       graph: GraphProto
                       8       opset_import: OperatorSetIdProto
                       20      training_info: TrainingInfoProto
                       25      functions: FunctionProto
    GraphProto         1       node: NodeProto
                       5       initializer: TensorProto
                       11      input: ValueInfoProto
                       12      output: ValueInfoProto
                       15      sparse_initializer: SparseTensorProto
    NodeProto          4       op_type: text
                       5       attribute: AttributeProto
                       7       domain: text
    AttributeProto     5       t: TensorProto
                       6       g: GraphProto, a subgraph (the body of If, Loop, Scan)
                       10      tensors: TensorProto
                       11      graphs: GraphProto
                       22      sparse_tensor: SparseTensorProto
                       23      sparse_tensors: SparseTensorProto
    SparseTensorProto  1       values: TensorProto
                       2       indices: TensorProto
    FunctionProto      7       node: NodeProto
                       9       opset_import: OperatorSetIdProto
                       11      attribute_proto: AttributeProto
    OperatorSetIdProto 1       domain: text
                       2       version: number
    TensorProto        13      external_data
                       14      data_location: number, 1 is EXTERNAL
    ValueInfoProto     1       name: text
                       2       type: TypeProto
    TypeProto          1       tensor_type: TypeProto.Tensor
    TypeProto.Tensor   1       elem_type: number, a TensorProto.DataType
                       2       shape: TensorShapeProto
    TensorShapeProto   1       dim: Dimension
    Dimension          1       dim_value: number
                       2       dim_param: text
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from models.bundle.errors import BundleError
from models.image import InputSpec

MAX_BYTES = 2**31 - 1
"""Protobuf's own limit for a message."""

MAX_DEPTH = 16
"""Of messages inside messages."""

# The mark of onnxruntime's own format, which it recognizes in a file of any name. Such a file can
# be valid ONNX as well, and hold another graph.
ORT_MAGIC = b"ORTM"
ORT_MAGIC_SLICE = slice(4, 8)

ALLOWED_DOMAINS = frozenset(("", "ai.onnx", "com.microsoft"))
"""Domains of operators: that of ONNX, by both names, and that of onnxruntime."""

# Rank of each output: [N,K], [N], [N,D], [N,K,h,w].
OUTPUT_RANKS = {
    "probabilities": 2,
    "energy": 1,
    "embedding": 2,
    "cam": 4,
}
OUTPUTS_BY_CLASS = ("probabilities", "cam")

# TensorProto.DataType
_FLOAT = 1
_UINT8 = 2
_TYPE_NAMES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}

# TensorProto
_EXTERNAL_DATA = 13
_DATA_LOCATION = 14
_EXTERNAL = 1

# NodeProto
_OP_TYPE = 4
_DOMAIN = 7

# Message -> field number -> the message inside. `subgraph` is a GraphProto whose inputs and outputs
# are not those of the model.
_NESTED_MESSAGES = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 11: "input", 12: "output", 15: "sparse"},
    "subgraph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "subgraph",
        10: "tensor",
        11: "subgraph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
}

Dimension = int | str | None
FieldValue = int | memoryview


@dataclass(frozen=True)
class TensorType:
    """Type and shape of an input or output."""

    element_type: int
    """A TensorProto.DataType."""

    shape: tuple[Dimension, ...]
    """A number, a name or None for each dimension."""


@dataclass
class Graph:
    """What an ONNX file states about itself."""

    opset: int = 0
    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: dict[str, TensorType] = field(default_factory=dict)
    operators: set[str] = field(default_factory=set)


class _NotAllowed(ValueError):
    """The file is valid, but contains something that bundles must not contain."""


def check_graph(
    path: Path, content: bytes, input_spec: InputSpec, classes: int, outputs: list[str]
) -> Graph:
    """Parse the contents of an ONNX file and compare its signature with the manifest's.

    `path` names the file in error messages. Raises BundleError that states the difference, or as
    `parse_graph` does.
    """
    graph = parse_graph(path, content)
    _check_input(path, graph, input_spec)

    if sorted(graph.outputs) != sorted(outputs):
        graph_outputs = ", ".join(graph.outputs) or "none"
        raise BundleError(f"{path}: its outputs are {graph_outputs}, not {', '.join(outputs)}")
    for name, output in graph.outputs.items():
        _check_output(path, name, output, classes)
    return graph


def _check_input(path: Path, graph: Graph, spec: InputSpec) -> None:
    """Raise BundleError unless the only input is image uint8 [N, height, width, channels]."""
    image = graph.inputs.get("image")
    is_expected = (
        len(graph.inputs) == 1
        and image is not None
        and image.element_type == _UINT8
        and image.shape[1:] == (spec.height, spec.width, spec.channels)
        and not isinstance(image.shape[0], int)
    )
    if not is_expected:
        raise BundleError(
            f"{path}: its input is {_format_types(graph.inputs)}, "
            f"not image uint8 [N, {spec.height}, {spec.width}, {spec.channels}]"
        )


def _check_output(path: Path, name: str, output: TensorType, classes: int) -> None:
    """Raise BundleError unless the output is float32 with the rank and classes of its name."""
    rank = OUTPUT_RANKS.get(name)
    if output.element_type != _FLOAT or len(output.shape) != rank:
        raise BundleError(
            f"{path}: its output is {_format_types({name: output})}, not float32 of rank {rank}"
        )
    if name in OUTPUTS_BY_CLASS and output.shape[1] != classes:
        raise BundleError(f"{path}: its output {name} has {output.shape[1]} classes, not {classes}")


def parse_graph(path: Path, content: bytes) -> Graph:
    """Return opset, signature and operators of an ONNX file with these contents.

    `path` names the file in error messages. Raises BundleError for contents that are too large,
    damaged, or not allowed.
    """
    if not 0 < len(content) <= MAX_BYTES:
        raise BundleError(
            f"{path}: {len(content)} bytes is not a valid size for an ONNX file (1 to {MAX_BYTES})"
        )
    if content[ORT_MAGIC_SLICE] == ORT_MAGIC:
        raise BundleError(f"{path}: in onnxruntime's own format; only ONNX is allowed")

    graph = Graph()
    try:
        _read_message(memoryview(content), "model", graph, depth=0)
    except _NotAllowed as error:
        raise BundleError(f"{path}: {error}") from error
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path}: not an ONNX file, or cut short ({error})") from error
    return graph


def _read_message(data: memoryview, message: str, graph: Graph, depth: int) -> None:
    """Read one message into `graph`, and the messages inside it."""
    if message == "tensor":
        _check_tensor(data)
    elif message == "training":
        raise _NotAllowed("contains training information, which is not allowed")
    elif message == "input":
        name, tensor_type = _read_value_info(data)
        graph.inputs[name] = tensor_type
    elif message == "output":
        name, tensor_type = _read_value_info(data)
        graph.outputs[name] = tensor_type
    elif message == "opset":
        _read_opset(data, graph)
    elif message == "node":
        _read_node(data, graph, depth)
    else:
        _read_nested(data, message, graph, depth)


def _read_nested(data: memoryview, message: str, graph: Graph, depth: int) -> None:
    """Read the messages inside one message into `graph`, as _NESTED_MESSAGES names them."""
    if depth > MAX_DEPTH:
        raise _NotAllowed(f"nested deeper than {MAX_DEPTH} messages, which is not allowed")
    nested_messages = _NESTED_MESSAGES[message]
    for number, value in _read_fields(data):
        if number in nested_messages:
            _read_message(_as_bytes(value), nested_messages[number], graph, depth + 1)


def _read_node(data: memoryview, graph: Graph, depth: int) -> None:
    domain = ""
    operator = ""
    for number, value in _read_fields(data):
        if number == _OP_TYPE:
            operator = _as_text(value)
        elif number == _DOMAIN:
            domain = _as_text(value)
    _read_nested(data, "node", graph, depth)

    if domain not in ALLOWED_DOMAINS:
        raise _NotAllowed(f"operator {operator} of the unknown domain {domain!r}")
    graph.operators.add(operator)


def _check_tensor(data: memoryview) -> None:
    """Raise _NotAllowed where the tensor's data is in another file."""
    for number, value in _read_fields(data):
        is_external = number == _DATA_LOCATION and value == _EXTERNAL
        if number == _EXTERNAL_DATA or is_external:
            raise _NotAllowed("keeps weights in another file (external data), which is not allowed")


def _read_opset(data: memoryview, graph: Graph) -> None:
    fields = dict(_read_fields(data))
    domain = _as_text(fields.get(1, memoryview(b"")))
    if domain in ("", "ai.onnx"):
        version = _as_number(fields.get(2, 0))
        graph.opset = max(graph.opset, version)


def _read_value_info(data: memoryview) -> tuple[str, TensorType]:
    """Return the name and type of an input or output."""
    value_info = dict(_read_fields(data))
    name = _as_text(value_info.get(1, memoryview(b"")))
    type_proto = _read_submessage(value_info, 2)
    tensor = _read_submessage(type_proto, 1)

    shape: list[Dimension] = []
    for number, dimension in _read_fields(_as_bytes(tensor.get(2, memoryview(b"")))):
        if number == 1:
            shape.append(_read_dimension(_as_bytes(dimension)))
    return name, TensorType(_as_number(tensor.get(1, 0)), tuple(shape))


def _read_submessage(fields: dict[int, FieldValue], number: int) -> dict[int, FieldValue]:
    """Return the fields of the message in field `number`, none where it is missing."""
    return dict(_read_fields(_as_bytes(fields.get(number, memoryview(b"")))))


def _read_dimension(data: memoryview) -> Dimension:
    fields = dict(_read_fields(data))
    if 1 in fields:
        return _as_number(fields[1])
    if 2 in fields:
        return _as_text(fields[2])
    return None


def _read_fields(data: memoryview) -> Iterator[tuple[int, FieldValue]]:
    """Yield field number and value of each field of one message."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number = key >> 3
        wire_type = key & 7

        if wire_type == 0:
            value, position = _read_varint(data, position)
            yield number, value
            continue

        if wire_type == 1:
            length = 8
        elif wire_type == 2:
            length, position = _read_varint(data, position)
        elif wire_type == 5:
            length = 4
        else:
            raise ValueError(f"unknown wire type {wire_type}")

        left = len(data) - position
        if length > left:
            raise ValueError(f"a field of {length} bytes where {left} are left")
        yield number, data[position : position + length]
        position += length


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the number at `position` and the position after it."""
    number = 0
    for shift in range(0, 70, 7):  # at most ten bytes
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a varint of more than ten bytes")


def _as_number(value: FieldValue) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number should be")
    return value


def _as_bytes(value: FieldValue) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _as_text(value: FieldValue) -> str:
    return bytes(_as_bytes(value)[:256]).decode("utf-8", "replace")


def _format_types(types: dict[str, TensorType]) -> str:
    """Format inputs or outputs, e.g. "image uint8 [N, 32, 32, 3]"."""
    formatted: list[str] = []
    for name, tensor_type in types.items():
        type_name = _TYPE_NAMES.get(tensor_type.element_type, f"type {tensor_type.element_type}")
        shape = ", ".join(map(str, tensor_type.shape))
        formatted.append(f"{name} {type_name} [{shape}]")
    return "; ".join(formatted) or "none"
