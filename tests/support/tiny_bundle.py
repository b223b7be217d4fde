"""A bundle that is written in milliseconds: it classifies colours with a graph of a few nodes.

The graph has the inputs and outputs of a trained one. The expected outputs of its samples are
computed here with numpy, not by a runtime. The second half of the file alters a bundle: new
checksums, a second variant, a graph that fails, hangs or is slow.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.bundle import (
    Calibration,
    DataInfo,
    Histogram,
    Manifest,
    Provenance,
    Sample,
    Variant,
    file_sha256,
    write_checksums,
)
from models.image import InputSpec, decode
from models.store import Store

CLASSES = ["red", "green", "blue"]
CHANNEL_WEIGHT = 8.0
"""Factor of the mean of a channel in the logit of its class."""
OUTPUTS = ["probabilities", "energy", "embedding", "cam"]
ENDLESS = 2**62
"""Iterations of a loop that ends in no test's time."""


def make_image(label: str, size: int = 32, kind: str = ".png", seed: int = 0) -> bytes:
    """The bytes of an image file: noise over the colour of the class."""
    pixels = np.random.default_rng(seed).integers(0, 60, (size, size, 3), np.uint8)
    pixels[:, :, 2 - CLASSES.index(label)] += 150  # cv2 writes BGR
    return cv2.imencode(kind, pixels)[1].tobytes()


def class_weights(classes: int, channels: int, scale: float) -> np.ndarray:
    """float32 [classes, channels]: class i weighs channel i modulo the number of channels."""
    identity = np.eye(channels, dtype=np.float32)
    return np.resize(identity, (classes, channels)) * CHANNEL_WEIGHT * scale


def build_graph(spec: InputSpec, classes: int, scale: float = 1.0) -> onnx.ModelProto:
    """Build the graph: mean colour times a matrix, softmax.

    `scale` multiplies the logits, so that two graphs with different scales give different outputs.
    """
    weights = class_weights(classes, spec.channels, scale)
    constants = {
        "scale": np.float32(255),
        "space": np.array([2, 3]),
        "last": np.array([1]),
        "weights": weights,
        "kernels": weights[:, :, None, None],
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["floats", "scale"], ["unit"]),
        helper.make_node("Transpose", ["unit"], ["features"], perm=[0, 3, 1, 2]),
        helper.make_node("ReduceMean", ["features", "space"], ["embedding"], keepdims=0),
        helper.make_node("Gemm", ["embedding", "weights"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ReduceLogSumExp", ["logits", "last"], ["free"], keepdims=0),
        helper.make_node("Neg", ["free"], ["energy"]),
        helper.make_node("Conv", ["features", "kernels"], ["cam"]),
    ]
    input_shape = ["N", spec.height, spec.width, spec.channels]
    output_shapes = {
        "probabilities": ["N", classes],
        "energy": ["N"],
        "embedding": ["N", spec.channels],
        "cam": ["N", classes, spec.height, spec.width],
    }
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, input_shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in output_shapes.items()
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def expected_outputs(images: np.ndarray, classes: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """The outputs of the graph for uint8 [N,H,W,C] images, computed with numpy."""
    unit = images.astype(np.float64) / 255
    weights = class_weights(classes, images.shape[3], scale).astype(np.float64)

    embedding = unit.mean((1, 2))
    logits = embedding @ weights.T
    free_energy = np.log(np.exp(logits).sum(1))
    return {
        "probabilities": np.exp(logits - free_energy[:, None]).astype(np.float32),
        "energy": (-free_energy).astype(np.float32),
        "embedding": embedding.astype(np.float32),
        "cam": np.einsum("nhwc,kc->nkhw", unit, weights).astype(np.float32),
    }


def publish(
    store: Path | str,
    name: str = "colours",
    classes: list[str] | None = None,
    scale: float = 1.0,
    size: int = 32,
    promote: bool = True,
    calibration: Calibration | None = None,
    baseline: dict[str, Histogram] | None = None,
    samples: int = 16,
    files: list[bytes] | None = None,
) -> Path:
    """Publish the next version of a tiny model and return its directory, for a URL that of a copy.

    `files` are the samples' images; without them `samples` images of the three colours are made.
    """
    classes = classes or CLASSES
    files = files or [make_image(CLASSES[i % 3], size, seed=i) for i in range(samples)]
    spec = InputSpec(height=size, width=size, channels=3, resize="crop")

    with Store(store).stage(name) as staged:
        model = staged.path / "model.onnx"
        onnx.save(build_graph(spec, len(classes), scale), model)
        _write_samples(staged.path / "samples", files, spec, len(classes), scale)
        manifest = Manifest(
            name=name,
            version=staged.version,
            created=datetime.now(UTC),
            network="tiny",
            classes=classes,
            input=spec,
            outputs=OUTPUTS,
            variants={
                "fp32": Variant(
                    file="model.onnx",
                    precision="fp32",
                    sha256=file_sha256(model),
                    opset=18,
                    bytes=model.stat().st_size,
                )
            },
            samples=[Sample(file=f"{i:02d}.png", label=i % 3) for i in range(samples)],
            calibration=calibration or Calibration(),
            baseline=baseline or {},
            provenance=Provenance(
                data=DataInfo(source="made", digest="0" * 64, counts={"train": 0}),
                device="cpu",
                seed=0,
            ),
        )
        manifest.write(staged.path)
        write_checksums(staged.path)
        return staged.publish(promote).path


def _write_samples(
    directory: Path, files: list[bytes], spec: InputSpec, classes: int, scale: float
) -> None:
    directory.mkdir()
    for i, data in enumerate(files):
        (directory / f"{i:02d}.png").write_bytes(data)
    pixels = np.stack([decode(data, spec) for data in files])
    outputs = expected_outputs(pixels, classes, scale)
    np.savez(directory / "expected.npz", pixels=pixels, **outputs)


def edit_manifest(bundle: Path, **changes: object) -> None:
    """Set fields of the manifest; SHA256SUMS no longer matches it."""
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | changes))


