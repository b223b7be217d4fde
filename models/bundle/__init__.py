"""The bundle: manifest, checksums, ONNX screening, signatures and verification.

bundle = Bundle("artifacts/store/digits/3")     # raises BundleError where it can't be trusted
bundle.manifest.classes
"""

from models.bundle.checksums import (
    CHECKSUMS_FILE,
    BundleError,
    file_sha256,
    resolve_inside,
    write_checksums,
)
from models.bundle.manifest import (
    DRIFT_SIGNALS,
    EXPECTED_FILE,
    MANIFEST_FILE,
    NAME_PATTERN,
    REQUIRED_OUTPUTS,
    SAMPLES_DIRECTORY,
    Bundle,
    Calibration,
    ClassMetrics,
    DataInfo,
    Histogram,
    Latency,
    Manifest,
    Metrics,
    Parity,
    Provenance,
    Sample,
    Variant,
    read_manifest,
)

__all__ = [
    "CHECKSUMS_FILE",
    "DRIFT_SIGNALS",
    "EXPECTED_FILE",
    "MANIFEST_FILE",
    "NAME_PATTERN",
    "REQUIRED_OUTPUTS",
    "SAMPLES_DIRECTORY",
    "Bundle",
    "BundleError",
    "Calibration",
    "ClassMetrics",
    "DataInfo",
    "Histogram",
    "Latency",
    "Manifest",
    "Metrics",
    "Parity",
    "Provenance",
    "Sample",
    "Variant",
    "file_sha256",
    "read_manifest",
    "resolve_inside",
    "write_checksums",
]
