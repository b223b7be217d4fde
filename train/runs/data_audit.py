"""The data audit as a step of a training run, and as a callback of the `test` command."""

from pathlib import Path

import lightning as L

from train import audit
from train.data import ImageData
from train.learning.system import Classifier
from train.runs.distributed import run_in_first_process


class Audit(L.Callback):
    """Settings of the audit. As a callback it audits the data before a test.

    The training run calls `audit_data` itself, before the fit.

    Args:
        enabled: search for duplicates, leaked images and suspicious labels; the findings are
            stored for the next run on the same data and split.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Audit, so that the test can leave out leaked images."""
        assert isinstance(pl_module, Classifier)
        if self.enabled and not getattr(trainer, "fast_dev_run", False):
            audit_data(trainer, pl_module.data, report_directory=None)


def audit_data(trainer: L.Trainer, data: ImageData, report_directory: Path | None) -> None:
    """Audit the data in the first process; apply the findings to the data in every process."""
    findings = run_in_first_process(trainer, lambda: audit.run_audit(data, report_directory))
    if findings is not None:
        audit.apply_findings(data, findings)
