"""manifest.json: the contract between training, which writes it, and serving, which reads it.

The classes below are its JSON schema. Unknown fields are refused.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.bundle.errors import BundleError
from models.image import InputSpec

FORMAT = 1
"""Grows when a reader of today could misread what a later version writes."""

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 32 << 20

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
"""Names of models: they become directories, labels of metrics and parts of URLs."""

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
"""Signals with a baseline histogram."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Parity(_Part):
    """How close the ONNX graph is to the torch network on real validation images."""

    images: int
    batch_sizes: list[int]
    max_abs_diff: float = Field(description="largest |difference| of any probability")
    agreement: float = Field(description="share of images with the same label, 0..1")
    ties: list[int] = Field(
        default=[], description="indices whose two best classes lie within the tolerance"
    )


class Latency(_Part):
    """Speed on the machine that exported the bundle."""

    device: str
    threads: int
    batch_ms: dict[int, float] = Field(description="batch size -> median milliseconds of a run")
    images_per_second: float = Field(description="of the best batch size")


class Variant(_Part):
    """One ONNX file of the bundle: fp32 or int8."""

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
    """Fitted on validation data.

    The temperature is inside the graph; the server applies the rest.
    """

    temperature: float = 1.0
    nll_before: float | None = None
    nll_after: float | None = None
    ece_before: float | None = None
    ece_after: float | None = None
    abstain_threshold: float = Field(
        default=0.0, description="predictions with less confidence abstain"
    )
    abstain_accuracy: float | None = Field(
        default=None, description="requested accuracy of the predictions that don't abstain"
    )
    abstain_coverage: float | None = Field(
        default=None, description="share of images that don't abstain"
    )
    abstain_test_accuracy: float | None = Field(
        default=None, description="the same accuracy, measured on the test part"
    )
    abstain_test_coverage: float | None = Field(
        default=None, description="the same share, measured on the test part"
    )
    conformal_level: float | None = Field(
        default=None, description="requested coverage of prediction sets"
    )
    conformal_quantile: float | None = Field(
        default=None, description="a class is in the set when 1 - its probability is at most this"
    )
    conformal_coverage: float | None = Field(
        default=None, description="coverage measured on the test part"
    )
    energy_threshold: float | None = Field(
        default=None, description="more energy than this is out of distribution"
    )


class Histogram(_Part):
    """Distribution of one drift signal on validation data."""

    edges: list[float] = Field(description="n + 1 increasing edges; the outer bins are open")
    counts: list[int] = Field(description="n counts")


class ClassMetrics(_Part):
    """Metrics of one class, 0..1, and `support`, its number of images."""

    precision: float
    recall: float
    f1: float
    support: int


class Metrics(_Part):
    """Metrics of one part of the data, with the best weights."""

    images: int
    accuracy: float
    top5: float | None = None
    nll: float
    ece: float | None = None
    per_class: list[ClassMetrics] = []
    confusion: list[list[int]] = Field(
        default=[], description="rows: true class, columns: predicted; empty with many classes"
    )


class DataInfo(_Part):
    """The data set of the training run."""

    source: str
    digest: str = Field(description="sha256 over the pixels or files and labels")
    counts: dict[str, int] = Field(description="images of train, val and test")


class Provenance(_Part):
    """Where the bundle comes from: code, data, packages, device and settings."""

    git_commit: str | None = None
    git_dirty: bool | None = None
    data: DataInfo
    packages: dict[str, str] = Field(default={}, description="package -> version")
    device: str
    seed: int
    recipe: dict[str, Any] = {}
    seconds: dict[str, float] = Field(default={}, description="step of the run -> seconds")


class Sample(_Part):
    """A validation image in samples/ that is used to verify the bundle."""

    file: str
    label: int = Field(description="index of its class")


class Manifest(_Part):
    """The contents of manifest.json."""

    format: int = FORMAT
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    version: int = Field(ge=1)
    created: datetime
    network: str
    classes: list[str] = Field(min_length=2)
    input: InputSpec
    outputs: list[str] = Field(
        description="probabilities, energy, embedding, and cam where the head allows it"
    )
    variants: dict[str, Variant] = Field(min_length=1)
    calibration: Calibration = Calibration()
    baseline: dict[str, Histogram] = Field(
        default={}, description="drift signal -> histogram of validation data"
    )
    metrics: dict[str, Metrics] = Field(
        default={}, description="by part of the data: val, test, and others that were measured"
    )
    samples: list[Sample] = []
    notes: list[str] = Field(
        default=[], description="what a reader should know, e.g. why int8 is missing"
    )
    provenance: Provenance

    @model_validator(mode="after")
    def _check_sample_labels(self) -> "Manifest":
        for sample in self.samples:
            if not 0 <= sample.label < len(self.classes):
                raise ValueError(
                    f"sample {sample.file} has the label {sample.label}, "
                    f"but there are {len(self.classes)} classes"
                )
        return self

    def write(self, directory: Path) -> None:
        """Write manifest.json into a directory."""
        (directory / MANIFEST_FILE).write_text(self.model_dump_json(indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and validate manifest.json.

    Raises BundleError for a file that is missing, too large, not JSON, not valid, or of a newer
    format.
    """
    file = directory / MANIFEST_FILE
    content = _read_json(file, directory)

    file_format = content.get("format") if isinstance(content, dict) else None
    if isinstance(file_format, int) and file_format > FORMAT:
        raise BundleError(
            f"{file}: format {file_format} is newer than format {FORMAT}, "
            "the newest that this version reads; update Imago"
        )

    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleError(f"{file}: {field}: {first['msg']}") from error


def _read_json(file: Path, directory: Path) -> object:
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes")
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"{file}: no such file, so {directory} is not a bundle") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{file}: not readable as JSON: {error}") from error
