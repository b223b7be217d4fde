"""The job: labelled images in, a bundle out."""

import os
import signal
import sys

if sys.argv[0] == "-m":  # as a command, `python -m train`; __main__.py comes after the imports
    # They take seconds, and a container's first process does not get a signal that it has no handler for. There is
    # nothing to save yet; train/runs/preemption.py takes over.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))

# First: it declares what torchvision, and so lightning, needs beside a CPU torch.
import models.networks  # noqa: F401