def update_checksums(bundle: Path) -> None:
    """Make all checksums match the files again, as an attacker would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for variant in manifest["variants"].values():
        file = bundle / variant["file"]
        if file.is_file():
            variant["sha256"] = file_sha256(file)
    edit_manifest(bundle, variants=manifest["variants"])
    write_checksums(bundle)


def add_int8(bundle: Path, scale: float = 1.0) -> None:
    """Add a variant named int8; with another scale its outputs are not those of the samples."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    spec = InputSpec(**manifest["input"])
    onnx.save(build_graph(spec, len(manifest["classes"]), scale), bundle / "model.int8.onnx")

    fp32 = manifest["variants"]["fp32"]
    int8 = fp32 | {"file": "model.int8.onnx", "precision": "int8"}
    edit_manifest(bundle, variants={"fp32": fp32, "int8": int8})
    update_checksums(bundle)


def remove_output(bundle: Path, name: str) -> None:
    """Remove an output of the graph, such as cam; the checksums match again."""
    graph = onnx.load(bundle / "model.onnx")
    del graph.graph.output[OUTPUTS.index(name)]
    onnx.save(graph, bundle / "model.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["outputs"].remove(name)
    edit_manifest(bundle, outputs=manifest["outputs"])
    update_checksums(bundle)


def insert_nodes(
    bundle: Path, *nodes: onnx.NodeProto, file: str = "model.onnx", **constants: np.ndarray
) -> None:
    """Insert nodes that compute "unit", the pixels in 0..1, from "given"; update the checksums."""
    model = onnx.load(bundle / file)
    graph = model.graph
    index = next(i for i, node in enumerate(graph.node) if node.output[0] == "unit")
    graph.node[index].output[0] = "given"
    for offset, node in enumerate(nodes):
        graph.node.insert(index + 1 + offset, node)
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(value, name))

    onnx.save(model, bundle / file)
    update_checksums(bundle)


def fail_on_bright_pixels(bundle: Path, least: float = 1.0, file: str = "model.onnx") -> None:
    """Make the graph index out of a table's range where a pixel is at least this bright, 0..1."""
    insert_nodes(
        bundle,
        helper.make_node("ReduceMax", ["given"], ["brightest"], keepdims=0),
        helper.make_node("Div", ["brightest", "least"], ["share"]),
        helper.make_node("Cast", ["share"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["one"]),
        helper.make_node("Mul", ["given", "one"], ["unit"]),
        file=file,
        least=np.float32(least),
        table=np.ones(1, np.float32),
    )


def give_nan_for_black(bundle: Path) -> None:
    """Make all outputs for a black image NaN; those of the others stay the same."""
    insert_nodes(
        bundle,
        helper.make_node("ReduceMax", ["given", "pixels"], ["brightest"], keepdims=1),
        helper.make_node("Sub", ["brightest", "least"], ["difference"]),
        helper.make_node("Sqrt", ["difference"], ["root"]),
        helper.make_node("Mul", ["root", "zero"], ["zero_or_nan"]),
        helper.make_node("Add", ["given", "zero_or_nan"], ["unit"]),
        pixels=np.array([1, 2, 3]),
        least=np.float32(0.001),
        zero=np.float32(0),
    )


def loop_forever(bundle: Path) -> None:
    """Make the graph loop endlessly for every image."""
    insert_nodes(bundle, _loop("count"), count=np.array(ENDLESS), true=np.array(True))


def loop_forever_on_white(bundle: Path) -> None:
    """Make the graph loop endlessly for an image with a white pixel; no sample has one."""
    insert_nodes(
        bundle,
        helper.make_node("ReduceMax", ["given"], ["brightest"], keepdims=0),
        helper.make_node("Cast", ["brightest"], ["is_white"], to=TensorProto.INT64),
        helper.make_node("Mul", ["is_white", "count"], ["iterations"]),
        _loop("iterations"),
        count=np.array(ENDLESS),
        true=np.array(True),
    )


def slow_down(bundle: Path, file: str = "model.onnx", iterations: int = 3000) -> None:
    """Make the graph loop for some milliseconds; its outputs stay the same."""
    insert_nodes(bundle, _loop("count"), file=file, count=np.array(iterations), true=np.array(True))


def _loop(iterations: str) -> onnx.NodeProto:
    """A Loop node that computes "unit" from "given" without changing it."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["continue"], ["continue_next"]),
            helper.make_node("Abs", ["before"], ["after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("continue", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("continue_next", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    return helper.make_node("Loop", [iterations, "true", "given"], ["unit"], body=body)
