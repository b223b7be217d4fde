"""The training job: labelled images in, a bundle out.

It is a command line, and a function for Python programs and notebooks:

    from train import fit

    bundle = fit("~/photos", time_budget="10m")
    print(bundle.path, bundle.manifest.test_metrics.accuracy)
"""

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.cli.library import fit as fit

__all__ = ["fit"]

# The imports below take seconds, and the first process of a container ignores a signal for which it
# has no handler. Nothing is worth saving yet, so a command ends at once on SIGTERM.
# train/runs/preemption.py replaces this handler. While `python -m train` imports this package,
# sys.argv[0] is "-m".
if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "imago":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))


def __getattr__(name: str) -> Any:
    """Import `fit` when it is first used: torch and lightning take seconds."""
    if name != "fit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from train.cli.library import fit

    return fit
