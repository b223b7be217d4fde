"""Signed bundles, with generated keys and with PEM files of openssl."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import tiny_bundle
from support.s3_server import s3_server

pytest.importorskip("model_signing", reason="the optional extra `signing` is not installed")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from models.__main__ import main
from models.bundle import Bundle, BundleError, write_checksums
from serve.model import Model, open_bundle
from serve.settings import Settings


def key_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Write a new pair of keys; return the files of the private and the public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = directory / f"{name}.pem"
    public = directory / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """Return a signed bundle and the public key."""
    private, public = key_pair(tmp_path, "key")
    bundle = tiny_bundle.publish(tmp_path / "store")
    assert main(["sign", "colours", "--store", str(tmp_path / "store"), "--key", str(private)]) == 0
    return bundle, public


def test_a_signed_bundle_passes(signed, capsys):
    bundle, public = signed
    assert main(["verify", str(bundle), "--public-key", str(public)]) == 0
    assert "signed: yes, by the given key" in capsys.readouterr().out
    assert main(["verify", str(bundle)]) == 0
    assert "signed: yes, not checked" in capsys.readouterr().out


def test_a_signed_bundle_may_be_moved(signed, tmp_path):
    bundle, public = signed
    Bundle(bundle.rename(tmp_path / "elsewhere"), public_key=public)


def verify_refused(bundle: Path, public: Path, capsys: pytest.CaptureFixture) -> str:
    assert main(["verify", str(bundle), "--public-key", str(public)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_bundle_without_signature_is_refused(tmp_path, capsys):
    _, public = key_pair(tmp_path, "key")
    error = verify_refused(tiny_bundle.publish(tmp_path), public, capsys)
    assert "bundle.sig: no such file, so the bundle is not signed" in error


def test_another_key_is_refused(signed, tmp_path, capsys):
    bundle, _ = signed
    _, other_public = key_pair(tmp_path, "other")
    error = verify_refused(bundle, other_public, capsys)
    assert "bundle.sig: does not match this key and these files" in error


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: (bundle / "model.onnx").write_bytes(b"other"),
        lambda bundle: (bundle / "manifest.json").write_bytes(b"{"),
        lambda bundle: (bundle / "extra").write_bytes(b"more"),
        lambda bundle: (bundle / ".gitignore").write_bytes(b"more"),
        lambda bundle: (bundle / "samples" / "00.png").unlink(),
    ],
    ids=["changed", "changed manifest", "added", "hidden", "removed"],
)
def test_changes_after_signing_are_refused_though_checksums_match(signed, change, capsys):
    bundle, public = signed
    change(bundle)
    write_checksums(bundle)
    assert "bundle.sig: does not match" in verify_refused(bundle, public, capsys)


def load(bundle: Path, public: Path) -> Model:
    settings = Settings(store=bundle.parents[1], model="colours", public_key=public)
    return Model(open_bundle(settings, 1), settings, threads=1)


def test_a_model_is_made_of_the_bytes_that_were_verified(signed, monkeypatch):
    """Each file is opened once, so it can't change between the check and its use."""
    bundle, public = signed
    files: list[str] = []
    plain_open = os.open

    def record_and_open(path: str, *arguments: int, **options: int) -> int:
        files.append(os.fspath(path))
        return plain_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", record_and_open)
    model = load(bundle, public)
    (prediction,) = model.predict([tiny_bundle.make_image("green")])
    assert prediction.label == "green"
    opened = [file for file in files if file.startswith(str(bundle))]
    expected = [str(path) for path in bundle.rglob("*") if path.is_file()]
    assert sorted(opened) == sorted(expected)


def test_a_model_does_not_read_files_that_were_replaced_after_the_check(signed):
    bundle, public = signed
    settings = Settings(store=bundle.parents[1], model="colours", public_key=public)
    opened = open_bundle(settings, 1)
    shutil.rmtree(bundle)
    model = Model(opened, settings, threads=1)
    (prediction,) = model.predict([tiny_bundle.make_image("green")])
    assert prediction.label == "green"


def test_a_model_of_a_bundle_without_a_check_of_its_signature_is_refused(signed):
    bundle, public = signed
    settings = Settings(store=bundle.parents[1], model="colours", public_key=public)
    with pytest.raises(BundleError, match="without a check of its signature"):
        Model(Bundle(bundle), settings, threads=1)


@pytest.mark.parametrize("content", ["", "{}", "nonsense", '{"mediaType": "x"}'])
def test_an_invalid_signature_is_refused(signed, content, capsys):
    bundle, public = signed
    (bundle / "bundle.sig").write_text(content)
    assert "bundle.sig: does not match" in verify_refused(bundle, public, capsys)


def test_an_invalid_key_is_refused(signed, tmp_path, capsys):
    bundle, public = signed
    bad = tmp_path / "bad.pem"
    bad.write_text("nonsense")
    assert "bad.pem: not a usable public key" in verify_refused(bundle, bad, capsys)
    missing = tmp_path / "none.pem"
    assert "none.pem: not a usable public key" in verify_refused(bundle, missing, capsys)

    store = str(bundle.parents[1])
    assert main(["sign", "colours", "--store", store, "--key", str(bad)]) == 2
    assert "bad.pem: not a usable private key" in capsys.readouterr().err
    Bundle(bundle, public_key=public)  # the earlier signature is still there


def test_openssl_keys_work(tmp_path):
    key = tmp_path / "key.pem"
    public = tmp_path / "key.pub"
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True
    )
    subprocess.run(
        ["openssl", "ec", "-in", key, "-pubout", "-out", public], check=True, capture_output=True
    )
    bundle = tiny_bundle.publish(tmp_path / "store")
    with pytest.raises(BundleError):
        Bundle(bundle, public_key=public)
    assert main(["sign", "colours", "--store", str(tmp_path / "store"), "--key", str(key)]) == 0
    Bundle(bundle, public_key=public)


def test_a_server_with_a_public_key_serves_signed_bundles_only(signed, start, tmp_path):
    bundle, public = signed
    store = bundle.parents[1]
    server = start("--public-key", str(public), "--version", "1", store=store)
    assert server.predict(tiny_bundle.make_image("red")).status_code == 200
    tiny_bundle.publish(store)  # a second version without a signature
    refused = start("--public-key", str(public), "--version", "2", store=store, wait=False)
    assert refused.process.wait(60) == 2
    assert "bundle.sig: no such file, so the bundle is not signed" in refused.log.read_text()


def test_a_signature_of_a_version_in_a_bucket_reaches_other_machines(tmp_path, monkeypatch):
    private, public = key_pair(tmp_path, "key")
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "one"))
    with s3_server("bucket"):
        url = "s3://bucket/store"
        tiny_bundle.publish(url, samples=1)
        verify = ["verify", "colours", "--store", url, "--public-key", str(public)]
        assert main(verify) == 1
        monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "two"))
        assert main(["sign", "colours", "--store", url, "--key", str(private)]) == 0
        monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "one"))
        assert main(verify) == 0
