"""Changed, damaged and hostile bundles, through `imago models verify PATH`."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest

from models.__main__ import main
from models.bundle import Bundle, BundleError
from models.bundle.checksums import write_checksums
from models.bundle.onnx_screening import read_graph
from models.image import InputSpec
from support import tiny_bundle

SPEC = InputSpec(height=32, width=32, channels=3)


def test_a_valid_bundle_passes(bundle, verify):
    assert verify(bundle) == (0, "ok: colours/1 reproduces its expected outputs on this machine")


def test_verify_prints_checksums_samples_and_latency(bundle, capsys):
    assert main(["verify", str(bundle)]) == 0
    output = capsys.readouterr().out
    assert "checksums match, signed: no; 16 samples" in output
    assert "100 % same labels; batch 1 " in output
    assert "batch 8 " in output


def test_other_outputs_than_expected_fail(bundle, verify):
    onnx.save(tiny_bundle.build_graph(SPEC, 3, scale=1.01), bundle / "model.onnx")
    tiny_bundle.update_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert line.startswith("FAILED: fp32: probabilities differ by ")


def test_samples_that_decode_differently_fail(bundle, verify):
    (bundle / "samples" / "00.png").write_bytes(tiny_bundle.make_image("green"))
    tiny_bundle.update_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert "samples decode differently on this machine" in line


def test_a_sample_that_is_not_an_image_is_named(bundle, verify):
    (bundle / "samples" / "03.png").write_bytes(b"nonsense")
    tiny_bundle.update_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert f"{bundle}/samples/03.png: not a JPEG" in line


def test_a_bundle_without_samples_is_refused(bundle, verify):
    tiny_bundle.edit_manifest(bundle, samples=[])
    write_checksums(bundle)
    assert verify(bundle) == (
        1,
        f"error: {bundle}/manifest.json: lists no samples, so the bundle can't be verified",
    )


FILES = ["manifest.json", "model.onnx", "samples/00.png", "samples/expected.npz"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(bundle, verify, name):
    data = bytearray((bundle / name).read_bytes())
    at = data.index(b'"tiny"') + 1 if name == "manifest.json" else len(data) // 2
    data[at] ^= 1
    (bundle / name).write_bytes(data)
    status, line = verify(bundle)
    assert status == 1
    assert f"{name}: changed since it was written" in line


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_missing_file_is_named(bundle, verify, name):
    (bundle / name).unlink()
    status, line = verify(bundle)
    assert status == 1
    assert name in line
    assert "missing" in line or "no such file" in line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_truncated_file_is_named(bundle, verify, name, kept):
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[: int(kept * len(data))])
    status, line = verify(bundle)
    assert status == 1
    assert name in line


def test_an_added_file_is_named(bundle, verify):
    (bundle / "payload.bin").write_bytes(b"x")
    assert verify(bundle) == (1, f"error: {bundle}/payload.bin: not listed in SHA256SUMS")


def test_a_bundle_renamed_in_its_store_is_refused(bundle, tmp_path, verify):
    moved = tmp_path / "colours" / "7"
    moved.parent.mkdir()
    bundle.rename(moved)
    status, line = verify(moved)
    assert status == 1
    assert f"{moved}/manifest.json: belongs to colours/1, so the directory was renamed" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": 2},
            "format 2 is newer than format 1, the newest that this version reads; update Imago",
        ),
        ({"classes": ["one"]}, "classes: List should have at least 2 items"),
        ({"version": 0}, "version: Input should be greater than or equal to 1"),
        ({"name": "../etc"}, "name: String should match pattern"),
        ({"variants": {}}, "variants: Dictionary should have at least 1 item"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        (
            {"outputs": ["probabilities"]},
            "model.onnx: its outputs are probabilities, energy, embedding, cam, not",
        ),
        (
            {"classes": ["a", "b", "c", "d"]},
            "model.onnx: its output probabilities has 3 classes, not 4",
        ),
        (
            {"input": {"height": 8, "width": 8, "channels": 1}},
            "model.onnx: its input is image uint8 [N, 32, 32, 3], not",
        ),
    ],
)
def test_an_invalid_manifest_is_refused(bundle, verify, changes, message):
    tiny_bundle.edit_manifest(bundle, **changes)
    write_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert message in line


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "{", "[" * 100_000, "\xff\xfe"])
def test_a_file_that_is_not_a_manifest_is_refused(bundle, verify, text):
    (bundle / "manifest.json").write_text(text, encoding="latin-1")
    status, line = verify(bundle)
    assert status == 1
    assert "manifest.json: " in line


@pytest.mark.parametrize("path", ["../model.onnx", "/etc/passwd", "samples/../../model.onnx"])
def test_a_path_outside_the_bundle_is_refused(bundle, verify, path):
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["variants"]["fp32"]["file"] = path
    tiny_bundle.edit_manifest(bundle, variants=manifest["variants"])
    write_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert f"the path {path!r} points outside the bundle" in line


def test_a_path_outside_the_bundle_in_the_checksums_is_refused(bundle, verify):
    with (bundle / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  ../../secret\n")
    status, line = verify(bundle)
    assert status == 1
    assert "'../../secret' points outside the bundle" in line


def test_a_link_to_a_file_outside_the_bundle_is_refused(bundle, tmp_path, verify):
    shutil.move(bundle / "model.onnx", tmp_path / "elsewhere.onnx")
    os.symlink(tmp_path / "elsewhere.onnx", bundle / "model.onnx")
    status, line = verify(bundle)
    assert status == 1
    assert "'model.onnx' points outside the bundle" in line


def test_expected_outputs_that_would_run_code_are_refused(bundle, verify):
    np.savez(bundle / "samples" / "expected.npz", probabilities=np.array([{"a": 1}], dtype=object))
    tiny_bundle.update_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert "expected.npz: unreadable expected outputs" in line


def test_another_graph_than_that_of_the_manifest_is_refused(bundle, verify):
    onnx.save(tiny_bundle.build_graph(SPEC, 3, scale=2), bundle / "model.onnx")
    write_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert "model.onnx: not the fp32 file of manifest.json" in line


def test_files_that_are_too_large_are_refused(bundle, verify):
    with (bundle / "manifest.json").open("ab") as file:
        file.truncate(1 << 30)  # sparse: takes no disk space
    assert "manifest.json: larger than" in verify(bundle)[1]
    shutil.copy(bundle / "SHA256SUMS", bundle / "sums")
    with (bundle / "model.onnx").open("ab") as file:
        file.truncate(2**31)
    with pytest.raises(BundleError, match="2147483648 bytes is not a valid size for an ONNX file"):
        read_graph(bundle / "model.onnx")


def test_the_digest_covers_every_file(bundle):
    before = Bundle(bundle).digest
    (bundle / "samples" / "00.png").write_bytes(tiny_bundle.make_image("green"))
    tiny_bundle.update_checksums(bundle)
    assert Bundle(bundle).digest != before
