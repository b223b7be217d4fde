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

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.bundle.checksums import (
    check_listed,
    check_sha256,
    parse_checksums,
    read_checksums,
)
from models.bundle.errors import BundleError
from models.bundle.expected_outputs import MAX_EXPECTED_BYTES, parse_expected_outputs
from models.bundle.files import CHECKSUMS_FILE, file_sha256, read_file, resolve_inside
from models.bundle.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    Variant,
    parse_manifest,
    read_manifest,
)
from models.bundle.onnx_screening import MAX_BYTES as MAX_GRAPH_BYTES
from models.bundle.onnx_screening import check_graph

SAMPLES_DIRECTORY = "samples"
EXPECTED_FILE = "expected.npz"
MAX_SAMPLE_BYTES = 64 << 20


class GraphFile(NamedTuple):
    """The contents of an ONNX file. Runtimes load these, and do not read the file again."""

    path: Path
    """Names the file in error messages."""

    content: bytes

    @classmethod
    def read(cls, path: Path) -> "GraphFile":
        """Read a file that needs no check, as it was just written."""
        return cls(path, path.read_bytes())


class Bundle:
    """A bundle on disk. Unless `verify` is false, all checksums and graphs are checked.

    With `public_key`, the PEM file of an elliptic curve key, the signature is checked before
    anything else. Then each file is read once: what is checked against the digests, and returned
    later, are the same bytes, even if the files change in between. The graphs and samples are held
    in memory, so drop the bundle when a model is loaded.

    Raises BundleError, naming the file, for a bundle that is incomplete, changed, malformed,
    renamed, or of a newer format, or that holds a link or a special file.
    """

    def __init__(self, path: str | Path, verify: bool = True, public_key: Path | None = None):
        self.path = Path(path)
        self.public_key = public_key
        self._digest = ""
        # Checked contents by file name; empty where `verify` is false.
        self._contents: dict[str, bytes] = {}
        if verify or public_key:
            self.manifest = self._read_and_check()
        else:
            self.manifest = read_manifest(self.path)
        self._check_directory_name()

    @property
    def digest(self) -> str:
        """The sha256 of SHA256SUMS, which identifies all files of the bundle."""
        return self._digest or file_sha256(self.path / CHECKSUMS_FILE)

    def variant_path(self, variant: str) -> Path:
        """Return the ONNX file of a variant. Raises BundleError for an unknown variant."""
        if variant not in self.manifest.variants:
            known = ", ".join(self.manifest.variants)
            raise BundleError(f"{self.path}: no variant {variant!r}; it has {known}")
        return resolve_inside(self.path, self.manifest.variants[variant].file)

    def read_graph(self, variant: str) -> GraphFile:
        """Return the ONNX file of a variant. Raises BundleError for an unknown variant."""
        path = self.variant_path(variant)
        return GraphFile(path, self._read(self.manifest.variants[variant].file, MAX_GRAPH_BYTES))

    def read_samples(self) -> list[bytes]:
        """Return the files of the sample images, in the order of `read_expected`."""
        files: list[bytes] = []
        for sample in self.manifest.samples:
            files.append(self._read(f"{SAMPLES_DIRECTORY}/{sample.file}", MAX_SAMPLE_BYTES))
        return files

    def read_expected(self) -> dict[str, np.ndarray]:
        """Return the torch network's outputs for the S samples, and its input.

        `probabilities` [S,K], `energy` [S], `embedding` [S,D], `cam` where the graph has it, and
        `pixels` uint8 [S,H,W,C], the input. Raises BundleError for anything else.
        """
        name = f"{SAMPLES_DIRECTORY}/{EXPECTED_FILE}"
        return parse_expected_outputs(
            self.path / name, self._read(name, MAX_EXPECTED_BYTES), self.manifest
        )

    def _read(self, name: str, max_bytes: int) -> bytes:
        """Return the contents of a file: only those that were checked, where `verify` is true."""
        if name in self._contents:
            return self._contents[name]
        if self._digest:
            raise BundleError(f"{self.path / name}: not listed in {CHECKSUMS_FILE}")
        return read_file(resolve_inside(self.path, name), max_bytes)

    def _read_and_check(self) -> Manifest:
        """Read and check all files; return the manifest."""
        checksums_content = read_checksums(self.path)
        if self.public_key is not None:
            # Imported here, as it needs the extra `signing`.
            from models.bundle.signing import verify_signature

            verify_signature(self.path, self.public_key, checksums_content)
        self._digest = hashlib.sha256(checksums_content).hexdigest()
        checksums = parse_checksums(checksums_content, self.path / CHECKSUMS_FILE)
        check_listed(self.path, checksums)
        if MANIFEST_FILE not in checksums:
            raise BundleError(f"{self.path / MANIFEST_FILE}: missing, so {self.path} is no bundle")

        manifest_content = self._read_checked(MANIFEST_FILE, checksums, MAX_MANIFEST_BYTES)
        manifest = parse_manifest(manifest_content, self.path / MANIFEST_FILE)
        used_files = _list_used_files(manifest)
        for name, sha256 in checksums.items():
            if name in used_files:
                content = self._read_checked(name, checksums, used_files[name])
                self._contents[name] = content
            elif name != MANIFEST_FILE:
                check_sha256(self.path / name, file_sha256(self.path / name), sha256)

        for name, variant in manifest.variants.items():
            self._check_variant(name, variant, manifest, checksums)
        return manifest

    def _read_checked(self, name: str, checksums: dict[str, str], max_bytes: int) -> bytes:
        """Return the contents of a file. Raises BundleError unless they match their digest."""
        path = self.path / name
        content = read_file(path, max_bytes)
        check_sha256(path, hashlib.sha256(content).hexdigest(), checksums[name])
        return content

    def _check_directory_name(self) -> None:
        """Raise BundleError where a bundle in a store is not in <name>/<version>.

        Outside of a store, where the directory is no number, it may have any name. A version that
        is a link to another one has the wrong name: a server would never be done with loading it.
        """
        directory = self.path.absolute()
        if not directory.name.isdecimal():
            directory = directory.resolve()  # such as `latest`, a link to a version
        if not directory.name.isdecimal():
            return

        name = self.manifest.name
        version = str(self.manifest.version)
        if (directory.parent.resolve().name, directory.name) != (name, version):
            raise BundleError(
                f"{self.path / MANIFEST_FILE}: belongs to {name}/{version}, "
                "so the directory was renamed, or is a link"
            )

    def _check_variant(
        self, name: str, variant: Variant, manifest: Manifest, checksums: dict[str, str]
    ) -> None:
        """Raise BundleError where the graph of a variant is not that of the manifest."""
        path = resolve_inside(self.path, variant.file)
        if checksums.get(variant.file) != variant.sha256:
            raise BundleError(f"{path}: not the {name} file of {MANIFEST_FILE} (sha256 differs)")

        content = self._contents[variant.file]
        classes = len(manifest.classes)
        graph = check_graph(path, content, manifest.input, classes, manifest.outputs)
        if graph.opset != variant.opset:
            raise BundleError(
                f"{path}: has opset {graph.opset}, but {MANIFEST_FILE} says {variant.opset}"
            )


def _list_used_files(manifest: Manifest) -> dict[str, int]:
    """Return the files that serving uses, and the most bytes that each may have."""
    used_files = {f"{SAMPLES_DIRECTORY}/{EXPECTED_FILE}": MAX_EXPECTED_BYTES}
    for variant in manifest.variants.values():
        used_files[variant.file] = MAX_GRAPH_BYTES
    for sample in manifest.samples:
        used_files[f"{SAMPLES_DIRECTORY}/{sample.file}"] = MAX_SAMPLE_BYTES
    return used_files
