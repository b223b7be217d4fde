"""Signatures of bundles by OpenSSF model-signing with a key file; the optional extra `signing`.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub

The signature is one file, bundle.sig, in the bundle. It signs every other file, and no file may be added.
"""

from pathlib import Path

from models.bundle.checksums import SIGNATURE, BundleError


def sign_bundle(path: Path, private_key: Path, password: str | None = None) -> None:
    """Write bundle.sig for the bundle at `path`. `private_key`: PEM, elliptic curve P-256, P-384 or P-521."""
    signing, _, hashing = _library()
    try:
        config = signing.Config().use_elliptic_key_signer(
            private_key=private_key, password=password
        )
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{private_key}: not a usable private key: {_line(error)}") from error
    path = path.resolve()  # the library takes no link, such as `latest`
    (path / SIGNATURE).unlink(missing_ok=True)
    config.set_hashing_config(_hashing(hashing)).sign(path, path / SIGNATURE)


def verify_signature(path: Path, public_key: Path) -> None:
    """Raise BundleError unless bundle.sig is there, was made with the key's other half and fits every file."""
    _, verifying, hashing = _library()
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{public_key}: not a usable public key: {_line(error)}") from error
    path, signature = path.resolve(), path / SIGNATURE
    if not signature.is_file():
        raise BundleError(
            f"{signature}: no such file, so the bundle is not signed, and a signature is asked for"
        )
    try:
        config.set_hashing_config(_hashing(hashing)).verify(path, signature)
    except (
        Exception
    ) as error:  # the library lets through what cryptography, pydantic and json raise
        raise BundleError(
            f"{signature}: does not fit this key and these files: {_line(error)}"
        ) from error


def _hashing(hashing):
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _library():
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise BundleError(
            f"signatures need the extra signing: pip install 'imago[signing]' ({error})"
        ) from error
    return signing, verifying, hashing


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
