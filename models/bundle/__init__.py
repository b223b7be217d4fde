"""The bundle: manifest, checksums, ONNX screening, signatures and verification.

bundle = Bundle("artifacts/store/digits/3")  # raises BundleError if it can't be trusted
bundle.manifest.classes
"""

from models.bundle.bundle import EXPECTED_FILE, SAMPLES_DIRECTORY, Bundle, GraphFile
from models.bundle.checksums import open_verified, write_checksums
from models.bundle.errors import BundleError
from models.bundle.files import CHECKSUMS_FILE, SIGNATURE_FILE, file_sha256, resolve_inside
from models.bundle.manifest import (
    DRIFT_SIGNALS,
    MANIFEST_FILE,
    NAME_PATTERN,
    Calibration,
    ClassMetrics,
    CorrectionCounts,
    DataInfo,
    Gate,
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
    "SAMPLES_DIRECTORY",
    "SIGNATURE_FILE",
    "Bundle",
    "BundleError",
    "Calibration",
    "ClassMetrics",
    "CorrectionCounts",
    "DataInfo",
    "Gate",
    "GraphFile",
    "Histogram",
    "Latency",
    "Manifest",
    "Metrics",
    "Parity",
    "Provenance",
    "Sample",
    "Variant",
    "file_sha256",
    "open_verified",
    "read_manifest",
    "resolve_inside",
    "write_checksums",
]
