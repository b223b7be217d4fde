"""The bundle: one directory that holds a trained model and all that is needed to trust and to serve it.

    manifest.json  model.onnx  model.int8.onnx  weights.safetensors  samples/  report.html  README.md  SHA256SUMS

This file is the contract between training and serving: the manifest, and what a reader checks before it trusts one.
"""

import json
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.bundle.checksums import (
    CHECKSUMS_FILE,
    BundleError,
    check_checksums,
    file_sha256,
    resolve_inside,
    write_checksums,
)
from models.bundle.onnx_screening import check_graph
from models.image import InputSpec

__all__ = [
    "CHECKSUMS_FILE",
    "Bundle",
    "BundleError",
    "Manifest",
    "file_sha256",
    "read_manifest",
    "resolve_inside",
    "write_checksums",
]

FORMAT = 1
NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
MANIFEST_FILE, SAMPLES_DIRECTORY, EXPECTED_FILE = "manifest.json", "samples", "expected.npz"
REQUIRED_OUTPUTS = (
    "probabilities",
    "energy",
    "embedding",
)  # every graph has these; `cam` where the head allows it
DRIFT_SIGNALS = (
    "class",
    "confidence",
    "energy",
    "brightness",
    "contrast",
    "sharpness",
    "width",
    "height",
)
MAX_MANIFEST_BYTES, MAX_SAMPLE_BYTES, MAX_EXPECTED_BYTES = 32 << 20, 64 << 20, 1 << 30


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Parity(_Part):
    """How far the ONNX graph is from the torch network on real validation images."""

    images: int
    batch_sizes: list[int]
    max_abs_diff: float = Field(description="largest |difference| of any probability")
    agreement: float = Field(description="share of images with the same label, 0..1")
    ties: list[int] = Field(
        default=[], description="indices whose two best classes lie within the tolerance"
    )


class Latency(_Part):
    """Milliseconds a run, median, and the best throughput, on the machine that certified the bundle."""

    device: str
    threads: int
    batch_ms: dict[int, float] = Field(description="batch size -> milliseconds")
    images_per_second: float


class Variant(_Part):
    file: str
    precision: str = Field(description="fp32 or int8")
    sha256: str
    bytes: int
    opset: int
    accuracy: float | None = Field(default=None, description="on the test part, 0..1")
    latency: Latency | None = None
    parity: Parity | None = None
    tolerance: float = Field(
        default=1e-4, description="allowed |difference| of a probability from expected.npz"
    )


class Calibration(_Part):
    """Fitted on validation data. The temperature is inside the graph; the rest is applied by the server."""

    temperature: float = 1.0
    nll_before: float | None = None
    nll_after: float | None = None
    ece_before: float | None = None
    ece_after: float | None = None
    abstain_threshold: float = Field(
        default=0.0, description="answers with less confidence abstain"
    )
    abstain_accuracy: float | None = Field(
        default=None, description="accuracy of what is answered, as asked for"
    )
    abstain_coverage: float | None = Field(
        default=None, description="share of images that is answered"
    )
    abstain_test_accuracy: float | None = Field(
        default=None, description="the same accuracy, seen on the test part"
    )
    abstain_test_coverage: float | None = Field(
        default=None, description="the same share, seen on the test part"
    )
    conformal_level: float | None = Field(
        default=None, description="coverage of prediction sets, as asked for"
    )
    conformal_quantile: float | None = Field(
        default=None, description="a class is in the set when 1 - its probability is at most this"
    )
    conformal_coverage: float | None = Field(
        default=None, description="coverage seen on the test part"
    )
    energy_threshold: float | None = Field(
        default=None, description="more energy than this is out of distribution"
    )


class Histogram(_Part):
    edges: list[float] = Field(description="n + 1 increasing edges; the outer bins are open")
    counts: list[int] = Field(description="n counts")


class ClassMetrics(_Part):
    precision: float
    recall: float
    f1: float
    support: int


class Metrics(_Part):
    """Of one part of the data, with the best weights."""

    images: int
    accuracy: float
    top5: float | None = None
    nll: float
    ece: float | None = None
    per_class: list[ClassMetrics] = []
    confusion: list[list[int]] = Field(
        default=[], description="rows: true class, columns: predicted; empty with many"
    )


class DataInfo(_Part):
    source: str
    digest: str = Field(description="sha256 over the pixels or files and labels")
    counts: dict[str, int] = Field(description="images of train, val and test")


class Provenance(_Part):
    git_commit: str | None = None
    git_dirty: bool | None = None
    data: DataInfo
    packages: dict[str, str] = {}
    device: str
    seed: int
    recipe: dict[str, Any] = {}
    seconds: dict[str, float] = {}


class Sample(_Part):
    file: str
    label: int


