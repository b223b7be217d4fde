"""`Bundle`: a trained model on disk, with everything that is needed to trust and serve it.

manifest.json        classes, input, variants, metrics, provenance (models.bundle.manifest)
model.onnx           the network as the server runs it
model.int8.onnx      the same in int8, where its accuracy passed the gate
weights.safetensors  for fine-tuning
samples/             validation images, and expected.npz: the outputs of the torch network
report.html          the model card, with plots
README.md            the same in brief
SHA256SUMS           checksums of all files above
bundle.sig           the signature, where the bundle is signed
"""

import zipfile
from pathlib import Path

import numpy as np

from models.bundle.checksums import (
    CHECKSUMS_FILE,
    check_checksums,
    file_sha256,
    resolve_inside,
)
from models.bundle.errors import BundleError
from models.bundle.manifest import MANIFEST_FILE, Variant, read_manifest
from models.bundle.onnx_screening import check_graph

SAMPLES_DIRECTORY = "samples"
EXPECTED_FILE = "expected.npz"
MAX_SAMPLE_BYTES = 64 << 20
MAX_EXPECTED_BYTES = 1 << 30
"""Of expected.npz, unpacked."""


class Bundle:
    """A bundle on disk. Unless `verify` is false, all checksums and graphs are checked.

    Raises BundleError, naming the file, for a bundle that is incomplete, changed, malformed,
    renamed, or of a newer format.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._check_directory_name()
        if verify:
            checksums = check_checksums(self.path)
            for name, variant in self.manifest.variants.items():
                self._check_variant(name, variant, checksums)

    @property
    def digest(self) -> str:
        """The sha256 of SHA256SUMS, which identifies all files of the bundle."""
        return file_sha256(self.path / CHECKSUMS_FILE)

    def variant_path(self, variant: str) -> Path:
        """Return the ONNX file of a variant. Raises BundleError for an unknown variant."""
        if variant not in self.manifest.variants:
            known = ", ".join(self.manifest.variants)
            raise BundleError(f"{self.path}: no variant {variant!r}; it has {known}")
        return resolve_inside(self.path, self.manifest.variants[variant].file)

    def read_samples(self) -> list[bytes]:
        """Return the files of the sample images, in the order of `read_expected`."""
        files: list[bytes] = []
        try:
            for sample in self.manifest.samples:
                path = resolve_inside(self.path, f"{SAMPLES_DIRECTORY}/{sample.file}")
                if path.stat().st_size > MAX_SAMPLE_BYTES:
                    raise BundleError(f"{path}: larger than {MAX_SAMPLE_BYTES} bytes")
                files.append(path.read_bytes())
        except OSError as error:
            raise BundleError(f"{error.filename}: not readable: {error.strerror}") from error
        return files

    def read_expected(self) -> dict[str, np.ndarray]:
        """Return the torch network's outputs for the S samples, and its input.

        `probabilities` [S,K], `energy` [S], `embedding` [S,D], `cam` where the graph has it, and
        `pixels` uint8 [S,H,W,C], the input.
        """
        path = resolve_inside(self.path, f"{SAMPLES_DIRECTORY}/{EXPECTED_FILE}")
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked_bytes = sum(info.file_size for info in archive.infolist())
            if unpacked_bytes > MAX_EXPECTED_BYTES:
                raise BundleError(f"{path}: unpacks to more than {MAX_EXPECTED_BYTES} bytes")
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except BundleError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path}: unreadable expected outputs: {error}") from error

    def _check_directory_name(self) -> None:
        """Raise BundleError where a bundle in a store is not in <name>/<version>.

        Outside of a store, where the directory is no number, it may have any name.
        """
        directory = self.path.resolve()
        if not directory.name.isdecimal():
            return
        name = self.manifest.name
        version = str(self.manifest.version)
        if (directory.parent.name, directory.name) != (name, version):
            raise BundleError(
                f"{self.path / MANIFEST_FILE}: belongs to {name}/{version}, "
                "so the directory was renamed"
            )

    def _check_variant(self, name: str, variant: Variant, checksums: dict[str, str]) -> None:
        """Raise BundleError where the graph of a variant is not that of the manifest."""
        path = self.variant_path(name)
        if checksums.get(variant.file) != variant.sha256:
            raise BundleError(f"{path}: not the {name} file of {MANIFEST_FILE} (sha256 differs)")

        manifest = self.manifest
        graph = check_graph(path, manifest.input, len(manifest.classes), manifest.outputs)
        if graph.opset != variant.opset:
            raise BundleError(
                f"{path}: has opset {graph.opset}, but {MANIFEST_FILE} says {variant.opset}"
            )
