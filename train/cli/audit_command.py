"""The command audit: audit the data that training would use, without training.

python -m train audit DATA [--recipe R] [--out DIR] [--serve [--host H] [--port P]] [fit flags]
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.labelling import LabelApp
from models.labelling.local_server import DEFAULT_HOST, DEFAULT_PORT
from train import audit
from train.audit.server import AuditServer
from train.audit.suspects import SuspectSource
from train.cli.recipes import UsageError, extract_flag
from train.data import DataError, ImageData
from train.data.corrections import explain_missing_location
from train.data.source import notify

REPORTS = Path("artifacts/audit")
MAX_PORT = 65535


@dataclass(frozen=True)
class AuditOptions:
    """Flags that only this command has."""

    report_directory: str | None
    is_served: bool
    host: str
    port: int


def extract_audit_options(arguments: list[str]) -> tuple[AuditOptions, list[str]]:
    """Return the flags of this command, and the other arguments. Raises UsageError."""
    directory, arguments = extract_flag(arguments, "--out")
    host, arguments = extract_flag(arguments, "--host")
    port, arguments = extract_flag(arguments, "--port")
    is_served = "--serve" in arguments
    if (host or port) and not is_served:
        raise UsageError("--host and --port belong to --serve; add it")
    options = AuditOptions(directory, is_served, host or DEFAULT_HOST, _parse_port(port))
    return options, [argument for argument in arguments if argument != "--serve"]


def _parse_port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_PORT):
        raise UsageError(f"--port {text}: not a number in 0..{MAX_PORT}")
    return int(text)


def run_audit_command(
    data: ImageData, options: AuditOptions, embed: Callable[[], None] | None
) -> None:
    """Audit the data, write the report and print its paths; then serve the page where asked for.

    `embed` gives the data embeddings by a pretrained network, which the check of labels uses.

    Raises DataError with a one-line message for data that can't be used. If some of its files are
    unreadable, a report that lists them is written first.
    """
    data.allow_unreadable(1.0)  # the report lists them
    data.allow_missing_corrections()
    if options.is_served:
        _check_corrections_writable(data)
    directory = Path(options.report_directory or REPORTS / data.dataset.name)
    try:
        data.setup()
    except DataError as error:
        if data.unreadable:
            audit.write_refusal(data, str(error), directory)
            _print_paths(directory)
        raise

    if embed is not None:
        _embed_if_possible(embed)
    findings = audit.run_audit(data, directory)
    has_losses = findings["unreadable"] or findings["left_out"]
    if not has_losses and not audit.summarize(findings):
        print("audit: no findings")
    _print_paths(directory)
    if options.is_served:
        _serve(data, findings, options)


def _embed_if_possible(embed: Callable[[], None]) -> None:
    """Compute embeddings; print a line where the pretrained weights can't be had."""
    try:
        embed()
    except ValueError as error:
        notify(f"{error}. The audit checks labels without them")


def _print_paths(directory: Path) -> None:
    print(f"audit: {directory / 'index.html'} and {directory / 'audit.json'}")


def _check_corrections_writable(data: ImageData) -> None:
    """Raise DataError where corrections can't be saved, before the audit takes its time."""
    file = data.corrections_file
    if file is None:
        raise DataError(f"--serve: {explain_missing_location(data.dataset, data.corrections)}")
    directory = file.resolve().parent
    if not directory.is_dir():
        raise DataError(f"data.corrections: {directory}: no such folder; create it")
    if not os.access(directory, os.W_OK):
        raise DataError(
            f"{directory}: not writable, so corrections can't be saved there; give a file "
            "elsewhere: --data.corrections PATH"
        )


def _serve(data: ImageData, findings: audit.Findings, options: AuditOptions) -> None:
    """Serve the page until the process is interrupted."""
    editor = audit.CorrectionEditor(data)
    page = audit.render_page(findings, data)
    app = LabelApp(SuspectSource(data, findings, editor))
    with AuditServer(page, editor, app, options.host, options.port) as server:
        print(
            f"audit: {server.url} saves corrections to {editor.file}; the page /label shows the "
            "suspicious labels one by one; stop it with Ctrl-C",
            flush=True,
        )
        server.serve_forever()
