"""Sign bundles and verify signatures with a key file, by OpenSSF model-signing.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub

The signature is the file bundle.sig in the bundle. It covers SHA256SUMS and each file with the
digest that SHA256SUMS lists, so no file can be changed, added or removed. Needs the optional extra
`signing`.

What is signed and verified are the digests in one reading of SHA256SUMS, not the files as the
library would read them once more: a file could change between that reading and the one that is
used. `models.bundle.Bundle` compares each file that it reads with these digests.
"""

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

from models.bundle.checksums import parse_checksums, read_checksums
from models.bundle.errors import BundleError
from models.bundle.files import (
    CHECKSUMS_FILE,
    MAX_SIGNATURE_BYTES,
    SIGNATURE_FILE,
    read_file,
)


def sign_bundle(path: Path, private_key: Path, password: str | None = None) -> None:
    """Write bundle.sig for the bundle at `path`, whose SHA256SUMS must match its files.

    `private_key` is a PEM file with an elliptic curve key: P-256, P-384 or P-521. Raises
    BundleError where it is not usable.
    """
    model_signing = _import_model_signing()
    config = _load_signer(model_signing, private_key, password)

    path = path.resolve()  # the signature records the name of the directory
    digests = _list_digests(path, read_checksums(path))
    signature = path / SIGNATURE_FILE
    signature.unlink(missing_ok=True)
    config.set_hashing_config(_hashing_config(model_signing, digests)).sign(path, signature)


def check_private_key(private_key: Path) -> None:
    """Raise BundleError unless `sign_bundle` can sign with this key."""
    _load_signer(_import_model_signing(), private_key)


def verify_signature(path: Path, public_key: Path, checksums: bytes) -> None:
    """Check that bundle.sig was made with the private key of `public_key` for these checksums.

    `checksums` are the contents of SHA256SUMS. Raises BundleError where the signature is missing,
    or is of another key or other checksums.
    """
    model_signing = _import_model_signing()
    config = model_signing.verifying.Config()
    try:
        config = config.use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{public_key}: not a usable public key: {_first_line(error)}") from error

    signature = path / SIGNATURE_FILE
    missing = "no such file, so the bundle is not signed, but a signature is required"
    read_file(signature, MAX_SIGNATURE_BYTES, missing)
    digests = _list_digests(path, checksums)
    try:
        config.set_hashing_config(_hashing_config(model_signing, digests)).verify(path, signature)
    except Exception as error:  # those of cryptography, pydantic and json share no base class
        raise BundleError(
            f"{signature}: does not match this key and these files: {_first_line(error)}"
        ) from error


def _load_signer(model_signing: ModuleType, private_key: Path, password: str | None = None) -> Any:
    """Return the library's configuration that signs with a key. Raises BundleError without one."""
    config = model_signing.signing.Config()
    try:
        return config.use_elliptic_key_signer(private_key=private_key, password=password)
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(
            f"{private_key}: not a usable private key: {_first_line(error)}"
        ) from error


def _list_digests(path: Path, checksums: bytes) -> dict[str, str]:
    """Return file name -> sha256 of all files that a signature covers."""
    digests = parse_checksums(checksums, path / CHECKSUMS_FILE)
    return digests | {CHECKSUMS_FILE: hashlib.sha256(checksums).hexdigest()}


def _hashing_config(model_signing: ModuleType, digests: dict[str, str]) -> Any:
    """Return the library's configuration for files whose digests are already known.

    model-signing 1.1 calls `hash` of the configuration to learn the digests of a directory.
    """
    manifest = model_signing.manifest
    serialization = manifest.SerializationType.from_args(
        {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [SIGNATURE_FILE],
        }
    )
    items: list[Any] = []
    for name, sha256 in digests.items():
        digest = manifest.hashing.Digest("sha256", bytes.fromhex(sha256))
        items.append(serialization.new_item(name, digest))

    class KnownDigests(model_signing.hashing.Config):  # type: ignore[name-defined]  # imported in a function
        def hash(self, model_path: Path, *, files_to_hash: object = None) -> Any:
            return manifest.Manifest(Path(model_path).name, items, serialization)

    return KnownDigests()


def _import_model_signing() -> ModuleType:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.manifest
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise BundleError(
            f"signatures need the extra signing: pip install 'imago[signing]' ({error})"
        ) from error
    return model_signing


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines and lines[0] else type(error).__name__
