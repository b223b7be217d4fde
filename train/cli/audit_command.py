"""The command audit: audit the data that training would use, without training.

python -m train audit DATA [--recipe R] [--out DIR] [fit flags]
"""

from pathlib import Path

from train import audit
from train.data import DataError, ImageData

REPORTS = Path("artifacts/audit")


def run_audit_command(data: ImageData, report_directory: str | None) -> None:
    """Audit the data, write the report and print its paths.

    Raises DataError with a one-line message for data that can't be used. If some of its files are
    unreadable, a report that lists them is written first.
    """
    data.allow_unreadable(1.0)  # the report lists them
    directory = Path(report_directory or REPORTS / data.dataset.name)
    try:
        data.setup()
    except DataError as error:
        if data.unreadable:
            audit.write_refusal(data, str(error), directory)
            _print_paths(directory)
        raise

    findings = audit.run_audit(data, directory)
    has_losses = findings["unreadable"] or findings["left_out"]
    if not has_losses and not audit.summarize(findings):
        print("audit: no findings")
    _print_paths(directory)


def _print_paths(directory: Path) -> None:
    print(f"audit: {directory / 'index.html'} and {directory / 'audit.json'}")
