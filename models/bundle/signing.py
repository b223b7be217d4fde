"""Sign bundles and verify signatures with a key file, by OpenSSF model-signing.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub

The signature is the file bundle.sig in the bundle. It covers all other files, so no file can be
changed, added or removed. Needs the optional extra `signing`.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from models.bundle.checksums import SIGNATURE_FILE
from models.bundle.errors import BundleError


def sign_bundle(path: Path, private_key: Path, password: str | None = None) -> None:
    """Write bundle.sig for the bundle at `path`.

    `private_key` is a PEM file with an elliptic curve key: P-256, P-384 or P-521. Raises
    BundleError where it is not usable.
    """
    model_signing = _import_model_signing()
    config = model_signing.signing.Config()
    try:
        config = config.use_elliptic_key_signer(private_key=private_key, password=password)
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(
            f"{private_key}: not a usable private key: {_first_line(error)}"
        ) from error

    path = path.resolve()  # the library refuses links, such as `latest`
    signature = path / SIGNATURE_FILE
    signature.unlink(missing_ok=True)
    config.set_hashing_config(_hashing_config(model_signing)).sign(path, signature)


def verify_signature(path: Path, public_key: Path) -> None:
    """Check that bundle.sig was made with the private key of `public_key` and covers every file.

    Raises BundleError where it was not, or is missing.
    """
    model_signing = _import_model_signing()
    config = model_signing.verifying.Config()
    try:
        config = config.use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{public_key}: not a usable public key: {_first_line(error)}") from error

    path = path.resolve()
    signature = path / SIGNATURE_FILE
    if not signature.is_file():
        raise BundleError(
            f"{signature}: no such file, so the bundle is not signed, but a signature is required"
        )
    try:
        config.set_hashing_config(_hashing_config(model_signing)).verify(path, signature)
    except Exception as error:  # those of cryptography, pydantic and json share no base class
        raise BundleError(
            f"{signature}: does not match this key and these files: {_first_line(error)}"
        ) from error


def _hashing_config(model_signing: ModuleType) -> Any:
    config = model_signing.hashing.Config()
    return config.set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _import_model_signing() -> ModuleType:
    try:
        import model_signing
        import model_signing.hashing
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
