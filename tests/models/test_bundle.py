"""Bundles that are not what was written, at the door that everybody can use: `python -m models verify PATH`."""
import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.__main__ import main
from models.bundle import Bundle, BundleError, InputSpec
from models.digests import sha256, write_sums
from models.graph import read_graph

SPEC = InputSpec(height=32, width=32, channels=3)


@pytest.fixture
def bundle(bundle_store: Path, tmp_path: Path) -> Path:
    """A copy of a good bundle, to be spoiled."""
    return shutil.copytree(bundle_store / "colours" / "1", tmp_path / "bundle")


def verify(path: Path, capsys: pytest.CaptureFixture, *flags: str) -> tuple[int, str]:
    """Exit status, and the one line that says why (or the last line where all is well)."""
    status = main(["verify", str(path), *flags])
    said = capsys.readouterr()
    assert said.err.count("\n") == (1 if said.err else 0), said.err
    return status, said.err.strip() or said.out.strip().splitlines()[-1]


def edit(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | changes))


def reseal(bundle: Path) -> None:
    """Make the digests fit again, as one would who means harm."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for variant in manifest["variants"].values():
        if (file := bundle / variant["file"]).is_file():
            variant["sha256"] = sha256(file)
    edit(bundle, variants=manifest["variants"])
    write_sums(bundle)


def test_a_good_bundle_passes(bundle, capsys):
    assert verify(bundle, capsys) == (0, "ok: colours/1 does here what it did when made")


def test_verify_tells_digests_samples_and_latency(bundle, capsys):
    assert main(["verify", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert "digests fit, signed: no; 16 samples" in said
    assert "100 % same labels; batch 1 " in said
    assert "batch 8 " in said


def test_an_answer_that_differs_fails(bundle, capsys):
    onnx.save(tiny.graph(SPEC, 3, scale=1.01), bundle / "model.onnx")
    reseal(bundle)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert line.startswith("FAILED: fp32: probabilities differ by ")


def test_samples_that_decode_otherwise_fail(bundle, capsys):
    (bundle / "samples" / "00.png").write_bytes(tiny.image("green"))
    reseal(bundle)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert "samples decode differently here" in line


def test_a_sample_that_is_no_image_is_named(bundle, capsys):
    (bundle / "samples" / "03.png").write_bytes(b"nonsense")
    reseal(bundle)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert f"{bundle}/samples/03.png: not a JPEG" in line


def test_a_bundle_without_samples_proves_nothing(bundle, capsys):
    edit(bundle, samples=[])
    write_sums(bundle)
    assert verify(bundle, capsys) == (1, f"error: {bundle}/manifest.json: names no samples to check the bundle by")


FILES = ["manifest.json", "model.onnx", "samples/00.png", "samples/expected.npz"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(bundle, capsys, name):
    data = bytearray((bundle / name).read_bytes())
    at = data.index(b'"tiny"') + 1 if name == "manifest.json" else len(data) // 2
    data[at] ^= 1
    (bundle / name).write_bytes(data)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert f"{name}: changed since it was written" in line


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_missing_file_is_named(bundle, capsys, name):
    (bundle / name).unlink()
    status, line = verify(bundle, capsys)
    assert status == 1
    assert name in line
    assert "missing" in line or "no such file" in line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_torn_file_is_named(bundle, capsys, name, kept):
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:int(kept * len(data))])
    status, line = verify(bundle, capsys)
    assert status == 1
    assert name in line


def test_a_file_that_was_added_is_named(bundle, capsys):
    (bundle / "payload.bin").write_bytes(b"x")
    assert verify(bundle, capsys) == (1, f"error: {bundle}/payload.bin: not listed in SHA256SUMS")


def test_a_bundle_that_was_renamed_in_its_store_is_refused(bundle, tmp_path, capsys):
    moved = tmp_path / "colours" / "7"
    moved.parent.mkdir()
    bundle.rename(moved)
    status, line = verify(moved, capsys)
    assert status == 1
    assert f"{moved}/manifest.json: says colours/1, so the bundle was renamed" in line


@pytest.mark.parametrize(("changes", "says"), [
    ({"format": 2}, "format 2 is newer than the 1 this Imago reads; update Imago"),
    ({"classes": ["one"]}, "classes: List should have at least 2 items"),
    ({"version": 0}, "version: Input should be greater than or equal to 1"),
    ({"name": "../etc"}, "name: String should match pattern"),
    ({"variants": {}}, "variants: Dictionary should have at least 1 item"),
    ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ({"outputs": ["probabilities"]}, "model.onnx: its outputs are probabilities, energy, embedding, cam, not"),
    ({"classes": ["a", "b"]}, "model.onnx: its output probabilities has 3 classes, not 2"),
    ({"input": {"height": 8, "width": 8, "channels": 1}}, "model.onnx: its input is image uint8 [N, 32, 32, 3], not"),
])
def test_a_wrong_manifest_is_refused(bundle, capsys, changes, says):
    edit(bundle, **changes)
    write_sums(bundle)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert says in line


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "{", "[" * 100_000, "\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(bundle, capsys, text):
    (bundle / "manifest.json").write_text(text, encoding="latin-1")
    status, line = verify(bundle, capsys)
    assert status == 1
    assert "manifest.json: " in line


@pytest.mark.parametrize("place", ["../model.onnx", "/etc/passwd", "samples/../../model.onnx"])
def test_a_path_that_climbs_out_is_refused(bundle, capsys, place):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["variants"]["fp32"]["file"] = place
    edit(bundle, variants=manifest["variants"])
    write_sums(bundle)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert f"the path {place!r} leads out of the bundle" in line


def test_a_path_that_climbs_out_of_the_digests_is_refused(bundle, capsys):
    with (bundle / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  ../../secret\n")
    status, line = verify(bundle, capsys)
    assert status == 1
    assert "'../../secret' leads out of the bundle" in line


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path, capsys):
    shutil.move(bundle / "model.onnx", tmp_path / "elsewhere.onnx")
    os.symlink(tmp_path / "elsewhere.onnx", bundle / "model.onnx")
    status, line = verify(bundle, capsys)
    assert status == 1
    assert "'model.onnx' leads out of the bundle" in line


def test_expected_outputs_that_would_run_code_are_refused(bundle, capsys):
    np.savez(bundle / "samples" / "expected.npz", probabilities=np.array([{"a": 1}], dtype=object))
    reseal(bundle)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert "expected.npz: unreadable expected outputs" in line


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
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("c", 1, [3])])
    model.graph.node.append(helper.make_node("If", ["scale"], ["unused"], then_branch=branch, else_branch=branch))
    return model


def with_an_operator_of_its_own(model: onnx.ModelProto) -> onnx.ModelProto:
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


@pytest.mark.parametrize(("spoil", "says"), [
    (with_external_data, "keeps weights in another file"),
    (with_external_data_in_a_branch, "keeps weights in another file"),
    (with_an_operator_of_its_own, "operator Cast of the unknown domain 'evil.custom'"),
    (with_a_float_input, "its input is image float32 [N, 32, 32, 3], not image uint8 [N, 32, 32, 3]"),
    (with_a_fixed_batch, "its input is image uint8 [1, 32, 32, 3], not"),
    (with_a_second_input, "more float32 [1], not"),
    (with_flat_probabilities, "its output is probabilities float32 [3], not float32 of rank 2"),
    (with_another_opset, "opset 17, and manifest.json says 18"),
    (with_training, "carries training steps"),
])
def test_another_graph_than_promised_is_refused_before_any_runtime_opens_it(bundle, capsys, spoil, says):
    model = spoil(tiny.graph(SPEC, 3))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    reseal(bundle)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert f"{bundle}/model.onnx: " in line
    assert says in line


def test_a_graph_that_the_manifest_does_not_mean_is_refused(bundle, capsys):
    onnx.save(tiny.graph(SPEC, 3, scale=2), bundle / "model.onnx")
    write_sums(bundle)
    status, line = verify(bundle, capsys)
    assert status == 1
    assert "model.onnx: not the file that manifest.json means by fp32" in line


def test_files_larger_than_any_bundle_has_are_refused(bundle, capsys):
    with (bundle / "manifest.json").open("ab") as file:
        file.truncate(1 << 30)  # sparse: takes no room
    assert "manifest.json: larger than" in verify(bundle, capsys)[1]
    shutil.copy(bundle / "SHA256SUMS", bundle / "sums")
    with (bundle / "model.onnx").open("ab") as file:
        file.truncate(2**31)
    with pytest.raises(BundleError, match="2147483648 bytes is no size for an ONNX file"):
        read_graph(bundle / "model.onnx")


WHOLE = tiny.graph(SPEC, 3).SerializeToString()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_graph_is_read_or_refused_and_nothing_else(tmp_path_factory, data):
    spoiled = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.onnx"
    file.write_bytes(spoiled[:data.draw(st.integers(1, len(spoiled)))])
    with contextlib.suppress(BundleError):  # anything else fails the test
        read_graph(file)


def test_read_back_by_our_own_reader_as_by_onnx(bundle):
    graph, model = read_graph(bundle / "model.onnx"), onnx.load(bundle / "model.onnx")
    assert graph.opset == model.opset_import[0].version
    assert graph.operators == {node.op_type for node in model.graph.node}
    assert list(graph.inputs) == ["image"]
    assert list(graph.outputs) == [output.name for output in model.graph.output]


def test_the_digest_stands_for_every_file(bundle):
    before = Bundle(bundle).digest
    (bundle / "samples" / "00.png").write_bytes(tiny.image("green"))
    reseal(bundle)
    assert Bundle(bundle).digest != before
