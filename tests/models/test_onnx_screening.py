"""Graphs with another signature or forbidden contents are refused before a runtime opens them."""

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.bundle import BundleError
from models.bundle.onnx_screening import Graph, parse_graph
from models.image import InputSpec
from support import tiny_bundle

SPEC = InputSpec(height=32, width=32, channels=3)


def read_graph(file: Path) -> Graph:
    return parse_graph(file, file.read_bytes())


def with_external_data(model: onnx.ModelProto) -> onnx.ModelProto:
    tensor = next(t for t in model.graph.initializer if t.name == "weights")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    return model


def with_external_data_in_a_branch(model: onnx.ModelProto) -> onnx.ModelProto:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "hidden")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere.bin")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    branch = helper.make_graph(
        [constant], "branch", [], [helper.make_tensor_value_info("c", 1, [3])]
    )
    model.graph.node.append(
        helper.make_node("If", ["scale"], ["unused"], then_branch=branch, else_branch=branch)
    )
    return model


def with_a_custom_operator(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.node[0].domain = "evil.custom"
    return model


def with_a_float_input(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def with_a_fixed_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return model


def with_a_second_input(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    return model


def with_flat_probabilities(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.output[0].type.tensor_type.shape.dim[0]
    return model


def with_another_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    model.opset_import[0].version = 17
    return model


def with_training(model: onnx.ModelProto) -> onnx.ModelProto:
    model.training_info.add()
    return model


def with_the_mark_of_another_format(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return valid ONNX whose bytes 4 to 7 make onnxruntime read it as its own format."""
    model.producer_name = "ORTM"
    assert model.SerializeToString()[4:8] == b"ORTM"
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_external_data, "keeps weights in another file"),
        (with_external_data_in_a_branch, "keeps weights in another file"),
        (with_a_custom_operator, "operator Cast of the unknown domain 'evil.custom'"),
        (
            with_a_float_input,
            "its input is image float32 [N, 32, 32, 3], not image uint8 [N, 32, 32, 3]",
        ),
        (with_a_fixed_batch, "its input is image uint8 [1, 32, 32, 3], not"),
        (with_a_second_input, "more float32 [1], not"),
        (with_flat_probabilities, "its output is probabilities float32 [3], not float32 of rank 2"),
        (with_another_opset, "has opset 17, but manifest.json says 18"),
        (with_training, "contains training information"),
        (with_the_mark_of_another_format, "in onnxruntime's own format"),
    ],
)
def test_a_graph_that_does_not_fit_the_manifest_is_refused(bundle, verify, change, message):
    model = change(tiny_bundle.build_graph(SPEC, 3))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    tiny_bundle.update_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert f"{bundle}/model.onnx: " in line
    assert message in line


VALID = tiny_bundle.build_graph(SPEC, 3).SerializeToString()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_graph_is_read_or_raises_bundle_error(tmp_path_factory, data):
    damaged = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.onnx"
    file.write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    with contextlib.suppress(BundleError):  # anything else fails the test
        read_graph(file)


def test_text_for_an_opset_is_refused(tmp_path):
    opset = b"\x42\x03\x12\x01A"  # field 8 of 3 bytes, in it field 2 of 1 byte
    file = tmp_path / "text.onnx"
    file.write_bytes(VALID + opset)
    with pytest.raises(BundleError, match="a message where a number should be"):
        read_graph(file)


def test_a_graph_is_read_as_the_onnx_package_reads_it(bundle):
    graph = read_graph(bundle / "model.onnx")
    model = onnx.load(bundle / "model.onnx")
    assert graph.opset == model.opset_import[0].version
    assert graph.operators == {node.op_type for node in model.graph.node}
    assert list(graph.inputs) == ["image"]
    assert list(graph.outputs) == [output.name for output in model.graph.output]
