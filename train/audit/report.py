"""Run the audit of a data module and write its report: audit.json and index.html."""

import json
from pathlib import Path

from train.audit.cache import cache_findings, load_cached_findings
from train.audit.findings import Findings, Refusal, collect_findings, describe_refusal
from train.audit.page import render_page, render_refusal
from train.audit.summary import summarize
from train.data import ImageData
from train.data.source import expand_home, notify
from train.failures import AuditOutOfMemory, is_out_of_memory


def run_audit(data: ImageData, out: str | Path | None = None) -> Findings:
    """Audit a data module after `setup`: record and print the result, and write the report.

    `out` is the report's directory; None writes none. The findings are kept in the data module's
    cache, so the next audit of the same data and split costs nothing. Raises AuditOutOfMemory.
    """
    findings = load_cached_findings(data)
    if findings is None:
        try:
            findings = collect_findings(data)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise AuditOutOfMemory(data.device) from error
            raise
        cache_findings(data, findings)

    apply_findings(data, findings)
    if out is not None:
        _write_report(out, findings, render_page(findings, data))
    for line in summarize(findings):
        notify(f"audit: {line}")
    return findings


def apply_findings(data: ImageData, findings: Findings) -> None:
    """Record the findings in the data module, which test metrics and the model card read.

    One process runs the audit; the others call this with its findings.
    """
    data.record_audit(findings["leakage"]["test"]["positions"], summarize(findings))


def write_refusal(data: ImageData, problem: str, out: str | Path) -> None:
    """Write the report of data that `setup` refused after it had decoded all images."""
    refusal = describe_refusal(data, problem)
    _write_report(out, refusal, render_refusal(refusal, data))


def _write_report(out: str | Path, content: Findings | Refusal, page: str) -> None:
    directory = expand_home(out)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "audit.json").write_text(json.dumps(content, indent=1) + "\n")
    # Names of classes may hold lone surrogates, which UTF-8 has no bytes for.
    (directory / "index.html").write_text(page, encoding="utf-8", errors="replace")
