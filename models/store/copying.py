"""Copy versions from one store to another: `imago models push` and `pull`."""

import shutil

from models.bundle import CHECKSUMS_FILE, SIGNATURE_FILE, BundleError
from models.bundle.checksums import parse_checksums
from models.store.store import Store


def copy_version(
    source: Store, name: str, version: str | int, target: Store, promote: bool = True
) -> tuple[str, bool]:
    """Copy a version to another store, where it has the same number.

    Returns its path or URL there, and whether it was copied: false where it exists already.
    `promote` moves `latest` of that store forward, never back. An interrupted copy stays invisible.
    Raises BundleError where the bundle is incomplete or damaged, or the target has the same version
    with other contents.
    """
    bundle = source.open(name, version)
    number = bundle.manifest.version
    location = target.location_of(name, number)
    checksums_text = (bundle.path / CHECKSUMS_FILE).read_bytes()
    present = target.read_checksums(name, number)
    if present is not None:
        if present != checksums_text:
            raise BundleError(
                f"{location}: exists already with other contents than "
                f"{source.location_of(name, number)}; copy to another store"
            )
        if promote:
            target.advance(name, number)
        return location, False

    files = [*parse_checksums(checksums_text, bundle.path / CHECKSUMS_FILE), CHECKSUMS_FILE]
    if (bundle.path / SIGNATURE_FILE).exists():
        files.append(SIGNATURE_FILE)
    with target.stage(name, number) as staged:
        for file in files:
            (staged.path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / file, staged.path / file)
        staged.publish(promote)
    return location, True
