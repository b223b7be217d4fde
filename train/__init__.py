"""The training job: labelled images in, a bundle out."""

import os
import signal
import sys

# The imports below take seconds, and the first process of a container ignores a signal for which it
# has no handler. Nothing is worth saving yet, so a command ends at once on SIGTERM.
# train/runs/preemption.py replaces this handler. While `python -m train` imports this package,
# sys.argv[0] is "-m".
if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]) == "imago":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))

# Before torchvision and lightning are imported: declares the operators that they miss with a CPU
# build of torch.
import models.networks  # noqa: F401
