"""What training and serving must agree on: bytes to pixels, the bundle and its store, the networks."""

import os

# Newer builds of onnxruntime send usage data home from Linux too, and decide so when they are imported. Not from here.
for _name in ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"):
    os.environ.setdefault(_name, "1")