class Manifest(_Part):
    """manifest.json. `format` grows when a reader of today could misread what a writer of tomorrow means."""

    format: int = FORMAT
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    version: int = Field(ge=1)
    created: datetime
    network: str
    classes: list[str] = Field(min_length=2)
    input: InputSpec
    outputs: list[str]
    variants: dict[str, Variant] = Field(min_length=1)
    calibration: Calibration = Calibration()
    baseline: dict[str, Histogram] = {}
    metrics: dict[str, Metrics] = Field(
        default={}, description="by part: val, test, and what else was measured"
    )
    samples: list[Sample] = []
    notes: list[str] = Field(
        default=[], description="what a reader should know, e.g. why int8 is missing"
    )
    provenance: Provenance

    @model_validator(mode="after")
    def _samples_have_classes(self) -> "Manifest":
        wrong = next((s for s in self.samples if not 0 <= s.label < len(self.classes)), None)
        if wrong is not None:
            raise ValueError(
                f"sample {wrong.file} has the label {wrong.label} of {len(self.classes)} classes"
            )
        return self

    def write(self, directory: Path) -> None:
        (directory / MANIFEST_FILE).write_text(self.model_dump_json(indent=1) + "\n")


class Bundle:
    """A bundle on disk: its manifest read and, unless told otherwise, every digest and every graph checked.

    Raises BundleError, naming the file, for whatever is missing, changed, malformed, renamed or from a newer format.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._check_place()
        if verify:
            self._check_variants(check_checksums(self.path))

    @property
    def digest(self) -> str:
        """One sha256 that stands for the whole bundle: that of its SHA256SUMS."""
        return file_sha256(self.path / CHECKSUMS_FILE)

    def variant_path(self, variant: str) -> Path:
        """The ONNX file of a variant; raises BundleError for one that this bundle lacks."""
        if variant not in self.manifest.variants:
            raise BundleError(
                f"{self.path}: no variant {variant!r}; it has {', '.join(self.manifest.variants)}"
            )
        return resolve_inside(self.path, self.manifest.variants[variant].file)

    def sample_bytes(self) -> list[bytes]:
        """The sample images as files' bytes, in the order of `expected`."""
        paths = [
            resolve_inside(self.path, f"{SAMPLES_DIRECTORY}/{s.file}")
            for s in self.manifest.samples
        ]
        try:
            for path in paths:
                if path.stat().st_size > MAX_SAMPLE_BYTES:
                    raise BundleError(f"{path}: larger than {MAX_SAMPLE_BYTES} bytes")
            return [path.read_bytes() for path in paths]
        except OSError as error:
            raise BundleError(f"{error.filename}: not readable: {error.strerror}") from error

    def expected(self) -> dict[str, np.ndarray]:
        """What the torch network gave for the samples: `probabilities` [S,K], `energy` [S], `embedding` [S,D], `cam`;
        and `pixels` uint8 [S,H,W,C], what it was given."""
        path = resolve_inside(self.path, f"{SAMPLES_DIRECTORY}/{EXPECTED_FILE}")
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(info.file_size for info in archive.infolist()) > MAX_EXPECTED_BYTES:
                    raise BundleError(f"{path}: unpacks to more than {MAX_EXPECTED_BYTES} bytes")
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except BundleError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path}: unreadable expected outputs: {error}") from error

    def _check_place(self) -> None:
        """In a store a bundle's directory is its name and version; anywhere else it may be called what it likes."""
        place = self.path.resolve()
        name, version = self.manifest.name, self.manifest.version
        if place.name.isdecimal() and (place.parent.name, place.name) != (name, str(version)):
            raise BundleError(
                f"{self.path / MANIFEST_FILE}: says {name}/{version}, so the bundle was renamed"
            )

    def _check_variants(self, sums: dict[str, str]) -> None:
        spec = self.manifest.input
        for name, variant in self.manifest.variants.items():
            path = self.variant_path(name)
            if sums.get(variant.file) != variant.sha256:
                raise BundleError(
                    f"{path}: not the file that {MANIFEST_FILE} means by {name} (sha256 differs)"
                )
            graph = check_graph(
                path,
                spec.height,
                spec.width,
                spec.channels,
                len(self.manifest.classes),
                self.manifest.outputs,
            )
            if graph.opset != variant.opset:
                raise BundleError(
                    f"{path}: opset {graph.opset}, and {MANIFEST_FILE} says {variant.opset}"
                )


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle at `path`; raises BundleError that names the file and the field."""
    file = path / MANIFEST_FILE
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes")
        raw = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"{file}: no such file, so {path} is not a bundle") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{file}: not readable as JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise BundleError(
            f"{file}: format {found} is newer than the {FORMAT} this Imago reads; update Imago"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleError(f"{file}: {where}: {first['msg']}") from error
