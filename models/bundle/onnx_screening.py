"""ONNX files as untrusted input: what one is, read from its bytes before any runtime opens it.

A walk over the protobuf wire format that never touches the weights: no `onnx` package is needed, and nothing is
allocated by what the file claims. Refused: files that are cut short, that keep weights in other files, that use
operators of a domain that is not known, or that have another signature than the bundle's.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from models.bundle.checksums import BundleError

MAX_BYTES = 2**31 - 1  # protobuf's own limit
MAX_DEPTH = 16
DOMAINS = {"", "ai.onnx", "com.microsoft"}
RANKS = {"probabilities": 2, "energy": 1, "embedding": 2, "cam": 4}
UINT8, FLOAT = 2, 1  # TensorProto.DataType

# Where messages nest in onnx.proto3 (ONNX IR 10): message -> field number -> message. Other fields are leaves here.
_MESSAGES = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 11: "input", 12: "output", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "subgraph",
        10: "tensor",
        11: "subgraph",
        22: "sparse",
        23: "sparse",
    },
    "subgraph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
}
Dim = int | str | None


@dataclass
class Graph:
    """What an ONNX file says of itself. Shapes hold a number, a name or None for each dimension."""

    opset: int = 0
    inputs: dict[str, tuple[int, tuple[Dim, ...]]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, tuple[Dim, ...]]] = field(default_factory=dict)
    operators: set[str] = field(default_factory=set)


def read_graph(path: Path) -> Graph:
    """Opset, signature and operators of an ONNX file.

    Raises BundleError for a file that is missing, too large, damaged, or not self-contained.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise BundleError(
                f"{path}: {size} bytes is no size for an ONNX file (1 to {MAX_BYTES})"
            )
        graph = Graph()
        with path.open("rb") as file:
            _walk(
                memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), "model", graph, 0
            )
    except OSError as error:
        raise BundleError(f"{path}: not readable: {error.strerror or error}") from error
    except _Refused as error:
        raise BundleError(f"{path}: {error}") from error
    except (ValueError, IndexError) as error:
        raise BundleError(f"{path}: not an ONNX file, or cut short ({error})") from error
    return graph


def check_graph(
    path: Path, height: int, width: int, channels: int, classes: int, outputs: list[str]
) -> Graph:
    """Read the graph and compare it with what the bundle says; raises BundleError that tells the difference."""
    graph = read_graph(path)
    want = (UINT8, (height, width, channels))
    found = {name: (kind, shape[1:]) for name, (kind, shape) in graph.inputs.items()}
    if found != {"image": want} or isinstance(graph.inputs["image"][1][0], int):
        raise BundleError(
            f"{path}: its input is {_spell(graph.inputs)}, "
            f"not image uint8 [N, {height}, {width}, {channels}]"
        )
    if sorted(graph.outputs) != sorted(outputs):
        raise BundleError(
            f"{path}: its outputs are {', '.join(graph.outputs) or 'none'}, not {', '.join(outputs)}"
        )
    for name, (kind, shape) in graph.outputs.items():
        if kind != FLOAT or len(shape) != RANKS.get(name):
            raise BundleError(
                f"{path}: its output is {_spell({name: (kind, shape)})}, "
                f"not float32 of rank {RANKS.get(name)}"
            )
        if name in ("probabilities", "cam") and shape[1] != classes:
            raise BundleError(f"{path}: its output {name} has {shape[1]} classes, not {classes}")
    return graph


class _Refused(ValueError):
    """Readable, and not allowed."""


def _walk(data: memoryview, message: str, graph: Graph, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _Refused(f"nested deeper than {MAX_DEPTH}")
    nested, domain, operator = _MESSAGES.get(message, {}), "", ""
    for number, value in _fields(data):
        if message == "node" and number == 4:
            operator = _text(value)
        elif message == "node" and number == 7:
            domain = _text(value)
        elif number in nested:
            _enter(_bytes(value), nested[number], graph, depth + 1)
    if message == "node":
        if domain not in DOMAINS:
            raise _Refused(f"operator {operator} of the unknown domain {domain!r}")
        graph.operators.add(operator)


def _enter(data: memoryview, message: str, graph: Graph, depth: int) -> None:
    if message == "tensor":
        if any(number == 13 or (number == 14 and value == 1) for number, value in _fields(data)):
            raise _Refused("keeps weights in another file (external data)")
    elif message == "training":
        raise _Refused("carries training steps")
    elif message in ("input", "output"):
        name, kind, shape = _value_info(data)
        (graph.inputs if message == "input" else graph.outputs)[name] = kind, shape
    elif message == "opset":
        found = dict(_fields(data))
        if _text(found.get(1, b"")) in ("", "ai.onnx"):
            graph.opset = max(graph.opset, _number(found.get(2, 0)))
    else:
        _walk(data, message, graph, depth)


def _value_info(data: memoryview) -> tuple[str, int, tuple[Dim, ...]]:
    """ValueInfoProto: name = 1, type = 2 -> tensor_type = 1 -> elem_type = 1, shape = 2 -> dim = 1."""
    value = dict(_fields(data))
    tensor = dict(_fields(_bytes(dict(_fields(_bytes(value.get(2, b"")))).get(1, b""))))
    dims: list[Dim] = []
    for number, dim in _fields(_bytes(tensor.get(2, b""))):
        if number == 1:
            known = dict(_fields(_bytes(dim)))  # dim_value = 1, dim_param = 2
            dims.append(
                _number(known[1]) if 1 in known else _text(known[2]) if 2 in known else None
            )
    return _text(value.get(1, b"")), _number(tensor.get(1, 0)), tuple(dims)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field of one message; protobuf's wire types 0, 1, 2 and 5."""
    value: int | memoryview
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if length > end - at:
                raise ValueError(f"a field of {length} bytes, and {end - at} are left")
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a varint without end")


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number should be")
    return value


def _bytes(value: int | bytes | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return memoryview(value)


def _text(value: int | bytes | memoryview) -> str:
    return bytes(_bytes(value)[:256]).decode("utf-8", "replace")


def _spell(values: dict[str, tuple[int, tuple[Dim, ...]]]) -> str:
    kinds = {
        1: "float32",
        2: "uint8",
        3: "int8",
        6: "int32",
        7: "int64",
        10: "float16",
        11: "float64",
        16: "bfloat16",
    }
    spelled = (
        f"{name} {kinds.get(kind, f'type {kind}')} [{', '.join(map(str, shape))}]"
        for name, (kind, shape) in values.items()
    )
    return "; ".join(spelled) or "none"
