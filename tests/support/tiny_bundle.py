"""A bundle small enough to be written in milliseconds: colours, told apart by a graph of a few nodes.

The graph has the signature of a real one. Its expected outputs are computed here with numpy, not by a runtime.
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
    write_checksums,
)
from models.bundle.checksums import file_sha256
from models.image import InputSpec, decode
from models.store import Store

CLASSES = ["red", "green", "blue"]
WEIGHT = 8.0  # of a pixel's own channel in its class


def make_image(label: str, size: int = 32, kind: str = ".png", seed: int = 0) -> bytes:
    """A noisy picture of one colour as a file's bytes."""
    pixels = np.random.default_rng(seed).integers(0, 60, (size, size, 3), np.uint8)
    pixels[:, :, 2 - CLASSES.index(label)] += 150  # cv2 writes BGR
    return cv2.imencode(kind, pixels)[1].tobytes()


def build_graph(spec: InputSpec, classes: int, scale: float = 1.0) -> onnx.ModelProto:
    """Mean colour times a matrix, softmax. `scale` multiplies the logits: another value gives other answers."""
    weights = (
        np.resize(np.eye(spec.channels, dtype=np.float32), (classes, spec.channels))
        * WEIGHT
        * scale
    )
    shape = ["N", spec.height, spec.width, spec.channels]
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
    constants = {
        "scale": np.float32(255),
        "space": np.array([2, 3]),
        "last": np.array([1]),
        "weights": weights,
        "kernels": weights[:, :, None, None],
    }
    outputs = {
        "probabilities": ["N", classes],
        "energy": ["N"],
        "embedding": ["N", spec.channels],
        "cam": ["N", classes, spec.height, spec.width],
    }
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
            for name, dims in outputs.items()
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def expected_outputs(images: np.ndarray, classes: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """What the graph gives, by numpy: uint8 [N,H,W,C] to its outputs."""
    unit = images.astype(np.float64) / 255
    weights = np.resize(np.eye(images.shape[3]), (classes, images.shape[3])) * WEIGHT * scale
    embedding = unit.mean((1, 2))
    logits = embedding @ weights.T
    free = np.log(np.exp(logits).sum(1))
    return {
        "probabilities": np.exp(logits - free[:, None]).astype(np.float32),
        "energy": (-free).astype(np.float32),
        "embedding": embedding.astype(np.float32),
        "cam": np.einsum("nhwc,kc->nkhw", unit, weights).astype(np.float32),
    }


def publish(
    store: Path,
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
    """Publish a version of a tiny model; returns its directory."""
    classes = classes or CLASSES
    spec = InputSpec(height=size, width=size, channels=3, resize="crop")
    place = Store(store)
    with place.stage(name) as staged:
        directory, version = staged.path, staged.version
        onnx.save(build_graph(spec, len(classes), scale), directory / "model.onnx")
        (directory / "samples").mkdir()
        files = files or [make_image(CLASSES[i % 3], size, seed=i) for i in range(samples)]
        for i, data in enumerate(files):
            (directory / "samples" / f"{i:02d}.png").write_bytes(data)
        pixels = np.stack([decode(data, spec) for data in files])
        np.savez(
            directory / "samples" / "expected.npz",
            pixels=pixels,
            **expected_outputs(pixels, len(classes), scale),
        )
        file = directory / "model.onnx"
        Manifest(
            name=name,
            version=version,
            created=datetime.now(UTC),
            network="tiny",
            classes=classes,
            input=spec,
            outputs=["probabilities", "energy", "embedding", "cam"],
            variants={
                "fp32": Variant(
                    file="model.onnx",
                    precision="fp32",
                    sha256=file_sha256(file),
                    opset=18,
                    bytes=file.stat().st_size,
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
        ).write(directory)
        write_checksums(directory)
        staged.publish(promote)
    return store / name / str(version)


def edit_manifest(bundle: Path, **changes: object) -> None:
    """Set fields of the manifest; the digests fit no more."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | changes))


def update_checksums(bundle: Path) -> None:
    """Make the digests fit again, as one would who means harm."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for variant in manifest["variants"].values():
        if (file := bundle / variant["file"]).is_file():
            variant["sha256"] = file_sha256(file)
    edit_manifest(bundle, variants=manifest["variants"])
    write_checksums(bundle)


def add_int8(bundle: Path, scale: float = 1.0) -> None:
    """A second variant, by its name in 8 bits; with another scale its answers are not those of the samples."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    onnx.save(
        build_graph(InputSpec(**manifest["input"]), len(manifest["classes"]), scale),
        bundle / "model.int8.onnx",
    )
    first = manifest["variants"]["fp32"]
    edit_manifest(
        bundle,
        variants={"fp32": first, "int8": first | {"file": "model.int8.onnx", "precision": "int8"}},
    )
    update_checksums(bundle)


def insert_nodes(
    bundle: Path, *nodes: onnx.NodeProto, file: str = "model.onnx", **constants: np.ndarray
) -> None:
    """Put nodes into the graph, which make "unit", the input in 0..1, from "given"; the digests fit again."""
    model = onnx.load(bundle / file)
    at = next(i for i, node in enumerate(model.graph.node) if node.output[0] == "unit")
    model.graph.node[at].output[0] = "given"
    for i, node in enumerate(nodes):
        model.graph.node.insert(at + 1 + i, node)
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    onnx.save(model, bundle / file)
    update_checksums(bundle)


def fail_on_bright_pixels(bundle: Path, least: float = 1.0, file: str = "model.onnx") -> None:
    """Make the graph look up a place that isn't there where a pixel is as bright as `least`, 0..1."""
    insert_nodes(
        bundle,
        helper.make_node("ReduceMax", ["given"], ["brightest"], keepdims=0),
        helper.make_node("Div", ["brightest", "least"], ["share"]),
        helper.make_node("Cast", ["share"], ["place"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "place"], ["one"]),
        helper.make_node("Mul", ["given", "one"], ["unit"]),
        file=file,
        least=np.float32(least),
        table=np.ones(1, np.float32),
    )


def loop_forever(bundle: Path, where_bright: bool = False) -> None:
    """Make the graph go round for ever; or only where a pixel is as bright as can be, as none of the samples is."""
    if where_bright:
        insert_nodes(
            bundle,
            helper.make_node("ReduceMax", ["given"], ["brightest"], keepdims=0),
            helper.make_node("Cast", ["brightest"], ["bright"], to=TensorProto.INT64),
            helper.make_node("Mul", ["bright", "often"], ["turns"]),
            *_loop("turns"),
            often=np.array(2**62),
            true=np.array(True),
        )
    else:
        insert_nodes(bundle, *_loop("often"), often=np.array(2**62), true=np.array(True))


def slow_down(bundle: Path, file: str = "model.onnx", turns: int = 3000) -> None:
    """Make a graph go round some milliseconds; its answers stay the same."""
    insert_nodes(bundle, *_loop("often"), file=file, often=np.array(turns), true=np.array(True))


def _loop(turns: str) -> list[onnx.NodeProto]:
    """Makes "unit" from "given", which it does not change."""
    turn = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["goes_on"]),
            helper.make_node("Abs", ["before"], ["after"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    return [helper.make_node("Loop", [turns, "true", "given"], ["unit"], body=turn)]
