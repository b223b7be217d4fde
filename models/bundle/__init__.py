"""The bundle: manifest, checksums, ONNX screening, signatures and verification.

bundle = Bundle("artifacts/store/digits/3")     # raises BundleError where it can't be trusted
bundle.manifest.classes
"""

from models.bundle.checksums import SUMS, BundleError, inside, sha256, write_sums
from models.bundle.manifest import (
    EXPECTED,
    MANIFEST,
    NAME,
    OUTPUTS,
    SAMPLES,
    SIGNALS,
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
    "EXPECTED",
    "MANIFEST",
    "NAME",
    "OUTPUTS",
    "SAMPLES",
    "SIGNALS",
    "SUMS",
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
    "inside",
    "read_manifest",
    "sha256",
    "write_sums",
]
