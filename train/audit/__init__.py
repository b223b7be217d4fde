"""The data audit: duplicates, leakage between parts, suspicious labels, and unusual images.

It runs before training, in one process:

    findings = run_audit(data, "artifacts/audit/photos")  # writes audit.json and index.html there
"""

import models.networks  # noqa: F401  (first: declares operators torchvision needs on a CPU torch)
from train.audit.editing import CorrectionEditor
from train.audit.findings import Findings, collect_findings
from train.audit.page import render_page
from train.audit.report import apply_findings, run_audit, write_refusal
from train.audit.summary import summarize

__all__ = [
    "CorrectionEditor",
    "Findings",
    "apply_findings",
    "collect_findings",
    "render_page",
    "run_audit",
    "summarize",
    "write_refusal",
]
