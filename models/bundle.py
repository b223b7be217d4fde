"""The bundle: one directory that holds a trained model and all that is needed to trust and to serve it.

    manifest.json  model.onnx  model.int8.onnx  weights.safetensors  samples/  report.html  README.md  SHA256SUMS

This file is the contract between training and serving: the manifest, the digests, and what a reader checks.
"""
import hashlib
import json
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.image import InputSpec

FORMAT = 1
MANIFEST, SUMS, SAMPLES, EXPECTED = "manifest.json", "SHA256SUMS", "samples", "expected.npz"
OUTPUTS = ("probabilities", "energy", "embedding")  # every graph has these; `cam` where the head allows it
SIGNALS = ("class", "confidence", "energy", "brightness", "contrast", "sharpness", "width", "height")


class BundleError(ValueError):
    """A bundle or a store that can't be trusted or read; the message is one line that names the file and the cause."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Parity(_Part):
    """How far the ONNX graph is from the torch network on real validation images."""

    images: int
    batch_sizes: list[int]
    max_abs_diff: float = Field(description="largest |difference| of any probability")
    agreement: float = Field(description="share of images with the same label, 0..1")
    ties: list[int] = Field(default=[], description="indices whose two best classes lie within the tolerance")


class Latency(_Part):
    """Milliseconds a run, median, on the machine that certified the bundle."""

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


class Calibration(_Part):
    """Fitted on validation data. The temperature is inside the graph; the rest is applied by the server."""

    temperature: float = 1.0
    nll_before: float | None = None
    nll_after: float | None = None
    ece_before: float | None = None
    ece_after: float | None = None
    abstain_threshold: float = Field(default=0.0, description="answers with less confidence abstain")
    abstain_accuracy: float | None = Field(default=None, description="accuracy of what is answered, as asked for")
    abstain_coverage: float | None = Field(default=None, description="share of images that is answered")
    conformal_level: float | None = Field(default=None, description="coverage of prediction sets, as asked for")
    conformal_quantile: float | None = Field(
        default=None, description="a class is in the set when 1 - its probability is at most this")
    conformal_coverage: float | None = Field(default=None, description="coverage seen on the test part")
    energy_threshold: float | None = Field(default=None, description="more energy than this is out of distribution")


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
    confusion: list[list[int]] = Field(default=[], description="rows: true class, columns: predicted")


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
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    version: int = Field(ge=1)
    created: datetime
    network: str
    classes: list[str] = Field(min_length=2)
    input: InputSpec
    outputs: list[str]
    variants: dict[str, Variant] = Field(min_length=1)
    calibration: Calibration = Calibration()
    baseline: dict[str, Histogram] = {}
    metrics: dict[str, Metrics] = Field(default={}, description="by part: val, test, and what else was measured")
    samples: list[Sample] = []
    notes: list[str] = Field(default=[], description="what a reader should know, e.g. why int8 is missing")
    provenance: Provenance

    def write(self, directory: Path) -> None:
        (directory / MANIFEST).write_text(self.model_dump_json(indent=1) + "\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(directory: Path) -> None:
    """Write SHA256SUMS over every other file of the bundle, in the format that `sha256sum -c` reads."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{sha256(p)}  {p.relative_to(directory).as_posix()}\n" for p in files]
    (directory / SUMS).write_text("".join(lines))


class Bundle:
    """A bundle on disk, its manifest read and, unless told otherwise, every digest checked.

    Raises BundleError, naming the file, for whatever is missing, changed, malformed or from a newer format.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        if verify:
            check_sums(self.path)

    def variant_path(self, variant: str) -> Path:
        """The ONNX file of a variant; raises BundleError for one that this bundle lacks."""
        if variant not in self.manifest.variants:
            raise BundleError(f"{self.path}: no variant {variant!r}; it has {', '.join(self.manifest.variants)}")
        return inside(self.path, self.manifest.variants[variant].file)

    def sample_bytes(self) -> list[bytes]:
        """The sample images as files' bytes, in the order of `expected`."""
        return [inside(self.path, f"{SAMPLES}/{s.file}").read_bytes() for s in self.manifest.samples]

    def expected(self) -> dict[str, np.ndarray]:
        """What the torch network gave for the samples: `probabilities` [S,K], `energy` [S], `embedding` [S,D]."""
        path = inside(self.path, f"{SAMPLES}/{EXPECTED}")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: unreadable expected outputs: {error}") from error


def read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise BundleError(f"{file}: no such file, so {path} is not a bundle") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: not readable as JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise BundleError(f"{file}: format {found} is newer than the {FORMAT} this Imago reads; update Imago")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{file}: {where}: {first['msg']}") from error


def inside(root: Path, name: str) -> Path:
    """`root/name`, refused where the name is absolute, climbs out of the bundle or leads through a link."""
    pure = PurePosixPath(name)
    path = root / pure
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{root}: the path {name!r} leads out of the bundle")
    return path


def check_sums(path: Path) -> None:
    """Compare every file with SHA256SUMS; a file that is missing, changed or not listed raises BundleError."""
    file = path / SUMS
    try:
        listed = dict(reversed(line.split("  ", 1)) for line in file.read_text().splitlines())
    except (OSError, ValueError) as error:
        raise BundleError(f"{file}: missing or malformed: {error}") from error
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and p.name != SUMS}
    for name in sorted(set(listed) | present):
        if name not in listed:
            raise BundleError(f"{path / name}: not listed in {SUMS}")
        if name not in present:
            raise BundleError(f"{path / name}: listed in {SUMS}, but missing")
        if sha256(inside(path, name)) != listed[name]:
            raise BundleError(f"{path / name}: changed since it was written (sha256 differs from {SUMS})")
