"""Changed, damaged and hostile bundles, through `imago models verify PATH`."""

import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from models.__main__ import main
from models.bundle import Bundle, Calibration, write_checksums
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
            {"format": 5},
            "format 5 is newer than format 4, the newest that this version reads; update Imago",
        ),
        ({"calibration": {"abstain_threshold": 1.5}}, "abstain_threshold: Input should be less"),
        ({"calibration": {"abstain_threshold": float("nan")}}, "NaN is not a finite number"),
        ({"calibration": {"energy_threshold": float("-inf")}}, "-Infinity is not a finite number"),
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


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "nonsense", "{", "[" * 100_000, "\xff\xfe"),
        *('{"seed": 1e999}', '{"seed": ' + "9" * 5000 + "}"),
    ],
)
def test_a_file_that_is_not_a_manifest_is_refused(bundle, verify, text):
    (bundle / "manifest.json").write_text(text, encoding="latin-1")
    write_checksums(bundle)
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


@pytest.mark.parametrize("file", ["./00.png", "../samples/00.png", "/etc/hostname", "none.png"])
def test_a_sample_that_is_not_listed_is_refused(bundle, verify, file):
    samples = [sample.model_dump() for sample in Bundle(bundle).manifest.samples]
    samples[0]["file"] = file
    tiny_bundle.edit_manifest(bundle, samples=samples)
    write_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert f"{file.lstrip('./')}: not listed in SHA256SUMS" in line


def link_outside(bundle: Path) -> None:
    outside = bundle.with_name("elsewhere.onnx")
    shutil.move(bundle / "model.onnx", outside)
    os.symlink(outside, bundle / "model.onnx")


def link_inside(bundle: Path) -> None:
    os.rename(bundle / "samples" / "00.png", bundle / "samples" / "first.png")
    os.symlink("first.png", bundle / "samples" / "00.png")


def link_directory(bundle: Path) -> None:
    outside = bundle.with_name("elsewhere")
    shutil.move(bundle / "samples", outside)
    os.symlink(outside, bundle / "samples")


def replace_by_pipe(bundle: Path) -> None:
    (bundle / "samples" / "00.png").unlink()
    os.mkfifo(bundle / "samples" / "00.png")


def replace_checksums_by_pipe(bundle: Path) -> None:
    (bundle / "SHA256SUMS").unlink()
    os.mkfifo(bundle / "SHA256SUMS")


def add_socket(bundle: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bundle / "s"))


def add_ort_file(bundle: Path) -> None:
    (bundle / "model.ort").write_bytes(b"x")
    write_checksums_unchecked(bundle, "model.ort")


def write_checksums_unchecked(bundle: Path, name: str) -> None:
    """List a file that `write_checksums` refuses."""
    with (bundle / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link_outside, "model.onnx: a link; a bundle holds regular files only"),
        (link_inside, "samples/00.png: a link; a bundle holds regular files only"),
        (link_directory, "samples: a link; a bundle holds regular files only"),
        (replace_by_pipe, "samples/00.png: not a regular file"),
        (replace_checksums_by_pipe, "SHA256SUMS: not a regular file"),
        (add_socket, "s: not a regular file"),
        (add_ort_file, "model.ort: in onnxruntime's own format; only ONNX is allowed"),
    ],
)
def test_anything_but_regular_files_is_refused(bundle, verify, change, message):
    change(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert message in line


@pytest.mark.parametrize("name", [".DS_Store", "samples/.DS_Store", "._model.onnx", "Thumbs.db"])
def test_files_of_file_managers_are_ignored(bundle, verify, name):
    digest = Bundle(bundle).digest
    (bundle / name).write_bytes(b"x")
    assert verify(bundle)[0] == 0
    write_checksums(bundle)
    assert Bundle(bundle).digest == digest


def pack(**arrays: object) -> bytes:
    """Return the bytes of an .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def pack_header(shape: tuple[int, ...]) -> bytes:
    """Return the bytes of an .npz file with an array that has a header and no data."""
    header = io.BytesIO()
    description = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("probabilities.npy", header.getvalue())
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"nonsense", "unreadable expected outputs"),
        (lambda _: pack_header((10**14,)), "unreadable expected outputs"),
        (lambda _: pack_header((2**62, 2**62)), "unreadable expected outputs"),
        (lambda _: pack(probabilities=np.array([{"a": 1}], dtype=object)), "not numbers"),
        (lambda arrays: pack(**arrays | {"probabilities": [["a"] * 3] * 16}), "not numbers"),
        (lambda arrays: pack(**arrays | {"energy": np.full(16, np.nan)}), "energy is not finite"),
        (lambda arrays: pack(**arrays | {"energy": np.float32(1)}), "energy has the shape ()"),
        (lambda arrays: pack(**arrays | {"cam": arrays["cam"][1:]}), "cam has the shape (15,"),
        (lambda arrays: pack(**arrays | {"pixels": arrays["cam"]}), "pixels has the shape"),
        (lambda arrays: pack(probabilities=arrays["probabilities"]), "lacks energy"),
    ],
)
def test_bad_expected_outputs_are_refused(
    bundle, verify, change: Callable[[dict[str, np.ndarray]], bytes], message
):
    file = bundle / "samples" / "expected.npz"
    with np.load(file) as archive:
        arrays = dict(archive)
    file.write_bytes(change(arrays))
    write_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert "expected.npz: " in line
    assert message in line


def test_another_graph_than_that_of_the_manifest_is_refused(bundle, verify):
    onnx.save(tiny_bundle.build_graph(SPEC, 3, scale=2), bundle / "model.onnx")
    write_checksums(bundle)
    status, line = verify(bundle)
    assert status == 1
    assert "model.onnx: not the fp32 file of manifest.json" in line


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("manifest.json", 1 << 30),
        ("model.onnx", 1 << 31),
        ("samples/00.png", 1 << 30),
        ("samples/expected.npz", 1 << 30),
        ("SHA256SUMS", 1 << 30),
    ],
)
def test_files_that_are_too_large_are_refused(bundle, verify, name, size):
    with (bundle / name).open("ab") as file:
        file.truncate(size)  # sparse: takes no disk space
    assert f"{name}: larger than" in verify(bundle)[1]


def test_verify_names_a_variant_that_abstains_on_every_image(bundle, capsys):
    calibration = Calibration(abstain_threshold=1).model_dump()
    tiny_bundle.edit_manifest(bundle, calibration=calibration)
    write_checksums(bundle)
    assert main(["verify", str(bundle)]) == 0
    assert "fp32  abstains on every image" in capsys.readouterr().out


def test_a_bundle_of_the_first_format_is_read(bundle, verify):
    manifest = json.loads((bundle / "manifest.json").read_text())
    for variant in manifest["variants"].values():
        del variant["calibration"], variant["baseline"]
    tiny_bundle.edit_manifest(bundle, format=1, variants=manifest["variants"])
    write_checksums(bundle)
    assert verify(bundle)[0] == 0


def test_the_digest_covers_every_file(bundle):
    before = Bundle(bundle).digest
    (bundle / "samples" / "00.png").write_bytes(tiny_bundle.make_image("green"))
    tiny_bundle.update_checksums(bundle)
    assert Bundle(bundle).digest != before
