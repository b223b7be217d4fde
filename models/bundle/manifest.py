"""manifest.json: the contract between training, which writes it, and serving, which reads it.

The classes below are its JSON schema. Unknown fields are refused.
"""

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.bundle.errors import BundleError
from models.bundle.files import read_file
from models.image import InputSpec

FORMAT = 4
"""Grows with each new field, as readers refuse unknown ones. Older formats stay readable.

2: calibration and baseline of each variant.
3: corrections of the data.
4: gate.
"""

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


class Calibration(_Part):
    """Fitted on validation data with the outputs of one graph.

    The temperature is inside the graph; the server applies the rest.
    """

    temperature: float = 1.0
    nll_before: float | None = None
    nll_after: float | None = None
    ece_before: float | None = None
    ece_after: float | None = None
    abstain_threshold: float = Field(
        default=0.0, ge=0, le=1, description="predictions with less confidence abstain"
    )
    abstain_accuracy: float | None = Field(
        default=None, description="target accuracy of the predictions that don't abstain"
    )
    abstain_bound: float | None = Field(
        default=None,
        description="accuracy that they have at least, with 90 % confidence; None: validation data "
        "supports no threshold",
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

    @property
    def always_abstains(self) -> bool:
        """Whether every prediction abstains: no threshold reaches the requested accuracy."""
        return self.abstain_threshold == 1 and not self.abstain_coverage

    @property
    def lowest_answered_confidence(self) -> float:
        """Predictions with less confidence abstain. Infinite where all do.

        A threshold of 1 is not enough for that: the confidence of an image that the network is very
        sure of is rounded to 1.
        """
        return math.inf if self.always_abstains else self.abstain_threshold


class Histogram(_Part):
    """Distribution of one drift signal on validation data."""

    edges: list[float] = Field(description="n + 1 increasing edges; the outer bins are open")
    counts: list[int] = Field(description="n counts")


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
    accuracy: float | None = Field(
        default=None, description="on the test images without a duplicate in another part, 0..1"
    )
    latency: Latency | None = None
    parity: Parity | None = None
    tolerance: float = Field(
        default=1e-4, description="allowed |difference| of a probability from expected.npz"
    )
    calibration: Calibration | None = Field(
        default=None, description="fitted with this variant; null: the manifest's"
    )
    baseline: dict[str, Histogram] = Field(
        default={}, description="drift signals that differ from the manifest's baseline"
    )


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
    balanced_accuracy: float | None = Field(
        default=None, description="mean recall of the classes that the part has images of"
    )
    majority_accuracy: float | None = Field(
        default=None, description="accuracy of always predicting the largest class of the part"
    )
    top5: float | None = None
    nll: float
    ece: float | None = None
    per_class: list[ClassMetrics] = []
    confusion: list[list[int]] = Field(
        default=[], description="rows: true class, columns: predicted; empty with many classes"
    )


class CorrectionCounts(_Part):
    """Corrections by the user that were applied to the data."""

    relabelled: int = Field(default=0, ge=0, description="images with another label")
    left_out: int = Field(default=0, ge=0, description="images that are in no part")


class DataInfo(_Part):
    """The data set of the training run."""

    source: str
    digest: str = Field(description="sha256 over the pixels or files and labels")
    counts: dict[str, int] = Field(description="images of train, val and test")
    corrections: CorrectionCounts = CorrectionCounts()


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


class Gate(_Part):
    """The comparison with the version that was the latest, on the same test images."""

    compared_with: int = Field(description="version that was the latest")
    passed: bool
    reasons: list[str] = Field(default=[], description="what is worse beyond the budget")
    part: str = Field(description="test or live: the part whose accuracy counts")
    images: int = Field(description="of that part, compared")
    difference: float = Field(description="accuracy of the new version minus that of the old one")
    difference_low: float = Field(description="lower end of its confidence interval")
    difference_high: float = Field(description="upper end of its confidence interval")

    def describe(self) -> str:
        """Return the decision in one line."""
        numbers = (
            f"{100 * self.difference:+.2f} points of {self.part} accuracy against version "
            f"{self.compared_with} on {self.images} images ({100 * self.difference_low:+.2f} to "
            f"{100 * self.difference_high:+.2f})"
        )
        if self.passed:
            return f"passed: {numbers}"
        return f"refused: {'; '.join(self.reasons)}; {numbers}"


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
    calibration: Calibration = Field(
        default=Calibration(), description="of fp32, and of variants without their own"
    )
    baseline: dict[str, Histogram] = Field(
        default={}, description="drift signal -> histogram of validation data, with fp32"
    )
    metrics: dict[str, Metrics] = Field(
        default={}, description="by part of the data: val, test, and others that were measured"
    )
    samples: list[Sample] = []
    gate: Gate | None = Field(
        default=None, description="null: the first version, or published without a gate"
    )
    notes: list[str] = Field(
        default=[], description="what a reader should know, e.g. why int8 is missing"
    )
    provenance: Provenance

    @property
    def title(self) -> str:
        """NAME/VERSION, for messages and pages."""
        return f"{self.name}/{self.version}"

    @property
    def test_metrics(self) -> Metrics | None:
        """Metrics of the test images that have no duplicate in another part.

        They are those of all test images where the data is not audited, where no image has a
        duplicate, and where all have one.
        """
        return self.metrics.get("test_unleaked") or self.metrics.get("test")

    @model_validator(mode="after")
    def _check_sample_labels(self) -> "Manifest":
        for sample in self.samples:
            if not 0 <= sample.label < len(self.classes):
                raise ValueError(
                    f"sample {sample.file} has the label {sample.label}, "
                    f"but there are {len(self.classes)} classes"
                )
        return self

    def calibration_of(self, variant: str) -> Calibration:
        """Return the calibration to apply to the outputs of a variant."""
        return self.variants[variant].calibration or self.calibration

    def baseline_of(self, variant: str) -> dict[str, Histogram]:
        """Return the drift baseline of a variant: signal -> histogram of validation data."""
        return self.baseline | self.variants[variant].baseline

    def write(self, directory: Path) -> None:
        """Write manifest.json into a directory."""
        (directory / MANIFEST_FILE).write_text(self.model_dump_json(indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and validate manifest.json. Raises BundleError as `read_file` and `parse_manifest`."""
    missing = f"no such file, so {directory} is not a bundle"
    file = directory / MANIFEST_FILE
    return parse_manifest(read_file(file, MAX_MANIFEST_BYTES, missing), file)


def parse_manifest(data: bytes, source: object) -> Manifest:
    """Validate the contents of manifest.json; `source` names the file in error messages.

    Raises BundleError for contents that are not JSON, not valid, or of a newer format.
    """
    try:
        content = json.loads(data, parse_constant=_parse_finite, parse_float=_parse_finite)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source}: not readable as JSON: {error}") from error

    file_format = content.get("format") if isinstance(content, dict) else None
    if isinstance(file_format, int) and file_format > FORMAT:
        raise BundleError(
            f"{source}: format {file_format} is newer than format {FORMAT}, "
            "the newest that this version reads; update Imago"
        )

    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "manifest"
        raise BundleError(f"{source}: {field}: {first['msg']}") from error


def _parse_finite(text: str) -> float:
    """Parse a number of JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
